"""Says how well a compiled model computes what its spec means, and how we know."""

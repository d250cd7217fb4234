"""What it takes for a bundle to load on this machine, step by step, up to the first that fails."""

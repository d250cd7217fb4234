"""Rewrites of the IR: each pass is a value, a pipeline is a tuple of them."""

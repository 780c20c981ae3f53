"""Statistics in, transforms of keys and values out: mathematics, no model."""

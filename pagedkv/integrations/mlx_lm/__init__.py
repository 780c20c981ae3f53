"""Models of mlx-lm: wrapping, probing, their caches, calibration."""

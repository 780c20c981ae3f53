"""Other people's code: mlx-lm, mlx-vlm, `mlx.nn`, servers, BLAS."""

"""From MLX's arrays to numpy's."""

from __future__ import annotations

import mlx.core as mx


def evaluated(array: mx.array) -> mx.array:
    """The array with its numbers computed, as numpy should be given it.

    Of an array that is still to be computed numpy has MLX do that in the middle of C code. An
    error there, such as that of a kernel that does not compile, ended the process before MLX
    0.32.4, and raises here.
    """
    mx.eval(array)
    return array

"""Rounding to a few bits: which codes a group of numbers gets, and what its step and offset are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

FLOAT16_MAX = 65504.0
LEAST_SCALE = 2.0**-24
"""The smallest number above zero in float16."""

TRIMMED = {2: 10, 3: 40}
"""By bits, the part of a group's range that its codes leave out at either end: one in so many.

With few codes a smaller step is worth more than the ends. One in ten gave the least KL at 2 bits,
one in forty at 3, none from 4 on; a search for the least squared error of each group gave more than
those (`docs/design.md`).
"""

BLOCKS = 8
"""Channels are rounded in so many blocks, one after the other, where errors are made up for.

On SmolLM2 and Qwen2.5 eight blocks of eight channels leave 0.80 of the error of the scores, 64 of
one channel each 0.79, four of sixteen 0.83 (`docs/design.md`)."""

Floats = npt.NDArray[np.float64]


def quantize(x: mx.array, group: int, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    """Affine codes as `mx.dequantize` reads them, by rounding between a group's ends.

    `mx.quantize` moves the scale so that zero and the larger end are exact; that costs a fifth of
    the KL of 4-bit keys (`docs/design.md`). The ends of the range are left out where there are few
    codes, see `TRIMMED`. Scale and bias are rounded to float16 first, then codes are chosen. Every
    operation rounds once and none can be fused, so that kernels give the same bits.

    Args:
        x: float16, the last axis a multiple of `group`.
        group: neighbours that share a scale and a bias.
        bits: of a code: 2, 3, 4 or 8.

    Returns:
        uint32 codes, lowest bits first along the last axis; float16 scales and biases, one per
        group.
    """
    codes, scale, bias = _rounded(x, group, bits)
    return _packed(codes.reshape(x.shape), bits), scale[..., 0], bias[..., 0]


def _rounded(x: mx.array, group: int, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    """Codes ``[..., groups, group]``, and scales and biases ``[..., groups, 1]``."""
    numbers = x.astype(mx.float32).reshape(*x.shape[:-1], -1, group)
    low, high = numbers.min(axis=-1, keepdims=True), numbers.max(axis=-1, keepdims=True)
    scale, bias = _affine(low, high, bits)
    return _codes(numbers, scale, bias, bits), scale, bias


def _affine(low: mx.array, high: mx.array, bits: int) -> tuple[mx.array, mx.array]:
    """Scales and biases of groups by their ends in float32; float16."""
    steps, parts = 2**bits - 1, TRIMMED.get(bits)
    width, bias = high - low, low
    if parts:
        width, bias = (parts - 2) * width, ((parts - 1) * low + high) / parts
    scale = mx.maximum(width / (steps * (parts or 1)), LEAST_SCALE).astype(mx.float16)
    bias = bias.astype(mx.float16)
    bias = mx.where(bias == 0, mx.array(0, mx.float16), bias)  # no minus zero
    # The last code must stand for a number that float16 has: a scale that was rounded up may not.
    last = bias.astype(mx.float32) + steps * scale.astype(mx.float32)
    bits_of = scale.view(mx.uint16)
    return mx.where(last > FLOAT16_MAX, bits_of - 1, bits_of).view(mx.float16), bias


def _codes(numbers: mx.array, scale: mx.array, bias: mx.array, bits: int) -> mx.array:
    codes = mx.round((numbers - bias.astype(mx.float32)) / scale.astype(mx.float32))
    return mx.clip(codes, 0, 2**bits - 1).astype(mx.uint32)


def _packed(codes: mx.array, bits: int) -> mx.array:
    """Codes side by side in words, the last axis a multiple of 32."""
    in_word = 8 if bits == 3 else 32 // bits
    parts = codes.reshape(*codes.shape[:-1], -1, in_word)
    words = (parts << (bits * mx.arange(in_word, dtype=mx.uint32))).sum(axis=-1)
    if bits != 3:
        return words
    a, b, c, d = (words[..., i::4] for i in range(4))  # 24 bits each: three words of four
    whole = mx.stack([a | b << 24, b >> 8 | c << 16, c >> 16 | d << 8], axis=-1)
    return whole.reshape(*whole.shape[:-2], -1)


def compensated(x: mx.array, feedback: mx.array, group: int, bits: int) -> mx.array:
    """Numbers moved so that rounding them makes up for the errors of channels before.

    What queries make of an error in one channel can be undone in part by another channel, where
    they are correlated. So a block of channels is rounded, and those behind it are moved by
    `feedback` times its errors. (The same was done for weights by OPTQ, arXiv:2210.17323.) Any
    reader of codes is right without knowing of it.

    Args:
        x: float16 ``[pages, kv_heads, channels, tokens]``, to be given to `quantize`.
        feedback: ``[kv_heads, channels, channels]``, see `feedback_for`.
        group: as for `quantize`.
        bits: likewise.

    Returns:
        float16, as `x`.
    """
    return _run(_moved, group, bits)(x, feedback)


def compensated_rows(x: mx.array, feedback: mx.array, group: int, bits: int) -> mx.array:
    """The same where channels of a token share a scale.

    It must be known before the first channel is rounded. So what is moved stays between the ends
    of its group, and the channels that have those stay where they are: then `quantize` finds the
    same ends.

    Args:
        x: float16 ``[pages, kv_heads, tokens, channels]``, to be given to `quantize`, with zeros
            behind where channels are not whole groups.
        feedback: ``[kv_heads, channels, channels]``, see `feedback_for`.
        group: as for `quantize`.
        bits: likewise.

    Returns:
        float16, as `x`.
    """
    return _run(_moved_rows, group, bits)(x, feedback)


_Mover = Callable[[mx.array, mx.array, int, int], mx.array]


def _run(move: _Mover, group: int, bits: int) -> Callable[[mx.array, mx.array], mx.array]:
    if mx.default_device() == mx.gpu:
        # A few hundred small operations: compiled, they take a quarter of the time (H100).
        return _compiled(move, group, bits)
    return lambda x, feedback: move(x, feedback, group, bits)


@lru_cache
def _compiled(move: _Mover, group: int, bits: int) -> Callable[[mx.array, mx.array], mx.array]:
    return mx.compile(lambda x, feedback: move(x, feedback, group, bits))


def _moved(x: mx.array, feedback: mx.array, group: int, bits: int) -> mx.array:
    out: list[mx.array] = []
    errors: list[mx.array] = []
    for start, end in blocks_of(x.shape[2]):
        true = x[:, :, start:end].astype(mx.float32)
        moved = true
        if errors:
            before = mx.concatenate(errors, axis=2)
            moved = true - feedback[:, start:end, :start].astype(mx.float32) @ before
        moved = to_16_bit(moved, mx.float16)
        codes, scale, bias = _rounded(moved, group, bits)
        said = codes.astype(mx.float32) * scale.astype(mx.float32) + bias.astype(mx.float32)
        out.append(moved)
        errors.append(said.reshape(true.shape) - true)
    return mx.concatenate(out, axis=2)


def _moved_rows(x: mx.array, feedback: mx.array, group: int, bits: int) -> mx.array:
    numbers = x.astype(mx.float32)
    whole = mx.pad(numbers, [(0, 0)] * 3 + [(0, -x.shape[3] % group)])  # as pages have them
    groups = whole.reshape(*x.shape[:3], -1, group)
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    # For every channel that of its group.
    ends = [
        mx.broadcast_to(part.astype(mx.float32), groups.shape).reshape(whole.shape)
        for part in (low, high, *_affine(low, high, bits))
    ]
    out: list[mx.array] = []
    errors: list[mx.array] = []
    for start, end in blocks_of(x.shape[3]):
        true, low, high, scale, bias = (part[..., start:end] for part in (numbers, *ends))
        moved = true
        if errors:
            gains = feedback[:, start:end, :start].astype(mx.float32).swapaxes(1, 2)
            moved = mx.clip(true - mx.concatenate(errors, axis=3) @ gains, low, high)
            moved = mx.where((true == low) | (true == high), true, moved)
        moved = moved.astype(mx.float16)
        codes = _codes(moved.astype(mx.float32), scale, bias, bits)
        out.append(moved)
        errors.append(codes.astype(mx.float32) * scale + bias - true)
    return mx.concatenate(out, axis=3)


def feedback_for(weights: Floats) -> Floats:
    """By how much each channel is moved for an error of 1 in one before it.

    With errors e of a token, ``e · weights · e`` is least if every block, when it is rounded, aims
    at what is best given the errors that are made already: the blocks' Schur complements.

    Args:
        weights: what pairs of errors count, symmetric and positive definite, ``[channels] * 2``.

    Returns:
        Zero but for rows of a block and columns of the blocks before it, ``[channels] * 2``.
    """
    left, out = weights.copy(), np.zeros_like(weights)
    for start, end in reversed(blocks_of(len(weights))[1:]):
        gain = np.linalg.solve(left[start:end, start:end], left[start:end, :start])
        out[start:end, :start] = gain
        left[:start, :start] -= left[:start, start:end] @ gain
    return out


def blocks_of(channels: int) -> list[tuple[int, int]]:
    """Where the blocks of `BLOCKS` begin and end."""
    size = max(1, -(-channels // BLOCKS))
    return [*itertools.pairwise([*range(0, channels, size), channels])]


def set_apart(keys: mx.array, values: mx.array, group: int) -> tuple[mx.array, mx.array]:
    """Keep what is not finite in a token out of the scales of other tokens.

    Such a token, whether its key or its value has it, is NaN in all of its value and has the key of
    a neighbour: whoever sees it gets NaN, as from the numbers themselves, and once nobody does it
    is as if it had never been there. Nothing is evaluated to find out.

    Args:
        keys: ``[..., tokens, key_dim]``, tokens a multiple of `group`.
        values: ``[..., tokens, value_dim]``.
        group: tokens that share scales of keys.

    Returns:
        Keys, all of them finite, and values; the same numbers where there is no such token.
    """
    finite = _finite(keys) & _finite(values)
    grouped = keys.reshape(*keys.shape[:-2], -1, group, keys.shape[-1])
    good = finite.reshape(grouped.shape[:-1])[..., None]
    first = mx.argmax(good, axis=-2, keepdims=True)
    neighbour = mx.take_along_axis(grouped, first, axis=-2)
    neighbour = mx.where(good.any(axis=-2, keepdims=True), neighbour, mx.zeros_like(neighbour))
    keys = mx.where(good, grouped, neighbour).reshape(keys.shape)
    return keys, mx.where(finite[..., None], values, mx.array(mx.nan, values.dtype))


def _finite(x: mx.array) -> mx.array:
    """Whether all numbers along the last axis are finite."""
    words, exponent = _EXPONENTS[x.dtype]
    # By the bits: a CPU takes thirty times as long to ask each number of 16 bit.
    return (x.view(words) & exponent).max(axis=-1) != exponent


_EXPONENTS = {
    mx.float16: (mx.uint16, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7F80),
    mx.float32: (mx.uint32, 0x7F800000),
}
"""By type, one of the same width, and the exponent's bits: all are set in what is not finite."""


def to_16_bit(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Cast; what float16 cannot hold is clamped: infinities would poison a whole group."""
    if x.dtype == dtype:
        return x
    if dtype == mx.float16:
        # In float32: bfloat16 has no 65504, its nearest number is beyond.
        x = mx.clip(x.astype(mx.float32), -FLOAT16_MAX, FLOAT16_MAX)
    return x.astype(dtype)

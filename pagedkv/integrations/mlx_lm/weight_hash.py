"""A hash over every bit of a model's weights, computed where they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import mlx.core as mx
import numpy as np
import numpy.typing as npt

BLOCK = 4096
"""Words of 32 bits whose sum is one number of 64 bits."""

PIECE = 2**24
"""Words that are hashed by one expression: 64 MiB, and three times that for temporaries."""

_PENDING = 4
"""Pieces whose sums are evaluated together."""

_ROWS = 16
"""Blocks that numpy takes at once: they stay in the processor's cache."""


def hash_arrays(named: Iterable[tuple[str, mx.array]]) -> str:
    """Hash arrays by names, shapes, types and every bit, as 32 hex digits.

    Each block of `BLOCK` words is compressed by NH (Black, Halevi, Krawczyk, Krovetz and Rogaway,
    "UMAC", 1999): the sum, modulo 2^64, of (a + k) * (b + k') over pairs of words, with one random
    key per place of the block. What all blocks gave, in order, then goes through SHA-256 with
    names, shapes and types, cut to 128 bits; so the place of a word always counts.

    Two blocks that differ anywhere have the same sum with a probability of at most 2^-32, taken
    over the keys; where m blocks differ, as in any tuned model, all m sums must agree. The keys
    are fixed and known: this tells models apart that were made without them in mind, and is no
    protection against somebody who looks for two with the same hash. Sums of integers are exact
    in any order: every device computes the same.

    Args:
        named: names and arrays, in an order that is always the same.
    """
    digest = hashlib.sha256()
    # On a CPU numpy does several times what MLX's unfused expressions do.
    sums = _on_device if mx.default_device().type == mx.DeviceType.gpu else _on_host
    for name, array in named:
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        for part in sums(_words(array)):
            digest.update(part.astype("<u8").tobytes())
    return digest.hexdigest()[:32]


def _words(array: mx.array) -> mx.array:
    """The bits of an array as uint32 ``[n]``; zeros fill up the last word."""
    flat = array.reshape(-1)
    if missing := -flat.nbytes % 4:
        octets = flat.view(mx.uint8)
        flat = mx.concatenate([octets, mx.zeros((missing,), mx.uint8)])
    return flat.view(mx.uint32) if flat.size else mx.zeros((0,), mx.uint32)


def _pieces(words: mx.array) -> Iterator[mx.array]:
    """Whole blocks, uint32 ``[n, BLOCK]``; zeros fill up the last one."""
    whole = words.size // BLOCK * BLOCK
    for start in range(0, whole, PIECE):
        yield words[start : min(start + PIECE, whole)].reshape(-1, BLOCK)
    if whole < words.size:
        yield mx.pad(words[whole:], (0, BLOCK - (words.size - whole)))[None]


def _on_device(words: mx.array) -> list[npt.NDArray[np.uint64]]:
    """Sums of blocks by MLX's default device."""
    sums: list[mx.array] = []
    keys = mx.array(_KEYS)
    for n, piece in enumerate(_pieces(words), 1):
        sums.append(_products(piece, keys).sum(axis=1))
        if n % _PENDING == 0:
            mx.eval(sums)
    mx.eval(sums)
    return [np.asarray(part) for part in sums]


@mx.compile
def _products(blocks: mx.array, keys: mx.array) -> mx.array:
    keyed = blocks + keys
    half = BLOCK // 2
    return keyed[:, :half].astype(mx.uint64) * keyed[:, half:].astype(mx.uint64)


def _on_host(words: mx.array) -> Iterator[npt.NDArray[np.uint64]]:
    """Sums of blocks by the processor, over the array's own memory."""
    half = BLOCK // 2
    for piece in _pieces(words):
        mx.eval(piece)
        blocks = np.asarray(piece)
        for start in range(0, len(blocks), _ROWS):
            keyed = blocks[start : start + _ROWS] + _KEYS
            yield np.multiply(keyed[:, :half], keyed[:, half:], dtype=np.uint64).sum(axis=1)


_KEYS: npt.NDArray[np.uint32] = np.frombuffer(
    hashlib.shake_128(b"pagedkv weight hash 1").digest(4 * BLOCK), "<u4"
).astype(np.uint32)

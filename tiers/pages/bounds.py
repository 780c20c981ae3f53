"""What is kept in memory of a cold page's keys: enough to bound every score they can give.

Keys are quantized per channel and group of 64 tokens, so a group's codes lie in a box with the
centre ``bias + (2^b - 1) / 2 · scale`` and the half widths ``(2^b - 1) / 2 · |scale|``: a score is
at most ``q · centre + |q| · half`` (the bound of Quest, arXiv:2406.10774, with quantized keys and
therefore without a gap). Inside the box no key is at every face at once: with z the codes as
numbers from -1 to 1, a score is also at most ``q · centre + |q ∘ half| · max |z|``, by Cauchy and
Schwarz. The smaller of the two holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import PageGeometry
from pagedkv.allocator.precision import GROUP_TOKENS

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]

_UNROUNDED_BITS = (2, 4, 8)
"""Codes that lie within bytes; of others the box alone is kept."""


@dataclass(frozen=True)
class PageBounds:
    """The keys of one page, roughly.

    Attributes:
        scales: of the keys, as in the page: float16 ``[kv_heads, key_dim, groups]``.
        biases: likewise.
        radius: the largest norm of a token's codes as numbers from -1 to 1, float32
            ``[kv_heads, groups]``.
        value_peak: no value is larger in magnitude, float32 ``[kv_heads]``.
    """

    scales: Halves
    biases: Halves
    radius: Floats
    value_peak: Floats

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return bounds_bytes(self.scales.shape)

    @classmethod
    def of(cls, geometry: PageGeometry, page: Bytes) -> PageBounds | None:
        """From a page's bytes; None for a 16-bit page, which has no scales.

        Args:
            geometry: of the page.
            page: uint8 ``[page_bytes]``.
        """
        if not geometry.precision.quantized:
            return None
        parts: dict[str, npt.NDArray[Any]] = {
            part.name: page[part.offset : part.offset + part.nbytes]
            .view(np.float16 if part.dtype == "float16" else np.uint8)
            .reshape(*part.shape[:-1], -1)
            for part in geometry.parts
        }
        steps = 2**geometry.precision.value_bits - 1
        biases = parts["value_biases"].astype(np.float32)
        ends = np.maximum(
            np.abs(biases), np.abs(biases + steps * parts["value_scales"].astype(np.float32))
        )
        radius = _radius(parts["key_codes"].view(np.uint8), geometry.precision.key_bits)
        return cls(
            parts["key_scales"].copy(), parts["key_biases"].copy(), radius, ends.max(axis=(1, 2))
        )


def bounds_bytes(shape: Sequence[int]) -> int:
    """Bytes that the bounds of a page take.

    Args:
        shape: KV heads, key channels, groups of 64 tokens.
    """
    heads, channels, groups = shape
    return heads * (4 * channels * groups + 4 * groups + 4)


def _radius(codes: Bytes, bits: int) -> Floats:
    """Per head and group the largest norm of a token's codes, each from -1 to 1.

    Args:
        codes: ``[kv_heads, key_dim, bytes]``, tokens along the last axis, lowest bits first.
        bits: of a code.
    """
    heads, channels, _ = codes.shape
    if bits not in _UNROUNDED_BITS:
        groups = codes.shape[2] * 8 // bits // GROUP_TOKENS
        return np.full((heads, groups), np.sqrt(channels), np.float32)
    per_byte, top = 8 // bits, 2**bits - 1
    squares = ((2 * np.arange(top + 1, dtype=np.float32) - top) / top) ** 2
    # What a byte's codes add to their tokens, in one look-up.
    each = (np.arange(256)[:, None] >> (bits * np.arange(per_byte))) & top
    norms = squares[each][codes].sum(axis=1).reshape(heads, -1, GROUP_TOKENS)
    # Rounded up: half a unit in the last place per addition is less than this.
    radius: Floats = np.sqrt(norms.max(axis=2)) * np.float32(1 + 1e-5)
    return radius


@dataclass(eq=False)
class _Chunk:
    """Bounds of some pages side by side, groups last: what one matrix product wants."""

    numbers: list[int]
    groups: int
    scales: mx.array  # float16 [kv_heads, key_dim, pages * groups]
    biases: mx.array
    radius: mx.array  # float32 [kv_heads, 1, pages * groups]
    value_peak: Floats  # [pages, kv_heads]
    steps: int  # 2^bits - 1


@dataclass(frozen=True)
class UpperBounds:
    """What cold pages can contribute to a softmax, at most.

    Attributes:
        numbers: of the pages.
        log_mass: logarithm of the sum of ``exp(score)`` over a page's tokens, at most: float32
            ``[pages, kv_heads, rows]``.
        value_peak: no value of a page is larger in magnitude, float32 ``[pages, kv_heads]``.
    """

    numbers: list[int]
    log_mass: Floats
    value_peak: Floats


class LayerBounds:
    """The bounds of one layer's cold pages, within a budget of memory."""

    def __init__(self, budget: int) -> None:
        """Make an empty one.

        Args:
            budget: bytes of memory; pages beyond it have no bounds.
        """
        self._budget = budget
        self._chunks: list[_Chunk] = []
        self._known: dict[int, int] = {}
        self._used = 0

    def __contains__(self, number: int) -> bool:
        return number in self._known

    @property
    def nbytes(self) -> int:
        """Bytes of memory of pages that are still there."""
        return self._used

    def add(self, number: int, geometry: PageGeometry, page: Bytes) -> None:
        """Keep the bounds of a page, unless there is no memory for them.

        Args:
            number: of the page.
            geometry: of the page.
            page: its bytes.
        """
        heads, channels = geometry.shape.kv_heads, geometry.shape.key_dim
        size = bounds_bytes((heads, channels, geometry.tokens // GROUP_TOKENS))
        if number in self._known or self._used + size > self._budget:
            return
        bounds = PageBounds.of(geometry, page)
        if bounds is None:
            return
        self._known[number] = size
        self._used += size
        self._chunks.append(
            _Chunk(
                [number],
                bounds.scales.shape[2],
                mx.array(bounds.scales),
                mx.array(bounds.biases),
                mx.array(bounds.radius[:, None]),
                bounds.value_peak[None],
                2**geometry.precision.key_bits - 1,
            )
        )
        self._merge()

    def forget(self, number: int) -> None:
        """A page is gone."""
        self._used -= self._known.pop(number, 0)

    def _merge(self) -> None:
        """Join the last chunks until each is twice the next: few chunks, and few copies."""
        while len(self._chunks) > 1:
            first, second = self._chunks[-2:]
            if first.steps != second.steps or len(first.numbers) > 2 * len(second.numbers):
                return
            self._chunks[-2:] = [self._joined(first, second)]

    def _joined(self, first: _Chunk, second: _Chunk) -> _Chunk:
        """Two chunks without the pages that are gone."""
        numbers = first.numbers + second.numbers
        alive = [i for i, number in enumerate(numbers) if number in self._known]
        groups = first.groups
        columns = mx.array([groups * i + g for i in alive for g in range(groups)], mx.uint32)

        def join(a: mx.array, b: mx.array) -> mx.array:
            both = mx.concatenate([a, b], axis=2)
            return both if len(alive) == len(numbers) else both[:, :, columns]

        chunk = _Chunk(
            [numbers[i] for i in alive],
            groups,
            join(first.scales, second.scales),
            join(first.biases, second.biases),
            join(first.radius, second.radius),
            np.concatenate([first.value_peak, second.value_peak])[alive],
            first.steps,
        )
        mx.eval(chunk.scales, chunk.biases, chunk.radius)
        return chunk

    def upper(self, q: mx.array, wanted: Iterable[int]) -> UpperBounds:
        """Bounds for some queries.

        Args:
            q: float32 ``[kv_heads, rows, key_dim]``, already scaled.
            wanted: page numbers; those without bounds are left out.
        """
        asked = {number for number in wanted if number in self._known}
        numbers: list[int] = []
        masses, peaks = [], []
        for chunk in self._chunks:
            columns = [i for i, number in enumerate(chunk.numbers) if number in asked]
            if not columns:
                continue
            numbers += [chunk.numbers[i] for i in columns]
            masses.append(_log_mass(chunk, q)[columns])
            peaks.append(chunk.value_peak[columns])
        heads, rows = q.shape[:2]
        if not numbers:
            return UpperBounds(
                [], np.zeros((0, heads, rows), np.float32), np.zeros((0, heads), np.float32)
            )
        return UpperBounds(numbers, np.concatenate(masses), np.concatenate(peaks))


def _log_mass(chunk: _Chunk, q: mx.array) -> Floats:
    """``[pages, kv_heads, rows]``; see `UpperBounds`."""
    half = chunk.scales.astype(mx.float32) * (chunk.steps / 2)
    centre = chunk.biases.astype(mx.float32) + half
    half = mx.abs(half)
    box = mx.abs(q) @ half
    ball = mx.sqrt(mx.square(q) @ mx.square(half)) * chunk.radius
    # What rounding may take from a sum of products in float32.
    longest = mx.sqrt(mx.square(centre).sum(axis=1, keepdims=True)) + chunk.radius * half.max(
        axis=1, keepdims=True
    )
    slack = mx.sqrt(mx.square(q).sum(axis=2, keepdims=True)) * longest
    score = q @ centre + mx.minimum(box, ball) + slack * (2.0**-23 * q.shape[2])
    # A scale that is no number bounds nothing.
    score = mx.where(mx.isnan(score), mx.array(mx.inf), score)
    per_page = score.reshape(*q.shape[:2], -1, chunk.groups)
    mass = mx.logsumexp(per_page, axis=3) + float(np.log(GROUP_TOKENS))
    mx.eval(mass)
    out: Floats = np.array(mass).transpose(2, 0, 1)
    return out

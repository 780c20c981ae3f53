"""Attention over page records, as partial softmaxes that merge: one interface, two ways.

A partial is the softmax of some of the keys, kept apart as its running maximum, its sum and its
weighted values, in float32. Two partials merge into the softmax over both sets of keys (the
online softmax of Milakov & Gimelshein, arXiv:1805.02867, as FlashAttention uses it).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import mlx.core as mx

from pagedkv.attn.fused.decode import FusedLayer
from pagedkv.attn.kernels.launch import Launcher, device_launcher
from pagedkv.tiers import AffineCodec, Sixteen

FEW_ROWS = 8
"""Rows (query heads of a KV head times query tokens) up to which the CPU multiplies codes."""

FLOOR = -1e30
"""Stands in for a maximum of minus infinity, so that a fully masked row gives zeros, not NaN."""


class Partial(NamedTuple):
    """Softmax over part of the keys; rows are the query heads of a KV head times query tokens.

    Attributes:
        peak: largest score, float32 ``[kv_heads, rows, 1]``; minus infinity if all are masked.
        total: sum of ``exp(score - peak)``, float32 ``[kv_heads, rows, 1]``.
        weighted: sum of ``exp(score - peak) · value``, float32 ``[kv_heads, rows, value_dim]``.
    """

    peak: mx.array
    total: mx.array
    weighted: mx.array

    def merge(self, other: Partial) -> Partial:
        """The softmax over both sets of keys."""
        peak = mx.maximum(self.peak, other.peak)
        base = mx.maximum(peak, FLOOR)
        mine, theirs = mx.exp(self.peak - base), mx.exp(other.peak - base)
        return Partial(
            peak,
            self.total * mine + other.total * theirs,
            self.weighted * mine + other.weighted * theirs,
        )

    def finish(self) -> mx.array:
        """The attention output, float32 ``[kv_heads, rows, value_dim]``; 0 where all is masked."""
        return self.weighted / mx.where(self.total > 0, self.total, 1.0)


class Backend(Protocol):
    """Scores page records and sums their values."""

    name: str

    def scores(self, q: mx.array, codec: AffineCodec | Sixteen, records: mx.array) -> mx.array:
        """Products of queries and keys.

        Args:
            q: float32 ``[kv_heads, rows, key_dim]``, already scaled.
            codec: of the pages.
            records: uint32 ``[pages, page_bytes / 4]``.

        Returns:
            float32 ``[pages, kv_heads, rows, tokens]``.
        """
        ...

    def weigh(
        self,
        p: mx.array,
        codec: AffineCodec | Sixteen,
        records: mx.array,
        there: mx.array | None = None,
    ) -> mx.array:
        """Values weighted and summed over the tokens of each page.

        Args:
            p: float32 ``[pages, kv_heads, rows, tokens]``.
            codec: of the pages.
            records: uint32 ``[pages, page_bytes / 4]``.
            there: which tokens are, bool ``[pages, tokens]``: others weigh nothing, and may be NaN;
                all of them if None.

        Returns:
            float32 ``[pages, kv_heads, rows, value_dim]``.
        """
        ...


class DequantizeBackend:
    """Dequantizes pages to float32 and multiplies: the way of the CPU, and the fallback."""

    name = "dequantize"

    def scores(self, q: mx.array, codec: AffineCodec | Sixteen, records: mx.array) -> mx.array:
        """See `Backend.scores`."""
        return q @ codec.page_keys(records, mx.float32)

    def weigh(
        self,
        p: mx.array,
        codec: AffineCodec | Sixteen,
        records: mx.array,
        there: mx.array | None = None,
    ) -> mx.array:
        """See `Backend.weigh`."""
        return p @ _only(codec.page_values(records, mx.float32), there)


class QuantizedBackend(DequantizeBackend):
    """Multiplies codes as they are, with `mx.quantized_matmul`; the way of a Mac's GPU.

    Scales are widened to float32, so products are summed and kept in float32.
    """

    name = "quantized"

    def scores(self, q: mx.array, codec: AffineCodec | Sixteen, records: mx.array) -> mx.array:
        """See `Backend.scores`."""
        if not isinstance(codec, AffineCodec):
            return super().scores(q, codec, records)
        codes, scales, biases, group, bits = codec.key_triple(records)
        pages = (records.shape[0], *q.shape)
        return mx.quantized_matmul(
            mx.broadcast_to(q, pages),
            codes,
            scales.astype(mx.float32),
            biases.astype(mx.float32),
            transpose=False,
            group_size=group,
            bits=bits,
        )

    def weigh(
        self,
        p: mx.array,
        codec: AffineCodec | Sixteen,
        records: mx.array,
        there: mx.array | None = None,
    ) -> mx.array:
        """See `Backend.weigh`."""
        if not isinstance(codec, AffineCodec):
            return super().weigh(p, codec, records, there)
        codes, scales, biases, group, bits = codec.value_triple(records)
        out = mx.quantized_matmul(
            p,
            codes,
            _only(scales.astype(mx.float32), there),
            _only(biases.astype(mx.float32), there),
            transpose=False,
            group_size=group,
            bits=bits,
        )
        return out[..., : codec.geometry.shape.value_dim]


class KernelBackend:
    """The GPU's way: fused kernels where they are made for a call, else composed of MLX's own.

    One for each layer's cache: it keeps the page table on the device between steps.

    Attributes:
        fused: what the kernels do for the layer.
    """

    name = "kernel"

    def __init__(self, launcher: Launcher | None = None) -> None:
        self.fused = FusedLayer(launcher or device_launcher())
        self._composed = composed_for_gpu()

    def scores(self, q: mx.array, codec: AffineCodec | Sixteen, records: mx.array) -> mx.array:
        """See `Backend.scores`."""
        return self._composed.scores(q, codec, records)

    def weigh(
        self,
        p: mx.array,
        codec: AffineCodec | Sixteen,
        records: mx.array,
        there: mx.array | None = None,
    ) -> mx.array:
        """See `Backend.weigh`."""
        return self._composed.weigh(p, codec, records, there)


class CpuBackend:
    """Products of codes for a few rows, dequantized pages for many; what pays on the CPU.

    MLX's quantized product takes time per row, dequantizing takes it once per page: with one row
    the product is 4 to 10 times faster, from some 8 rows on it is slower (`docs/design.md`). The
    choice depends on the number of rows alone, never on where pages are.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._few, self._many = QuantizedBackend(), DequantizeBackend()

    def _for(self, rows: mx.array) -> Backend:
        return self._few if rows.shape[-2] <= FEW_ROWS else self._many

    def scores(self, q: mx.array, codec: AffineCodec | Sixteen, records: mx.array) -> mx.array:
        """See `Backend.scores`."""
        return self._for(q).scores(q, codec, records)

    def weigh(
        self,
        p: mx.array,
        codec: AffineCodec | Sixteen,
        records: mx.array,
        there: mx.array | None = None,
    ) -> mx.array:
        """See `Backend.weigh`."""
        return self._for(p).weigh(p, codec, records, there)


def page_partial(
    backend: Backend,
    q: mx.array,
    codec: AffineCodec | Sixteen,
    records: mx.array,
    mask: mx.array | None,
    there: mx.array | None = None,
) -> Partial:
    """The partial of one run of pages.

    Args:
        backend: how to multiply.
        q: float32 ``[kv_heads, rows, key_dim]``, already scaled.
        codec: of the pages.
        records: uint32 ``[pages, page_bytes / 4]``.
        mask: added to the scores: float32, broadcastable to ``[pages, kv_heads, rows, tokens]``.
        there: see `Backend.weigh`; the mask leaves nothing of other tokens.
    """
    if codec.treatment:
        q = codec.treatment.page_queries(q)
    scores = backend.scores(q, codec, records)
    scores = _masked(scores, mask)
    peak = scores.max(axis=(0, 3), keepdims=True)
    p = mx.exp(scores - mx.maximum(peak, FLOOR))
    total = p.sum(axis=(0, 3), keepdims=True)
    out = backend.weigh(p, codec, records, there).sum(axis=0)
    if codec.treatment:
        out = codec.treatment.own_values(out)
    return Partial(peak[0], total[0], out)


def _masked(scores: mx.array, mask: mx.array | None) -> mx.array:
    """Scores with a mask added; what it leaves nothing of may be NaN."""
    if mask is None:
        return scores
    return mx.where(mask == -mx.inf, mask, scores + mask)


def _only(numbers: mx.array, there: mx.array | None) -> mx.array:
    """Numbers ``[pages, kv_heads, tokens, n]`` of tokens that are there; zeros for others."""
    if there is None:
        return numbers
    return mx.where(there[:, None, :, None], numbers, mx.array(0, numbers.dtype))


def dense_partial(q: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None) -> Partial:
    """The partial of keys and values that are plain arrays.

    Args:
        q: float32 ``[kv_heads, rows, key_dim]``, already scaled.
        keys: ``[kv_heads, n, key_dim]``.
        values: ``[kv_heads, n, value_dim]``.
        mask: added to the scores: float32, broadcastable to ``[kv_heads, rows, n]``.
    """
    scores = q @ keys.astype(mx.float32).swapaxes(1, 2)
    scores = _masked(scores, mask)
    peak = scores.max(axis=2, keepdims=True)
    p = mx.exp(scores - mx.maximum(peak, FLOOR))
    return Partial(peak, p.sum(axis=2, keepdims=True), p @ values.astype(mx.float32))


def sink_partial(sinks: mx.array, kv_heads: int, query_tokens: int, value_dim: int) -> Partial:
    """A model's learned attention sinks as one more partial: a score without a value.

    Args:
        sinks: one logit per query head, ``[query_heads]``.
        kv_heads: KV heads.
        query_tokens: query tokens per head.
        value_dim: channels of a value.
    """
    repeats = sinks.size // kv_heads
    per_row = mx.broadcast_to(
        sinks.astype(mx.float32).reshape(kv_heads, repeats, 1), (kv_heads, repeats, query_tokens)
    )
    peak = per_row.reshape(kv_heads, repeats * query_tokens, 1)
    return Partial(peak, mx.ones_like(peak), mx.zeros((*peak.shape[:2], value_dim)))


def composed_for_gpu() -> Backend:
    """What suits a GPU where no kernel of ours runs."""
    # On CUDA MLX's quantized product has no implementation for many batched shapes.
    return QuantizedBackend() if mx.metal.is_available() else DequantizeBackend()


def choose_backend(name: str) -> Backend:
    """The backend of that name; ``"auto"`` takes what suits the default device."""
    on_gpu = mx.default_device() == mx.gpu
    if name == "kernel" or (name == "auto" and on_gpu):
        return KernelBackend()
    if name == "auto":
        return CpuBackend()
    return QuantizedBackend() if name == "quantized" else DequantizeBackend()

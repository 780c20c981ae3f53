"""Page codecs: 16-bit keys and values in, page records out, and back.

A record is a page's bytes as uint32 words, the same in memory and on NVMe; the arrays inside it
are ordinary MLX affine-quantized triples (`mx.quantize`, w = code · scale + bias), laid out by
`PageGeometry`. Keys are stored transposed so that each channel has its own scale and bias for 64
tokens (per-channel keys as in KIVI, arXiv:2402.02750), values have theirs per token.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import mlx.core as mx

from pagedkv.allocator import KVShape, PageGeometry, Precision
from pagedkv.allocator.precision import GROUP_TOKENS

FLOAT16_MAX = 65504.0


class QuantizedTriple(NamedTuple):
    """What `mx.quantized_matmul` takes, with its two settings.

    Attributes:
        codes: uint32, packed along the last axis.
        scales: float16, one per group along the last axis.
        biases: float16, like scales.
        group_size: elements per group.
        bits: bits per element.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int

    def dequantize(self, dtype: mx.Dtype) -> mx.array:
        """The numbers themselves, computed in float32 and rounded once to `dtype`."""
        # On the CPU a float32 dequantize is six times faster than a float16 one.
        work = mx.float32 if dtype == mx.float32 or not _on_gpu() else mx.float16
        scales, biases = self.scales.astype(work), self.biases.astype(work)
        out = mx.dequantize(self.codes, scales, biases, group_size=self.group_size, bits=self.bits)
        return out.astype(dtype)


class PageCodec(Protocol):
    """Turns the tokens of one layer into page records of one geometry, and back."""

    geometry: PageGeometry

    def encode(self, keys: mx.array, values: mx.array) -> mx.array:
        """Seal whole pages.

        Args:
            keys: ``[kv_heads, pages * tokens, key_dim]``, any float type.
            values: ``[kv_heads, pages * tokens, value_dim]``.

        Returns:
            uint32 ``[pages, page_bytes / 4]``.
        """
        ...

    def keys(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """Keys of the pages, transposed: ``[pages, kv_heads, key_dim, tokens]``."""
        ...

    def values(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """Values of the pages: ``[pages, kv_heads, tokens, value_dim]``."""
        ...


class _Layout:
    """Shared by both codecs: parts into words and words into parts."""

    def __init__(self, geometry: PageGeometry, hot_dtype: mx.Dtype) -> None:
        self.geometry = geometry
        self._dtypes = {"uint32": mx.uint32, "float16": mx.float16, "hot": hot_dtype}
        self._parts = {part.name: part for part in geometry.parts}

    def _pages(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """To ``[pages, kv_heads, key_dim, tokens]``, ``[pages, kv_heads, tokens, value_dim]``."""
        heads, length, _ = keys.shape
        tokens = self.geometry.tokens
        if length % tokens:
            raise ValueError(f"{length} tokens are not whole pages of {tokens}")
        split = (heads, length // tokens, tokens, -1)
        return (
            keys.reshape(split).transpose(1, 0, 3, 2),
            values.reshape(split).transpose(1, 0, 2, 3),
        )

    def _join(self, arrays: list[mx.array]) -> mx.array:
        pages = arrays[0].shape[0]
        words = [mx.contiguous(a).reshape(pages, -1).view(mx.uint32) for a in arrays]
        padding = (self.geometry.page_bytes - self.geometry.payload_bytes) // 4
        if padding:
            words.append(mx.zeros((pages, padding), mx.uint32))
        return mx.concatenate(words, axis=1)

    def _part(self, records: mx.array, name: str) -> mx.array:
        part = self._parts[name]
        start = part.offset // 4
        words = mx.contiguous(records[:, start : start + part.nbytes // 4])
        return words.view(self._dtypes[part.dtype]).reshape(-1, *part.shape)


class AffineCodec(_Layout):
    """Keys and values quantized with `mx.quantize`, each with its own bits (2, 3, 4 or 8)."""

    def encode(self, keys: mx.array, values: mx.array) -> mx.array:
        """See `PageCodec.encode`. Inputs beyond float16's range are clamped to it."""
        keys, values = self._pages(to_16_bit(keys, mx.float16), to_16_bit(values, mx.float16))
        extra = self.geometry.padded_value_dim - self.geometry.shape.value_dim
        if extra:
            values = mx.pad(values, [(0, 0)] * 3 + [(0, extra)])
        precision = self.geometry.precision
        return self._join(
            [
                *mx.quantize(keys, group_size=GROUP_TOKENS, bits=precision.key_bits),
                *mx.quantize(
                    values, group_size=self.geometry.value_group, bits=precision.value_bits
                ),
            ]
        )

    def key_triple(self, records: mx.array) -> QuantizedTriple:
        """Transposed keys, groups along the tokens: for ``q @ K`` with ``transpose=False``."""
        return self._triple(records, "key", GROUP_TOKENS, self.geometry.precision.key_bits)

    def value_triple(self, records: mx.array) -> QuantizedTriple:
        """Values, groups along the channels (padded to whole groups): for ``p @ V``."""
        geometry = self.geometry
        return self._triple(records, "value", geometry.value_group, geometry.precision.value_bits)

    def _triple(self, records: mx.array, kind: str, group: int, bits: int) -> QuantizedTriple:
        codes, scales, biases = (
            self._part(records, f"{kind}_{part}") for part in ("codes", "scales", "biases")
        )
        return QuantizedTriple(codes, scales, biases, group, bits)

    def keys(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `PageCodec.keys`."""
        return self.key_triple(records).dequantize(dtype)

    def values(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `PageCodec.values`."""
        values = self.value_triple(records).dequantize(dtype)
        return values[..., : self.geometry.shape.value_dim]


class Sixteen(_Layout):
    """Keys and values in the cache's 16-bit type, bit for bit."""

    def __init__(self, geometry: PageGeometry, hot_dtype: mx.Dtype) -> None:
        # A float32 hot tier (hot_dtype="model") still has 16-bit pages.
        super().__init__(geometry, mx.float16 if hot_dtype == mx.float32 else hot_dtype)

    def encode(self, keys: mx.array, values: mx.array) -> mx.array:
        """See `PageCodec.encode`."""
        dtype = self._dtypes["hot"]
        keys, values = self._pages(to_16_bit(keys, dtype), to_16_bit(values, dtype))
        return self._join([keys, values])

    def keys(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `PageCodec.keys`."""
        return self._part(records, "keys").astype(dtype)

    def values(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `PageCodec.values`."""
        return self._part(records, "values").astype(dtype)


def codec_for(
    shape: KVShape, tokens: int, precision: Precision, hot_dtype: mx.Dtype
) -> AffineCodec | Sixteen:
    """The codec of a layer's pages at one precision.

    Args:
        shape: heads and channels of the layer.
        tokens: tokens per page.
        precision: bits of keys and values, or 16 bit.
        hot_dtype: type of the cache's hot tier, kept as it is by 16-bit pages.
    """
    geometry = PageGeometry(shape, tokens, precision)
    kind = AffineCodec if precision.quantized else Sixteen
    return kind(geometry, hot_dtype)


def _on_gpu() -> bool:
    return bool(mx.default_device() == mx.gpu)


def to_16_bit(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Cast; what float16 cannot hold is clamped: infinities would poison a whole group."""
    if x.dtype == dtype:
        return x
    if dtype == mx.float16:
        # In float32: bfloat16 has no 65504, its nearest number is beyond.
        x = mx.clip(x.astype(mx.float32), -FLOAT16_MAX, FLOAT16_MAX)
    return x.astype(dtype)

"""Page codecs: 16-bit keys and values in, page records out, and back.

A record is a page's bytes as uint32 words, the same in memory and on NVMe; the arrays inside it
are ordinary MLX affine-quantized triples (what `mx.quantize` gives, w = code · scale + bias), laid
out by `PageGeometry`. Keys are stored transposed so that each channel has its own scale and bias
for 64 tokens (per-channel keys as in KIVI, arXiv:2402.02750), values have theirs per token.

Where a layer has a `Treatment`, all its pages hold treated keys and values: `page_keys` and
`page_values` give them as they are there, `keys` and `values` as they came.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

import mlx.core as mx

from pagedkv.allocator import KVShape, PageGeometry, Precision
from pagedkv.allocator.precision import GROUP_TOKENS
from pagedkv.tiers.codec.rounding import (
    compensated,
    compensated_rows,
    quantize,
    set_apart,
    to_16_bit,
)
from pagedkv.tiers.codec.transform import LEAST_BITS, Treatment


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
    treatment: Treatment | None

    def encode(self, keys: mx.array, values: mx.array) -> mx.array:
        """Seal whole pages.

        Args:
            keys: ``[kv_heads, pages * tokens, key_dim]``, any float type.
            values: ``[kv_heads, pages * tokens, value_dim]``.

        Returns:
            uint32 ``[pages, page_bytes / 4]``.
        """
        ...

    def recode(self, records: mx.array, stored: AffineCodec | Sixteen) -> mx.array:
        """Pages of another precision of the same layer, encoded again.

        Keys or values that keep their bits are copied. Others are computed in float32 from what
        is stored, as the pages hold them (a treatment is not undone), rounded to float16 and
        quantized like those that are sealed.

        Args:
            records: of whole pages.
            stored: their codec: of the same shape, tokens per page and treatment.

        Returns:
            uint32 ``[pages, page_bytes / 4]``.
        """
        ...

    def page_keys(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """Keys as the pages hold them, transposed: ``[pages, kv_heads, key_dim, tokens]``."""
        ...

    def page_values(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """Values as the pages hold them: ``[pages, kv_heads, tokens, value_dim]``."""
        ...

    def keys(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """Keys as they came, transposed like `page_keys`."""
        ...

    def values(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """Values as they came."""
        ...


Layout = TypeVar("Layout", bound="_Layout")


class _Layout:
    """Shared by both codecs: parts into words and words into parts."""

    def __init__(
        self, geometry: PageGeometry, hot_dtype: mx.Dtype, treatment: Treatment | None = None
    ) -> None:
        self.geometry = geometry
        self.treatment = treatment
        self._dtypes = {"uint32": mx.uint32, "float16": mx.float16, "hot": hot_dtype}
        self._parts = {part.name: part for part in geometry.parts}

    def encode(self, keys: mx.array, values: mx.array) -> mx.array:
        """See `PageCodec.encode`. Inputs beyond float16's range are clamped to it."""
        keys, values = self._pages(keys, values)
        return self._join([*self._key_arrays(keys), *self._value_arrays(values)])

    def recode(self, records: mx.array, stored: AffineCodec | Sixteen) -> mx.array:
        """See `PageCodec.recode`."""
        mine, theirs = self.geometry.precision, stored.geometry.precision
        page_keys = stored.page_keys(records, mx.float32)
        page_values = stored.page_values(records, mx.float32)
        if isinstance(stored, Sixteen):
            rows, page_values = self._set_apart(page_keys.swapaxes(2, 3), page_values)
            page_keys = rows.swapaxes(2, 3)
        if mine.key_bits == theirs.key_bits:
            keys = stored._arrays(records, "key")
        else:
            keys = self._key_arrays(to_16_bit(page_keys, self._numbers))
        if mine.value_bits == theirs.value_bits:
            values = stored._arrays(records, "value")
        else:
            values = self._value_arrays(to_16_bit(page_values, self._numbers))
        return self._join([*keys, *values])

    def _set_apart(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values ``[pages, kv_heads, tokens, dim]`` so that no token spoils others."""
        return keys, values

    @property
    def _numbers(self) -> mx.Dtype:
        """The 16-bit type that numbers have before they are stored."""
        raise NotImplementedError

    def _key_arrays(self, keys: mx.array) -> list[mx.array]:
        """What a page stores of keys ``[pages, kv_heads, key_dim, tokens]`` in a 16-bit type."""
        raise NotImplementedError

    def _value_arrays(self, values: mx.array) -> list[mx.array]:
        """Likewise of values ``[pages, kv_heads, tokens, value_dim]``."""
        raise NotImplementedError

    @property
    def untreated(self: Layout) -> Layout:
        """The same for keys and values that are as pages hold them already."""
        return self if self.treatment is None else type(self)(self.geometry, self._dtypes["hot"])

    def _pages(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """What pages hold, in a 16-bit type.

        Returns:
            ``[pages, kv_heads, key_dim, tokens]`` and ``[pages, kv_heads, tokens, value_dim]``.
        """
        heads, length, _ = keys.shape
        tokens = self.geometry.tokens
        if length % tokens:
            raise ValueError(f"{length} tokens are not whole pages of {tokens}")
        split = (heads, length // tokens, tokens, -1)
        # Page by page, so that no page depends on how many are treated together.
        keys, values = (x.reshape(split).swapaxes(0, 1) for x in (keys, values))
        keys, values = self._set_apart(keys, values)
        if self.treatment:
            keys, values = self.treatment.page_keys(keys), self.treatment.page_values(values)
        dtype = self._numbers
        return to_16_bit(keys, dtype).swapaxes(2, 3), to_16_bit(values, dtype)

    def page_keys(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `PageCodec.page_keys`."""
        raise NotImplementedError

    def page_values(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `PageCodec.page_values`."""
        raise NotImplementedError

    def keys(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `PageCodec.keys`."""
        if self.treatment is None:
            return self.page_keys(records, dtype)
        rows = self.page_keys(records, mx.float32).swapaxes(2, 3)
        return self.treatment.own_keys(rows).swapaxes(2, 3).astype(dtype)

    def values(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `PageCodec.values`."""
        if self.treatment is None:
            return self.page_values(records, dtype)
        return self.treatment.own_values(self.page_values(records, mx.float32)).astype(dtype)

    def _join(self, arrays: list[mx.array]) -> mx.array:
        pages = arrays[0].shape[0]
        words = [mx.contiguous(a).reshape(pages, -1).view(mx.uint32) for a in arrays]
        padding = (self.geometry.page_bytes - self.geometry.payload_bytes) // 4
        if padding:
            words.append(mx.zeros((pages, padding), mx.uint32))
        return mx.concatenate(words, axis=1)

    def _arrays(self, records: mx.array, kind: str) -> list[mx.array]:
        """The stored arrays of keys (``"key"``) or of values (``"value"``)."""
        return [self._part(records, name) for name in self._parts if name.startswith(kind)]

    def _part(self, records: mx.array, name: str) -> mx.array:
        part = self._parts[name]
        start = part.offset // 4
        words = mx.contiguous(records[:, start : start + part.nbytes // 4])
        return words.view(self._dtypes[part.dtype]).reshape(-1, *part.shape)


class AffineCodec(_Layout):
    """Keys and values quantized, each with its own bits (2, 3, 4 or 8)."""

    @property
    def _numbers(self) -> mx.Dtype:
        return mx.float16

    def _set_apart(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return set_apart(keys, values, GROUP_TOKENS)

    def _key_arrays(self, keys: mx.array) -> list[mx.array]:
        keys = self.compensated(keys)
        return [*quantize(keys, GROUP_TOKENS, self.geometry.precision.key_bits)]

    def compensated(self, keys: mx.array) -> mx.array:
        """Page keys as they are to be rounded: see `pagedkv.tiers.codec.rounding.compensated`.

        Args:
            keys: float16 ``[pages, kv_heads, key_dim, tokens]``.
        """
        if self.feedback is None:
            return keys
        return compensated(keys, self.feedback, GROUP_TOKENS, self.geometry.precision.key_bits)

    @property
    def feedback(self) -> mx.array | None:
        """By how much errors of keys move other channels; None if they do not."""
        coarse = self.geometry.precision.key_bits < LEAST_BITS
        return self.treatment.feedback if self.treatment and coarse else None

    def compensated_values(self, values: mx.array) -> mx.array:
        """Page values as they are to be rounded: see `rounding.compensated_rows`.

        Args:
            values: float16 ``[pages, kv_heads, tokens, value_dim]``.
        """
        if self.value_feedback is None:
            return values
        geometry = self.geometry
        settings = geometry.value_group, geometry.precision.value_bits
        return compensated_rows(values, self.value_feedback, *settings)

    @property
    def value_feedback(self) -> mx.array | None:
        """By how much errors of values move other channels; None if they do not."""
        coarse = self.geometry.precision.value_bits < LEAST_BITS
        return self.treatment.value_feedback if self.treatment and coarse else None

    def _value_arrays(self, values: mx.array) -> list[mx.array]:
        geometry, values = self.geometry, self.compensated_values(values)
        extra = geometry.padded_value_dim - geometry.shape.value_dim
        if extra:
            values = mx.pad(values, [(0, 0)] * 3 + [(0, extra)])
        return [*quantize(values, geometry.value_group, geometry.precision.value_bits)]

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

    def page_keys(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `PageCodec.page_keys`."""
        return self.key_triple(records).dequantize(dtype)

    def page_values(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `PageCodec.page_values`."""
        values = self.value_triple(records).dequantize(dtype)
        return values[..., : self.geometry.shape.value_dim]


class Sixteen(_Layout):
    """Keys and values in the cache's 16-bit type, bit for bit unless they are treated."""

    def __init__(
        self, geometry: PageGeometry, hot_dtype: mx.Dtype, treatment: Treatment | None = None
    ) -> None:
        # A float32 hot tier (hot_dtype="model") still has 16-bit pages.
        dtype = mx.float16 if hot_dtype == mx.float32 else hot_dtype
        super().__init__(geometry, dtype, treatment)

    @property
    def _numbers(self) -> mx.Dtype:
        return self._dtypes["hot"]

    def _key_arrays(self, keys: mx.array) -> list[mx.array]:
        return [keys]

    def _value_arrays(self, values: mx.array) -> list[mx.array]:
        return [values]

    def page_keys(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `PageCodec.page_keys`."""
        return self._part(records, "keys").astype(dtype)

    def page_values(self, records: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `PageCodec.page_values`."""
        return self._part(records, "values").astype(dtype)


def codec_for(
    shape: KVShape,
    tokens: int,
    precision: Precision,
    hot_dtype: mx.Dtype,
    treatment: Treatment | None = None,
) -> AffineCodec | Sixteen:
    """The codec of a layer's pages at one precision.

    Args:
        shape: heads and channels of the layer.
        tokens: tokens per page.
        precision: bits of keys and values, or 16 bit.
        hot_dtype: type of the cache's hot tier, kept as it is by 16-bit pages.
        treatment: of the layer's keys and values; None for none.
    """
    geometry = PageGeometry(shape, tokens, precision)
    kind = AffineCodec if precision.quantized else Sixteen
    return kind(geometry, hot_dtype, treatment)


def _on_gpu() -> bool:
    return bool(mx.default_device() == mx.gpu)

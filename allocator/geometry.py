"""How many bytes a page has, and where each part of it lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from pagedkv.allocator.errors import ConfigError
from pagedkv.allocator.precision import GROUP_TOKENS, Precision

PAGE_ALIGNMENT = 16 * 1024
"""Bytes. Apple silicon's virtual-memory page, and a multiple of every disk's block."""

PAGE_TOKENS = (256, 512, 1024)
"""Page sizes on offer, in tokens."""

MAX_PADDING = 0.04
"""The padding, as a fraction of the page, that the smallest page size may cost."""


@dataclass(frozen=True)
class KVShape:
    """What one layer caches per token.

    Attributes:
        kv_heads: key/value heads (times the batch size, whose rows are stored as more heads).
        key_dim: channels of one key head.
        value_dim: channels of one value head.
    """

    kv_heads: int
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        if min(self.kv_heads, self.key_dim, self.value_dim) < 1:
            raise ConfigError(f"a KV shape needs positive sizes, got {self}")

    def token_bytes(self, bits: int = 16) -> int:
        """Bytes of one token at `bits` per element, without scales."""
        return self.kv_heads * (self.key_dim + self.value_dim) * bits // 8


@dataclass(frozen=True)
class PagePart:
    """One array inside a page.

    Attributes:
        name: such as ``"key_codes"`` or ``"value_scales"``.
        offset: bytes from the page's start.
        dtype: ``"uint32"`` for codes, ``"float16"`` for scales and biases, ``"hot"`` for the
            cache's own 16-bit type.
        shape: row-major, without the page axis.
    """

    name: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of this part."""
        return prod(self.shape) * (4 if self.dtype == "uint32" else 2)


@dataclass(frozen=True)
class PageGeometry:
    """Layout of the pages of one layer at one precision.

    A page is ``[K codes | K scales | K biases | V codes | V scales | V biases]`` padded to
    16 KiB; a 16-bit page is ``[K | V]``. Keys are stored transposed, ``[kv_heads, key_dim,
    tokens]``, in groups of 64 along the tokens; values are ``[kv_heads, tokens, value_dim]``
    in groups along the channels.

    Attributes:
        shape: the layer's heads and channels.
        tokens: tokens per page: 256, 512 or 1024.
        precision: bits of keys and values.
    """

    shape: KVShape
    tokens: int
    precision: Precision

    def __post_init__(self) -> None:
        if self.tokens not in PAGE_TOKENS:
            raise ConfigError(f"page_tokens is one of {PAGE_TOKENS}, got {self.tokens}")

    @property
    def value_group(self) -> int:
        """Channels that share one value scale: 64, or 32 where 64 does not divide them."""
        return 64 if self.shape.value_dim % 64 == 0 else 32

    @property
    def padded_value_dim(self) -> int:
        """Value channels rounded up to whole groups; the added channels are zero."""
        return _round_up(self.shape.value_dim, self.value_group)

    @cached_property
    def parts(self) -> tuple[PagePart, ...]:
        """The arrays of a page, in order, without gaps."""
        heads, tokens = self.shape.kv_heads, self.tokens
        k_dim, v_dim = self.shape.key_dim, self.padded_value_dim
        k_bits, v_bits = self.precision.key_bits, self.precision.value_bits
        specs: list[tuple[str, str, tuple[int, ...]]]
        if not self.precision.quantized:
            specs = [
                ("keys", "hot", (heads, k_dim, tokens)),
                ("values", "hot", (heads, tokens, self.shape.value_dim)),
            ]
        else:
            k_groups, v_groups = tokens // GROUP_TOKENS, v_dim // self.value_group
            specs = [
                ("key_codes", "uint32", (heads, k_dim, tokens * k_bits // 32)),
                ("key_scales", "float16", (heads, k_dim, k_groups)),
                ("key_biases", "float16", (heads, k_dim, k_groups)),
                ("value_codes", "uint32", (heads, tokens, v_dim * v_bits // 32)),
                ("value_scales", "float16", (heads, tokens, v_groups)),
                ("value_biases", "float16", (heads, tokens, v_groups)),
            ]
        parts: list[PagePart] = []
        offset = 0
        for name, dtype, shape in specs:
            parts.append(PagePart(name, offset, dtype, shape))
            offset += parts[-1].nbytes
        return tuple(parts)

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of a page: the payload rounded up to 16 KiB."""
        return _round_up(self.payload_bytes, PAGE_ALIGNMENT)

    @property
    def padding(self) -> float:
        """Unused fraction of the page."""
        return 1 - self.payload_bytes / self.page_bytes

    @property
    def bits_per_element(self) -> float:
        """Effective bits per cached number, counting scales, biases and padding."""
        shape = self.shape
        return (
            self.page_bytes * 8 / (shape.kv_heads * (shape.key_dim + shape.value_dim) * self.tokens)
        )

    @classmethod
    def choose_tokens(cls, shape: KVShape, precisions: Iterable[Precision]) -> int:
        """Pick the page size in tokens for a layer: one size serves all its precisions.

        The smallest of 256, 512 and 1024 with at most 4 % padding at every precision, else the
        one whose worst padding is least.
        """
        kinds: Sequence[Precision] = list(precisions)
        worst = {t: max(cls(shape, t, p).padding for p in kinds) for t in PAGE_TOKENS}
        for tokens in PAGE_TOKENS:
            if worst[tokens] <= MAX_PADDING:
                return tokens
        return min(PAGE_TOKENS, key=lambda t: worst[t])


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit

"""Prefill: a page table and the hot tokens as dense keys and values, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import KVShape, PageGeometry
from pagedkv.allocator.precision import GROUP_TOKENS
from pagedkv.attn.kernels.decode import PARAMS
from pagedkv.attn.kernels.launch import Launcher, device_words
from pagedkv.attn.kernels.source import (
    LANES,
    KernelText,
    page_constants,
    source_names,
    sources_macro,
    specialize,
)

CHUNK = 128
"""Channels of keys that lie in shared memory at once: 16 KiB of them, at 16 bit."""


@dataclass(frozen=True)
class ExpandSpec:
    """What an expanding kernel is specialized for.

    Attributes:
        geometries: of the pages, one per precision; all have the same shape and page size.
        shape: heads and channels; keys a multiple of 16, values of 8, both up to 256.
        page_tokens: tokens of a page.
        bfloat: whether the output is bfloat16, else float16.
        hot_bfloat: whether hot tokens and 16-bit pages are bfloat16, else float16.
    """

    geometries: tuple[PageGeometry, ...]
    shape: KVShape
    page_tokens: int
    bfloat: bool
    hot_bfloat: bool

    @property
    def warps(self) -> int:
        """SIMD groups of a threadgroup: one lane for 64 numbers of a tile's keys."""
        return 4 if self.shape.key_dim > 64 else 2

    @property
    def shared_words(self) -> int:
        """Words of shared memory: scales and codes of a tile's keys, laid out in ``expand.h``."""
        bits = max((g.precision.key_bits for g in self.geometries), default=0)
        octet = 16 * bits + (4 if bits == 16 else 2)
        return self.shape.key_dim + min(CHUNK, self.shape.key_dim) // 8 * octet

    @cached_property
    def text(self) -> KernelText:
        """The kernel."""
        sources = source_names(len(self.geometries), staging=True)
        constants = [
            *page_constants(self.shape, self.page_tokens),
            f"CONSTANT int WARPS = {self.warps};",
            f"CONSTANT int CHUNK = {min(CHUNK, self.shape.key_dim)};",
            f"CONSTANT bool OUT_BFLOAT = {str(self.bfloat).lower()};",
            f"CONSTANT bool HOT_BFLOAT = {str(self.hot_bfloat).lower()};",
            sources_macro(self.geometries, staging=True),
        ]
        return specialize(
            "expand_pages",
            ("params", "table", "hot_keys", "hot_values", *sources),
            ("keys", "values"),
            ("page.h", "layout.h", "expand.h"),
            constants,
            self.shared_words,
        )


def expand_table(pages: npt.NDArray[np.uint32], sinks: int) -> npt.NDArray[np.uint32]:
    """A page table as the kernel reads it.

    Args:
        pages: two words per page: where it is (as in `table_words`), and its valid tokens: more
            than 0.
        sinks: hot tokens that stand before the pages.

    Returns:
        Four words per page, of two pages at least: Metal keeps smaller inputs elsewhere.
    """
    table = np.zeros((max(2, len(pages)), 4), np.uint32)
    table[: len(pages), :2] = pages
    table[: len(pages), 2] = sinks + np.cumsum(pages[:, 1]) - pages[:, 1]
    return table


def expand_pages(
    launcher: Launcher,
    spec: ExpandSpec,
    pages: npt.NDArray[np.uint32],
    hot: tuple[mx.array, mx.array],
    hot_tokens: int,
    sinks: int,
    sources: Sequence[mx.array],
) -> tuple[mx.array, mx.array]:
    """Launch the kernel: sinks, pages, then the other hot tokens.

    Args:
        launcher: where.
        spec: of the kernel.
        pages: the page table, ``[pages, 2]``, see `expand_table`.
        hot: keys and values ``[1, kv_heads, capacity, dim]``, of the spec's 16-bit type.
        hot_tokens: how many of them there are.
        sinks: how many of those stand before the pages, at most `hot_tokens`.
        sources: page arrays, uint32 ``[slots, page_bytes / 4]``: slab and staging of each
            precision.

    Returns:
        Keys ``[1, kv_heads, tokens, key_dim]`` and values ``[1, kv_heads, tokens, value_dim]``,
        of the spec's type, where tokens are the pages' valid ones and the hot ones together.
        Codes are dequantized in one rounding; bfloat16 numbers that float16 cannot hold are
        clamped if that is the output's type.
    """
    tokens = hot_tokens + int(pages[:, 1].sum())
    words = [len(pages), hot_tokens, sinks, hot[0].shape[2], tokens]
    params = device_words(words + [0] * (PARAMS - len(words)))
    table = device_words(expand_table(pages, sinks))
    tiles = len(pages) * (spec.page_tokens // GROUP_TOKENS) + -(-hot_tokens // GROUP_TOKENS)
    heads, shape = spec.shape.kv_heads, spec.shape
    dtype = mx.bfloat16 if spec.bfloat else mx.float16
    keys, values = launcher.launch(
        spec.text,
        [params, table, *hot, *sources],
        (tiles, heads, 1),
        LANES * spec.warps,
        [(1, heads, tokens, shape.key_dim), (1, heads, tokens, shape.value_dim)],
        [dtype, dtype],
    )
    return keys, values

"""Sealing: whole pages encoded from hot tokens, in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from pagedkv.allocator import PageGeometry
from pagedkv.allocator.precision import GROUP_TOKENS
from pagedkv.attn.kernels.decode import PARAMS
from pagedkv.attn.kernels.launch import Launcher, device_words
from pagedkv.attn.kernels.source import LANES, KernelText, page_constants, specialize
from pagedkv.tiers.codec.rounding import TRIMMED

MAX_WARPS = 8


@dataclass(frozen=True)
class SealSpec:
    """What a sealing kernel is specialized for.

    Attributes:
        geometry: of the pages; key channels are a multiple of 16, value channels of 8.
        hot_bfloat: whether hot tokens are bfloat16, else float16.
    """

    geometry: PageGeometry
    hot_bfloat: bool

    @property
    def warps(self) -> int:
        """SIMD groups of a threadgroup: no more than there are turns at 64 tokens."""
        keys = -(-self.geometry.shape.key_dim // 32)
        return min(MAX_WARPS, keys + self.geometry.padded_value_dim // 16)

    @cached_property
    def text(self) -> KernelText:
        """The kernel."""
        geometry = self.geometry
        constants = [
            *page_constants(geometry.shape, geometry.tokens),
            f"CONSTANT int WARPS = {self.warps};",
            f"CONSTANT int KEY_BITS = {geometry.precision.key_bits};",
            f"CONSTANT int VALUE_BITS = {geometry.precision.value_bits};",
            f"CONSTANT int KEY_TRIM = {TRIMMED.get(geometry.precision.key_bits, 0)};",
            f"CONSTANT int VALUE_TRIM = {TRIMMED.get(geometry.precision.value_bits, 0)};",
            f"CONSTANT int PAGE_WORDS = {geometry.page_bytes // 4};",
            f"CONSTANT bool HOT_BFLOAT = {str(self.hot_bfloat).lower()};",
        ]
        return specialize(
            "seal_pages",
            ("params", "hot_keys", "hot_values"),
            ("pages",),
            ("page.h", "layout.h", "round.h", "seal.h"),
            constants,
            4,  # it uses none, and an array of none is not C
        )


def seal_pages(
    launcher: Launcher, spec: SealSpec, hot: tuple[mx.array, mx.array], first: int, pages: int
) -> mx.array:
    """Launch the kernel.

    Args:
        launcher: where.
        spec: of the kernel.
        hot: keys and values ``[1, kv_heads, capacity, dim]``, of the spec's 16-bit type.
        first: the hot token with which the first page begins.
        pages: how many follow each other from there; at least one.

    Returns:
        uint32 ``[pages, page_bytes / 4]``: bit for bit what `AffineCodec.encode` or
        `Sixteen.encode` makes of the same tokens on the CPU, for finite numbers.
    """
    geometry = spec.geometry
    params = device_words([first, hot[0].shape[2], *[0] * (PARAMS - 2)])
    (records,) = launcher.launch(
        spec.text,
        [params, *hot],
        (pages * (geometry.tokens // GROUP_TOKENS), geometry.shape.kv_heads, 1),
        LANES * spec.warps,
        [(pages, geometry.page_bytes // 4)],
        [mx.uint32],
    )
    return records

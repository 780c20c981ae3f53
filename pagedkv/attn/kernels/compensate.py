"""Keys or values moved so that rounding makes up for errors of channels before, in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from pagedkv.allocator import PageGeometry
from pagedkv.allocator.precision import GROUP_TOKENS
from pagedkv.attn.kernels.launch import Launcher
from pagedkv.attn.kernels.source import LANES, KernelText, specialize
from pagedkv.tiers.codec.rounding import BLOCKS, TRIMMED

MOST_CHANNELS = 256
"""A word per channel and lane: 32 KiB of threadgroup memory."""


@dataclass(frozen=True)
class CompensateSpec:
    """What the kernel is specialized for.

    Attributes:
        geometry: of the pages; channels are a multiple of 16, up to `MOST_CHANNELS`, their bits 2,
            3 or 4.
        values: whether it is for values, else for keys.
    """

    geometry: PageGeometry
    values: bool = False

    @property
    def dim(self) -> int:
        """Channels."""
        shape = self.geometry.shape
        return shape.value_dim if self.values else shape.key_dim

    @property
    def bits(self) -> int:
        """Of a code."""
        precision = self.geometry.precision
        return precision.value_bits if self.values else precision.key_bits

    @property
    def fits(self) -> bool:
        """Whether the kernel is made for so many channels."""
        return self.dim % 16 == 0 and self.dim <= MOST_CHANNELS

    @cached_property
    def text(self) -> KernelText:
        """The kernel."""
        numbers = {
            "HEADS": self.geometry.shape.kv_heads,
            "DIM": self.dim,
            "PAGE_TOKENS": self.geometry.tokens,
            "BLOCK": self.dim // BLOCKS,
            "BITS": self.bits,
            "TRIM": TRIMMED.get(self.bits, 0),
        }
        if self.values:
            numbers["GROUP"] = self.geometry.value_group
        name = "compensate_rows" if self.values else "compensate"
        return specialize(
            name,
            ("numbers", "feedback"),
            ("moved",),
            ("round.h", "feedback.h", f"{name}.h"),
            [f"CONSTANT int {name} = {value};" for name, value in numbers.items()],
            LANES * self.dim,
        )


def compensate(
    launcher: Launcher, spec: CompensateSpec, numbers: mx.array, feedback: mx.array
) -> mx.array:
    """Launch the kernel.

    Args:
        launcher: where.
        spec: of the kernel.
        numbers: keys or values as pages hold them, float16 ``[pages, kv_heads, tokens, dim]``.
        feedback: float16 ``[kv_heads, dim, dim]``.

    Returns:
        float16, as `numbers`: what `pagedkv.tiers.codec.rounding.compensated` gives (of values
        `compensated_rows`), but for numbers that lie next to the border between two codes, and what
        follows from them.
    """
    geometry = spec.geometry
    (moved,) = launcher.launch(
        spec.text,
        [numbers, feedback],
        (numbers.shape[0] * (geometry.tokens // GROUP_TOKENS), geometry.shape.kv_heads, 1),
        LANES,
        [numbers.shape],
        [mx.float16],
    )
    return moved

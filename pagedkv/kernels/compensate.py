"""Keys moved so that rounding makes up for errors of channels before, in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from pagedkv.allocator import PageGeometry
from pagedkv.allocator.precision import GROUP_TOKENS
from pagedkv.kernels.launch import Launcher
from pagedkv.kernels.source import LANES, KernelText, specialize
from pagedkv.tiers.rounding import BLOCKS, TRIMMED

MOST_CHANNELS = 256
"""A word per channel and lane: 32 KiB of threadgroup memory."""


@dataclass(frozen=True)
class CompensateSpec:
    """What the kernel is specialized for.

    Attributes:
        geometry: of the pages; key channels are a multiple of 16, up to `MOST_CHANNELS`, their bits
            2, 3 or 4.
    """

    geometry: PageGeometry

    @cached_property
    def text(self) -> KernelText:
        """The kernel."""
        geometry, shape = self.geometry, self.geometry.shape
        numbers = {
            "HEADS": shape.kv_heads,
            "KEY_DIM": shape.key_dim,
            "PAGE_TOKENS": geometry.tokens,
            "BLOCK": shape.key_dim // BLOCKS,
            "KEY_BITS": geometry.precision.key_bits,
            "KEY_TRIM": TRIMMED.get(geometry.precision.key_bits, 0),
        }
        return specialize(
            "compensate",
            ("keys", "feedback"),
            ("moved",),
            ("round.h", "compensate.h"),
            [f"CONSTANT int {name} = {value};" for name, value in numbers.items()],
            LANES * shape.key_dim,
        )


def compensate(
    launcher: Launcher, spec: CompensateSpec, keys: mx.array, feedback: mx.array
) -> mx.array:
    """Launch the kernel.

    Args:
        launcher: where.
        spec: of the kernel.
        keys: as pages hold them, float16 ``[pages, kv_heads, tokens, key_dim]``.
        feedback: float16 ``[kv_heads, key_dim, key_dim]``.

    Returns:
        float16, as `keys`: what `pagedkv.tiers.rounding.compensated` gives, but for numbers that
        lie next to the border between two codes, and what follows from them.
    """
    geometry = spec.geometry
    (moved,) = launcher.launch(
        spec.text,
        [keys, feedback],
        (keys.shape[0] * (geometry.tokens // GROUP_TOKENS), geometry.shape.kv_heads, 1),
        LANES,
        [keys.shape],
        [mx.float16],
    )
    return moved

"""What is measured: shapes, depths, precisions, and how often."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx

from pagedkv.allocator import KVShape, Ladder
from pagedkv.config.tier_config import TierConfig
from pagedkv.errors import ConfigError

PARTS = ("attention", "decode", "prefill")
STREAMING = "streaming"
"""A part of its own, and none of `PARTS`: it writes to the disk, and wants the machine quiet."""

DEPTHS = tuple(1024 * k for k in (1, 4, 8, 16, 32, 64, 128, 256))
DEPTHS = (512, *DEPTHS)
"""Depths of a full run, in tokens."""

MIB = 2**20

_SHAPE = re.compile(r"(\d{1,9})/(\d{1,9})x(\d{1,9})")


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention.

    Attributes:
        query_heads: a multiple of `kv_heads`.
        kv_heads: key/value heads.
        dim: channels of a head.
    """

    query_heads: int
    kv_heads: int
    dim: int

    def __post_init__(self) -> None:
        if min(self.query_heads, self.kv_heads, self.dim) < 1:
            raise ConfigError(f"a shape needs positive numbers, got {self}: write 32/8x128")
        if self.query_heads % self.kv_heads:
            raise ConfigError(
                f"shape {self}: {self.query_heads} query heads cannot share {self.kv_heads} KV "
                f"heads equally: give a multiple"
            )

    @classmethod
    def parse(cls, text: str) -> AttentionShape:
        """Read ``"32/8x128"``: query heads / KV heads x channels.

        Raises:
            ConfigError: if it is none.
        """
        match = _SHAPE.fullmatch(text.strip().lower())
        if match is None:
            raise ConfigError(
                f"shape {text!r}: write query heads / KV heads x channels, as in 32/8x128"
            )
        return cls(*map(int, match.groups()))

    @property
    def kv(self) -> KVShape:
        """What the layer caches."""
        return KVShape(self.kv_heads, self.dim, self.dim)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.dim**-0.5)

    def __str__(self) -> str:
        return f"{self.query_heads}/{self.kv_heads}x{self.dim}"


@dataclass(frozen=True)
class BenchSettings:
    """How to measure. Validated when it is made.

    Attributes:
        kv: precisions of our cache, each a row.
        queries: query tokens per attention call.
        rounds: measurements of each row; the rows of a group take turns.
        steps: decode steps of each row per repeat; blocks of them take turns.
        repeats: prompts of each row, taking turns; and times that decode's caches are filled.
        chunk: tokens per chunk of a prompt, and in filling caches.
        shuffled: also measure pages whose slots are in random order.
        cold: also measure with nearly all pages on disk.
        working_set: bytes that the caches of a row should have together, to exceed the
            processor's cache.
        copy_bytes: size of the array that is copied for the yardstick.
        tiers: hot and sink tokens, page size, backend and cold directory; budgets are set as
            needed.
    """

    kv: tuple[str, ...] = ("K4V4",)
    queries: int = 1
    rounds: int = 20
    steps: int = 64
    repeats: int = 2
    chunk: int = 2048
    shuffled: bool = True
    cold: bool = False
    working_set: int = 200 * MIB
    copy_bytes: int = 512 * MIB
    tiers: TierConfig = field(default_factory=TierConfig)

    def __post_init__(self) -> None:
        for name in ("queries", "rounds", "steps", "repeats", "chunk"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is a number from 1 up, got {value}")
        for kv in self.kv:
            Ladder.parse(kv)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def short_dtype(dtype: mx.Dtype) -> str:
    """A type as the field writes it: ``"fp16"``, ``"bf16"``, ``"fp32"``."""
    names = {mx.float16: "fp16", mx.bfloat16: "bf16", mx.float32: "fp32"}
    return names.get(dtype, str(dtype).removeprefix("mlx.core."))


def short_tokens(tokens: int) -> str:
    """``"512"``, ``"4K"`` (K is 1,024)."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 and tokens else str(tokens)

"""The caches that a whole model is measured with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pagedkv.allocator import KVShape
from pagedkv.cache import sdpa_hook as hook
from pagedkv.config.planner import plan
from pagedkv.config.tier_config import TierConfig
from pagedkv.integrations.mlx_lm.wrapping import unwrap, wrap
from pagedkv.sequence.layer import PagedLayerCache
from pagedkv.tools.bench.caches import budgeted, bytes_read, stock_bytes_read
from pagedkv.tools.bench.contenders import QUANTIZED_BITS, QUANTIZED_GROUP, QUANTIZED_NAME
from pagedkv.tools.bench.settings import BenchSettings, short_dtype
from pagedkv.tools.bench.subject import Subject

STOCK, QUANTIZED, PAGED = "stock", "quantized", "paged"


@dataclass(frozen=True)
class CacheKind:
    """A kind of cache for a whole model.

    Attributes:
        name: of its rows.
        kind: ``"stock"``, ``"quantized"`` or ``"paged"``.
        kv: precision or ladder of a paged one.
    """

    name: str
    kind: str
    kv: str = ""

    @property
    def is_baseline(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.kind == STOCK


def kinds(subject: Subject, settings: BenchSettings) -> list[CacheKind]:
    """mlx-lm's own cache, its quantized one, and ours at each precision."""
    return [
        CacheKind(f"mlx-lm {short_dtype(subject.dtype)}", STOCK),
        CacheKind(QUANTIZED_NAME, QUANTIZED),
        *(CacheKind(kv, PAGED, kv) for kv in settings.kv),
    ]


@contextmanager
def opened(
    kind: CacheKind, subject: Subject, tokens: int, tiers: TierConfig
) -> Iterator[list[Any]]:
    """Empty caches for a model, one per layer; call `caches.release` when nothing holds them.

    Several may be open at a time. The model runs over them while they are `hooked`.

    Args:
        kind: of cache.
        subject: the model.
        tokens: that ours must hold.
        tiers: windows, page size and backend of ours.
    """
    if kind.kind != PAGED:
        yield _stock(kind, subject)
        return
    cache = wrap(subject.model, _config(kind, subject, tokens, tiers))
    unwrap(subject.model)
    with cache:
        yield cache


@contextmanager
def hooked(kind: CacheKind) -> Iterator[None]:
    """Let attention calls reach caches of ours; those of others go to MLX as ever."""
    if kind.kind != PAGED:
        yield
        return
    hook.install()
    try:
        yield
    finally:
        hook.uninstall()


def cache_bytes(kind: CacheKind, subject: Subject, tokens: int, tiers: TierConfig) -> int:
    """Memory that the caches of all layers will take.

    Args:
        kind: of cache.
        subject: the model.
        tokens: that they must hold.
        tiers: windows, page size and backend of ours.
    """
    if kind.kind == PAGED:
        config = _config(kind, subject, tokens, tiers)
        planned = plan(_largest(subject), len(subject.shapes), tokens, config)
        return planned.hot_bytes + planned.warm_bytes
    bits = 8.0 * subject.dtype.size
    if kind.kind == QUANTIZED:  # a scale and a bias per group
        bits = QUANTIZED_BITS + 2 * bits / QUANTIZED_GROUP
    return int(tokens * sum(shape.token_bytes(8) for shape in subject.shapes) * bits / 8)


def _config(kind: CacheKind, subject: Subject, tokens: int, tiers: TierConfig) -> TierConfig:
    config = replace(tiers, kv=kind.kv)
    return budgeted(config, _largest(subject), len(subject.shapes), tokens)


def _largest(subject: Subject) -> KVShape:
    return max(subject.shapes, key=lambda shape: shape.token_bytes())


def _stock(kind: CacheKind, subject: Subject) -> list[Any]:
    from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

    if kind.kind == QUANTIZED:
        return [QuantizedKVCache(QUANTIZED_GROUP, QUANTIZED_BITS) for _ in subject.shapes]
    return list(make_prompt_cache(subject.model))


def cache_bytes_read(caches: list[Any]) -> int:
    """Bytes that a decode step reads from the caches of all layers."""
    return sum(
        bytes_read(cache) if isinstance(cache, PagedLayerCache) else stock_bytes_read(cache)
        for cache in caches
    )

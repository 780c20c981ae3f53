"""The caches that a whole model is measured with, opened and closed one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pagedkv.bench.caches import budgeted, bytes_read, stock_bytes_read
from pagedkv.bench.contenders import QUANTIZED_BITS, QUANTIZED_GROUP, QUANTIZED_NAME
from pagedkv.bench.settings import BenchSettings, short_dtype
from pagedkv.bench.subject import Subject
from pagedkv.config import TierConfig
from pagedkv.layer import PagedLayerCache
from pagedkv.models import unwrap, wrap

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

    Args:
        kind: of cache.
        subject: the model; while the caches are open it may be wrapped.
        tokens: that ours must hold.
        tiers: windows, page size and backend of ours.
    """
    if kind.kind != PAGED:
        yield _stock(kind, subject)
        return
    largest = max(subject.shapes, key=lambda shape: shape.token_bytes())
    config = budgeted(replace(tiers, kv=kind.kv), largest, len(subject.shapes), tokens)
    cache = wrap(subject.model, config)
    try:
        with cache:
            yield cache
    finally:
        unwrap(subject.model)


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

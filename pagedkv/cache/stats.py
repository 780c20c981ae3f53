"""What a cache holds and did, as numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import psutil

from pagedkv.allocator import KVShape
from pagedkv.attn.selection import SkipCounters
from pagedkv.cache.nested import inner_caches, streams
from pagedkv.cache.prefix_reuse import obstacle

if TYPE_CHECKING:
    from pagedkv.cache.paged_cache import PagedCache
    from pagedkv.sequence.layer import PagedLayerCache


@dataclass(frozen=True)
class TierStats:
    """One tier of one sequence, or of a batch.

    Attributes:
        tokens: tokens of this sequence in the tier (the same in every layer).
        pages: pages of this sequence in the tier, all layers together; 0 for hot. Those that the
            rows of a batch share count once.
        bytes: bytes those pages or tokens take.
        allocated: bytes the tier has taken from the machine, for all sequences.
        budget: its limit in bytes; 0 where there is none.
    """

    tokens: int
    pages: int
    bytes: int
    allocated: int
    budget: int


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of one `PagedCache`; traffic counts since the tiers were opened.

    Attributes:
        tokens: tokens held; of a batch, by all rows together.
        hot: sinks and newest tokens, 16 bit.
        warm: sealed pages in memory.
        cold: sealed pages on disk.
        precisions: pages per precision, all layers together, such as ``{"K4V4": 120}``.
        bits_per_element: mean stored bits per cached number, counting scales and padding.
        fp16_bytes: what a 16-bit cache of the same tokens takes.
        staging_bytes: memory for pages on their way in and out.
        nvme_bytes_written, nvme_bytes_read: disk traffic.
        pages_sealed, pages_lowered, pages_demoted, pages_promoted: page movements.
        nvme_read_seconds: time in which at least one request was reading.
        decode_steps: calls with few new tokens.
        steps_per_second: of the latest of them (a median); 0 if no two followed each other.
        memory_pressure: ``"high"`` while memory is short, ``"none"``, or ``"off"`` if nobody looks;
            as of the last time pages were sealed.
        pages_demoted_for_pressure: of those demoted.
        warm_bytes_returned: given back to the machine for that reason.
        read_ahead_hits, read_ahead_misses: batches of cold pages that were there in time, or not.
        read_stall_seconds, write_stall_seconds: time the model waited for the disk.
        write_errors: writes that failed (their pages stayed in memory).
        bounds_bytes: memory for what is known of cold pages' keys.
        kept_bytes: memory for cold pages that were read last, with ``cold_pages``.
        skipped: what decode steps left out of the cold pages, and bounds on what that changed;
            None where they read them all.
        prefix_tokens_reused: prompt tokens that were not computed again, in all the model's caches.
        prefixes_remembered: sequences kept in memory for that.
        prefix_reuse: ``"on"``, or why this model's prefixes cannot be reused.
        layers: per layer: ``"paged"``, ``"paged (dense)"`` where the model's attention bypasses
            the hook, either with the number of rows of a batch, or the class name of a cache that
            was left as it is; of several in a layer, ``"CacheList(paged, ArraysCache)"``.
        ladders: per layer the precision of pages by distance; ``"none"`` for a layer without pages.
        treatments: per layer what is done to keys and values before they are quantized, and why;
            ``"none"`` for a layer without pages.
        treatment_bytes: memory for that, in addition to the budgets.
        mlx_active_bytes, mlx_peak_bytes, mlx_cache_bytes: MLX's own accounts.
        process_bytes: resident memory of the process.
    """

    tokens: int
    hot: TierStats
    warm: TierStats
    cold: TierStats
    precisions: dict[str, int]
    bits_per_element: float
    fp16_bytes: int
    staging_bytes: int
    nvme_bytes_written: int
    nvme_bytes_read: int
    nvme_read_seconds: float
    decode_steps: int
    steps_per_second: float
    pages_sealed: int
    pages_lowered: int
    pages_demoted: int
    pages_promoted: int
    memory_pressure: str
    pages_demoted_for_pressure: int
    warm_bytes_returned: int
    read_ahead_hits: int
    read_ahead_misses: int
    read_stall_seconds: float
    write_stall_seconds: float
    write_errors: int
    bounds_bytes: int
    kept_bytes: int
    skipped: SkipCounters | None
    prefix_tokens_reused: int
    prefixes_remembered: int
    prefix_reuse: str
    layers: tuple[str, ...]
    ladders: tuple[str, ...]
    treatments: tuple[str, ...]
    treatment_bytes: int
    mlx_active_bytes: int
    mlx_peak_bytes: int
    mlx_cache_bytes: int
    process_bytes: int

    @property
    def nvme_bytes_per_step(self) -> int:
        """What a decode step reads from disk at this length: every cold page once.

        With ``skip_below`` or ``cold_pages`` it is what a step reads at most.
        """
        return self.cold.bytes

    @property
    def nvme_read_rate(self) -> float:
        """Bytes per second while the disk was reading; 0 if nothing was read."""
        return self.nvme_bytes_read / self.nvme_read_seconds if self.nvme_read_seconds else 0.0

    @property
    def nvme_steps_per_second(self) -> float | None:
        """The most steps a second that the disk allows at this length and the rate measured so far.

        None if nothing is cold, or nothing was read yet.
        """
        if not self.cold.bytes or not self.nvme_read_rate:
            return None
        return self.nvme_read_rate / self.nvme_bytes_per_step

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the ceiling that the disk sets is among them."""
        ceiling = ("nvme_bytes_per_step", "nvme_read_rate", "nvme_steps_per_second")
        return {**asdict(self), **{name: getattr(self, name) for name in ceiling}}


def collect(cache: PagedCache) -> CacheStats:
    """Count; see `CacheStats`."""
    pager = cache.context.pager
    cold, reader = pager.open_cold, pager.open_reader
    places = _Places(cache)
    budget = pager.budget
    return CacheStats(
        tokens=places.seen,
        hot=TierStats(places.hot_tokens, 0, places.hot_bytes, places.hot_allocated, 0),
        warm=TierStats(
            places.tokens["warm"],
            places.pages["warm"],
            places.bytes["warm"],
            sum(layer.warm_bytes for layer in pager.layer_pagers),
            budget.warm_bytes,
        ),
        cold=TierStats(
            places.tokens["cold"],
            places.pages["cold"],
            places.bytes["cold"],
            cold.nbytes if cold else 0,
            budget.cold_bytes,
        ),
        precisions=places.precisions,
        bits_per_element=places.bits_per_element,
        fp16_bytes=places.fp16_bytes,
        staging_bytes=(reader.nbytes if reader else 0) + (cold.buffer_bytes if cold else 0),
        nvme_bytes_written=cold.counters.bytes_written if cold else 0,
        nvme_bytes_read=cold.counters.bytes_read if cold else 0,
        nvme_read_seconds=cold.counters.read_seconds if cold else 0.0,
        decode_steps=cache.context.pace.steps,
        steps_per_second=cache.context.pace.per_second,
        pages_sealed=pager.counters.sealed,
        pages_lowered=pager.counters.lowered,
        pages_demoted=pager.counters.demoted,
        pages_promoted=pager.counters.promoted,
        memory_pressure=pager.pressure.name,
        pages_demoted_for_pressure=pager.counters.pressed,
        warm_bytes_returned=pager.counters.warm_bytes_returned,
        read_ahead_hits=reader.counters.hits if reader else 0,
        read_ahead_misses=reader.counters.misses if reader else 0,
        read_stall_seconds=reader.counters.stall_seconds if reader else 0.0,
        write_stall_seconds=cold.counters.write_stall_seconds if cold else 0.0,
        write_errors=cold.counters.write_errors if cold else 0,
        bounds_bytes=sum(layer.bounds.nbytes for layer in pager.layer_pagers),
        kept_bytes=sum(layer.kept.nbytes for layer in pager.layer_pagers),
        skipped=_skipped(cache),
        prefix_tokens_reused=cache.context.prefixes.reused,
        prefixes_remembered=len(cache.context.prefixes),
        prefix_reuse=obstacle(cache) or "on",
        layers=tuple(_kind(layer) for layer in cache),
        ladders=tuple(_ladder(layer) for layer in cache),
        treatments=tuple(_treatment(layer) for layer in cache),
        treatment_bytes=sum(p.treatment.nbytes for p in pager.layer_pagers if p.treatment),
        mlx_active_bytes=mx.get_active_memory(),
        mlx_peak_bytes=mx.get_peak_memory(),
        mlx_cache_bytes=mx.get_cache_memory(),
        process_bytes=psutil.Process().memory_info().rss,
    )


def rows_of(cache: Iterable[Any]) -> Iterator[PagedLayerCache]:
    """The paged layers of a list of caches; of a batch, each row's."""
    from pagedkv.cache.batch_cache import BatchPagedLayerCache
    from pagedkv.sequence.layer import PagedLayerCache

    for layer in streams(cache):
        if isinstance(layer, BatchPagedLayerCache):
            yield from layer.rows
        elif isinstance(layer, PagedLayerCache):
            yield layer


@dataclass
class _LayerTokens:
    """Tokens of a layer, of all rows: those that ever came, those held, and by tier."""

    seen: int = 0
    held: int = 0
    hot: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"warm": 0, "cold": 0})

    def add(self, layer: PagedLayerCache, paged: dict[str, int]) -> None:
        self.seen += layer.offset
        self.held += layer.offset - layer.dropped
        self.hot += layer.hot_held
        for tier, tokens in paged.items():
            self.tokens[tier] += tokens


class _Places:
    """Where the tokens of a sequence are, summed over its layers."""

    def __init__(self, cache: PagedCache) -> None:
        self.pages = {"warm": 0, "cold": 0}
        self.bytes = {"warm": 0, "cold": 0}
        self.precisions: dict[str, int] = {}
        self.hot_bytes = self.hot_allocated = self.fp16_bytes = 0
        elements = 0
        by_layer: dict[int, _LayerTokens] = {}
        seen = set[tuple[int, int]]()
        for layer in rows_of(cache):
            layer_tokens = {"warm": 0, "cold": 0}
            for page, tokens in layer.located_pages():
                tier = "warm" if page.slot is not None else "cold"
                layer_tokens[tier] += tokens
                if (id(layer._pager), page.number) in seen:
                    continue
                seen.add((id(layer._pager), page.number))
                self.pages[tier] += 1
                self.bytes[tier] += layer.page_bytes(page.precision)
                self.precisions[str(page.precision)] = (
                    self.precisions.get(str(page.precision), 0) + 1
                )
            self.hot_allocated += layer.hot_bytes
            if layer.shape is not None:
                self.hot_bytes += layer.hot_held * layer.shape.token_bytes(layer.hot_bits)
                self.fp16_bytes += layer.size() * layer.shape.token_bytes()
                elements += (layer.offset - layer.dropped) * _elements(layer.shape)
            by_layer.setdefault(layer.layer, _LayerTokens()).add(layer, layer_tokens)
        # Layers move together: the first that holds the most speaks for all.
        most = max(by_layer.values(), key=lambda each: each.held, default=_LayerTokens())
        self.seen, self.hot_tokens, self.tokens = most.seen, most.hot, most.tokens
        stored = self.hot_bytes + sum(self.bytes.values())
        self.bits_per_element = 8 * stored / elements if elements else 0.0


def _skipped(cache: PagedCache) -> SkipCounters | None:
    """Of all layers: sums, and the largest of the bounds."""
    layers = [c for layer in rows_of(cache) if (c := layer.skipped) is not None]
    if not layers:
        return None
    bounds = {"weight_bound", "error_bound"}
    return SkipCounters(
        **{
            f.name: (max if f.name in bounds else sum)(getattr(c, f.name) for c in layers)
            for f in fields(SkipCounters)
        }
    )


def _elements(shape: KVShape) -> int:
    return shape.kv_heads * (shape.key_dim + shape.value_dim)


def _ladder(layer: Any) -> str:
    first = next(rows_of([layer]), None)
    return "none" if first is None else str(first.ladder)


def _treatment(layer: Any) -> str:
    first = next(rows_of([layer]), None)
    return str(first.treatment) if first is not None and first.treatment else "none"


def _kind(layer: Any) -> str:
    from pagedkv.cache.batch_cache import BatchPagedLayerCache
    from pagedkv.sequence.layer import PagedLayerCache

    inner = inner_caches(layer)
    if inner is not None:
        return f"{type(layer).__name__}({', '.join(map(_kind, inner))})"
    if not isinstance(layer, PagedLayerCache | BatchPagedLayerCache):
        return type(layer).__name__
    more = ["dense"] if False in layer.reaches_hook.values() else []
    kind = "paged"
    if isinstance(layer, PagedLayerCache):
        kind = layer.kind
    elif layer.rows:
        kind = layer.rows[0].kind
        more.append(f"{len(layer.rows)} rows")
    return f"{kind} ({', '.join(more)})" if more else kind

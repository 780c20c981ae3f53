"""Prefixes of sequences, kept so that a sequence that begins alike need not be computed again.

What is kept is a fork of the sequence, cut to its sealed pages: page numbers, no bytes. Which
sequences begin alike is told by digests over their tokens (`pagedkv.allocator.prefix_index`); with
a ``cold_dir`` they lie in the checkpoints too, so that another process finds them.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from pagedkv.allocator import prefix_digests, prefix_key
from pagedkv.cache.nested import streams
from pagedkv.cache.persistence import store as sequences
from pagedkv.errors import (
    CacheStateError,
    ClosedError,
    ColdStoreError,
    ConfigError,
    SequenceNotFoundError,
)
from pagedkv.sequence.interruption import interruptible
from pagedkv.tiers import StoredSequence
from pagedkv.tiers.cold.prefetch import Batch

if TYPE_CHECKING:
    from pagedkv.cache.paged_cache import PagedCache
    from pagedkv.sequence.layer import PagedLayerCache
    from pagedkv.sequence.sequence import SequenceContext


_TRIAL_SECONDS = 0.02
"""Reading goes on for so long to learn the disk's rate, a few requests at least."""


def obstacle(cache: PagedCache) -> str:
    """Why prefixes of a cache cannot be reused; empty if they can."""
    paged = set(map(id, cache.paged_layers))
    for i, stream in enumerate(streams(cache)):
        if id(stream) not in paged:
            return f"cache {i} is a {type(stream).__name__}, which holds no pages"
        if not stream.keeps_all:
            return f"cache {i} is a {type(stream).__name__}, which forgets tokens"
    if not any(layer.shape for layer in cache.paged_layers):
        return "it had no tokens yet, and its layers' sizes are not known"
    if any(layer._context is not cache.context for layer in cache.paged_layers):
        return "its layers are of several models or sequences"
    if len(paged) != cache.context.pager.layers:
        return f"it has {len(paged)} of the {cache.context.pager.layers} layers that are paged"
    return ""


@interruptible
def remember(cache: PagedCache, tokens: Sequence[int] | mx.array, salt: str = "") -> int:
    """Keep a cache's sealed pages for others; see `PagedCache.remember`."""
    held = note(cache, tokens, salt)
    if held:
        cache.context.prefixes.keep(cache, cache.context.prefix, held)
    return held


def note(cache: PagedCache, tokens: Sequence[int] | mx.array, salt: str = "") -> int:
    """Say which tokens a cache holds, for its next flush; see `PagedCache.remember`."""
    _require_open(cache)
    context = cache.context
    if obstacle(cache) or not cache.offset:
        return 0
    ids = _ids(tokens)[: cache.offset]
    unit = _unit(cache)
    units = min(_full_tokens(layer) for layer in _holding(cache)) // unit
    digests = prefix_digests(
        _key(context, unit, salt),
        ids,
        unit,
        context.config.sink_tokens,
        min(units, sequences.MOST_UNITS),
    )
    if rate := context.pace.prompt_per_second:
        context.prefixes.prompt_rate = rate
    context.prefix = digests
    return context.config.sink_tokens + len(digests) * unit if digests else 0


@interruptible
def reuse(cache: PagedCache, tokens: Sequence[int] | mx.array, salt: str = "") -> int:
    """Fill an empty cache with what is known of these tokens; see `PagedCache.reuse`."""
    _require_open(cache)
    if cache.offset:
        raise CacheStateError(
            f"this cache holds {cache.offset:,} tokens: only an empty one can begin with a prefix"
        )
    context, config = cache.context, cache.context.config
    if obstacle(cache):
        return 0
    context.pager.reclaim()
    ids, unit = _ids(tokens), _unit(cache)
    # Beyond the window of this prompt: tokens within it are 16 bit, as if nothing were reused.
    most = (len(ids) - config.sink_tokens - config.hot_tokens) // unit
    digests = prefix_digests(_key(context, unit, salt), ids, unit, config.sink_tokens, max(0, most))
    here = context.prefixes.longest(digests)
    there = _longest_stored(cache, digests)
    units = 0
    try:
        if there is not None and there[1] > (here[1] if here else 0):
            units = _load(cache, *there, unit)
        if not units and here is not None:
            source, units = here
            _take_over(cache, source, config.sink_tokens + units * unit)
    except BaseException:
        context.pager.inconsistent = True
        sequences.empty(cache)
        raise
    context.prefix = digests[:units]
    reused = cache.offset
    context.prefixes.reused += reused
    return reused


def _require_open(cache: PagedCache) -> None:
    if any(layer._closed for layer in cache.paged_layers):
        raise ClosedError("the cache is closed; make a new one")


def _ids(tokens: Sequence[int] | mx.array) -> list[int]:
    plain: Any = tokens.tolist() if isinstance(tokens, mx.array) else tokens
    try:
        given: list[Any] = list(plain)
    except TypeError as e:
        raise ConfigError(f"tokens are a list of ids, or an array [n]: {e}") from e
    if given and hasattr(given[0], "__len__") and not isinstance(given[0], str):
        raise CacheStateError("tokens are of one sequence: a list of ids, or an array [n]")
    return given


def _holding(cache: PagedCache) -> list[PagedLayerCache]:
    """The layers that hold tokens: some models have caches that they never use."""
    return [layer for layer in cache.paged_layers if layer.offset]


def _unit(cache: PagedCache) -> int:
    """Tokens per digest: a whole number of pages in every layer."""
    return max(layer.page_tokens for layer in cache.paged_layers if layer.shape)


def _full_tokens(layer: PagedLayerCache) -> int:
    """Tokens in the full pages with which a layer begins."""
    tokens = (n for _, n in layer.located_pages())
    return sum(itertools.takewhile(lambda n: n == layer.page_tokens, tokens))


def _key(context: SequenceContext, unit: int, salt: str) -> bytes:
    config = context.config
    ladders = str(context.pager.budget.ladders)
    settings = (ladders, config.sink_tokens, config.hot_dtype, unit, config.prefix_salt)
    # What a step leaves out is missing in the pages of all later layers too.
    left_out = (config.skip_below, config.cold_pages)
    context.require_same_weights()
    return prefix_key(context.fingerprint, *settings, *left_out, *([salt] if salt else []))


def _take_over(cache: PagedCache, source: PagedCache, tokens: int) -> None:
    cache.context.lineage = source.context.lineage  # its pages are in use now
    for layer, other in zip(cache.paged_layers, source.paged_layers, strict=True):
        if other.offset:
            layer.take_over(other)
            layer.trim(other.offset - tokens)


# On disk


def _longest_stored(
    cache: PagedCache, digests: Sequence[bytes]
) -> tuple[StoredSequence, int] | None:
    """The flushed sequence that shares most with a chain, and the units that it shares."""
    if not digests or not sequences.lasts(cache):
        return None
    found, most = None, 0
    for stored in sequences.store_of(cache).checkpoints.stored():
        for units in range(min(len(digests), len(stored.prefix)), most, -1):
            if stored.prefix[units - 1] == digests[units - 1].hex():
                found, most = stored, units
                break
    return (found, most) if found else None


def _load(cache: PagedCache, stored: StoredSequence, units: int, unit: int) -> int:
    """Begin with pages of a flushed sequence, if that is quicker than computing them.

    Returns:
        The units loaded: all or none. A sequence that is damaged, or was made with a window whose
        precisions do not occur here, is none, with a warning.
    """
    tokens = cache.context.config.sink_tokens + units * unit
    try:
        sequences.adopt_prefix(cache, stored.sequence, tokens)
        if _pays(cache, tokens, cache.context.prefixes.prompt_rate or stored.prompt_rate):
            # All of it once: what is damaged shows here, where it can still be computed again.
            for layer in cache.paged_layers:
                _read(layer, layer._cold_batches())
            return units
    except (ColdStoreError, CacheStateError, SequenceNotFoundError) as e:
        warnings.warn(f"{e}: its tokens are computed again", stacklevel=4)
    sequences.empty(cache)
    return 0


def _pays(cache: PagedCache, tokens: int, prompt_rate: float) -> bool:
    """Whether reading so many tokens' pages takes less time than computing the tokens would.

    The disk's rate is measured with the first pages if nothing was read before.
    """
    if not prompt_rate:
        return True  # nobody knows; a disk is quicker than a model
    counters = cache.context.pager.cold.counters
    if not counters.bytes_read:
        _read_some(cache)
    if not counters.bytes_read:
        return True  # they were in memory
    nbytes = sum(
        layer.page_bytes(page.precision)
        for layer in cache.paged_layers
        for page, _ in layer.located_pages()
        if page.slot is None
    )
    return nbytes * counters.read_seconds / counters.bytes_read < tokens / prompt_rate


def _read_some(cache: PagedCache) -> None:
    started = time.perf_counter()
    for layer in cache.paged_layers:
        if layer._pager is None or time.perf_counter() - started > _TRIAL_SECONDS:
            return
        _read(layer, layer._cold_batches()[:1])


def _read(layer: PagedLayerCache, batches: Sequence[Batch]) -> None:
    assert layer._pager is not None
    for _ in layer._pager.stream(batches):
        pass

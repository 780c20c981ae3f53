"""Flushing a cache to its cold directory, and going on from there in another process."""

from __future__ import annotations

import errno
import json
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import KVShape, Ladder
from pagedkv.cache.nested import streams
from pagedkv.calibration.file import Calibration, digest_of
from pagedkv.config.tier_config import AUTO, require_durability
from pagedkv.errors import (
    CacheStateError,
    ClosedError,
    ColdStoreError,
    ConfigError,
    StoreLockedError,
    StoreMismatchError,
)
from pagedkv.sequence.interruption import interruptible
from pagedkv.tiers import (
    FileColdStore,
    LayerState,
    Pager,
    SequenceState,
    StoredSequence,
    Treatment,
)
from pagedkv.tiers.arrays import evaluated
from pagedkv.tiers.checkpoints.committer import SequenceStore, StoredPage
from pagedkv.tiers.checkpoints.file_format import Checkpoint, Entries, damaged, precisions, read_hot

if TYPE_CHECKING:
    from pagedkv.cache.paged_cache import PagedCache
    from pagedkv.sequence.layer import PagedLayerCache

Bytes = npt.NDArray[np.uint8]
MOST_UNITS = 8000
"""Digests that a checkpoint has room for beside everything else in its description."""

TREATMENTS = "treatments.json"
"""Kept in a store, in the format of calibrations: the matrices of its pages."""

UNDECIDED = "undecided.json"
"""Of earlier versions, which chose matrices by what was read first: removed."""

LAYERS = "layers.json"
"""Likewise: the layers that have the ladder of those that look things up."""

_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@interruptible
def flush(cache: PagedCache, durability: str | None, spare: bool = False) -> StoredSequence:
    """Put the cache as it is on disk; see `PagedCache.flush`, and `SequenceState.spare`."""
    store = store_of(cache)
    cache.context.require_same_weights()
    durability = durability or cache.context.config.durability
    require_durability(durability)
    cache.context.pager.reclaim()
    layers = _layers(cache)
    pages: list[StoredPage] = []
    for layer in layers:
        assert layer._pager is not None and layer._table is not None
        entries = layer._table.entries
        records = layer._pager.copy_down(entries)
        for record, entry in zip(records, entries, strict=True):
            pages.append((record, layer._pager.pages[entry.page].position, entry.tokens))
    state = SequenceState(
        identity=store.checkpoints.identity,
        sequence=cache.context.sequence_id,
        tokens=cache.offset,
        flushed_at=time.time_ns(),
        layers=tuple(map(_describe, layers)),
        prefix=tuple(digest.hex() for digest in cache.context.prefix),
        spare=spare,
        prompt_rate=cache.context.pace.prompt_per_second or cache.context.prefixes.prompt_rate,
    )
    _keep_layers(cache, store, durability == "power")
    _keep_treatments(cache, store, durability == "power")
    store.commit(state, pages, _hot(layers), durable=durability == "power")
    return next(s for s in store.checkpoints.stored() if s.sequence == state.sequence)


def store_of(cache: PagedCache) -> SequenceStore:
    """The cache's store of flushed sequences.

    Raises:
        ConfigError: if it has none, with the reason.
        ClosedError: if the cache is closed.
        StoreLockedError: if it is not this process's any more.
    """
    if any(layer._closed for layer in cache.paged_layers):
        raise ClosedError("the cache is closed; make a new one")
    pager = cache.context.pager
    store: FileColdStore | None = pager.cold if pager.has_cold else None
    if store is not None and store.sequences is not None:
        store.require_held()
        return store.sequences
    config = cache.context.config
    if not pager.has_cold:
        problem = "there is no disk (cold=0): give a cold budget and a cold_dir"
    elif config.cold_dir is None:
        problem = "the cold files are temporary: give a cold_dir, or save() to a file"
    else:
        problem = "nothing says whose they are: name the model, as in standalone(n, model='mine')"
    raise ConfigError(f"sequences of this cache cannot be kept: {problem}")


def _layers(cache: PagedCache) -> list[PagedLayerCache]:
    """The layers that hold tokens, all of them the same.

    Raises:
        CacheStateError: if a layer is not paged, or is ahead of another.
    """
    if not cache.is_fully_paged:
        others = (c for c in streams(cache) if c not in cache.paged_layers)
        names = ", ".join(sorted({type(c).__name__ for c in others}))
        raise CacheStateError(
            f"not all layers of this cache are paged (some are {names}): it can be saved with "
            f"mlx_lm.models.cache.save_prompt_cache, but not flushed"
        )
    if any(layer._context is not cache.context for layer in cache.paged_layers):
        raise CacheStateError("this cache has layers of several models: flush each model's alone")
    layers = [layer for layer in cache.paged_layers if layer.offset]
    offsets = sorted({layer.offset for layer in layers})
    if len(offsets) > 1:
        raise CacheStateError(
            f"the layers hold from {offsets[0]:,} to {offsets[-1]:,} tokens: flush between the "
            f"model's calls, not within one"
        )
    return layers


def _describe(layer: PagedLayerCache) -> LayerState:
    assert layer._pager is not None and layer._table is not None
    shape = layer._pager.shape
    return LayerState(
        layer=layer.layer,
        kv_heads=shape.kv_heads,
        key_dim=shape.key_dim,
        value_dim=shape.value_dim,
        dtype=_dtype_name(layer),
        page_tokens=layer._pager.page_tokens,
        hot_tokens=layer._hot.used,
        pages=len(layer._table),
        dropped=layer.dropped,
        treatment=_treatment_of(layer) if len(layer._table) else "",
    )


def _treatment_of(layer: PagedLayerCache) -> str:
    """The digest of what is done to pages."""
    pager = layer._pager
    return pager.treatment.digest if pager and pager.treatment else ""


# Layers that look things up, and treatments: a store keeps those of its pages


def kept_layers(pager: Pager, layers: Collection[int]) -> tuple[int, ...] | None:
    """The layers that have another ladder than most in the store, which is opened for it.

    Args:
        pager: without pages.
        layers: numbers of those that may have one.

    Returns:
        Their numbers: as noted, or, if the note is lost, as the pages are. None without any.

    Raises:
        See `Pager.cold`.
    """
    store = pager.cold.sequences if pager.has_cold else None
    if store is None or store.checkpoints.empty:
        return None
    told = _layers_told(store.checkpoints.kept(LAYERS), layers)
    return _layers_shown(store, pager.budget.ladders.common) if told is None else told


def _layers_shown(store: SequenceStore, common: Ladder) -> tuple[int, ...] | None:
    """The layers with other pages than most in a store's sequences; None if it has no pages."""
    pages, others = 0, set[int]()
    for stored in store.checkpoints.stored():
        with suppress(ColdStoreError):  # resuming it says what is wrong
            checkpoint = store.load(stored.sequence)
            pages += len(checkpoint.entries)
            for layer in checkpoint.state.layers:
                mine = checkpoint.entries[checkpoint.entries["layer"] == layer.layer]
                if not set(precisions(mine)) <= set(common.steps):
                    others.add(layer.layer)
    return tuple(sorted(others)) if pages else None


def _layers_told(content: bytes | None, layers: Collection[int]) -> tuple[int, ...] | None:
    """What `_keep_layers` wrote; None if it is nothing of that kind."""
    try:
        told = json.loads(content or b"null")
    except (ValueError, RecursionError):
        return None
    numbers = told if isinstance(told, list) else [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n in layers for n in numbers):
        return None
    return tuple(numbers)


def _keep_layers(cache: PagedCache, store: SequenceStore, durable: bool) -> None:
    """Write down which layers have another ladder than most, for they are not found out again.

    Raises:
        StoreMismatchError: if sequences of other processes need others.
    """
    if not store.checkpoints.identity.kv.endswith(f"@{AUTO}"):
        return  # its name says it
    mine = tuple(number for number, _ in cache.context.pager.budget.ladders.others)
    if store.checkpoints.wrote(LAYERS):
        return
    layers = {layer.layer for layer in cache.paged_layers}
    theirs = _layers_told(store.checkpoints.kept(LAYERS), layers)
    if theirs is not None and theirs != mine and not store.checkpoints.empty:
        raise StoreMismatchError(
            f"layers {list(theirs)} have more bits in {store.checkpoints.directory}, which has "
            f"sequences of other processes, and layers {list(mine)} here: unwrap() the model and "
            f"wrap() it again"
        )
    content = json.dumps(mine).encode()
    store.checkpoints.keep(LAYERS, content.decode(), lambda: content, durable)


def _keep_treatments(cache: PagedCache, store: SequenceStore, durable: bool) -> None:
    """Write the matrices into the store that its pages need; that there are none, too."""
    pager = cache.context.pager
    may_be = pager.treatments or store.checkpoints.identity.model.endswith(f" treatment={AUTO}")
    if may_be and any(layer.pages for layer in pager.layer_pagers):
        mine = Calibration(cache.context.fingerprint, 0, pager.treatments)
        if not store.checkpoints.wrote(TREATMENTS):
            _require_no_others(store, mine)
        # Made only if they are others than before: an 8B model's are 33 MB.
        store.checkpoints.keep(TREATMENTS, digest_of(mine), mine.to_bytes, durable)
    store.checkpoints.drop(UNDECIDED)


def _require_no_others(store: SequenceStore, mine: Calibration) -> None:
    """See that nobody's sequences need matrices that we would write ours over.

    Raises:
        StoreMismatchError: if they do: somebody had the store since we opened it first.
    """
    content = store.checkpoints.kept(TREATMENTS)
    if content is None or store.checkpoints.empty:
        return
    path = store.checkpoints.directory / TREATMENTS
    try:
        theirs = Calibration.from_bytes(content, path)
        problem = "are not ours" if any(mine.get(n, t) != t for n, t in theirs.items()) else ""
    except ConfigError as e:
        problem = f"cannot be read ({e})"
    if problem:
        raise StoreMismatchError(
            f"the matrices in {path} {problem}, and sequences in this store need them: flush to "
            f"another cold_dir; for this one unwrap() the model and wrap() it again"
        )


def kept_treatments(
    pager: Pager, model: str, shapes: Mapping[int, KVShape]
) -> dict[int, Treatment] | None:
    """What the pages in the store are treated with; it is opened for it.

    Args:
        pager: without pages.
        model: fingerprint.
        shapes: by layer, as far as they are known.

    Returns:
        By layer number; None if the store does not say.

    Raises:
        See `Pager.cold`.
    """
    store = pager.cold.sequences
    content = store.checkpoints.kept(TREATMENTS) if store else None
    if store is None or content is None:
        return None
    path = str(store.checkpoints.directory / TREATMENTS)
    try:
        kept = Calibration.from_bytes(content, path)
        kept.require(model, shapes, path)
    except ConfigError as e:
        # Not the end of it: each sequence says which matrices it needs, and is refused.
        warnings.warn(f"{e}: the sequences in this store cannot be read", stacklevel=3)
        return None
    return {number: replace(t, reason="kept in the store") for number, t in kept.items()}


def _dtype_name(layer: PagedLayerCache) -> str:
    return str(layer._dtype).removeprefix("mlx.core.")


def _hot(layers: list[PagedLayerCache]) -> Iterator[Bytes]:
    """The hot keys and values of each layer, one array at a time."""
    for layer in layers:
        if layer._hot.used:
            for array in layer._hot.view():
                plain = mx.contiguous(array)
                if plain.dtype == mx.bfloat16:
                    plain = plain.view(mx.uint16)  # numpy has no bfloat16
                yield np.asarray(evaluated(plain)).reshape(-1).view(np.uint8)


# Resuming


@interruptible
def resume(cache: PagedCache, sequence: str | None) -> None:
    """Fill an empty cache from the store; see `PagedCache.resume`."""
    store = store_of(cache)
    cache.context.require_same_weights()
    if cache.offset:
        raise CacheStateError(
            f"this cache holds {cache.offset:,} tokens: resume with an empty one, from wrap() or "
            f"model.make_cache()"
        )
    cache.context.pager.reclaim()
    checkpoint = store.load(sequence)
    _require_unused(cache, checkpoint.state.sequence)
    layers = {layer.layer: layer for layer in cache.paged_layers}
    _bind_all(layers, checkpoint)
    try:
        for state in checkpoint.state.layers:
            _accept_dropped(layers[state.layer], state, checkpoint)
        for state, keys, values in read_hot(cache.context.pager.disk, checkpoint):
            _load_hot(layers[state.layer], state, keys, values)
        _load_pages(layers, store, checkpoint, checkpoint.entries)
        for state in checkpoint.state.layers:
            layers[state.layer].offset = checkpoint.state.tokens
    except BaseException:
        cache.context.pager.inconsistent = True
        empty(cache)
        raise
    cache.context.sequence_id = checkpoint.state.sequence
    cache.context.prefix = [bytes.fromhex(digest) for digest in checkpoint.state.prefix]


@interruptible
def adopt_prefix(cache: PagedCache, sequence: str, tokens: int) -> None:
    """Fill an empty cache with the beginning of a flushed sequence, and share its pages.

    Args:
        cache: which; after an error it may hold a part: `empty` it.
        sequence: its name.
        tokens: how many: the sinks, and whole pages in every layer.

    Raises:
        CorruptStoreError: if the checkpoint is damaged, or does not hold so many.
        SequenceNotFoundError, StoreMismatchError, ColdStoreError: see `resume`.
    """
    store = store_of(cache)
    checkpoint = store.load(sequence)
    layers = {layer.layer: layer for layer in cache.paged_layers}
    _bind_all(layers, checkpoint)
    sinks = cache.context.config.sink_tokens
    chosen, at = [], 0
    for state in checkpoint.state.layers:
        count = (tokens - sinks) // state.page_tokens
        first = checkpoint.entries[at : at + min(count, state.pages)]
        if state.hot_tokens < sinks or int(first["tokens"].sum()) != tokens - sinks:
            raise damaged(checkpoint.path, f"layer {state.layer} does not begin with full pages")
        chosen.append(first)
        at += state.pages
    for state, keys, values in read_hot(cache.context.pager.disk, checkpoint):
        layer = layers[state.layer]
        _load_hot(layer, state, keys, values)
        layer._hot.truncate(sinks)
        layer.compact()
    _load_pages(layers, store, checkpoint, np.concatenate(chosen))
    for state in checkpoint.state.layers:
        layers[state.layer].offset = tokens


def lasts(cache: PagedCache) -> bool:
    """Whether what is flushed stays when the process ends."""
    return cache.context.pager.has_cold and cache.context.pager.identity is not None


def _bind_all(layers: dict[int, PagedLayerCache], checkpoint: Checkpoint) -> None:
    for state in checkpoint.state.layers:
        if state.layer not in layers:
            raise StoreMismatchError(
                f"{checkpoint.path} has a layer {state.layer}, this model pages {sorted(layers)}"
            )
        _bind(layers[state.layer], state, checkpoint)


def _require_unused(cache: PagedCache, sequence: str) -> None:
    for other in list(cache.context.pager.users):
        if other._context.sequence_id == sequence and other._context is not cache.context:
            raise StoreLockedError(
                errno.EBUSY,
                f"sequence {sequence} is open in this process already: close() that cache first, "
                f"or fork() it",
            )


def _bind(layer: PagedLayerCache, state: LayerState, checkpoint: Checkpoint) -> None:
    """Give a layer its shape, or see that it is the same.

    Raises:
        StoreMismatchError: naming what differs.
    """
    if layer._pager is None:
        layer.bind(state.shape, _DTYPES[state.dtype])
    pager = layer._pager
    assert pager is not None
    saved = (state.shape, state.dtype, state.page_tokens)
    here = (pager.shape, _dtype_name(layer), pager.page_tokens)
    if saved != here:
        raise StoreMismatchError(
            f"layer {state.layer} of {checkpoint.path} has {_tell(*saved)}, here it has "
            f"{_tell(*here)}: resume with the settings that it was flushed with"
        )
    entries = checkpoint.entries
    mine = entries[entries["layer"] == state.layer]
    for precision in precisions(mine):
        if precision not in pager.precisions:
            raise StoreMismatchError(
                f"layer {state.layer} of {checkpoint.path} has {precision} pages, which "
                f"'{layer.ladder}' does not have beyond a window of "
                f"{layer._context.config.hot_tokens} hot tokens: resume with the hot_tokens that "
                f"it was flushed with, and its store's {LAYERS} if there was one"
            )
    if state.pages and state.treatment not in (None, _treatment_of(layer)):
        raise StoreMismatchError(
            f"layer {state.layer} of {checkpoint.path} needs the matrices "
            f"{state.treatment or 'of no treatment'}, here they are "
            f"{_treatment_of(layer) or 'those of no treatment'}: the store's {TREATMENTS} is "
            f"missing, damaged or another one"
        )


def _tell(shape: KVShape, dtype: str, page_tokens: int) -> str:
    return (
        f"{shape.kv_heads} KV heads of {shape.key_dim}/{shape.value_dim} channels in {dtype} and "
        f"pages of {page_tokens} tokens"
    )


def _accept_dropped(layer: PagedLayerCache, state: LayerState, checkpoint: Checkpoint) -> None:
    try:
        layer.accept_dropped(state.dropped, checkpoint.state.tokens)
    except CacheStateError as e:
        raise StoreMismatchError(f"{checkpoint.path} was made with other settings: {e}") from e


def _load_hot(layer: PagedLayerCache, state: LayerState, keys: Bytes, values: Bytes) -> None:
    arrays = []
    for data, dim in ((keys, state.key_dim), (values, state.value_dim)):
        words = mx.array(data.view(np.uint32 if state.dtype == "float32" else np.uint16))
        shape = (1, state.kv_heads, state.hot_tokens, dim)
        arrays.append(words.view(_DTYPES[state.dtype]).reshape(shape))
    mx.eval(*arrays)
    layer._hot.load(*arrays)
    layer.offset = state.hot_tokens


def empty(cache: PagedCache) -> None:
    """Let go of everything that was loaded."""
    cache.context.pager.reclaim()
    for layer in cache.paged_layers:
        layer.forget_all()
    cache.context.prefix = []


def _load_pages(
    layers: dict[int, PagedLayerCache],
    store: SequenceStore,
    checkpoint: Checkpoint,
    entries: Entries,
) -> None:
    for record, position, tokens in store.records(checkpoint, entries):
        layer = layers[record.identity.layer]
        assert layer._pager is not None and layer._table is not None
        number = layer._pager.adopt(record, position, layer._context.lineage)
        layer._table.append(number, tokens)
        layer._may_promote = True  # they are warm again as far as there is room

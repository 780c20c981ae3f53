"""A cache as a tree of arrays and strings: what mlx-lm saves, and what `save` streams to a file.

Per layer: ``meta`` (JSON text), ``hot_keys``, ``hot_values``, ``treatment`` with the matrices if
there are any (uint32), and ``pages`` with one uint32 array per sealed page. The file is a
safetensors file with the arrays and names that mlx-lm's `save_prompt_cache` would write.

Nothing of a file is taken on trust: each layer's text has the digests of its arrays and one of
itself, and a file that `save` wrote has one over all of it (docs/format.md).
"""

from __future__ import annotations

import json
import os
import re
import threading
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from operator import is_
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from pagedkv.allocator import KVShape, PageGeometry, Precision
from pagedkv.allocator.geometry import PAGE_TOKENS
from pagedkv.cache.nested import inner_caches
from pagedkv.cache.persistence.safetensors_file import (
    NO_DIGEST,
    Entry,
    StoredArray,
    array_digest,
    bytes_of,
    is_whole,
    read_arrays,
    text_digest,
    write_arrays,
)
from pagedkv.config.sizes import parse_size
from pagedkv.config.tier_config import ALIKE, TierConfig, names_file
from pagedkv.errors import CacheStateError, ConfigError, PagedKVError
from pagedkv.sequence.interruption import interruptible
from pagedkv.tiers import Pager, Run, Treatment
from pagedkv.tiers.arrays import evaluated
from pagedkv.tiers.codec.affine import AffineCodec, Sixteen, codec_for
from pagedkv.tiers.turn import exclusive

if TYPE_CHECKING:
    from pagedkv.cache.paged_cache import PagedCache
    from pagedkv.sequence.layer import PagedLayerCache
    from pagedkv.sequence.sequence import SequenceContext

FORMAT = "pagedkv-3"
_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


class CacheState(dict[str, Any]):
    """A layer's state, cheap to evaluate and complete to iterate.

    mlx-lm evaluates ``[c.state for c in cache]`` after every prefill chunk and flattens the same
    expression to save it. `mx.eval` looks at the stored items, which are the hot arrays alone;
    flattening calls `items`, which adds the pages, cold ones read from disk. So it is a view and no
    copy: once the cache has gone on, it is refused.

    It is also the pair of keys and values that a plain cache's state is: layers of mlx-vlm's models
    that share keys (gemma3n, afm7) read them here.
    """

    def __init__(self, cache: PagedLayerCache) -> None:
        super().__init__(zip(("hot_keys", "hot_values"), cache._hot.arrays, strict=False))
        self._cache = cache
        self._offset = cache.offset

    def items(self) -> Any:
        """The full state, pages included.

        Raises:
            ClosedError, CacheStateError: see `full_state`; or if the cache holds others now.
        """
        full = full_state(self._cache).items()
        offset, arrays = self._cache.offset, self._cache._hot.arrays
        same = len(arrays) == len(self) and all(map(is_, arrays, self.values()))
        if not same or offset != self._offset:
            raise CacheStateError(
                f"the cache had {self._offset:,} tokens when its state was asked for and has "
                f"{offset:,} others now: a state is no copy, use copy.deepcopy(cache) to go back"
            )
        return full

    def __getitem__(self, key: str | int) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self._pair[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._pair)

    @cached_property
    def _pair(self) -> tuple[mx.array, mx.array]:
        """One pair however often it is asked for: attention takes keys and values of one view."""
        return self._cache.keys_and_values()


@exclusive
def full_state(cache: PagedLayerCache) -> dict[str, Any]:
    """Everything a layer holds, with its pages in memory.

    Raises:
        ClosedError: if it is closed.
        CacheStateError: if its sequence is in the middle of a call, or such a call has failed;
            or if the model has other weights than when it was wrapped.
    """
    _require_whole(cache)
    cache._context.require_same_weights()
    full: dict[str, Any] = dict(_unpaged_arrays(cache))
    pages = {f"p{i}": record for i, record in enumerate(page_records(cache))}
    digests = {name: array_digest(name, array) for name, array in {**full, **pages}.items()}
    if pages:
        full["pages"] = pages
    return {**full, "meta": _signed({**describe(cache), "digests": digests})}


def _unpaged_arrays(cache: PagedLayerCache) -> Iterator[tuple[str, mx.array]]:
    """All arrays of a layer but its pages, with their names."""
    if cache.empty():
        return
    yield from zip(("hot_keys", "hot_values"), cache._hot.view(), strict=True)
    if cache._pager and cache._pager.treatment:
        yield "treatment", cache._pager.treatment.all_words


def _require_whole(cache: PagedLayerCache) -> None:
    """See that a layer has something to save, and that it goes with the sequence's others."""
    cache.require_open()
    if cache._context.torn:
        raise CacheStateError(
            "a call of the model failed, and its layers that are not paged are ahead of those "
            "that are: save a copy that was made before"
        )
    lengths = sorted({c.offset for c in cache.siblings() if c.offset})
    if len(lengths) > 1:
        raise CacheStateError(
            f"the layers hold from {lengths[0]:,} to {lengths[-1]:,} tokens: save between the "
            f"model's calls, not within one"
        )


def describe(cache: PagedLayerCache) -> dict[str, Any]:
    """What a layer's state means: settings, shape, and what each page is."""
    context = cache._context
    config = context.settled.to_dict()
    # Paths are for nobody else, and no file may choose any.
    config |= {"cold_dir": None}
    config |= {"treatment": "auto"} if names_file(config["treatment"]) else {}
    meta: dict[str, Any] = {
        "format": FORMAT,
        "layer": cache.layer,
        "layers": context.pager.layers,
        "siblings": sum(1 for _ in cache.siblings()),
        "readers": cache.readers,
        "offset": cache.offset,
        "fingerprint": context.fingerprint,
        "max_tokens": context.max_tokens,
        "sequence": context.sequence_id,
        "sink_tokens": cache.sink_tokens,
        "config": config,
    }
    if window := cache.window_state():
        meta["window"] = window
    if cache.splits or not cache.in_step:
        meta["calls"] = [cache.in_step, cache.splits]
    if cache._pager is not None and cache._table is not None:
        shape = cache._pager.shape
        meta["shape"] = [shape.kv_heads, shape.key_dim, shape.value_dim]
        meta["dtype"] = str(cache._dtype).removeprefix("mlx.core.")
        meta["page_tokens"] = cache._pager.page_tokens
        if treatment := cache._pager.treatment:
            meta["treatment"] = treatment.describe()
        pages = cache._pager.pages
        meta["pages"] = [
            [str(pages[e.page].precision), pages[e.page].position, e.tokens] for e in cache._table
        ]
    return meta


def _signed(meta: dict[str, Any]) -> str:
    """A layer's description as text, with its own digest."""
    return json.dumps({**meta, "digest": text_digest(meta)})


def page_records(cache: PagedLayerCache) -> Iterator[mx.array]:
    """Each page's record, uint32 ``[page_bytes / 4]``, in order, one at a time."""
    if cache._pager is None or cache._table is None:
        return
    for entry in cache._table:
        run = Run((entry,), cache._pager.pages[entry.page].precision)
        for _, record, _ in cache._pager.records([run]):
            mx.eval(record)
            yield record[0]


# Restoring

_loading: weakref.WeakValueDictionary[tuple[int, str], SequenceContext] = (
    weakref.WeakValueDictionary()
)
"""Contexts of caches being loaded by mlx-lm, which builds one layer at a time; by thread and
sequence."""

_MOST_LAYERS = 2**16


def _is_page(value: Any) -> bool:
    """Whether it is precision, position and valid tokens of a page."""
    kinds = [type(x) for x in value] if isinstance(value, list) else []
    return kinds == [str, int, int] and value[1] >= 0 and 1 <= value[2] <= PAGE_TOKENS[-1]


_POSSIBLE: dict[str, Callable[[Any], bool]] = {
    "layer": lambda n: is_whole(n, 0, _MOST_LAYERS),
    "layers": lambda n: is_whole(n, 1, _MOST_LAYERS),
    "siblings": lambda n: is_whole(n, 1, _MOST_LAYERS),
    "readers": lambda n: is_whole(n, 1),
    "offset": lambda n: is_whole(n, 0, 2**40),
    "sink_tokens": is_whole,
    "max_tokens": lambda n: n is None or is_whole(n, 0, 2**63),
    "sequence": lambda text: isinstance(text, str),
    "fingerprint": lambda text: isinstance(text, str),
    "config": lambda told: isinstance(told, dict),
    "digests": lambda told: isinstance(told, dict),
    "calls": lambda told: told is None or [type(x) for x in told] == [bool, bool],
    "window": lambda told: told is None or all(map(is_whole, dict(told).values())),
}
_POSSIBLE_OF_TOKENS: dict[str, Callable[[Any], bool]] = {
    "shape": lambda n: len(n) == 3 and all(is_whole(x, 1) for x in n),
    "dtype": lambda text: text in _DTYPES,
    "page_tokens": lambda n: is_whole(n) and n in PAGE_TOKENS,
    "pages": lambda told: isinstance(told, list) and all(map(_is_page, told)),
}
"""What a description must say, and of a layer that holds tokens: which values can be."""

_ALIKE = ("sequence", "layers", "siblings", "fingerprint", "max_tokens", "config")
"""What all layers of a saved cache say alike."""


def parse_meta(value: Any) -> dict[str, Any]:
    """The description in a saved layer state.

    Raises:
        CacheStateError: if it is not one of ours, or damaged.
    """
    try:
        meta = json.loads(value["meta"])
        known, digest = meta["format"] == FORMAT, meta.pop("digest", None)
        sound = digest == text_digest(meta)
    except (TypeError, LookupError, ValueError, AttributeError, RecursionError) as e:
        raise CacheStateError("this is not the state of a paged cache") from e
    if not known:
        raise CacheStateError(
            f"saved cache has format {str(meta['format'])[:40]!r}, this version reads {FORMAT!r}: "
            f"let the model read the prompt again, and save that"
        )
    if not sound:
        raise CacheStateError(
            "the description of a layer is damaged, its digest is another than when it was saved: "
            "use another copy of the file, or let the model read the prompt again"
        )
    _require_possible(meta)
    return {**meta, "digest": digest}


def _require_possible(meta: dict[str, Any]) -> None:
    """See that a description says all that it must, in values that can be.

    Raises:
        CacheStateError: naming what it does not.
    """
    for name, possible in (_POSSIBLE | (_POSSIBLE_OF_TOKENS if meta.get("offset") else {})).items():
        try:
            good = possible(meta.get(name))
        except (TypeError, ValueError):
            good = False
        if not good:
            raise CacheStateError(
                f"the saved state of a layer is damaged: its {name} is "
                f"{str(meta.get(name, 'missing'))[:80]}"
            )
    arrays = set[str]()
    if meta["offset"]:
        pages = (f"p{i}" for i in range(len(meta["pages"])))
        arrays = {"hot_keys", "hot_values", *pages} | ({"treatment"} & meta.keys())
    if arrays != meta["digests"].keys():
        raise CacheStateError(
            f"the saved state of layer {meta['layer']} is damaged: it is described as "
            f"{len(arrays)} arrays and has digests of {len(meta['digests'])}, not of the same"
        )


def _require_alike(first: dict[str, Any], meta: dict[str, Any]) -> None:
    """See that two layers are of one sequence.

    Raises:
        CacheStateError: naming what tells them apart.
    """
    unlike = [name for name in _ALIKE if first[name] != meta[name]]
    if first["offset"] and meta["offset"] and first["offset"] != meta["offset"]:
        unlike.append("offset")
    if unlike:
        name = unlike[0]
        raise CacheStateError(
            f"layers {first['layer']} and {meta['layer']} were not saved together: their {name} is "
            f"{str(first[name])[:80]} and {str(meta[name])[:80]}"
        )


def saved_config(meta: dict[str, Any]) -> TierConfig:
    """The settings with which a cache was saved, as far as a file may choose them.

    That is what tokens and pages are like. Files come from other machines and other people: their
    budgets count where they are smaller than the defaults, and no path of theirs does, so that a
    file takes neither more memory and disk than a cache without settings nor chooses a place.

    Raises:
        CacheStateError: if there are no such settings.
    """
    # Files from before have no such choices.
    told = {"treatment": "none", "layer_kv": ALIKE, **meta["config"]}
    mine = TierConfig()
    told |= {"cold_dir": None, "keep_free": mine.keep_free}
    if names_file(told["treatment"]):
        told["treatment"] = "auto"
    try:
        if re.search(r"\d{6}", str(told["layer_kv"])):  # ranges are written out
            raise ConfigError("layer_kv names layers that no model has")
        for name in ("warm", "cold", "staging", "write_buffer", "scratch", "bounds"):
            both = told.get(name, getattr(mine, name)), getattr(mine, name)
            told[name] = min(both, key=parse_size)
        return TierConfig(**told)
    except (ConfigError, TypeError, ValueError, OverflowError) as e:
        raise CacheStateError(f"the settings of the saved cache are none: {e}") from e


def restore_into(cache: PagedLayerCache, value: Any) -> None:
    """Fill a blank layer cache from a state, with tiers of its own (shared by its file's layers).

    Raises:
        CacheStateError: if the state is damaged, not ours, or not of the same sequence as the
            layers before.
    """
    if isinstance(value, dict):
        value = dict(value.items())  # of a `CacheState` everything; the caller keeps the arrays
    meta = parse_meta(value)
    context = _loading_context(meta)
    try:
        if meta["offset"] and (treatment := _treatment(meta, value)):
            context.pager.treatments[meta["layer"]] = treatment
        cache.start_from(context, meta)
    except (KeyError, TypeError, ConfigError) as e:
        raise CacheStateError(f"the saved state is not that of a {type(cache).__name__}") from e
    cache.readers = meta["readers"]
    cache.in_step, cache.splits = map(bool, meta.get("calls", (True, False)))
    try:
        restore(cache, meta, value)
    except ConfigError as e:
        raise CacheStateError(f"the settings of the saved cache do not fit it: {e}") from e


def _loading_context(meta: dict[str, Any]) -> SequenceContext:
    """What a layer that is loaded shares with those that were loaded before it."""
    from pagedkv.sequence.sequence import SequenceContext

    key = threading.get_ident(), meta["sequence"]
    context = _loading.get(key)
    before = [cache.layer for cache in context.alive()] if context else []
    # One that is in use, or has lost layers, is not the one that is being loaded.
    going_on = bool(context and context.loaded and 0 < len(before) == len(context.layers))
    if context is None or not going_on or meta["layer"] in before:
        config = saved_config(meta)
        context = SequenceContext(config, Pager(config.budget(), meta["layers"]))
        context.fingerprint, context.max_tokens = meta["fingerprint"], meta["max_tokens"]
        context.loaded = meta
        _loading[key] = context
    else:
        assert context.loaded is not None
        _require_alike(context.loaded, meta)
        if meta["layer"] < before[-1]:
            raise CacheStateError(
                f"layer {meta['layer']} of the saved cache comes after layer {before[-1]}: they "
                f"were exchanged"
            )
        if meta["offset"]:
            context.loaded = meta
    return context


def require_all_loaded(context: SequenceContext) -> None:
    """See that a sequence that mlx-lm loaded has all layers that were saved together.

    Raises:
        CacheStateError: if it has not.
    """
    if context.loaded is None:
        return
    there, saved = sum(1 for _ in context.alive()), context.loaded["siblings"]
    if there != saved:
        raise CacheStateError(
            f"{there} of the {saved} layers of a saved cache were loaded: the others are missing, "
            f"or of another cache"
        )
    context.loaded = None  # once is enough


@exclusive
@interruptible
def restore(cache: PagedLayerCache, meta: dict[str, Any], value: Any, adopt: bool = False) -> None:
    """Put saved tokens into an empty layer cache whose tiers exist.

    The arrays are taken out of `value` one by one, so that no more than one page is in memory.

    Args:
        cache: of the layer.
        meta: its description, by `parse_meta`.
        value: its state.
        adopt: whether new pages are to be treated like those of the file, where there are none; if
            not, pages that were treated otherwise are encoded anew.

    Raises:
        CacheStateError: if arrays are missing, damaged, or of another shape than described.
        ConfigError: if the warm budget is smaller than one page.
        OutOfPagesError: if the budgets do not hold it.
    """
    if not meta["offset"]:
        return
    try:
        shape = KVShape(*meta["shape"])
        dtype = _DTYPES[meta["dtype"]]
        if cache.shape not in (None, shape):
            raise CacheStateError(
                f"layer {cache.layer}: the saved cache has {shape} and this one {cache.shape}"
            )
        cache.bind(shape, dtype)
        assert cache._pager is not None and cache._table is not None
        if cache._pager.page_tokens != meta["page_tokens"]:
            raise CacheStateError(
                f"saved pages hold {meta['page_tokens']} tokens and this cache's hold "
                f"{cache._pager.page_tokens}: load it with page_tokens={meta['page_tokens']}"
            )
        _require_precisions(cache, meta)
        foreign = _foreign_codecs(cache, meta, _treatment(meta, value), adopt)
        cache.accept_window(meta.get("window", {}), meta["offset"])
        if cache.sink_tokens != meta["sink_tokens"]:
            raise CacheStateError(
                f"the cache was saved with {meta['sink_tokens']} sink tokens and this one has "
                f"{cache.sink_tokens}: load it with the same sink_tokens"
            )
        for i, (name, position, tokens) in enumerate(meta["pages"]):
            precision = Precision.parse(name)
            record = _taken(meta, value, f"p{i}")
            _require_page(shape, meta["page_tokens"], precision, tokens, record)
            if theirs := foreign.get(precision):
                record = _encoded_anew(record, theirs, cache._pager.codecs[precision])
            page = cache._pager.store(record[None], precision, position, cache._context.lineage)
            cache._table.append(page, tokens)
        keys, values = (_taken(meta, value, name) for name in ("hot_keys", "hot_values"))
        _require_hot(shape, keys, values)
        cache._dtype = dtype
        cache._hot.load(keys.astype(dtype), values.astype(dtype))
        cache.offset = meta["offset"]
    except (KeyError, TypeError, ValueError) as e:
        if isinstance(e, PagedKVError):
            raise
        what = f"{e} is missing" if isinstance(e, KeyError) else e
        raise CacheStateError(
            f"the saved state of layer {meta.get('layer')} is damaged: {what}"
        ) from e
    if cache.offset != cache._hot.used + cache._table.tokens + cache.dropped:
        raise CacheStateError(
            f"layer {cache.layer}: {cache._hot.used} hot, {cache._table.tokens} paged and "
            f"{cache.dropped} dropped tokens are not the {cache.offset} that were saved"
        )


def _treatment(meta: dict[str, Any], value: Any) -> Treatment | None:
    """What was done to the saved keys and values.

    Raises:
        CacheStateError: if the file is damaged there.
    """
    if "treatment" not in meta:
        return None
    try:
        # Looked at twice, so it is not taken out: for the tiers, and for what this layer holds.
        words = np.asarray(evaluated(_taken(meta, {"treatment": value["treatment"]}, "treatment")))
        return Treatment.restore(
            meta["treatment"], words, KVShape(*meta["shape"]), "saved with the cache"
        )
    except (ConfigError, KeyError, TypeError, ValueError) as e:
        raise CacheStateError(
            f"the saved state of layer {meta.get('layer')} is damaged: {e}"
        ) from e


def _require_precisions(cache: PagedLayerCache, meta: dict[str, Any]) -> None:
    assert cache._pager is not None
    for i, (name, _, _) in enumerate(meta["pages"]):
        try:
            precision = Precision.parse(name)
        except ConfigError as e:
            raise CacheStateError(f"layer {cache.layer}: saved page {i}: {e}") from e
        if precision not in cache._pager.precisions:
            raise CacheStateError(
                f"layer {cache.layer}: saved page {i} is {precision}, which the ladder "
                f"'{cache.ladder}' does not have: load it with the kv and layer_kv that it was "
                f"saved with"
            )
        if not precision.quantized and _page_dtype(cache._pager.hot_dtype) != _page_dtype(
            _DTYPES[meta["dtype"]]
        ):
            raise CacheStateError(
                f"layer {cache.layer}: saved page {i} is of {meta['dtype']}, and this cache keeps "
                f"{cache._pager.hot_dtype}: load it with the hot_dtype that it was saved with"
            )


def _page_dtype(hot: mx.Dtype) -> mx.Dtype:
    """The type of 16-bit pages, given that of hot tokens."""
    return mx.float16 if hot == mx.float32 else hot


def _taken(meta: dict[str, Any], value: Any, name: str) -> mx.array:
    """An array of a layer's state, which is found to be what it was.

    It is taken out, for once it is read it has memory: the file may be larger than that.

    Raises:
        CacheStateError: if it is damaged.
        KeyError: if it is missing.
    """
    leaf = value["pages"].pop(name) if name.startswith("p") else value.pop(name)
    try:
        array: mx.array = leaf() if callable(leaf) else leaf
        mx.eval(array)
    except RuntimeError as e:  # MLX reads lazily: only here mlx-lm's loader finds a file cut short
        raise CacheStateError(f"layer {meta['layer']}: {name} cannot be read: {e}") from e
    if array_digest(name, array) != meta["digests"][name]:
        raise CacheStateError(
            f"layer {meta['layer']}: {name} is damaged, its digest is another than when it was "
            f"saved: use another copy of the file, or let the model read the prompt again"
        )
    return array


def _foreign_codecs(
    cache: PagedLayerCache, meta: dict[str, Any], saved: Treatment | None, adopt: bool
) -> dict[Precision, AffineCodec | Sixteen]:
    """What reads a file's pages that are treated otherwise than this cache's; else nothing.

    A model's matrices are the same in all processes, until they are measured on another machine or
    by another version. New pages keep this model's, in whatever order files are loaded.
    """
    pager = cache._pager
    assert pager is not None
    if not meta["pages"] or pager.treatment == saved:
        return {}
    if adopt and not pager.pages:
        pager.treat(saved)
        return {}
    warnings.warn(
        f"the pages of a saved cache are {saved.kind if saved else 'not treated'} by other "
        f"matrices than this model's: they are encoded anew, which costs a rounding",
        stacklevel=6,
    )
    size, dtype = meta["page_tokens"], pager.hot_dtype
    return {p: codec_for(pager.shape, size, p, dtype, saved) for p in pager.precisions}


def _encoded_anew(
    record: mx.array, theirs: AffineCodec | Sixteen, mine: AffineCodec | Sixteen
) -> mx.array:
    """A page's record ``[words]`` as another codec has it."""
    keys = theirs.keys(record[None], mx.float32)[0].swapaxes(1, 2)
    return mine.encode(keys, theirs.values(record[None], mx.float32)[0])[0]


def _require_page(
    shape: KVShape, page_tokens: int, precision: Precision, tokens: int, record: mx.array
) -> None:
    """See that a saved page can be one."""
    geometry = PageGeometry(shape, page_tokens, precision)
    words = geometry.page_bytes // 4
    if record.shape != (words,) or record.dtype != mx.uint32:
        raise CacheStateError(
            f"a {precision} page is uint32 [{words}], the file has {record.dtype} {record.shape}"
        )
    if tokens > page_tokens:
        raise CacheStateError(f"a page of {page_tokens} tokens cannot hold {tokens}")
    data = bytes_of(record)
    for part in geometry.parts:
        numbers = data[part.offset : part.offset + part.nbytes].view(np.float16)
        if part.dtype == "float16" and not np.isfinite(numbers).all():
            raise CacheStateError(f"a saved page's {part.name} are not all finite numbers")


def _require_hot(shape: KVShape, keys: mx.array, values: mx.array) -> None:
    """See that saved hot tokens can be some."""
    count = keys.shape[2] if keys.ndim == 4 else 0
    want = [(1, shape.kv_heads, count, dim) for dim in (shape.key_dim, shape.value_dim)]
    if [keys.shape, values.shape] != want or {keys.dtype, values.dtype} - set(_DTYPES.values()):
        raise CacheStateError(
            f"hot tokens are {want}, the file has {keys.dtype} {keys.shape} and {values.dtype} "
            f"{values.shape}"
        )


# Files

_WHOLE = "2.0"
"""Where a file's metadata has the digest over all of it: mlx-lm writes an empty text there, and
passes it by when it reads."""

_PLACE = r"\d{1,6}(?:\.\d{1,6}\.0)*"
_LEAF = re.compile(
    rf"({_PLACE})\.(?:(meta|hot_keys|hot_values|treatment)|pages\.(p\d{{1,9}}))", re.ASCII
)
"""Names of arrays: where the layer is, and which of its leaves."""
_CLASS = re.compile(rf"{_PLACE}\.\d{{1,6}}\.1", re.ASCII)
"""Likewise: of a nested cache's class."""


def save(path: str | os.PathLike[str], cache: PagedCache) -> None:
    """Write a safetensors file, one page in memory at a time, complete or not at all.

    Raises:
        OSError: if it cannot be written.
        ConfigError: if the path is that of something else than a file.
        ClosedError: if the cache is closed.
        CacheStateError: if a layer is not paged and its state is not made of arrays, or a call of
            the model is under way, or its weights are others than when it was wrapped.
    """
    for context in {id(layer._context): layer._context for layer in cache.paged_layers}.values():
        context.require_same_weights()
    signed: list[str] = []
    entries, metadata = _entries(cache, signed)

    def complete(header: dict[str, Any]) -> None:
        header["__metadata__"][_WHOLE] = _file_digest(header, signed)

    write_arrays(path, entries, metadata, complete)


def _file_digest(header: dict[str, Any], signed: list[str]) -> str:
    """The digest over a whole file: its header, and the digests of its layers' descriptions."""
    metadata = {**header["__metadata__"], _WHOLE: ""}
    return text_digest({**header, "__metadata__": metadata}, signed)


def _entries(cache: PagedCache, signed: list[str]) -> tuple[list[Entry], dict[str, str]]:
    """The file's arrays in order, each with a way to produce it, and the file's metadata.

    Names and metadata are those of mlx-lm's `save_prompt_cache`: per layer a class name, and for
    each leaf that is not an array its place and kind. Digests of the layers' descriptions are
    added to `signed` when these are produced.
    """
    entries: list[Entry] = []
    texts: list[str] = []
    metadata: dict[str, str] = {}
    for i, layer in enumerate(cache):
        metadata[f"1.{i}"] = type(layer).__name__
        entries += _layer_entries(f"{i}", layer, texts, signed)
    metadata[_WHOLE] = NO_DIGEST
    for n, name in enumerate(texts, 1):
        metadata[f"2.{n}.0"], metadata[f"2.{n}.1"] = name, "string"
    return entries, metadata


def _layer_entries(place: str, layer: Any, texts: list[str], signed: list[str]) -> Iterator[Entry]:
    """The arrays of a layer's cache; names of those that are texts are added to `texts`."""
    from pagedkv.sequence.layer import PagedLayerCache

    inner = inner_caches(layer)
    if inner is not None:  # as CacheList does it: each cache's state and the name of its class
        for i, cache in enumerate(inner):
            yield from _layer_entries(f"{place}.{i}.0", cache, texts, signed)
            texts.append(f"{place}.{i}.1")
            codes = _codes(type(cache).__name__)
            yield Entry(texts[-1], codes.dtype, codes.shape, partial(mx.array, codes))
        return
    if not isinstance(layer, PagedLayerCache):
        raise CacheStateError(
            f"the cache at {place} is a {type(layer).__name__}, which is not paged: save this "
            f"model's cache with mlx_lm.models.cache.save_prompt_cache"
        )
    _require_whole(layer)
    digests: dict[str, str] = {}

    def entry(
        name: str, dtype: mx.Dtype, shape: tuple[int, ...], produce: Callable[[], mx.array]
    ) -> Entry:
        digests[name] = NO_DIGEST  # it takes as much room as the one that is known later

        def produced() -> mx.array:
            array = mx.contiguous(produce())
            digests[name] = array_digest(name, array)
            return array

        leaf = f"pages.{name}" if name.startswith("p") else name
        return Entry(f"{place}.{leaf}", dtype, shape, produced)

    for name, array in _unpaged_arrays(layer):
        yield entry(name, array.dtype, array.shape, partial(mx.array, array))
    for number, (words, produce) in enumerate(_pages(layer)):
        yield entry(f"p{number}", mx.uint32, (words,), produce)
    meta = {**describe(layer), "digests": digests}

    def description() -> mx.array:
        signed.append(text_digest(meta))
        return _codes(_signed(meta))

    # Last, for it has the digests of the others.
    texts.append(f"{place}.meta")
    yield Entry(texts[-1], mx.int32, (len(_signed(meta)),), description)


def _pages(layer: PagedLayerCache) -> Iterator[tuple[int, Callable[[], mx.array]]]:
    """Of each page the words it has, and what produces it."""
    if layer._pager is None or layer._table is None:
        return
    produce = page_records(layer)
    for page, _ in layer.located_pages():
        words = layer.page_bytes(page.precision) // 4
        # The pages are written in this order, so one generator serves all of them.
        yield words, lambda: next(produce)


def _codes(text: str) -> mx.array:
    """A text as mlx-lm saves it, int32 ``[characters]``."""
    return mx.array([ord(c) for c in text], mx.int32)


def load_states(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The states of the streams in a file written by `save` (or by mlx-lm, for paged caches).

    Arrays are not read yet: each is a function that does it.

    Raises:
        CacheStateError: if the file is missing, damaged, or not a paged cache, or its layers do
            not belong together.
    """
    name = str(path)
    try:
        header, stored = read_arrays(name)
        told = header["__metadata__"][_WHOLE]
        states = _grouped(name, stored)
        for found in states:
            codes = np.asarray(found["meta"]()).tolist()
            found["meta"] = bytes(codes).decode("ascii")
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as e:
        if isinstance(e, PagedKVError):
            raise
        raise CacheStateError(f"{name!r} is not a saved cache: {e}") from e
    metas = [parse_meta(found) for found in states]
    if told != "" and told != _file_digest(header, [meta["digest"] for meta in metas]):
        raise CacheStateError(
            f"{name!r} is damaged, the digest over the whole is another than when it was saved: "
            f"use another copy of the file, or let the model read the prompt again"
        )
    first = next((meta for meta in metas if meta["offset"]), metas[0])
    for meta in metas:
        _require_alike(first, meta)
    if len(metas) != metas[0]["siblings"]:
        raise CacheStateError(
            f"{name!r} has {len(metas)} of the {metas[0]['siblings']} layers that were saved"
        )
    return states


def _grouped(path: str, stored: dict[str, StoredArray]) -> list[dict[str, Any]]:
    """The arrays of a file by stream, in the order of these.

    Raises:
        CacheStateError: if there are others.
    """
    states: dict[tuple[int, ...], dict[str, Any]] = defaultdict(dict)
    for name, array in stored.items():
        if match := _LEAF.fullmatch(name):
            place, leaf, page = match.groups()
            found = states[tuple(map(int, place.split(".")))]
            if leaf:
                found[leaf] = array
            else:
                found.setdefault("pages", {})[page] = array
        elif not _CLASS.fullmatch(name):
            states.clear()
            break
    if not states:
        raise CacheStateError(
            f"{path!r} holds no paged cache, or layers that are not paged: what mlx-lm saved, "
            f"mlx_lm.models.cache.load_prompt_cache loads"
        )
    return [states[place] for place in sorted(states)]

"""A cache as a tree of arrays and strings: what mlx-lm saves, and what `save` streams to a file.

Per layer: ``meta`` (JSON text), ``hot_keys``, ``hot_values``, ``treatment`` with the matrices if
there are any (uint32), and ``pages`` with one uint32 array per sealed page. The file is the
safetensors file that mlx-lm's `save_prompt_cache` would write.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from pagedkv.allocator import KVShape, PageGeometry, Precision
from pagedkv.config import ALIKE, TierConfig
from pagedkv.errors import CacheStateError, ConfigError, PagedKVError
from pagedkv.streams import inner_caches
from pagedkv.tiers import Pager, Run, Treatment

if TYPE_CHECKING:
    from pagedkv.cache import PagedCache
    from pagedkv.layer import PagedLayerCache

FORMAT = "pagedkv-2"
_SCALAR = re.compile(r"2\.\d+\.0")  # in mlx-lm's metadata: the name of a leaf that is no array
_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
_SAFETENSORS = {
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
    mx.uint32: "U32",
    mx.int32: "I32",
}


class CacheState(dict[str, Any]):
    """A layer's state, cheap to evaluate and complete to iterate.

    mlx-lm evaluates ``[c.state for c in cache]`` after every prefill chunk and flattens the same
    expression to save it. `mx.eval` looks at the stored items, which are the hot arrays alone;
    flattening calls `items`, which adds the pages, cold ones read from disk.
    """

    def __init__(self, cache: PagedLayerCache) -> None:
        super().__init__(zip(("hot_keys", "hot_values"), cache._hot.arrays, strict=False))
        self._cache = cache

    def items(self) -> Any:
        """The full state, pages included."""
        return full_state(self._cache).items()


def full_state(cache: PagedLayerCache) -> dict[str, Any]:
    """Everything a layer holds, with its pages in memory."""
    full: dict[str, Any] = {"meta": json.dumps(describe(cache))}
    if not cache.empty():
        full["hot_keys"], full["hot_values"] = cache._hot.view()
        if cache._pager and cache._pager.treatment:
            full["treatment"] = cache._pager.treatment.all_words
        pages = {f"p{i}": record for i, record in enumerate(page_records(cache))}
        if pages:
            full["pages"] = pages
    return full


def describe(cache: PagedLayerCache) -> dict[str, Any]:
    """What a layer's state means: settings, shape, and what each page is."""
    context = cache._context
    meta: dict[str, Any] = {
        "format": FORMAT,
        "layer": cache.layer,
        "layers": context.pager.layers,
        "offset": cache.offset,
        "fingerprint": context.fingerprint,
        "max_tokens": context.max_tokens,
        "sequence": context.sequence_id,
        "sink_tokens": cache.sink_tokens,
        "config": {**context.settled.to_dict(), "cold_dir": None},
    }
    if window := cache.window_state():
        meta["window"] = window
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

_loading: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""Contexts of caches being loaded by mlx-lm, which builds one layer at a time."""


def parse_meta(value: Any) -> dict[str, Any]:
    """The description in a saved layer state.

    Raises:
        CacheStateError: if it is not one of ours.
    """
    try:
        meta = json.loads(value["meta"])
        known = meta["format"] == FORMAT
    except (TypeError, KeyError, ValueError) as e:
        raise CacheStateError("this is not the state of a paged cache") from e
    if not known:
        raise CacheStateError(
            f"saved cache has format {meta['format']!r}, this version reads {FORMAT!r}"
        )
    return dict(meta)


def saved_config(meta: dict[str, Any]) -> TierConfig:
    """The settings with which a cache was saved; files from before have no such choices."""
    return TierConfig(**{"treatment": "none", "layer_kv": ALIKE, **meta["config"]})


def restore_into(cache: PagedLayerCache, value: Any) -> None:
    """Fill a blank layer cache from a state, with tiers of its own (shared by its file's layers).

    Raises:
        CacheStateError: if the state is damaged or not ours.
    """
    from pagedkv.context import SequenceContext

    if isinstance(value, CacheState):
        value = dict(value.items())
    meta = parse_meta(value)
    key = meta["sequence"]
    context = _loading.get(key)
    if context is None or any(c.layer == meta["layer"] for c in context.alive()):
        config = saved_config(meta)
        context = SequenceContext(config, Pager(config.budget(), meta["layers"]))
        context.fingerprint, context.max_tokens = meta["fingerprint"], meta["max_tokens"]
        _loading[key] = context
    try:
        if meta.get("offset") and (treatment := _treatment(meta, value)):
            context.pager.treatments[meta["layer"]] = treatment
        cache.start_from(context, meta)
    except (KeyError, TypeError) as e:
        raise CacheStateError(f"the saved state is not that of a {type(cache).__name__}") from e
    restore(cache, meta, value)


def restore(cache: PagedLayerCache, meta: dict[str, Any], value: Any) -> None:
    """Put saved tokens into an empty layer cache whose tiers exist.

    The pages are taken out of `value` one by one, so that no more than one is in memory.

    Raises:
        CacheStateError: if arrays are missing or have another shape than described.
    """
    if "shape" not in meta or not meta["offset"]:
        return
    try:
        shape = KVShape(*meta["shape"])
        dtype = _DTYPES[meta["dtype"]]
        cache.bind(shape, dtype)
        assert cache._pager is not None and cache._table is not None
        if cache._pager.page_tokens != meta["page_tokens"]:
            raise CacheStateError(
                f"saved pages hold {meta['page_tokens']} tokens and this cache's hold "
                f"{cache._pager.page_tokens}: load it with page_tokens={meta['page_tokens']}"
            )
        _require_precisions(cache, meta)
        _accept_treatment(cache, meta, _treatment(meta, value))
        cache.accept_window(meta.get("window", {}), int(meta["offset"]))
        if cache.sink_tokens != meta["sink_tokens"]:
            raise CacheStateError(
                f"the cache was saved with {meta['sink_tokens']} sink tokens and this one has "
                f"{cache.sink_tokens}: load it with the same sink_tokens"
            )
        for i, (name, position, tokens) in enumerate(meta["pages"]):
            precision = Precision.parse(name)
            # Taken out, for once it is read it has memory: the file may be larger than that.
            record = value["pages"].pop(f"p{i}")
            _require_shape(shape, meta["page_tokens"], precision, record)
            page = cache._pager.store(record[None], precision, position, cache._context.lineage)
            cache._table.append(page, tokens)
        cache._dtype = dtype
        cache._hot.load(value["hot_keys"].astype(dtype), value["hot_values"].astype(dtype))
        cache.offset = int(meta["offset"])
    except (KeyError, TypeError, ValueError) as e:
        if isinstance(e, PagedKVError):
            raise
        raise CacheStateError(
            f"the saved state of layer {meta.get('layer')} is damaged: {e}"
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
    if not (told := meta.get("treatment")):
        return None
    try:
        words = np.asarray(value["treatment"])
        return Treatment.restore(told, words, KVShape(*meta["shape"]), "saved with the cache")
    except (ConfigError, KeyError, TypeError, ValueError) as e:
        raise CacheStateError(
            f"the saved state of layer {meta.get('layer')} is damaged: {e}"
        ) from e


def _require_precisions(cache: PagedLayerCache, meta: dict[str, Any]) -> None:
    assert cache._pager is not None
    for i, (name, _, _) in enumerate(meta["pages"]):
        if (precision := Precision.parse(name)) not in cache._pager.precisions:
            raise CacheStateError(
                f"layer {cache.layer}: saved page {i} is {precision}, which the ladder "
                f"'{cache.ladder}' does not have: load it with the kv and layer_kv that it was "
                f"saved with"
            )


def _accept_treatment(
    cache: PagedLayerCache, meta: dict[str, Any], saved: Treatment | None
) -> None:
    """See that new pages are treated like those of a file.

    Raises:
        CacheStateError: if other pages are treated otherwise already.
    """
    pager = cache._pager
    assert pager is not None
    if not meta["pages"]:
        return
    if pager.chooser:
        pager.treat(saved)
    elif pager.treatment != saved:
        told = [f"{t.kind} {t.digest}" if t else "none" for t in (saved, pager.treatment)]
        raise CacheStateError(
            f"layer {cache.layer}: the saved pages' treatment is {told[0]} and this cache's "
            f"{told[1]}: load it before the wrapped model reads anything, or wrap it with the "
            f"treatment that the file was made with"
        )


def _require_shape(shape: KVShape, tokens: int, precision: Precision, record: mx.array) -> None:
    words = PageGeometry(shape, tokens, precision).page_bytes // 4
    if record.shape != (words,) or record.dtype != mx.uint32:
        raise CacheStateError(
            f"a {precision} page is uint32 [{words}], the file has {record.dtype} {record.shape}"
        )


# Files


def save(path: str | os.PathLike[str], cache: PagedCache) -> None:
    """Write a safetensors file, one page in memory at a time, complete or not at all.

    Raises:
        OSError: if it cannot be written.
        CacheStateError: if a layer is not paged and its state is not made of arrays.
    """
    target = Path(path)
    entries, metadata = _entries(cache)
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, dtype, shape, _ in entries:
        nbytes = int(np.prod(shape)) * dtype.size
        header[name] = {
            "dtype": _SAFETENSORS[dtype],
            "shape": list(shape),
            "data_offsets": [at, at + nbytes],
        }
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(struct.pack("<Q", len(text)))
            f.write(text)
            for _, _, _, produce in entries:
                f.write(_bytes(produce()))
            f.flush()
            os.fsync(f.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


Entry = tuple[str, mx.Dtype, tuple[int, ...], Callable[[], mx.array]]


def _entries(cache: PagedCache) -> tuple[list[Entry], dict[str, str]]:
    """The file's arrays in order, each with a way to produce it, and the file's metadata.

    Names and metadata are those of mlx-lm's `save_prompt_cache`: per layer a class name, and for
    each leaf that is not an array its place and kind.
    """
    entries: list[Entry] = []
    texts: list[str] = []
    metadata: dict[str, str] = {}
    for i, layer in enumerate(cache):
        metadata[f"1.{i}"] = type(layer).__name__
        entries += _layer_entries(f"{i}", layer, texts)
    metadata["2.0"] = ""
    for n, name in enumerate(texts, 1):
        metadata[f"2.{n}.0"], metadata[f"2.{n}.1"] = name, "string"
    return entries, metadata


def _layer_entries(place: str, layer: Any, texts: list[str]) -> Iterator[Entry]:
    """The arrays of a layer's cache; names of those that are texts are added to `texts`."""
    from pagedkv.layer import PagedLayerCache

    inner = inner_caches(layer)
    if inner is not None:  # as CacheList does it: each cache's state and the name of its class
        for i, cache in enumerate(inner):
            yield from _layer_entries(f"{place}.{i}.0", cache, texts)
            yield _text_entry(f"{place}.{i}.1", type(cache).__name__, texts)
        return
    if not isinstance(layer, PagedLayerCache):
        raise CacheStateError(
            f"the cache at {place} is a {type(layer).__name__}, which is not paged: save this "
            f"model's cache with mlx_lm.models.cache.save_prompt_cache"
        )
    yield _text_entry(f"{place}.meta", json.dumps(describe(layer)), texts)
    if layer.empty():
        return
    for name, array in zip(("hot_keys", "hot_values"), layer._hot.view(), strict=True):
        yield _entry(f"{place}.{name}", array)
    if layer._pager and layer._pager.treatment:
        yield _entry(f"{place}.treatment", layer._pager.treatment.all_words)
    yield from _page_entries(place, layer)


def _text_entry(name: str, text: str, texts: list[str]) -> Entry:
    texts.append(name)
    return _entry(name, mx.array([ord(c) for c in text]))


def _entry(name: str, array: mx.array) -> Entry:
    return name, array.dtype, tuple(array.shape), lambda: array


def _page_entries(place: str, layer: PagedLayerCache) -> Iterator[Entry]:
    assert layer._pager is not None and layer._table is not None
    produce = page_records(layer)
    for number, entry in enumerate(layer._table):
        precision = layer._pager.pages[entry.page].precision
        words = layer._pager.codecs[precision].geometry.page_bytes // 4
        # The pages are written in this order, so one generator serves all of them.
        yield f"{place}.pages.p{number}", mx.uint32, (words,), lambda: next(produce)


def _bytes(array: mx.array) -> bytes:
    plain = mx.contiguous(array)
    if plain.dtype == mx.bfloat16:
        plain = plain.view(mx.uint16)  # numpy has no bfloat16
    return np.asarray(plain).tobytes()


def load_states(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The states of the streams in a file written by `save` (or by mlx-lm, for paged caches).

    Arrays are lazy: each is read when it is used.

    Raises:
        CacheStateError: if the file is missing, damaged, or not a paged cache.
    """
    from mlx.utils import tree_unflatten

    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        for place in _text_leaves(metadata):
            arrays[place] = "".join(chr(c) for c in arrays[place].tolist())
        states = tree_unflatten(list(arrays.items()))
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as e:
        raise CacheStateError(f"{str(path)!r} is not a saved cache: {e}") from e
    flat = list(_stream_states(states)) if isinstance(states, list) else []
    if not flat or not all(isinstance(s, dict) for s in flat):
        raise CacheStateError(f"{str(path)!r} holds no paged cache")
    return flat


def _stream_states(states: list[Any]) -> Iterator[Any]:
    """Of lists of caches the states inside, without the names of their classes."""
    for layer in states:
        pairs = layer if isinstance(layer, list) else []
        if pairs and all(isinstance(p, list) and len(p) == 2 for p in pairs):
            yield from _stream_states([inner for inner, _ in pairs])
        else:
            yield layer


def _text_leaves(metadata: dict[str, str]) -> list[str]:
    """Names of the arrays that are really texts, by mlx-lm's list of leaves that are no arrays."""
    return [
        name
        for key, name in metadata.items()
        if _SCALAR.fullmatch(key) and metadata.get(f"{key[:-1]}1") == "string"
    ]


def new_sequence_id() -> str:
    """A name for a sequence that no other has."""
    return secrets.token_hex(8)

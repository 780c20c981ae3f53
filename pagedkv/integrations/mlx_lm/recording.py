"""What queries, keys and values are like while a model reads a text.

The model reads it with the caches that mlx-lm gives it. The arrays that those hand to attention are
tagged, as those of paged layers are, so that its queries pass by here (see `pagedkv.hook`): no
model is known by name, and layers that are not paged are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from pagedkv.allocator import KVShape
from pagedkv.attn.driver import KVView, stock_attention
from pagedkv.cache import sdpa_hook as hook
from pagedkv.cache.nested import streams
from pagedkv.calibration.moments import Covariances
from pagedkv.errors import ConfigError
from pagedkv.integrations.mlx_lm.model_info import pipeline_size, require_model, stock_maker
from pagedkv.tiers import HotTokens

CHUNK = 256
"""Tokens per call of the model: whole groups, as `FIRST` are."""

AT_ONCE = 64
"""Queries of a call, at most, whose attention is looked at, where there are many calls."""


def measure(
    model: Any,
    texts: Sequence[Sequence[int]],
    watch: Callable[[int, int], None] | None = None,
    found: dict[int, Stream] | None = None,
    at_once: int = AT_ONCE,
    kind: type[Stream] | None = None,
) -> dict[int, Stream]:
    """What the streams of a model are like that reads texts, by their numbers.

    Args:
        model: of mlx-lm.
        texts: ids, each read from empty caches.
        watch: called with tokens read, and all there are, if given.
        found: where streams are put as soon as they are there, for `watch` to look at.
        at_once: queries of a call, at most, whose attention is looked at.
        kind: of what is noted; `Stream` if None.

    Raises:
        ConfigError: if this is no such model, no layer's queries were seen, or other processes
            have some of its layers: they would have to read along.
    """
    require_readable(model)
    make, done, total = stock_maker(model), 0, sum(len(text) for text in texts)
    from pagedkv.integrations.mlx_lm.caches import paged_kind  # there is mlx-lm

    found = {} if found is None else found
    hook.install()
    recorders: list[_Recorder] = []
    try:
        for text in texts:
            caches = make()
            recorders = [
                _Recorder(cache, found.setdefault(i, (kind or Stream)()), at_once)
                for i, cache in enumerate(streams(caches))
                if paged_kind(cache)
            ]
            for start in range(0, len(text), CHUNK):
                ids = mx.array(list(text[start : start + CHUNK]))[None]
                out = model(ids, cache=caches)
                mx.eval([r.taken for r in recorders] or out)
                for recorder in recorders:
                    recorder.let_go()
                done += int(ids.size)
                if watch is not None:
                    watch(done, total)
            while recorders:
                recorders.pop().leave()
    finally:
        for recorder in recorders:
            recorder.leave()
        hook.uninstall()
    found = {number: stream for number, stream in found.items() if stream.shape is not None}
    if not found:
        raise ConfigError(
            f"no queries of {type(model).__name__} were seen: its layers compute attention by "
            f"themselves, or cache no keys, and cannot be calibrated"
        )
    return found


def require_readable(model: Any) -> None:
    """Check that a model can read by itself.

    Raises:
        ConfigError: if this is no model, or other processes have some of its layers: they would
            have to read along.
    """
    require_model(model)
    if (parts := pipeline_size(model)) > 1:
        raise ConfigError(
            f"the layers of {type(model).__name__} are in {parts} processes, and cannot be "
            f"measured there: calibrate the model in one process"
        )


@dataclass
class Stream:
    """What was seen of one stream.

    Attributes:
        seen: its queries, keys and values.
        shape: what it caches; None as long as no query was seen.
    """

    seen: Covariances = field(default_factory=Covariances)
    shape: KVShape | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be computed some time."""
        return self.seen.arrays

    def add_tokens(self, keys: mx.array, values: mx.array, position: int) -> None:
        """Note tokens, the first at this position: ``[1, kv_heads, tokens, dim]``."""
        self.seen.add_keys(keys, position)
        self.seen.add_values(values, position)

    def add_call(self, call: AttentionCall, position: int, at_once: int) -> None:
        """Note queries, the first at this position, and how they attend."""
        q, keys, values, scale, sinks = call.q, call.keys, call.values, call.scale, call.sinks
        self.seen.add_queries(q, keys, values, position, scale, sinks, at_once)


@dataclass(frozen=True)
class AttentionCall:
    """What a layer asked attention for.

    Attributes:
        q: queries, ``[1, query_heads, tokens, key_dim]``.
        keys: of all tokens that the cache holds, the last of these at the end, ``[1, kv_heads,
            held, key_dim]``.
        values: likewise.
        scale: of scores.
        mask: what the layer gave for one.
        sinks: scores of nothing, one per query head, where a model has them.
    """

    q: mx.array
    keys: mx.array
    values: mx.array
    scale: float
    mask: mx.array | str | None
    sinks: mx.array | None


@dataclass
class LastCall(Stream):
    """The last call of one stream, as it is: for whoever wants to attend otherwise.

    Attributes:
        call: None as long as no query was seen.
    """

    call: AttentionCall | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """The queries; keys and values are computed with those that the cache holds."""
        return [] if self.call is None else [self.call.q]

    def add_tokens(self, keys: mx.array, values: mx.array, position: int) -> None:
        """Nothing: the call has them."""

    def add_call(self, call: AttentionCall, position: int, at_once: int) -> None:
        """Note the call in place of the one before."""
        self.call = call


class _Recorder:
    """Stands behind one stock cache and notes what passes; the cache does its work as ever."""

    def __init__(self, cache: Any, stream: Stream, at_once: int) -> None:
        self._cache, self._fetch = cache, cache.update_and_fetch
        self._stream, self._at_once = stream, at_once
        cache.update_and_fetch = self._update_and_fetch  # of this one object, not of its class
        self._tokens = 0
        self._stored: tuple[mx.array, mx.array] | None = None

    @property
    def taken(self) -> list[mx.array]:
        """What has to be computed: sums so far, and what the cache holds now."""
        return [*self._stream.arrays, *(self._stored or ())]

    def let_go(self) -> None:
        """A call of the model is computed."""
        self._stored = None

    def leave(self) -> None:
        """The cache is as it was: what refers to itself would stay until somebody looks."""
        self.let_go()
        del self._cache.update_and_fetch

    def _update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        fetched = self._fetch(keys, values)
        if not values.shape[3]:  # an index of keys: nobody attends to it
            return fetched
        self._stream.add_tokens(keys, values, self._tokens)
        self._tokens += int(keys.shape[2])
        all_keys, all_values = self._stored = fetched
        held = int(all_keys.shape[2])
        view = KVView(None, (), HotTokens(all_keys, all_values, held, held), 0)
        return hook.tag_pair(self, view, all_keys, all_values)

    def attend_tagged(
        self,
        view: KVView,
        q: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """MLX's own attention; the queries are noted."""
        keys, values, stream = view.keys, view.values, self._stream
        stream.shape = KVShape(int(keys.shape[1]), int(keys.shape[3]), int(values.shape[3]))
        at = self._tokens - int(q.shape[2])
        stream.add_call(AttentionCall(q, keys, values, scale, mask, sinks), at, self._at_once)
        return stock_attention(q, keys, values, scale=scale, mask=mask, sinks=sinks)

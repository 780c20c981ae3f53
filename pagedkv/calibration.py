"""Treatments from a user's own text: what queries, keys and values are like where they are used.

The model reads the text with the caches that mlx-lm gives it. The arrays that those hand to
attention are tagged, as those of paged layers are, so that its queries pass by here (see
`pagedkv.hook`): no model is known by name, and layers that are not paged are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from pagedkv import hook
from pagedkv.allocator import KVShape
from pagedkv.attention import KVView, stock_attention
from pagedkv.balance import turns_of
from pagedkv.calibration_file import Calibration
from pagedkv.covariances import Covariances
from pagedkv.errors import ConfigError
from pagedkv.layer_weights import LayerWeights
from pagedkv.models import fingerprint, require_model, stock_maker
from pagedkv.streams import inner_caches, streams
from pagedkv.tiers import HotTokens, Treatment
from pagedkv.treatments import balanced, rope_of

LEAST = 256
"""Tokens of a text."""

CHUNK = 256
"""Tokens per call of the model: whole groups, as `FIRST` are."""

AT_ONCE = 64
"""Queries of a call, at most, whose attention is looked at: there are many calls."""

Tokens = mx.array | Sequence[int] | Sequence[Sequence[int]]


def calibrate(
    model: Any, tokens: Tokens, *, watch: Callable[[int, int], None] | None = None
) -> Calibration:
    """Measure, on text, how channels should be mixed before they are quantized.

    Save the result, and give the file to `TierConfig.treatment` (or ``--treatment``). Some
    thousand tokens of what the model will read do; 16-bit caches of them must fit into memory.

    Args:
        model: an mlx-lm model that `wrap` takes, wrapped or not.
        tokens: ids of a text, 256 at least, or of several texts.
        watch: called with tokens read, and all there are.

    Returns:
        Per layer the treatment. Layers that compute attention by themselves have none.

    Raises:
        ConfigError: if this is no such model, a text is too short, no layer could be measured, or
            numbers are not finite.
    """
    texts = _texts(tokens)
    seen = measure(model, texts, watch or (lambda done, total: None))
    nested = any(inner_caches(cache) is not None for cache in stock_maker(model)())
    layers = () if nested else model.layers  # streams and layers have the same numbers then
    chosen = {
        number: _treatment(stream, layers[number] if number < len(layers) else None, number)
        for number, stream in seen.items()
    }
    total = sum(len(text) for text in texts)
    return Calibration(fingerprint(model), total, chosen)


def _treatment(stream: Stream, layer: Any, number: int) -> Treatment:
    assert stream.shape is not None
    seen, shape = stream.seen, stream.shape
    if not all(np.isfinite(x).all() for x in (seen.queries, seen.keys, seen.values)):
        raise ConfigError(f"layer {number}: queries, keys or values are not finite")
    weights = LayerWeights.of(layer, shape, seen.asks)
    try:
        turns = turns_of(None if layer is None else rope_of(layer), shape.key_dim)
    except (TypeError, ValueError):
        turns = []  # what was read is long enough to show it
    try:
        return balanced(shape, seen, turns, weights)
    except ValueError as e:
        raise ConfigError(f"layer {number} cannot be calibrated: {e}") from e


def _texts(tokens: Tokens) -> list[list[int]]:
    """Texts as lists of ids.

    Raises:
        ConfigError: if they are none, or too short.
    """
    given: Any = tokens.tolist() if isinstance(tokens, mx.array) else list(tokens)
    several = bool(given) and all(isinstance(text, (list, tuple)) for text in given)
    texts: list[list[int]] = [list(text) for text in given] if several else [given]
    for text in texts:
        if not all(isinstance(n, (int, np.integer)) and n >= 0 for n in text):
            raise ConfigError("calibrate() needs ids of tokens, or lists of them, one per text")
        if len(text) < LEAST:
            raise ConfigError(
                f"a text of {len(text)} tokens says too little: calibrate with {LEAST} at least, "
                f"better some thousand"
            )
    return texts


def measure(
    model: Any, texts: Sequence[Sequence[int]], watch: Callable[[int, int], None]
) -> dict[int, Stream]:
    """What the streams of a model are like that reads texts, by their numbers.

    Args:
        model: of mlx-lm.
        texts: ids, each read from empty caches.
        watch: see `calibrate`.

    Raises:
        ConfigError: see `calibrate`.
    """
    require_model(model)
    make, done, total = stock_maker(model), 0, sum(len(text) for text in texts)
    from pagedkv.mlx_lm_cache import paged_kind  # there is mlx-lm

    found: dict[int, Stream] = {}
    hook.install()
    try:
        for text in texts:
            caches = make()
            recorders = [
                _Recorder(cache, found.setdefault(i, Stream()))
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
                watch(done, total)
    finally:
        hook.uninstall()
    found = {number: stream for number, stream in found.items() if stream.shape is not None}
    if not found:
        raise ConfigError(
            f"no queries of {type(model).__name__} were seen: its layers compute attention by "
            f"themselves, or cache no keys, and cannot be calibrated"
        )
    return found


@dataclass
class Stream:
    """What was seen of one stream.

    Attributes:
        seen: its queries, keys and values.
        shape: what it caches; None as long as no query was seen.
    """

    seen: Covariances = field(default_factory=Covariances)
    shape: KVShape | None = None


class _Recorder:
    """Stands behind one stock cache and notes what passes; the cache does its work as ever."""

    def __init__(self, cache: Any, stream: Stream) -> None:
        self._fetch, self._stream = cache.update_and_fetch, stream
        cache.update_and_fetch = self._update_and_fetch  # of this one object, not of its class
        self._tokens = 0
        self._stored: tuple[mx.array, mx.array] | None = None

    @property
    def taken(self) -> list[mx.array]:
        """What has to be computed: sums so far, and what the cache holds now."""
        return [*self._stream.seen.arrays, *(self._stored or ())]

    def let_go(self) -> None:
        """A call of the model is computed."""
        self._stored = None

    def _update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        fetched = self._fetch(keys, values)
        if not values.shape[3]:  # an index of keys: nobody attends to it
            return fetched
        self._stream.seen.add_keys(keys, self._tokens)
        self._stream.seen.add_values(values, self._tokens)
        self._tokens += int(keys.shape[2])
        all_keys, all_values = self._stored = fetched
        held = int(all_keys.shape[2])
        view = KVView(None, (), HotTokens(all_keys, all_values, held, held), 0)
        return hook.tag_pair(self, view, all_keys, all_values, placeholder=False)

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
        stream.seen.add_queries(q, keys, values, at, scale, sinks, AT_ONCE)
        return stock_attention(q, keys, values, scale=scale, mask=mask, sinks=sinks)

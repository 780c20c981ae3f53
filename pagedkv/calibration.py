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
import numpy.typing as npt

from pagedkv import hook
from pagedkv.allocator import KVShape
from pagedkv.allocator.precision import GROUP_TOKENS
from pagedkv.attention import KVView, stock_attention
from pagedkv.calibration_file import Calibration
from pagedkv.errors import ConfigError
from pagedkv.models import fingerprint, require_model, stock_maker
from pagedkv.streams import inner_caches, streams
from pagedkv.tiers import HotTokens, Treatment
from pagedkv.tiers.treatment import scale_steps
from pagedkv.treatments import Spread, output_spread, paired

FIRST = 64
"""Tokens at the beginning that are not looked at: sinks are in 16 bit, and unlike all others."""

LEAST = 256
"""Tokens of a text."""

CHUNK = 256
"""Tokens per call of the model: whole groups."""

Floats = npt.NDArray[np.float64]
Tokens = mx.array | Sequence[int] | Sequence[Sequence[int]]


def calibrate(
    model: Any, tokens: Tokens, *, watch: Callable[[int, int], None] | None = None
) -> Calibration:
    """Measure, on text, by how much channels should be scaled before they are quantized.

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
    spreads = measure(model, texts, watch or (lambda done, total: None))
    chosen = {number: _treatment(spread, shape) for number, (spread, shape) in spreads.items()}
    total = sum(len(text) for text in texts)
    return Calibration(fingerprint(model), total, chosen)


def _treatment(spread: Spread, shape: KVShape) -> Treatment:
    # Least squares of the scores would be the root of queries over keys, but the largest keys are
    # those that are attended: halfway to queries alone was best (docs/fidelity.md).
    keys = np.sqrt(spread.queries) / spread.keys**0.25
    values = np.sqrt(spread.outputs / spread.values)
    steps = [tuple(scale_steps(head) for head in scales) for scales in (keys, values)]
    return Treatment("hadamard", 0, steps[0], steps[1], shape)


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
) -> dict[int, tuple[Spread, KVShape]]:
    """Spreads of the streams of a model that reads texts, and what the streams cache.

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

    seen: dict[int, _Sums] = {}
    nested = False
    hook.install()
    try:
        for text in texts:
            caches = make()
            nested = any(inner_caches(cache) is not None for cache in caches)
            recorders = {
                i: _Recorder(cache, seen.setdefault(i, _Sums()))
                for i, cache in enumerate(streams(caches))
                if paged_kind(cache)
            }
            for start in range(0, len(text), CHUNK):
                ids = mx.array(list(text[start : start + CHUNK]))[None]
                out = model(ids, cache=caches)
                mx.eval([r.taken for r in recorders.values()] or out)
                for recorder in recorders.values():
                    recorder.add()
                done += int(ids.size)
                watch(done, total)
    finally:
        hook.uninstall()
    layers = () if nested else model.layers  # streams and layers have the same numbers then
    found = {}
    for number, sums in seen.items():
        if (shape := sums.shape) is not None:
            layer = layers[number] if number < len(layers) else None
            found[number] = _spread(sums, shape, layer, number), shape
    if not found:
        raise ConfigError(
            f"no queries of {type(model).__name__} were seen: its layers compute attention by "
            f"themselves, or cache no keys, and cannot be calibrated"
        )
    return found


def _spread(sums: _Sums, shape: KVShape, layer: Any, number: int) -> Spread:
    queries, keys, values = (sums.rms(name) for name in ("queries", "keys", "values"))
    if not all(np.isfinite(x).all() for x in (queries, keys, values)):
        raise ConfigError(f"layer {number}: queries, keys or values are not finite")
    outputs = None if layer is None else output_spread(layer, shape, sums.query_heads)
    if outputs is None:  # not known: all channels count alike
        outputs = np.ones_like(values)
    if layer is not None:
        queries, keys = paired(layer, queries), paired(layer, keys)
    return Spread(queries, keys, values, outputs)


@dataclass
class _Sums:
    """What was seen of one stream.

    Attributes:
        shape: what it caches; None as long as no query was seen.
        query_heads: that read it.
        squares: sums of squares per KV head and channel, by name.
        counts: how many numbers are in each, by name.
    """

    shape: KVShape | None = None
    query_heads: int = 0
    squares: dict[str, Floats] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, squares: mx.array, count: int) -> None:
        """Count some more numbers in."""
        self.squares[name] = self.squares.get(name, 0.0) + np.array(squares, np.float64)
        self.counts[name] = self.counts.get(name, 0) + count

    def rms(self, name: str) -> Floats:
        """Root mean squares, ``[kv_heads, channels]``; never zero."""
        means = self.squares[name] / self.counts[name]
        return np.asarray(np.sqrt(np.maximum(means, 1e-12)))


class _Recorder:
    """Stands behind one stock cache and notes what passes; the cache does its work as ever."""

    def __init__(self, cache: Any, sums: _Sums) -> None:
        self._fetch, self._sums = cache.update_and_fetch, sums
        cache.update_and_fetch = self._update_and_fetch  # of this one object, not of its class
        self._tokens = 0
        self._new = 0
        self._noted: list[tuple[str, mx.array, int]] = []
        self._stored: tuple[mx.array, mx.array] | None = None

    @property
    def taken(self) -> list[mx.array]:
        """What has to be computed before `add`: this call's sums, and what the cache holds now."""
        return [*(sums for _, sums, _ in self._noted), *(self._stored or ())]

    def add(self) -> None:
        """Count a call of the model in, now that it is computed."""
        for name, sums, count in self._noted:
            self._sums.add(name, sums, count)
        self._noted, self._stored = [], None

    def _update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        fetched = self._fetch(keys, values)
        if not values.shape[3]:  # an index of keys: nobody attends to it
            return fetched
        self._new = int(keys.shape[2])
        skipped = self._skipped(self._new)
        self._tokens += self._new
        # Tokens whose keys share a scale and a bias: a mean over them costs nothing.
        whole = (self._new - skipped) // GROUP_TOKENS * GROUP_TOKENS
        if whole:
            heads, dim = int(keys.shape[1]), int(keys.shape[3])
            k = keys[0, :, skipped : skipped + whole].astype(mx.float32)
            k = k.reshape(heads, -1, GROUP_TOKENS, dim)
            k = k - k.mean(axis=2, keepdims=True)
            self._note("keys", k.reshape(heads, -1, dim))
        self._note("values", values[0, :, skipped:])
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
        keys, values = view.keys, view.values
        heads = int(keys.shape[1])
        self._sums.shape = KVShape(heads, int(keys.shape[3]), int(values.shape[3]))
        self._sums.query_heads = int(q.shape[1])
        after = self._tokens - int(q.shape[2])
        rows = q[0, :, max(0, FIRST - after) :]
        self._note("queries", rows.reshape(heads, -1, rows.shape[2]))
        return stock_attention(q, keys, values, scale=scale, mask=mask, sinks=sinks)

    def _skipped(self, new: int) -> int:
        return min(new, max(0, FIRST - self._tokens))

    def _note(self, name: str, rows: mx.array) -> None:
        """Note ``[kv_heads, rows, channels]``."""
        if rows.shape[1]:
            squares = mx.square(rows.astype(mx.float32)).sum(axis=1)
            self._noted.append((name, squares, int(rows.shape[1])))

"""Treatments from a user's own text: what queries, keys and values are like where they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from pagedkv.cache.nested import inner_caches
from pagedkv.calibration.equalization import turns_of
from pagedkv.calibration.file import Calibration
from pagedkv.calibration.layer_weights import LayerWeights
from pagedkv.calibration.treatment_rules import balanced, rope_of
from pagedkv.errors import ConfigError
from pagedkv.integrations.mlx_lm.model_info import fingerprint, stock_maker
from pagedkv.integrations.mlx_lm.recording import Stream, measure
from pagedkv.tiers import Treatment

LEAST = 256
"""Tokens of a text."""

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
    seen = measure(model, texts, watch)
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

"""Matrices for a layer's keys and values, by the rules that are known; which is best, a race tells.

A rotation spreads rounding errors evenly over a head's channels. That pays where the error of every
channel matters alike, and ruins models whose queries make little of channels that are large (the
keys of Qwen2.5, by their biases). So channels are balanced first, by queries, keys and values that
were seen. By what weights say alone they can be scaled: values by the square root of what the
output projection makes of them over their spread, keys by the square root of how much queries make
of a channel, less where a key channel is an outlier of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.allocator import KVShape
from pagedkv.calibration.equalization import Turn, balanced_keys, balanced_values
from pagedkv.calibration.layer_weights import LayerWeights, Spread
from pagedkv.calibration.moments import Covariances
from pagedkv.tiers import Treatment

QUIETEST, QUIETEST_KEY = 1 / 4, 1 / 32
"""What a value or key channel spreads at least, as a part of what the weights let expect beside
others. Of keys less: what the weights take for spread may be constant within groups."""

OUTLIER = 4.0
"""Key channels that spread beyond so many times the median are scaled down, see `scaled`."""

Floats = npt.NDArray[np.float64]


def balanced(
    shape: KVShape,
    seen: Covariances,
    turns: Sequence[Turn] | None,
    weights: LayerWeights,
    values: bool = True,
) -> Treatment:
    """Keys and values balanced by what was seen.

    Args:
        shape: of the layer.
        seen: queries, keys and values.
        turns: by the layer's rotary embedding; None to leave keys as they are.
        weights: of the layer.
        values: whether they are to be treated.

    Raises:
        ValueError: if numbers are not finite, or float16 does not hold the matrices (ConfigError).
    """
    spread = weights.spread
    q = key_gains = o = value_gains = None
    if turns is not None:
        keys = seen.keys
        if spread is not None:
            keys = _not_quieter(keys, spread.keys, QUIETEST_KEY)
        q, key_gains = balanced_keys(seen.queries, keys, turns)
    if values:
        moments = seen.values
        if spread is not None:
            moments = _not_quieter(moments, spread.values, QUIETEST)
        alike = np.broadcast_to(np.eye(shape.value_dim), moments.shape)
        outputs = alike if weights.outputs is None else weights.outputs
        o, value_gains = balanced_values(moments, outputs)
    what = f"keys balanced over {seen.query_tokens:,} tokens"
    if turns is None:
        what = f"balanced over {seen.value_tokens:,} tokens"
    return Treatment.of(shape, q, o, key_gains, "balanced and rotated", what, value_gains)


def _not_quieter(moments: Floats, expected: Floats, part: float) -> Floats:
    """Second moments of channels, none much less than the weights let expect.

    All that is to come is treated alike: a channel that happens to be silent in the first tokens
    would drown all others when it speaks.

    Args:
        moments: seen, ``[kv_heads, dim, dim]``.
        expected: root mean squares, ``[kv_heads, dim]``, up to a factor of each head.
        part: of that, which is the least.
    """
    diagonal = np.einsum("hii->hi", moments)
    size = np.median(diagonal / np.square(expected), axis=1, keepdims=True)
    least = size * np.square(part * expected)
    more = np.maximum(least - diagonal, 0)
    return np.asarray(moments + more[..., None] * np.eye(moments.shape[-1]))


def rope_of(layer: Any) -> Any:
    """The rotary embedding of a layer's keys; None if it has none by that name.

    Latent attention turns some channels at the end of a key, and does not say which.
    """
    attention = next((m for m in layer.children().values() if hasattr(m, "rope")), None)
    return None if hasattr(attention, "qk_rope_head_dim") else getattr(attention, "rope", None)


def is_latent(layer: Any) -> bool:
    """Whether attention computes keys and values from what is cached, in a way of its own."""
    return any(hasattr(m, "qk_rope_head_dim") for m in layer.children().values())


def scaled(spread: Spread, shape: KVShape) -> Treatment:
    """Channels scaled by what they matter, then rotated.

    Args:
        spread: of the layer.
        shape: of the layer.
    """
    excess = spread.keys / np.median(spread.keys, axis=1, keepdims=True)
    # Errors are balanced where a channel is divided by all of its excess. Ordinary channels do
    # better undivided (`docs/design.md`), so that begins at OUTLIER and is whole at its square.
    divisors = np.clip((excess / OUTLIER) ** 2, 1.0, np.maximum(1.0, excess))
    keys = np.sqrt(spread.queries / divisors)
    values = np.sqrt(spread.outputs / spread.values)
    reason = f"largest key channel {spread.outlier:.1f} times the median"
    return Treatment.scaled(shape, keys, values, reason=reason)

"""Which treatment a model's keys and values get, unless the user calibrated it.

A rotation spreads rounding errors evenly over a head's channels. That pays where the error of every
channel matters alike, and ruins models whose queries make little of channels that are large (the
keys of Qwen2.5, by their biases). So channels are balanced first. How is decided when a layer's
first page is to be sealed, from the queries and keys of the tokens until then (`FirstTokens`).

What is known before that is what the weights say: random signs are put through the layer's norm and
projections. Where queries cannot be seen, or too few tokens, channels are scaled by it: values by
the square root of what the output projection makes of them over their spread, keys by the square
root of how much queries make of a channel, less where a key channel is an outlier of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import KVShape, LayerLadders
from pagedkv.attention import DECODE_TOKENS
from pagedkv.balance import Turn, balanced_keys, balanced_values, turns_of
from pagedkv.calibration_file import Calibration, digest_of
from pagedkv.config import TierConfig, names_file
from pagedkv.covariances import FIRST, Covariances
from pagedkv.layer_weights import LayerWeights, Spread, Spreads, output_products
from pagedkv.tiers import Treatment
from pagedkv.tiers.treatment import treated_parts

LEAST, ENOUGH = 128, 2048
"""Tokens whose queries and keys must be seen to balance keys by them, or to tell how they attend;
more than enough of them."""

QUIETEST, QUIETEST_KEY = 1 / 4, 1 / 32
"""What a value or key channel spreads at least, as a part of what the weights let expect beside
others. Of keys less: what the weights take for spread may be constant within groups."""

EVERY = 4
"""Of tokens that are generated, the query of one in so many is looked at."""

OUTLIER = 4.0
"""Key channels that spread beyond so many times the median are scaled down, see `scaled`."""

Floats = npt.NDArray[np.float64]


def choose_treatments(
    model: Any,
    config: TierConfig,
    shapes: Mapping[int, KVShape],
    fingerprint: str = "",
    spreads: Spreads | None = None,
    ladders: LayerLadders | None = None,
) -> dict[int, Treatment]:
    """The treatments of a model's layers.

    Args:
        model: with ``layers``.
        config: says which precisions pages have, and may name a rotation for all, or a file.
        shapes: by layer number, what layers cache, as far as it is known.
        fingerprint: of the model, which a file must have.
        spreads: of the model, where they are asked for again.
        ladders: of its layers; as the configuration says if None.

    Returns:
        By layer number; layers that are left as they are do not occur.

    Raises:
        ConfigError: if there is no such file, or it is damaged or of another model.
    """
    ladders = ladders or config.ladders
    if names_file(config.treatment):  # read where nothing is treated, too: it may be damaged
        calibration = Calibration.load(config.treatment)
        calibration.require(fingerprint, shapes, config.treatment)
        parts = {number: _parts(config, ladders, number) for number in calibration}
        return {n: t.only(*parts[n]) for n, t in calibration.items() if any(parts[n])}
    chosen, spreads = {}, spreads or Spreads(model, shapes)
    for number, shape in shapes.items():
        keys, values = _parts(config, ladders, number)
        if not (keys or values):
            continue
        if config.treatment == "auto":
            spread = spreads.of(number)
            treatment = scaled(spread, shape) if spread is not None else None
        else:
            treatment = Treatment.plain(shape, config.treatment)
        if treatment is not None:
            chosen[number] = treatment.only(keys, values)
    return chosen


def _parts(config: TierConfig, ladders: LayerLadders, number: int) -> tuple[bool, bool]:
    """Whether a layer's keys are treated, and whether its values are."""
    precisions = ladders.of(number).beyond(config.hot_tokens)
    return treated_parts(precisions, config.treatment)


def name_of(config: TierConfig, treatments: Mapping[int, Treatment], chosen_later: bool) -> str:
    """What a store's identity says of treatments; empty if there are none.

    The matrices themselves are kept in the store: they are not the same on every machine.

    Args:
        config: says which treatment is wanted.
        treatments: of the layers; those of a file name it.
        chosen_later: whether there are others to come.
    """
    if not names_file(config.treatment):
        return config.treatment if treatments or chosen_later else ""
    return digest_of(treatments) if treatments else ""


def choosers_for(
    model: Any,
    config: TierConfig,
    shapes: Mapping[int, KVShape],
    treatments: Mapping[int, Treatment],
    spreads: Spreads,
    ladders: LayerLadders | None = None,
) -> dict[int, FirstTokens]:
    """Who decides on layers when their first pages are sealed.

    Args:
        model: with ``layers``.
        config: says which treatment is wanted.
        shapes: by layer number, what layers cache, as far as it is known.
        treatments: of layers, by their weights.
        spreads: of the model.
        ladders: of its layers; as the configuration says if None.

    Returns:
        By layer number; where nobody does, `treatments` are final.
    """
    found: dict[int, FirstTokens] = {}
    for number, shape in shapes.items() if config.treatment == "auto" else ():
        keys, values = _parts(config, ladders or config.ladders, number)
        # A model may go through its layers several times.
        if not (keys or values) or number >= len(model.layers):
            continue
        layer = model.layers[number]
        with suppress(Exception):  # whatever an unknown layer raises, its weights decide
            # Without it nobody knows what becomes of keys farther away.
            if rope_of(layer) is not None or not (keys or _is_latent(layer)):
                known, spread = treatments.get(number), spreads.of(number)
                found[number] = FirstTokens(layer, shape, known, spread, keys, values)
    return found


class FirstTokens:
    """Balances a layer's keys and values by the first tokens that it reads.

    Nothing is gained by waiting for more: some hundred tokens of any text do nearly as well as all
    of this one (`docs/design.md`).

    Attributes:
        shape: of the layer.
        keys: whether keys are to be treated.
    """

    def __init__(
        self,
        layer: Any,
        shape: KVShape,
        known: Treatment | None,
        spread: Spread | None,
        keys: bool,
        values: bool,
    ) -> None:
        """Nothing is seen yet.

        Args:
            layer: of the model.
            shape: what it caches.
            known: what its weights say: used if too few tokens are seen; None if they say nothing.
            spread: of its channels by its weights, likewise.
            keys: whether keys are to be treated.
            values: whether values are.
        """
        self.shape = shape
        self._layer = weakref.ref(layer)  # caches that outlive their model do not keep it
        self.keys, self._known, self._values, self._spread = keys, known, values, spread
        self._seen, self._blind = Covariances(), False

    def wants(self, tokens: int, position: int) -> bool:
        """See `Chooser.wants`. Where a prompt has shown enough, what follows is let pass."""
        seen = self._seen.query_tokens
        if tokens > DECODE_TOKENS:
            return seen < ENOUGH and not self._blind
        due = (position + tokens - 1) // EVERY > (position - 1) // EVERY
        return due and seen < LEAST and not self._blind

    def see(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        position: int,
        scale: float,
        sinks: mx.array | None,
    ) -> None:
        """See `Chooser.see`."""
        # Of a step: started when the next is noted, for its graph stays one.
        mx.async_eval(self._seen.arrays)  # type: ignore[no-untyped-call]
        if (beyond := int(queries.shape[2]) - ENOUGH) > 0:
            queries, keys, values = (x[:, :, :-beyond] for x in (queries, keys, values))
        try:
            self._seen.add_queries(queries, keys, values, position, scale, sinks)
        except Exception:  # whatever an unknown layer asks with, its weights decide
            self._seen, self._blind = Covariances(), True
        # A chunk's queries are not kept until somebody asks, nor what a last step attended to.
        if queries.shape[2] > DECODE_TOKENS or self._seen.query_tokens >= LEAST:
            mx.async_eval(self._seen.arrays)  # type: ignore[no-untyped-call]

    def told(self) -> dict[str, Any] | None:
        """See `Chooser.told`."""
        return self._seen.to_dict() if self._seen.query_tokens else None

    def recall(self, told: dict[str, Any]) -> None:
        """See `Chooser.recall`."""
        with suppress(KeyError, TypeError, ValueError, OverflowError):
            self._seen.recall(told, self.shape)

    def choose(self, keys: mx.array, values: mx.array) -> Treatment | None:
        """See `Chooser.choose`."""
        seen, known, layer = self._seen, self._known, self._layer()
        seen.add_keys(keys[:, :, : FIRST + ENOUGH], 0)
        least = LEAST if self.keys else 1  # where values spread is seen without
        if layer is None or seen.query_tokens < least or seen.key_tokens < LEAST:
            return known
        if seen.query_tokens < LEAST:
            seen.forget_attention()
        try:
            turns = turns_of(rope_of(layer), self.shape.key_dim) if self.keys else None
            if self._values:
                seen.add_values(values[:, :, : FIRST + ENOUGH], 0)
            told = LayerWeights(output_products(layer, self.shape, seen.asks), self._spread)
            reason = known.reason if known else ""
            return balanced(self.shape, seen, turns, told, self._values, reason)
        except Exception:  # numbers that are not finite, or whatever an unknown embedding raises
            return known


def balanced(
    shape: KVShape,
    seen: Covariances,
    turns: Sequence[Turn] | None,
    weights: LayerWeights,
    values: bool = True,
    reason: str = "",
) -> Treatment:
    """Keys and values balanced by what was seen.

    Args:
        shape: of the layer.
        seen: queries, keys and values.
        turns: by the layer's rotary embedding; None to leave keys as they are.
        weights: of the layer.
        values: whether they are to be treated.
        reason: what else is to be told.

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
    told = f"{what}; {reason}" if reason else what
    return Treatment.of(shape, q, o, key_gains, "balanced and rotated", told, value_gains)


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


def _is_latent(layer: Any) -> bool:
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

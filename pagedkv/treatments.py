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
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear

from pagedkv.allocator import KVShape
from pagedkv.attention import DECODE_TOKENS
from pagedkv.balance import Turn, balanced_keys, balanced_values, turns_of
from pagedkv.calibration_file import Calibration, digest_of
from pagedkv.config import TierConfig, names_file
from pagedkv.covariances import FIRST, Covariances
from pagedkv.tiers import Treatment
from pagedkv.tiers.treatment import random_signs, treated_parts

SAMPLES = 64
"""Random inputs per layer: spreads are then known to a tenth."""

LEAST, ENOUGH = 128, 2048
"""Tokens whose queries and keys must be seen to balance keys by them, or to tell how they attend;
more than enough of them."""

OUTPUT_SAMPLES = 256
"""Random outputs per layer, for products of value channels where weights cannot be seen: more gain
3 % at most."""

QUIETEST, QUIETEST_KEY = 1 / 4, 1 / 32
"""What a value or key channel spreads at least, as a part of what the weights let expect beside
others. Of keys less: what the weights take for spread may be constant within groups."""

EVERY = 4
"""Of tokens that are generated, the query of one in so many is looked at."""

OUTLIER = 4.0
"""Key channels that spread beyond so many times the median are scaled down, see `scaled`."""

NORMS = ("input_layernorm", "attention_norm", "ln_1", "norm1", "norm", "pre_norm")
"""Names under which layers keep the norm before attention."""

OUTPUTS = ("o_proj", "out_proj", "wo", "dense")
"""Names under which attention keeps its output projection."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """Root mean squares of what a layer's projections give, per KV head and channel.

    Attributes:
        queries: ``[kv_heads, key_dim]``, over the query heads that share a KV head.
        keys: ``[kv_heads, key_dim]``.
        values: ``[kv_heads, value_dim]``.
        outputs: what the output projection makes of value channels, ``[kv_heads, value_dim]``.
    """

    queries: Floats
    keys: Floats
    values: Floats
    outputs: Floats

    @property
    def outlier(self) -> float:
        """How far the largest key channel is above the median one of its head."""
        return float((self.keys / np.median(self.keys, axis=1, keepdims=True)).max())


@dataclass(frozen=True)
class LayerWeights:
    """What is known of a layer without reading anything.

    Attributes:
        outputs: see `output_products`; None if they are not known.
        spread: see `measure_spread`; None if it is not known.
    """

    outputs: Floats | None = None
    spread: Spread | None = None

    @classmethod
    def of(cls, layer: Any, shape: KVShape, asks: Floats) -> LayerWeights:
        """Of a layer of the model; nothing if nobody knows which layer.

        Args:
            layer: of the model, or None.
            shape: what it caches.
            asks: how much each query head asks of values, ``[kv_heads, query heads of each]``.
        """
        if layer is None:
            return cls()
        spread = None
        with suppress(Exception):  # whatever an unknown layer raises
            spread = measure_spread(layer, shape)
        return cls(output_products(layer, shape, asks), spread)


def choose_treatments(
    model: Any, config: TierConfig, shapes: Mapping[int, KVShape], fingerprint: str = ""
) -> dict[int, Treatment]:
    """The treatments of a model's layers.

    Args:
        model: with ``layers``.
        config: says which precisions pages have, and may name a rotation for all, or a file.
        shapes: by layer number, what layers cache, as far as it is known.
        fingerprint: of the model, which a file must have.

    Returns:
        By layer number; layers that are left as they are do not occur.

    Raises:
        ConfigError: if there is no such file, or it is damaged or of another model.
    """
    keys, values = treated_parts(config.ladder.beyond(config.hot_tokens), config.treatment)
    if names_file(config.treatment):  # read where nothing is treated, too: it may be damaged
        calibration = Calibration.load(config.treatment)
        calibration.require(fingerprint, shapes, config.treatment)
        treated = calibration if keys or values else {}
        return {number: t.only(keys, values) for number, t in treated.items()}
    chosen = {}
    for number, shape in shapes.items():
        if not (keys or values):
            break
        if config.treatment == "auto":
            treatment = _from_weights(model, number, shape)
        else:
            treatment = Treatment.plain(shape, config.treatment)
        if treatment is not None:
            chosen[number] = treatment.only(keys, values)
    return chosen


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
) -> dict[int, FirstTokens]:
    """Who decides on layers when their first pages are sealed.

    Args:
        model: with ``layers``.
        config: says which treatment is wanted.
        shapes: by layer number, what layers cache, as far as it is known.
        treatments: of layers, by their weights.

    Returns:
        By layer number; where nobody does, `treatments` are final.
    """
    keys, values = treated_parts(config.ladder.beyond(config.hot_tokens), config.treatment)
    if config.treatment != "auto" or not (keys or values):
        return {}
    found: dict[int, FirstTokens] = {}
    for number, shape in shapes.items():
        if number >= len(model.layers):  # a model that goes through its layers several times
            continue
        layer = model.layers[number]
        with suppress(Exception):  # whatever an unknown layer raises, its weights decide
            # Without it nobody knows what becomes of keys farther away.
            if rope_of(layer) is not None or not (keys or _is_latent(layer)):
                found[number] = FirstTokens(layer, shape, treatments.get(number), keys, values)
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
        self, layer: Any, shape: KVShape, known: Treatment | None, keys: bool, values: bool
    ) -> None:
        """Nothing is seen yet.

        Args:
            layer: of the model.
            shape: what it caches.
            known: what its weights say: used if too few tokens are seen; None if they say nothing.
            keys: whether keys are to be treated.
            values: whether values are.
        """
        self.shape = shape
        self._layer = weakref.ref(layer)  # caches that outlive their model do not keep it
        self.keys, self._known, self._values = keys, known, values
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
            told = LayerWeights.of(layer, self.shape, seen.asks)
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


def _from_weights(model: Any, number: int, shape: KVShape) -> Treatment | None:
    try:
        spread = measure_spread(model.layers[number], shape)
    except Exception:  # whatever an unknown layer raises, it is only left as it is
        return None
    return scaled(spread, shape) if spread is not None else None


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


def measure_spread(layer: Any, shape: KVShape) -> Spread | None:
    """Put random signs through a layer's projections.

    Args:
        layer: of the model.
        shape: what it caches.

    Returns:
        None if the layer has no projections of the usual names, or they have other sizes.
    """
    attention = next(
        (m for m in layer.children().values() if hasattr(m, "q_proj") and hasattr(m, "k_proj")),
        None,
    )
    if attention is None or not (hasattr(attention, "v_proj") and hasattr(attention, "o_proj")):
        return None
    heads, key_dim, value_dim = shape.kv_heads, shape.key_dim, shape.value_dim
    hidden = _input_size(layer, attention)
    if hidden is None:
        return None
    signs = _signs(SAMPLES, hidden)
    x = _normalized(layer, signs)
    queries = _normed(attention, "q_norm", attention.q_proj(x), key_dim)
    keys = _normed(attention, "k_norm", attention.k_proj(x), key_dim)
    values = attention.v_proj(x)
    if keys.shape[1] != heads * key_dim or values.shape[1] != heads * value_dim:
        return None
    if queries.shape[1] % (heads * key_dim):
        return None
    per_head = queries.shape[1] // (heads * key_dim)
    outputs = _outputs(attention.o_proj, shape, heads * per_head)
    return Spread(
        _paired(attention, _rms(queries, heads, key_dim)),
        _paired(attention, _rms(keys, heads, key_dim)),
        _rms(values, heads, value_dim),
        outputs,
    )


def output_products(layer: Any, shape: KVShape, asks: Floats) -> Floats | None:
    """Products of what a layer's output projection makes of value channels.

    Args:
        layer: of the model.
        shape: what it caches.
        asks: how much each query head counts, ``[kv_heads, query heads of each]``.

    Returns:
        Sums over output channels, means over query heads, ``[kv_heads, value_dim, value_dim]``;
        None if there is no projection of the usual names, or it has another size.
    """
    share = mx.array(asks / asks.mean(axis=1, keepdims=True), mx.float32)[..., None, None]
    modules = layer.children().values()
    for projection in [getattr(m, name) for m in modules for name in OUTPUTS if hasattr(m, name)]:
        with suppress(Exception):  # of another size, or whatever an unknown layer raises
            rows = _output_rows(projection, asks.size * shape.value_dim, OUTPUT_SAMPLES)
            heads = rows.reshape(len(rows), *asks.shape, shape.value_dim).transpose(1, 2, 0, 3)
            products = heads.swapaxes(2, 3) @ heads / len(rows)
            return np.array((share * products).mean(axis=1), np.float64)
    return None


def _outputs(projection: Any, shape: KVShape, query_heads: int) -> Floats:
    """Root mean squares of what an output projection makes of value channels."""
    rows = _output_rows(projection, query_heads * shape.value_dim, SAMPLES)
    return _rms(rows, shape.kv_heads, shape.value_dim)


def _output_rows(projection: Any, inputs: int, samples: int) -> mx.array:
    """What an output projection makes of its inputs, float32 ``[rows, inputs]``.

    Means over rows are sums over output channels: exactly, where weights can be seen; else rows are
    random signs, put through it from behind.
    """
    weight = _weight_of(projection)
    if weight is not None:
        if weight.shape[1] != inputs:
            raise ValueError(f"a projection of {weight.shape[1]} channels, not {inputs}")
        return mx.array(weight.astype(mx.float32) * weight.shape[0] ** 0.5)
    zeros = mx.zeros((samples, inputs), mx.float32)
    out: mx.array = projection(zeros)
    signs = _signs(samples, int(out.shape[1])).astype(out.dtype)
    _, (rows,) = mx.vjp(lambda v: projection(v), [zeros], [signs])
    return mx.array(rows).astype(mx.float32)


def _weight_of(projection: Any) -> mx.array | None:
    """The weights of one of MLX's own linear layers, in plain numbers; None for any other."""
    if type(projection) is Linear:
        return mx.array(projection.weight)
    if type(projection) is not QuantizedLinear:
        return None
    # Not by a product with them: MLX's CUDA build compiles that one for half a minute.
    names = ("group_size", "bits", "mode")
    settings = {name: getattr(projection, name) for name in names if hasattr(projection, name)}
    biases = getattr(projection, "biases", None)
    return mx.dequantize(projection.weight, projection.scales, biases, **settings)


def _input_size(layer: Any, attention: Any) -> int | None:
    """Channels of the hidden state, by the norm before attention or the output projection."""
    for name in NORMS:
        weight = getattr(getattr(layer, name, None), "weight", None)
        if weight is not None:
            return int(weight.shape[-1])
    weight = getattr(attention.o_proj, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _signs(rows: int, columns: int) -> mx.array:
    """Random inputs, float32: the same on every machine."""
    signs = random_signs(f"probe {columns}", rows * columns)
    return mx.array(signs.reshape(rows, columns).astype(np.float32))


def _normalized(layer: Any, signs: mx.array) -> mx.array:
    """The signs as the layer's attention would get them."""
    norm = next((getattr(layer, name) for name in NORMS if hasattr(layer, name)), None)
    if norm is None:
        return signs
    dtype = getattr(norm, "weight", signs).dtype
    return mx.array(norm(signs.astype(dtype)))


def _normed(attention: Any, name: str, x: mx.array, dim: int) -> mx.array:
    """Through the norm that some models have behind a projection, per head or over all."""
    norm = getattr(attention, name, None)
    if norm is None:
        return x
    rows = int(x.shape[0])
    if getattr(norm, "weight", x).shape[-1] == dim:
        return mx.array(norm(x.reshape(rows, -1, dim))).reshape(rows, -1)
    return mx.array(norm(x))


def _rms(x: mx.array, heads: int, dim: int) -> Floats:
    """``[samples, heads * n * dim]`` to root mean squares ``[heads, dim]``."""
    squares = mx.square(x.astype(mx.float32)).reshape(x.shape[0], heads, -1, dim).mean(axis=(0, 2))
    return np.sqrt(np.maximum(np.array(squares, np.float64), 1e-12))


def _paired(attention: Any, rms: Floats) -> Floats:
    """Channels that rotary embedding mixes share what they have."""
    rope = getattr(attention, "rope", None)
    dims = getattr(rope, "dims", rms.shape[1]) if rope is not None else 0
    if not isinstance(dims, int) or not 0 < dims <= rms.shape[1] or dims % 2:
        return rms
    turned = np.square(rms[:, :dims])
    if getattr(rope, "traditional", False):
        pairs = turned.reshape(len(rms), -1, 2).mean(axis=2).repeat(2, axis=1)
    else:
        pairs = np.tile(turned.reshape(len(rms), 2, -1).mean(axis=1), 2)
    return np.concatenate([np.sqrt(pairs), rms[:, dims:]], axis=1)

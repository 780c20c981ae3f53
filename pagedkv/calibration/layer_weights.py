"""What a layer's weights say of its queries, keys and values, without any text.

Random signs are put through the layer's norm and its projections, which works for any kind of
linear layer.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear

from pagedkv.allocator import KVShape
from pagedkv.tiers.codec.transform import random_signs

SAMPLES = 64
"""Random inputs per layer: spreads are then known to a tenth."""

OUTPUT_SAMPLES = 256
"""Random outputs per layer, for products of value channels where weights cannot be seen: more gain
3 % at most."""

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

"""Which treatment a model's keys and values get, from its weights unless the user calibrated it.

A rotation spreads rounding errors evenly over a head's channels. That pays where the error of every
channel matters alike, and ruins models whose queries make little of channels that are large (the
keys of Qwen2.5, by their biases). So channels are scaled first: by the square root of how much
queries make of them, less where a key channel is an outlier of its own. Both are known without any
text: random signs are put through the layer's norm and projections.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import KVShape
from pagedkv.calibration_file import Calibration
from pagedkv.config import TierConfig, names_file
from pagedkv.tiers import Treatment
from pagedkv.tiers.treatment import random_signs, scale_steps, treated_parts

SAMPLES = 64
"""Random inputs per layer: spreads are then known to a tenth, half a step of a scale."""

OUTLIER = 4.0
"""Key channels that spread beyond so many times the median are scaled down, see `balanced`."""

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


def digest_of(treatments: Mapping[int, Treatment]) -> str:
    """Names all of them, as 16 hex digits; empty if there are none."""
    if not treatments:
        return ""
    text = " ".join(f"{number}:{treatments[number].digest}" for number in sorted(treatments))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _from_weights(model: Any, number: int, shape: KVShape) -> Treatment | None:
    try:
        spread = measure_spread(model.layers[number], shape)
    except Exception:  # whatever an unknown layer raises, it is only left as it is
        return None
    return balanced(spread, shape) if spread is not None else None


def balanced(spread: Spread, shape: KVShape) -> Treatment:
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
    return Treatment(
        "hadamard",
        0,
        tuple(scale_steps(head) for head in keys),
        tuple(scale_steps(head) for head in values),
        shape,
        f"largest key channel {spread.outlier:.1f} times the median",
    )


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
    outputs = _outputs(attention.o_proj, shape, heads * per_head, x.dtype)
    return Spread(
        _paired(attention, _rms(queries, heads, key_dim)),
        _paired(attention, _rms(keys, heads, key_dim)),
        _rms(values, heads, value_dim),
        outputs,
    )


def output_spread(layer: Any, shape: KVShape, query_heads: int) -> Floats | None:
    """What a layer's output projection makes of value channels.

    Args:
        layer: of the model.
        shape: what it caches.
        query_heads: that read it.

    Returns:
        Root mean squares, ``[kv_heads, value_dim]``; None if there is no projection of the usual
        names, or it has another size.
    """
    modules = layer.children().values()
    found = (getattr(m, name) for m in modules for name in OUTPUTS if hasattr(m, name))
    projection = next(found, None)
    if projection is None:
        return None
    try:
        return _outputs(projection, shape, query_heads, mx.float32)
    except Exception:  # whatever an unknown layer raises, it only says nothing
        return None


def paired(layer: Any, rms: Floats) -> Floats:
    """Root mean squares made equal for channels that a layer's rotary embedding mixes.

    Which of a pair is the larger changes from position to position.

    Args:
        layer: of the model.
        rms: ``[kv_heads, key_dim]``.
    """
    attention = next((m for m in layer.children().values() if hasattr(m, "rope")), None)
    return _paired(attention, rms)


def _outputs(projection: Any, shape: KVShape, query_heads: int, dtype: mx.Dtype) -> Floats:
    """Random signs put through an output projection from behind."""
    zeros = mx.zeros((SAMPLES, query_heads * shape.value_dim), dtype)
    out: mx.array = projection(zeros)
    signs = _signs(SAMPLES, int(out.shape[1])).astype(out.dtype)
    _, (rows,) = mx.vjp(lambda v: projection(v), [zeros], [signs])
    return _rms(rows, shape.kv_heads, shape.value_dim)


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

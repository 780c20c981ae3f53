"""What some model types need a Metal device for, in plain MLX: caches see no difference."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten


def without_packed_weights(model: Any) -> None:
    """Plain linear layers for bitnet's ternary weights, which a Metal kernel multiplies."""
    plain = [
        (name, nn.Linear(m.in_features, m.out_features, bias=False))
        for name, m in model.named_modules()
        if type(m).__name__ == "BitLinear"
    ]
    model.update_modules(tree_unflatten(plain))


def without_kernels(muse_spark: ModuleType) -> None:
    """Compositions for the kernels of muse_spark's code, where there is no Metal device."""
    if mx.metal.is_available():
        return
    for stand_in in (
        expert_routing,
        norm_add_norm,
        post_expert_norm_combine,
        pre_norm,
        qk_norm,
        qk_norm_rope,
        rms_norm_sigmoid_gate,
    ):
        setattr(muse_spark, stand_in.__name__, stand_in)


def _normed(x: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, None, eps)


def expert_routing(
    logits: mx.array,
    expert_bias: mx.array,
    *,
    top_k: int,
    multiplier: float,
    score_eps: float,
    route_scale: float,
) -> list[mx.array]:
    scores = mx.sigmoid(logits * multiplier)
    chosen = mx.argpartition(-(scores + expert_bias), kth=top_k - 1, axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    weights = route_scale * weights / (weights.sum(axis=-1, keepdims=True) + score_eps)
    return [chosen.astype(mx.uint32), weights.astype(mx.float32)]


def norm_add_norm(
    branch: mx.array,
    stream: mx.array,
    *,
    alpha: mx.array,
    beta: mx.array,
    post_weight: mx.array | None,
    post_eps: float,
    next_norm: nn.RMSNorm | None,
) -> tuple[mx.array, mx.array | None]:
    scaled = branch if post_weight is None else branch * post_weight
    new = alpha * stream + beta * _normed(scaled, post_eps)
    return new, None if next_norm is None else pre_norm(new, next_norm, dtype=branch.dtype)


def pre_norm(stream: mx.array, norm: nn.RMSNorm, *, dtype: mx.Dtype) -> mx.array:
    return (_normed(stream, norm.eps) * norm.weight).astype(dtype)


def post_expert_norm_combine(
    experts: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float
) -> mx.array:
    normed = _normed(experts * norm_weight, eps)
    return (normed * weights[..., None]).sum(axis=-2).astype(experts.dtype)


def qk_norm(
    qkvg: mx.array,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    eps: float,
    query_scale: float,
) -> list[mx.array]:
    split = [n_heads * head_dim, (n_heads + n_kv_heads) * head_dim]
    queries, keys, _ = mx.split(qkvg, split, axis=-1)
    heads = (mx.unflatten(x, -1, (-1, head_dim)) for x in (queries, keys))
    queries, keys = (_normed(x, eps) for x in heads)
    return [queries * query_scale, keys]


def qk_norm_rope(
    qkvg: mx.array, *, rope_base: float, offset: int | mx.array, **options: Any
) -> list[mx.array]:
    def rotated(x: mx.array) -> mx.array:
        turned = mx.fast.rope(
            x.swapaxes(1, 2), x.shape[-1], traditional=True, base=rope_base, scale=1.0,
            offset=offset,
        )  # fmt: skip
        return turned.swapaxes(1, 2)

    return [rotated(x) for x in qk_norm(qkvg, **options)]


def rms_norm_sigmoid_gate(x: mx.array, gate: mx.array, *, eps: float) -> mx.array:
    normed = _normed(x, eps).swapaxes(1, 2).flatten(-2)
    return (normed * mx.sigmoid(gate)).astype(x.dtype)

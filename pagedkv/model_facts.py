"""What is known of a model without running it: its kind, its weights, its own caches."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from types import FrameType, SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from pagedkv.errors import ConfigError
from pagedkv.releases import unsupported


def fingerprint(model: Any) -> str:
    """Names a model by its kind, its sizes and a sample of its weights, as 16 hex digits."""
    digest = hashlib.sha256(type(model).__module__.encode())
    args = getattr(model, "args", None)
    if is_dataclass(args) and not isinstance(args, type):
        digest.update(json.dumps(asdict(args), sort_keys=True, default=str).encode())
    from mlx.utils import tree_flatten

    named = sorted(tree_flatten(model.parameters()), key=lambda item: item[0])
    weight: Any
    for name, weight in named[:: max(1, len(named) // 16)]:
        sample = weight.reshape(-1)[:32].astype(mx.float32)
        digest.update(f"{name}{weight.shape}{[float(x) for x in sample.tolist()]}".encode())
    kind = type(model).__module__.rpartition(".")[2]
    return f"{kind}-{digest.hexdigest()[:16]}"


SAMPLED = 64
"""Numbers of each weight that tell a model from one that was tuned further."""


def weights_digest(model: Any) -> str:
    """Names a model's weights by some numbers of each of them, as 32 hex digits.

    `fingerprint` looks at a few weights only, which is enough where a user names a file. What is
    found without being named must not be of a model that shares those.
    """
    from mlx.utils import tree_flatten

    digest = hashlib.sha256()
    named: Any = tree_flatten(model.parameters())
    samples = [_sample(weight) for _, weight in named]
    mx.eval(samples)
    for (name, weight), sample in zip(named, samples, strict=True):
        digest.update(f"{name} {weight.shape} {weight.dtype} {sample.tolist()}".encode())
    return digest.hexdigest()[:32]


def _sample(weight: mx.array) -> mx.array:
    """Numbers from all over a weight, `SAMPLED` or all there are."""
    if weight.size <= SAMPLED:
        return weight
    places = np.unravel_index(np.linspace(0, weight.size - 1, SAMPLED).astype(int), weight.shape)
    return weight[tuple(mx.array(p) for p in places)]


def weights_of(model: Any) -> Callable[[], str]:
    """What tells `weights_digest` of the model as long as it lives; empty then."""
    reference = weakref.ref(model)  # as in `stock_maker`

    def weights() -> str:
        mine = reference()
        return "" if mine is None else weights_digest(mine)

    return weights


def require_model(model: Any) -> None:
    """Check that this is a model of mlx-lm.

    Raises:
        ConfigError: if it is none.
    """
    if not isinstance(model, Module) or not callable(model):
        raise ConfigError(
            f"wrap() needs a model of mlx-lm (an mlx.nn.Module with .layers), "
            f"got {type(model).__name__}"
        )
    try:
        has_layers = len(model.layers) > 0
    except (AttributeError, TypeError):
        has_layers = False
    if not has_layers:
        raise ConfigError(
            f"{type(model).__name__} has no .layers: for a hand-written model use "
            f"PagedCache.standalone(n_layers) and pagedkv.attention()"
        )


def pipeline_size(model: Any) -> int:
    """How many processes a model's layers are in (mlx-lm's ``PipelineMixin``); 1 if in this one."""
    return max(int(getattr(part, "pipeline_size", 1)) for part in model.modules())


def sharing_group(model: Any) -> mx.distributed.Group | None:
    """The processes that have parts of each of a model's layers; None if this one has them all."""
    groups = (getattr(part, "group", None) for part in model.modules())
    return next((g for g in groups if isinstance(g, mx.distributed.Group) and g.size() > 1), None)


def stock_maker(model: Any) -> Callable[[], list[Any]]:
    """What makes the caches that the model would have if it were not wrapped.

    Raises:
        ConfigError: if there is no mlx-lm, or MLX is too old.
    """
    if problem := unsupported("mlx"):
        raise ConfigError(f"{problem}: pip install --upgrade pagedkv")
    try:
        from mlx_lm.models.cache import make_prompt_cache
    except ImportError as e:
        raise ConfigError("wrap() needs mlx-lm: pip install 'pagedkv[lm]'") from e

    # The model will hold this function: a strong reference back would keep it alive for ever.
    reference = weakref.ref(model)
    own = getattr(type(model), "make_cache", None)
    if own is not None:
        return lambda: list(own(reference()))

    def plain() -> list[Any]:
        # Asked with the model it would call the make_cache that the wrapped model has.
        mine: Any = reference()
        return list(make_prompt_cache(SimpleNamespace(layers=mine.layers)))

    return plain


def asked_kv_size(frame: FrameType) -> int | None:
    """The ``max_kv_size`` that mlx-lm's `make_prompt_cache` was called with, if this is its call.

    It keeps the option to itself where a model makes its own caches, as every wrapped one does. All
    of mlx-lm and its users hold that function, under names of their own, so there is no place
    where another one could be put; but what it was asked for is in its frame.
    """
    if frame.f_code.co_name != "make_prompt_cache":
        return None
    return frame.f_locals.get("max_kv_size")


def logits_of(output: Any) -> mx.array:
    """The logits that a call of a model returned; mlx-vlm's return them among other things."""
    return cast("mx.array", getattr(output, "logits", output))


def context_limit(model: Any) -> int | None:
    """The tokens that a model takes at most, if it states it."""
    args = getattr(model, "args", None)
    text = getattr(args, "text_config", None)  # of a multimodal model: a dict, or made from one
    for part in (args, text):
        name = "max_position_embeddings"
        limit = part.get(name) if isinstance(part, dict) else getattr(part, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None

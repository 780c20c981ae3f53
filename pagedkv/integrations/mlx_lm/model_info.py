"""What is known of a model without running it: its kind, its weights, its own caches."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from types import FrameType, SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from pagedkv.errors import ConfigError
from pagedkv.integrations.mlx_lm.weight_hash import hash_arrays
from pagedkv.integrations.releases import unsupported

_IDENTITY = "_pagedkv_identity"

SAMPLED = 16
"""Numbers of each weight that show that an array was changed in place."""


@dataclass
class _Identity:
    """A model's fingerprint, and what it was computed from.

    Attributes:
        fingerprint: see `fingerprint`.
        settings: see `_settings`.
        arrays: the weights, not kept alive.
        sample: see `_sample`.
    """

    fingerprint: str = ""
    settings: str = ""
    arrays: tuple[weakref.ref[mx.array], ...] = ()
    sample: bytes = b""

    def __reduce__(self) -> tuple[type[_Identity], tuple[()]]:
        return _Identity, ()  # a copy of the model has other arrays


def fingerprint(model: Any) -> str:
    """Name a model by its kind, its settings and every bit of its weights, with 32 hex digits.

    Weights are read once (`hash_arrays`); asked again, it looks whether the same arrays are there,
    and at `SAMPLED` numbers of each for those that were changed in place. Names that begin with an
    underscore are not looked at, for models keep under them what a call leaves behind.

    Args:
        model: of mlx-lm, wrapped or not.
    """
    weights: Any = tree_flatten(model.parameters())
    named: list[tuple[str, mx.array]] = sorted(weights, key=lambda item: item[0])
    settings, arrays = _settings(model), [array for _, array in named]
    known = getattr(model, "__dict__", {}).get(_IDENTITY)
    sample = _sample(arrays)
    if (
        known is not None
        and known.settings == settings
        and len(known.arrays) == len(arrays)
        and all(ref() is array for ref, array in zip(known.arrays, arrays, strict=True))
        and known.sample == sample
    ):
        return str(known.fingerprint)
    digest = hashlib.sha256(f"{settings}\n{hash_arrays(named)}".encode()).hexdigest()
    kind = type(model).__module__.rpartition(".")[2]
    found = _Identity(f"{kind}-{digest[:32]}", settings, tuple(map(weakref.ref, arrays)), sample)
    object.__setattr__(model, _IDENTITY, found)
    return found.fingerprint


def _settings(model: Any) -> str:
    """What decides a model's answers beside its weights: its sizes, and its modules' numbers.

    A LoRA adapter's scale is of these: it is no weight, and in no configuration.
    """
    args = getattr(model, "args", None) or getattr(model, "config", None)
    sizes = asdict(args) if is_dataclass(args) and not isinstance(args, type) else None
    lines = [type(model).__module__, json.dumps(sizes, sort_keys=True, default=str)]
    for path, module in sorted(model.named_modules(), key=lambda item: item[0]):
        plain = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and not name.startswith("_")
        }
        lines.append(f"{path} {type(module).__name__} {sorted(plain.items())}")
    return "\n".join(lines)


def _sample(arrays: list[mx.array]) -> bytes:
    """Numbers from all over each array, `SAMPLED` or all there are."""
    some = [array.reshape(-1)[:: max(1, array.size // SAMPLED)] for array in arrays if array.size]
    octets = [numbers.view(mx.uint8) for numbers in some]
    taken = mx.concatenate([mx.zeros((1,), mx.uint8), *octets])
    mx.eval(taken)
    return np.asarray(taken).tobytes()


def weights_of(model: Any) -> Callable[[], str]:
    """What tells the model's `fingerprint` as long as it lives; empty then."""
    reference = weakref.ref(model)  # as in `stock_maker`

    def weights() -> str:
        mine = reference()
        return "" if mine is None else fingerprint(mine)

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

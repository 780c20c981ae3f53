"""A tiny model of every mlx-lm model type, with random weights, in float32."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Collection
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx_lm.models
from mlx.utils import tree_flatten, tree_unflatten

from tests import zoo_stand_ins
from tests.zoo_configs import COMMON, EVEN_IF_NONE, NESTED, OVERRIDES, WINDOW

GAIN = 1.6
"""Weights are this times 1 / sqrt(inputs): attention has peaks then, and logits differ."""


@cache
def model_types() -> tuple[str, ...]:
    """Every module of mlx-lm that defines a model."""
    names = [m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__)]
    return tuple(name for name in names if hasattr(_module(name), "Model"))


UNBUILDABLE: dict[str, str] = {
    "olmo": "mlx-lm's own code fails: it adds its mask, the word 'causal', to the scores",
}
"""Types that cannot run here, and why."""

WITHOUT_PAGES: dict[str, str] = {
    "deepseek_v41": "its layers have a cache of their own, made of windows and compressed groups",
    "mamba": "it is recurrent",
    "mamba2": "it is recurrent",
    "rwkv7": "it is recurrent",
}
"""Types that `wrap` refuses, for none of their layers has a cache that could be paged."""


def build(model_type: str, seed: int = 7, window: int = WINDOW) -> Any:
    """A model of this type, evaluated; its windows, if it has any, this long."""
    module = _module(model_type)
    with_windows = _with_windows(settings(model_type), window)
    model = module.Model(module.ModelArgs.from_dict(with_windows))
    _stand_in(model_type, model)
    model.set_dtype(mx.float32)
    randomize(model, seed)
    model.eval()
    mx.eval(model.parameters())
    return model


def settings(model_type: str) -> dict[str, Any]:
    """The type's configuration, as a config.json would have it."""
    config = fill(_module(model_type).ModelArgs, OVERRIDES.get(model_type, {}))
    if model_type in NESTED:
        name, kind = NESTED[model_type]
        text = fill(getattr(_module(name), kind), OVERRIDES.get(name, {}))
        config["text_config"] = {**text, **OVERRIDES.get(model_type, {}), "model_type": name}
    return {**config, "model_type": model_type}


def _with_windows(config: dict[str, Any], window: int) -> dict[str, Any]:
    """Settings with windows and chunks of this length."""
    return {
        name: _with_windows(value, window)
        if isinstance(value, dict)
        else window
        if value == WINDOW and is_window(name)
        else value
        for name, value in config.items()
    }


def is_window(name: str) -> bool:
    """Whether a field of this name is the length of a window or chunk of attention."""
    return "window" in name or name == "attention_chunk_size"


def _module(name: str) -> ModuleType:
    # Only asked whether it is there; the model's code is mlx-lm's own.
    sys.modules.setdefault("hf_olmo", ModuleType("hf_olmo"))
    return importlib.import_module(f"mlx_lm.models.{name}")


def fill(
    kind: Any, given: dict[str, Any], even_if_none: Collection[str] = EVEN_IF_NONE
) -> dict[str, Any]:
    """Settings for a dataclass: those that are given, and `COMMON` by the name of the field."""
    config: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        optional = field.default is None and field.name not in even_if_none
        if field.name in COMMON and not optional:
            config[field.name] = COMMON[field.name]
    return {**config, **given}


def _stand_in(model_type: str, model: Any) -> None:
    """Replace what cannot run without a Metal device, or with a vocabulary as small as ours."""
    if model_type == "bitnet":
        zoo_stand_ins.without_packed_weights(model)
    if model_type == "muse_spark":
        zoo_stand_ins.without_kernels(_module(model_type))
    if model_type == "phi3small":  # token numbers beyond 128: writing there corrupts memory
        model._dummy_tokenizer_ids = mx.array([126, 127])


def randomize(model: Any, seed: int) -> None:
    """Seeded weights whose size does not depend on how the module was initialized."""
    mx.random.seed(seed)
    changed = []
    for name, array in tree_flatten(model.parameters()):
        if array.dtype == mx.uint32:  # packed
            changed.append((name, mx.random.randint(0, 2**31, array.shape).astype(mx.uint32)))
        elif name.endswith("scales"):
            changed.append((name, mx.full(array.shape, 0.1)))
        elif array.ndim >= 2 and array.dtype == mx.float32:
            fan_in = array.shape[-1] * (array.shape[1] if "conv" in name else 1)
            scale = 1.0 if "embed" in name or "wte" in name else GAIN * fan_in**-0.5
            changed.append((name, scale * mx.random.normal(array.shape)))
    model.update(tree_unflatten(changed))

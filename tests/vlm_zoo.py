"""A tiny language model of every type that mlx-vlm has, with random weights, in float32."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from tests import zoo_configs, zoo_stand_ins
from tests.model_zoo import fill, is_window, randomize
from tests.vlm_configs import EVEN_IF_NONE, OVERRIDES, TEXT_TYPES
from tests.vlm_package import load
from tests.zoo_configs import WINDOW

WITHOUT_PAGES: dict[str, str] = {
    "deepseek_v41": "its layers have a cache of their own, made of windows and compressed groups",
    "florence2": "its caches hold the text so far and the image, of an encoder and a decoder",
    "mamba": "it is recurrent",
    "mamba2": "it is recurrent",
    "nemotron_parse": "its caches hold the text so far and the image, for a decoder",
    "qwen4_exp": "its layers keep keys, values and an index in one, or are recurrent",
    "rwkv7": "it is recurrent",
    "unlimited_ocr": "its layers keep a prompt and write what follows in a ring behind it",
    "z1t": "it is recurrent",
}
"""Types that `wrap` refuses, for none of their layers has a cache that could be paged."""

WITHOUT_TEXT = ("rfdetr", "rt_detr_v2", "sam3d_body")
"""Types whose language model is there for the name only."""

LAYERS_OF = {"mistral4": "mistral3"}
"""Types without a model: their layers are those of another's, where its configuration says so."""

WHOLE = ("phi3_v", "phi4mm")
"""Types whose text settings are those of the whole model."""


@cache
def packages() -> tuple[str, ...]:
    """Everything below ``mlx_vlm.models`` that is a package: its model types."""
    return tuple(m.name for m in pkgutil.iter_modules(load("models").__path__) if m.ispkg)


@cache
def homes() -> dict[str, str]:
    """By the name of each type that has a language model: the type whose file defines it."""
    found = {name: _language_model(name) for name in packages()}
    of_kinds = {name: kind.__module__.split(".")[2] for name, kind in found.items() if kind}
    return {**of_kinds, **{name: name for name in LAYERS_OF}}


def model_types() -> tuple[str, ...]:
    """The types that have a language model of their own; the others' are those of these."""
    return tuple(name for name, home in homes().items() if name == home)


def _language_model(name: str) -> type | None:
    """The class that a type's model has as its ``language_model``.

    None where there is none: encoders, detectors, image generators.
    """
    package = load(f"models.{LAYERS_OF.get(name, name)}")
    if name == "phi3_v":
        return package.Model  # type: ignore[no-any-return]
    for base in getattr(getattr(package, "Model", None), "__mro__", ()):
        kind = getattr(sys.modules[base.__module__], "LanguageModel", None)
        if kind is not None:
            return None if name in WITHOUT_TEXT else kind  # type: ignore[no-any-return]
    return None


def build(model_type: str, seed: int = 7, window: int = WINDOW) -> Any:
    """The language model of this type, evaluated; its windows, if it has any, this long."""
    model = _made(model_type, window)
    if model_type == "bitnet":
        zoo_stand_ins.without_packed_weights(model)
    if model_type == "muse_spark":
        zoo_stand_ins.without_kernels(sys.modules[type(model).__module__])
    if model_type == "jina_vlm":  # the model around it makes it
        model.lm_head = nn.Linear(64, 128, bias=False)
    if model_type == "phi3small":  # it takes them for rows: writing there corrupts memory
        model._dummy_tokenizer_ids = mx.zeros(0, mx.int32)
    if model_type == "phi3_v":  # the model around it is the language model
        model.model.vision_embed_tokens = nn.Identity()
    model.set_dtype(mx.float32)
    randomize(model, seed)
    # Factors that begin as zeros: nothing would depend on the context (limite, zaya1_vl).
    named = tree_flatten(model.parameters())
    factors = [(n, mx.ones(a.shape)) for n, a in named if not a.ndim or n.endswith(".temp")]
    model.update(tree_unflatten(factors))
    model.eval()
    mx.eval(model.parameters())
    return model


def _made(model_type: str, window: int) -> Any:
    kind = _language_model(model_type)
    assert kind is not None
    configs = load(f"models.{LAYERS_OF.get(model_type, model_type)}.config")
    text_kind = None if model_type in WHOLE else getattr(configs, "TextConfig", None)
    text = _configured(text_kind or configs.ModelConfig, model_type)
    for name, value in vars(text).items():
        if value == WINDOW and is_window(name):
            setattr(text, name, window)
    takes = list(inspect.signature(kind.__init__).parameters)[1:]
    around = SimpleNamespace(text_config=text, vision_config=SimpleNamespace(**PATCHES), **TOKENS)
    if model_type == "hunyuan_vl":
        return kind(around)
    return kind(text, around) if {"config", "model_config"} & {*takes[1:]} else kind(text)


PATCHES = dict(spatial_merge_size=2, temporal_patch_size=1, spatial_patch_size=2, channel_size=3)

TOKENS = dict(
    image_token_id=125, video_token_id=126, vision_start_token_id=124, vision_end_token_id=123,
    image_token_index=125, audio_token_id=122, eos_token_id=127,
)  # fmt: skip
"""Special tokens: beyond those that tests use."""


def _configured(kind: Any, name: str) -> Any:
    given = {**zoo_configs.OVERRIDES.get(name, {}), **OVERRIDES.get(name, {})}
    given["model_type"] = TEXT_TYPES.get(name, name)
    return kind.from_dict(fill(kind, given, EVEN_IF_NONE))

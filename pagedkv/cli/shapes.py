"""What a model caches per token: well-known models by name, others by their config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pagedkv.cli.options import positive, user_path
from pagedkv.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that its KV cache depends on.

    Attributes:
        layers: layers that keep keys and values.
        query_heads: attention heads.
        kv_heads: key/value heads.
        head_dim: channels per head.
        max_tokens: the model's context limit, if it is known.
        note: what a reader must know, such as layers left out.
        windows: sizes of the sliding windows of those layers that have one.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    max_tokens: int | None = None
    note: str = ""
    windows: tuple[int, ...] = ()


MOST_EACH = 10**5
"""Layers, heads of a layer, or channels of a head that a model may have."""

KNOWN = {
    "demo": ModelShape(30, 9, 3, 64, 8192),
    "smollm2-135m": ModelShape(30, 9, 3, 64, 8192),
    "llama3-8b": ModelShape(32, 32, 8, 128),
    "llama3-70b": ModelShape(80, 64, 8, 128),
    "llama3.2-1b": ModelShape(16, 32, 8, 64),
    "llama3.2-3b": ModelShape(28, 24, 8, 128),
    "mistral-7b": ModelShape(32, 32, 8, 128),
    "qwen2.5-0.5b": ModelShape(24, 14, 2, 64),
    "qwen2.5-7b": ModelShape(28, 28, 4, 128),
    "qwen2.5-14b": ModelShape(48, 40, 8, 128),
    "qwen2.5-32b": ModelShape(64, 40, 8, 128),
    "qwen3-8b": ModelShape(36, 32, 8, 128),
    "qwen3-30b-a3b": ModelShape(48, 32, 4, 128),
}
"""From the models' published config.json files."""


def shape_of(name: str) -> ModelShape:
    """The shape of a well-known model, or of a model folder.

    Args:
        name: a key of `KNOWN`, a folder with a config.json, or that file.

    Raises:
        ConfigError: if it is neither, or its cache is of another kind.
    """
    if name.lower() in KNOWN:
        return KNOWN[name.lower()]
    path = user_path(name)
    file = path if path.is_file() else path / "config.json"
    if not path.exists():
        raise ConfigError(
            f"there is no model folder {name!r}: name one, or a known model ({', '.join(KNOWN)})"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{name!r} is not a model: cannot read {file.name} in it ({e})") from e
    if not isinstance(config, dict):
        raise ConfigError(f"{name!r} is not a model: {file.name} is not an object")
    return _from_config(name, {**config, **_nested(config)})


def _nested(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a multimodal model's config."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}


def _from_config(name: str, config: dict[str, Any]) -> ModelShape:
    if config.get("kv_lora_rank"):
        raise ConfigError(
            f"{name!r} caches latent vectors (MLA) and not keys and values: nothing to plan here"
        )
    try:
        layers = int(config["num_hidden_layers"])
        heads = int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        for number in (layers, heads, kv_heads, head_dim):
            positive(number, "each of them", MOST_EACH)
    except (ConfigError, KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise ConfigError(
            f"the config of {name!r} does not say how many layers and heads it has ({e}): "
            f"give --layers, --kv-heads and --head-dim"
        ) from e
    limit = config.get("max_position_embeddings")
    paged, windows, note = _paged_layers(config, layers)
    return ModelShape(
        paged, heads, kv_heads, head_dim, limit if isinstance(limit, int) else None, note, windows
    )


_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""By kind of layer: the entry of the config that says how far it sees."""


def _paged_layers(config: dict[str, Any], layers: int) -> tuple[int, tuple[int, ...], str]:
    """Layers with keys and values, and their windows; others keep a state of fixed size."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or "full_attention" not in kinds:
        return layers, (), ""
    sizes = (config.get(_WINDOWS.get(str(kind), "")) for kind in kinds)
    windows = tuple(size for size in sizes if isinstance(size, int) and size > 0)
    paged = sum(kind == "full_attention" for kind in kinds) + len(windows)
    parts = [f"{len(windows)} of {layers} layers have a window"] if windows else []
    if layers > paged:
        parts.append(f"{layers - paged} of {layers} layers keep no context and are left out")
    return paged, windows, "; ".join(parts)

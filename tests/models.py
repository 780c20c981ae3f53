"""Tiny random models for tests."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import llama


def tiny_llama(
    layers: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 64, seed: int = 0, **args: Any
) -> Any:
    """A Llama with random weights: 100 tokens of vocabulary, float32."""
    mx.random.seed(seed)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=dim,
            num_hidden_layers=layers,
            intermediate_size=2 * dim,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-5,
            vocab_size=100,
            **{"max_position_embeddings": 100_000, **args},
        )
    )
    mx.eval(model.parameters())
    return model


def random_tokens(n: int, seed: int = 0) -> mx.array:
    """Token ids, ``[1, n]``."""
    return mx.random.randint(0, 100, (1, n), key=mx.random.key(seed))


def lively(model: Any) -> Any:
    """The model with larger weights: what it says then depends on all that it read.

    A random model repeats one token for ever, whatever its cache holds.
    """
    from mlx.utils import tree_map_with_path

    def larger(path: str, weight: mx.array) -> mx.array:
        return 4 * weight if weight.ndim == 2 and "layers" in path else weight

    model.update(tree_map_with_path(larger, model.parameters()))
    mx.eval(model.parameters())
    return model

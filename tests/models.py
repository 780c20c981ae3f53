"""Tiny random models for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
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


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_model(path: Path, larger: bool = False) -> str:
    """Write a random Llama of two layers with a tokenizer of bytes, as mlx-lm reads it.

    Args:
        path: of the folder.
        larger: see `lively`.

    Returns:
        The folder.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    config["chat_template"] = TEMPLATE
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    sizes = {
        "model_type": "llama",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 257,
        "max_position_embeddings": 4096,
    }
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs(**sizes))
    if larger:
        lively(model)
    mx.save_safetensors(
        str(path / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    (path / "config.json").write_text(json.dumps({**sizes, "eos_token_id": 256}))
    return str(path)

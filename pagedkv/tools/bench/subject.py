"""The model that is measured: a real one, or a Llama with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from pagedkv.allocator import KVShape
from pagedkv.errors import ConfigError

WEIGHT_BITS, WEIGHT_GROUP = 4, 64


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama.

    Attributes:
        layers: transformer blocks.
        query_heads: attention heads; the hidden size is that many times `head_dim`.
        kv_heads: key/value heads.
        head_dim: channels per head.
        intermediate: width of the feed-forward layers.
        vocabulary: tokens.
        tied: whether the output layer is the embedding.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False


WIDTHS = {
    "llama3-8b": (14336, 128256, False),
    "llama3-70b": (28672, 128256, False),
    "llama3.2-1b": (8192, 128256, True),
    "llama3.2-3b": (8192, 128256, True),
    "mistral-7b": (14336, 32000, False),
    "smollm2-135m": (1536, 49152, True),
    "tiny": (512, 1024, True),
}
"""Feed-forward width, vocabulary, tied embeddings; from the models' published config.json files.
Models whose names are not here have no synthetic twin."""


@dataclass(frozen=True)
class Subject:
    """A model of mlx-lm, and what the benchmark must know of it.

    Attributes:
        name: in rows.
        model: the model itself, not wrapped.
    """

    name: str
    model: Any

    @cached_property
    def _seen(self) -> tuple[tuple[KVShape, ...], mx.Dtype]:
        """Shapes and type of what the model's own caches hold after one token.

        Raises:
            ConfigError: if one of them is no plain `KVCache`: it could not be filled with random
                tokens here.
        """
        from mlx_lm.models.cache import KVCache, make_prompt_cache

        caches = make_prompt_cache(self.model)
        strangers = sorted({type(c).__name__ for c in caches if type(c) is not KVCache})
        if strangers:
            raise ConfigError(
                f"the model {self.name!r} has layers with {', '.join(strangers)}: only models "
                f"whose layers all use a plain KVCache can be filled to a depth"
            )
        mx.eval(self.model(mx.array([[1]]), cache=caches))
        shapes = (
            KVShape(int(c.keys.shape[1]), int(c.keys.shape[3]), int(c.values.shape[3]))
            for c in caches
        )
        return tuple(shapes), caches[0].keys.dtype

    @property
    def shapes(self) -> tuple[KVShape, ...]:
        """What each layer caches per token.

        Raises:
            ConfigError: if a layer's cache is no plain `KVCache`.
        """
        return self._seen[0]

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the keys."""
        return self._seen[1]

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of weights that a token reads: all but a table of which it takes one row."""
        from mlx.utils import tree_flatten

        leaves: Any = tree_flatten(self.model.parameters())
        names = [name for name, _ in leaves]
        untied = any(".lm_head." in f".{name}" for name in names)
        return sum(leaf.nbytes for name, leaf in leaves if not (untied and "embed_tokens" in name))

    @property
    def vocabulary(self) -> int:
        """Tokens that a prompt may be made of."""
        args = getattr(self.model, "args", None)
        return int(getattr(args, "vocab_size", 0) or 256)

    def prompt(self, tokens: int) -> mx.array:
        """Random tokens, one-dimensional; the same for the same length."""
        return mx.random.randint(0, self.vocabulary, (tokens,), key=mx.random.key(tokens))


def random_llama(shape: LlamaShape, dtype: mx.Dtype) -> Any:
    """A Llama with random weights, quantized to 4 bits in groups of 64; nothing is downloaded.

    Args:
        shape: its sizes.
        dtype: of everything that is not quantized.

    Raises:
        ConfigError: if mlx-lm is missing.
    """
    try:
        from mlx_lm.models import llama
    except ImportError as e:
        raise ConfigError("running a model needs mlx-lm: pip install 'pagedkv[lm]'") from e
    from mlx.nn.layers.quantized import quantize

    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=shape.query_heads * shape.head_dim,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-5,
        vocab_size=shape.vocabulary,
        rope_theta=500_000.0,
        tie_word_embeddings=shape.tied,
    )
    mx.random.seed(0)
    model = llama.Model(args)
    model.set_dtype(dtype)
    quantize(model, group_size=WEIGHT_GROUP, bits=WEIGHT_BITS)
    _evaluate(model)
    return model


def _evaluate(model: Any) -> None:
    """Make the weights one by one: the unquantized ones are gone before the next ones come."""
    from mlx.utils import tree_flatten

    leaves: Any = tree_flatten(model.parameters())
    for _, leaf in leaves:
        mx.eval(leaf)
    mx.clear_cache()

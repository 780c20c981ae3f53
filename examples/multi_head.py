"""A transformer of `mlx.nn.MultiHeadAttention`, moved onto a paged cache.

    python examples/multi_head.py

`pagedkv.page_attention` exchanges the attention modules, weights and names stay. What calls them
hands each one its layer of the cache; here that is one argument more in `Block`.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

import pagedkv


class Block(nn.Module):
    """Attention and an MLP, each with its norm and residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiHeadAttention(dim, heads)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norms = [nn.LayerNorm(dim), nn.LayerNorm(dim)]

    def __call__(
        self, x: mx.array, mask: mx.array | None, cache: pagedkv.PagedLayerCache | None = None
    ) -> mx.array:
        y = self.norms[0](x)
        more = {} if cache is None else {"cache": cache}
        x = x + self.attention(y, y, y, mask, **more)
        return x + self.down(nn.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """A small decoder with sinusoidal positions, which are added to its input."""

    def __init__(self, vocabulary: int = 256, dim: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.positions = nn.SinusoidalPositionalEncoding(dim, scale=math.sqrt(2 / dim))
        self.blocks = [Block(dim, 4) for _ in range(layers)]

    def __call__(self, tokens: mx.array, cache: pagedkv.PagedCache | None = None) -> mx.array:
        """All tokens at once without a cache; with one, those that come next."""
        length = tokens.shape[1]
        start = cache.offset if cache else 0
        x = self.embed(tokens) + self.positions(mx.arange(start, start + length))
        mask = None if cache else nn.MultiHeadAttention.create_additive_causal_mask(length)
        for block, layer_cache in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, mask, layer_cache)
        return self.embed.as_linear(x)


def main(prompt_tokens: int = 4000, new_tokens: int = 8) -> pagedkv.CacheStats:
    """Generate greedily from random weights, with budgets far below the context."""
    mx.random.seed(0)
    model = Transformer()
    layers = pagedkv.page_attention(model)
    config = pagedkv.TierConfig(hot_tokens=256, page_tokens=256, warm="1.2MB", cold="100MB")
    with pagedkv.PagedCache.standalone(len(layers), config) as cache:
        prompt = mx.random.randint(0, 256, (1, prompt_tokens))
        for start in range(0, prompt_tokens, 512):
            logits = model(prompt[:, start : start + 512], cache)
            mx.eval(logits)
        for _ in range(new_tokens):
            logits = model(mx.argmax(logits[:, -1:], axis=-1), cache)
        mx.eval(logits)
        return cache.stats()


if __name__ == "__main__":
    stats = main()
    print(f"{stats.tokens:,} tokens: {stats.warm.tokens:,} warm, {stats.cold.tokens:,} on disk")

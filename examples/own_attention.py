"""A model that calls `mx.fast.scaled_dot_product_attention` itself, on a paged cache.

    python examples/own_attention.py

Nothing in the model knows of pages: its cache has mlx-lm's `update_and_fetch` and `offset`. Inside
`pagedkv.hooked()` MLX's attention recognises the keys and values that a paged cache returned.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

import pagedkv


class Attention(nn.Module):
    """Grouped-query attention as one finds it in many models."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.qkv = nn.Linear(dim, dim + 2 * kv_heads * (dim // heads), bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.rope = nn.RoPE(dim // heads)

    def __call__(self, x: mx.array, cache: pagedkv.PagedLayerCache) -> mx.array:
        dim, size = x.shape[-1], x.shape[-1] // self.heads
        parts = mx.split(self.qkv(x), [dim, dim + self.kv_heads * size], axis=-1)
        q, k, v = (mx.unflatten(p, -1, (-1, size)).transpose(0, 2, 1, 3) for p in parts)
        q, k = (self.rope(y, offset=cache.offset) for y in (q, k))
        k, v = cache.update_and_fetch(k, v)
        mask = "causal" if x.shape[1] > 1 else None
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=size**-0.5, mask=mask)
        return self.out(y.transpose(0, 2, 1, 3).flatten(-2, -1))


class Model(nn.Module):
    """A small decoder."""

    def __init__(self, vocabulary: int = 256, dim: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.layers = [Attention(dim, 4, 2) for _ in range(layers)]
        self.norms = [nn.RMSNorm(dim) for _ in range(layers)]

    def __call__(self, tokens: mx.array, cache: pagedkv.PagedCache) -> mx.array:
        x = self.embed(tokens)
        for layer, norm, layer_cache in zip(self.layers, self.norms, cache, strict=True):
            x = x + layer(norm(x), layer_cache)
        return self.embed.as_linear(x)


def main(prompt_tokens: int = 4000, new_tokens: int = 8) -> pagedkv.CacheStats:
    """Generate greedily from random weights, with budgets far below the context."""
    mx.random.seed(0)
    model = Model()
    config = pagedkv.TierConfig(hot_tokens=256, page_tokens=256, warm="600KB", cold="100MB")
    cache = pagedkv.PagedCache.standalone(len(model.layers), config)
    with cache, pagedkv.hooked():
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
    print("layers:", ", ".join(stats.layers))

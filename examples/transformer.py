"""A hand-written transformer that attends over a paged cache with `pagedkv.attention`.

    python examples/transformer.py

Three things change in a plain mlx.nn transformer: positions come from `cache.offset`, attention is
`pagedkv.attention`, which appends the new keys and values first, and the caller makes the cache.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

import pagedkv


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.rope = nn.RoPE(self.head_dim)

    def __call__(self, x: mx.array, cache: pagedkv.PagedLayerCache) -> mx.array:
        _, length, _ = x.shape

        def split(y: mx.array, heads: int) -> mx.array:
            return y.reshape(1, length, heads, self.head_dim).transpose(0, 2, 1, 3)

        keys, values = mx.split(self.kv(x), 2, axis=-1)
        q = self.rope(split(self.q(x), self.heads), offset=cache.offset)
        k = self.rope(split(keys, self.kv_heads), offset=cache.offset)
        v = split(values, self.kv_heads)
        y = pagedkv.attention(q, k, v, cache=cache, scale=self.head_dim**-0.5)
        return self.out(y.transpose(0, 2, 1, 3).reshape(1, length, -1))


class Block(nn.Module):
    """Attention and a gated MLP, each with its norm and residual."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, kv_heads)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norms = [nn.RMSNorm(dim), nn.RMSNorm(dim)]

    def __call__(self, x: mx.array, cache: pagedkv.PagedLayerCache) -> mx.array:
        x = x + self.attention(self.norms[0](x), cache)
        return x + self.down(nn.silu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """A small decoder."""

    def __init__(
        self, vocabulary: int = 256, dim: int = 128, layers: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.blocks = [Block(dim, heads, heads // 2) for _ in range(layers)]
        self.norm = nn.RMSNorm(dim)

    def __call__(self, tokens: mx.array, cache: pagedkv.PagedCache) -> mx.array:
        x = self.embed(tokens)
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x = block(x, layer_cache)
        return self.embed.as_linear(self.norm(x))


def main(prompt_tokens: int = 6000, new_tokens: int = 16) -> pagedkv.CacheStats:
    """Generate greedily from random weights, with budgets far below the context."""
    mx.random.seed(0)
    model = Transformer()
    config = pagedkv.TierConfig(
        hot_tokens=256, page_tokens=256, kv="K8V4:1024,K4V4", warm="700KB", cold="100MB"
    )
    with pagedkv.PagedCache.standalone(len(model.blocks), config) as cache:
        prompt = mx.random.randint(0, 256, (1, prompt_tokens))
        for start in range(0, prompt_tokens, 512):
            mx.eval(model(prompt[:, start : start + 512], cache))
        token = prompt[:, -1:]
        for _ in range(new_tokens):
            token = mx.argmax(model(token, cache)[:, -1:], axis=-1)
            mx.async_eval(token)
        mx.eval(token)
        return cache.stats()


if __name__ == "__main__":
    stats = main()
    for name in ("hot", "warm", "cold"):
        tier = getattr(stats, name)
        print(f"{name:>5}: {tier.tokens:>5} tokens, {pagedkv.format_size(tier.bytes)}")
    print(f"a 16-bit cache would take {pagedkv.format_size(stats.fp16_bytes)}")

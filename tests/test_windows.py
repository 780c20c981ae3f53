"""Layers with a sliding window: what queries see, what is dropped, and what can be taken back."""

from __future__ import annotations

import copy
import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as stock
from mlx_lm.models.base import create_attention_mask

import pagedkv
from pagedkv.attn.driver import stock_attention
from pagedkv.integrations.mlx_lm.caches import PagedRotatingKVCache
from pagedkv.sequence.sequence import SequenceContext
from pagedkv.tiers import Pager

HEADS, REPEATS, DIM = 2, 2, 32
SCALE = DIM**-0.5


def context(**options: Any) -> SequenceContext:
    given = {"hot_tokens": 64, "kv": "fp16", "warm": "64MB", "cold": 0, "page_tokens": 256}
    config = pagedkv.TierConfig(**{**given, "hot_dtype": "model", **options})
    return SequenceContext(config, Pager(config.budget(), 1))


def window(max_size: int, keep: int = 0, **options: Any) -> PagedRotatingKVCache:
    return PagedRotatingKVCache(context(**options), 0, max_size, keep)


def numbers(n: int, seed: int) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values of n tokens in float32 that float16 holds exactly."""
    rng = np.random.default_rng(seed)
    shapes = ((1, HEADS * REPEATS, n, DIM), (1, HEADS, n, DIM), (1, HEADS, n, DIM))
    made = (rng.standard_normal(s).astype(np.float16).astype(np.float32) for s in shapes)
    q, k, v = (mx.array(x) for x in made)
    return q, k, v


def step(cache: Any, n: int, seed: int, window_size: int | None = None) -> mx.array:
    """One layer of a model: mask, append, attend."""
    q, k, v = numbers(n, seed)
    mask = create_attention_mask(mx.zeros((1, n, 1)), cache, window_size=window_size)
    if isinstance(cache, pagedkv.PagedLayerCache) and seed % 5:  # else dense, as without a hook
        return pagedkv.attention(q, k, v, cache=cache, scale=SCALE, mask=mask)
    return stock_attention(q, *cache.update_and_fetch(k, v), scale=SCALE, mask=mask)


def close_to(a: mx.array, b: mx.array, tolerance: float = 2e-6) -> bool:
    return a.shape == b.shape and float(mx.abs(a - b).max()) <= tolerance


def held(cache: Any) -> list[Any]:
    """The tables that hold pages of a layer."""
    return [cache._table] + ([cache._earlier.table] if cache._earlier else [])


SIZES = [(24, 0), (300, 0), (300, 4), (700, 0), (1024, 4), (1500, 0)]


@pytest.mark.parametrize(("max_size", "keep"), SIZES)
@pytest.mark.parametrize("seed", range(2))
def test_any_course_of_things_sees_what_mlx_lm_shows(max_size: int, keep: int, seed: int) -> None:
    """Appends of 1 to 600 tokens, trims and forks; stock caches beside, made anew after a trim.

    A stock cache cannot be trimmed once it is full: it is made again from the tokens that are left,
    in one piece, which shows any later query the same.
    """
    rng = random.Random(1000 * max_size + seed)
    hot = rng.choice((16, 64, 200))
    cache = window(max_size, keep, hot_tokens=hot)
    theirs: Any = stock.RotatingKVCache(max_size, keep)
    chunks: list[tuple[int, int]] = []  # seed and length of each
    forks: list[tuple[Any, Any, list[tuple[int, int]]]] = []

    def again(upto: list[tuple[int, int]]) -> Any:
        fresh = stock.RotatingKVCache(max_size, keep)
        parts = [numbers(n, s)[1:] for s, n in upto]
        if parts:
            keys, values = (mx.concatenate(list(x), axis=2) for x in zip(*parts, strict=True))
            fresh.update_and_fetch(keys, values)
        return fresh

    sealed = dropped = 0
    for turn in range(30):
        kind = rng.choices(("decode", "few", "chunk", "trim", "fork"), (8, 3, 6, 3, 1))[0]
        if turn > 25:  # whatever was drawn before, something is dropped
            kind = "chunk"
        if kind == "decode":
            for _ in range(rng.randint(1, 40)):
                seed_ = rng.randint(0, 10**6)
                a, b = step(cache, 1, seed_), step(theirs, 1, seed_)
                chunks.append((seed_, 1))
                assert close_to(a, b), (turn, kind, cache.offset)
        elif kind in ("few", "chunk"):
            n = rng.randint(2, 8) if kind == "few" else rng.randint(9 if turn <= 25 else 500, 600)
            seed_ = turn
            a, b = step(cache, n, seed_), step(theirs, n, seed_)
            chunks.append((seed_, n))
            assert close_to(a, b), (turn, kind, n, cache.offset)
        elif kind == "trim" and chunks:
            last = rng.randint(1, min(3, len(chunks)))
            n = sum(n for _, n in chunks[-last:])
            possible = cache.can_trim(n)
            before = cache.offset, cache.dropped
            assert cache.trim(n) == (n if possible else 0)
            if possible:
                del chunks[-last:]
                theirs = again(chunks)
            else:
                assert (cache.offset, cache.dropped) == before
                assert n > 16
        elif kind == "fork":
            forks.append((copy.deepcopy(cache), copy.deepcopy(theirs), list(chunks)))
            if len(forks) > 1:
                forks.append((cache, theirs, chunks))
                cache, theirs, chunks = forks.pop(0)
        assert cache.offset == sum(n for _, n in chunks)
        assert cache.size() == theirs.size()
        sealed = max(sealed, len(cache._table) if cache._table else 0)
        dropped = max(dropped, cache.dropped)
        if cache._pager:
            tables = [t for c in (cache, *(f[0] for f in forks)) if c._table for t in held(c)]
            cache._pager.check(tables)
            limit = max_size + 16 + max(256, max_size // 2)  # and one call's tokens
            assert cache.offset - cache.dropped <= limit + 600
    assert dropped > 0
    assert bool(sealed) == (max_size - keep > hot + 256)

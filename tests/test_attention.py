"""Every backend against float64, over the bytes that are really stored."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv.attn.backends import choose_backend
from tests import reference

# The output is rounded to the queries' type once; inside, products and sums are float32.
ROUNDING = {mx.float32: 2e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
BACKENDS = ["dequantize", "quantized", "auto"]


def config(**options: object) -> pagedkv.TierConfig:
    base = {"hot_tokens": 40, "sink_tokens": 4, "page_tokens": 256, "warm": "64MB", "cold": 0}
    return pagedkv.TierConfig(**{**base, **options})


def filled(
    settings: pagedkv.TierConfig,
    tokens: int,
    kv_heads: int = 2,
    key_dim: int = 64,
    value_dim: int | None = None,
    dtype: mx.Dtype = mx.float32,
    trim: int = 0,
) -> pagedkv.PagedCache:
    """A one-layer cache with random tokens, some channels of the keys being outliers."""
    cache = pagedkv.PagedCache.standalone(1, settings)
    rng = np.random.default_rng(tokens + key_dim)
    keys = rng.standard_normal((1, kv_heads, tokens, key_dim)).astype(np.float32)
    keys[..., ::17] = 6 * keys[..., ::17] + 20
    values = rng.standard_normal((1, kv_heads, tokens, value_dim or key_dim)).astype(np.float32)
    cache[0].append(mx.array(keys).astype(dtype), mx.array(values).astype(dtype))
    cache[0]._settle()
    cache[0].trim(trim)
    return cache


def queries(heads: int, length: int, dim: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    q = np.random.default_rng(7).standard_normal((1, heads, length, dim)) / 4
    return mx.array(q.astype(np.float32)).astype(dtype)


def error(out: mx.array, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    actual = np.asarray(out.astype(mx.float32))[0].astype(np.float64)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def check(
    cache: pagedkv.PagedCache,
    q: mx.array,
    backend: str,
    mask: mx.array | str | None = "causal",
    mask64: np.ndarray | None = None,
    sinks: mx.array | None = None,
    scratch: int = 2**28,
) -> None:
    from pagedkv.attn.driver import attend

    scale = q.shape[-1] ** -0.5
    layer = cache[0]
    out = attend(layer.view(), q, scale, mask, sinks, choose_backend(backend), scratch)
    keys, values = reference.stored(layer)
    assert keys.shape[1] == layer.offset
    expected = reference.attention(
        np.asarray(q.astype(mx.float32))[0],
        keys,
        values,
        scale,
        mask64,
        None if sinks is None else np.asarray(sinks).astype(np.float64),
    )
    assert out.dtype == q.dtype
    assert error(out, expected) < ROUNDING[q.dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("repeats", [1, 3, 4, 8])
def test_shapes(backend: str, repeats: int, dim: int) -> None:
    cache = filled(config(kv="K4V4"), 700, key_dim=dim)
    for length in (1, 5, 30):
        check(cache, queries(2 * repeats, length, dim), backend)
    assert len(cache[0]._table) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv", ["fp16", "K8V8", "K8V4", "K4V8", "K3V3", "K4V2", "K2V2", "K3V8"])
def test_precisions(backend: str, kv: str) -> None:
    cache = filled(config(kv=kv), 900)
    for length in (1, 40):
        check(cache, queries(4, length, 64), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sixteen_bit_models(backend: str, dtype: mx.Dtype) -> None:
    for kv in ("K4V4", "fp16"):
        cache = filled(config(kv=kv), 600, dtype=dtype)
        for length in (1, 20):
            check(cache, queries(4, length, 64, dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [44, 45, 299, 300, 301, 555, 556, 557])
def test_page_borders(backend: str, tokens: int) -> None:
    cache = filled(config(), tokens)
    for length in (1, 8, 9):
        check(cache, queries(2, length, 64), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scratch", [2**28, 1])
def test_ladder_cold_pages_masks_and_sinks(backend: str, scratch: int) -> None:
    """Everything at once, also with tiles instead of one dense prefill."""
    cache = filled(config(kv="K8V8:500,K4V4:900,K3V2", warm="300KB", cold="64MB"), 1600, kv_heads=2)
    assert cache.stats().cold.pages > 0
    assert len(cache.stats().precisions) == 3
    rng = np.random.default_rng(3)
    sinks = mx.array(rng.standard_normal(6).astype(np.float32))
    for length in (1, 8, 33):
        added = rng.standard_normal((length, 1600)).astype(np.float32)
        keep = rng.random((length, 1600)) < 0.7
        q = queries(6, length, 64)
        check(cache, q, backend, sinks=sinks, scratch=scratch)
        check(cache, q, backend, mx.array(added), added.astype(np.float64), scratch=scratch)
        masked = np.where(keep, 0.0, -np.inf)
        check(cache, q, backend, mx.array(keep)[None, None], masked, sinks, scratch)
    cache.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_page_that_was_trimmed_counts_only_its_valid_tokens(backend: str) -> None:
    cache = filled(config(), 900, trim=500)  # the end is now inside the second page
    assert cache[0].offset == 400
    assert [e.tokens for e in cache[0]._table] == [256, 140]
    # The hot tail is empty: the next token makes it one long.
    step = mx.ones((1, 2, 1, 64))
    cache[0].append(step, step)
    check(cache, queries(4, 1, 64), backend)
    cache[0].append(mx.ones((1, 2, 700, 64)), mx.ones((1, 2, 700, 64)))
    cache[0]._settle()
    assert [e.tokens for e in cache[0]._table] == [256, 140, 256, 256]
    for length in (1, 8, 50):
        check(cache, queries(4, length, 64), backend)
        check(cache, queries(4, length, 64), backend, scratch=1)


def test_different_key_and_value_sizes() -> None:
    cache = filled(config(), 700, key_dim=96, value_dim=128)
    for backend in BACKENDS:
        check(cache, queries(4, 3, 96), backend)


def test_attention_appends_and_attends() -> None:
    cache = pagedkv.PagedCache.standalone(1, config())
    rng = np.random.default_rng(0)
    for length in (300, 1, 1, 400, 2, 1):
        q, k, v = (
            mx.array(rng.standard_normal((1, h, length, 64)).astype(np.float32)) for h in (4, 2, 2)
        )
        before = cache.offset
        layer = cache[0]
        out = pagedkv.attention(q, k, v, cache=layer, scale=0.125)
        assert cache.offset == before + length
        assert out.shape == (1, 4, length, 64)
        # The chunk itself is attended in 16 bit; afterwards some of it may have been sealed.
    keys, values = reference.stored(layer)
    expected = reference.attention(np.asarray(q)[0], keys, values, 0.125)
    assert error(out, expected) < ROUNDING[mx.float32]


def test_wrong_arrays_are_refused_with_the_numbers() -> None:
    cache = filled(config(), 50)[0]
    good = mx.zeros((1, 2, 1, 64))
    with pytest.raises(pagedkv.ShapeError, match=r"batch of 2"):
        cache.append(mx.zeros((2, 2, 1, 64)), mx.zeros((2, 2, 1, 64)))
    with pytest.raises(pagedkv.ShapeError, match=r"3 of 64/64"):
        cache.append(mx.zeros((1, 3, 1, 64)), mx.zeros((1, 3, 1, 64)))
    with pytest.raises(pagedkv.ShapeError, match="same heads"):
        cache.append(good, mx.zeros((1, 2, 2, 64)))
    with pytest.raises(pagedkv.ShapeError, match="multiple of 2"):
        pagedkv.attention(mx.zeros((1, 3, 1, 64)), good, good, cache=cache, scale=1.0)
    with pytest.raises(pagedkv.ShapeError, match="'diagonal'"):
        pagedkv.attention(
            mx.zeros((1, 2, 1, 64)), good, good, cache=cache, scale=1.0, mask="diagonal"
        )


def test_the_reference_can_fail() -> None:
    """A cache with two pages exchanged is not within rounding: the check above has teeth."""
    cache = filled(config(), 900)
    layer = cache[0]
    keys, values = reference.stored(layer)
    q = queries(4, 1, 64)
    layer._table._entries[0], layer._table._entries[1] = layer._table._entries[1::-1]
    swapped, _ = reference.stored(layer)
    a = reference.attention(np.asarray(q)[0], keys, values, 0.125)
    b = reference.attention(np.asarray(q)[0], swapped, values, 0.125)
    assert np.abs(a - b).max() > 10 * ROUNDING[mx.float32]

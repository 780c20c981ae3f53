"""What makes rounding cost least: matrices from covariances, and errors that others make up for."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.rope_utils import initialize_rope

from pagedkv import KVShape, Precision
from pagedkv.calibration import equalization as balance
from pagedkv.calibration.equalization import (
    DOUBLINGS,
    STEP,
    averaged,
    balanced_keys,
    evened,
    turns_of,
)
from pagedkv.calibration.layer_weights import LayerWeights, Spread
from pagedkv.calibration.moments import Covariances
from pagedkv.calibration.treatment_rules import balanced
from pagedkv.tiers import Treatment
from pagedkv.tiers.codec.affine import codec_for
from pagedkv.tiers.codec.rounding import (
    BLOCKS,
    blocks_of,
    compensated,
    compensated_rows,
    feedback_for,
    quantize,
)
from pagedkv.tiers.codec.transform import rotation_matrix
from tests.reference import attention_moments

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}

ROPES = {
    "halves": lambda: nn.RoPE(64, traditional=False, base=10_000),
    "pairs": lambda: nn.RoPE(64, traditional=True, base=10_000),
    "a part": lambda: nn.RoPE(32, traditional=False, base=10_000),
    "llama3": lambda: initialize_rope(64, 10_000, False, LLAMA3, 16_384),
    "yarn": lambda: initialize_rope(64, 10_000, False, YARN, 16_384),
}


def covariances(seed: int, heads: int = 2, dim: int = 64, spread: float = 1.0) -> np.ndarray:
    """Of correlated channels, some larger than others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((heads, 3 * dim, dim)) * np.exp(spread * rng.standard_normal(dim))
    x = x @ (np.eye(dim) + 0.3 * rng.standard_normal((heads, dim, dim)))
    return x.swapaxes(1, 2) @ x / x.shape[1]


@pytest.mark.parametrize("name", ROPES)
def test_covariances_over_a_long_context(name: str) -> None:
    """The mean over all positions of what each embedding makes of them, in float64."""
    rope = ROPES[name]()
    c = covariances(1)
    want = np.zeros_like(c)
    for n in range(2**DOUBLINGS):
        turn = rope(mx.eye(64)[:, None, None, :], offset=n * STEP).reshape(64, 64)
        turn = np.array(turn, np.float64)
        turn /= np.linalg.norm(turn, axis=1, keepdims=True)
        want += turn.T @ c @ turn / 2**DOUBLINGS
    np.testing.assert_allclose(averaged(c, turns_of(rope, 64)), want, atol=2e-3 * c.max())
    assert np.abs(want - c).max() > 0.1 * c.max()


def test_embeddings_that_do_something_else() -> None:
    assert turns_of(None, 64) == []
    mixing = mx.array(np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0])
    with pytest.raises(ValueError, match="do not turn pairs"):
        turns_of(lambda x, offset: x @ mixing.astype(mx.float32), 64)


def complements(weights: np.ndarray) -> list[np.ndarray]:
    """What each block of channels counts if those behind it make up for its errors."""
    left, out = weights.copy(), []
    for start, end in reversed(blocks_of(len(weights))):
        block, before = left[start:end, start:end], left[:start, start:end]
        out.append(block.copy())
        left = left[:start, :start] - before @ np.linalg.solve(block, before.T)
    return out[::-1]


def predicted(a: np.ndarray, keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Squared error of scores per head, where every channel errs in proportion to its spread."""
    inverse = np.linalg.inv(a)
    spread = np.einsum("hii->hi", a.swapaxes(1, 2) @ keys @ a)
    asked = inverse @ queries @ inverse.swapaxes(1, 2)
    counts = [np.concatenate([np.diag(block) for block in complements(w)]) for w in asked]
    return (spread * np.stack(counts)).sum(axis=1)


def test_no_other_matrix_predicts_less_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "SHRINK", 0.0)
    monkeypatch.setattr(balance, "LEAST_EIGENVALUE", 0.0)
    keys, queries = covariances(1, spread=0.5), covariances(2, spread=0.5)
    q, _ = balanced_keys(queries, keys, [])
    np.testing.assert_allclose(np.abs(np.linalg.det(q)), 1, rtol=1e-6)
    a = np.linalg.inv(q).swapaxes(1, 2)
    white = a.swapaxes(1, 2) @ keys @ a
    size = np.einsum("hii->h", white) / 64
    np.testing.assert_allclose(white, size[:, None, None] * np.eye(64), atol=1e-6 * size.max())
    least = predicted(a, keys, queries)
    bound = np.exp((np.linalg.slogdet(keys)[1] + np.linalg.slogdet(queries)[1]) / 64)
    np.testing.assert_allclose(least, 64 * bound, rtol=1e-4)  # nothing is below it
    rotation = np.broadcast_to(rotation_matrix("hadamard", 64, 0, "key"), a.shape)
    scales = np.einsum("hii->hi", queries) ** 0.25 / np.einsum("hii->hi", keys) ** 0.25
    assert (least < 0.6 * predicted(scales[:, :, None] * rotation, keys, queries)).all()
    assert (least < 0.8 * predicted(a @ rotation, keys, queries)).all()
    assert (least < 0.4 * predicted(rotation, keys, queries)).all()
    rng = np.random.default_rng(3)
    for _ in range(20):
        other = a @ (np.eye(64) + 0.05 * rng.standard_normal((64, 64)))
        assert (least < predicted(other, keys, queries)).all()


@pytest.mark.parametrize("dim", [1, 8, 20, 64, 72, 128])
def test_blocks_that_count_alike(dim: int) -> None:
    weights = np.exp(1.5 * np.random.default_rng(dim).standard_normal(dim))
    rotation = evened(weights)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(dim), atol=1e-12)
    mean = np.exp(np.log(weights).mean())
    for block in complements(rotation.T @ np.diag(weights) @ rotation)[1:]:
        np.testing.assert_allclose(block, mean * np.eye(len(block)), atol=0.01 * mean)


@pytest.mark.parametrize("large", [0, 3, 61, 64])
def test_few_channels_that_count_more(large: int) -> None:
    """There is nobody to turn all others with: it stays a rotation, no worse than none."""
    weights = np.where(np.arange(64) < large, 1e4, 1.0)
    rotation = evened(weights)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(64), atol=1e-12)
    blocks = complements(rotation.T @ np.diag(weights) @ rotation)
    assert sum(np.trace(block) for block in blocks) <= weights.sum() * (1 + 1e-9)


@pytest.mark.parametrize("name", ["halves", "pairs"])
def test_what_a_channel_is_counted_in_does_not_matter(name: str) -> None:
    keys, queries, turns = covariances(1), covariances(2), turns_of(ROPES[name](), 64)
    factors = np.ones(64)
    pair = (5, 37) if name == "halves" else (10, 11)  # turned into each other: alike
    factors[[*pair]] = 100.0
    q, feedback = balanced_keys(queries, keys, turns)
    planted = queries / factors / factors[:, None], keys * factors * factors[:, None]
    other, same = balanced_keys(*planted, turns)
    np.testing.assert_allclose(other / factors[:, None], q / 100 ** (2 / 64), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(same, feedback, rtol=1e-5, atol=1e-7)


def test_channels_that_nobody_asks_for() -> None:
    keys, queries = covariances(1), covariances(2)
    for silent in (keys, queries):
        silent[:, 7], silent[:, :, 7] = 0, 0
    queries[1] = 0
    queries[1, 3, 3] = 1
    q, feedback = balanced_keys(queries, keys, [])
    assert np.isfinite(q.astype(np.float16)).all()
    assert np.isfinite(feedback.astype(np.float16)).all()
    with pytest.raises(ValueError, match="not finite"):
        balanced_keys(queries * np.nan, keys, [])


# What the first tokens do not show


def page_error(treatment: Treatment, precision: str, asked: np.ndarray, x: np.ndarray) -> float:
    """Error of keys or values ``[heads, tokens, dim]`` from pages, as it is asked for, of 1."""
    codec = codec_for(treatment.shape, 256, Precision.parse(precision), mx.float16, treatment)
    given = mx.array(x[:, :256], mx.float16)
    records = codec.encode(given, given)
    if treatment.parts[0]:
        said = codec.keys(records, mx.float32)[0].swapaxes(1, 2)
    else:
        said = codec.values(records, mx.float32)[0]
    errors = asked @ (np.array(said, np.float64) - np.array(given, np.float64)).swapaxes(1, 2)
    whole = asked @ (x[:, :256] - x[:, :256].mean(axis=1, keepdims=True)).swapaxes(1, 2)
    return float(np.sqrt(np.square(errors).mean() / np.square(whole).mean()))


def see(seen: Covariances, queries: np.ndarray, keys: np.ndarray) -> None:
    """Show queries ``[kv_heads, tokens, dim]`` that attend to keys, from position 64 on."""
    q, k = (mx.array(x[None], mx.float32) for x in (queries, keys))
    seen.add_queries(q, k, k, 64, 0.01)


@pytest.mark.parametrize("precision", ["K4V8", "fp16"])
@pytest.mark.parametrize("spread", [0.0, 1e-3])
def test_a_channel_that_is_all_but_constant_drowns_nobody(precision: str, spread: float) -> None:
    rng = np.random.default_rng(0)
    keys, queries = rng.standard_normal((2, 2, 576, 64))
    keys[..., 9] = 5 + spread * keys[..., 9]
    seen = Covariances()
    seen.add_keys(mx.array(keys[None], mx.float32), 64)
    see(seen, queries, keys)
    treatment = balanced(KVShape(2, 64, 64), seen, [], LayerWeights(), values=False)
    assert page_error(treatment, precision, queries, keys) < (0.15 if precision == "K4V8" else 0.02)


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("silent", [0.0, 1e-3, 0.1])
def test_a_channel_that_is_silent_at_first_drowns_nobody_later(keys: bool, silent: float) -> None:
    rng = np.random.default_rng(1)
    x, asked = rng.standard_normal((2, 2, 832, 64))
    seen, first = Covariances(), x[:, :576].copy()
    first[..., 9] *= silent
    given = mx.array(first[None], mx.float32)
    seen.add_keys(given, 64)
    seen.add_values(given, 64)
    see(seen, asked, x)
    alike = np.ones((2, 64))
    weights = LayerWeights(spread=Spread(alike, alike, alike, alike))
    turns = [] if keys else None
    treatment = balanced(KVShape(2, 64, 64), seen, turns, weights, not keys)
    precision = "K4V8" if keys else "K8V4"
    assert page_error(treatment, precision, asked, x[:, 576:]) < (0.4 if keys else 0.15)


# How queries attend


@pytest.mark.parametrize("scores", [2**22, 5000], ids=["blocks", "single queries"])
@pytest.mark.parametrize("scores_of_nothing", [False, True])
@pytest.mark.parametrize("calls", [(0, 700), (0, 300, 301, 302, 700), (0, 300, 300)])
def test_queries_and_values_count_by_attention(
    calls: tuple[int, ...], scores_of_nothing: bool, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the same sums in float64, for the queries that are looked at."""
    monkeypatch.setattr("pagedkv.calibration.moments.SCORES", scores)
    rng = np.random.default_rng(2)
    q = rng.standard_normal((1, 4, 700, 64))
    k, v = rng.standard_normal((1, 2, 700, 64)), rng.standard_normal((1, 2, 700, 48))
    sinks = np.array([1.0, 3.0, -2.0, 0.0]) if scores_of_nothing else None
    seen = Covariances()
    for start, end in itertools.pairwise(calls):
        given = (mx.array(x[:, :, low:end], mx.float32) for x, low in ((q, start), (k, 0), (v, 0)))
        seen.add_queries(*given, start, 0.5, None if sinks is None else mx.array(sinks))
    seen.add_values(mx.array(v[:, :, : calls[-1]], mx.float32), 0)
    queries, values, asks = attention_moments(q[0], k[0], v[0], calls, 0.5, sinks)
    np.testing.assert_allclose(seen.asks, asks, rtol=1e-4)
    np.testing.assert_allclose(seen.queries, queries, atol=1e-3 * np.abs(queries).max())
    np.testing.assert_allclose(seen.values, values, atol=1e-3 * np.abs(values).max())


def test_what_sinks_hold_does_not_matter() -> None:
    """They are in 16 bit, so not even what cannot be added up."""
    q, k, v = (mx.random.normal((1, 2, 400, 64), key=mx.random.key(i)) for i in range(3))
    lost = mx.where(mx.arange(400)[:, None] == 7, mx.inf, v)
    found = []
    for values in (v, lost):
        seen = Covariances()
        seen.add_queries(q, k, values, 0, 0.3)
        seen.add_values(values, 0)
        found.append(seen.values)
    np.testing.assert_array_equal(*found)


def test_heads_that_look_something_up_now_and_then_are_asked_when_they_do() -> None:
    """Nine in ten queries are large and look at the first tokens alone."""
    rng = np.random.default_rng(3)
    keys = rng.standard_normal((1, 640, 64))
    keys[0, :8, 0] = 40.0
    idle, busy = np.zeros(64), np.zeros(64)
    idle[0], busy[1] = 8.0, 6.0
    queries = np.where((np.arange(576) % 10 > 0)[:, None], idle, busy)[None]
    queries = queries + 0.1 * rng.standard_normal(queries.shape)
    q, k = (mx.array(x[None], mx.float32) for x in (queries, keys))
    seen, beside = Covariances(), Covariances()
    seen.add_queries(q, k, k, 64, 0.5)
    beside.add_queries(q, mx.zeros_like(k), k, 64, 0.5)  # nobody looks anywhere
    for found in (seen, beside):
        found.add_keys(k[:, :, 64:], 64)

    def error(treatment: Treatment) -> float:
        """Of scores of the busy, which are all that pages are read for."""
        return page_error(treatment, "K2V8", queries[:, ::10], keys[:, 64:])

    weighted, alike = (
        balanced(KVShape(1, 64, 64), found, [], LayerWeights(), values=False)
        for found in (seen, beside)
    )
    assert error(weighted) < 0.9 * error(alike)


# Errors that other channels make up for


def test_feedback_aims_at_the_least_error() -> None:
    """Given errors of the first channels, what all others should err by: linear algebra."""
    dim = 40
    weights = covariances(4, 1, dim)[0]
    feedback, size = feedback_for(weights), -(-dim // BLOCKS)
    rng = np.random.default_rng(0)
    for start in range(size, dim, size):
        made = rng.standard_normal(start)
        rest = -np.linalg.solve(weights[start:, start:], weights[start:, :start] @ made)
        moved = -feedback[start : start + size, :start] @ made
        np.testing.assert_allclose(moved, rest[:size], rtol=1e-8, atol=1e-10)
    mask = np.arange(dim)[:, None] // size > np.arange(dim) // size
    assert not feedback[~mask].any()
    assert feedback[mask].all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 72, 128])
def test_errors_are_made_up_for(bits: int, dim: int) -> None:
    rng = np.random.default_rng(dim + bits)
    weights = covariances(5, 2, dim, spread=0.3)
    feedback = mx.array(np.stack([feedback_for(head) for head in weights]), mx.float16)
    x = mx.array(rng.standard_normal((3, 2, dim, 128)) + 5, mx.float16)
    moved = compensated(x, feedback, 64, bits)
    assert (moved.dtype, moved.shape) == (mx.float16, x.shape)

    def rounded(numbers: Any) -> np.ndarray:
        codes, scales, biases = quantize(numbers, 64, bits)
        wide = [part.astype(mx.float32) for part in (scales, biases)]
        said = mx.dequantize(codes, *wide, group_size=64, bits=bits)
        return np.array(said, np.float64)

    def cost(numbers: Any) -> float:
        e = rounded(numbers) - np.array(x, np.float64)
        return float(np.einsum("phct,hcd,phdt->", e, weights, e))

    assert cost(moved) < (0.75 if bits == 2 else 0.6) * cost(x)
    # Block by block, in float64.
    size, true = -(-dim // BLOCKS), np.array(x, np.float64)
    want = true.copy()
    for start in range(0, dim, size):
        part = slice(start, start + size)
        errors = rounded(mx.array(want, mx.float16))[:, :, :start] - true[:, :, :start]
        want[:, :, part] = (
            true[:, :, part] - np.array(feedback, np.float64)[:, part, :start] @ errors
        )
    np.testing.assert_array_equal(np.array(moved)[:, :, :size], np.array(x)[:, :, :size])
    # A number next to the middle between two codes may go to the other: then the rest differs.
    close = np.abs(np.array(moved, np.float64) - want) < 0.02
    assert close.mean() > 0.97
    # No page depends on which others are rounded with it.
    np.testing.assert_array_equal(np.array(compensated(x[1:2], feedback, 64, bits)), moved[1:2])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 72, 96, 128])
def test_errors_are_made_up_for_within_a_scale(bits: int, dim: int) -> None:
    group = 64 if dim % 64 == 0 else 32
    padding = -dim % group
    rng = np.random.default_rng(dim + bits)
    weights = covariances(5, 2, dim, spread=0.3)
    feedback = mx.array(np.stack([feedback_for(head) for head in weights]), mx.float16)
    x = mx.array(rng.standard_normal((3, 2, 128, dim)) + 0.5, mx.float16)
    moved = compensated_rows(x, feedback, group, bits)
    assert (moved.dtype, moved.shape) == (mx.float16, x.shape)

    def rounded(numbers: Any) -> tuple[np.ndarray, ...]:
        codes, scales, biases = quantize(
            mx.pad(numbers, [(0, 0)] * 3 + [(0, padding)]), group, bits
        )
        wide = [part.astype(mx.float32) for part in (scales, biases)]
        said = mx.dequantize(codes, *wide, group_size=group, bits=bits)[..., :dim]
        return np.array(said, np.float64), np.array(scales), np.array(biases)

    def cost(numbers: Any) -> float:
        e = rounded(numbers)[0] - np.array(x, np.float64)
        return float(np.einsum("phtc,hcd,phtd->", e, weights, e))

    for mine, theirs in zip(rounded(moved)[1:], rounded(x)[1:], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert cost(moved) < (0.8 if bits == 2 else 0.65) * cost(x)
    # Block by block, in float64.
    size, true = -(-dim // BLOCKS), np.array(x, np.float64)
    whole = np.pad(true, [(0, 0)] * 3 + [(0, padding)]).reshape(3, 2, 128, -1, group)
    low, high = (
        np.repeat(end(axis=-1), group, axis=-1)[..., :dim] for end in (whole.min, whole.max)
    )
    want = true.copy()
    for start in range(size, dim, size):
        part = slice(start, start + size)
        errors = rounded(mx.array(want, mx.float16))[0][..., :start] - true[..., :start]
        gains = np.array(feedback, np.float64)[:, part, :start].swapaxes(1, 2)
        aim = np.clip(true[..., part] - errors @ gains, low[..., part], high[..., part])
        at_end = (true[..., part] == low[..., part]) | (true[..., part] == high[..., part])
        want[..., part] = np.where(at_end, true[..., part], aim)
    np.testing.assert_array_equal(np.array(moved)[..., :size], np.array(x)[..., :size])
    close = np.abs(np.array(moved, np.float64) - want) < 0.02
    assert close.mean() > 0.97
    np.testing.assert_array_equal(
        np.array(compensated_rows(x[1:2], feedback, group, bits)), moved[1:2]
    )


def test_no_feedback_moves_nothing() -> None:
    x = mx.array(np.random.default_rng(0).standard_normal((1, 1, 64, 64)), mx.float16)
    zero = mx.zeros((1, 64, 64), mx.float16)
    assert mx.array_equal(compensated(x, zero, 64, 4), x).item()
    assert mx.array_equal(compensated_rows(x, zero, 64, 4), x).item()

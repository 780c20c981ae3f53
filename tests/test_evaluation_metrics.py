"""What `pagedkv eval` says of two predictions and of a series, against numpy."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from pagedkv.tools.evaluation import Comparison, Series, fit_slope, log_probabilities
from pagedkv.tools.evaluation.metrics import compare
from pagedkv.tools.evaluation.slope import _slopes


def float64(logits: np.ndarray) -> np.ndarray:
    """log softmax."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("distance", "most"), [(1e-4, 0.02), (1e-3, 1e-3), (0.1, 1e-4), (1.0, 1e-5), (30.0, 1e-5)]
)
def test_metrics_equal_a_float64_reference(distance: float, most: float) -> None:
    """Even of a KL of 5e-9, where the probabilities differ in their last bits."""
    rng = np.random.default_rng(0)
    own = (4 * rng.standard_normal((32, 5000))).astype(np.float32)
    other = (own + distance * rng.standard_normal(own.shape)).astype(np.float32)
    targets = rng.integers(0, 5000, 32)
    found = compare(log_probabilities(mx.array(own)), mx.array(other), mx.array(targets))
    p, q = float64(own), float64(other)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    assert np.allclose(np.array(found.kl), kl, rtol=most, atol=0)
    assert np.allclose(np.array(found.loss), -q[np.arange(32), targets], rtol=1e-5)
    assert np.array_equal(np.array(found.flips), own.argmax(-1) != other.argmax(-1))


def test_equal_predictions_have_no_kl_at_all() -> None:
    logits = mx.random.normal((4, 1000), key=mx.random.key(0)).astype(mx.float16)
    found = compare(log_probabilities(logits), logits, mx.array([0, 1, 2, 3]))
    assert mx.max(mx.abs(found.kl)).item() == 0
    assert mx.sum(found.flips).item() == 0


def test_tokens_that_are_ruled_out() -> None:
    """-inf in both is no contribution; in the other one alone it is an infinite KL."""
    minus = -math.inf
    both = mx.array([[0.0, 1.0, minus]]), mx.array([[1.0, 1.0, minus]])
    kl = compare(log_probabilities(both[0]), both[1], mx.array([0])).kl.item()
    p, q = float64(np.array([[0.0, 1.0]])), float64(np.array([[1.0, 1.0]]))
    assert kl == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-5)
    mine, theirs = mx.array([[0.0, minus]]), mx.array([[0.0, 0.0]])
    assert compare(log_probabilities(theirs), mine, mx.array([0])).kl.item() == math.inf
    known = compare(log_probabilities(mine), theirs, mx.array([0])).kl.item()
    assert known == pytest.approx(math.log(2), rel=1e-6)


def test_a_summary_of_known_numbers() -> None:
    kl = np.arange(100.0)
    loss, reference = np.full(100, 2.0), np.full(100, 1.5)
    flips = (np.arange(100) % 10 == 0).astype(float)
    series = Series(50, kl, loss, flips, reference)
    found = series.summary(beyond=100)
    assert (found["first_position"], found["positions"], found["positions_all"]) == (100, 50, 100)
    assert found["kl_mean"] == np.arange(50.0, 100).mean()
    assert found["kl_mean_all"] == kl.mean()
    assert found["kl_p99"] == np.quantile(np.arange(50.0, 100), 0.99)
    assert found["kl_max"] == 99
    assert (found["flips"], found["top1_percent"]) == (5, 90.0)
    assert found["perplexity"] == pytest.approx(math.exp(2))
    assert found["perplexity_percent"] == pytest.approx(100 * (math.exp(0.5) - 1))
    assert series.summary(beyond=0)["first_position"] == 50
    assert series.summary(beyond=1000)["positions"] == 0
    assert series.binned_kl(40) == [19.5, 59.5, 89.5]


def test_what_is_not_finite_is_counted() -> None:
    part = Comparison(mx.array([0.0, math.nan]), mx.array([1.0, 1.0]), mx.array([0.0, 0.0]))
    series = Series.of(0, [part, part], [mx.array([1.0, 1.0])] * 2)
    assert series.broken == 2
    assert not series.finite


# The slope


def noise(seed: int, count: int = 2048) -> np.ndarray:
    """Positive, skewed, and with neighbours that have much in common, as KL is."""
    rng = np.random.default_rng(seed)
    x = np.zeros(count)
    for i in range(1, count):
        x[i] = 0.8 * x[i - 1] + rng.standard_normal()
    return np.exp(0.5 * x)


def test_the_slope_is_that_of_least_squares() -> None:
    y = noise(0, 500)
    assert fit_slope(y, 0).slope == pytest.approx(np.polyfit(np.arange(500), y, 1)[0])


def test_a_series_without_a_trend_is_called_flat_nearly_always() -> None:
    flat = sum(fit_slope(noise(seed), 0, resamples=400).flat for seed in range(100))
    assert 85 <= flat <= 99  # 95 % is what is promised


def test_a_trend_is_found_and_lies_in_the_interval() -> None:
    trend = 2e-3
    found = [fit_slope(noise(s) + trend * np.arange(2048), 0, resamples=400) for s in range(50)]
    assert not any(slope.flat for slope in found)
    assert sum(slope.low <= trend <= slope.high for slope in found) >= 42


def test_the_interval_is_as_wide_as_theory_has_it_for_independent_values() -> None:
    count = 4096
    error = 1 / math.sqrt(count * (count**2 - 1) / 12)  # of the slope, for noise of size 1
    found = [
        fit_slope(np.random.default_rng(seed).standard_normal(count), seed) for seed in range(10)
    ]
    widths = [(slope.high - slope.low) / (2 * 1.96 * error) for slope in found]
    assert 0.92 < np.mean(widths) < 1.08


def test_single_values_would_promise_too_much() -> None:
    """Why blocks are drawn: one by one, half the series without a trend would show one."""
    flat = sum(fit_slope(noise(seed), 0, block=1, resamples=200).flat for seed in range(50))
    assert flat <= 35


def test_the_slope_is_the_same_for_the_same_seed() -> None:
    y = noise(3)
    assert fit_slope(y, 5) == fit_slope(y, 5)
    assert fit_slope(y, 5) != fit_slope(y, 6)
    with pytest.raises(ValueError, match="fewer than two blocks"):
        fit_slope(y[:100], 0)


def test_slopes_of_samples_whose_middle_is_elsewhere() -> None:
    x, y = np.random.default_rng(0).random((2, 5, 300))
    sums = np.stack([x, y, x * x, x * y]).sum(axis=2)
    expected = [np.polyfit(a, b, 1)[0] for a, b in zip(x, y, strict=True)]
    assert np.allclose(_slopes(sums, 300), expected)

"""Treated layers behind a whole cache: their pages hold transformed keys and values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv.allocator import KVShape
from pagedkv.attn.backends import Backend, CpuBackend, KernelBackend
from pagedkv.attn.driver import DECODE_TOKENS
from pagedkv.attn.fused import self_check as kernel_check
from pagedkv.attn.fused.self_check import attend_difference
from pagedkv.cache.persistence.snapshot import page_records
from pagedkv.tiers import Treatment
from pagedkv.tiers.codec.rounding import to_16_bit
from tests import reference
from tests.emulator import HostLauncher
from tests.kernel_cases import Case, codecs, with_feedback
from tests.test_attention import ROUNDING, config, error, queries
from tests.test_fused import LADDER, Untrusted, output
from tests.test_kernels import plant

SHAPE = KVShape(2, 64, 64)


def random_scales(seed: int) -> np.ndarray:
    """Between 1/4 and 4."""
    steps = np.random.default_rng(seed).uniform(-2, 2, (SHAPE.kv_heads, SHAPE.key_dim))
    return np.exp2(steps)


SCALED = Treatment.scaled(SHAPE, random_scales(1), random_scales(2), seed=5)
TREATMENT = with_feedback(SCALED)


def tokens_of(count: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(count)
    keys, values = rng.standard_normal((2, 1, 2, count, 64)).astype(np.float32)
    keys[..., ::17] = 6 * keys[..., ::17] + 20
    return mx.array(keys).astype(dtype), mx.array(values).astype(dtype)


def filled(
    settings: pagedkv.TierConfig,
    count: int,
    dtype: mx.Dtype = mx.float16,
    backend: Backend | None = None,
    treatment: Treatment = TREATMENT,
) -> pagedkv.PagedCache:
    """A one-layer cache on the emulated GPU, filled in chunks; its layer is treated."""
    cache = pagedkv.PagedCache.standalone(1, settings)
    layer = cache[0]
    layer._backend = backend or KernelBackend(HostLauncher())
    layer._context.pager.treatments[0] = treatment
    keys, values = tokens_of(count, dtype)
    for start in range(0, count, 700):
        part = slice(start, start + 700)
        layer.append(keys[:, :, part], values[:, :, part])
        layer._settle()
    assert layer.treatment is treatment
    return cache


def plain(cache: pagedkv.PagedCache) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values as queries meet them: those of pages transformed back, in float64."""
    keys, values = reference.stored(cache[0])
    pages = slice(cache[0].sink_tokens, cache[0].sink_tokens + cache[0]._table.tokens)
    queries, outputs = (
        np.array(x).astype(np.float64)
        for x in (cache[0].treatment.queries, cache[0].treatment.outputs)
    )
    keys[:, pages] = keys[:, pages] @ queries.swapaxes(1, 2)
    values[:, pages] = values[:, pages] @ outputs
    return keys, values


def check(cache: pagedkv.PagedCache, q: mx.array, sinks: mx.array | None = None) -> None:
    expected = reference.attention(
        np.asarray(q.astype(mx.float32))[0],
        *plain(cache),
        q.shape[-1] ** -0.5,
        None,
        None if sinks is None else np.asarray(sinks).astype(np.float64),
    )
    # A prompt's queries, hot tokens and outputs are rounded once more, in the pages' channels.
    roundings = 2 if q.shape[2] > DECODE_TOKENS else 1
    assert error(output(cache, q, sinks), expected) < roundings * ROUNDING[q.dtype]


@pytest.mark.parametrize(
    ("count", "rotation"), [(556, "householder"), (1580, "fourier"), (4660, "hadamard")]
)
def test_every_length_of_context(count: int, rotation: str) -> None:
    treatment = with_feedback(Treatment.plain(SHAPE, rotation))
    cache = filled(config(kv="K4V4"), count, treatment=treatment)
    for length in (1, 5, 30):
        check(cache, queries(4, length, 64, mx.float16))


def test_bfloat16() -> None:
    cache = filled(config(kv="fp16:300,K4V4"), 1200, mx.bfloat16)
    for length in (1, 8, 40):
        check(cache, queries(4, length, 64, mx.bfloat16))


def test_a_step_on_metal() -> None:
    backend = KernelBackend(HostLauncher(fetch_ahead=False, target="metal"))
    check(filled(config(kv="K4V4"), 900, backend=backend), queries(4, 2, 64, mx.float16))


@pytest.mark.parametrize("length", [1, 8])
def test_placement_does_not_change_a_bit(length: int) -> None:
    sinks = mx.array(np.random.default_rng(3).standard_normal(6).astype(np.float32))
    settings = config(kv=LADDER, warm="64MB", cold="64MB")
    q = queries(6, length, 64, mx.float16)
    warm, cold = filled(settings, 2200), filled(replace(settings, warm="300KB"), 2200)
    assert cold.stats().cold.pages > 2
    for logits in (sinks, None):
        check(cold, q, logits)
        assert mx.array_equal(output(warm, q, logits), output(cold, q, logits)).item()
    warm.close()
    cold.close()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kv", ["K4V2", "fp16"])
def test_pages_are_sealed_as_the_codec_does(dtype: mx.Dtype, kv: str) -> None:
    """Coded pages are made from float16, 16-bit ones keep the cache's type.

    Where errors are made up for, numbers next to the border between two codes may differ
    (`test_compensate_equals_plain_mlx`).
    """
    kernel, composed = (filled(config(kv=kv), 1400, dtype, x, SCALED) for x in (None, CpuBackend()))
    assert kernel.stats().warm.pages == 5
    for ours, theirs in zip(page_records(kernel[0]), page_records(composed[0]), strict=True):
        assert mx.array_equal(ours, theirs).item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_dense_keys_and_values_are_as_in_pages(dtype: mx.Dtype) -> None:
    cache = filled(config(kv="K8V4"), 900, dtype)
    layer = cache[0]
    view = layer.view()
    dense = layer._backend.fused.expand(view.pager, view.entries, view.hot, view.sinks, dtype)
    hot = (TREATMENT.page_keys(view.keys[0]), TREATMENT.page_values(view.values[0]))
    for out, stored, tokens in zip(dense, reference.stored(layer), hot, strict=True):
        tail = np.asarray(to_16_bit(tokens, dtype).astype(mx.float32))
        paged = stored[:, 4 : 4 + layer._table.tokens]
        expected = np.concatenate([tail[:, :4], paged, tail[:, 4:]], axis=1)
        assert error(out, expected) < ROUNDING[dtype]


def test_a_layer_is_treated_from_one_step_to_the_next() -> None:
    """What was planned and compiled for plain pages is not used for treated ones."""
    cache = filled(config(kv="K4V4"), 900)
    layer, q = cache[0], queries(4, 1, 64, mx.float16)
    layer._pager.treatment = None
    output(cache, q)
    layer._pager.treatment = TREATMENT
    check(cache, q)


@pytest.mark.parametrize("count", [100, 200])
def test_hot_tokens_alone(count: int) -> None:
    """No page at all: nothing is treated, and no split is a page's, even if it is the only one."""
    cache = filled(config(kv="K4V4"), count)
    layer, q = cache[0], queries(4, 2, 64, mx.float16)
    view = layer.view()
    assert not view.entries
    given = (view.pager, (), view.hot, q, 0.125, True, None, lambda: None, tuple)
    keys, values = reference.stored(layer)
    expected = reference.attention(np.asarray(q.astype(mx.float32))[0], keys, values, 0.125)
    assert error(layer._backend.fused.attend(*given), expected) < ROUNDING[mx.float16]


def test_what_will_be_read_is_what_is_read() -> None:
    cache = filled(config(kv="K4V4", warm="300KB", cold="64MB"), 2200)
    layer = cache[0]
    fused, view = layer._backend.fused, layer.view()
    coming = fused.cold_batches(view.pager, view.entries, view.hot.used, 2)
    table = fused._table
    check(cache, queries(4, 1, 64, mx.float16))
    assert coming and fused._table is table
    cache.close()


def test_kernels_are_checked_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "results", {})
    cache = filled(config(kv="fp16:600,K4V2"), 1400, backend=KernelBackend(Untrusted()))
    for length in (1, 20):
        check(cache, queries(4, length, 64, mx.float16))
    called = sorted(name.split("_")[1] for name in kernel_check.results)
    assert called == ["attend", "compensate", "compensate", "expand", "seal", "seal"]
    assert not any(kernel_check.results.values()), kernel_check.results


CHECKED = Case(("K4V4", "fp16"), heads=2, key_dim=64, repeats=3, together=True, treated=True)


def check_alone() -> float:
    return attend_difference(HostLauncher(), CHECKED.spec(True), codecs(CHECKED))


def test_the_check_lets_a_right_kernel_pass() -> None:
    assert check_alone() < kernel_check.TOLERANCE[mx.float16]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("treat.h", "row * (DIM / 2) + pair)", "(row ^ 1) * (DIM / 2) + pair)"),
        ("treat.h", "head * (VALUE_DIM * VALUE_DIM / 2)", "0 * head"),
        ("attend.h", "if (treated)", "if (treated && head == 0)"),
        ("attend.h", "number < page_splits);", "true);"),
    ],
)
def test_the_check_finds_wrong_ones(
    file: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant((file, old, new), tmp_path / "kernels", monkeypatch)
    assert not check_alone() < kernel_check.TOLERANCE[mx.float16]

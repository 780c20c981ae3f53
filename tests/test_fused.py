"""The kernels behind a whole cache: sealing, decoding and prefill, in the emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv.attn.backends import KernelBackend
from pagedkv.attn.driver import attend
from pagedkv.attn.fused import self_check as kernel_check
from pagedkv.attn.fused.decode import _slabs
from pagedkv.attn.kernels.source import KernelText
from pagedkv.cache.persistence.snapshot import page_records
from pagedkv.tiers.pages.warm_slab import WarmSlab
from tests import reference
from tests.emulator import HostLauncher
from tests.test_attention import ROUNDING, config, error, queries

LADDER = "K8V8:500,K4V4:900,K3V2"


def filled(settings: pagedkv.TierConfig, tokens: int, dtype: mx.Dtype) -> pagedkv.PagedCache:
    """A one-layer cache on the emulated GPU, filled in chunks."""
    cache = pagedkv.PagedCache.standalone(1, settings)
    cache[0]._backend = KernelBackend(HostLauncher())
    rng = np.random.default_rng(tokens)
    keys = rng.standard_normal((1, 2, tokens, 64)).astype(np.float32)
    keys[..., ::17] = 6 * keys[..., ::17] + 20
    values = rng.standard_normal((1, 2, tokens, 64)).astype(np.float32)
    for start in range(0, tokens, 700):
        part = slice(start, start + 700)
        k, v = (mx.array(x[:, :, part]).astype(dtype) for x in (keys, values))
        cache[0].append(k, v)
        cache[0]._settle()
    return cache


def output(cache: pagedkv.PagedCache, q: mx.array, sinks: mx.array | None = None) -> mx.array:
    layer = cache[0]
    out = attend(layer.view(), q, q.shape[-1] ** -0.5, "causal", sinks, layer._backend)
    mx.eval(out)
    return out


def check(cache: pagedkv.PagedCache, q: mx.array, sinks: mx.array | None = None) -> None:
    keys, values = reference.stored(cache[0])
    expected = reference.attention(
        np.asarray(q.astype(mx.float32))[0],
        keys,
        values,
        q.shape[-1] ** -0.5,
        None,
        None if sinks is None else np.asarray(sinks).astype(np.float64),
    )
    out = output(cache, q, sinks)
    assert out.dtype == q.dtype
    assert error(out, expected) < ROUNDING[q.dtype]


@pytest.mark.parametrize("tokens", [301, 556, 812, 1580, 4660])
def test_every_length_of_context(tokens: int) -> None:
    """One split and many, in whole pages and in parts of them, and a prefill chunk."""
    cache = filled(config(kv="K4V4"), tokens, mx.float16)
    for length in (1, 5, 30):
        check(cache, queries(4, length, 64, mx.float16))


def test_bfloat16() -> None:
    cache = filled(config(kv="fp16:300,K4V4"), 1200, mx.bfloat16)
    for length in (1, 40):
        check(cache, queries(4, length, 64, mx.bfloat16))


def test_pages_are_sealed_as_the_codec_does() -> None:
    """The tests run on the CPU, where the codec is MLX's own arithmetic: the same bits."""
    composed = pagedkv.PagedCache.standalone(1, config(kv="K4V2"))
    rng = np.random.default_rng(5)
    x = mx.array(rng.standard_normal((1, 2, 1400, 64)).astype(np.float16))
    kernel = pagedkv.PagedCache.standalone(1, config(kv="K4V2"))
    kernel[0]._backend = KernelBackend(HostLauncher())
    for cache in (composed, kernel):
        cache[0].append(x, 2 * x)
        cache[0]._settle()
    assert kernel.stats().warm.pages == 5
    for ours, theirs in zip(page_records(kernel[0]), page_records(composed[0]), strict=True):
        assert mx.array_equal(ours, theirs).item()


def test_a_trimmed_page_counts_its_valid_tokens() -> None:
    cache = filled(config(kv="K4V4"), 1580, mx.float16)
    cache.trim(600)
    check(cache, queries(4, 1, 64, mx.float16))
    new = mx.array(np.random.default_rng(8).standard_normal((1, 2, 20, 64)).astype(np.float16))
    cache[0].append(new, new)
    for length in (1, 8, 20):
        check(cache, queries(4, length, 64, mx.float16))


@pytest.mark.parametrize("length", [1, 8])
def test_placement_does_not_change_a_bit(length: int) -> None:
    """The same ladder all warm, and with nearly everything on disk."""
    sinks = mx.array(np.random.default_rng(3).standard_normal(6).astype(np.float32))
    settings = config(kv=LADDER, warm="64MB", cold="64MB")
    q = queries(6, length, 64, mx.float16)
    warm = filled(settings, 2200, mx.float16)
    cold = filled(replace(settings, warm="300KB"), 2200, mx.float16)
    assert cold.stats().cold.pages > 2
    for cache in (warm, cold):
        check(cache, q, sinks)
    for logits in (sinks, None):
        assert mx.array_equal(output(warm, q, logits), output(cold, q, logits)).item()
    warm.close()
    cold.close()


def test_tables_follow_the_pages() -> None:
    """A table on the device is made anew when pages move, are lowered or are dropped."""
    cache = filled(config(kv="K8V4:600,K4V4", warm="64MB"), 1000, mx.float16)
    rng = np.random.default_rng(1)
    for n in (1, 200, 1, 300, 1, 400):
        x = mx.array(rng.standard_normal((1, 2, n, 64)).astype(np.float16))
        cache[0].append(x, x)
        cache[0]._settle()
        check(cache, queries(4, 1, 64, mx.float16))
        cache.trim(n // 3)
        check(cache, queries(4, 1, 64, mx.float16))


def test_a_number_that_is_used_again_is_another_page() -> None:
    """A page is dropped, and another gets its number in another slot, between two steps."""
    cache = filled(config(kv="K4V4", warm="64MB"), 1600, mx.float16)
    layer = cache[0]
    check(cache, queries(4, 1, 64, mx.float16))
    before = layer.view().entries
    cache.trim(1600 - 4 - 256 * (len(before) - 1))  # all of the last page, and what is hot
    layer._pager._slabs[pagedkv.Precision(4, 4)].take()  # as if another sequence had sealed
    rng = np.random.default_rng(9)
    x = mx.array(rng.standard_normal((1, 2, 400, 64)).astype(np.float16))
    layer.append(x, x)
    layer._settle()
    after = layer.view().entries
    assert [e.page for e in after] == [e.page for e in before]
    check(cache, queries(4, 1, 64, mx.float16))


def test_a_step_of_the_ladder_without_pages() -> None:
    """Metal takes small arrays from another address space: an empty slab must not be passed."""
    cache = pagedkv.PagedCache.standalone(1, config(kv="K8V4:5000,K4V4"))
    launcher = HostLauncher(fetch_ahead=False, target="metal")
    cache[0]._backend = KernelBackend(launcher)
    x = mx.array(np.random.default_rng(4).standard_normal((1, 2, 900, 64)).astype(np.float16))
    cache[0].append(x, x)
    cache[0]._settle()
    assert [int(slab.size > 0) for slab in cache[0]._pager.slabs] == [1, 0]
    for length in (1, 20):
        check(cache, queries(4, length, 64, mx.float16))


def test_what_the_kernels_are_not_made_for_goes_the_composed_way() -> None:
    cache = filled(config(kv="K4V4"), 1000, mx.float16)
    layer = cache[0]
    keys, values = reference.stored(layer)
    q = queries(4, 3, 64, mx.float16)
    keep = np.random.default_rng(2).random((3, 1000)) < 0.7
    mask = np.where(keep, 0.0, -np.inf)
    out = attend(layer.view(), q, 0.125, mx.array(keep)[None, None], None, layer._backend)
    expected = reference.attention(np.asarray(q.astype(mx.float32))[0], keys, values, 0.125, mask)
    assert error(out, expected) < ROUNDING[mx.float16]


class Untrusted(HostLauncher):
    """As a GPU's launcher is: kernels are checked first; `spoil` makes outputs wrong."""

    def __init__(self, spoil: str = "") -> None:
        super().__init__()
        self.trusted = False
        self._spoil = spoil

    def launch(self, text: KernelText, *rest: Any, **named: Any) -> list[mx.array]:
        out = super().launch(text, *rest, **named)
        if self._spoil and self._spoil in text.name:
            out[0] = out[0] ^ 0x11111111 if out[0].dtype == mx.uint32 else 1.1 * out[0]
        return out


def checked(spoil: str = "") -> pagedkv.PagedCache:
    cache = pagedkv.PagedCache.standalone(1, config(kv="K8V4:600,K4V4"))
    cache[0]._backend = KernelBackend(Untrusted(spoil))
    x = mx.array(np.random.default_rng(6).standard_normal((1, 2, 1400, 64)).astype(np.float16))
    cache[0].append(x, x)
    cache[0]._settle()
    return cache


def test_kernels_are_checked_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "results", {})
    cache = checked()
    for length in (1, 20):
        check(cache, queries(4, length, 64, mx.float16))
    called = sorted(name.split("_")[1] for name in kernel_check.results)
    assert called == ["attend", "expand", "seal", "seal"]
    assert not any(kernel_check.results.values()), kernel_check.results


@pytest.mark.parametrize("kernel", ["attend", "merge", "expand", "seal"])
def test_a_kernel_that_fails_its_check_is_not_used(
    monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    monkeypatch.setattr(kernel_check, "results", {})
    with pytest.warns(UserWarning, match="is not used on this machine"):  # noqa: PT031
        cache = checked(kernel)
        for length in (1, 20):
            check(cache, queries(4, length, 64, mx.float16))
    bad = [name for name, reason in kernel_check.results.items() if reason]
    assert bad and all(name.split("_")[1] in (kernel, "attend") for name in bad)


def test_what_stands_in_for_a_slab_without_slots_has_its_type() -> None:
    """Another type would be another kernel under the same name."""
    cache = filled(config(kv="K4V4", cold="64MB"), 1200, mx.float16)
    pager = cache[0]._pager
    assert pager is not None
    for precision, slab in list(pager._slabs.items()):
        pager._slabs[precision] = WarmSlab(slab.page_bytes, slab.max_slots)
    pager._sized = False
    assert [slab.dtype for slab in _slabs(pager)] == [mx.uint32]
    assert all(slab.size >= 8 for slab in _slabs(pager))

"""What a prefill chunk costs on the kernel path: waits, memory, and what is seen of a failure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

import pagedkv
from pagedkv.attn.backends import KernelBackend
from pagedkv.attn.kernels.source import KernelText
from tests.models import random_tokens, tiny_llama
from tests.test_in_place import reserve, slab_addresses

LAYERS = 6
CONFIG = pagedkv.TierConfig(
    hot_tokens=64, sink_tokens=4, kv="K4V4", page_tokens=256, warm="64MB", cold=0
)


class Lazy:
    """Kernels that are as lazy as a GPU's, and give zeros."""

    fetch_ahead, traceable, trusted = True, False, True

    def launch(
        self,
        text: KernelText,
        inputs: Sequence[mx.array],
        groups: tuple[int, int, int],
        threads: int,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        first = mx.stack([x.reshape(-1)[0].astype(mx.float32) for x in inputs if x.size]).min()
        return [mx.zeros(s, d) + 0 * first.astype(d) for s, d in zip(shapes, dtypes, strict=True)]


def wrapped(tokens: int, kv: str = "K4V4") -> tuple[Any, pagedkv.PagedCache]:
    """A model and its cache behind such kernels, with some tokens."""
    model = tiny_llama(layers=LAYERS)
    model.set_dtype(mx.float16)
    cache = pagedkv.wrap(model, replace(CONFIG, kv=kv))
    for layer in cache.paged_layers:
        layer._backend = KernelBackend(Lazy())
        for start in range(0, tokens, 1000):
            x = mx.zeros((1, 2, min(1000, tokens - start), 16), mx.float16)
            layer.append(x, x)
            layer._settle()
    return model, cache


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The evaluations that are asked for, by name, in order."""
    calls: list[str] = []

    def note(name: str) -> None:
        real = getattr(mx, name)

        def noted(*args: Any) -> Any:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(mx, name, noted)

    for name in ("eval", "async_eval", "synchronize"):
        note(name)
    return calls


def test_no_layer_waits_before_the_next_one_is_under_way(calls: list[str]) -> None:
    """Per layer and chunk one wait, for the layer behind, when this layer's queries have begun."""
    model, cache = wrapped(700)
    reserve(cache, 12)
    before = slab_addresses(cache)
    calls.clear()
    out = model(random_tokens(600), cache=cache)
    queries = attention = pages = "async_eval"
    first, each, end = [queries, attention], [queries, "eval", pages, attention], ["eval", pages]
    assert calls == [*first, *each * (LAYERS - 1), *end]
    mx.eval(out)
    assert cache.stats().warm.pages == LAYERS * 4
    assert slab_addresses(cache) == before


def test_lowering_waits_once_however_many_pages(calls: list[str]) -> None:
    model, cache = wrapped(2000, "K8V8:1000,K4V4")
    lowered = cache.stats().pages_lowered
    for layer in cache.paged_layers:
        for slab in layer._pager._slabs.values():
            slab.reserve(16)  # growing waits as well, but seldom
    calls.clear()
    mx.eval(model(random_tokens(1300), cache=cache))
    assert cache.stats().pages_lowered >= lowered + LAYERS * 3
    assert calls.count("eval") == 2 * LAYERS + 1


@pytest.mark.parametrize("chunk", [16, 500])
def test_one_layers_pages_are_expanded_at_a_time(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Whether a chunk makes pages due or not."""

    def cheap(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        return q + (k[:, :1, -1:] + v[:, :1, -1:])

    monkeypatch.setattr(sys.modules["pagedkv.attn.driver"], "stock_attention", cheap)
    model, cache = wrapped(90_000)
    sealed = cache.stats().pages_sealed
    mx.eval(model(random_tokens(16), cache=cache))
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model(random_tokens(chunk), cache=cache))
    assert (cache.stats().pages_sealed > sealed) == (chunk == 500)
    expanded = cache.offset * 2 * (16 + 16) * 2
    assert expanded < mx.get_peak_memory() - active < 1.5 * expanded


def test_a_page_that_cannot_be_lowered_takes_the_call_back_from_every_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layer behind is sealed in the next layer's attention: that one takes back its own."""
    model = tiny_llama(layers=3)
    ladder = replace(CONFIG, kv="K8V8:400,K4V4", cold="64MB")
    with pagedkv.wrap(model, ladder) as cache:
        mx.eval(model(random_tokens(900), cache=cache))
        for layer in cache.paged_layers:

            def fails(*_: object) -> int:
                raise pagedkv.ColdStoreError("the disk is gone")

            with monkeypatch.context() as patched:
                patched.setattr(layer._pager, "lower", fails)
                with pytest.raises(pagedkv.ColdStoreError, match="gone"):
                    model(random_tokens(400), cache=cache)
            assert [c.offset for c in cache] == [900] * 3
        mx.eval(model(random_tokens(400), cache=cache))
        assert [c.offset for c in cache] == [1300] * 3

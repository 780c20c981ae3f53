"""The in-place rule, by address: nothing larger than the hot buffer is ever copied by a step."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from tests.models import random_tokens, tiny_llama

CONFIG = pagedkv.TierConfig(
    hot_tokens=64, sink_tokens=4, kv="K4V4", page_tokens=256, warm="8MB", cold="64MB"
)


def address(array: mx.array) -> int:
    mx.eval(array)
    return int(np.asarray(array).__array_interface__["data"][0])


def slab_addresses(cache: pagedkv.PagedCache) -> list[int]:
    return [address(s.array) for layer in cache.paged_layers for s in layer._pager._slabs.values()]


def reserve(cache: pagedkv.PagedCache, pages: int) -> None:
    """Grow the slabs first: growing is the one thing that may move them."""
    for layer in cache.paged_layers:
        for slab in layer._pager._slabs.values():
            slots = [slab.take() for _ in range(pages)]
            for slot in slots:
                slab.give(slot)


def test_sealing_writes_in_place() -> None:
    model = tiny_llama()
    with pagedkv.wrap(model, CONFIG) as cache:
        mx.eval(model(random_tokens(700), cache=cache))
        reserve(cache, 12)
        before = slab_addresses(cache)
        sealed = cache.stats().pages_sealed
        for chunk in (300, 500, 1, 1, 300):
            mx.eval(model(random_tokens(chunk, seed=chunk), cache=cache))
        assert cache.stats().pages_sealed >= sealed + 2 * 3
        assert slab_addresses(cache) == before


def test_sealing_in_the_decode_pipeline_writes_in_place() -> None:
    """As generate does it: the next step is built while the last one is still under way."""
    model = tiny_llama()
    with pagedkv.wrap(model, CONFIG) as cache:
        mx.eval(model(random_tokens(570), cache=cache))
        reserve(cache, 12)
        before = slab_addresses(cache)
        sealed = cache.stats().pages_sealed
        token = mx.array([[1]])
        for _ in range(300):
            token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
            mx.async_eval(token)
        mx.eval(token)
        assert cache.stats().pages_sealed == sealed + 4
        assert slab_addresses(cache) == before


def test_a_decode_step_copies_at_most_the_hot_buffer() -> None:
    model = tiny_llama()
    with pagedkv.wrap(model, CONFIG) as cache:
        mx.eval(model(random_tokens(2000), cache=cache))
        token = mx.array([[1]])
        mx.eval(model(token, cache=cache))
        slabs = slab_addresses(cache)
        hot = [[address(a) for a in layer._hot.arrays] for layer in cache.paged_layers]
        stayed = 0
        for _ in range(10):
            mx.eval(model(token, cache=cache))
            now = [[address(a) for a in layer._hot.arrays] for layer in cache.paged_layers]
            stayed += now == hot
            hot = now
        assert slab_addresses(cache) == slabs
        assert stayed == 10  # nothing was in flight, so not even the hot buffer moved


def test_a_held_graph_makes_a_copy_and_stays_right() -> None:
    """A caller who keeps unevaluated logits across a seal gets the old contents, not the new."""
    model = tiny_llama()
    tokens = random_tokens(900)
    with pagedkv.wrap(model, CONFIG) as cache:
        mx.eval(model(tokens, cache=cache))
        expected = model(mx.array([[5]]), cache=cache)
        mx.eval(expected)
        cache.trim(1)
        held = model(mx.array([[5]]), cache=cache)  # not evaluated
        cache.trim(1)
        mx.eval(model(random_tokens(600, seed=2), cache=cache))  # seals, over and over
        mx.eval(model(random_tokens(600, seed=3), cache=cache))
        assert mx.array_equal(held, expected).item()


@pytest.mark.parametrize("length", [1, 40])
def test_a_fork_and_its_parent_do_not_see_each_others_tokens(length: int) -> None:
    model = tiny_llama()
    with pagedkv.wrap(model, CONFIG) as cache:
        mx.eval(model(random_tokens(900), cache=cache))
        fork = cache.fork()
        tables = [layer._table for c in (cache, fork) for layer in c.paged_layers]
        for layer in cache.paged_layers:
            mine = [t for t in tables if t._allocator is layer._pager.allocator]
            layer._pager.check(mine)
        a = model(random_tokens(length, seed=1), cache=cache)
        b = model(random_tokens(length, seed=2), cache=fork)
        mx.eval(a, b)
        again = cache.fork()
        again.trim(length)
        assert mx.array_equal(model(random_tokens(length, seed=2), cache=again), b).item()
        assert not mx.array_equal(a, b).item()
        fork.close()
        again.close()

"""Memory pressure: pages leave early, memory is given back, and no bit of any token changes."""

from __future__ import annotations

import sys
from dataclasses import replace

import mlx.core as mx
import pytest

import pagedkv
from pagedkv import PagedCache, attention
from pagedkv.tiers import memory_pressure as pressure
from pagedkv.tiers.memory_pressure import Memory, Pressure

PAGE = 32768
CONFIG = pagedkv.TierConfig(
    hot_tokens=64, sink_tokens=4, page_tokens=256, warm="4MB", cold="64MB", keep_free=1000
)


class Machine:
    """A machine with as much memory left as a test says, and its clock."""

    def __init__(self, left: int = 2**40) -> None:
        self.left, self.level, self.now = left, 1, 0.0

    def ask(self) -> Memory:
        return Memory(self.left, level=self.level)

    def tick(self) -> float:
        self.now += pressure.INTERVAL  # every look is a new one
        return self.now


def opened(machine: Machine, config: pagedkv.TierConfig = CONFIG, layers: int = 2) -> PagedCache:
    cache = PagedCache.standalone(layers, config)
    cache.context.pager.pressure = Pressure(config.budget().keep_free, machine.ask, machine.tick)
    return cache


def step(cache: PagedCache, count: int, seed: int) -> mx.array:
    """So many tokens through all layers."""
    x = mx.random.normal((1, 2, count, 32), key=mx.random.key(seed))
    for layer in cache.paged_layers:
        x = attention(x, x, x, cache=layer, scale=0.2)
    mx.eval(x)
    return x


def feed(cache: PagedCache, pages: range, *forks: PagedCache) -> list[mx.array]:
    """One page of tokens at a time, and one token after each."""
    out = []
    for i in pages:
        out += [step(cache, 256, i), step(cache, 1, 1000 + i)]
        for layer in cache.paged_layers:
            layer._pager.check([layer._table, *(twin[layer.layer]._table for twin in forks)])
    return out


@pytest.mark.parametrize("kv", ["K4V4", "K8V4:700,K4V4"])
def test_pressure_moves_pages_and_changes_no_bit(kv: str) -> None:
    config = replace(CONFIG, kv=kv)
    with opened(Machine(), config) as cache:
        expected = feed(cache, range(14))
        calm = cache.stats()
    assert (calm.memory_pressure, calm.pages_demoted_for_pressure) == ("none", 0)
    assert calm.cold.pages == 0
    machine = Machine()
    with opened(machine, config) as cache:
        got = feed(cache, range(7))
        before = cache.stats()
        machine.left = 999
        got += feed(cache, range(7, 12))
        pressed = cache.stats()
        machine.left = 2**40
        got += feed(cache, range(12, 14))
        after = cache.stats()
    assert all(mx.array_equal(a, b).item() for a, b in zip(got, expected, strict=True))
    assert before.pages_demoted_for_pressure == 0
    assert pressed.memory_pressure == "high"
    assert pressed.warm.allocated < before.warm.allocated
    assert pressed.warm_bytes_returned == before.warm.allocated - pressed.warm.allocated
    assert pressed.pages_demoted_for_pressure == pressed.pages_demoted > 0
    assert pressed.cold.pages == pressed.pages_demoted
    assert (after.memory_pressure, after.pages_demoted) == ("none", pressed.pages_demoted)
    assert after.warm.allocated > pressed.warm.allocated  # it may grow again


def test_slabs_stop_growing_first() -> None:
    with opened(Machine(left=10), layers=1) as cache:
        feed(cache, range(9))
        stats = cache.stats()
    assert stats.warm.allocated == 2 * PAGE
    assert stats.warm.pages + stats.cold.pages == 8  # the last one is in the hot window


def test_a_fork_sees_its_pages_after_a_slab_shrank() -> None:
    machine = Machine()
    with opened(machine) as cache:
        feed(cache, range(10))
        fork = cache.fork()
        expected = step(fork, 1, 7)
        fork.trim(1)
        machine.left = 0
        feed(cache, range(10, 14), fork)
        assert cache.stats().warm_bytes_returned > 0
        assert mx.array_equal(step(fork, 1, 7), expected).item()
        fork.close()


@pytest.mark.parametrize("cold", [0, 6 * PAGE])
def test_no_token_is_refused_for_want_of_memory(cold: int) -> None:
    """Without a disk, or with a full one, the warm budget is used as if nothing was."""
    config = replace(CONFIG, warm=6 * PAGE * 3 // 2, cold=cold)
    total = 6 + cold // PAGE
    with opened(Machine(left=0), config, layers=1) as cache:
        feed(cache, range(total + 1))  # one is in the hot window
        stats = cache.stats()
        assert stats.warm.pages + stats.cold.pages == total
        with pytest.raises(pagedkv.OutOfPagesError):
            feed(cache, range(2))


def test_a_trim_brings_back_no_more_than_there_is_room_for() -> None:
    machine = Machine()
    with opened(machine, layers=1) as cache:
        feed(cache, range(6))
        machine.left = 0
        feed(cache, range(6, 14))
        taken = cache.stats().warm.allocated
        cache.trim(257 * 3)
        step(cache, 1, 1)
        assert cache.stats().warm.allocated <= taken
        assert cache.stats().cold.pages > 0


def test_the_machine_is_asked_seldom() -> None:
    machine = Machine(left=500)
    felt = Pressure(1000, machine.ask, lambda: machine.now)
    assert felt.name == "none"
    for _ in range(100):
        assert felt.high
    assert (felt.samples, felt.name) == (1, "high")
    machine.left = 1100  # enough to begin with, not enough to end it
    machine.now += pressure.INTERVAL
    assert felt.high
    machine.left = 1300
    assert felt.high
    machine.now += pressure.INTERVAL
    assert not felt.high
    machine.level = pressure.WARNING
    machine.now += pressure.INTERVAL
    assert felt.high
    assert felt.samples == 4


def test_zero_never_looks() -> None:
    def never() -> Memory:
        raise AssertionError

    felt = Pressure(0, never)
    assert (felt.high, felt.name) == (False, "off")


def test_no_token_without_a_page_asks() -> None:
    with opened(Machine()) as cache:
        feed(cache, range(3))
        asked = cache.context.pager.pressure.samples
        for _ in range(50):
            step(cache, 1, 1)
        assert cache.context.pager.pressure.samples == asked


def test_the_real_machine_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    memory = pressure.machine_memory()
    assert 0 < memory.left <= memory.available
    assert (memory.level is None) == (sys.platform != "darwin")
    assert memory.level in (None, 1, 2, 4)


def test_bad_values_are_refused() -> None:
    with pytest.raises(pagedkv.ConfigError, match="keep_free"):
        pagedkv.TierConfig(keep_free="much")

"""What happens when something goes wrong half way, or is used in an unusual order."""

from __future__ import annotations

import copy
import gc
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import pagedkv
from pagedkv.tiers import ColdReader, FileColdStore
from pagedkv.tiers.cold import record as records
from tests.models import random_tokens, tiny_llama

CONFIG = pagedkv.TierConfig(
    hot_tokens=64, sink_tokens=4, kv="K4V4", page_tokens=256, warm="200KB", cold="64MB"
)


def test_a_damaged_page_takes_the_call_back_from_every_layer() -> None:
    model = tiny_llama(layers=3)
    with pagedkv.wrap(model, CONFIG) as cache:
        mx.eval(model(random_tokens(3000), cache=cache))
        mx.eval(model(random_tokens(1), cache=cache))
        store = cache.context.pager.cold
        store.flush()
        cache.context.pager.reader.close()
        file = next(store.directory.glob("layer-0001*"))
        good = file.read_bytes()
        file.write_bytes(good[:50] + bytes([good[50] ^ 1]) + good[51:])
        for _ in range(2):
            with pytest.raises(pagedkv.CorruptPageError, match="layer 1"):
                mx.eval(model(random_tokens(1, seed=2), cache=cache))
            assert [layer.offset for layer in cache] == [3001] * 3
        file.write_bytes(good)
        mx.eval(model(random_tokens(1, seed=2), cache=cache))
        assert [layer.offset for layer in cache] == [3002] * 3


def test_a_draft_models_cache_in_the_same_list_keeps_its_own_tiers() -> None:
    """mlx-lm's server appends the draft model's cache to the model's, and copies the list."""
    model, draft = tiny_llama(layers=2), tiny_llama(layers=1, seed=4)
    cache = pagedkv.wrap(model, CONFIG)
    pagedkv.wrap(draft, CONFIG)
    cache += make_prompt_cache(draft)
    for m, part in ((model, cache[:2]), (draft, cache[2:])):
        mx.eval(m(random_tokens(1500), cache=part))
    twin = copy.deepcopy(cache)
    for m, ours, theirs in ((model, cache[:2], twin[:2]), (draft, cache[2:], twin[2:])):
        assert theirs[0]._pager is ours[0]._pager
        a, b = (m(random_tokens(30, seed=9), cache=c) for c in (ours, theirs))
        assert mx.array_equal(a, b).item()


def test_wrapped_here_and_used_in_another_thread() -> None:
    model = tiny_llama()
    cache = pagedkv.wrap(model, CONFIG)
    done: list[int] = []

    def work() -> None:
        mx.eval(model(random_tokens(1200), cache=cache))
        done.append(cache.offset)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1200]


def test_what_a_dropped_cache_held_is_free_for_the_next_one() -> None:
    model = tiny_llama(layers=1)
    config = pagedkv.TierConfig(**{**CONFIG.to_dict(), "warm": "100KB", "cold": 0})
    keeper = pagedkv.wrap(model, config)

    def fill() -> int:
        cache = model.make_cache()
        with pytest.raises(pagedkv.OutOfPagesError):
            while True:
                mx.eval(model(random_tokens(100), cache=cache))
        return int(cache.offset)

    first = fill()
    gc.collect()
    assert fill() == first > 500
    keeper.close()


def test_a_write_that_fails_in_any_way_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileColdStore(None, 2**24, 1, 2 * 16384)
    page = np.zeros(16384, np.uint8)

    def fails(page: Any) -> Any:
        raise MemoryError("no memory to pack")

    monkeypatch.setattr("pagedkv.tiers.cold.writer.pack", fails)
    for i in range(2):
        store.put(0, i, (4, 4, 256), page)
    with pytest.raises(pagedkv.OutOfPagesError, match="no memory to pack"):
        store.put(0, 2, (4, 4, 256), page)
    monkeypatch.setattr("pagedkv.tiers.cold.writer.pack", records.pack)
    assert store.room(0, 16384) > 0  # asking tries again
    store.put(0, 2, (4, 4, 256), page)
    store.flush()
    assert store.last_error is None
    store.close()


def test_an_interrupted_read_gives_its_buffer_back_only_when_it_is_over() -> None:
    store = FileColdStore(None, 2**24, 1, 8 * 16384)
    pages = [np.full(16384, i, np.uint8) for i in range(2)]
    first, second = (store.put(0, i, (4, 4, 256), p) for i, p in enumerate(pages))
    store.flush()
    reader = ColdReader(store, 16384)
    gate, real = threading.Event(), store._read

    def slow(records: Any, out: Any) -> None:
        gate.wait()
        real(records, out)

    store._read = slow  # type: ignore[method-assign]
    ticket = reader._require((first,))

    class Interrupted:
        def done(self) -> bool:
            return False

        def result(self) -> None:
            raise KeyboardInterrupt

        add_done_callback = ticket.done.add_done_callback

    ticket.done, real_done = Interrupted(), ticket.done  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        reader._wait(ticket)
    threading.Timer(0.2, gate.set).start()
    (got,) = [b.copy() for b in reader.stream([(second,)])]
    assert real_done.done()
    assert np.array_equal(got, pages[1])
    store.close()


def test_read_ahead_keeps_up_when_pages_are_sealed_all_the_time() -> None:
    model = tiny_llama(layers=2)
    with pagedkv.wrap(model, CONFIG) as cache:
        mx.eval(model(random_tokens(1500), cache=cache))
        for seed in range(12):  # every call seals a page and changes the batches
            mx.eval(model(random_tokens(256, seed=seed), cache=cache))
            mx.eval(model(random_tokens(1), cache=cache))
        before = cache.stats()
        for _ in range(10):
            mx.eval(model(random_tokens(1), cache=cache))
        after = cache.stats()
        asked = after.read_ahead_hits + after.read_ahead_misses
        asked -= before.read_ahead_hits + before.read_ahead_misses
        assert asked >= 20
        reader = cache.context.pager.reader
        live = {r for layer in cache for b in layer._cold_batches() for r in b}
        assert all(set(batch) <= live for batch in reader._tickets)


def test_a_saved_cache_is_not_loaded_under_other_sinks(tmp_path: Path) -> None:
    model = tiny_llama()
    path = tmp_path / "any.name"
    with pagedkv.wrap(model, CONFIG) as cache:
        mx.eval(model(random_tokens(700), cache=cache))
        cache.save(str(path))
    other = pagedkv.TierConfig(**{**CONFIG.to_dict(), "sink_tokens": 8})
    pagedkv.unwrap(model)
    with pytest.raises(pagedkv.CacheStateError, match="saved with 4 sink tokens"):
        pagedkv.load(path, model, other)
    assert "make_cache" not in model.__dict__  # a load that fails leaves nothing behind
    assert pagedkv.load(path, model).offset == 700
    pagedkv.unwrap(model)


def test_a_failed_wrap_keeps_the_wrapping_there_was() -> None:
    model = tiny_llama()
    pagedkv.wrap(model, CONFIG)
    with pytest.raises(pagedkv.ConfigError):
        pagedkv.wrap(model, pagedkv.TierConfig(warm=10))
    assert model.make_cache().context.config == CONFIG
    pagedkv.unwrap(model)


def test_forking_a_closed_cache_is_refused() -> None:
    cache = pagedkv.wrap(tiny_llama(), CONFIG)
    cache.close()
    with pytest.raises(pagedkv.ClosedError):
        cache.fork()


def test_numbers_beyond_float16_are_clamped_and_not_infinite() -> None:
    with pagedkv.PagedCache.standalone(1, CONFIG) as cache:
        k = mx.full((1, 2, 900, 64), 1e6)
        v = mx.random.normal((1, 2, 900, 64))
        q = mx.random.normal((1, 2, 900, 64)) * 1e-6
        out = pagedkv.attention(q, k, v, cache=cache[0], scale=1.0)
        step = pagedkv.attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], cache=cache[0], scale=1.0)
        assert mx.isfinite(out).all().item()
        assert mx.isfinite(step).all().item()


@pytest.mark.parametrize(
    "bad",
    [
        {"q": (1, 3, 1, 64)},
        {"q": (1, 2, 2, 64)},
        {"mask": "diagonal"},
        {"sinks": (3,)},
        {"k": (1, 2, 0, 64), "v": (1, 2, 0, 64)},
    ],
)
def test_attention_with_bad_arguments_changes_nothing(bad: dict[str, Any]) -> None:
    with pagedkv.PagedCache.standalone(1, CONFIG) as cache:
        good = {"q": (1, 2, 1, 64), "k": (1, 2, 1, 64), "v": (1, 2, 1, 64)}
        given = {n: v if isinstance(v, str) else mx.zeros(v) for n, v in {**good, **bad}.items()}
        with pytest.raises(pagedkv.ShapeError):
            pagedkv.attention(cache=cache[0], scale=1.0, **given)
        assert cache.offset == 0


def test_a_closed_cache_takes_nothing_more() -> None:
    """Not even tokens of a shape that it took before."""
    layer = pagedkv.PagedCache.standalone(1, pagedkv.TierConfig(cold=0))[0]
    x = mx.zeros((1, 2, 1, 64))
    for _ in range(3):
        layer.append(x, x)
    layer.close()
    with pytest.raises(pagedkv.ClosedError):
        layer.append(x, x)

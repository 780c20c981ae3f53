"""Prefixes: found by what they hold, shared and not copied, also by the next process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pagedkv
from pagedkv.allocator import PrefixIndex, prefix_digests, prefix_key
from tests.models import random_tokens, tiny_llama

KEY = prefix_key("a model", 256)
UNIT, SINKS, HOT = 256, 4, 64


def config(cold_dir: Path | None = None, **others: Any) -> pagedkv.TierConfig:
    settings: dict[str, Any] = dict(hot_tokens=HOT, sink_tokens=SINKS, page_tokens=UNIT)
    settings.update(warm="400KB", cold="8MB", cold_dir=str(cold_dir) if cold_dir else None)
    return pagedkv.TierConfig(**{**settings, **others})


def ids(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in random_tokens(n, seed)[0].tolist()]


def read(model: Any, cache: pagedkv.PagedCache, tokens: list[int]) -> mx.array:
    """Give the model what the cache does not hold yet, as generation does; the last logits."""
    logits = mx.zeros(())
    while cache.offset < len(tokens):
        logits = model(mx.array([tokens[cache.offset :][:512]]), cache=cache)[0, -1]
        mx.eval(logits)
    return logits


def check(cache: pagedkv.PagedCache) -> None:
    """Every page of every layer is held by those that should hold it, and by nobody else."""
    users = list(cache.context.pager.users)
    for pager in cache.context.pager.layer_pagers:
        pager.check([u._table for u in users if u._pager is pager])


# Digests

some_tokens = st.lists(st.integers(0, 2), max_size=40)


@given(some_tokens, some_tokens, st.integers(1, 4), st.integers(0, 3))
def test_digests_are_the_same_as_far_as_tokens_are(
    a: list[int], b: list[int], unit: int, first: int
) -> None:
    mine, theirs = (prefix_digests(KEY, tokens, unit, first) for tokens in (a, b))
    assert len(mine) == max(0, (len(a) - first) // unit)
    for i, (x, y) in enumerate(zip(mine, theirs, strict=False)):
        end = first + (i + 1) * unit
        assert (x == y) == (a[:end] == b[:end])
    assert not set(mine) & set(prefix_digests(prefix_key("another model", 256), a, unit, first))
    assert prefix_digests(KEY, a, unit, first, most=1) == mine[:1]


@pytest.mark.parametrize("wrong", [[-1], [2**63], ["1"], [1.5]])
def test_what_is_no_token_id_is_refused(wrong: list[Any]) -> None:
    with pytest.raises(pagedkv.ConfigError, match="integers from 0 up"):
        prefix_digests(KEY, wrong, 1)


@given(st.lists(st.tuples(st.integers(0, 5), some_tokens, st.booleans()), max_size=20), some_tokens)
def test_the_longest_common_prefix_is_found(
    steps: list[tuple[int, list[int], bool]], wanted: list[int]
) -> None:
    index: PrefixIndex[int] = PrefixIndex()
    known: dict[int, list[bytes]] = {}
    for name, tokens, goes in steps:
        if goes:
            index.remove(name)
            known.pop(name, None)
        else:
            known[name] = prefix_digests(KEY, tokens, 2)
            index.add(name, known[name])
    assert len(index) == len(known)
    digests = prefix_digests(KEY, wanted, 2)
    common = {n: sum(x == y for x, y in zip(d, digests, strict=False)) for n, d in known.items()}
    best, found = max(common.values(), default=0), index.longest(digests)
    assert (found is None) if not best else (found is not None and common[found[0]] == best)
    assert found is None or found[1] == best
    assert set(index.covered(digests)) == {n for n, d in known.items() if d and common[n] == len(d)}
    for name in list(known):
        index.remove(name)
    assert not index._holders and index.oldest is None


# In memory


def test_a_prefix_is_shared_and_the_rest_goes_on_as_in_a_fork() -> None:
    model, prompt = tiny_llama(), ids(1500)
    other = prompt[:1200] + ids(400, 1)
    with pagedkv.wrap(model, config()) as first:
        read(model, first, prompt)
        assert first.remember(prompt) == SINKS + 5 * UNIT
        twin = first.fork()
        twin.trim(1500 - SINKS - 4 * UNIT)
        pages = {p.layer: set(p.pages) for p in first.context.pager.layer_pagers}
        sealed = first.context.pager.counters.sealed
        with model.make_cache() as second:
            # 1,600 tokens less sinks and window are five pages; the fifth has other tokens.
            assert second.reuse(other) == SINKS + 4 * UNIT == second.offset
            check(second)
            assert {p.layer: set(p.pages) for p in first.context.pager.layer_pagers} == pages
            assert second.stats().pages_sealed == sealed
            assert second.stats().prefix_tokens_reused == SINKS + 4 * UNIT
            assert mx.array_equal(read(model, second, other), read(model, twin, other)).item()
            check(second)
        twin.close()
        # What has been shared is what it was.
        assert first.offset == 1500
        check(first)
    assert len(first.context.prefixes) == 1
    pagedkv.unwrap(model)
    assert len(first.context.prefixes) == 0


def test_logits_with_a_reused_prefix_are_those_of_the_stock_cache() -> None:
    model, prompt = tiny_llama(), ids(1200)
    expected = model(mx.array([prompt]))[0, -1]
    with pagedkv.wrap(model, config(kv="fp16", hot_dtype="model", warm="4MB")) as first:
        read(model, first, prompt)
        first.remember(mx.array(prompt))
        with model.make_cache() as second:
            assert second.reuse(prompt) == SINKS + 4 * UNIT
            assert mx.allclose(read(model, second, prompt), expected, atol=1e-4).item()
    pagedkv.unwrap(model)


def test_it_outlives_the_cache_and_gives_way_to_others() -> None:
    model, prompt = tiny_llama(), ids(1200)
    with pagedkv.wrap(model, config(warm="300KB", cold=0)) as cache:
        read(model, cache, prompt)
        cache.remember(prompt)
    pager = cache.context.pager
    assert sum(len(layer.pages) for layer in pager.layer_pagers) == 2 * 4
    with model.make_cache() as cache:
        assert cache.reuse(prompt) == SINKS + 4 * UNIT
    with model.make_cache() as cache:  # another text, that needs all the room there is
        room = pager.layer_pagers[0]._slabs[pager.layer_pagers[0].precisions[0]].max_slots
        long = ids(SINKS + HOT + room * UNIT, 5)
        read(model, cache, long)
        assert cache.stats().prefixes_remembered == 0
        assert cache.stats().warm.pages == 2 * room
        check(cache)
        with model.make_cache() as late:
            assert late.reuse(prompt) == 0
    pagedkv.unwrap(model)


def test_longer_sequences_take_the_place_of_their_beginnings() -> None:
    model, prompt = tiny_llama(layers=1), ids(1400)
    with pagedkv.wrap(model, config()) as cache:
        for length in (500, 900, 1400):
            read(model, cache, prompt[:length])
            cache.remember(prompt[:length])
            assert cache.stats().prefixes_remembered == 1
        read(model, cache, prompt)
        with model.make_cache() as short:
            read(model, short, prompt[:600])
            assert short.remember(prompt[:600]) == SINKS + 2 * UNIT
            assert short.stats().prefixes_remembered == 1
        cache.forget_prefixes()
        assert cache.stats().prefixes_remembered == 0
        check(cache)
    pagedkv.unwrap(model)


def test_only_what_is_certain_is_remembered() -> None:
    model, prompt = tiny_llama(layers=1), ids(1400)
    with pagedkv.wrap(model, config()) as cache:
        assert cache.remember([]) == 0
        read(model, cache, prompt[:300])
        assert cache.remember(prompt[:300]) == 0  # no page is sealed
        read(model, cache, prompt)
        assert cache.remember(prompt[:700]) == SINKS + 2 * UNIT  # as far as it was told
        with pytest.raises(pagedkv.CacheStateError, match="1,400 tokens"):
            cache.reuse(prompt)
        with pytest.raises(pagedkv.CacheStateError, match="one sequence"):
            cache.remember(mx.array([prompt]))
    with model.make_cache() as cache:
        assert cache.reuse([]) == cache.reuse(prompt[: SINKS + HOT + UNIT - 1]) == 0
        assert cache.reuse(prompt[: SINKS + HOT + UNIT]) == SINKS + UNIT
    pagedkv.unwrap(model)


def test_layers_that_are_not_paged_say_so() -> None:
    from mlx_lm.models import gemma3_text

    args = gemma3_text.ModelArgs(
        "gemma3_text", 64, 2, 128, 4, 16, vocab_size=100, sliding_window=32
    )
    args.sliding_window_pattern = 2
    model = gemma3_text.Model(args)
    with pagedkv.wrap(model, config()) as cache:
        model(mx.array([ids(600)]), cache=cache)
        assert cache.remember(ids(600)) == 0
        assert "cache 0" in cache.stats().prefix_reuse
        with model.make_cache() as other:
            assert other.reuse(ids(600)) == 0
    pagedkv.unwrap(model)


# On disk


def flushed(model: Any, tokens: list[int], tiers: pagedkv.TierConfig) -> pagedkv.StoredSequence:
    with pagedkv.wrap(model, tiers) as cache:
        read(model, cache, tokens)
        cache.remember(tokens)
        stored = cache.flush()
    pagedkv.unwrap(model)
    return stored


def test_another_process_goes_on_from_it(tmp_path: Path) -> None:
    prompt = ids(1500)
    script = f"""
import pagedkv
from pathlib import Path
from tests.models import tiny_llama
from tests.test_prefixes import config, flushed, ids
flushed(tiny_llama(), ids(1500), config(Path({str(tmp_path)!r})))
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
    model = tiny_llama()
    with pagedkv.wrap(model, config()) as cache:  # its window is 16 bit, and that of a long prompt
        read(model, cache, prompt)
        cache.trim(1500 - SINKS - 4 * UNIT)
        expected = read(model, cache, prompt[:1200] + ids(100, 3))
    pagedkv.unwrap(model)
    with pagedkv.wrap(model, config(tmp_path)) as cache:
        assert cache.reuse(prompt[:1200] + ids(100, 3)) == SINKS + 4 * UNIT
        check(cache)
        assert cache.stats().cold.pages == 2 * 4
        actual = read(model, cache, prompt[:1200] + ids(100, 3))
        assert mx.array_equal(actual, expected).item()
        assert cache.stats().pages_promoted == 2 * 4
        check(cache)
        # It is a sequence of its own: what was flushed is as it was, and both can stay.
        cache.remember(prompt[:1200] + ids(100, 3))
        cache.flush()
        assert sorted(s.tokens for s in cache.stored_sequences()) == [1300, 1500]
    pagedkv.unwrap(model)


@pytest.mark.parametrize("others", [{"prefix_salt": "mine"}, {"kv": "K8V8"}, {"sink_tokens": 8}])
def test_other_settings_share_nothing(tmp_path: Path, others: dict[str, Any]) -> None:
    model = tiny_llama()
    flushed(model, ids(1500), config(tmp_path))
    with pagedkv.wrap(model, config(tmp_path, **others)) as cache:
        assert cache.reuse(ids(1500)) == 0
    pagedkv.unwrap(model)
    different = tiny_llama(seed=1)
    with pagedkv.wrap(different, config(tmp_path)) as cache:
        assert cache.reuse(ids(1500)) == 0
    pagedkv.unwrap(different)


def test_tokens_that_came_in_the_place_of_others_are_not_taken_for_them(tmp_path: Path) -> None:
    model, prompt = tiny_llama(), ids(1500)
    changed = prompt[:600] + ids(900, 7)
    with pagedkv.wrap(model, config(tmp_path)) as cache:
        read(model, cache, prompt)
        cache.remember(prompt)
        cache.forget_prefixes()
        cache.trim(900)
        read(model, cache, changed)
        assert cache.flush().prefix  # the first two pages
    pagedkv.unwrap(model)
    with pagedkv.wrap(model, config(tmp_path)) as cache:
        assert cache.reuse(prompt) == SINKS + 2 * UNIT
    with model.make_cache() as cache:
        assert cache.reuse(changed) == SINKS + 2 * UNIT
    pagedkv.unwrap(model)


def test_a_damaged_sequence_is_computed_again(tmp_path: Path) -> None:
    model = tiny_llama()
    stored = flushed(model, ids(1500), config(tmp_path))
    with pagedkv.wrap(model, config(tmp_path)) as cache:
        (path,) = tmp_path.glob(f"*/sequence-{stored.sequence}.checkpoint")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1  # in the hot tokens
        path.write_bytes(data)
        with pytest.warns(UserWarning, match="computed again"):
            assert cache.reuse(ids(1500)) == 0
        check(cache)
        assert not any(layer.pages for layer in cache.context.pager.layer_pagers)
        read(model, cache, ids(1500))
    pagedkv.unwrap(model)


@pytest.mark.parametrize("page", [0, 3])
def test_a_damaged_page_is_found_while_its_tokens_can_be_computed(
    tmp_path: Path, page: int
) -> None:
    model = tiny_llama()
    flushed(model, ids(1500), config(tmp_path))
    with pagedkv.wrap(model, config(tmp_path)) as cache:
        files = sorted(tmp_path.glob("*/layer-0001-*.kv"))
        (size,) = {layer.least_page_bytes for layer in cache.context.pager.layer_pagers}
        with files[0].open("r+b") as file:
            file.seek(page * size + 1000)
            byte = file.read(1)
            file.seek(page * size + 1000)
            file.write(bytes([byte[0] ^ 4]))
        with pytest.warns(UserWarning, match=r"does not match its checksum.*computed again"):
            assert cache.reuse(ids(1500)) == 0
        check(cache)
        assert not mx.isnan(read(model, cache, ids(1500))).any().item()
    pagedkv.unwrap(model)


@pytest.mark.parametrize(("rate", "reused"), [(1e9, 0), (10.0, SINKS + 5 * UNIT)])
def test_it_is_loaded_only_where_that_is_quicker(tmp_path: Path, rate: float, reused: int) -> None:
    model = tiny_llama()
    stored = flushed(model, ids(1500), config(tmp_path))
    assert 0 < stored.prompt_rate < 1e9  # as it was when it was computed
    with pagedkv.wrap(model, config(tmp_path)) as cache:
        cache.context.prefixes.prompt_rate = rate
        assert cache.reuse(ids(1500)) == reused == cache.offset
        assert cache.stats().nvme_read_seconds > 0  # the disk's rate was measured
        check(cache)
        read(model, cache, ids(1500))
    pagedkv.unwrap(model)

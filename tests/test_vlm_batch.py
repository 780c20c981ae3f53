"""What mlx-vlm asks of batches: its generator, prefix cache, plan of memory and speculation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import pagedkv
from pagedkv.allocator import Precision
from pagedkv.cache.batch_cache import BatchPagedLayerCache
from tests import vlm_zoo
from tests.models import random_tokens, tiny_llama
from tests.vlm_package import load

generators = load("generate.ar")
TIERS = pagedkv.TierConfig(
    hot_tokens=64, sink_tokens=4, kv="K8V8", page_tokens=256, warm="300KB", cold="64MB",
    hot_dtype="model", treatment="none", layer_kv="same",
)  # fmt: skip
PLAIN, WINDOWS, RECURRENT, SHARED = "ernie4_5", "gemma3", "qwen3_5", "gemma3n"


class _Tokenizer:
    """A processor that ends nothing."""

    class stopping_criteria:  # an attribute of mlx-vlm's
        def __new__(cls, token: int) -> bool:  # type: ignore[misc]
            return False

        @staticmethod
        def add_eos_token_ids(ids: Any) -> None: ...


def prompts(*lengths: int) -> list[list[int]]:
    numbers = np.random.default_rng(1)
    return [numbers.integers(1, 115, n).tolist() for n in lengths]


def together(
    model: Any, texts: list[list[int]], later: int = 0, apc: Any = None, n: int = 10
) -> list[list[int]]:
    """Greedy answers of mlx-vlm's generator; the last `later` prompts come in the middle."""
    generator = generators.BatchGenerator(
        model, _Tokenizer(), max_tokens=n, prefill_step_size=128, prefill_batch_size=2,
        completion_batch_size=4, compute_logprobs=False, apc_manager=apc,
    )  # fmt: skip
    embed = next(m for m in model.modules() if isinstance(m, nn.Embedding))

    def insert(some: list[list[int]]) -> None:
        each = [{"inputs_embeds": embed(mx.array([t])), "_apc_semantic_hash": 7} for t in some]
        out.update((uid, []) for uid in generator.insert(some, prompt_kwargs=each))

    out: dict[int, list[int]] = {}
    insert(texts[: len(texts) - later])
    for step in range(100):
        for response in generator.next()[1]:
            out[response.uid].append(int(response.token))
        if step == 6:
            insert(texts[len(texts) - later :])
        if not generator.has_work:
            return [out[uid] for uid in sorted(out)]
    raise AssertionError("it does not end")


def alone(model: Any, texts: list[list[int]]) -> list[list[int]]:
    return [together(model, [text])[0] for text in texts]


def logits(model: Any, tokens: Any, cache: Any) -> mx.array:
    """Of the last token, evaluated."""
    out = model(mx.array(tokens), cache=cache).logits[:, -1]
    mx.eval(out)
    return out


# The generator


@pytest.mark.parametrize("kind", [PLAIN, WINDOWS, SHARED])
def test_rows_join_and_leave_and_each_is_as_by_itself(kind: str) -> None:
    model, texts = vlm_zoo.build(kind), prompts(300, 420, 77, 600)
    with pagedkv.wrap(model, TIERS) as cache:
        pager = cache.context.pager
        assert together(model, texts, later=1) == alone(model, texts)
        assert pager.counters.sealed and (pager.counters.demoted or kind == SHARED)
        pager.reclaim()
        assert not any(layer.pages for layer in pager.layer_pagers)
    pagedkv.unwrap(model)


def test_a_model_that_runs_padded_rows_by_themselves() -> None:
    """It takes rows out of the batch, and says what padding is left when they are back."""
    model, texts = vlm_zoo.build(RECURRENT), prompts(300, 420, 77)
    expected = together(model, texts, later=1)
    with pagedkv.wrap(model, pagedkv.TierConfig(**{**TIERS.to_dict(), "kv": "fp16"})):
        assert together(model, texts, later=1) == expected
    pagedkv.unwrap(model)


def test_what_quantizes_by_itself_is_refused() -> None:
    model = vlm_zoo.build(PLAIN)
    with pagedkv.wrap(model, TIERS), pytest.raises(NotImplementedError, match="PagedKVCache"):
        generators._make_cache(model, [0, 3], kv_bits=8)
    pagedkv.unwrap(model)


def test_rows_begin_where_their_columns_say() -> None:
    """Windows, padding before the first token, and rows that are nothing but padding yet."""
    with pagedkv.PagedCache.standalone(1, pagedkv.TierConfig(hot_dtype="model")) as base:
        for windows in (False, True):
            row = base[0].fork()
            if windows:
                row = pagedkv.sequence.window.WindowedLayerCache(row._context, 0, 32)
            batch = BatchPagedLayerCache.merge([row] * 3)
            batch.prepare(left_padding=[0, 50, 21])
            offsets = np.array([0, -50, -21])
            for n in (20, 25, 30, 1, 1):
                k = mx.random.normal((3, 1, n, 64))
                keys, _ = batch.update_and_fetch(k, k)
                offsets += n
                assert batch.offset.tolist() == offsets.tolist()
                assert batch._idx == offsets.max()
                assert batch.empty() is False
                used = mx.any(mx.array(keys) != 0, axis=(1, 3))
                for i, first in enumerate(batch.left_padding):
                    seen = used[i].tolist()
                    assert not any(seen[:first]) and all(seen[first:]), (windows, n, i)


def test_positions_that_rows_cannot_be_at_are_refused() -> None:
    with pagedkv.PagedCache.standalone(1, TIERS) as base:
        batch = BatchPagedLayerCache.merge([base[0].fork(), base[0].fork()])
        batch.offset = mx.array([0, -3])
        k = mx.ones((2, 1, 5, 64))
        batch.update_and_fetch(k, k)
        assert [row.offset for row in batch.rows] == [5, 2]
        for wrong in ([5, 3], [4, 2]):
            with pytest.raises(pagedkv.ShapeError, match=r"hold \[5, 2\] tokens"):
                batch.offset = mx.array(wrong)
        batch.left_padding = batch._idx - batch.offset
        with pytest.raises(pagedkv.ShapeError, match=r"columns \[0, 3\]"):
            batch.left_padding = mx.array([0, 2])


# The prefix cache


@pytest.mark.parametrize("kind", [PLAIN, WINDOWS, RECURRENT])
def test_prompts_that_begin_alike_share_pages(kind: str) -> None:
    model, apc = vlm_zoo.build(kind), load("apc")
    first, *more = prompts(700, 40, 90, 130)
    texts = [first, first + more[0], first + more[1], more[2]]
    with pagedkv.wrap(model, TIERS) as cache:
        expected, pager = alone(model, texts), cache.context.pager
        manager = apc.APCManager(num_blocks=64, block_size=16)
        assert together(model, texts[:1], apc=manager) == expected[:1]
        pager.reclaim()
        kept = sum(len(layer.pages) for layer in pager.layer_pagers)
        assert kept > 0
        assert together(model, texts[1:], apc=manager) == expected[1:]
        assert manager.stats.exact_hits >= 1 and manager.stats.matched_tokens >= 699
        assert manager.memory_plan.components and not any(
            each.fallback for each in manager.memory_plan.components
        )
        del manager
        pager.reclaim()
        assert not any(layer.pages for layer in pager.layer_pagers)
    pagedkv.unwrap(model)


@pytest.mark.parametrize("kind", [PLAIN, WINDOWS])
def test_a_snapshot_is_of_its_moment(kind: str) -> None:
    model = vlm_zoo.build(kind)
    with pagedkv.wrap(model, TIERS) as cache:
        logits(model, prompts(500), cache)
        snapshots = [layer.prefix_cache_snapshot() for layer in cache]
        expected = [logits(model, [[t]], cache) for t in (5, 7, 9)]
        for made in (list, lambda fresh: [type(c).__new__(type(c)) for c in fresh]):
            twin = made(model.make_cache())  # and as mlx-vlm makes copies
            for layer, snapshot in zip(twin, snapshots, strict=True):
                layer.prefix_cache_restore(snapshot)
                assert layer.prefix_cache_reserve(1000) == ()
            assert len({id(layer._context) for layer in twin}) == 1
            for t, out in zip((5, 7, 9), expected, strict=True):
                assert mx.array_equal(logits(model, [[t]], twin), out).item()
        fresh = model.make_cache()
        with pytest.raises(pagedkv.CacheStateError, match="layer 3 .* snapshot of layer 1"):
            fresh[3].prefix_cache_restore(snapshots[1])
        with pytest.raises(pagedkv.CacheStateError, match="holds 503 tokens"):
            cache[1].prefix_cache_restore(snapshots[1])
        with pytest.raises(pagedkv.CacheStateError, match="given a snapshot of a NoneType"):
            fresh[1].prefix_cache_restore({"state": [], "meta_state": ""})
        with pytest.raises(pagedkv.CacheStateError, match=r"hold \[503, 0\] tokens"):
            cache[1].prefix_cache_merge([cache[1], fresh[1]], [500, 0])
        again = pagedkv.wrap(model, TIERS)
        with pytest.raises(pagedkv.CacheStateError, match="wrapped as it was"):
            again[1].prefix_cache_restore(snapshots[1])
        again.close()
    pagedkv.unwrap(model)


# The plan of memory


@pytest.mark.parametrize("kind", [PLAIN, WINDOWS])
def test_the_plan_of_memory_is_what_is_taken(kind: str) -> None:
    model, components = vlm_zoo.build(kind), load("apc_adapters").cache_memory_components

    def bytes_now(rows: Any) -> int:
        stats = pagedkv.PagedCache.of(rows).stats()
        return stats.hot.allocated + stats.warm.bytes

    for cold in (0, "64MB"):
        settings = {**TIERS.to_dict(), "warm": "8MB", "cold": cold}
        with pagedkv.wrap(model, pagedkv.TierConfig(**settings)) as cache:
            assert all(profile.source_bytes == 0 for profile in components(cache, 0))
            for length in (100, 650, 900):
                logits(model, prompts(length - cache.offset), cache)
                now = components(cache, length)
                assert sum(profile.source_bytes for profile in now) == bytes_now(cache)
                planned = [sum(p.footprint(n, 128) for p in now) for n in (length, 1500)]
                page = sum(layer.page_bytes(Precision.parse("K8V8")) for layer in cache)
                if length > 100:
                    assert abs(planned[0] - bytes_now(cache)) <= page
            logits(model, prompts(600), cache)
            assert abs(planned[1] - bytes_now(cache)) <= 2 * page
            batch = [layer.merge([layer, layer]) for layer in cache]
            rows, single = components(batch, 1500, batch_size=2), components(cache, 1500)
            assert (rows[1].source_bytes, rows[1].bytes_per_token) == (
                single[1].source_bytes, single[1].bytes_per_token
            )  # fmt: skip
    pagedkv.unwrap(model)


def test_pages_on_disk_take_no_memory_of_the_plan() -> None:
    model = tiny_llama(layers=2)
    with pagedkv.wrap(model, TIERS) as cache:
        mx.eval(model(random_tokens(1800), cache=cache))
        stats = cache.stats()
        profiles = [layer.memory_profile(1800) for layer in cache]
        taken = sum(profile.source_bytes for profile in profiles)
        assert taken == stats.hot.allocated + stats.warm.bytes
        assert stats.cold.bytes > 0
        planned = sum(profile.footprint(1_000_000, 1) for profile in profiles)
        assert planned <= stats.hot.allocated + stats.warm.budget
    pagedkv.unwrap(model)


# Speculation


@pytest.mark.parametrize("kind", [PLAIN, WINDOWS])
@pytest.mark.parametrize(
    ("accepted", "block"), [([2], 5), ([1, 3], 5), ([4, 4], 5), ([0, 2], 5), ([1, 12], 16)]
)
def test_what_is_rejected_is_taken_back(kind: str, accepted: list[int], block: int) -> None:
    speculation, model = load("speculative.cache_state"), vlm_zoo.build(kind)
    texts, drafted = prompts(400, 330)[: len(accepted)], prompts(block)[0]
    with pagedkv.wrap(model, TIERS):
        expected, rows = [], []
        for text, count in zip(texts, accepted, strict=True):
            rows.append(model.make_cache())
            logits(model, [text], rows[-1])
            single = rows[-1].fork()
            logits(model, [drafted[: count + 1]], single)
            expected.append(logits(model, [[7]], single))
        cache = list(rows[0])
        if len(rows) > 1:
            cache = [layer.merge([r[i] for r in rows]) for i, layer in enumerate(rows[0])]
        for outcome in ("aborted", "accepted"):
            round_ = speculation.start_speculative_cache(cache, block)
            logits(model, [drafted] * len(rows), cache)
            if outcome == "aborted":
                round_.abort()
                continue
            speculation.rollback_speculative_cache(cache, round_, accepted, block)
        out = logits(model, [[7]] * len(rows), cache)
        assert mx.allclose(out, mx.concatenate(expected), atol=1e-4).item()
    pagedkv.unwrap(model)


def test_a_batch_that_cannot_take_back_says_so_and_stays() -> None:
    model = vlm_zoo.build(WINDOWS)
    with pagedkv.wrap(model, TIERS):
        rows = [model.make_cache() for _ in range(2)]
        for row, text in zip(rows, prompts(30, 400), strict=True):
            logits(model, [text], row)
        batch = [layer.merge([row[i] for row in rows]) for i, layer in enumerate(rows[0])]
        logits(model, [[1], [2]], batch)

        def offsets() -> list[list[int]]:
            return [[row.offset for row in layer.rows] for layer in batch]

        before, attempts = offsets(), list[Callable[[], Any]]()
        attempts.append(lambda: batch[0].trim(100))
        attempts.append(lambda: batch[1].trim(100))  # it could; the layers before it cannot

        def padded() -> None:
            batch[0].prepare(right_padding=[0, 100])
            batch[0].finalize()

        attempts.append(padded)
        for attempt in attempts:
            with pytest.raises(pagedkv.CacheStateError, match="row 1 of 401 tokens") as e:
                attempt()
            assert e.value.rows == (1,)
            assert offsets() == before
            batch[0]._padding = None
        assert {layer.trim(1) for layer in batch} == {1}
    pagedkv.unwrap(model)

"""Batches of several sequences: mlx-lm's protocol, its batch generator, and what can go wrong."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import cache as stock

import pagedkv
from pagedkv import PagedCache
from pagedkv.cache import batch_layout
from pagedkv.cache import sdpa_hook as hook
from pagedkv.cache.batch_cache import BatchPagedLayerCache
from pagedkv.cache.batch_layout import BatchView
from tests import model_zoo
from tests.batch_machine import BatchMachine
from tests.models import lively, random_tokens, tiny_llama
from tests.test_mlx_lm import sizes

HOT = pagedkv.TierConfig(hot_tokens=4096, hot_dtype="model")
TIERS = pagedkv.TierConfig(
    hot_tokens=64, sink_tokens=4, kv="K8V8", page_tokens=256, warm="210KB", cold="64MB",
    hot_dtype="model",
)  # fmt: skip


@pytest.mark.parametrize("way", ["tagged", "array mask", "dense"])
@pytest.mark.parametrize("kind", ["hot", "tiers"])
@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_calls_is_as_mlx_lm_and_as_each_row_alone(
    seed: int, kind: str, way: str
) -> None:
    machine = BatchMachine(seed, HOT if kind == "hot" else TIERS, way, exact=kind == "hot")
    for _ in range(25):
        machine.step()
    assert (machine.base.context.pager.counters.demoted > 0) == (kind == "tiers")
    machine.close()


# mlx-lm's batch generator


def alone(model: Any, prompt: list[int], n: int) -> list[int]:
    """What greedy decoding says to one prompt, by itself."""
    steps = generate_step(mx.array(prompt), model, max_tokens=n, prefill_step_size=256)
    return [int(token) for token, _ in steps]


def prompts(*lengths: int) -> list[list[int]]:
    return [random_tokens(n, seed=n)[0].tolist() for n in lengths]


def together(model: Any, texts: list[list[int]], n: int, later: int = 0) -> list[list[int]]:
    """The same of a batch; the last `later` prompts join when the others are answering."""
    generator = BatchGenerator(
        model, max_tokens=n, prefill_step_size=256, completion_batch_size=4, prefill_batch_size=2
    )
    try:
        first = len(texts) - later
        out: dict[int, list[int]] = {uid: [] for uid in generator.insert(texts[:first])}
        steps = 0
        while responses := generator.next_generated():
            for response in responses:
                out[response.uid].append(response.token)
            steps += 1
            if steps == 5 and later:
                out.update((uid, []) for uid in generator.insert(texts[first:]))
        return list(out.values())
    finally:
        generator.close()


def test_rows_join_and_leave_and_each_is_as_by_itself() -> None:
    model, texts = lively(tiny_llama(layers=3)), prompts(300, 900, 77, 513, 640)
    with pagedkv.wrap(model, TIERS) as cache:
        expected = [alone(model, text, 24) for text in texts]
        assert together(model, texts, 24, later=2) == expected
        assert len({token for row in expected for token in row}) > 20  # and not one for ever
        pager = cache.context.pager
        assert pager.counters.demoted > 0
        pager.reclaim()
        assert not any(layer.pages for layer in pager.layer_pagers)
    pagedkv.unwrap(model)


def test_with_everything_hot_a_batch_is_mlx_lms_batch() -> None:
    model, texts = tiny_llama(layers=2), prompts(30, 90, 7)

    def logprobs() -> list[mx.array]:
        generator = BatchGenerator(model, max_tokens=12, prefill_step_size=64)
        generator.insert(texts)
        rows: dict[int, list[mx.array]] = {}
        while responses := generator.next_generated():
            for response in responses:
                rows.setdefault(response.uid, []).append(response.logprobs)
        generator.close()
        return [mx.stack(rows[uid]) for uid in sorted(rows)]

    expected = logprobs()
    with pagedkv.wrap(model, HOT):
        for a, b in zip(logprobs(), expected, strict=True):
            assert mx.abs(a - b).max().item() < 1e-4
    pagedkv.unwrap(model)


@pytest.mark.parametrize("window_size", [None, 20])
@pytest.mark.parametrize("new", [1, 3])
def test_rows_with_windows_are_dense_as_each_is(new: int, window_size: int | None) -> None:
    """Without the hook, some rows within their window and some past its end."""
    scale, heads, dim = 0.3, 2, 64
    with PagedCache.standalone(1, replace(HOT, max_kv_size=64)) as cache:
        rows = []
        for i, length in enumerate((100, 40, 63, 64)):
            row = copy.deepcopy(cache[0])
            row.update_and_fetch(
                *mx.random.normal((2, 1, heads, length, dim), key=mx.random.key(i))
            )
            rows.append(row)
        batch = BatchPagedLayerCache.merge(rows)
        q, k, v = mx.random.normal((3, len(rows), heads, new, dim), key=mx.random.key(9))
        mask = batch.make_mask(new, window_size=window_size)
        sdpa = mx.fast.scaled_dot_product_attention
        together = sdpa(q, *batch.update_and_fetch(k, v), scale=scale, mask=mx.array(mask))
        for i, row in enumerate(rows):
            mask = row.make_mask(new, window_size=window_size)
            one = slice(i, i + 1)
            keys, values = row.update_and_fetch(k[one], v[one])
            alone = sdpa(q[one], keys, values, scale=scale, mask=mask)
            assert mx.allclose(together[one], alone, atol=1e-6).item(), i


KINDS: dict[str, dict[str, Any]] = {
    # It attends by itself: keys, values and the mask are arrays.
    "gemma2": dict(head_dim=32, num_key_value_heads=4),
    "stablelm": dict(rope_theta=1e4, partial_rotary_factor=0.25, layer_norm_eps=1e-5,
                     use_qkv_bias=True),
    "gemma3_text": dict(head_dim=32, sliding_window=64, sliding_window_pattern=2),
    "gpt_oss": dict(num_local_experts=2, num_experts_per_tok=1, sliding_window=64, head_dim=64),
    "lfm2": dict(norm_eps=1e-5, conv_bias=False, conv_L_cache=3, block_dim=64,
                 block_multiple_of=8, block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False,
                 layer_types=["conv", "full_attention"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_models(kind: str) -> None:
    """Layers that are not paged, and attention that does not go through the hook."""
    model, texts = lively(sizes(kind, **KINDS[kind])), prompts(300, 420, 77)
    with pagedkv.wrap(model, TIERS):
        expected = [alone(model, text, 10) for text in texts]
        assert together(model, texts, 10, later=1) == expected
    pagedkv.unwrap(model)


def test_no_step_of_a_batch_computes_dense_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = lively(tiny_llama(layers=2)), prompts(400, 500)
    with pagedkv.wrap(model, TIERS):
        expected = [alone(model, text, 5) for text in texts]
        monkeypatch.setattr(BatchView, "dense", None)
        monkeypatch.setattr(batch_layout, "_cut", None)  # nor a mask's array
        assert together(model, texts, 5) == expected
    pagedkv.unwrap(model)


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa", "minimax_m3_vl"])
def test_an_index_beside_the_keys(kind: str) -> None:
    """Models make keys depend on the index's, some of which has no values."""
    model, texts = model_zoo.build(kind), prompts(90, 140, 7)
    expected = together(model, texts, 6, later=1)
    with pagedkv.wrap(model, HOT):
        assert together(model, texts, 6, later=1) == expected
    unrounded = {**TIERS.to_dict(), "kv": "fp16", "hot_tokens": 16, "warm": "2MB"}
    with pagedkv.wrap(model, pagedkv.TierConfig(**unrounded)) as cache:
        texts = prompts(330, 400)
        expected = [alone(model, text, 6) for text in texts]
        answers = together(model, texts, 6)
        assert cache.context.pager.counters.sealed > 0
    # Blocks of an index are cut over a batch's columns, in mlx-lm's caches too.
    assert answers == expected or kind == "minimax_m3_vl"
    pagedkv.unwrap(model)


# Several rows in what `make_cache` gives


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "llama4", "lfm2", "deepseek_v32"])
def test_an_empty_cache_takes_rows_as_mlx_lms_does(kind: str) -> None:
    """Positions as one number, windows, chunks, recurrent layers, and lists of caches."""
    model, tokens = model_zoo.build(kind), random_tokens(3 * 340).reshape(3, 340)
    cuts = (0, 120, 338, 339, 340)

    def read(rows: mx.array, cache: Any) -> mx.array:
        parts = [model(rows[:, a:b], cache=cache) for a, b in itertools.pairwise(cuts)]
        mx.eval(parts, [c.state for c in cache])
        return mx.concatenate(parts, axis=1)

    expected = read(tokens, stock.make_prompt_cache(model))
    with pagedkv.wrap(model, HOT):
        out = read(tokens, stock.make_prompt_cache(model))
        assert mx.abs(out - expected).max().item() < 1e-4 * mx.std(expected).item()
    with pagedkv.wrap(
        model, replace(TIERS, hot_tokens=16, warm="300KB" if kind == "llama" else "600KB")
    ) as base:
        cache = stock.make_prompt_cache(model)
        out = read(tokens, cache)
        for i in range(3):
            single = read(tokens[i : i + 1], stock.make_prompt_cache(model))
            assert mx.abs(out[i] - single[0]).max().item() < 1e-4 * mx.std(expected).item()
        counters = base.context.pager.counters
        assert counters.sealed > 0 and (counters.demoted > 0 or kind != "llama")
        if kind != "lfm2":
            assert cache.trim(2) == 2 and cache.offset == 338
            again = cache.fork()
            for held in (cache, again):
                steps = [model(tokens[:, n : n + 1], cache=held) for n in (338, 339)]
                assert mx.abs(mx.concatenate(steps, axis=1) - out[:, 338:]).max().item() < 1e-3
            again.close()
        stats = cache.stats()
        assert stats.tokens == 3 * 340 and "3 rows" in stats.layers[-1]
        assert stats.decode_steps >= 2
        cache.close()
        base.context.pager.reclaim()
        assert not any(layer.pages for layer in base.context.pager.layer_pagers)
    pagedkv.unwrap(model)


def test_rows_of_a_cache_are_saved_and_loaded_as_mlx_lm_does_it(tmp_path: Path) -> None:
    model, path = tiny_llama(layers=2), str(tmp_path / "rows.safetensors")
    with pagedkv.wrap(model, TIERS) as cache:
        mx.eval(model(random_tokens(800).reshape(2, 400), cache=cache))
        stock.save_prompt_cache(path, cache)
        expected = model(mx.array([[1], [2]]), cache=cache)
        loaded = stock.load_prompt_cache(path)
        assert loaded[0].offset == 400
        assert mx.array_equal(model(mx.array([[1], [2]]), cache=loaded), expected).item()
        with pytest.raises(pagedkv.CacheStateError, match="PagedRowsKVCache"):
            cache.save(path)
        assert cache.remember([1] * 401) == 0
        assert "PagedRowsKVCache" in cache.stats().prefix_reuse
    pagedkv.unwrap(model)


def test_rows_come_to_an_empty_cache_alone() -> None:
    model, two = tiny_llama(layers=2), mx.zeros((2, 3), mx.int32)
    with pagedkv.wrap(model, TIERS):
        cache = model.make_cache()
        model(random_tokens(5), cache=cache)
        with pytest.raises(pagedkv.ShapeError, match=r"holds one sequence of 5 tokens: make a new"):
            model(two, cache=cache)
        cache.trim(5)
        assert mx.isfinite(model(two, cache=cache)).all().item()
        with pytest.raises(pagedkv.ShapeError, match="2 rows and was given keys of"):
            model(two[:1], cache=cache)
        closed = model.make_cache()
        closed.close()
        with pytest.raises(pagedkv.ClosedError):
            model(two, cache=closed)
        half = model.make_cache()
        k = mx.zeros((1, 2, 3, 16))
        half[1].update_and_fetch(k, k)
        with pytest.raises(pagedkv.ShapeError, match="layer 1 holds one sequence of 3 tokens"):
            model(two, cache=half)
    small = pagedkv.TierConfig(**{**TIERS.to_dict(), "warm": "330KB", "cold": 0})  # four pages
    with pagedkv.wrap(model, small) as cache:
        model(random_tokens(600).reshape(2, 300), cache=cache)
        with pytest.raises(pagedkv.OutOfPagesError, match="of row 1"):
            model(random_tokens(1200).reshape(2, 600), cache=cache)
        assert [layer.offset for layer in cache] == [300, 300]
        assert mx.isfinite(model(two, cache=cache)).all().item()
    pagedkv.unwrap(model)


# What is refused, and what goes wrong


def filled(model: Any, lengths: list[int]) -> list[Any]:
    """A batch of rows with so many tokens, one entry per layer."""
    rows = [model.make_cache() for _ in lengths]
    for row, n in zip(rows, lengths, strict=True):
        mx.eval(model(random_tokens(n, seed=n), cache=row))
    return [layer.merge([row[i] for row in rows]) for i, layer in enumerate(rows[0])]


def offsets(batch: list[Any]) -> list[list[int]]:
    return [[row.offset for row in layer.rows] for layer in batch]


def test_a_row_without_room_takes_nothing_from_the_others() -> None:
    model, step = tiny_llama(layers=2), mx.array([[1], [2], [3]])
    more = mx.broadcast_to(step, (3, 260))
    with pagedkv.wrap(model, TIERS):
        expected = model(more, cache=filled(model, [320, 70, 323]))
    config = pagedkv.TierConfig(**{**TIERS.to_dict(), "warm": "330KB", "cold": 0})  # four pages
    with pagedkv.wrap(model, config):
        batch = filled(model, [320, 70, 323])
        with pytest.raises(pagedkv.OutOfPagesError, match=r"of row 2 \(\+260; 3 rows\)") as e:
            model(more, cache=batch)
        assert e.value.rows == (2,)
        assert offsets(batch) == [[320, 70, 323]] * 2
        for layer in batch:
            layer.filter([0, 1])
        out = model(more[:2], cache=batch)
        assert offsets(batch) == [[580, 330]] * 2
        assert mx.abs(out - expected[:2]).max().item() < 1e-4
    pagedkv.unwrap(model)


def test_a_damaged_page_of_one_row_takes_the_call_back_from_all() -> None:
    model = tiny_llama(layers=3)
    with pagedkv.wrap(model, TIERS) as cache:
        batch = filled(model, [300, 700, 400])
        for layer in batch:
            layer.prepare(lengths=[1, 300, 300], right_padding=[299, 0, 0])
        mx.eval(model(random_tokens(900).reshape(3, 300), cache=batch))
        for layer in batch:
            layer.finalize()
        before = offsets(batch)
        step = mx.array([[1], [2], [3]])
        store = cache.context.pager.cold
        store.flush()
        cache.context.pager.reader.close()
        file = next(store.directory.glob("layer-0001*"))
        good = file.read_bytes()
        file.write_bytes(bytes(len(good)))
        for _ in range(2):
            with pytest.raises(pagedkv.CorruptPageError) as e:
                mx.eval(model(step, cache=batch))
            assert len(e.value.rows) == 1
            assert offsets(batch) == before
        file.write_bytes(good)
        rows = [[layer.extract(i) for layer in batch] for i in range(3)]
        out = model(step, cache=batch)
        for i, row in enumerate(rows):
            single = model(step[i : i + 1], cache=row)
            assert mx.abs(out[i] - single[0]).max().item() < 1e-4
    pagedkv.unwrap(model)


def test_a_failed_call_in_the_middle_of_padding_can_be_made_again() -> None:
    """The rows' share of the columns that were announced is what it was."""
    batch = BatchPagedLayerCache.merge(
        [c[0] for c in (PagedCache.standalone(1, TIERS).fork(),) * 2]
    )
    hook.install()
    batch.prepare(lengths=[5, 2], right_padding=[0, 3])
    q, k, v = (mx.random.normal((2, h, 3, 64)) for h in (4, 2, 2))
    keys, values = batch.update_and_fetch(k, v)
    with pytest.raises(pagedkv.ShapeError, match="attention sinks"):
        mx.fast.scaled_dot_product_attention(q, keys, values, scale=1.0, sinks=mx.zeros((3,)))
    assert [row.offset for row in batch.rows] == [0, 0]
    assert batch.offset.tolist() == [0, 0]
    for columns in (3, 2):
        q, k, v = (mx.random.normal((2, h, columns, 64)) for h in (4, 2, 2))
        keys, values = batch.update_and_fetch(k, v)
        out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=1.0, mask="causal")
        assert not mx.isnan(out).any().item()
    assert [row.offset for row in batch.rows] == [5, 2]
    batch.finalize()
    assert batch.offset.tolist() == [5, 2]


def test_what_does_not_fit_a_batch_is_refused() -> None:
    rows = [PagedCache.standalone(1, TIERS)[0] for _ in range(2)]
    batch = BatchPagedLayerCache.merge(rows)
    k = mx.zeros((2, 2, 3, 64))
    with pytest.raises(pagedkv.ShapeError, match="2 rows and was given keys of"):
        batch.update_and_fetch(k[:1], k[:1])
    with pytest.raises(pagedkv.ShapeError, match="same rows, heads and n"):
        batch.update_and_fetch(k, k[:, :, :2])
    with pytest.raises(pagedkv.ShapeError, match="padding of 3 rows"):
        batch.prepare(lengths=[1, 2, 3])
    with pytest.raises(pagedkv.ShapeError, match="it has no keys"):
        batch.keys_and_values()
    with pytest.raises(pagedkv.ShapeError, match="KVCache cannot join"):
        BatchPagedLayerCache.merge([stock.KVCache(), rows[0]])
    hook.install()
    keys, values = batch.update_and_fetch(k, k)
    q = mx.zeros((2, 4, 3, 64))
    with pytest.raises(pagedkv.ShapeError, match="longest row"):
        mx.fast.scaled_dot_product_attention(q, keys, values, scale=1, mask=mx.ones((3, 7)))
    with pytest.raises(pagedkv.ShapeError, match="do not fit a batch of 2"):
        mx.fast.scaled_dot_product_attention(q[:1], keys, values, scale=1)
    with pytest.raises(pagedkv.ShapeError, match="only an empty batch"):
        batch.update_and_fetch(k, k)
        batch.prepare(left_padding=[1, 0])
    batch.prepare(lengths=[1, 2], right_padding=[1, 0])
    with pytest.raises(pagedkv.ShapeError, match=r"finalize\(\)"):
        batch.extend(BatchPagedLayerCache.merge(rows))


def test_stats_of_a_batch_count_shared_pages_once() -> None:
    model = tiny_llama(layers=2)
    with pagedkv.wrap(model, TIERS) as cache:
        mx.eval(model(random_tokens(900), cache=cache))
        single = cache.stats()
        batch = [layer.merge([layer, layer]) for layer in cache]
        mx.eval(model(mx.array([[1], [2]]), cache=batch))
        stats = PagedCache.of(batch).stats()
        assert stats.tokens == 2 * 901
        assert stats.warm.tokens + stats.cold.tokens == 2 * 768
        assert stats.hot.tokens == 2 * (901 - 768)
        assert stats.warm.pages + stats.cold.pages == single.warm.pages + single.cold.pages == 6
        assert stats.warm.bytes + stats.cold.bytes == single.warm.bytes + single.cold.bytes
        assert stats.layers == ("paged (2 rows)",) * 2
        assert stats.bits_per_element < single.bits_per_element
    with pytest.raises(pagedkv.ConfigError, match="none of these 1 caches is paged"):
        PagedCache.of([stock.KVCache()])
    pagedkv.unwrap(model)


def test_a_batch_is_saved_and_loaded_as_mlx_lm_does_it(tmp_path: Path) -> None:
    model = tiny_llama(layers=2)
    path = str(tmp_path / "batch.safetensors")
    with pagedkv.wrap(model, TIERS):
        batch = filled(model, [300, 700])
        stock.save_prompt_cache(path, batch)
        expected = model(mx.array([[1], [2]]), cache=batch)
        loaded = stock.load_prompt_cache(path)
        assert offsets(loaded) == [[300, 700]] * 2
        out = model(mx.array([[1], [2]]), cache=loaded)
        assert mx.array_equal(out, expected).item()
    pagedkv.unwrap(model)

"""Models with sliding windows: the same logits as with mlx-lm's caches, far past the window."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models import cache as stock

import pagedkv
from tests.models import lively, random_tokens, tiny_llama
from tests.test_mlx_lm import sizes

HOT = pagedkv.TierConfig(hot_tokens=4096, hot_dtype="model", cold=0)  # everything stays as it is
PAGES = pagedkv.TierConfig(hot_tokens=32, sink_tokens=4, kv="fp16", page_tokens=256, cold=0)


def slow_start(n: int, pattern: int) -> list[str]:
    """Kinds of layers: one with a full context after some with windows."""
    return ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(n)]


MODELS: dict[str, dict[str, Any]] = {
    "gemma3_text": dict(head_dim=16, sliding_window_pattern=2),
    "gpt_oss": dict(num_local_experts=2, num_experts_per_tok=1, head_dim=16),
    "gemma2": dict(head_dim=16),  # all of its layers keep everything in mlx-lm
    "cohere2": dict(head_dim=16, sliding_window_pattern=2, layer_norm_eps=1e-5, rope_theta=1e4),
    "llama": dict(layer_types=slow_start(2, 2)),
    "ministral3": dict(
        layer_types=slow_start(2, 2), head_dim=16,
        rope_parameters={"rope_theta": 1e4, "original_max_position_embeddings": 4096,
                         "llama_4_scaling_beta": 0.1, "type": "default"},
    ),
    "olmo3": dict(layer_types=slow_start(2, 2), rope_theta=1e4),
    "plamo3": dict(head_dim=16, sliding_window_pattern=2),  # masks of one token more than it holds
}  # fmt: skip


def windowed(kind: str, window: int, **extra: Any) -> Any:
    return sizes(kind, **{**MODELS[kind], "sliding_window": window, "window_size": window, **extra})


def rounded(caches: list[Any]) -> list[Any]:
    """Stock caches that hold what float16 holds, as ours do by default."""

    def wrap(update: Any) -> Any:
        def half(x: mx.array) -> mx.array:
            return x.astype(mx.float16).astype(mx.float32)

        return lambda k, v: update(half(k), half(v))

    for cache in caches:
        cache.update_and_fetch = wrap(cache.update_and_fetch)
    return caches


def difference(model: Any, ours: Any, theirs: list[Any], chunks: list[int]) -> float:
    """The largest difference of logits, relative to the largest logit."""
    worst = scale = 0.0
    for i, n in enumerate(chunks):
        tokens = random_tokens(n, seed=i)
        a, b = model(tokens, cache=ours), model(tokens, cache=theirs)
        worst = max(worst, mx.abs(a - b).max().item())
        scale = max(scale, mx.abs(b).max().item())
        assert not mx.isnan(a).any().item()
    return worst / scale


@pytest.mark.parametrize("kind", MODELS)
def test_all_in_16_bit_is_the_stock_model(kind: str) -> None:
    model = windowed(kind, 48)
    theirs = stock.make_prompt_cache(model)
    with pagedkv.wrap(model, HOT) as cache:
        chunks = [100, 3, 40, *[1] * 70, 2, 130, *[1] * 70, 8, 1]
        assert difference(model, cache, theirs, chunks) < 1e-5
        rotating = [i for i, c in enumerate(theirs) if type(c) is stock.RotatingKVCache]
        assert bool(rotating) == (kind != "gemma2")
        for i in rotating:
            assert cache[i].dropped > 200
            assert cache.stats().layers[i] == "16-bit window 48"
    pagedkv.unwrap(model)


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_oss", "llama", "plamo3"])
def test_pages_inside_the_window_change_nothing(kind: str) -> None:
    """Pages in 16 bit, some of them partly behind the window, beside caches of float16 numbers."""
    model = windowed(kind, 700)
    theirs = rounded(stock.make_prompt_cache(model))
    with pagedkv.wrap(model, PAGES) as cache:
        chunks = [900, *[1] * 20, 3, 700, 1, 8, 100, *[1] * 60, 300, 1, 250, 1]
        assert difference(model, cache, theirs, chunks) < 1e-5
        for i, theirs_too in enumerate(theirs):
            if type(theirs_too) is stock.RotatingKVCache:
                assert 0 < len(cache[i]._table) <= 4
                assert cache[i].dropped > 1000
                assert cache.stats().layers[i] == "paged window 700"
            cache[i]._pager.check([cache[i]._table])
    pagedkv.unwrap(model)


def tiny_llama4(chunk: int = 320) -> Any:
    from mlx_lm.models import llama4

    text = dict(
        attention_bias=False, attention_chunk_size=chunk, head_dim=16, hidden_act="silu",
        hidden_size=32, interleave_moe_layer_step=2, intermediate_size=32, intermediate_size_mlp=32,
        max_position_embeddings=10_000, model_type="llama4_text", num_attention_heads=4,
        num_experts_per_tok=1, num_hidden_layers=4, num_key_value_heads=2, num_local_experts=2,
        rms_norm_eps=1e-5, rope_scaling=None, rope_theta=1e4, use_qk_norm=True, vocab_size=100,
    )  # fmt: skip
    mx.random.seed(0)
    model = llama4.Model(llama4.ModelArgs.from_dict({"model_type": "llama4", "text_config": text}))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("hot", [32, 4096])
def test_chunks_of_llama4(hot: int) -> None:
    model = tiny_llama4()
    theirs = rounded(stock.make_prompt_cache(model))
    config = pagedkv.TierConfig(**{**PAGES.to_dict(), "hot_tokens": hot})
    with pagedkv.wrap(model, config) as cache:
        chunks = [300, *[1] * 30, 3, 700, *[1] * 200, 8, 100, 1, 1]
        assert difference(model, cache, theirs, chunks) < 1e-5
        assert cache[0].start_position == theirs[0].start_position > 900
        name = "paged chunks of 320" if hot == 32 else "16-bit chunks of 320"
        assert cache.stats().layers == (name,) * 3 + ("paged",)
        assert cache[0].dropped > 600
        assert cache[0].offset - cache[0].dropped < 320 + 256 + 20
        twin = cache.fork()
        assert (cache.trim(5000), cache.trim(1)) == (0, 1)
        a, b = model(mx.array([[3]]), cache=cache), model(mx.array([[3]]), cache=theirs)
        twin.close()
        del a, b
    pagedkv.unwrap(model)


@pytest.mark.parametrize("size", [128, 600])
def test_max_kv_size_bounds_layers_that_have_no_window(size: int) -> None:
    model = tiny_llama(layers=2)
    theirs = rounded([stock.RotatingKVCache(size, keep=4) for _ in range(2)])
    config = pagedkv.TierConfig(**{**PAGES.to_dict(), "max_kv_size": size})
    with pagedkv.wrap(model, config) as cache:
        chunks = [500, *[1] * 40, 3, 600, *[1] * 200]
        assert difference(model, cache, theirs, chunks) < 1e-5
        assert [c.keep for c in cache] == [4, 4]
        assert all(c.dropped > 400 for c in cache)
        assert (
            cache.stats().layers
            == ((("paged" if size == 600 else "16-bit") + f" window {size}"),) * 2
        )
    pagedkv.unwrap(model)


def no_caches_of_its_own() -> Any:
    """A model that leaves it to mlx-lm to make caches; what it says depends on all that it read."""
    mx.random.seed(0)
    model = lively(sizes("qwen2"))
    assert not hasattr(model, "make_cache")
    return model


def one_by_one(model: Any, **options: Any) -> list[list[int]]:
    """What two prompts are answered, of which one is shorter than most windows."""
    found = []
    for n in (600, 150):
        prompt = random_tokens(600)[0, :n]
        steps = generate_step(prompt, model, max_tokens=20, prefill_step_size=100, **options)
        found.append([int(token) for token, _ in steps])
    return found


def as_rows(model: Any, **options: Any) -> list[list[int]]:
    """The same, in a batch."""
    batch = BatchGenerator(model, max_tokens=20, prefill_step_size=100, **options)
    prompt = random_tokens(600)[0].tolist()
    out: dict[int, list[int]] = {uid: [] for uid in batch.insert([prompt, prompt[:150]])}
    while responses := batch.next_generated():
        for response in responses:
            out[response.uid].append(response.token)
    batch.close()
    return list(out.values())


@pytest.mark.parametrize("run", [one_by_one, as_rows])
@pytest.mark.parametrize("config", [HOT, PAGES], ids=["hot", "pages"])
def test_max_kv_size_asked_of_mlx_lm(run: Callable[..., Any], config: pagedkv.TierConfig) -> None:
    model, sizes = no_caches_of_its_own(), (None, 400, 64)
    # Rows of mlx-lm's own do not keep the first four tokens; each of ours is as it is alone.
    expected = [one_by_one(model, max_kv_size=size) for size in sizes]
    assert len({str(tokens) for tokens in expected}) == 3
    with pagedkv.wrap(model, config):
        found = [run(model, max_kv_size=size) for size in sizes]
        bounded = stock.make_prompt_cache(model, 400)
        assert {(c.max_size, c.keep) for c in bounded} == {(400, 4)}
        bounded.close()
        assert run(model) == found[0]  # the option is for one cache
    if config is HOT:  # pages and hot tokens of 16 bit are not what mlx-lm has
        assert found == expected
    with pagedkv.wrap(model, replace(config, max_kv_size=400)):
        assert run(model) == found[1]
        assert run(model, max_kv_size=64) == found[2]
    pagedkv.unwrap(model)


def test_max_kv_size_asked_of_mlx_lm_where_it_cannot_be(tmp_path: Path) -> None:
    model = no_caches_of_its_own()
    with pagedkv.wrap(model, HOT), pytest.raises(pagedkv.ConfigError, match="from 8 up"):
        stock.make_prompt_cache(model, max_kv_size=3)
    lasting = replace(HOT, cold="1MB", cold_dir=str(tmp_path), max_kv_size=600)
    with pagedkv.wrap(model, lasting):
        with pytest.raises(pagedkv.ConfigError, match=r"TierConfig\(max_kv_size=64\)"):
            stock.make_prompt_cache(model, 64)
        same = stock.make_prompt_cache(model, 600)
        assert same[0].max_size == 600
        same.close()
    pagedkv.unwrap(model)
    # A model that makes its caches by itself is not bounded by mlx-lm either.
    model = windowed("gemma3_text", 64)
    assert {c.max_size for c in stock.make_prompt_cache(model, 32) if hasattr(c, "max_size")} == {
        64
    }
    with pagedkv.wrap(model, HOT) as cache:
        asked = stock.make_prompt_cache(model, 32)
        assert [type(c) for c in asked] == [type(c) for c in cache]
        assert asked[0].max_size == 64
        asked.close()
    pagedkv.unwrap(model)


def test_generate_and_prompt_caches_of_mlx_lm(tmp_path: Path) -> None:
    """Generation past the window, and saved caches in mlx-lm's file and in ours."""
    model = windowed("gemma3_text", 700)
    prompt = random_tokens(1000)[0]
    config = pagedkv.TierConfig(**{**PAGES.to_dict(), "kv": "K8V8", "page_tokens": 256})
    with pagedkv.wrap(model, config) as cache:
        steps = [
            int(t) for t, _ in generate_step(prompt, model, max_tokens=300, prompt_cache=cache)
        ]
        assert len(steps) == 300
        assert cache[0].dropped > 0 < len(cache[0]._table)
        stock.save_prompt_cache(str(tmp_path / "theirs.safetensors"), cache)
        cache.save(str(tmp_path / "ours.safetensors"))
        next_step = mx.array([[7]])
        twin = copy.deepcopy(cache)
        states = [type(c).from_state(c.state, c.meta_state) for c in cache]  # before 0.32
        expected = [model(next_step, cache=cache) for _ in range(3)]
        mx.eval(expected)
        for name, loaded in {
            "fork": twin,
            "old": states,
            "theirs": stock.load_prompt_cache(str(tmp_path / "theirs.safetensors")),
            "ours": stock.load_prompt_cache(str(tmp_path / "ours.safetensors")),
            "pagedkv": pagedkv.load(str(tmp_path / "ours.safetensors"), model),
        }.items():
            actual = [model(next_step, cache=loaded) for _ in range(3)]
            for a, b in zip(actual, expected, strict=True):
                assert mx.array_equal(a, b).item(), name
            if isinstance(loaded, pagedkv.PagedCache):
                loaded.close()
    other = windowed("gemma3_text", 600)
    bounded = pagedkv.TierConfig(**{**PAGES.to_dict(), "max_kv_size": 700})
    with pytest.raises(pagedkv.CacheStateError):
        pagedkv.load(str(tmp_path / "ours.safetensors"), other)
    llama = tiny_llama(layers=2)
    with pagedkv.wrap(llama, bounded) as cache:
        mx.eval(llama(random_tokens(1500), cache=cache))
        cache.save(str(tmp_path / "bounded.safetensors"))
    with (
        pagedkv.wrap(llama, PAGES),
        pytest.raises(pagedkv.CacheStateError, match="window of 700 tokens and this one has none"),
    ):
        pagedkv.load(str(tmp_path / "bounded.safetensors"), llama)
    pagedkv.unwrap(model)
    pagedkv.unwrap(llama)


def test_speculative_decoding_within_the_window_and_what_it_is_told_past_it() -> None:
    model, draft = windowed("gemma3_text", 64), tiny_llama(layers=1)
    prompt = random_tokens(20)[0]

    def run(cache: list[Any] | None) -> list[int]:
        steps = speculative_generate_step(
            prompt, model, draft, num_draft_tokens=3, max_tokens=30, prompt_cache=cache
        )
        return [int(token) for token, *_ in steps]

    expected = run(None)
    with pagedkv.wrap(model, HOT) as a, pagedkv.wrap(draft, HOT) as b:
        assert run([*a, *b]) == expected
        mx.eval(model(random_tokens(300), cache=a), model(random_tokens(1), cache=a))
        with pytest.raises(ValueError, match="requires a trimmable prompt cache"):
            run([*a, *b])
    pagedkv.unwrap(model)
    pagedkv.unwrap(draft)

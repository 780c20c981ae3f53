"""With mlx-lm: generation, speculative decoding, prompt caching, and models of several kinds."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import cache as stock

import pagedkv
from pagedkv.cache import sdpa_hook as hook
from tests.model_zoo import build
from tests.models import random_tokens, tiny_llama
from tests.zoo_configs import COMMON

EXACT = pagedkv.TierConfig(  # pages in 16 bit and a 16-bit model: same numbers as stock
    hot_tokens=64, sink_tokens=4, kv="fp16", page_tokens=256, warm="64MB", cold="64MB"
)


def greedy(model: Any, prompt: mx.array, n: int, **options: Any) -> tuple[list[int], mx.array]:
    tokens, logprobs = [], []
    for token, logprob in generate_step(prompt[0], model, max_tokens=n, **options):
        tokens.append(int(token))
        logprobs.append(logprob)
    return tokens, mx.stack(logprobs)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_everything_hot_is_the_stock_model_bit_for_bit(dtype: mx.Dtype) -> None:
    model = tiny_llama(layers=3)
    model.set_dtype(dtype)
    prompt = random_tokens(512)
    expected, expected_logits = greedy(model, prompt, 64)
    with pagedkv.wrap(model, pagedkv.TierConfig(hot_tokens=1024)) as cache:
        tokens, logits = greedy(model, prompt, 64, prompt_cache=cache)
        assert cache.stats().hot.tokens == cache.offset >= 512 + 63
    assert tokens == expected
    assert mx.array_equal(logits, expected_logits).item()


def test_sixteen_bit_pages_give_the_stock_tokens() -> None:
    model = tiny_llama(layers=2)
    prompt = random_tokens(1500)
    expected, expected_logits = greedy(model, prompt, 40, prefill_step_size=512)
    with pagedkv.wrap(model, EXACT) as cache:
        tokens, logits = greedy(model, prompt, 40, prefill_step_size=512, prompt_cache=cache)
        assert cache.stats().warm.tokens > 1000
    assert tokens == expected
    assert mx.abs(logits - expected_logits).max().item() < 1e-2  # float16 keys, float32 model


def test_a_model_without_a_make_cache_of_its_own_gives_any_number_of_caches() -> None:
    from mlx_lm.models import qwen2

    model = qwen2.Model(
        qwen2.ModelArgs(
            model_type="qwen2", hidden_size=64, num_hidden_layers=2, intermediate_size=128,
            num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5, vocab_size=100,
        )
    )  # fmt: skip
    assert not hasattr(model, "make_cache")
    pagedkv.wrap(model, EXACT)
    caches = [model.make_cache(), stock.make_prompt_cache(model), pagedkv.wrap(model, EXACT)]
    assert all(isinstance(cache, pagedkv.PagedCache) for cache in caches)
    for cache in caches:
        mx.eval(model(random_tokens(600), cache=cache))
        assert cache.stats().warm.tokens > 0
    pagedkv.unwrap(model)
    assert not hasattr(model, "make_cache")
    assert isinstance(stock.make_prompt_cache(model)[0], stock.KVCache)


def test_caches_of_mlx_vlm_are_paged_too() -> None:
    """They have the names and the protocol of mlx-lm's, but are classes of their own."""
    names = {"__module__": "mlx_vlm.models.cache"}
    kind, other = (type(name, (stock.KVCache,), names) for name in ("KVCache", "PoolingCache"))
    model = tiny_llama()
    own = {"make_cache": lambda self: [kind(), other()]}
    model.__class__ = type("LanguageModel", (type(model),), own)
    with pagedkv.wrap(model, EXACT) as cache:
        mx.eval(model(random_tokens(600), cache=cache))
        assert cache.stats().layers == ("paged", "PoolingCache")
        assert cache.stats().warm.tokens > 0
    pagedkv.unwrap(model)


def test_generate_finds_the_cache_by_itself_and_unwrap_takes_it_away() -> None:
    model = tiny_llama()
    assert "make_cache" not in model.__dict__
    pagedkv.wrap(model, EXACT)
    assert isinstance(stock.make_prompt_cache(model), pagedkv.PagedCache)
    pagedkv.wrap(model)  # again: replaces the settings
    assert stock.make_prompt_cache(model).context.config == pagedkv.TierConfig()
    pagedkv.unwrap(model)
    pagedkv.unwrap(model)
    assert type(stock.make_prompt_cache(model)[0]) is stock.KVCache
    assert not hook.installed()


@pytest.mark.parametrize("kv", ["fp16", "K8V8", "K4V4"])
def test_speculative_decoding_gives_the_same_tokens(kv: str) -> None:
    model, draft = tiny_llama(layers=2), tiny_llama(layers=1, seed=3)
    prompt = random_tokens(900)
    # A window shorter than what is drafted and taken back: trims reach into sealed pages.
    config = replace(EXACT, kv=kv, hot_tokens=64 if kv == "fp16" else 2, warm="150KB", cold="8MB")

    def run(cache: list[Any] | None) -> list[int]:
        steps = speculative_generate_step(
            prompt[0], model, draft, num_draft_tokens=3, max_tokens=300, prompt_cache=cache
        )
        return [int(token) for token, *_ in steps]

    if kv == "fp16":
        expected = run(None)
    else:
        with pagedkv.wrap(model, config) as cache:
            steps = generate_step(prompt[0], model, max_tokens=300, prompt_cache=cache)
            expected = [int(token) for token, _ in steps]
    with pagedkv.wrap(model, config) as a, pagedkv.wrap(draft, config) as b:
        assert run([*a, *b]) == expected
        assert a.stats().cold.tokens > 0
        assert a.stats().warm.tokens + a.stats().cold.tokens > 900


def test_trim_and_deepcopy_like_mlx_lm_does_it() -> None:
    model = tiny_llama()
    with pagedkv.wrap(model, EXACT) as cache:
        mx.eval(model(random_tokens(1000), cache=cache))
        assert stock.can_trim_prompt_cache(cache)
        twin = copy.deepcopy(cache)
        single = copy.deepcopy(cache[0])
        assert stock.trim_prompt_cache(cache, 300) == 300
        assert (cache.offset, twin.offset, single.offset) == (700, 1000, 1000)
        assert stock.trim_prompt_cache(cache, 5000) == 700
        assert all(c.empty() for c in cache)
        assert stock.trim_prompt_cache(cache, 1) == 0
        a = model(random_tokens(600), cache=cache)
        fresh = model(random_tokens(600), cache=model.make_cache())
        assert mx.array_equal(a, fresh).item()  # trimmed to nothing is as good as new


@pytest.mark.parametrize("kv", ["fp16", "K4V4", "K8V8:600,K4V2"])
@pytest.mark.parametrize("how", ["ours", "mlx_lm"])
def test_saved_caches_continue_where_they_were(tmp_path: Path, kv: str, how: str) -> None:
    model = tiny_llama(layers=2)
    config = pagedkv.TierConfig(
        hot_tokens=64, sink_tokens=4, kv=kv, page_tokens=256, warm="150KB", cold="64MB"
    )
    path = str(tmp_path / "cache.safetensors")
    with pagedkv.wrap(model, config) as cache:
        for chunk in range(3):
            mx.eval(model(random_tokens(500, seed=chunk), cache=cache))
        cache.trim(77)
        assert cache.stats().cold.pages > 0
        cache.save(path)
        other = str(tmp_path / "other.safetensors")
        stock.save_prompt_cache(other, cache, {"note": "hello"})
        step = mx.array([[3]])
        expected = [model(step, cache=cache) for _ in range(3)]
        mx.eval(expected)

        if how == "ours":
            loaded: Any = pagedkv.load(path, model)
            assert loaded.stats().precisions == cache.fork().stats().precisions
        else:  # its loader reads both files, and ours reads its file
            loaded, note = stock.load_prompt_cache(other, return_metadata=True)
            assert note == {"note": "hello"}
            assert pagedkv.load(other, model).offset == loaded[0].offset
            loaded = stock.load_prompt_cache(path)
        assert loaded[0].offset == 1500 - 77
        actual = [model(step, cache=loaded) for _ in range(3)]
        for a, b in zip(actual, expected, strict=True):
            assert mx.array_equal(a, b).item()
    pagedkv.unwrap(model)


def test_a_cache_of_another_model_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "cache.safetensors")
    model, other = tiny_llama(), tiny_llama(seed=5)
    with pagedkv.wrap(model, EXACT) as cache:
        mx.eval(model(random_tokens(400), cache=cache))
        cache.save(path)
    with pytest.raises(pagedkv.CacheStateError, match=r"another model: it belongs to llama-\w+"):
        pagedkv.load(path, other)
    wider = tiny_llama(dim=128)
    with pagedkv.wrap(model, EXACT) as cache, pytest.raises(pagedkv.ShapeError, match="another"):
        wider(random_tokens(3), cache=cache)


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    path = tmp_path / "cache.safetensors"
    with pytest.raises(pagedkv.CacheStateError, match="not a saved cache"):
        pagedkv.load(path, model)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(pagedkv.CacheStateError, match="not a saved cache"):
        pagedkv.load(path, model)
    plain = [stock.KVCache()]
    plain[0].update_and_fetch(mx.zeros((1, 1, 3, 64)), mx.zeros((1, 1, 3, 64)))
    stock.save_prompt_cache(str(path), plain)
    with pytest.raises(pagedkv.CacheStateError, match="no paged cache"):
        pagedkv.load(path, model)
    with pagedkv.wrap(model, EXACT) as cache:
        mx.eval(model(random_tokens(700), cache=cache))
        cache.save(str(path))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(pagedkv.CacheStateError):
        pagedkv.load(path, model)


def test_reading_the_state_reads_no_cold_page(small: pagedkv.TierConfig) -> None:
    """mlx-lm evaluates it after every prefill chunk."""
    model = tiny_llama()
    with pagedkv.wrap(model, pagedkv.TierConfig(**{**small.to_dict(), "warm": "150KB"})) as cache:
        mx.eval(model(random_tokens(2000), cache=cache))
        read = cache.stats().nvme_bytes_read
        mx.eval([c.state for c in cache])
        assert cache.stats().nvme_bytes_read == read
        assert cache.stats().cold.pages > 0


def sizes(module: str, **extra: Any) -> Any:
    """A tiny model of another kind."""
    kind = importlib.import_module(f"mlx_lm.models.{module}")
    base = dict(
        model_type=module, hidden_size=64, num_hidden_layers=2, intermediate_size=96,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=100,
        max_position_embeddings=10_000,
    )  # fmt: skip
    known = kind.ModelArgs.__dataclass_fields__
    args = {k: v for k, v in {**base, **extra}.items() if k in known}
    model = kind.Model(kind.ModelArgs(**args))
    mx.eval(model.parameters())
    return model


KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "qwen2": (dict(rope_theta=1e4), {"paged"}),
    "qwen3": (dict(rope_theta=1e4, head_dim=32, tie_word_embeddings=True), {"paged"}),
    "phi3": (dict(), {"paged"}),
    "olmo2": (dict(), {"paged"}),
    "gemma": (dict(head_dim=32), {"paged"}),
    "gemma2": (dict(head_dim=32), {"paged (dense)"}),  # does its own softcapped attention
    "stablelm": (dict(rope_theta=1e4, partial_rotary_factor=0.25, layer_norm_eps=1e-5,
                      use_qkv_bias=True), {"paged (dense)"}),
    "gemma3_text": (dict(head_dim=32, sliding_window=64, sliding_window_pattern=2),
                    {"paged", "16-bit window 64"}),
    "gpt_oss": (dict(num_local_experts=2, num_experts_per_tok=1, sliding_window=64, head_dim=64),
                {"paged", "16-bit window 64"}),
    "starcoder2": (dict(norm_epsilon=1e-5, rope_theta=1e4), {"paged"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_model_kinds(kind: str) -> None:
    """Logits equal the stock model's while pages are in 16 bit, whatever the layer does."""
    extra, layers = KINDS[kind]
    model = sizes(kind, **extra)
    chunks = [random_tokens(n, seed=n) for n in (400, 300, 1, 1, 5)]
    # A fresh stock cache, as the unwrapped model makes it.
    plain = stock.make_prompt_cache(model)
    expected = [model(c, cache=plain) for c in chunks]
    mx.eval(expected)
    config = pagedkv.TierConfig(**{**EXACT.to_dict(), "hot_dtype": "model", "warm": "1MB"})
    with pagedkv.wrap(model, config) as cache:
        actual = [model(c, cache=cache) for c in chunks]
        mx.eval(actual)
        stats = cache.stats()
        assert set(stats.layers) == layers
        assert stats.warm.tokens + stats.cold.tokens >= 512
    scale = max(mx.abs(e).max().item() for e in expected)
    for a, b in zip(actual, expected, strict=True):
        assert not mx.isnan(a).any().item()
        assert mx.abs(a - b).max().item() < 2e-3 * scale  # pages hold float16, the model float32
    pagedkv.unwrap(model)


def test_a_lost_tag_is_right_when_the_hook_is_not_installed() -> None:
    """A paged cache in a model that was unwrapped meanwhile: dense, slower, right."""
    model = tiny_llama()
    prompt = random_tokens(700)
    cache = pagedkv.wrap(model, EXACT)
    expected = model(prompt, cache=cache)
    step = model(mx.array([[1]]), cache=cache)
    mx.eval(expected, step)
    cache.trim(1)
    pagedkv.unwrap(model)
    again = model(mx.array([[1]]), cache=cache)
    assert mx.abs(again - step).max().item() < 1e-4
    cache.close()


def test_a_context_past_the_models_limit_is_a_warning_once() -> None:
    model = tiny_llama(max_position_embeddings=300)
    with pagedkv.wrap(model, EXACT) as cache:
        mx.eval(model(random_tokens(300), cache=cache))
        with pytest.warns(UserWarning, match=r"301 tokens .* made for 300"):
            mx.eval(model(random_tokens(1), cache=cache))
        mx.eval(model(random_tokens(1), cache=cache))  # and no second time


@pytest.mark.parametrize("kind", ["qwen3_vl", "kimi_vl"])  # a dict, and an object
def test_a_multimodal_models_limit_is_found(kind: str) -> None:
    with pagedkv.wrap(build(kind)) as cache:
        assert cache.context.max_tokens == COMMON["max_position_embeddings"]


@pytest.mark.parametrize("thing", ["llama", None, object(), 3])
def test_a_model_that_is_not_one(thing: Any) -> None:
    with pytest.raises(pagedkv.ConfigError, match="needs a model"):
        pagedkv.wrap(thing)


def test_a_module_without_layers_is_told_what_to_use() -> None:
    import mlx.nn as nn

    with pytest.raises(pagedkv.ConfigError, match="standalone"):
        pagedkv.wrap(nn.Linear(2, 2))


def test_a_failed_wrap_leaves_the_model_as_it_was() -> None:
    model = tiny_llama()
    with pytest.raises(pagedkv.ConfigError, match="give at least"):
        pagedkv.wrap(model, pagedkv.TierConfig(warm=1000))
    assert "make_cache" not in model.__dict__
    assert not hook.installed()


def test_using_a_closed_cache() -> None:
    model = tiny_llama()
    cache = pagedkv.wrap(model, EXACT)
    cache.close()
    cache.close()
    with pytest.raises(pagedkv.ClosedError):
        model(random_tokens(1), cache=cache)

"""Tokens that a draft proposed and the model rejects are gone, in every kind of layer."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map_with_path
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import cache as stock

import pagedkv
from tests.model_zoo import build
from tests.models import lively, random_tokens, tiny_llama
from tests.test_window_models import tiny_llama4, windowed

HOT = {"hot_tokens": 4096, "hot_dtype": "model", "cold": 0, "layer_kv": "same"}
PAGES = {**HOT, "hot_tokens": 32, "sink_tokens": 4, "kv": "fp16", "page_tokens": 256}

MODELS = {
    "window": lambda: windowed("gemma3_text", 40),
    "paged window": lambda: windowed("gemma3_text", 320),
    "chunks": lambda: tiny_llama4(40),
    "paged chunks": lambda: tiny_llama4(320),
    "max_kv_size": tiny_llama,
}


def other(model: Any) -> Any:
    """A model that often says the same, and often does not."""
    draft = copy.deepcopy(model)
    mx.random.seed(3)

    def noisy(path: str, weight: mx.array) -> mx.array:
        return weight + 0.1 * weight.std() * mx.random.normal(weight.shape)

    draft.update(tree_map_with_path(noisy, draft.parameters()))
    mx.eval(draft.parameters())
    return draft


CASES = [*((kind, 4) for kind in MODELS), ("window", 17), ("chunks", 17)]


@pytest.mark.parametrize(("kind", "proposed"), CASES)
def test_the_text_is_that_of_plain_decoding(kind: str, proposed: int) -> None:
    model = lively(MODELS[kind]())
    # Of several tokens in one call the later ones do not see all that is kept, here as in mlx-lm:
    # where some are accepted the text may be another one, so none is.
    draft = other(model) if kind != "max_kv_size" else tiny_llama(layers=1, seed=9)
    config = pagedkv.TierConfig(**(PAGES if "paged" in kind else HOT))
    if kind == "max_kv_size":
        config = pagedkv.TierConfig(**{**HOT, "max_kv_size": 40})
    prompt = random_tokens(620 if "paged" in kind else 150)[0]
    with pagedkv.wrap(model, config) as cache:
        plain = [int(t) for t, _ in generate_step(prompt, model, max_tokens=30, prompt_cache=cache)]
        assert cache.paged_layers[0].dropped > 0
        if "paged" in kind:
            assert any(True for _ in cache.paged_layers[0].located_pages())
    drafts = stock.make_prompt_cache(draft)
    with model.make_cache() as cache:
        steps = speculative_generate_step(
            prompt, model, draft, num_draft_tokens=proposed, max_tokens=30,
            prompt_cache=[*cache, *drafts], prefill_step_size=90,
        )  # fmt: skip
        told = [(int(token), accepted) for token, _, accepted in steps]
        assert len(prompt) + 30 - cache.offset in (0, 1)
        assert cache.paged_layers[0].dropped > 0
    pagedkv.unwrap(model)
    assert [token for token, _ in told] == plain
    accepted = sum(accepted for _, accepted in told)
    assert accepted == 0 if kind == "max_kv_size" else 0 < accepted < len(told)


@pytest.mark.parametrize(("n", "hot"), [(1, 32), (16, 32), (16, 4096)])
def test_tokens_of_several_calls_are_taken_back_from_chunks(n: int, hot: int) -> None:
    """At several places of a chunk, before and past its beginning."""
    model = tiny_llama4(320)
    config = pagedkv.TierConfig(**{**PAGES, "hot_tokens": hot})
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(random_tokens(939), cache=cache))
        for i in range(4):  # the fourth chunk begins at 960
            mx.eval(model(random_tokens(8, i), cache=cache))
            before = cache.fork()
            for m in range(n):
                mx.eval(model(random_tokens(1, m), cache=cache))
            assert cache.trim(n) == n
            assert len({layer.start_position for layer in cache[:3]}) == 1
            step = random_tokens(1, 7)
            a, b = model(step, cache=cache), model(step, cache=before)
            assert mx.allclose(a, b, atol=1e-5).item()
            before.close()
        assert cache.trim(400) == 0
    pagedkv.unwrap(model)


def test_layers_are_never_cut_to_different_lengths() -> None:
    """mlx-lm asks whether layers can be trimmed, not by how much, and trims one after another."""
    model = windowed("gemma3_text", 40)
    with pagedkv.wrap(model, pagedkv.TierConfig(**HOT)) as cache:
        mx.eval(model(random_tokens(300), cache=cache), model(random_tokens(5), cache=cache))
        assert stock.can_trim_prompt_cache(cache)
        reversed_layers = list(cache)[::-1]  # the full one first
        for layers in (list(cache), reversed_layers):
            with pytest.raises(pagedkv.CacheStateError, match=r"layer \d \(16-bit window 40\)"):
                stock.trim_prompt_cache(layers, 100)
        assert {layer.offset for layer in cache} == {305}
        assert stock.trim_prompt_cache(reversed_layers, 5) == 5
        # A store of prompts asks this before it trims by any number.
        assert not stock.can_trim_prompt_cache(cache)
        assert {layer.offset for layer in cache} == {300}
    pagedkv.unwrap(model)


def test_a_model_with_recurrent_layers_is_refused_at_once() -> None:
    model, draft = build("falcon_h1"), tiny_llama(layers=1)
    with pagedkv.wrap(model, pagedkv.TierConfig(**HOT)) as cache:
        both = [*cache, *stock.make_prompt_cache(draft)]
        steps = speculative_generate_step(random_tokens(9)[0], model, draft, prompt_cache=both)
        with pytest.raises(ValueError, match="requires a trimmable prompt cache"):
            next(steps)
    pagedkv.unwrap(model)

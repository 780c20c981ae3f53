"""The examples run, their tiers are used, and they compute what they would without pages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
import pytest

import pagedkv
from tests import vlm_package

EXACT = pagedkv.TierConfig(
    hot_tokens=64, page_tokens=256, kv="fp16", hot_dtype="model", warm="2MB", cold="32MB"
)


def example(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["transformer", "multi_head", "own_attention", "image_chat"])
def test_it_runs_in_all_tiers(name: str) -> None:
    if name == "image_chat":
        vlm_package.load("generate.ar")
        vlm_package.load("models.llava")
    stats = example(name).main(prompt_tokens=3000, new_tokens=4)
    assert stats.tokens == 3004
    assert min(stats.hot.tokens, stats.warm.tokens, stats.cold.tokens) > 0
    assert stats.nvme_bytes_read > 0
    assert set(stats.precisions) == ({"K8V4", "K4V4"} if name == "transformer" else {"K4V4"})
    assert set(stats.layers) == {"paged"}


def test_an_example_without_its_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx_vlm.generate.ar", None)
    with pytest.raises(SystemExit, match="pip install mlx-vlm"):
        example("image_chat")


def test_the_module_gives_what_the_one_it_replaces_gives() -> None:
    mx.random.seed(1)
    model = example("multi_head").Transformer(layers=2)
    tokens = mx.random.randint(0, 256, (1, 900))
    expected = model(tokens)
    assert pagedkv.page_attention(model) == ["blocks.0.attention", "blocks.1.attention"]
    assert mx.array_equal(model(tokens), expected).item()  # without a cache: as before
    with pagedkv.PagedCache.standalone(2, EXACT) as cache:
        parts = [model(tokens[:, a:b], cache) for a, b in ((0, 400), (400, 899), (899, 900))]
        assert mx.allclose(mx.concatenate(parts, axis=1), expected, atol=1e-4).item()
        assert cache.stats().precisions == {"fp16": 6}
        with pytest.raises(pagedkv.ShapeError, match="one sequence"):
            model.blocks[0].attention(*[mx.zeros((2, 1, 128))] * 3, cache=cache[0])


def test_the_module_takes_weights_of_the_one_it_replaces() -> None:
    plain = nn.MultiHeadAttention(64, 4, bias=True)
    paged = pagedkv.PagedMultiHeadAttention(64, 4, bias=True)
    paged.update(plain.parameters())
    twin = pagedkv.PagedMultiHeadAttention.of(plain)
    x = mx.random.normal((1, 5, 64))
    assert mx.array_equal(paged(x, x, x), plain(x, x, x)).item()
    assert mx.array_equal(twin(x, x, x), plain(x, x, x)).item()
    with pytest.raises(pagedkv.ConfigError, match="Linear is no"):
        pagedkv.PagedMultiHeadAttention.of(nn.Linear(2, 2))
    with pytest.raises(pagedkv.ConfigError, match="no mlx.nn.MultiHeadAttention"):
        pagedkv.page_attention(nn.Linear(2, 2))


@pytest.mark.parametrize("hooked", [True, False])
def test_a_model_with_its_own_call_attends_to_the_same(hooked: bool) -> None:
    mx.random.seed(1)
    model = example("own_attention").Model(layers=2)
    tokens = mx.random.randint(0, 256, (1, 900))
    with pagedkv.PagedCache.standalone(2, pagedkv.TierConfig(hot_dtype="model")) as cache:
        expected = model(tokens[:, :512], cache), model(tokens[:, 512:], cache)  # all of it hot
        mx.eval(expected)
    with pagedkv.PagedCache.standalone(2, EXACT) as cache:
        if hooked:
            with pagedkv.hooked():
                actual = model(tokens[:, :512], cache), model(tokens[:, 512:], cache)
                mx.eval(actual)
            assert all(cache[0].reaches_hook[n] is not False for n in (True, False))
        else:
            actual = model(tokens[:, :512], cache), model(tokens[:, 512:], cache)
        for a, b in zip(actual, expected, strict=True):
            assert mx.allclose(a, b, atol=1e-4).item()

"""Which layers look things up: how they are found, and that a store remembers them."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.base import scaled_dot_product_attention

import pagedkv
from pagedkv.config.tier_config import lookup_count
from pagedkv.integrations.mlx_lm import model_notes
from pagedkv.integrations.mlx_lm import retrieval_layers as module
from pagedkv.integrations.mlx_lm.model_info import fingerprint
from pagedkv.integrations.mlx_lm.retrieval_layers import LEAST_ECHO, echoes, lookup_layers
from pagedkv.integrations.mlx_lm.wrapping import wrapping_of
from tests.model_zoo import build
from tests.models import lively, random_tokens, tiny_llama

SMALL: dict[str, Any] = {"hot_tokens": 64, "sink_tokens": 4, "page_tokens": 256}


class Echo(nn.Module):
    """Layers that attend to tokens like the present one, each as sharply as it is told."""

    def __init__(self, sharpness: list[float], dim: int = 64, vocabulary: int = 500) -> None:
        super().__init__()
        self.layers = [nn.Linear(dim, dim) for _ in sharpness]
        table = np.random.default_rng(0).standard_normal((vocabulary, dim))
        self.embedding = mx.array(table / np.linalg.norm(table, axis=1)[:, None], mx.float32)
        self._sharpness = sharpness

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        x = self.embedding[ids][:, None]
        for sharp, layer in zip(self._sharpness, cache or self.layers, strict=True):
            keys = values = x
            if cache is not None:
                keys, values = layer.update_and_fetch(keys, values)
            mask = "causal" if ids.shape[1] > 1 else None
            x = x + 0 * scaled_dot_product_attention(
                x, keys, values, cache=layer, scale=sharp, mask=mask
            )
        logits: mx.array = x[:, 0] @ self.embedding.T
        return logits


@pytest.fixture
def sharp() -> Any:
    return Echo([0, 6, 20, 1, 0, 12, 0, 0, 15, 0, 0, 0.5])


def test_layers_that_attend_to_the_same_tokens_are_found(sharp: Any) -> None:
    heard = echoes(sharp)
    assert sorted(heard, key=lambda n: -heard[n])[:4] == [2, 8, 5, 1]
    assert all(heard[n] > 0.05 for n in (2, 5, 8))
    assert LEAST_ECHO < heard[1] < 0.05
    assert all(abs(heard[n]) < LEAST_ECHO for n in (0, 3, 4, 6, 7, 9, 10, 11))
    assert echoes(sharp) == heard


def test_one_layer_in_four_and_none_that_looks_nothing_up(sharp: Any) -> None:
    name = fingerprint(sharp)
    assert lookup_count(12) == 3
    assert lookup_layers(sharp, range(12), name) == (2, 5, 8)
    assert lookup_layers(sharp, {0, 1, 3, 4, 5, 6, 7, 9}, name) == (1, 5)
    assert lookup_layers(sharp, {0, 3, 4, 6, 7, 9}, name) == ()
    assert lookup_layers(sharp, {2, 5, 8}, name) == ()  # too few to leave any other
    assert lookup_layers(Echo([0.0] * 8), range(8), "even") == ()


def test_a_model_is_read_once(sharp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, times = module.echoes, list[int]()
    monkeypatch.setattr(module, "echoes", lambda model: (times.append(1), real(model))[1])
    for _ in range(3):
        lookup_layers(sharp, range(12), "this one")
    assert len(times) == 1
    lookup_layers(sharp, range(12), "its weights changed")
    assert len(times) == 2


def test_a_model_that_cannot_be_read_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: Any) -> dict[int, float]:
        raise RuntimeError("takes pictures")

    monkeypatch.setattr(module, "echoes", fails)
    model = tiny_llama(layers=8)
    config = pagedkv.TierConfig(cold=0, **SMALL)
    with (
        pytest.warns(UserWarning, match="did not read random tokens .RuntimeError: takes pictures"),
        pagedkv.wrap(model, config) as cache,
    ):
        assert set(cache.stats().ladders) == {"K4V4"}
    heard(monkeypatch, 3)  # it may have been short of memory
    with pagedkv.wrap(model, config) as cache:
        assert cache.stats().ladders[3] == "K8V8"
    pagedkv.unwrap(model)


def test_a_model_whose_queries_cannot_be_seen_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(module, "echoes", lambda model: pytest.fail("it was read"))
    monkeypatch.setattr("pagedkv.integrations.mlx_lm.wrapping.lookup_count", lambda layers: layers)
    other = build("deepseek_v3")  # latent attention
    with pagedkv.wrap(other, pagedkv.TierConfig(cold=0, **SMALL)) as cache:
        assert cache.context.settled.layer_kv == "same"
    pagedkv.unwrap(other)
    assert not recwarn.list


def test_a_model_is_heard_once_on_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(model_notes.FOLDER, str(tmp_path))
    heard(monkeypatch, 3)
    assert lookup_layers(fresh(), range(8), "a") == (3,)
    heard(monkeypatch, 5)
    assert lookup_layers(fresh(), range(8), "a") == (3,)
    assert lookup_layers(fresh(), range(8), "b") == (5,)
    (path,) = tmp_path.glob("a-*")
    for content in (b"", b"[3", b"[]", b'{"x": 1}', b'{"0": []}'):
        path.write_bytes(content)
        assert lookup_layers(fresh(), range(8), "a") == (5,)


def test_looking_leaves_nothing_in_memory() -> None:
    model = tiny_llama(layers=8, dim=256)
    gc.collect()
    mx.clear_cache()
    gc.disable()
    try:
        before = mx.get_active_memory()
        echoes(model)
        assert mx.get_active_memory() - before < 2**16
    finally:
        gc.enable()


def test_what_a_cache_was_made_with_finds_its_store_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard(monkeypatch, 1, 6)
    model, config = fresh(), stored(tmp_path)
    with pagedkv.wrap(model, config) as cache:
        assert cache.context.config == config
        read(model, cache, 600)
        cache.flush()
        again = pagedkv.wrap(model, cache.context.config)
        assert again.context.pager is cache.context.pager
        again.close()
    pagedkv.unwrap(model)
    with pagedkv.resume(model, cache.context.config) as cache:
        assert cache.offset == 600
    pagedkv.unwrap(model)


def test_numbers_that_are_not_finite_are_no_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = dict.fromkeys(range(8), float("nan")) | {3: 0.2}
    monkeypatch.setattr(module, "echoes", lambda model: heard)
    assert lookup_layers(tiny_llama(layers=8), range(8), "nan") == (3,)


def test_wrapping_a_model_gives_them_twice_the_bits(sharp: Any) -> None:
    with pagedkv.wrap(sharp, pagedkv.TierConfig(cold=0, **SMALL)) as cache:
        assert cache.context.settled.layer_kv == "K8V8@2,5,8"
        mx.eval(sharp(random_tokens(700), cache=cache))
        for number, layer in enumerate(cache.paged_layers):
            held = {str(page.precision) for page, _ in layer.located_pages()}
            assert held == {"K8V8" if number in (2, 5, 8) else "K4V4"}
    with pagedkv.wrap(sharp, pagedkv.TierConfig(kv="K2V2", cold=0, **SMALL)) as cache:
        assert cache.context.settled.layer_kv == "K4V4@2,5,8"
    for same in ({"kv": "K8V8"}, {"kv": "fp16"}, {"layer_kv": "same"}):
        with pagedkv.wrap(sharp, pagedkv.TierConfig(cold=0, **SMALL, **same)) as cache:
            assert cache.context.settled.layer_kv == "same"
    pagedkv.unwrap(sharp)


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma3n", "falcon_h1", "qwen3_5"])
def test_only_layers_that_see_everything_are_asked(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, shared keys, nested and recurrent caches: a model answers as it did before."""
    asked: list[set[int]] = []

    def all_of_them(model: Any, candidates: set[int], name: str) -> tuple[int, ...]:
        asked.append(candidates)
        return tuple(sorted(candidates))

    monkeypatch.setattr("pagedkv.integrations.mlx_lm.wrapping.lookup_count", lambda layers: layers)
    monkeypatch.setattr("pagedkv.integrations.mlx_lm.wrapping.lookup_layers", all_of_them)
    other = build(kind)
    with pagedkv.wrap(other, pagedkv.TierConfig(cold=0, **SMALL)) as cache:
        for part in (random_tokens(600), random_tokens(16)):
            out = other(part, cache=cache)
            mx.eval(out)
        assert mx.isfinite(out).all().item()
        told = {c.layer: str(c.ladder) for c in cache.paged_layers}
        windows = {c.layer for c in cache.paged_layers if not c.keeps_all}
    pagedkv.unwrap(other)
    assert told == {n: "K4V4" if n in windows else "K8V8" for n in told}
    assert asked == [set(told) - windows]


# A store


def heard(monkeypatch: pytest.MonkeyPatch, *layers: int) -> None:
    found = {n: 0.5 if n in layers else 0.0 for n in range(8)}
    monkeypatch.setattr(module, "echoes", lambda model: found)


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any model, from other tests."""
    monkeypatch.setenv(model_notes.FOLDER, "/dev/null/nowhere")


def fresh() -> Any:
    return lively(tiny_llama(layers=8))


def stored(tmp_path: Path, **given: Any) -> pagedkv.TierConfig:
    return pagedkv.TierConfig(cold_dir=str(tmp_path), cold="64MB", **SMALL, **given)


def read(model: Any, cache: Any, n: int, seed: int = 0) -> mx.array:
    out = model(random_tokens(n, seed), cache=cache)
    mx.eval(out)
    return out


def flushed(monkeypatch: pytest.MonkeyPatch, config: pagedkv.TierConfig, *layers: int) -> Path:
    """Flush a sequence of a model in which these layers look things up; the store's note of it."""
    heard(monkeypatch, *layers)
    model = fresh()
    with pagedkv.wrap(model, config) as cache:
        read(model, cache, 600)
        cache.flush()
    pagedkv.unwrap(model)
    (note,) = Path(str(config.cold_dir)).glob("store-*/layers.json")
    return note


def test_a_store_decides_for_the_sequences_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = fresh(), stored(tmp_path)
    heard(monkeypatch, 1, 6)
    with pagedkv.wrap(model, config) as cache:
        read(model, cache, 900)
        cache.flush()
        want = read(model, cache, 3, seed=2)
        disk = cache.context.pager.cold.budget
        parts = [disk.layer_share(n) / disk.layer_share(0) for n in range(8)]
        assert parts == pytest.approx([17 / 9 if n in (1, 6) else 1 for n in range(8)], rel=1e-3)
    pagedkv.unwrap(model)
    heard(monkeypatch, 2, 3)  # another machine, whose sums fall otherwise
    model = fresh()
    with pagedkv.resume(model, config) as cache:
        assert cache.context.settled.layer_kv == "K8V8@1,6"
        assert cache.offset == 900
        assert mx.array_equal(read(model, cache, 3, seed=2), want).item()
        cache.flush()
    pagedkv.unwrap(model)


DAMAGED = (b"", b"{}", b"[1, null]", b"[true]", b"[-1]", b"[99]", b"[0.5]", b"\xff", b"[" * 9999)


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_note_is_found_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    config = stored(tmp_path)
    note = flushed(monkeypatch, config, 1, 6)
    assert json.loads(note.read_bytes()) == [1, 6]
    note.write_bytes(content)
    model = fresh()
    with pagedkv.resume(model, config) as cache:
        assert cache.offset == 600
        cache.flush()
    pagedkv.unwrap(model)
    assert json.loads(note.read_bytes()) == [1, 6]


def test_where_the_note_is_lost_pages_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = stored(tmp_path)
    note = flushed(monkeypatch, config, 1, 6)
    note.unlink()
    heard(monkeypatch, 2, 3)
    model = fresh()
    with pagedkv.resume(model, config) as cache:
        assert cache.offset == 600
        assert cache.context.settled.layer_kv == "K8V8@1,6"
        cache.flush()
        assert json.loads(note.read_bytes()) == [1, 6]
        cache.discard()
    pagedkv.unwrap(model)
    with pagedkv.wrap(fresh(), config) as cache:  # nobody needs those any more
        assert cache.context.settled.layer_kv == "K8V8@2,3"


def test_pages_of_other_layers_than_it_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stored(tmp_path)
    note = flushed(monkeypatch, config, 1, 6)
    note.write_bytes(b"[2, 3]")
    model = fresh()
    with pytest.raises(pagedkv.StoreMismatchError, match=r"layer 1 of .* K8V8 pages, .*'K4V4'"):
        pagedkv.resume(model, config)
    note.write_bytes(b"[1, 6]")  # nothing was lost
    with pagedkv.resume(model, config) as cache:
        assert cache.offset == 600
    pagedkv.unwrap(model)


def test_a_store_that_others_have_taken_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = fresh(), stored(tmp_path)
    heard(monkeypatch, 1, 6)
    first = pagedkv.wrap(model, config)
    first.close()  # the store with it
    flushed(monkeypatch, config, 2, 3)
    with model.make_cache() as cache:
        read(model, cache, 600)
        with pytest.raises(pagedkv.StoreMismatchError, match=r"layers \[2, 3\] have more bits"):
            cache.flush()
    pagedkv.unwrap(model)


def test_layers_that_are_named_have_stores_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard(monkeypatch, 1, 6)
    model = fresh()
    for layer_kv in ("auto", "same", "K8V8@1,6", "K8V8@1"):
        with pagedkv.wrap(model, stored(tmp_path, layer_kv=layer_kv)) as cache:
            read(model, cache, 600)
            assert cache.stored_sequences() == []
            cache.flush()
        pagedkv.unwrap(model)
    assert len(list(tmp_path.glob("store-*"))) == 4
    assert len(list(tmp_path.glob("store-*/layers.json"))) == 1


def test_a_store_of_layers_alike_says_how_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard(monkeypatch, 1, 6)
    model = fresh()
    with pagedkv.wrap(model, stored(tmp_path, layer_kv="same")) as cache:
        read(model, cache, 600)
        cache.flush()
    pagedkv.unwrap(model)
    with pytest.raises(pagedkv.StoreMismatchError, match="names no layers .* layer_kv='same'"):
        pagedkv.resume(model, stored(tmp_path))
    with pagedkv.resume(model, stored(tmp_path, layer_kv="same")) as cache:
        assert cache.offset == 600
    pagedkv.unwrap(model)


def test_layers_that_a_model_does_not_have_are_refused() -> None:
    model = fresh()
    with pytest.raises(pagedkv.ConfigError, match=r"names layers \[8, 9\], but .* \[0, 1, 2"):
        pagedkv.wrap(model, pagedkv.TierConfig(layer_kv="K8V8@1,8-9"))
    assert wrapping_of(model) is None

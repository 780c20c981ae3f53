"""A model is told from every other one, by all bits of its weights and its settings."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map_with_path
from mlx_lm.tuner.utils import linear_to_lora_layers

import pagedkv
from pagedkv.integrations.mlx_lm import model_info as model_facts
from pagedkv.integrations.mlx_lm import weight_hash
from pagedkv.integrations.mlx_lm.model_info import fingerprint
from pagedkv.integrations.mlx_lm.weight_hash import BLOCK, hash_arrays
from tests.models import random_tokens, tiny_llama

SMALL = {
    "hot_tokens": 64,
    "sink_tokens": 4,
    "page_tokens": 256,
    "warm": "32MB",
    "cold": "64MB",
    "layer_kv": "same",
    "treatment": "none",
}


def adapted(seed: int = 0, scale: float = 20.0) -> Any:
    """A tiny Llama with a LoRA adapter; the base is always the same."""
    model = tiny_llama(layers=4)
    model.freeze()
    linear_to_lora_layers(model, 4, {"rank": 2, "scale": scale, "dropout": 0.0})
    mx.random.seed(seed)

    def tuned(path: str, weight: mx.array) -> mx.array:
        return 0.1 * mx.random.normal(weight.shape) if "lora_" in path else weight

    model.update(tree_map_with_path(tuned, model.parameters()))
    mx.eval(model.parameters())
    return model


def one(array: Any) -> str:
    return hash_arrays([("one", mx.array(np.ascontiguousarray(array)))])


# The hash


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_a_block_s_sum_is_that_of_its_definition(size: int) -> None:
    words = np.random.default_rng(size).integers(0, 2**32, size, np.uint32)
    padded = [*map(int, words), *[0] * (-size % BLOCK)]
    keys = [int(k) for k in weight_hash._KEYS]
    expected = []
    for at in range(0, len(padded), BLOCK):
        keyed = [(w + k) % 2**32 for w, k in zip(padded[at : at + BLOCK], keys, strict=True)]
        pairs = zip(keyed[: BLOCK // 2], keyed[BLOCK // 2 :], strict=True)
        expected.append(sum(a * b for a, b in pairs) % 2**64)
    assert np.concatenate([*weight_hash._on_host(mx.array(words))]).tolist() == expected


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.uint8, mx.bool_])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (3, BLOCK), (BLOCK + 1, 3)])
def test_every_device_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype, shape: tuple[int, ...]
) -> None:
    mx.random.seed(1)
    words = weight_hash._words((4 * mx.random.normal(shape)).astype(dtype))
    host = np.concatenate([*weight_hash._on_host(words)])
    monkeypatch.setattr(weight_hash, "PIECE", 2 * BLOCK)  # several pieces
    mx.disable_compile()  # a CPU without a compiler has none
    try:
        device = np.concatenate(weight_hash._on_device(words))
    finally:
        mx.enable_compile()
    assert np.array_equal(host, device)
    assert np.array_equal(host, np.concatenate([*weight_hash._on_host(words)]))


def test_a_single_bit_tells() -> None:
    weight = np.random.default_rng(0).integers(0, 2**32, 2 * BLOCK + 7, np.uint32)
    seen = {one(weight)}
    for place in (0, 1, BLOCK // 2, BLOCK - 1, BLOCK, 2 * BLOCK + 6):
        for bit in range(32):
            other = weight.copy()
            other[place] ^= np.uint32(1 << bit)
            seen.add(one(other))
    assert len(seen) == 1 + 6 * 32


def test_signs_and_places_tell() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    seen = {one(weight), one(weight[::-1]), one(weight[:, ::-1]), one(weight.T)}
    seen |= {one(weight.reshape(256, 64)), one(weight.astype(np.float16)), one(weight[:-1])}
    assert len(seen) == 7
    for a, b in [(0, 1), (2, 63), (5, 40)]:
        swapped, negative = weight.copy(), weight.copy()
        swapped[[a, b]] = weight[[b, a]]
        negative[[a, b], [3, 200]] *= -1
        mixed = weight.copy()
        mixed[a, [1, 200]] = weight[a, [200, 1]]
        seen |= {one(swapped), one(negative), one(mixed)}
    assert len(seen) == 7 + 9
    a, b = mx.array(weight), mx.array(weight + 1)
    named = [(("a", a), ("b", b)), (("a", b), ("b", a)), (("a", a), ("c", b)), (("a", a),)]
    assert len({hash_arrays(pairs) for pairs in named}) == 4


# The fingerprint


def test_what_answers_alike_has_one_name() -> None:
    assert fingerprint(adapted(1)) == fingerprint(adapted(1))
    model = tiny_llama()
    name = fingerprint(model)
    model.train()
    model._position_ids = mx.arange(3)  # as some models keep of a call
    model.model._steps = 7
    assert fingerprint(model) == name
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fingerprint(twin) == name
        twin.model.norm.weight = twin.model.norm.weight * 2
        assert fingerprint(twin) != name
    assert fingerprint(model) == name


def _element(model: Any) -> None:
    weight = model.layers[2].mlp.up_proj.linear.weight
    weight[3, 5] = 1.0  # in place: the array stays the same object


def _all_in_place(model: Any) -> None:
    model.layers[1].self_attn.q_proj.lora_a += 1e-3


def _exchanged(model: Any) -> None:
    weight = model.layers[1].self_attn.q_proj.lora_b
    model.layers[1].self_attn.q_proj.lora_b = weight[:, ::-1]


def _scale(model: Any) -> None:
    model.layers[0].self_attn.v_proj.scale = 10.0


def _eps(model: Any) -> None:
    model.model.norm.eps = 1e-3


@pytest.mark.parametrize("change", [_all_in_place, _exchanged, _scale, _eps])
def test_what_answers_otherwise_has_another(change: Callable[[Any], None]) -> None:
    model = adapted()
    name = fingerprint(model)
    change(model)
    changed = fingerprint(model)
    assert changed != name
    assert fingerprint(adapted()) == name
    _element(other := adapted())
    assert fingerprint(other) not in (name, changed)


def test_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = list[int]()
    real = model_facts.hash_arrays
    monkeypatch.setattr(model_facts, "hash_arrays", lambda n: (times.append(1), real(n))[1])
    model = adapted()
    for _ in range(3):
        fingerprint(model)
    pagedkv.wrap(model, pagedkv.TierConfig(**SMALL)).close()
    pagedkv.unwrap(model)
    assert len(times) == 1
    _exchanged(model)
    fingerprint(model)
    assert len(times) == 2


# Caches that are kept


def test_an_adapter_does_not_take_what_another_left(tmp_path: Path) -> None:
    path, config = (
        str(tmp_path / "a.safetensors"),
        pagedkv.TierConfig(**SMALL, cold_dir=str(tmp_path / "kv")),
    )
    tokens = random_tokens(700)
    first, second, scaled = adapted(1), adapted(2), adapted(1, scale=10.0)
    with pagedkv.wrap(first, config) as cache:
        mx.eval(first(tokens, cache=cache))
        assert cache.remember(tokens[0]) > 0
        cache.save(path)
        cache.flush()
    pagedkv.unwrap(first)
    for other in (second, scaled):
        with pytest.raises(pagedkv.CacheStateError, match="adapter"):
            pagedkv.load(path, other)
        with pytest.raises(pagedkv.StoreMismatchError, match="holds no sequence of"):
            pagedkv.resume(other, config)
        with pagedkv.wrap(other, config) as cache:
            assert cache.reuse(tokens[0]) == 0
        pagedkv.unwrap(other)
    again = adapted(1)
    with pagedkv.resume(again, config) as cache:
        assert cache.offset == 700
    with pagedkv.load(path, again) as cache:
        assert cache.offset == 700
    pagedkv.unwrap(again)


def test_weights_exchanged_under_a_wrapped_model(tmp_path: Path) -> None:
    path, tokens = str(tmp_path / "a.safetensors"), random_tokens(700)
    config = pagedkv.TierConfig(**SMALL, cold_dir=str(tmp_path / "kv"))
    model = adapted()
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(tokens, cache=cache))
        name = cache.flush().sequence
        cache.save(path)
        original = model.parameters()
        model.update(tree_map_with_path(lambda _, w: w * 1.01, original))
        ways: list[Callable[[], Any]] = [
            cache.flush,
            lambda: cache.save(path),
            lambda: cache.remember(tokens[0]),
            lambda: cache[0].state.items(),  # as mlx-lm saves it
            lambda: model.make_cache().reuse(tokens[0]),
            lambda: pagedkv.resume(model, sequence=name),
        ]
        for way in ways:
            with pytest.raises(pagedkv.CacheStateError, match="exchanged after it was wrapped"):
                way()
        with pytest.raises(pagedkv.CacheStateError, match="another model"):
            pagedkv.load(path, model)
        model.update(original)
        cache.save(path)
        with pagedkv.load(path, model) as loaded:
            assert loaded.offset == 700
        model.update(tree_map_with_path(lambda _, w: w * 1.01, original))
    with pagedkv.wrap(model, config) as cache:  # the same settings, and yet another store
        assert not cache.stored_sequences()
        mx.eval(model(tokens, cache=cache))
        cache.flush()
        cache.save(path)
    pagedkv.unwrap(model)

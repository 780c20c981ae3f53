"""Treatments of keys and values: what they are, who gets which, and that attention undoes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv.allocator import KVShape, Precision
from pagedkv.calibration import treatment_rules
from pagedkv.calibration.layer_weights import measure_spread
from pagedkv.integrations.mlx_lm import race
from pagedkv.integrations.mlx_lm.treatments import choose_treatments
from pagedkv.tiers import Treatment
from pagedkv.tiers.codec.affine import codec_for
from pagedkv.tiers.codec.rounding import FLOAT16_MAX, quantize
from pagedkv.tiers.codec.transform import ROTATIONS, rotation_matrix
from tests.kernel_cases import with_feedback
from tests.models import lively, random_tokens, tiny_llama

SETTINGS: dict[str, Any] = {
    "hot_tokens": 32,
    "sink_tokens": 4,
    "page_tokens": 256,
    "hot_dtype": "model",
    "cold": 0,
}


def scaled(shape: KVShape, seed: int = 0, rotation: str = "hadamard") -> Treatment:
    """Some treatment with scales far from one, and a head that is left as it is."""
    rng = np.random.default_rng(seed)

    def scales(dim: int) -> list[np.ndarray | None]:
        return [*np.exp2(rng.uniform(-2, 2, (shape.kv_heads - 1, dim))), None]

    keys, values = scales(shape.key_dim), scales(shape.value_dim)
    return Treatment.scaled(shape, keys, values, rotation, 3)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("dim", [16, 64, 72, 80, 96, 128])
def test_rotations_are_orthogonal_and_differ_by_seed(rotation: str, dim: int) -> None:
    matrix = rotation_matrix(rotation, dim, 0, "key")
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-12)
    others = [rotation_matrix(rotation, dim, 1, "key"), rotation_matrix(rotation, dim, 0, "value")]
    assert all(np.abs(matrix - other).max() > 0.1 for other in others)
    if rotation != "householder":
        assert np.abs(matrix).max() < 2.5 / np.sqrt(dim), "a rotation that mixes everything"


def test_a_reflection_moves_little_of_each_channel() -> None:
    matrix = rotation_matrix("householder", 64, 0, "key")
    np.testing.assert_allclose(np.abs(matrix), np.full((64, 64), 2 / 64) + np.eye(64) * 60 / 64)
    np.testing.assert_array_equal(matrix, rotation_matrix("householder", 64, 0, "key"))
    assert 8 < np.sum(np.diag(matrix) < 0) < 56, "random signs"
    assert np.linalg.matrix_rank(np.abs(np.diag(matrix)) * np.sign(np.diag(matrix))[:, None]) == 1


def test_products_with_page_keys_are_the_scores() -> None:
    shape = KVShape(3, 80, 72)
    treatment = scaled(shape)
    rng = np.random.default_rng(0)
    q, k = (mx.array(rng.standard_normal((3, n, 80)), mx.float32) for n in (5, 40))
    v = mx.array(rng.standard_normal((3, 40, 72)), mx.float32)
    scores = treatment.page_queries(q) @ treatment.page_keys(k).swapaxes(1, 2)
    np.testing.assert_allclose(np.array(scores), np.array(q @ k.swapaxes(1, 2)), atol=1e-4)
    np.testing.assert_allclose(
        np.array(treatment.own_keys(treatment.page_keys(k))), np.array(k), atol=1e-4
    )
    weights = mx.softmax(scores, axis=-1)
    out = treatment.own_values(weights @ treatment.page_values(v))
    np.testing.assert_allclose(np.array(out), np.array(weights @ v), atol=1e-4)
    assert np.abs(np.array(treatment.page_keys(k) - k)).max(axis=(1, 2))[:-1].min() > 0.5
    np.testing.assert_array_equal(np.array(treatment.page_keys(k))[-1], np.array(k)[-1])


def test_a_treatment_in_words_and_as_json() -> None:
    treatment = scaled(KVShape(2, 64, 48))
    words = np.array(treatment.words).view(np.float16)
    np.testing.assert_array_equal(
        words[: 2 * 64 * 64].reshape(2, 64, 64), np.array(treatment.queries)
    )
    np.testing.assert_array_equal(
        words[2 * 64 * 64 :].reshape(2, 48, 48), np.array(treatment.outputs)
    )
    assert np.allclose(treatment.output_gain, np.abs(treatment.outputs).sum(axis=1).max(axis=1))
    both = with_feedback(treatment)
    of_before = json.dumps({k: v for k, v in treatment.describe().items() if k != "value_feedback"})
    assert Treatment.restore(json.loads(of_before), np.asarray(treatment.words), treatment.shape)
    for other in (treatment, both, both.only(True, False), both.only(False, True)):
        told = json.loads(json.dumps(other.describe()))
        again = Treatment.restore(told, np.asarray(other.all_words), other.shape)
        assert again == other
        assert hash(again) == hash(other)
        assert (again.parts, str(again)) == (other.parts, str(other))
        for name in ("feedback", "value_feedback"):
            mine, theirs = getattr(again, name), getattr(other, name)
            assert (mine is None) == (theirs is None)
            assert mine is None or mx.array_equal(mine, theirs).item()
        for damaged in (
            {**told, "digest": "0" * 16},
            {**told, "parts": [True]},
            {**told, "feedback": not told["feedback"]},
            {**told, "value_feedback": not told["value_feedback"]},
            {name: value for name, value in told.items() if name != "kind"},
        ):
            with pytest.raises(pagedkv.ConfigError, match="not the matrices"):
                Treatment.restore(damaged, np.asarray(other.all_words), other.shape)
        words = np.array(other.all_words)
        words[-1] ^= 1
        with pytest.raises(pagedkv.ConfigError, match="their digest is"):
            Treatment.restore(told, words, other.shape)
        words[-1] = 0x7C007C00
        with pytest.raises(pagedkv.ConfigError, match="not finite"):
            Treatment.restore(told, words, other.shape)
        with pytest.raises(pagedkv.ConfigError, match="needs"):
            Treatment.restore(told, words, KVShape(2, 64, 64))
    assert len({scaled(treatment.shape), with_feedback(treatment), treatment}) == 2
    with pytest.raises(pagedkv.ConfigError, match="64 key channels, not 63"):
        Treatment.scaled(treatment.shape, np.ones((2, 63)), np.ones((2, 48)))
    with pytest.raises(pagedkv.ConfigError, match=r"matrices for keys are \[2, 64, 64\]"):
        Treatment.of(treatment.shape, np.ones((1, 64, 64)), None)
    with pytest.raises(pagedkv.ConfigError, match="float16 does not hold"):
        Treatment.of(treatment.shape, np.full((2, 64, 64), 1e6), None)


def test_scales_are_bounded_and_their_mean_does_not_matter() -> None:
    shape = KVShape(1, 64, 64)
    scales = np.exp2(np.linspace(-12, 12, 64))[None]
    one, other = (Treatment.scaled(shape, x, x) for x in (scales, 1000 * scales))
    np.testing.assert_allclose(one.queries, other.queries, rtol=2e-3)
    lengths = np.linalg.norm(np.array(one.queries)[0], axis=1)  # of what queries are divided by
    np.testing.assert_allclose(lengths, np.clip(1 / scales[0], 1 / 64, 64), rtol=2e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantizing_rounds_to_the_nearest_of_its_levels(bits: int) -> None:
    rng = np.random.default_rng(bits)
    x = mx.array(rng.standard_normal((6, 128)) * 3 + 40, mx.float16)
    codes, scales, biases = quantize(x, 64, bits)
    wide = [a.astype(mx.float32) for a in (scales, biases)]
    got = np.array(mx.dequantize(codes, *wide, group_size=64, bits=bits))
    groups = np.array(x.astype(mx.float32)).reshape(6, 2, 64, 1)
    steps = np.arange(2**bits)
    levels = np.array(wide[1])[..., None, None] + np.array(wide[0])[..., None, None] * steps
    nearest = np.abs(groups - levels).min(axis=-1)
    np.testing.assert_allclose(
        np.abs(got.reshape(6, 2, 64) - groups[..., 0]), nearest, atol=1e-5 * 60
    )
    ends = groups[..., 0].min(axis=-1), groups[..., 0].max(axis=-1)
    outside = {2: 0.1, 3: 0.025}.get(bits, 0.0) * (ends[1] - ends[0])
    np.testing.assert_allclose(levels[..., 0].squeeze(-1), ends[0] + outside, atol=0.03)
    np.testing.assert_allclose(levels[..., -1].squeeze(-1), ends[1] - outside, atol=0.03)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_quantized_stays_within_float16(bits: int) -> None:
    rng = np.random.default_rng(0)
    x = mx.array(rng.choice([-FLOAT16_MAX, FLOAT16_MAX, 64000, 1.0], (40, 64)), mx.float16)
    codes, scales, biases = quantize(x, 64, bits)
    wide = [a.astype(mx.float32) for a in (scales, biases)]
    out = mx.dequantize(codes, *wide, group_size=64, bits=bits)
    assert mx.abs(out).max().item() <= FLOAT16_MAX
    assert mx.isfinite(out.astype(mx.float16)).all().item()


@pytest.mark.parametrize(
    ("kv", "rotation"),
    [("K4V4", "householder"), ("K2V3", "hadamard"), ("fp16:300,K4V4", "fourier")],
)
@pytest.mark.parametrize("backend", ["dequantize", "quantized"])
@pytest.mark.parametrize("queries", [1, 20])
def test_attention_over_treated_pages_is_exact(
    kv: str, rotation: str, backend: str, queries: int
) -> None:
    """Against float64 attention over what the pages stand for."""
    shape = KVShape(2, 64, 64)
    rng = np.random.default_rng(1)
    with pagedkv.PagedCache.standalone(
        1, pagedkv.TierConfig(kv=kv, backend=backend, **SETTINGS)
    ) as cache:
        cache.context.pager.treatments[0] = scaled(shape, rotation=rotation)
        layer = cache[0]
        tokens = 1000
        k = rng.standard_normal((1, 2, tokens, 64)) * rng.uniform(0.1, 8, 64)
        v = rng.standard_normal((1, 2, tokens, 64))
        for start in range(0, tokens, 100):
            part = [mx.array(x[:, :, start : start + 100], mx.float32) for x in (k, v)]
            q = mx.array(rng.standard_normal((1, 4, 1, 64)), mx.float32)
            pagedkv.attention(q, *part, cache=layer, scale=0.1)
        part = [mx.array(rng.standard_normal((1, 2, queries, 64)), mx.float32) for _ in "kv"]
        q = mx.array(rng.standard_normal((1, 4, queries, 64)), mx.float32)
        out = np.array(pagedkv.attention(q, *part, cache=layer, scale=0.1))
        view = layer.view()
        assert view.entries
        assert view.pager is not None
        assert view.pager.treatment
        keys, values = (np.array(x, np.float64)[0] for x in view.dense(mx.float32))
        close = 0.7 if "K2" in kv else 0.95
        assert np.corrcoef(keys[:, :tokens].ravel(), k[0].ravel())[0, 1] > close
    total = tokens + queries
    scores = np.einsum("hgld,htd->hglt", np.array(q[0]).reshape(2, 2, queries, 64), keys) * 0.1
    seen = np.arange(total) <= np.arange(tokens, total)[:, None]
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    want = np.einsum("hglt,htd->hgld", p / p.sum(axis=-1, keepdims=True), values)
    np.testing.assert_allclose(out, want.reshape(out.shape), atol=2e-5)


def shapes(model: Any) -> dict[int, KVShape]:
    args = model.args
    dim = args.hidden_size // args.num_attention_heads
    return dict.fromkeys(range(len(model.layers)), KVShape(args.num_key_value_heads, dim, dim))


def plant(model: Any, channels: tuple[int, ...], factor: float) -> None:
    """Make key channels large and queries small there: the model says what it said before."""
    for layer in model.layers:
        attention, dim = layer.self_attn, layer.self_attn.rope.dims
        for projection, by in ((attention.k_proj, factor), (attention.q_proj, 1 / factor)):
            rows = np.ones(projection.weight.shape[0], np.float32)
            half = dim // 2
            for start in range(0, len(rows), dim):
                for channel in channels:
                    rows[start + channel] = rows[start + channel + half] = by
            projection.weight = projection.weight * mx.array(rows)[:, None]
    mx.eval(model.parameters())


def test_outlier_channels_are_scaled_down_before_they_are_mixed() -> None:
    model = tiny_llama(dim=256)
    plant(model, (3, 11), 16.0)
    for number, shape in shapes(model).items():
        spread = measure_spread(model.layers[number], shape)
        assert spread is not None
        treatment = treatment_rules.scaled(spread, shape)
        for head in np.array(treatment.queries):
            lengths = np.log2(np.linalg.norm(head, axis=1))  # what queries are multiplied with
            planted, others = lengths[[3, 11, 35, 43]], np.delete(lengths, [3, 11, 35, 43])
            # A sixteenth of the query, by its root; and all of the excess, by its root: 4 and 4.
            np.testing.assert_allclose(planted - np.median(others), 4, atol=0.25)
            assert others.max() - others.min() < 0.75
        assert 12 < float(treatment.reason.split()[3]) < 24


def test_only_what_has_few_bits_is_treated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    monkeypatch.setattr(race, "LEAST_GAIN", -9.0)  # random models gain little: all can win

    def parts(kv: str, treatment: str = "auto") -> set[str]:
        config = pagedkv.TierConfig(kv=kv, treatment=treatment)
        chosen = choose_treatments(model, config, shapes(model))
        names = ("keys", "values")
        return {n for t in chosen.values() for n, on in zip(names, t.parts, strict=True) if on}

    assert parts("K8V8") == parts("fp16") == parts("K2V2", "none") == set()
    assert parts("K8V4") == {"values"}
    assert parts("K4V8") == {"keys"}
    assert parts("K8V8:4096,K8V4:8192,K4V4") == {"keys", "values"}
    assert all(parts("K4V4", name) == {"keys", "values"} for name in ROTATIONS)
    with pytest.raises(pagedkv.ConfigError, match="treatment is one of"):
        pagedkv.TierConfig(treatment="spin")


def divergence(model: Any, tokens: mx.array, **settings: Any) -> float:
    """Mean KL to the model's own cache, tokens read in chunks."""

    def read(cache: Any) -> mx.array:
        parts = []
        for start in range(0, tokens.shape[1], 64):
            parts.append(model(tokens[:, start : start + 64], cache=cache)[0])
            mx.eval(parts[-1])
        logits = mx.concatenate(parts)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    from mlx_lm.models.cache import make_prompt_cache

    own = read(make_prompt_cache(model))
    with pagedkv.wrap(model, pagedkv.TierConfig(**{**SETTINGS, **settings})) as cache:
        ours = read(cache)
        assert cache.stats().warm.pages
    pagedkv.unwrap(model)
    return float((mx.exp(own) * (own - ours)).sum(axis=-1)[300:].mean().item())


@pytest.mark.parametrize("factor", [8.0, 16.0, 32.0])
def test_the_choice_is_right_for_planted_outliers(factor: float) -> None:
    model = lively(tiny_llama(dim=256))
    plant(model, (3, 11), factor)
    tokens = random_tokens(1400)  # of half of them KL is known to a tenth only
    kl = {
        treatment: divergence(model, tokens, kv="K4V8", treatment=treatment)
        for treatment in ("auto", "none", "hadamard")
    }
    # A random model's numbers are normally distributed: there is nothing to gain by rotating.
    assert kl["hadamard"] > 3 * kl["none"], kl
    assert kl["auto"] < 1.1 * kl["none"], kl


@pytest.mark.parametrize(
    ("kv", "treatment", "treated"),
    [
        ("K4V4", "auto", True),
        ("K8V4", "fourier", True),  # keys are left alone, and have a matrix all the same
        ("K8V8:900,K3V8", "auto", True),
        ("K4V4", "none", False),
        ("K8V8", "auto", False),
        ("fp16", "auto", False),
    ],
)
def test_a_plan_counts_treatments(kv: str, treatment: str, treated: bool) -> None:
    model = tiny_llama(layers=3, dim=128)
    config = pagedkv.TierConfig(**SETTINGS, kv=kv, treatment=treatment)
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(random_tokens(600), cache=cache))
        stats = cache.stats()
    pagedkv.unwrap(model)
    plan = pagedkv.plan(KVShape(2, 32, 32), 3, 2000, config)
    assert plan.treatment_bytes == stats.treatment_bytes or treatment == "auto"
    assert plan.treatment_bytes >= stats.treatment_bytes, "it is the most that a race may choose"
    assert (plan.treatment_bytes > 0) == treated
    without = pagedkv.plan(KVShape(2, 32, 32), 3, 2000, replace(config, treatment="none"))
    assert plan.memory_bytes == without.memory_bytes + plan.treatment_bytes


def test_saved_pages_keep_their_treatment(tmp_path: Path) -> None:
    model = lively(tiny_llama())
    tokens = random_tokens(600)
    config = pagedkv.TierConfig(**SETTINGS)
    path = tmp_path / "a.safetensors"
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(tokens, cache=cache))
        assert all("attention errs" in told for told in cache.stats().treatments)
        assert cache.stats().treatment_bytes > 0
        cache.save(str(path))
        want = model(random_tokens(3, seed=1), cache=cache)
        mx.eval(want)
    with pagedkv.load(str(path), model) as cache:
        assert mx.array_equal(model(random_tokens(3, seed=1), cache=cache), want)
    pagedkv.unwrap(model)
    from mlx_lm.models.cache import load_prompt_cache

    loaded = load_prompt_cache(str(path))  # without the model: the file says what was done
    got = model(random_tokens(3, seed=1), cache=loaded)  # not wrapped: attended densely
    np.testing.assert_allclose(np.array(got), np.array(want), atol=1e-3)
    pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS, treatment="none")).close()
    with pytest.warns(UserWarning, match="encoded anew"):
        pagedkv.load(str(path), model).close()
    pagedkv.unwrap(model)


def test_stores_of_other_treatments_are_others(tmp_path: Path) -> None:
    model = lively(tiny_llama())
    settings = {**SETTINGS, "cold": "64MB", "cold_dir": str(tmp_path)}
    with pagedkv.wrap(model, pagedkv.TierConfig(**settings)) as cache:
        mx.eval(model(random_tokens(600), cache=cache))
        cache.flush()
        want = model(random_tokens(1, seed=1), cache=cache)
        mx.eval(want)
    pagedkv.unwrap(model)
    with pytest.raises(pagedkv.PagedKVError):
        pagedkv.resume(model, pagedkv.TierConfig(**settings, treatment="none"))
    pagedkv.unwrap(model)
    with pagedkv.resume(model, pagedkv.TierConfig(**settings)) as cache:
        assert mx.array_equal(model(random_tokens(1, seed=1), cache=cache), want)
    pagedkv.unwrap(model)


def test_bounds_of_cold_pages_hold_for_treated_ones() -> None:
    rng = np.random.default_rng(2)
    settings = {**SETTINGS, "warm": 200_000, "cold": "64MB", "treatment": "hadamard"}
    k, v = (mx.array(rng.standard_normal((1, 1, 3000, 64)), mx.float32) for _ in "kv")
    k = k * mx.where(mx.arange(3000)[:, None] < 2000, 0.02, 1.0)
    # The queries are about one channel. A token far away has much of it, the newest ones some; in
    # pages it is a sixty-fourth of every channel's square.
    q = mx.zeros((1, 2, 1, 64))
    q[..., 0] = 24.0
    k[:, :, 500], k[:, :, -40:, 0] = q[:, 0], 6.0
    outs = []
    for skip in (0.0, 0.2):
        with pagedkv.PagedCache.standalone(
            1, pagedkv.TierConfig(skip_below=skip, **settings)
        ) as cache:
            first = mx.zeros((1, 2, 1, 64))
            for start in range(0, 3000, 500):
                part = [x[:, :, start : start + 500] for x in (k, v)]
                mx.eval(pagedkv.attention(first, *part, cache=cache[0], scale=0.125))
            last = [mx.zeros((1, 1, 1, 64))] * 2
            outs.append(np.array(pagedkv.attention(q, *last, cache=cache[0], scale=0.125)))
            skipped = cache.stats().skipped
    assert skipped is not None
    assert skipped.skipped_pages > 0
    assert np.abs(outs[0] - outs[1]).max() <= skipped.error_bound + 1e-6
    np.testing.assert_allclose(outs[1][0, 0, 0], np.array(v[0, 0, 500]), atol=0.5)


def test_a_codec_gives_back_what_came() -> None:
    shape = KVShape(2, 64, 72)
    rng = np.random.default_rng(0)
    keys = mx.array(rng.standard_normal((2, 512, 64)) * 3, mx.float32)
    values = mx.array(rng.standard_normal((2, 512, 72)), mx.float32)
    for precision, limit in (("K8V8", 0.2), ("fp16", 0.02)):
        codec = codec_for(shape, 256, Precision.parse(precision), mx.float16, scaled(shape))
        records = codec.encode(keys, values)
        got = codec.keys(records, mx.float32).transpose(1, 0, 3, 2).reshape(2, 512, 64)
        assert mx.abs(got - keys).max().item() < limit * 8
        got = codec.values(records, mx.float32).transpose(1, 0, 2, 3).reshape(2, 512, 72)
        assert mx.abs(got - values).max().item() < limit * 4
        assert mx.array_equal(records[1:], codec.encode(keys[:, 256:], values[:, 256:]))

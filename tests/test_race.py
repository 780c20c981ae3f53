"""Treatments that are chosen by a race: what decides, who is given them, where they are kept."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import pagedkv
from pagedkv import KVShape, Precision
from pagedkv.cache.persistence.store import TREATMENTS, UNDECIDED
from pagedkv.calibration.file import Calibration
from pagedkv.integrations.mlx_lm import model_notes, own_text, race, treatments
from pagedkv.integrations.mlx_lm.model_info import fingerprint
from pagedkv.integrations.mlx_lm.own_text import LENGTH, ROWS, SHOWN, own_texts
from pagedkv.integrations.mlx_lm.race import Wanted, errors
from pagedkv.integrations.mlx_lm.recording import AttentionCall
from pagedkv.tiers import Treatment
from pagedkv.tiers.codec.affine import codec_for
from tests.model_zoo import build
from tests.models import lively, random_tokens, tiny_llama
from tests.test_treatment import SETTINGS, divergence


@pytest.fixture(scope="module")
def model() -> Any:
    return lively(tiny_llama(dim=256))


def read(model: Any, cache: Any, count: int, seed: int = 0, chunk: int = 64) -> mx.array:
    """The last logits of a prompt."""
    tokens = random_tokens(count, seed)
    for start in range(0, count, chunk):
        out = model(tokens[:, start : start + chunk], cache=cache)
        mx.eval(out)
    return out[:, -1]


def digests(cache: pagedkv.PagedCache) -> list[str]:
    return [layer.treatment.digest for layer in cache.paged_layers]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Another machine: nothing is known of any model there, and it computes otherwise."""

    def go() -> None:
        monkeypatch.setenv(model_notes.FOLDER, str(tmp_path / "elsewhere"))
        real = own_text.own_texts
        monkeypatch.setattr(treatments, "own_texts", lambda model: tuple(reversed_all(real(model))))

    return go


def reversed_all(texts: tuple[list[list[int]], list[int]]) -> Any:
    shown, held = texts
    yield [text[::-1] for text in shown]
    yield held[::-1]


# What the model writes


def test_a_model_writes_the_same_every_time(model: Any) -> None:
    mx.random.seed(1)
    before = mx.random.state[0].tolist()
    shown, held = own_texts(model)
    assert [sum(map(len, shown)), len(held)] == [SHOWN * LENGTH, (ROWS - SHOWN) * LENGTH]
    assert mx.random.state[0].tolist() == before, "the user's random numbers are the user's"
    assert own_texts(model) == (shown, held)
    assert len({*shown[0]}) > 20


def test_it_writes_what_it_finds_likely(model: Any) -> None:
    shown, _ = own_texts(model)
    rows = mx.array(shown[0][: 4 * LENGTH]).reshape(4, LENGTH)
    logits = model(rows, cache=make_prompt_cache(model))[:, :-1]
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    written = mx.take_along_axis(logits, rows[:, 1:, None], axis=-1).mean().item()
    expected = (mx.exp(logits) * logits).sum(axis=-1).mean().item()
    assert abs(written - expected) < 0.15 * abs(expected)


def test_no_more_is_read_than_the_model_takes() -> None:
    short = tiny_llama(max_position_embeddings=200)
    shown, held = own_texts(short)
    assert max(map(len, shown)) == 200 == len(held)
    assert sum(map(len, shown)) == SHOWN * LENGTH


# What is measured


def call(keys: mx.array, values: mx.array, q: mx.array, mask: Any = "causal") -> AttentionCall:
    return AttentionCall(q, keys, values, 0.1, mask, None)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("kind", [None, "hadamard"])
def test_errors_are_those_of_attention(kind: str | None, window: int | None) -> None:
    """In float64, by the formula, of the tokens that pages hold."""
    shape, held, count = KVShape(2, 32, 64), 900, race.QUERIES
    rng = np.random.default_rng(0)
    keys, values = (
        rng.standard_normal((2, held, d)).astype(np.float32) * np.geomspace(0.2, 4, d)
        for d in (32, 64)
    )
    q = rng.standard_normal((4, 256, 32)).astype(np.float32)
    at, own = np.arange(held), np.arange(held - 256, held)[:, None]
    seen = (at <= own) & (at > own - (window or held))
    mask = "causal" if window is None else mx.array(seen)
    want = Wanted(shape, Precision(4, 2), True, True)
    treatment = kind and Treatment.plain(shape, kind)
    outputs = rng.standard_normal((2, 64, 64))
    outputs = outputs @ outputs.swapaxes(1, 2)
    mlx = (mx.array(x, mx.float32)[None] for x in (keys, values, q))
    got = errors(call(*mlx, mask), treatment, want, outputs)

    end = 64 + (held - count - 64 - 64) // 64 * 64
    paged = (
        np.array(x, np.float64)
        for x in race._rounded(
            mx.array(keys[:, 64:end], mx.float32), mx.array(values[:, 64:end], mx.float32),
            treatment, want,
        )
    )  # fmt: skip

    def attended(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        rows = q[:, -count:].reshape(2, 2, count, 32).astype(np.float64)
        scores = np.where(seen[-count:], 0.1 * rows @ keys[:, None].swapaxes(2, 3), -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return shares / shares.sum(axis=-1, keepdims=True) @ values[:, None]

    exact, (page_keys, page_values) = attended(keys, values), paged
    whole = [np.array(x, np.float64) for x in (keys, values)]
    whole[0][:, 64:end], whole[1][:, 64:end] = page_keys, page_values
    for number, other in enumerate((attended(whole[0], values), attended(keys, whole[1]))):
        change = other - exact
        cost = np.einsum("hrqd,hde,hrqe->h", change, outputs, change)
        assert (cost > 0).all()
        np.testing.assert_allclose(got[number], cost, rtol=5e-3)  # TF32 on CUDA


SHAPE = KVShape(2, 64, 64)


def winner(
    monkeypatch: pytest.MonkeyPatch, costs: list[Any], *parts: tuple[bool, bool]
) -> Treatment | None:
    """Of a rotation by each transform, which cost so much; the first is what no treatment costs."""
    treatments = [Treatment.plain(SHAPE, name) for name in ("hadamard", "fourier")]
    told = {treatment: np.array(cost) for treatment, cost in zip([None, *treatments], costs)}  # noqa: B905
    monkeypatch.setattr(race, "errors", lambda call, t, *rest: told[t])
    given = parts or ((True, True),) * 2
    candidates = list(zip(treatments[: len(costs) - 1], given, strict=False))
    want = Wanted(SHAPE, Precision(4, 4), True, True)
    return race._winner(None, candidates, want, None)  # type: ignore[arg-type]


ONE, HALF = [[1.0, 1.0], [1.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]]


def test_the_plain_codec_wins_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounds as well as no treatment is not used, nor what gains next to nothing."""
    assert winner(monkeypatch, [ONE, ONE]) is None
    assert winner(monkeypatch, [ONE, [[0.95, 0.95], [0.95, 0.91]]]) is None
    found = winner(monkeypatch, [ONE, [[0.5, 0.5], [0.95, 0.95]]])
    assert found is not None and found.parts == (True, False)
    assert str(found) == "keys rotated (hadamard): attention errs 0.5 times as much as without"
    found = winner(monkeypatch, [ONE, [[np.nan, np.nan], [0.5, 0.5]]])
    assert found is not None and found.parts == (False, True)
    assert winner(monkeypatch, [[[0.0, 0.0]] * 2] * 2) is None, "nothing was rounded"
    assert winner(monkeypatch, [ONE, HALF], (False, False)) is None


def test_keys_and_values_are_raced_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [ONE, [[0.2, 0.2], [0.8, 0.8]], [[0.3, 0.3], [0.1, 0.1]]]
    found = winner(monkeypatch, costs)
    first, second = (Treatment.plain(SHAPE, name) for name in ("hadamard", "fourier"))
    assert found is not None
    assert mx.array_equal(found.queries, first.queries).item()
    assert mx.array_equal(found.outputs, second.outputs).item()
    assert "keys and values rotated (hadamard) / rotated (fourier)" in str(found)


def test_heads_are_raced_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    found = winner(monkeypatch, [ONE, [[0.2, 1.2], [2.0, 2.0]], [[0.3, 1.1], [2.0, 2.0]]])
    assert found is not None and found.parts == (True, False)
    rotated = Treatment.plain(SHAPE, "hadamard").queries
    assert mx.array_equal(found.queries[0], rotated[0]).item()
    assert mx.array_equal(found.queries[1], mx.eye(64)).item()
    told = "keys mixed head by head: attention errs 0.6 times as much as without"
    assert str(found) == told


def test_a_head_that_is_left_alone_is_rounded_as_without(model: Any) -> None:
    """Beside one whose errors are made up for."""
    rng = np.random.default_rng(0)
    feedback = np.triu(rng.standard_normal((2, 64, 64)), 1) * 0.1
    feedback[1] = 0
    q = np.array(Treatment.plain(SHAPE, "hadamard").queries, np.float64)
    q[1] = np.eye(64)
    treatment = Treatment.of(SHAPE, q, q, feedback, "", "", feedback)
    keys, values = (mx.array(rng.standard_normal((2, 256, 64)), mx.float16) for _ in range(2))
    codecs = [codec_for(SHAPE, 256, Precision(4, 4), mx.float16, t) for t in (treatment, None)]
    mixed, plain = ((c.keys(r, mx.float32), c.values(r, mx.float32))
                    for c in codecs for r in [c.encode(keys, values)])  # fmt: skip
    for ours, theirs in zip(mixed, plain, strict=True):
        assert mx.array_equal(ours[:, 1], theirs[:, 1]).item()
        assert not mx.array_equal(ours[:, 0], theirs[:, 0]).item()


def test_matrices_that_would_ruin_a_layer_are_not_used(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rules make of a layer that they were not made for."""
    made = race.balanced

    def ruinous(shape: KVShape, *rest: Any) -> Treatment:
        good = made(shape, *rest)
        rng = np.random.default_rng(0)
        q = np.stack([np.diag(np.geomspace(1 / 64, 64, 64)) @ np.linalg.qr(h)[0]
                      for h in rng.standard_normal((2, 64, 64))])  # fmt: skip
        return Treatment.of(shape, q, np.array(good.outputs), None, "ruined", "")

    monkeypatch.setattr(race, "balanced", ruinous)
    monkeypatch.setenv(model_notes.FOLDER, "/dev/null/nowhere")
    with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)) as cache:
        assert not any("keys ruined" in t or "keys and values ruined" in t
                       for t in cache.stats().treatments)  # fmt: skip
    pagedkv.unwrap(model)


# Who is given them


def test_no_prompt_has_a_say(model: Any) -> None:
    """Nor their order, nor how they are cut, nor which process it is."""
    found = []
    for first in (mx.full((1, 600), 7, mx.int32), random_tokens(600, 1), random_tokens(20, 2)):
        with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)) as cache:
            before = digests(cache)
            mx.eval(model(first, cache=cache))
            assert digests(cache) == before
            found.append(before)
        pagedkv.unwrap(model)
    assert found[0] == found[1] == found[2]
    other = lively(tiny_llama(dim=256))
    with pagedkv.wrap(other, pagedkv.TierConfig(**SETTINGS)) as cache:
        assert digests(cache) == found[0]
    pagedkv.unwrap(other)


def test_a_monotonous_prompt_spoils_nothing(model: Any) -> None:
    tokens, config = random_tokens(900), pagedkv.TierConfig(**SETTINGS, kv="K4V8")
    want = model(tokens, cache=make_prompt_cache(model))
    away = []
    for first in (None, mx.full((1, 900), 7, mx.int32)):
        with pagedkv.wrap(model, config) as cache:
            if first is not None:
                other = model.make_cache()
                mx.eval(model(first, cache=other))
                other.close()
            away.append(model(tokens, cache=cache) - want)
            mx.eval(away)
        pagedkv.unwrap(model)
    assert mx.array_equal(*away).item()


def test_the_race_is_run_once_per_model(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    real = treatments.raced
    monkeypatch.setattr(treatments, "raced", lambda *args: (runs.append(1), real(*args))[1])
    monkeypatch.setenv(model_notes.FOLDER, str(tmp_path))

    def chosen(kv: str = "K4V4") -> list[str]:
        with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS, kv=kv)) as cache:
            found = list(cache.stats().treatments)
        pagedkv.unwrap(model)
        return found

    first = chosen()
    assert chosen() == first and len(runs) == 1, "reasons, too"
    assert all("attention errs" in told for told in first), first
    chosen("K2V2")
    assert chosen() == first and len(runs) == 2, "other bits are another race"
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600] * 2
    for path in tmp_path.iterdir():
        path.write_text(path.read_text()[:-100])
    assert chosen() == first and len(runs) == 3, "a damaged file is as good as none"
    assert chosen() == first and len(runs) == 3


@pytest.mark.parametrize("kv", ["K8V8", "fp16"])
@pytest.mark.parametrize("treatment", ["auto", "none", "hadamard"])
def test_nothing_is_read_where_nothing_is_decided(
    model: Any, kv: str, treatment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(treatments, "own_texts", lambda model: pytest.fail("it was read"))
    pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS, kv=kv, treatment=treatment)).close()
    pagedkv.unwrap(model)


@pytest.mark.parametrize("problem", ["embedding", "numbers"])
def test_where_nothing_can_be_learned_of_keys_the_rest_runs(
    model: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(model_notes.FOLDER, "/dev/null/nowhere")
    if problem == "embedding":
        monkeypatch.setattr(race, "rope_of", lambda layer: lambda rows, offset: rows**2 + 1)
    else:
        lost = lambda self: np.full((2, 64, 64), np.nan)  # noqa: E731
        monkeypatch.setattr("pagedkv.calibration.moments.Covariances.queries", property(lost))
    with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)) as cache:
        assert mx.isfinite(read(model, cache, 512)).all().item()
        told = cache.stats().treatments
        assert not any("keys balanced" in t or "keys and values balanced and rotated:" in t
                       for t in told), told  # fmt: skip
    pagedkv.unwrap(model)


def test_a_model_that_cannot_write_is_left_plain(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: Any) -> Any:
        raise ValueError("images first")

    monkeypatch.setattr(treatments, "own_texts", fails)
    monkeypatch.setenv(model_notes.FOLDER, "/dev/null/nowhere")
    with pytest.warns(UserWarning, match="did not read tokens of its own.*images first"):
        cache = pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS))
    assert set(cache.stats().treatments) == {"none"}
    cache.close()
    pagedkv.unwrap(model)


def test_the_race_leaves_the_model_as_it_was(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(model_notes.FOLDER, "/dev/null/nowhere")
    before, name = read(model, make_prompt_cache(model), 100), fingerprint(model)
    pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)).close()
    pagedkv.unwrap(model)
    assert mx.array_equal(read(model, make_prompt_cache(model), 100), before).item()
    assert fingerprint(model) == name


def test_it_pays_where_channels_go_together() -> None:
    """Queries and keys that are about few directions; each channel alone looks like the others."""
    model = lively(tiny_llama(dim=256, rope_theta=1e12))  # which hardly turns most of them
    rng = np.random.default_rng(0)
    for layer in model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj):
            rows = np.array(projection.weight).reshape(-1, 64, 256)
            few, other = (np.linalg.qr(rng.standard_normal((64, 64)))[0] for _ in range(2))
            mixed = few @ np.diag(np.geomspace(4, 0.04, 64)) @ other @ rows
            projection.weight = mx.array(mixed.reshape(-1, 256).astype(np.float32))
    mx.eval(model.parameters())
    tokens = random_tokens(1000)
    for kv, gain in (("K4V8", 0.7), ("K2V8", 0.8)):
        kl = {
            t: divergence(model, tokens, kv=kv, treatment=t) for t in ("auto", "hadamard", "none")
        }
        assert kl["auto"] < gain * min(kl["hadamard"], kl["none"]), (kv, kl)


@pytest.mark.parametrize(
    ("kind", "seen"),
    [("gemma3n", 1), ("gpt_oss", 2), ("qwen3_5", 2), ("phi3", 4), ("gemma2", 0)],
)
def test_other_kinds_of_models(
    kind: str, seen: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Shared keys, windows, partial embeddings, recurrent layers; attention of a model's own."""
    monkeypatch.setattr(race, "LEAST_GAIN", -9.0)  # random models gain little: all that can win do
    monkeypatch.setenv(model_notes.FOLDER, "/dev/null/nowhere")
    other = build(kind)
    with pagedkv.wrap(other, pagedkv.TierConfig(**SETTINGS)) as cache:
        out = read(other, cache, 640)
        assert mx.isfinite(out).all().item()
        held = [p for p in cache.context.pager.layer_pagers if p.pages]
        found = [p.treatment for p in held if p.treatment]
        assert len(found) == seen, [str(t) for t in found]
    assert not [w for w in recwarn.list if "tokens of its own" in str(w.message)]
    pagedkv.unwrap(other)


# Saved caches


def test_two_saved_chats_are_loaded_beside_each_other(model: Any, tmp_path: Path) -> None:
    paths, want = [str(tmp_path / f"{i}.safetensors") for i in range(2)], []
    for seed, path in enumerate(paths):
        with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)) as cache:
            read(model, cache, 600, seed)
            cache.save(path)
            want.append(read(model, cache, 400, seed=5))
        pagedkv.unwrap(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)) as other:
            read(model, other, 600, seed=9)
            with pagedkv.load(paths[0], model) as first, pagedkv.load(paths[1], model) as second:
                for cache, wanted in zip((first, second), want, strict=True):
                    assert mx.array_equal(read(model, cache, 400, seed=5), wanted).item()
    pagedkv.unwrap(model)


def test_pages_from_elsewhere_are_encoded_anew(model: Any, tmp_path: Path, elsewhere: Any) -> None:
    """In whatever order files come, what is read later is treated alike."""
    config, path = pagedkv.TierConfig(**SETTINGS), str(tmp_path / "a.safetensors")
    exact = make_prompt_cache(model)
    read(model, exact, 600)
    with pagedkv.wrap(model, config) as cache:
        mine = digests(cache)
        read(model, cache, 600)
        cache.save(path)
        want = read(model, cache, 3, seed=1)
    pagedkv.unwrap(model)
    elsewhere()
    with pagedkv.wrap(model, config) as cache:
        theirs = digests(cache)
        assert not {*mine} & {*theirs}
        with pytest.warns(UserWarning, match="encoded anew, which costs a rounding"):
            loaded = pagedkv.load(path, model)
        assert digests(loaded) == theirs
        got = read(model, loaded, 3, seed=1)
        exact_logits = read(model, exact, 3, seed=1)
        loaded.close()
        away, before = (mx.abs(x - exact_logits).max().item() for x in (got, want))
        assert 0 < away < 3 * before
    pagedkv.unwrap(model)
    with pagedkv.load(path, model) as cache:  # nobody else has pages there: bit for bit
        assert digests(cache) == mine
        assert mx.array_equal(read(model, cache, 3, seed=1), want).item()
    pagedkv.unwrap(model)


def test_a_file_without_matrices_is_loaded_too(model: Any, tmp_path: Path) -> None:
    path, exact = str(tmp_path / "a.safetensors"), make_prompt_cache(model)
    read(model, exact, 600)
    exact_logits = read(model, exact, 3, seed=2)
    with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS, treatment="none")) as cache:
        read(model, cache, 600)
        cache.save(path)
        want = read(model, cache, 3, seed=2)
    pagedkv.unwrap(model)
    with pagedkv.load(path, model) as cache:
        assert set(cache.stats().treatments) == {"none"}
        assert mx.array_equal(read(model, cache, 3, seed=2), want).item()
    pagedkv.unwrap(model)
    with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)) as other:
        with pytest.warns(UserWarning, match="not treated by other"):
            cache = pagedkv.load(path, model)
        assert digests(cache) == digests(other)
        away, before = (
            mx.abs(x - exact_logits).max().item() for x in (read(model, cache, 3, 2), want)
        )
        assert 0 < away < 3 * before
        cache.close()
    pagedkv.unwrap(model)


# Stores


def stored(tmp_path: Path, **more: Any) -> pagedkv.TierConfig:
    settings = {"cold": "64MB", "cold_dir": str(tmp_path), **more}
    return pagedkv.TierConfig(**{**SETTINGS, **settings})


def kept_file(tmp_path: Path) -> Path:
    (path,) = tmp_path.rglob(TREATMENTS)
    return path


def test_a_store_keeps_the_matrices_of_its_pages(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: Any
) -> None:
    with pagedkv.wrap(model, stored(tmp_path)) as cache:
        read(model, cache, 100)
        cache.flush()
        assert not list(tmp_path.rglob(TREATMENTS)), "there is no page"
        cache.context.pager.cold.sequences.checkpoints.keep(UNDECIDED, "", lambda: b"{}", False)
        read(model, cache, 500, seed=1)
        name = cache.flush().sequence
        mine, path = digests(cache), kept_file(tmp_path)
        assert not list(tmp_path.rglob(UNDECIDED)), "earlier versions had it"
        written = path.stat()
        read(model, cache, 400, seed=2)
        with monkeypatch.context() as patch:
            patch.setattr(Calibration, "to_bytes", pytest.fail)  # they are there: not made again
            cache.flush()
        assert (path.stat().st_ino, path.stat().st_size) == (written.st_ino, written.st_size)
        checkpoints = cache.context.pager.cold.budget.checkpoints
        assert checkpoints > path.stat().st_size
    pagedkv.unwrap(model)
    found = Calibration.load(path)
    assert found.model == fingerprint(model)
    assert [t.digest for t in found.values()] == mine
    # Another process, for which other matrices would be chosen.
    elsewhere()
    with pagedkv.wrap(model, stored(tmp_path)) as cache:
        assert cache.context.pager.cold.budget.checkpoints == checkpoints
        assert all("kept in the store" in told for told in cache.stats().treatments)
        read(model, cache, 500, seed=9)
        assert digests(cache) == mine
        with pagedkv.resume(model, sequence=name) as again:
            assert again.offset == 1000
            assert mx.isfinite(read(model, again, 1)).all().item()
    pagedkv.unwrap(model)


@pytest.mark.parametrize(("kv", "count"), [("K4V4", 200), ("K4V4", 600), ("K8V4", 200)])
def test_going_on_in_another_process_bit_for_bit(
    model: Any, tmp_path: Path, kv: str, count: int
) -> None:
    with pagedkv.wrap(model, stored(tmp_path, kv=kv)) as cache:
        read(model, cache, count, seed=1)
        cache.flush()
        want = read(model, cache, 400, seed=2)
    pagedkv.unwrap(model)
    with pagedkv.resume(model, stored(tmp_path, kv=kv)) as cache:
        assert mx.array_equal(read(model, cache, 400, seed=2), want).item(), "new pages as well"
    pagedkv.unwrap(model)


@pytest.mark.parametrize("how", ["missing", "damaged", "cut short", "another"])
def test_without_its_matrices_a_sequence_is_refused(
    model: Any, tmp_path: Path, how: str, elsewhere: Any
) -> None:
    config = stored(tmp_path)
    with pagedkv.wrap(model, config) as cache:
        read(model, cache, 600, seed=1)
        cache.flush()
    pagedkv.unwrap(model)
    path = kept_file(tmp_path)
    text = path.read_text()
    elsewhere()
    if how == "missing":
        path.unlink()
    elif how == "damaged":
        path.write_text(text.replace('"matrices": "', '"matrices": "AAAA'))
    elif how == "cut short":
        path.write_text(text[:1000])
    else:
        with pagedkv.wrap(model, stored(tmp_path / "other")) as cache:
            read(model, cache, 600, seed=4)
            cache.flush()
        pagedkv.unwrap(model)
        shutil.copyfile(next((tmp_path / "other").rglob(TREATMENTS)), path)
        path.chmod(0o600)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(pagedkv.StoreMismatchError, match="needs the matrices"):
            pagedkv.resume(model, config)
    warned = [str(w.message) for w in told if "cannot be read" in str(w.message)]
    assert len(warned) == (how in ("damaged", "cut short"))
    pagedkv.unwrap(model)


def test_a_file_beside_the_checkpoints(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pagedkv.wrap(model, stored(tmp_path)) as cache:
        cold = cache.context.pager.cold
        files, budget = cold.sequences.checkpoints, cold.budget
        before = budget.checkpoints
        assert files.kept("a.json") is None

        def keep(content: bytes, durable: bool = False) -> None:
            files.keep("a.json", content.decode(), lambda: content, durable)

        keep(b"one")
        assert (files.kept("a.json"), budget.checkpoints) == (b"one", before + 3)
        with pytest.raises(pagedkv.OutOfPagesError, match="no room"):
            keep(bytes(10**9))

        def fails(old: Path, new: Path) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(type(cold._disk), "rename", staticmethod(fails))
            files.keep("a.json", "one", pytest.fail, durable=False)  # it is there: not made again
            for content, durable in ((b"three", False), (b"one", True)):
                with pytest.raises(pagedkv.ColdStoreError, match="No space"):
                    keep(content, durable)
        assert (files.kept("a.json"), budget.checkpoints) == (b"one", before + 3)
        assert [path.name for path in cold.directory.glob("a.json*")] == ["a.json"]
        keep(b"three", durable=True)
        keep(b"three")
        assert (files.kept("a.json"), budget.checkpoints) == (b"three", before + 5)
        for _ in range(2):
            files.drop("a.json")
            assert (files.kept("a.json"), budget.checkpoints) == (None, before)
        keep(b"three")
        (cold.directory / "a.json").chmod(0o644)
        with pytest.raises(pagedkv.UnsafeStoreError):
            files.kept("a.json")
    pagedkv.unwrap(model)


@pytest.mark.parametrize("kind", ["deepseek_v3", "phi3"])
def test_layers_without_known_weights_go_on_too(kind: str, tmp_path: Path) -> None:
    """Latent attention is left as it is, and stays so."""
    other = build(kind)
    config, path = stored(tmp_path), str(tmp_path / "a.safetensors")
    with pagedkv.wrap(other, config) as cache:
        read(other, cache, 600)
        cache.flush()
        cache.save(path)
        want = read(other, cache, 400, seed=2)
        told = cache.stats().treatments
    pagedkv.unwrap(other)
    for again in (
        lambda: pagedkv.resume(other, config),
        lambda: pagedkv.load(path, other, pagedkv.TierConfig(**SETTINGS)),
    ):
        with again() as cache:
            assert mx.array_equal(read(other, cache, 400, seed=2), want).item()
            assert [t.partition(":")[0] for t in cache.stats().treatments] == [
                t.partition(":")[0] for t in told
            ]
        pagedkv.unwrap(other)


def test_an_empty_cache_is_saved_and_loaded(model: Any, tmp_path: Path) -> None:
    from mlx_lm.models.cache import load_prompt_cache

    path = str(tmp_path / "a.safetensors")
    with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)) as cache:
        cache.save(path)
        assert [layer.offset for layer in load_prompt_cache(path)] == [0, 0]
        with pagedkv.load(path, model) as again:
            assert again.offset == 0
    pagedkv.unwrap(model)


def test_nobody_elses_matrices_are_written_over(model: Any, tmp_path: Path, elsewhere: Any) -> None:
    config = stored(tmp_path)
    pagedkv.wrap(model, config).close()  # the store is free again
    elsewhere()
    theirs = lively(tiny_llama(dim=256))
    with pagedkv.wrap(theirs, config) as cache:
        read(theirs, cache, 600, seed=1)
        cache.flush()
        want = read(theirs, cache, 400, seed=2)
    pagedkv.unwrap(theirs)
    mine = model.make_cache()
    read(model, mine, 600, seed=3)
    with pytest.raises(pagedkv.StoreMismatchError, match="are not ours"):
        mine.flush()
    mine.close()
    pagedkv.unwrap(model)
    with pagedkv.resume(model, config) as cache:
        assert mx.array_equal(read(model, cache, 400, seed=2), want).item()
    pagedkv.unwrap(model)

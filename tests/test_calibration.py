"""Treatments calibrated on text: what is measured, the file, and who is given it."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import pagedkv
from pagedkv.cache import sdpa_hook as hook
from pagedkv.calibration.file import Calibration
from pagedkv.calibration.layer_weights import output_products
from pagedkv.cli import main
from pagedkv.integrations.mlx_lm.model_info import fingerprint
from pagedkv.integrations.mlx_lm.recording import AT_ONCE, measure
from pagedkv.integrations.mlx_lm.treatments import choose_treatments
from tests.model_zoo import build
from tests.models import byte_model, lively, random_tokens, tiny_llama
from tests.reference import attention_moments
from tests.test_treatment import SETTINGS, divergence, plant

TOKENS = 600


def ids(count: int = TOKENS, seed: int = 5) -> mx.array:
    return random_tokens(count, seed)[0]


@pytest.fixture(scope="module")
def model() -> Any:
    """Queries are small and keys large in some channels; outputs make more of the later ones."""
    made = lively(tiny_llama(dim=256))
    plant(made, (3, 11), 16.0)
    for layer in made.layers:
        layer.self_attn.o_proj.weight *= 2.0 ** mx.linspace(-1, 1, 256)
    return made


@pytest.fixture(scope="module")
def file(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("calibration") / "tiny.json"
    pagedkv.calibrate(model, ids()).save(path)
    return str(path)


class Stranger(nn.Module):
    """A projection that is none of MLX's own classes."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array) -> Any:
        return self.inner(x)


def test_covariances_are_those_of_the_first_layer(model: Any) -> None:
    """Beside the same sums in float64, from the projections' own outputs."""
    told: list[tuple[int, int]] = []
    found = measure(model, [ids().tolist()], lambda done, total: told.append((done, total)))
    assert told == [(256, TOKENS), (512, TOKENS), (TOKENS, TOKENS)]
    stream = found[0]
    assert (stream.shape, stream.seen.asks.shape) == (pagedkv.KVShape(2, 64, 64), (2, 2))
    layer = model.layers[0]
    attention, x = layer.self_attn, layer.input_layernorm(model.model.embed_tokens(ids()[None]))

    def heads(projection: Any, turned: bool) -> np.ndarray:
        y = projection(x).reshape(1, TOKENS, -1, 64).transpose(0, 2, 1, 3)
        y = attention.rope(y) if turned else y
        return np.array(y[0], np.float64)

    seen = stream.seen
    q, k = heads(attention.q_proj, True), heads(attention.k_proj, True)
    v = heads(attention.v_proj, False)
    calls = (0, 256, 512, TOKENS)
    queries, values, _ = attention_moments(q, k, v, calls, 64**-0.5, at_once=AT_ONCE)
    close = {"rtol": 1e-3, "atol": 1e-3}
    np.testing.assert_allclose(seen.queries, queries, **close)
    np.testing.assert_allclose(seen.values, values, **close)
    k = k[:, 64:576].reshape(2, 8, 64, 64)
    k = (k - k.mean(axis=2, keepdims=True)).reshape(2, 512, 64)
    np.testing.assert_allclose(seen.keys, k.swapaxes(1, 2) @ k / 512, **close)
    counts = (seen.query_tokens, seen.key_tokens, seen.value_tokens)
    assert counts == (TOKENS - 64, 512, TOKENS - 64)


def test_what_output_projections_make_of_two_channels() -> None:
    """Of query heads that share them: exactly, and about where random signs are put through."""
    layer = lively(tiny_llama(dim=256)).layers[0]
    attention = layer.self_attn
    weight = np.array(attention.o_proj.weight, np.float64).reshape(256, 2, 2, 64)
    asks = np.array([[0.5, 1.5], [3.0, 1.0]])
    shares = np.array([[0.25, 0.75], [0.75, 0.25]])
    want = np.einsum("ohqc,ohqd,hq->hcd", weight, weight, shares)
    size = np.einsum("hii->hi", want)
    scale = np.sqrt(size[:, :, None] * size[:, None, :])

    def error() -> np.ndarray:
        outputs = output_products(layer, pagedkv.KVShape(2, 64, 64), asks)
        assert outputs is not None
        return np.asarray((outputs - want) / scale)

    assert np.abs(error()).max() < 1e-4
    attention.o_proj = nn.QuantizedLinear.from_linear(attention.o_proj, 64, 8)
    assert 0 < np.abs(error()).max() < 0.01
    attention.o_proj = Stranger(attention.o_proj)
    assert 0.01 < np.abs(error()).max() < 0.35
    assert np.sqrt(np.square(error()).mean()) < 0.06
    assert output_products(layer, pagedkv.KVShape(2, 64, 64), np.ones((2, 4))) is None


@pytest.mark.parametrize("silent", ["o_proj", "v_proj", "a head"])
def test_layers_that_say_nothing(silent: str) -> None:
    made = lively(tiny_llama(dim=256))
    attention = made.layers[0].self_attn
    part = slice(0, 64) if silent == "a head" else slice(None)
    projection = attention.o_proj if silent == "o_proj" else attention.v_proj
    projection.weight[part] = 0
    found = pagedkv.calibrate(made, ids())
    assert all(t.feedback is not None and t.parts == (True, True) for t in found.values())
    with pagedkv.wrap(made, pagedkv.TierConfig(**SETTINGS)) as cache:
        assert mx.isfinite(made(random_tokens(600), cache=cache)).all().item()
    pagedkv.unwrap(made)


def test_several_texts_count_alike(model: Any) -> None:
    first, second = (ids(256, seed).tolist() for seed in (1, 2))
    both = measure(model, [first, second], lambda done, total: None)[1].seen
    each = [measure(model, [t], lambda done, total: None)[1].seen for t in (first, second)]
    mean = np.mean([s.keys for s in each], axis=0)
    np.testing.assert_allclose(both.keys, mean, rtol=1e-3, atol=1e-3)
    assert both.query_tokens == sum(s.query_tokens for s in each)
    for moments in ("queries", "values"):  # by attention: not quite half of each
        total, (one, two) = getattr(both, moments), (getattr(s, moments) for s in each)
        assert np.abs(total - (one + two) / 2).max() < 0.3 * np.abs(one - two).max()


def test_the_model_is_as_before(model: Any) -> None:
    with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)) as cache:
        before = dict(cache.context.pager.treatments)
        found = pagedkv.calibrate(model, ids(300))
        assert hook.installed()
        assert cache.context.pager.treatments == before != dict(found)
    pagedkv.unwrap(model)
    assert not hook.installed()
    from mlx_lm.models.cache import KVCache

    assert "update_and_fetch" not in vars(KVCache())


def test_what_is_calibrated_is_as_good_as_what_the_weights_say(model: Any, file: str) -> None:
    tokens = random_tokens(700, 8)
    settings = {"kv": "K4V8", "model": model, "tokens": tokens}
    kl = {name: divergence(treatment=name, **settings) for name in ("auto", "hadamard", file)}
    assert kl["hadamard"] > 4 * kl[file], kl
    assert kl[file] < 1.1 * kl["auto"], kl


def test_a_file_says_what_was_found(model: Any, file: str) -> None:
    found = Calibration.load(file)
    assert found == pagedkv.calibrate(model, ids())
    assert (found.model, found.tokens, sorted(found)) == (fingerprint(model), TOKENS, [0, 1])
    kinds = {}
    for kv in ("K4V4", "K8V4", "K4V8", "K8V8"):
        config = pagedkv.TierConfig(kv=kv, treatment=file)
        chosen = choose_treatments(model, config, {}, fingerprint(model))
        kinds[kv] = {t.parts for t in chosen.values()}
    both = {"K4V4": {(True, True)}, "K8V4": {(False, True)}, "K4V8": {(True, False)}}
    assert kinds == {**both, "K8V8": set()}


def test_pages_and_stores_keep_their_calibration(model: Any, file: str, tmp_path: Path) -> None:
    other, saved = tmp_path / "other.json", str(tmp_path / "a.safetensors")
    pagedkv.calibrate(model, ids(300, 9)).save(other)
    settings = {**SETTINGS, "cold": "64MB", "cold_dir": str(tmp_path / "store")}
    mine, others = (pagedkv.TierConfig(treatment=str(t), **settings) for t in (file, other))
    with pagedkv.wrap(model, mine) as cache:
        mx.eval(model(random_tokens(600), cache=cache))
        told = "keys and values balanced and rotated: calibrated on 600 t"
        assert all(text.startswith(told) for text in cache.stats().treatments)
        cache.flush()
        cache.save(saved)
        want = model(random_tokens(3, seed=1), cache=cache)
        mx.eval(want)
    pagedkv.unwrap(model)
    with pagedkv.load(saved, model, mine) as cache:
        assert mx.array_equal(model(random_tokens(3, seed=1), cache=cache), want)
    pagedkv.unwrap(model)
    with pagedkv.resume(model, mine) as cache:
        assert mx.array_equal(model(random_tokens(3, seed=1), cache=cache), want)
    pagedkv.unwrap(model)
    from mlx_lm.models.cache import load_prompt_cache

    loaded = load_prompt_cache(saved)  # without the file: the saved pages say what was done
    got = model(random_tokens(3, seed=1), cache=loaded)
    np.testing.assert_allclose(np.array(got), np.array(want), atol=1e-3)
    pagedkv.wrap(model, pagedkv.TierConfig(treatment=str(other), **SETTINGS)).close()
    with pytest.warns(UserWarning, match="encoded anew"):
        pagedkv.load(saved, model).close()
    pagedkv.unwrap(model)
    with pytest.raises(pagedkv.PagedKVError):
        pagedkv.resume(model, others)
    pagedkv.unwrap(model)


def test_a_file_that_was_written_anew_is_read_anew(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    pagedkv.calibrate(model, ids(300, 1)).save(path)
    settings = {**SETTINGS, "cold": "64MB", "cold_dir": str(tmp_path / "store")}
    config = pagedkv.TierConfig(treatment=str(path), **settings)
    with pagedkv.wrap(model, config) as cache:
        with pagedkv.wrap(model, config) as same:
            assert same.context.pager is cache.context.pager
        pagedkv.calibrate(model, ids(300, 2)).save(path)
        with pagedkv.wrap(model, config) as anew:
            assert anew.context.pager.treatments == dict(Calibration.load(path))
            assert anew.context.pager.treatments != cache.context.pager.treatments
    pagedkv.unwrap(model)


def test_a_calibration_is_for_its_own_model(model: Any, file: str) -> None:
    other = tiny_llama(dim=256, seed=1)
    config = pagedkv.TierConfig(treatment=file)
    with pytest.raises(pagedkv.ConfigError, match=r"another model: it belongs to llama-.*this one"):
        pagedkv.wrap(other, config)
    assert not hook.installed()
    with pytest.raises(pagedkv.ConfigError, match="hand-written"):
        pagedkv.PagedCache.standalone(1, config)


def change(document: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = json.loads(json.dumps(document))
    part = changed
    for step in place[:-1]:
        part = part[step]
    if value is None:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    return dict(changed)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("format",), "pagedkv calibration 9", "its format is 'pagedkv calibration 9'"),
        (("format",), None, "its format is None"),
        (("model",), 3, "is damaged"),
        (("tokens",), None, "there is no 'tokens'"),
        (("layers",), 3, "is damaged"),
        (("layers", 0, "kind"), None, "there is no 'kind'"),
        (("layers", 0, "digest"), "spin", "their digest is"),
        (("layers", 0, "layer"), 1, "a layer comes twice"),
        (("layers", 0, "layer"), -1, "-1 is no layer"),
        (("layers", 0, "shape"), [2, 64], "is damaged"),
        (("layers", 0, "matrices"), "no base 64", "is damaged"),
        (("layers", 0, "matrices"), "AAAA", "is damaged"),
        (("layers", 0, "matrices"), "AAAAAAAAAAAAAAAA", "6 numbers, and"),
        (("layers", 0, "parts"), [True], "is damaged"),
    ],
)
def test_a_damaged_file(file: str, tmp_path: Path, place: Any, value: Any, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(change(json.loads(Path(file).read_text()), place, value)))
    with pytest.raises(pagedkv.ConfigError, match="bad.json") as error:
        Calibration.load(path)
    assert says in str(error.value)


def test_files_that_are_none(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    config = pagedkv.TierConfig(kv="K8V8", treatment=str(path))  # it is read all the same
    with pytest.raises(pagedkv.ConfigError, match="cannot read the calibration"):
        pagedkv.wrap(model, config)
    for text in ("", "{", "[]", "3", "\x00"):
        path.write_text(text)
        with pytest.raises(pagedkv.ConfigError, match="is not a calibration"):
            pagedkv.wrap(model, config)
    with pytest.raises(pagedkv.ConfigError, match="NAME.json"):
        pagedkv.TierConfig(treatment="scales.txt")
    found = pagedkv.calibrate(model, ids(256))
    with pytest.raises(pagedkv.ConfigError, match="NAME.json"):
        found.save(tmp_path / "scales.txt")
    with pytest.raises(pagedkv.ConfigError, match="cannot write"):
        found.save(tmp_path / "nowhere" / "a.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(pagedkv.ConfigError, match="cannot write"):
        found.save(tmp_path / "folder.json")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["bad.json", "folder.json"], "nothing is left over"


def test_what_cannot_be_calibrated(model: Any) -> None:
    for bad in ([], ids(255), [[1, 2]], [1.5] * 300, ["a"] * 300, [[-1] * 300]):
        with pytest.raises(pagedkv.ConfigError, match="tokens"):
            pagedkv.calibrate(model, bad)
    with pytest.raises(pagedkv.ConfigError, match="no queries of Model were seen"):
        pagedkv.calibrate(build("longcat_flash"), ids(256))  # its attention is its own
    with pytest.raises(pagedkv.ConfigError, match="needs a model"):
        pagedkv.calibrate(object(), ids(256))
    broken = tiny_llama()
    broken.layers[1].self_attn.k_proj.weight *= float("nan")
    with pytest.raises(pagedkv.ConfigError, match="layer 1: queries, keys or values are not fin"):
        pagedkv.calibrate(broken, ids(256))
    assert not hook.installed()


@pytest.mark.parametrize(
    ("kind", "calibrated"), [("gemma3n", 2), ("falcon_h1", 4), ("gpt_oss", 4), ("qwen3_5", 2)]
)
def test_other_kinds_of_layers(kind: str, calibrated: int, tmp_path: Path) -> None:
    """Shared keys, nested caches, windows, recurrent layers beside those with keys."""
    other = build(kind)
    file = str(tmp_path / "a.json")
    found = pagedkv.calibrate(other, random_tokens(320)[0])
    found.save(file)
    with pagedkv.wrap(other, pagedkv.TierConfig(treatment=file, **SETTINGS)) as cache:
        for part in (random_tokens(320), random_tokens(16)):
            out = other(part, cache=cache)
            mx.eval(out)
        assert mx.isfinite(out).all().item()
        streams = [c for c in cache.paged_layers if c.treatment is not None]
        assert len(streams) == len(found) == calibrated
    pagedkv.unwrap(other)


# The command


def call(*argv: str) -> tuple[int, str, str]:
    """Run a command; its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main(argv)
    return code, out.getvalue(), err.getvalue()


def test_the_command_and_a_row_for_its_file(tmp_path: Path) -> None:
    folder, text = byte_model(tmp_path, larger=True), tmp_path / "book.txt"
    text.write_text("".join(f"Line {i * i} of a book about {i % 7}.\n" for i in range(60)))
    file = str(tmp_path / "scales.json")
    command = ("calibrate", "--model", folder, "--text", str(text), "--out", file, "--quiet")
    code, out, err = call(*command, "--tokens", "300", "--format", "json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["tokens"], document["calibrated"], document["file"]) == (300, [0, 1], file)
    assert document["model"] == Calibration.load(file).model
    assert document["texts"] == ["book.txt"]
    code, out, _ = call(*command, "--tokens", "256", "--format", "table")
    assert (code, "2 of 2 layers" in out, f"--treatment {file}" in out) == (0, True, True)

    code, out, err = call(
        *("eval", "--model", folder, "--text", str(text), "--legs", "prefill", "--tokens", "600"),
        *("--page-tokens", "256", "--hot-tokens", "64", "--sink-tokens", "4", "--chunk", "128"),
        *("--kv", "K3V3", "--treatment", f"none,{file}", "--mlx-lm", "none", "--format", "json"),
    )
    assert code == 0, err
    rows = {row["what"]: row for row in json.loads(out)["rows"][1:]}
    assert list(rows) == ["K3V3 none", "K3V3 scales.json"]
    assert rows["K3V3 none"]["kl_mean"] != rows["K3V3 scales.json"]["kl_mean"]

    for more, says in (
        (("--tokens", "100K"), "has 1,694 tokens and --tokens is 102,400"),
        (("--tokens", "200"), "calibrate with 256 at least"),
        (("--out", str(tmp_path / "scales.txt")), "a calibration is a file NAME.json"),
        (("--out", str(tmp_path / "no" / "a.json")), "there is no folder"),
        (("--text", "/nowhere.txt"), "cannot read the text file"),
    ):
        code, out, err = call(*command, *more)
        assert (code, out) == (1, "")
        assert says in err.splitlines()[-1]

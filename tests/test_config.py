"""Settings, sizes, and what importing costs."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pagedkv
from pagedkv.config.sizes import format_size, parse_size
from tests.models import tiny_llama
from tests.stores import empty_cache, fill, filled_with_zeros, settings


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GB", 8 * 10**9),
        ("8GiB", 8 * 2**30),
        ("8 gib", 8 * 2**30),
        ("1.5MB", 1_500_000),
        ("64KB", 64_000),
        ("16KiB", 16_384),
        ("2TB", 2 * 10**12),
        ("4096", 4096),
        ("12B", 12),
        (4096, 4096),
        (0, 0),
        ("0", 0),
    ],
)
def test_sizes(text: int | str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["8GBB", "80%", "-1", -1, "", "GB", "1..5GB", "1e9", "0x10", None, 1.5, True, "8 G B"]
)
def test_sizes_that_are_none(text: object) -> None:
    with pytest.raises(pagedkv.ConfigError, match="warm="):
        pagedkv.TierConfig(warm=text)  # type: ignore[arg-type]


@given(st.integers(0, 10**15))
def test_sizes_written_for_people_are_near(nbytes: int) -> None:
    text = format_size(nbytes)
    assert abs(parse_size(text) - nbytes) <= 0.006 * nbytes + 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"hot_tokens": 0}, "hot_tokens is a number of tokens from 1 up, got 0"),
        ({"hot_tokens": "512"}, "got '512'"),
        ({"sink_tokens": -1}, "sink_tokens is a number of tokens from 0 up, got -1"),
        ({"kv": "K5V4"}, "unknown precision K5V4"),
        ({"kv": "int4"}, "'int4'"),
        ({"kv": "K8V4:100"}, "takes no distance"),
        ({"kv": 4}, "kv is text"),
        ({"page_tokens": 300}, "page_tokens is one of"),
        ({"hot_dtype": "fp8"}, "'fp8'"),
        ({"backend": "magic"}, "backend is one of auto"),
        ({"cold": "80%"}, "cold='80%'"),
    ],
)
def test_settings_that_cannot_be_meant(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(pagedkv.ConfigError, match=complaint) as error:
        pagedkv.TierConfig(**options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)


def test_a_config_survives_its_dict() -> None:
    config = pagedkv.TierConfig(kv="K8V4:8192,K4V4", warm="1GiB", cold=0, page_tokens=512)
    assert pagedkv.TierConfig(**config.to_dict()) == config


def test_all_names_exist_and_are_sorted() -> None:
    assert list(pagedkv.__all__) == sorted(pagedkv.__all__)
    for name in pagedkv.__all__:
        assert getattr(pagedkv, name) is not None


def test_every_error_is_also_a_builtin() -> None:
    pairs = {
        pagedkv.ConfigError: ValueError,
        pagedkv.ShapeError: ValueError,
        pagedkv.CacheStateError: ValueError,
        pagedkv.ClosedError: RuntimeError,
        pagedkv.OutOfPagesError: MemoryError,
        pagedkv.ColdStoreError: OSError,
        pagedkv.CorruptPageError: OSError,
    }
    for error, builtin in pairs.items():
        assert issubclass(error, pagedkv.PagedKVError)
        assert issubclass(error, builtin)


def test_importing_is_light() -> None:
    code = (
        "import sys, pagedkv\n"
        "optional = ('mlx_lm', 'transformers', 'tokenizers', 'hypothesis', 'pytest', 'torch')\n"
        "print([m for m in sys.modules if m.split('.')[0] in optional])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_plan_adds_up() -> None:
    shape = pagedkv.KVShape(8, 128, 128)
    config = pagedkv.TierConfig(warm="1GB", cold="8GB")
    plan = pagedkv.plan(shape, 32, 131_072, config, disk_bytes_per_second=5e9)
    assert plan.hot_tokens + plan.warm_tokens + plan.cold_tokens == 131_072
    assert plan.fp16_bytes == 131_072 * 131_072  # 128 KiB a token for Llama-3-8B
    assert plan.warm_bytes <= 10**9
    assert plan.fits
    assert plan.tokens_per_second == pytest.approx(5e9 / plan.cold_bytes)
    over = pagedkv.plan(shape, 32, plan.max_context + 256, config)
    assert not over.fits
    assert over.max_context == plan.max_context
    with pytest.raises(pagedkv.ConfigError, match="give at least"):
        pagedkv.plan(shape, 32, 1000, pagedkv.TierConfig(warm="1MB"))


@pytest.mark.parametrize("kv", ["K4V4", "K8V4:900,K4V4", "fp16"])
@pytest.mark.parametrize("tokens", [50, 700, 2300, 3000])
def test_a_plan_is_what_happens(kv: str, tokens: int) -> None:
    """The plan's tiers are the tiers of a cache that was really filled."""
    shape, layers = pagedkv.KVShape(2, 64, 64), 2
    config = pagedkv.TierConfig(
        hot_tokens=64, sink_tokens=4, kv=kv, page_tokens=256, warm="700KB", cold="64MB"
    )
    plan = pagedkv.plan(shape, layers, tokens, config)
    with pagedkv.PagedCache.standalone(layers, config) as cache:
        stats = filled_with_zeros(cache, tokens)
        assert (stats.hot.tokens, stats.warm.tokens + stats.cold.tokens) == (
            plan.hot_tokens,
            plan.warm_tokens + plan.cold_tokens,
        )
        if "," not in kv:  # while it is filled, a ladder's near pages may go cold and stay there
            assert stats.warm.tokens == plan.warm_tokens
            assert stats.warm.bytes == plan.warm_bytes
            assert stats.cold.bytes == plan.cold_bytes
        assert stats.fp16_bytes == plan.fp16_bytes


# Paths


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A home directory, the working directory, and another one."""
    found = {name: tmp_path / name for name in ("home", "work", "other")}
    for path in found.values():
        path.mkdir()
    monkeypatch.setenv("HOME", str(found["home"]))
    monkeypatch.chdir(found["work"])
    return found


@pytest.mark.parametrize("setting", ["cold_dir", "treatment"])
def test_paths_mean_what_they_did_when_the_settings_were_made(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    given = {"a.json": "work", "./a.json": "work", "~/a.json": "home", "../other/a.json": "other"}
    for path, place in given.items():
        config = pagedkv.TierConfig(**{setting: path})  # type: ignore[arg-type]
        monkeypatch.chdir(places["other"])
        again = pagedkv.TierConfig(**config.to_dict())
        assert again == config
        assert Path(getattr(again, setting)).resolve() == places[place] / "a.json"
        monkeypatch.chdir(places["work"])


def test_a_store_stays_where_it_was_when_the_process_changes_its_directory(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cold_dir, place in (("kv", "work"), ("~/kv", "home")):
        monkeypatch.chdir(places["work"])
        config = settings(cold_dir)
        with empty_cache(config) as cache:
            monkeypatch.chdir(places["other"])
            fill(cache, 1500)
            cache.flush()
        with empty_cache(config) as cache:
            cache.resume()
            assert cache.offset == 1500
        assert (places[place] / "kv").is_dir()
    assert not list(places["other"].iterdir())
    assert [p.name for p in places["work"].iterdir()] == ["kv"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "cannot name a file"),
        ("a\0b", "cannot name a file"),
        ("\ud800", "cannot name a file"),
        ("~nobody-of-that-name/kv", "no such home directory; write ./~nobody"),
        (b"kv", "is a path as text"),
        (Path("kv"), "is a path as text"),
    ],
)
def test_paths_that_cannot_be_meant(places: dict[str, Path], path: Any, says: str) -> None:
    with pytest.raises(pagedkv.ConfigError, match=f"cold_dir.*{says}"):
        pagedkv.TierConfig(cold_dir=path)


def test_a_relative_path_without_a_working_directory(places: dict[str, Path]) -> None:
    places["work"].rmdir()
    with pytest.raises(pagedkv.ConfigError, match="the working directory is gone"):
        pagedkv.TierConfig(cold_dir="kv")
    pagedkv.TierConfig(cold_dir=str(places["other"]))


# Values of any kind

ODD = (
    None, True, -1, 0, 2, 10**5000, -(10**5000), 0.5, math.nan, math.inf, -math.inf, 1j,
    "", "nan", "inf", "1e9", "9" * 5000, "9" * 400 + ".0GB", "K4V4:" + "9" * 5000 + ",K4V4",
    "K8V8@" + "9" * 5000, "K" + "9" * 5000 + "V4", "a\0b.json", "\ud800", b"2GB", (), [], {},
    np.float32(math.nan), np.int64(512), np.zeros(3), mx.float16, mx.zeros(2), Path("x"),
    object(), len,
)  # fmt: skip


@pytest.mark.parametrize("setting", sorted(pagedkv.TierConfig().to_dict()))
def test_settings_of_any_kind_are_taken_or_refused_in_words(setting: str) -> None:
    for value in ODD:
        try:
            config = pagedkv.TierConfig(**{setting: value})  # type: ignore[arg-type]
        except pagedkv.ConfigError:
            continue
        assert pagedkv.TierConfig(**config.to_dict()) == config
        assert isinstance(value, (str, int, float, type(None))), value
        assert isinstance(value, str) or value is None or -1 < value < 2**63, value


@pytest.mark.parametrize("config", [{"warm": "1GB"}, "2GB", 7, pagedkv.TierConfig])
def test_settings_that_are_none(config: Any) -> None:
    model = tiny_llama()
    for use in (
        lambda: pagedkv.wrap(model, config),
        lambda: pagedkv.resume(model, config),
        lambda: pagedkv.PagedCache.standalone(2, config),
    ):
        with pytest.raises(pagedkv.ConfigError, match="config is a TierConfig, such as"):
            use()
    assert "make_cache" not in model.__dict__


@pytest.mark.parametrize("n", ["a", "3", None, math.nan, math.inf, 2.5, [], b"3", mx.zeros(3)])
def test_tokens_to_trim_that_are_no_number(n: Any) -> None:
    for more in ({}, {"max_kv_size": 512, "sink_tokens": 4}):
        with empty_cache(settings(None, **more)) as cache:
            fill(cache, 300)
            for trim in (cache.trim, cache[0].trim):
                with pytest.raises(pagedkv.ConfigError, match="tokens to trim is a whole number"):
                    trim(n)
            assert {layer.offset for layer in cache} == {300}
            assert cache.trim(np.int64(3)) == 3  # type: ignore[arg-type]


def test_layers_and_names_that_are_none() -> None:
    with pytest.raises(pagedkv.ConfigError, match="number of layers is a whole number"):
        pagedkv.PagedCache.standalone("two")  # type: ignore[arg-type]
    with pytest.raises(pagedkv.ConfigError, match="model is a name as text"):
        pagedkv.PagedCache.standalone(2, model=7)  # type: ignore[arg-type]

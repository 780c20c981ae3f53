"""A comparison from end to end on small random models: what it says, and what it notices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv.errors import ConfigError
from pagedkv.tiers.codec.affine import AffineCodec
from pagedkv.tools.bench.timing import Deadline
from pagedkv.tools.evaluation import (
    BUILT_IN,
    EvalSettings,
    Evaluation,
    Result,
    Text,
    Variant,
    again_variants,
    built_in_text,
    cut,
    mlx_lm_variants,
    paged_variants,
    run,
)
from pagedkv.tools.evaluation.caches import Footprint, opened, token_bytes
from pagedkv.tools.evaluation.result import summary
from tests.models import lively, random_tokens, tiny_llama

Row = dict[str, Any]
BASE = pagedkv.TierConfig(page_tokens=256, hot_tokens=64, sink_tokens=4, hot_dtype="model")
TOKENS, DECODED = 640, 128


def float64(logits: np.ndarray) -> np.ndarray:
    """log softmax."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# Texts and variants


class Words:
    """A tokenizer of characters, with or without a token for the beginning."""

    def __init__(self, first: int | None) -> None:
        self.bos_token_id = first

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        plain = [ord(c) for c in text]
        starts = add_special_tokens and self.bos_token_id is not None
        return [self.bos_token_id, *plain] if starts else plain  # type: ignore[list-item]


def test_segments_are_disjoint_and_begin_as_the_model_wants() -> None:
    plain = Text.of("abc", "abcdefghijkl", Words(None))
    assert plain.start == ()
    pieces = cut(plain, tokens=3, segments=2, offset=1)
    assert [list(map(chr, p.tokens)) for p in pieces] == [list("bcde"), list("fghi")]
    marked = Text.of("abc", "abcdefghijkl", Words(7))
    pieces = cut(marked, tokens=3, segments=2)
    assert [p.tokens for p in pieces] == [(7, *map(ord, "abc")), (7, *map(ord, "def"))]


def test_a_text_that_is_too_short_says_how_much_would_do() -> None:
    text = Text.of("note.txt", "a" * 100, Words(None))
    with pytest.raises(ConfigError, match=r"it has 100 tokens.* need 104.*at most 49 tokens"):
        cut(text, tokens=51, segments=2)
    assert len(cut(text, tokens=49, segments=2)) == 2
    with pytest.raises(ConfigError, match="smaller offset"):
        cut(text, tokens=49, segments=1, offset=200)


def test_the_built_in_texts_are_long_enough() -> None:
    for name in BUILT_IN:
        assert len(built_in_text(name)) > 200_000
    assert "def " in built_in_text("python")
    with pytest.raises(ConfigError, match="english or python"):
        built_in_text("latin")


def test_variants_are_precisions_or_a_ladder_each() -> None:
    found = paged_variants(["fp16,k8v4", "fp16:512,K8V4:1024,K4V4"], BASE)
    assert [v.label for v in found] == ["fp16", "K8V4", "fp16:512,K8V4:1024,K4V4"]
    assert [v.kind for v in found] == ["uniform", "layers", "ladder"]
    assert all(v.config.hot_tokens == 64 for v in found if v.config)
    assert found[0].precise_tokens == 68
    assert [v.kind for v in mlx_lm_variants([8])] == ["mlx-lm"]
    layers = paged_variants(["K8V8,K4V4"], BASE, (), ["auto", "same", "K4V4@0-1"])
    assert [v.label for v in layers] == [
        "K8V8 K4V4@0-1",
        "K4V4 auto",
        "K4V4 same",
        "K4V4 K4V4@0-1",
    ]
    assert [v.kind for v in layers] == ["layers", "layers", "uniform", "uniform"]
    for bad in (["K4V4,K4V4"], ["K4V4", "k4v4"], ["K5V4"], ["K4V4,"], ["K8V4:1024"]):
        with pytest.raises(ConfigError):
            paged_variants(bad, BASE)
    with pytest.raises(ConfigError, match="2, 3, 4, 5, 6, 8 bits, got 7"):
        mlx_lm_variants([7])
    again = again_variants([64, 128])
    assert [(v.label, v.kind) for v in again] == [
        ("mlx-lm in calls of 64", "again"),
        ("mlx-lm in calls of 128", "again"),
    ]
    (halves,) = again_variants(["bfloat16"])
    assert (halves.label, halves.kind, halves.dtype) == ("mlx-lm bf16", "again", "bfloat16")
    with pytest.raises(ConfigError, match="unknown types .'int8'.: there are float32, float16"):
        again_variants(["int8"])
    with pytest.raises(ConfigError, match="1 token or more, got 0"):
        again_variants([0])
    with pytest.raises(ConfigError, match="is given twice"):
        again_variants([64, 64])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tokens": 2048}, "fewer decode_tokens"),
        ({"decode_tokens": 100}, "128 or more"),
        ({"decode_step": 9}, "1 to 8"),
        ({"legs": ("prefil",)}, "prefill and decode, got prefil"),
        ({"segments": 0}, "segments is a number from 1 up, got 0"),
    ],
)
def test_settings_are_checked(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EvalSettings(**given)


# A run from end to end


def text(tokens: int = 2000, seed: int = 1) -> Text:
    return Text("random", (), tuple(random_tokens(tokens, seed)[0].tolist()), "")


def evaluated(
    *kv: str, model: Any = None, more: tuple[Variant, ...] = (), base: Any = BASE, **settings: Any
) -> tuple[list[Row], Result]:
    settings = {"tokens": TOKENS, "decode_tokens": DECODED, "chunk": 128, **settings}
    result = Result({})
    Evaluation(
        "tiny",
        model or lively(tiny_llama(heads=2, kv_heads=1, dim=128)),
        [text()],
        [*paged_variants(kv, base), *more],
        EvalSettings(**settings),
        result,
        Deadline(settings.pop("seconds", None)),
    ).run()
    return result.rows, result


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    found, _ = evaluated("fp16,K8V8,K4V4,K2V2", "K8V8:256,K2V2", more=(*mlx_lm_variants([8, 4]),))
    return found


def of(rows: list[Row], leg: str, what: str) -> Row:
    return next(r for r in rows if r["leg"] == leg and r["what"] == what)


def test_a_run_has_a_row_for_everything(rows: list[Row]) -> None:
    labels = ["mlx-lm fp32", "fp16", "K8V8", "K4V4", "K2V2", "K8V8:256,K2V2"]
    labels += ["mlx-lm 8 bit g64", "mlx-lm 4 bit g64"]
    for leg, positions in (("prefill", TOKENS - 68), ("decode", DECODED)):
        assert [r["what"] for r in rows if r["leg"] == leg] == labels
        for label in labels:
            row = of(rows, leg, label)
            assert row["status"] == "ok", row
            assert (row["positions"], row["tokens"]) == (positions, TOKENS)
            assert row["perplexity_reference"] == of(rows, leg, labels[0])["perplexity"]


@pytest.mark.parametrize("leg", ["prefill", "decode"])
def test_fewer_bits_are_farther_away(rows: list[Row], leg: str) -> None:
    fp16, k8v8, k4v4, k2v2 = (of(rows, leg, kv) for kv in ("fp16", "K8V8", "K4V4", "K2V2"))
    assert 0 < fp16["kl_mean"] < 1e-5  # float32 keys in 16-bit pages
    assert 10 * fp16["kl_mean"] < k8v8["kl_mean"] < 0.1 * k4v4["kl_mean"]
    assert 2 * k4v4["kl_mean"] < k2v2["kl_mean"]
    assert k8v8["top1_percent"] > k4v4["top1_percent"] > k2v2["top1_percent"]
    assert k8v8["bits"] > k4v4["bits"] > k2v2["bits"]
    quarter, half = of(rows, leg, "mlx-lm 4 bit g64"), of(rows, leg, "mlx-lm 8 bit g64")
    assert 10 * half["kl_mean"] < quarter["kl_mean"]


def test_everything_hot_is_the_reference_itself() -> None:
    found, _ = evaluated("K2V2", base=replace(BASE, hot_tokens=TOKENS - 100))
    for leg in ("prefill", "decode"):
        row = of(found, leg, "K2V2")
        assert (row["kl_max_all"], row["flips_all"], row["perplexity_percent_all"]) == (0, 0, 0)
        assert row["positions"] == 96
        assert row["note"] == "nothing was quantized: no page was full"
    with pytest.raises(ConfigError, match="640 tokens all stay in 16 bit .640 hot or sinks"):
        evaluated("K2V2", base=replace(BASE, hot_tokens=TOKENS - 4))


def test_the_reference_in_other_calls_is_what_chance_does() -> None:
    found, _ = evaluated("K8V8", more=(*again_variants([48]),))
    for leg in ("prefill", "decode"):
        row = of(found, leg, "mlx-lm in calls of 48")
        assert row["status"] == "ok" and row["kind"] == "again"
        assert row["kl_max_all"] > 0  # sums are added up in another order
        assert row["kl_mean"] < 0.01 * of(found, leg, "K8V8")["kl_mean"]
        assert row["positions"] == of(found, leg, "K8V8")["positions"]
    with pytest.raises(ConfigError, match="calls of 128: prompts are read in calls of 128 anyway"):
        evaluated("K8V8", more=(*again_variants([128]),))


def test_the_reference_in_another_type_is_what_its_own_rounding_does() -> None:
    found, _ = evaluated("K8V8", more=(*again_variants(["float16", "bfloat16"]),))
    for leg in ("prefill", "decode"):
        fp16, bf16 = (of(found, leg, f"mlx-lm {name}") for name in ("fp16", "bf16"))
        assert fp16["status"] == bf16["status"] == "ok"
        assert (fp16["kind"], fp16["bits"], bf16["bits"]) == ("again", 16, 16)
        assert of(found, leg, "mlx-lm fp32")["bits"] == 32, "the model itself is as it was"
        assert 0 < 10 * fp16["kl_mean"] < bf16["kl_mean"], "three bits of mantissa less"
    with pytest.raises(ConfigError, match="mlx-lm fp32: the model computes in float32 anyway"):
        evaluated("K8V8", more=(*again_variants(["float32"]),))


def test_losses_are_those_of_the_model_over_the_whole_text(rows: list[Row]) -> None:
    """Positions and targets: against one call over all tokens, in float64."""
    model = lively(tiny_llama(heads=2, kv_heads=1, dim=128))
    tokens = text().tokens[: TOKENS + 1]
    logits = float64(np.array(model(mx.array([tokens[:-1]]))[0]))
    loss = -logits[np.arange(TOKENS), tokens[1:]]
    for leg, first in (("prefill", 0), ("decode", TOKENS - DECODED)):
        row = of(rows, leg, "mlx-lm fp32")
        assert row["perplexity_all"] == pytest.approx(math.exp(loss[first:].mean()), rel=1e-4)
    beyond = of(rows, "prefill", "mlx-lm fp32")
    assert beyond["first_position"] == 68
    assert beyond["perplexity"] == pytest.approx(math.exp(loss[68:].mean()), rel=1e-4)


def test_bytes_count_scales_padding_and_hot_tokens(rows: list[Row]) -> None:
    elements = 2 * TOKENS * 64 * 2  # layers, tokens, channels, keys and values
    stock = of(rows, "decode", "mlx-lm fp32")
    assert (stock["cache_bytes"], stock["bits"]) == (4 * elements, 32)
    eight = of(rows, "decode", "mlx-lm 8 bit g64")
    assert eight["bits"] == 8 + 2 * 32 / 64
    assert eight["cache_bytes"] == elements * 9 // 8
    ours = of(rows, "decode", "K4V4")
    pages, page_bytes = 2 * 2, 32768  # 18,432 bytes of codes and scales, padded to 16 KiB
    hot = (TOKENS - 2 * 256) * 2 * 2 * 64 * 4
    assert ours["cache_bytes"] == pages * page_bytes + hot
    assert (ours["pages"], ours["layers"]) == (pages, "2 paged")
    assert ours["fp16_bytes"] == 2 * elements
    assert ours["bits"] == pytest.approx(8 * ours["cache_bytes"] / elements)
    assert ours["bytes_per_token"] == ours["cache_bytes"] / TOKENS


def test_steps_of_several_tokens_are_decode_too(rows: list[Row]) -> None:
    found, _ = evaluated("K4V4", legs=("decode",), decode_step=4)
    one, four = of(rows, "decode", "K4V4"), of(found, "decode", "K4V4")
    assert four["positions"] == one["positions"]
    assert four["kl_mean"] == pytest.approx(one["kl_mean"], rel=0.1)


def test_segments_give_a_spread() -> None:
    found, result = evaluated("K4V4", legs=("prefill",), segments=3)
    each = [r["kl_mean"] for r in found if r["what"] == "K4V4"]
    assert len(set(each)) == 3
    row = of(result.document()["summary"], "prefill", "K4V4")
    assert row["segments"] == 3
    assert (row["kl_mean_min"], row["kl_mean_max"]) == (min(each), max(each))
    assert row["kl_mean"] == pytest.approx(np.mean(each))
    only = summary([r for r in found if r["segment"] == 0])
    assert "kl_mean_min" not in of(only, "prefill", "K4V4")


def test_what_does_not_fit_takes_turns(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.mx, "get_memory_limit", lambda: 0)
    found, _ = evaluated("K8V8,K4V4", legs=("prefill",))
    assert [r["what"] for r in found] == ["mlx-lm fp32", "K8V8", "K4V4"]
    assert of(found, "prefill", "K4V4")["kl_mean"] == of(rows, "prefill", "K4V4")["kl_mean"]


def test_out_of_time_is_a_row() -> None:
    result = Result({})
    settings = EvalSettings(tokens=TOKENS, decode_tokens=DECODED)
    model = tiny_llama()
    variants = paged_variants(["K4V4"], BASE)
    Evaluation("tiny", model, [text()], variants, settings, result, Deadline(0)).run()
    assert {row["status"] for row in result.rows} == {"skipped"}


class Soon:
    """A limit on time that passes when it was asked so many times."""

    def __init__(self, times: int) -> None:
        self._left = times

    @property
    def passed(self) -> bool:
        self._left -= 1
        return self._left < 0


@pytest.mark.parametrize(("leg", "times", "tokens"), [("prefill", 4, 384), ("decode", 45, 552)])
def test_a_leg_that_is_cut_short_says_what_it_saw(
    rows: list[Row], leg: str, times: int, tokens: int
) -> None:
    model = lively(tiny_llama(heads=2, kv_heads=1, dim=128))
    settings = EvalSettings(tokens=TOKENS, decode_tokens=DECODED, chunk=128, legs=(leg,))
    result, deadline = Result({}), Soon(times)
    variants = paged_variants(["K4V4"], BASE)
    Evaluation("tiny", model, [text()], variants, settings, result, deadline).run()  # type: ignore[arg-type]
    row = of(result.rows, leg, "K4V4")
    assert (row["status"], row["cut_short"], row["tokens"]) == ("ok", True, tokens)
    assert row["note"] == f"the time was up after {tokens} tokens"
    whole = of(rows, leg, "K4V4")["kl_binned"]
    full = len(row["kl_binned"]) - 1 if leg == "decode" else len(row["kl_binned"])
    assert row["kl_binned"][:full] == whole[:full]
    assert row["positions_all"] == tokens - (TOKENS - DECODED if leg == "decode" else 0)
    assert "slope_per_1000" not in row


def test_a_result_goes_on_where_it_stopped(rows: list[Row], tmp_path: Any) -> None:
    model = lively(tiny_llama(heads=2, kv_heads=1, dim=128))
    settings = EvalSettings(tokens=TOKENS, decode_tokens=DECODED, chunk=128)
    variants = paged_variants(["K4V4"], BASE)

    def go_on(deadline: Any, chosen: EvalSettings = settings) -> tuple[int, list[Row]]:
        result = Result(chosen.to_dict(), tmp_path)
        before = result.resume()
        Evaluation("tiny", model, [text()], variants, chosen, result, deadline).run()
        return before, result.rows

    assert go_on(Soon(8))[0] == 0  # all of the prefill leg, some of the decode leg's prompt
    before, found = go_on(Deadline())
    assert before == 2
    places = [(r["leg"], r["what"]) for r in found]
    assert places == [(g, w) for g in ("prefill", "decode") for w in ("mlx-lm fp32", "K4V4")]
    for leg in ("prefill", "decode"):
        assert of(found, leg, "K4V4")["kl_mean"] == of(rows, leg, "K4V4")["kl_mean"]
    assert go_on(Deadline(0)) == (4, found)
    with pytest.raises(ConfigError, match="measured differently .seed"):
        go_on(Deadline(), replace(settings, seed=1))


# What goes wrong


def test_a_variant_that_does_not_run_leaves_the_others_alone(rows: list[Row]) -> None:
    narrow = lively(tiny_llama())  # heads of 16 channels: mlx-lm's groups of 64 do not fit
    found, _ = evaluated("K4V4", model=narrow, more=(*mlx_lm_variants([4]),))
    for leg in ("prefill", "decode"):
        row = of(found, leg, "mlx-lm 4 bit g64")
        assert row["status"] == "failed"
        assert "64" in row["note"]
        assert of(found, leg, "K4V4")["status"] == "ok"


def test_a_model_that_cannot_be_paged_is_an_error() -> None:
    from mlx_lm.models import mamba

    args = mamba.ModelArgs("mamba", 100, 32, 64, 4, 2, 4, True, True, 4)
    with pytest.raises(ConfigError, match="none of the 2 layers"):
        evaluated("K4V4", model=mamba.Model(args))


@contextmanager
def one_page_scaled(monkeypatch: pytest.MonkeyPatch, factor: float) -> Iterator[None]:
    """The values of the very first page that is sealed are stored larger than they are."""
    seal, sealed = AffineCodec.encode, []

    def larger(self: Any, keys: mx.array, values: mx.array) -> Any:
        if not sealed:
            values = values * factor
        sealed.append(1)
        return seal(self, keys, values)

    with monkeypatch.context() as patch:
        patch.setattr(AffineCodec, "encode", larger)
        yield
    assert sealed


@pytest.mark.parametrize("leg", ["prefill", "decode"])
def test_one_damaged_page_is_noticed(
    rows: list[Row], monkeypatch: pytest.MonkeyPatch, leg: str
) -> None:
    with one_page_scaled(monkeypatch, 1.25):
        found, _ = evaluated("K8V8", legs=(leg,))
    right, wrong = of(rows, leg, "K8V8"), of(found, leg, "K8V8")
    assert wrong["kl_mean"] > 10 * right["kl_mean"]
    assert wrong["top1_percent"] < right["top1_percent"]


def test_the_model_is_as_it_was(rows: list[Row]) -> None:
    model = lively(tiny_llama())
    before = model(random_tokens(32))
    evaluated("K4V4", model=model, legs=("prefill",))
    assert pagedkv.integrations.mlx_lm.wrapping.wrapping_of(model) is None
    assert not pagedkv.cache.sdpa_hook.installed()
    assert mx.array_equal(model(random_tokens(32)), before).item()


def test_token_bytes_and_the_footprint_of_windows() -> None:
    """A ring of mlx-lm's holds its window, whatever came before."""
    from mlx_lm.models.cache import RotatingKVCache

    cache = RotatingKVCache(max_size=128)
    keys = mx.zeros((1, 2, 300, 64), mx.float16)
    cache.update_and_fetch(keys, keys)
    for _ in range(3):
        cache.update_and_fetch(keys[:, :, :1], keys[:, :, :1])
    assert token_bytes([cache]) == (2 * 2 * 64 * 2, mx.float16)
    footprint = Footprint.of([cache], 303)
    assert footprint.cache_bytes == 128 * 512
    assert footprint.bits == 16
    with opened(Variant("own"), tiny_llama()) as caches:
        assert Footprint.of(caches, 1).cache_bytes == 0


def test_without_a_quantized_product_its_rounding_is_still_compared(
    rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models import base

    def missing(*args: Any, **options: Any) -> mx.array:
        raise RuntimeError("no implementation for this shape")

    monkeypatch.setattr(base, "quantized_scaled_dot_product_attention", missing)
    found, _ = evaluated("K8V8", more=(*mlx_lm_variants([4]),))
    for leg in ("prefill", "decode"):
        row, real = of(found, leg, "mlx-lm 4 bit g64"), of(rows, leg, "mlx-lm 4 bit g64")
        assert "dequantized" in row["note"]
        assert "no implementation" in row["note"]
        assert real["note"] == ""
        assert row["kl_mean"] == pytest.approx(real["kl_mean"], rel=1e-3)
        assert (row["bits"], row["cache_bytes"]) == (real["bits"], real["cache_bytes"])


def test_pages_are_attended_by_our_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the dispatcher the numbers would be the same, and say nothing of the kernels."""
    from pagedkv.sequence.layer import PagedLayerCache

    attend, lengths = PagedLayerCache.attend_tagged, []

    def counted(self: Any, view: Any, q: mx.array, *rest: Any) -> mx.array:
        if view.entries:
            lengths.append(q.shape[2])
        return attend(self, view, q, *rest)

    monkeypatch.setattr(PagedLayerCache, "attend_tagged", counted)
    evaluated("K4V4")
    assert lengths.count(1) == 2 * DECODED  # layers, tokens
    assert lengths.count(128) >= 2 * 2

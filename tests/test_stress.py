"""The stress run: right caches pass, and every kind of damage is found."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import ConfigError, KVShape, Precision, TierConfig
from pagedkv.cli.main import main
from pagedkv.tiers import codec_for
from pagedkv.tools.stress import (
    Check,
    ExactSoftmax,
    History,
    StressOptions,
    StressReport,
    SyntheticModel,
    SyntheticStress,
    SyntheticTokens,
    Truth,
)
from pagedkv.tools.stress.tolerance import Tolerance, step_sizes

MODEL = SyntheticModel(layers=2, query_heads=4, kv_heads=2, head_dim=64)
OPTIONS = StressOptions(tokens=3000, needles=4, chunk=600, ops={})


def tiers(kv: str = "K4V4", warm: int | str = "1MB", **more: Any) -> TierConfig:
    return TierConfig(
        hot_tokens=128, sink_tokens=4, kv=kv, page_tokens=256, warm=warm, cold="16MB", **more
    )


def check(report: StressReport, name: str) -> Check:
    return next(c for c in report.checks if c.name == name)


@pytest.mark.parametrize(
    ("kv", "warm"),
    [("K4V4", "64MB"), ("K4V4", "300KB"), ("K8V4:600,K4V4:1200,K2V2", "600KB"), ("fp16", "1MB")],
)
def test_a_sound_cache_passes(kv: str, warm: str) -> None:
    report = SyntheticStress(MODEL, OPTIONS, tiers(kv, warm)).run()
    assert report.ok, [c.failures for c in report.checks]
    assert report.stats.tokens == 3004
    assert (report.stats.cold.tokens > 0) == (warm != "64MB")
    assert all(needle["asked"] > 0 for needle in report.needles)
    assert check(report, "needles found").count == check(report, "needle answers").count > 30
    assert {n["tier"] for n in report.needles} <= {"hot", "warm", "cold"}
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_chunks_without_attention_are_stored_all_the_same() -> None:
    options = StressOptions(tokens=3000, needles=2, chunk=300, attend_every=100, ops={})
    assert SyntheticStress(MODEL, options, tiers()).run().ok


def test_a_bfloat16_hot_tier_passes_within_its_own_rounding() -> None:
    report = SyntheticStress(MODEL, OPTIONS, tiers(hot_dtype="bfloat16")).run()
    assert report.ok, [c.failures for c in report.checks]


# Damage


def _fed(config: TierConfig | None = None) -> SyntheticStress:
    stress = SyntheticStress(MODEL, OPTIONS, config or tiers(warm="64MB"))
    stress.feed()
    return stress


def _finish(stress: SyntheticStress) -> StressReport:
    try:
        stress.decode()
        stress.verify()
        return stress.report()
    finally:
        stress.finish()


def _needle_page(stress: SyntheticStress, layer: int = 0) -> Any:
    """A warm page with a needle in it."""
    for page, tokens in stress.main.cache[layer].located_pages():
        inside = range(page.position, page.position + tokens)
        if page.slot is not None and any(n in inside for n in stress.tokens.needles):
            return page
    raise AssertionError("no needle is in a page")


def _overwrite(stress: SyntheticStress, page: Any, record: mx.array) -> None:
    stress.main.cache[0]._pager._slabs[page.precision].write([page.slot], record)


def _record(stress: SyntheticStress, page: Any) -> mx.array:
    record = stress.main.cache[0]._pager._slabs[page.precision].records([page.slot])
    mx.eval(record)
    return record


def _flip_codes(stress: SyntheticStress) -> None:
    page = _needle_page(stress)
    _overwrite(stress, page, mx.bitwise_invert(_record(stress, page)))


def _another_page(stress: SyntheticStress) -> None:
    page = _needle_page(stress)
    others = (p for p, _ in stress.main.cache[0].located_pages())
    other = next(p for p in others if p.number != page.number)
    _overwrite(stress, page, _record(stress, other))


def _another_layer(stress: SyntheticStress) -> None:
    page = _needle_page(stress)
    other = stress.main.cache[1]._pager._slabs[page.precision].records([page.slot])
    mx.eval(other)
    _overwrite(stress, page, other)


@pytest.mark.parametrize("damage", [_flip_codes, _another_page, _another_layer])
def test_a_damaged_needle_page_gives_wrong_answers(
    damage: Callable[[SyntheticStress], None],
) -> None:
    stress = _fed()
    damage(stress)
    report = _finish(stress)
    assert not report.ok
    assert check(report, "needle answers").failed
    assert check(report, "stored tokens").failed


def test_an_answer_with_another_needles_value_is_found() -> None:
    stress = _fed()
    read = stress.tokens.planted

    def swapped(layer: int, history: History) -> Any:
        planted = read(layer, history)
        return planted._replace(queries=planted.queries[:, ::-1])

    stress.tokens.planted = swapped  # type: ignore[method-assign]
    report = _finish(stress)
    assert "another needle's value" in check(report, "needles found").failures[0]
    assert check(report, "needle answers").failed


def test_one_flipped_word_far_from_any_needle_is_found_by_reading_back() -> None:
    stress = _fed()
    page = _needle_page(stress)
    record = np.array(_record(stress, page))
    record[0, 100] ^= 0x80000000
    _overwrite(stress, page, mx.array(record))
    assert check(_finish(stress), "stored tokens").failed


def test_swapped_table_entries_are_found() -> None:
    # Attention does not see the order of pages; reading back and the books do.
    stress = _fed()
    entries = stress.main.cache[1]._table._entries
    entries[0], entries[1] = entries[1], entries[0]
    stress.main.cache[1]._table._snapshot = None
    report = _finish(stress)
    assert check(report, "bookkeeping").failed
    assert check(report, "stored tokens").failed


def test_a_missing_token_is_found() -> None:
    stress = _fed()
    stress.main.cache[0].trim(1)
    report = _finish(stress)
    assert "layer 0 holds 3,003 of 3,004 tokens" in check(report, "bookkeeping").failures[0]


def test_a_damaged_cold_page_is_a_finding_and_not_a_crash() -> None:
    stress = SyntheticStress(MODEL, OPTIONS, tiers(warm="300KB"))
    stress.feed()
    store = stress.main.cache.context.pager.cold
    store.flush()
    for file in store.directory.glob("*.kv"):
        with file.open("r+b") as f:
            f.write(b"\xff" * 64)
    stress.feed = lambda: None  # type: ignore[method-assign]  # already done
    report = stress.run()
    assert "checksum" in check(report, "page reads").failures[0]
    assert not report.ok


def test_an_exceeded_budget_is_found() -> None:
    stress = SyntheticStress(MODEL, OPTIONS, tiers(warm="64MB"))
    stress.memory.budgets["warm"] = 50_000
    report = stress.run()
    assert "warm takes" in check(report, "budgets").failures[0]
    assert not report.ok


def test_a_lost_reference_is_found() -> None:
    stress = _fed()
    cache = stress.main.cache[0]
    cache._pager.allocator.retain(cache._table.entries[0].page)
    assert "reference counts differ" in check(_finish(stress), "bookkeeping").failures[0]


# Options


def test_a_run_that_cannot_fit_is_refused_with_the_largest_that_does() -> None:
    config = TierConfig(page_tokens=256, warm="300KB", cold=0, hot_tokens=128, sink_tokens=4)
    with pytest.raises(ConfigError, match=r"100,004 tokens in 2 layers do not fit.*hold [\d,]+:"):
        SyntheticStress(MODEL, StressOptions(tokens=100_000, needles=4), config)


@pytest.mark.parametrize(
    "wrong", [{"needles": 0}, {"chunk": 0}, {"attend_every": 0}, {"seed": -1}, {"tokens": 10}]
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"\d"):
        StressOptions(**{"tokens": 1000, **wrong})


# What is fed, and what must come out


def test_tokens_are_the_same_however_they_are_read() -> None:
    tokens, history = SyntheticTokens(MODEL, OPTIONS), History().cut(1001, 1).cut(2300, 2)
    whole = tokens.read(1, history, 0, 3000)
    again = SyntheticTokens(MODEL, OPTIONS)
    edges = [0, 1, 700, 999, 1003, 2300, 2999, 3000]
    for i in (0, 1):
        pieces = [again.read(1, history, a, b)[i] for a, b in itertools.pairwise(edges)]
        assert np.array_equal(np.concatenate(pieces, axis=1), whole[i])
    assert not np.array_equal(whole[0], tokens.read(0, history, 0, 3000)[0])
    before = tokens.read(1, History(), 0, 3000)[0]
    same = (before == whole[0]).all(axis=(0, 2))
    keys_stay = [n for n in tokens.needles if n >= 1001]  # the same key, and another value
    assert same[:1001].all() and same[keys_stay].all()
    assert same[1001:].sum() == len(keys_stay)
    values = [tokens.planted(1, h).values for h in (History(), history)]
    moved = [not np.array_equal(values[0][:, i], values[1][:, i]) for i in range(4)]
    assert moved == [n >= 1001 for n in tokens.needles]


def test_a_history_says_which_branch_wrote_what() -> None:
    history = History().cut(100, 1).cut(200, 2).cut(150, 3)
    assert [history.branch(p) for p in (0, 99, 100, 149, 150, 900)] == [0, 0, 1, 1, 3, 3]
    assert list(history.pieces(90, 160)) == [(0, 90, 100), (1, 100, 150), (3, 150, 160)]
    assert list(history.pieces(160, 160)) == []
    assert history.cut(0, 4).cuts == ((0, 4),)


def test_the_truth_of_a_trimmed_sequence_is_that_of_a_new_one() -> None:
    tokens = SyntheticTokens(MODEL, OPTIONS)
    truth = Truth(tokens)
    truth.read_to(2900)
    twin = truth.fork()
    truth.cut(1500, None)
    truth.read_to(2700)
    plain = Truth(tokens)
    plain.history = truth.history
    plain.read_to(2700)
    for layer in range(2):
        got, wanted = (t.exact(layer).result() for t in (truth, plain))
        assert np.allclose(got, wanted, atol=1e-12)
        assert not np.allclose(twin.exact(layer).result(), wanted, atol=1e-3)


def test_the_streaming_softmax_is_the_plain_one() -> None:
    rng = np.random.default_rng(0)
    q, keys, values = (rng.standard_normal((2, n, 8)) for n in (3, 100, 100))
    exact = ExactSoftmax(q, 0.5)
    for start in range(0, 100, 30):
        exact.add(keys[:, start : start + 30], values[:, start : start + 30])
    weights = np.exp(0.5 * q @ keys.swapaxes(1, 2))
    weights /= weights.sum(axis=2, keepdims=True)
    assert np.allclose(exact.result(), weights @ values, atol=1e-12)
    assert np.allclose(exact.others(keys[:, :3]), 1 - weights[:, [0, 1, 2], [0, 1, 2]])


@given(
    st.integers(0, 2**32),
    st.sampled_from(["K8V8", "K4V4", "K3V3", "K2V2"]),
    st.sampled_from([-3.0, 0.0, 0.4, 20.0]),
)
@settings(max_examples=40)
def test_a_stored_number_is_within_one_step(seed: int, kv: str, offset: float) -> None:
    rng = np.random.default_rng(seed)
    spread = 10 ** rng.uniform(-2, 1)
    keys, values = (
        (offset + spread * rng.standard_normal((1, 256, 64))).astype(np.float16).astype(np.float32)
        for _ in range(2)
    )
    precision = Precision.parse(kv)
    codec = codec_for(KVShape(1, 64, 64), 256, precision, mx.float16)
    record = codec.encode(mx.array(keys), mx.array(values))
    tolerance = Tolerance((precision,), codec.geometry.value_group)
    got = np.array(codec.keys(record, mx.float32))[0].swapaxes(1, 2)
    assert (np.abs(got - keys) <= tolerance.keys(keys)).all()
    got = np.array(codec.values(record, mx.float32))[0]
    assert (np.abs(got - values) <= tolerance.values(values)).all()


def test_steps_add_up_over_encodings() -> None:
    x = np.array([[0.0, 15.0] * 32])
    assert step_sizes(x, 64, [16]).max() == 0
    assert step_sizes(x, 64, [4]).max() == pytest.approx(1)
    assert step_sizes(x, 64, [4, 2]).max() == pytest.approx(1 + 17 / 3)


def test_a_check_counts_what_is_not_a_number_as_wrong() -> None:
    found = Check("x")
    assert not found.ok  # nothing was looked at
    found.see(0.5, "here")
    assert found.ok
    found.see(math.nan, "there")
    assert not found.ok
    assert found.worst == math.inf
    assert "there" in found.failures[0]


# The command


ARGS = ["--warm", "300KB", "--cold", "16MB", "--hot-tokens", "128", "--page-tokens", "256"]


def test_the_command_reports_and_exits_with_0(
    capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    report = tmp_path / "report.json"
    command = ["stress", "--model", "synthetic:tiny", "--tokens", "2K", "--needles", "2"]
    command += ["--ops", "prefill,decode=2"]
    assert main([*command, *ARGS, "--report", str(report)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is True
    assert printed["tokens"] == 2048
    assert json.loads(report.read_text()) == printed
    assert main([*command, *ARGS, "--format", "table"]) == 0
    table = capsys.readouterr().out
    assert "needle answers  ok" in table
    assert table.rstrip().endswith("ok")


def test_the_command_exits_with_1_when_something_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = SyntheticStress.decode

    def damaged(self: SyntheticStress) -> None:
        _flip_codes(self)
        decode(self)

    monkeypatch.setattr(SyntheticStress, "decode", damaged)
    command = ["stress", "--model", "synthetic:tiny", "--tokens", "2K", "--needles", "2", *ARGS]
    command += ["--ops", "prefill"]
    assert main([*command, "--warm", "2MB", "--format", "table"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "wrong" in out and "stored tokens" in out

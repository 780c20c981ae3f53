"""`pagedkv bench`: one small run from end to end, and its rules on known numbers."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import pagedkv
from pagedkv.attn.driver import attend
from pagedkv.cache import sdpa_hook as hook
from pagedkv.cli import main
from pagedkv.tools.bench import (
    AttentionShape,
    BenchSettings,
    Campaign,
    Deadline,
    LlamaShape,
    Result,
    Sample,
    Subject,
    Task,
    attention,
    decode,
    page,
    plan_tasks,
    plots,
    random_llama,
    read_result,
    report,
)
from pagedkv.tools.bench.caches import budgeted, bytes_read, fill, fill_model
from pagedkv.tools.bench.contenders import Contender, Place
from pagedkv.tools.bench.decode import alternating, count_launches, measure_decode
from pagedkv.tools.bench.prefill import prefill_bytes
from pagedkv.tools.bench.result import failed, group_of, skipped, succeeded
from pagedkv.tools.bench.shuffle import shuffle_pages
from pagedkv.tools.bench.timing import Chain, chain_lengths
from pagedkv.tools.bench.yardstick import Yardstick, YardstickMeter, call_limit, step_limit
from tests.models import tiny_llama

ROOT = Path(__file__).parent.parent
SMALL = ("--page-tokens", "256", "--hot-tokens", "64", "--sink-tokens", "4")
KINDS = {
    "attention": ["mlx fp32", "mlx-lm quantized", "K4V4", "K4V4 shuffled", "K4V4 cold"],
    "decode": ["mlx-lm fp32", "mlx-lm quantized", "K4V4"],
    "prefill": ["mlx-lm fp32", "mlx-lm quantized", "K4V4"],
    "seal": ["K4V4"],
}

Document = dict[str, Any]


def call(*argv: str) -> tuple[int, str, str]:
    """Run a command; its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main(argv)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Document, Path, str]:
    """One run of everything: its JSON, its folder, and what it said on stderr."""
    folder = tmp_path_factory.mktemp("bench")
    code, out, err = call(
        *("bench", "all", "--quick", "--format", "json", "--out", str(folder), *SMALL),
        *("--depths", "1K", "--shape", "4/2x64", "--rounds", "3", "--steps", "3"),
        *("--layers", "1", "--chunk", "256"),
        *("--cold-rows", "--cold-dir", str(folder)),
    )
    assert code == 0, err
    return json.loads(out), folder, err


def rows_of(document: Document, part: str) -> dict[str, Document]:
    return {row["what"]: row for row in document["rows"] if row["part"] == part}


# A run from end to end


def test_a_run_has_a_row_for_everything(run: tuple[Document, Path, str]) -> None:
    document, folder, _ = run
    assert {part: list(rows_of(document, part)) for part in KINDS} == KINDS
    for row in document["rows"]:
        assert row["status"] == "ok", row
        assert row["limit"] in {"launch", "bytes", "host", "disk", "arithmetic/latency"}
    assert read_result(folder / "result.json") == document
    machine = document["machine"]
    assert machine["pagedkv"] == pagedkv.__version__
    assert all(machine[name] for name in ("device", "mlx", "mlx_lm", "python", "source"))
    settings = document["settings"]
    assert (settings["depths"], settings["shapes"], settings["dtype"]) == (
        [1024],
        ["4/2x64"],
        "fp32",
    )
    assert settings["tiers"]["hot_tokens"] == 64


@pytest.mark.parametrize(
    ("part", "unit", "scale"),
    [("attention", "us", 1e6), ("decode", "ms", 1e3), ("prefill", "s", 1.0)],
)
def test_ratios_and_rooflines_follow_from_the_numbers(
    run: tuple[Document, Path, str], part: str, unit: str, scale: float
) -> None:
    rows = rows_of(run[0], part)
    baseline = rows[KINDS[part][0]]
    for row in rows.values():
        assert 0 < row[f"{unit}_p10"] <= row[unit] <= row[f"{unit}_p90"]
        # In decode a ratio of pairs: of one pair here, as there is but one block.
        assert row["times_fp16"] == pytest.approx(baseline[unit] / row[unit])
        roofline = scale * row["bytes"] / (1e9 * row["copy_gb_per_s"])
        assert row[f"roofline_{unit}"] == pytest.approx(roofline)
        assert row["achieved"] == pytest.approx(roofline / row[unit])


def test_attention_rows_know_what_they_read(run: tuple[Document, Path, str]) -> None:
    rows = rows_of(run[0], "attention")
    assert rows["mlx fp32"]["bytes"] == 1024 * 2 * 2 * 64 * 4
    # 4 sinks, then 3 pages of 256, the rest hot; 4.5 bits per number in pages, 16 in the window.
    assert rows["K4V4"]["hot_tokens"] == 256
    assert rows["K4V4"]["bytes"] == (768 * 4.5 + 256 * 16) * 2 * 2 * 64 / 8
    assert rows["K4V4 cold"]["cold_tokens"] > rows["K4V4 cold"]["warm_tokens"]
    assert rows["mlx fp32"]["difference"] == 0
    assert 0 < rows["K4V4"]["difference"] < 0.5
    assert rows["K4V4 shuffled"]["difference"] == rows["K4V4"]["difference"]
    assert rows["K4V4 cold"]["difference"] == rows["K4V4"]["difference"]
    assert "fits" in rows["mlx fp32"]["note"]
    assert rows["mlx fp32"]["caches"] == 8 * 2**20 // rows["mlx fp32"]["bytes"]


def test_decode_rows_have_memory(run: tuple[Document, Path, str]) -> None:
    rows = rows_of(run[0], "decode")
    for row in rows.values():
        assert row["cache_bytes"] < row["active_bytes"] <= row["peak_bytes"]
        assert row["weight_bytes"] < row["bytes"]
        assert row["launches"] > 20
    stock = rows["mlx-lm fp32"]
    # Keys and values of two KV heads of 64, float32; mlx-lm allocates in steps of 256 tokens.
    assert stock["cache_bytes"] == pytest.approx(1024 * 2 * 2 * 64 * 4, rel=0.01)
    assert stock["model"] == "synthetic:tiny, layers=1"
    assert rows["K4V4"]["cache_of_fp16"] == rows["K4V4"]["cache_bytes"] / stock["cache_bytes"] < 0.6
    assert {(row["turns"], row["blocks"], row["steps"]) for row in rows.values()} == {("all", 1, 4)}


def test_plots_or_a_hint(run: tuple[Document, Path, str], tmp_path: Path) -> None:
    document, folder, err = run
    drawn = sorted(path.name for path in folder.glob("*.svg"))
    if not plots.available():
        assert (drawn, err.count(plots.HINT)) == ([], 1)
        return
    assert "attention-4-2x64.svg" in drawn
    assert "speed-4-2x64.svg" in drawn
    assert "decode-time-synthetic-tiny-layers-1.svg" in drawn
    assert "decode-speed-synthetic-tiny-layers-1.svg" in drawn
    assert "decode-memory-synthetic-tiny-layers-1.svg" in drawn
    again = plots.draw(document["rows"], tmp_path)
    assert [p.name for p in sorted(again)] == drawn
    assert all(p.read_bytes() == (folder / p.name).read_bytes() for p in again)


def test_no_plots_without_matplotlib(
    run: tuple[Document, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert plots.draw(run[0]["rows"], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_tables_and_csv(run: tuple[Document, Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run[0]["rows"]
    monkeypatch.setattr(Campaign, "run", lambda self, tasks: self.result.add(rows))
    code, out, _ = call("bench", "all", "--quick", "--format", "table", "--quiet")
    assert code == 0
    tables = [table.splitlines() for table in out.split("\n\n")]
    assert [title.partition(":")[0] for title, *_ in tables] == [report.TITLES[p] for p in KINDS]
    _, headings, *lines = tables[0]
    assert headings.split()[:4] == ["shape", "tokens", "attention", "µs"]
    assert [line.split()[:3] for line in lines[2:4]] == [
        ["4/2x64", "1K", "K4V4"],
        ["4/2x64", "1K", "K4V4"],
    ]
    _, out, _ = call("bench", "all", "--quick", "--format", "csv", "--quiet")
    assert [row["what"] for row in csv.DictReader(io.StringIO(out))] == [
        name for names in KINDS.values() for name in names
    ]


def test_help_has_examples() -> None:
    code, out, _ = call("bench", "--help")
    assert code == 0
    assert "  pagedkv bench " in out.partition("examples:")[2]


def test_out_of_time_is_a_row_and_no_success() -> None:
    code, out, _ = call("bench", "all", "--quick", "--max-seconds", "0", "--format", "json")
    rows = json.loads(out)["rows"]
    assert code == 1
    assert [(r["part"], r["status"]) for r in rows[:1]] == [("attention", "skipped")]
    assert {r["part"] for r in rows} == {"attention", "decode", "prefill", "seal"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--depths", "4Q"), "depths='4Q' is not a number of tokens"),
        (("--depths", "0"), "--depths is a number from 1 up"),
        (("--shape", "32x128"), "write query heads / KV heads x channels, as in 32/8x128"),
        (("--shape", "9/2x64"), "9 query heads cannot share 2 KV heads equally"),
        (("--kv", "K5V4"), "unknown precision K5V4"),
        (("--rounds", "0"), "--rounds is a number from 1 up"),
        (("--backend", "magic"), "backend is one of auto"),
        (("--model", "synthetic:gpt5"), "no synthetic model 'gpt5': give one of llama3-8b"),
        (("--model", "demo", "--layers", "1"), "--layers is for synthetic models"),
    ],
)
def test_bad_values_name_what_would_do(argv: tuple[str, ...], says: str) -> None:
    code, out, err = call("bench", "attention", *argv)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert says in err


# The rules


def yardstick(bandwidth: float = 1e9, link: float = 1e-6) -> Yardstick:
    return Yardstick(Sample.of([bandwidth]), Sample.of([link]))


@pytest.mark.parametrize(
    ("seconds", "nbytes", "disk", "limit"),
    [
        (2.9e-6, 2900, 0.0, "launch"),  # even at full bandwidth
        (3.1e-6, 1900, 0.0, "bytes"),
        (1.0, 0.61e9, 0.0, "bytes"),
        (1.0, 0.59e9, 0.0, "arithmetic/latency"),
        (1.0, 0.9e9, 0.6, "disk"),
        (1.0, 0.9e9, 0.4, "bytes"),
    ],
)
def test_what_bounds_a_call(seconds: float, nbytes: float, disk: float, limit: str) -> None:
    assert call_limit(seconds, nbytes, yardstick(), disk) == limit


@pytest.mark.parametrize(
    ("nbytes", "launches", "build", "limit"),
    [
        (0.61e9, 900_000, 0.9, "bytes"),
        (0.59e9, 900_000, 0.7, "host"),
        (0.59e9, 610_000, 0.5, "launch"),
        (0.59e9, 590_000, 0.5, "arithmetic/latency"),
    ],
)
def test_what_bounds_a_step(nbytes: float, launches: int, build: float, limit: str) -> None:
    assert step_limit(1.0, nbytes, yardstick(), launches, build) == limit


def test_medians_and_spread() -> None:
    sample = Sample.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (sample.median, sample.p10, sample.p90, sample.count) == (3.0, 1.4, 4.6, 5)
    assert Sample.of([7.0]).fields("us", 2.0) == {"us": 14.0, "us_p10": 14.0, "us_p90": 14.0}


def test_chains_that_are_compared_have_the_same_length() -> None:
    def chain(caches: int) -> Chain:
        return Chain([lambda x: x] * caches, mx.array(0.0))

    quick, other, slow, slower = chain(2), chain(16), chain(1), chain(3)
    both = chain_lengths([quick, other], [20e-6, 45e-6])
    assert both[0] == both[1] == 1000  # 20 ms of the quicker one
    assert chain_lengths([quick, other], [1e-6, 1e-6]) == [1024, 1024]
    lengths = chain_lengths([quick, slow, slower], [20e-6, 2e-3, 0.5])
    assert lengths == [1000, 50, 2]  # 0.1 s of the slow one, a second of what is slower still
    assert chain_lengths([other], [20e-3]) == [16]  # every cache once


def test_a_chain_is_dependent_and_takes_caches_in_turn() -> None:
    seen: list[tuple[int, float]] = []

    def stop(i: int) -> Callable[[mx.array], mx.array]:
        def step(x: mx.array) -> mx.array:
            seen.append((i, float(x.item())))
            return x + 1

        return step

    chain = Chain([stop(0), stop(1), stop(2)], mx.array(10.0))
    chain.run(4)
    chain.run(2)
    assert seen == [(0, 10), (1, 11), (2, 12), (0, 13), (1, 10), (2, 11)]


def test_the_yardstick_gives_its_memory_back() -> None:
    meter = YardstickMeter(8 * 2**20)
    held = mx.get_active_memory()
    meter.round()
    meter.rest()
    assert mx.get_active_memory() <= held - 8 * 2**20
    result = meter.result()
    assert result.copy.count == 1
    assert result.roofline(result.copy.median) == 1.0


def test_bytes_of_a_prompt() -> None:
    # Three chunks read the weights; they see 4, 8 and 10 of 10 tokens.
    assert prefill_bytes(weights=1000, cache=100, tokens=10, chunk=4) == 3000 + 220


def test_launches_leave_views_out() -> None:
    a, b = mx.zeros((4, 2)), mx.ones((4, 2))
    mx.eval(a, b)
    assert count_launches((a.T.reshape(2, 4) + 1).reshape(4, 2) @ b.T) == 2


def test_weights_without_the_embedding_table() -> None:
    shape = LlamaShape(1, 2, 1, 64, 128, 256)
    untied = Subject("untied", random_llama(shape, mx.float32))
    tied = Subject("tied", random_llama(replace(shape, tied=True), mx.float32))
    assert untied.weight_bytes == tied.weight_bytes > 0
    assert untied.shapes == (pagedkv.KVShape(1, 64, 64),)
    assert untied.dtype == mx.float32


def test_models_with_other_caches_are_refused() -> None:
    model = tiny_llama(layer_types=["full_attention", "sliding_attention"], sliding_window=16)
    with pytest.raises(pagedkv.ConfigError, match="layers with RotatingKVCache"):
        _ = Subject("sliding", model).shapes


# Caches


def test_budgets_are_just_enough() -> None:
    shape = pagedkv.KVShape(8, 128, 128)
    config = budgeted(pagedkv.TierConfig(kv="K8V4:2048,K4V4"), shape, 4, 16384)
    assert pagedkv.plan(shape, 4, 16384, config).fits
    assert config.cold == 0
    assert isinstance(config.warm, int)
    assert not pagedkv.plan(shape, 4, 16384, replace(config, warm=config.warm * 85 // 100)).fits


def test_filled_caches_share_no_memory(small: pagedkv.TierConfig) -> None:
    from mlx_lm.models.cache import KVCache

    shape = pagedkv.KVShape(2, 64, 64)
    keep = replace(small, hot_tokens=512, hot_dtype="model", cold=0)
    with pagedkv.PagedCache.standalone(4, keep) as cache:
        for caches in ([KVCache() for _ in range(4)], cache):
            before = mx.get_active_memory()
            fill_model(caches, [shape] * 4, 512, 2048, mx.float32)
            assert mx.get_active_memory() - before >= 4 * 512 * shape.token_bytes(32)


def test_shuffled_pages_hold_the_same(small: pagedkv.TierConfig) -> None:
    shape = pagedkv.KVShape(2, 64, 64)
    outputs, slots = [], []
    q = mx.random.normal((1, 4, 1, 64), key=mx.random.key(1))
    for seed in (None, 0):
        with pagedkv.PagedCache.standalone(1, replace(small, cold=0)) as cache:
            fill(cache, shape, 3000, 700, mx.float32)
            if seed is not None:
                assert shuffle_pages(cache[0], seed) > 1
            outputs.append(attend(cache[0].view(), q, 0.125))
            slots.append([page.slot for page, _ in cache[0].located_pages()])
            cache[0]._pager.check([cache[0]._table])
    assert mx.array_equal(*outputs)
    assert sorted(slots[0]) == sorted(slots[1])
    assert slots[0] != slots[1]


def test_bytes_read_follow_a_trim(small: pagedkv.TierConfig) -> None:
    shape = pagedkv.KVShape(2, 64, 64)
    with pagedkv.PagedCache.standalone(1, small) as cache:
        fill(cache, shape, 1024, 512, mx.float32)
        whole = bytes_read(cache[0])
        cache[0].trim(256 - 4 + 128)  # all hot tokens but the sinks, and half of the last page
        page_bytes = pagedkv.PageGeometry(shape, 256, pagedkv.Precision(4, 4)).payload_bytes
        hot = 252 * shape.token_bytes()
        assert whole - bytes_read(cache[0]) == hot + page_bytes // 2


# Decode: kinds of cache alternate


def decoded(model: Any = None, depth: int = 1024, **settings: Any) -> dict[str, Document]:
    """Rows of decode over a tiny model, by kind of cache."""
    small = pagedkv.TierConfig(hot_tokens=64, sink_tokens=4, page_tokens=256)
    given = {"kv": ("K4V4", "K2V2"), "repeats": 1, "chunk": 512, "copy_bytes": 2**20, **settings}
    model = model or random_llama(LlamaShape(2, 4, 2, 64, 128, 256), mx.float32)
    rows = measure_decode(
        Subject("tiny", model), depth, BenchSettings(**given, tiers=small), Deadline()
    )
    assert not hook.installed()
    assert pagedkv.integrations.mlx_lm.wrapping.wrapping_of(model) is None
    return {row["what"]: row for row in rows}


def test_paired_blocks_see_through_a_host_that_drifts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    slowness = {"mlx-lm fp32": 1.0, "mlx-lm quantized": 2.0, "K4V4": 0.5, "K2V2": 0.8}

    def block(run: Any) -> None:
        order.append(run.tally.kind.name)
        drift = 1.5 ** len(run.seconds)  # a median of all blocks says little
        run.seconds.append(slowness[run.tally.kind.name] * drift)

    monkeypatch.setattr(decode._Run, "block", block)
    rows = decoded(depth=256, steps=18, repeats=2)
    names = list(slowness)
    assert list(rows) == names
    # Five blocks hold 18 steps; every round has all kinds and begins with another.
    turns = [names[i % 4 :] + names[: i % 4] for i in range(5)]
    assert order == [name for turn in turns + turns for name in turn]
    for name, row in rows.items():
        ratios = [row[f"time_of_fp16{q}"] for q in ("", "_p10", "_p90")]
        assert ratios == pytest.approx([slowness[name]] * 3)
        assert row["times_fp16"] == pytest.approx(1 / slowness[name])
        assert (row["turns"], row["blocks"], row["steps"]) == ("all", 10, 40)
    table = report.markdown("decode", rows.values())
    assert "| 2.00x | 2.00-2.00x | all |" in table


def test_a_block_is_the_same_work_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    offsets: dict[str, list[int]] = {}
    probe = decode._Run.probe

    def seen(run: Any) -> None:
        offsets[run.tally.kind.name] = [cache.offset for cache in run._caches]
        probe(run)

    monkeypatch.setattr(decode._Run, "probe", seen)
    decoded(depth=256, steps=8)
    # The generator is one step ahead, and began with a prompt of one token.
    made = decode.WARM_UP_STEPS + 2 * (decode.LEAD_IN_STEPS + decode.BLOCK_STEPS) + 1
    assert list(offsets.values()) == [[256 + made] * 2] * 4


def test_memory_is_the_same_in_company_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    together = decoded(steps=4)
    monkeypatch.setattr(mx, "get_memory_limit", lambda: 0)
    alone = decoded(steps=4)
    assert {row["turns"] for row in together.values()} == {"all"}
    assert {row["turns"] for row in alone.values()} == {"runs"}
    stock = together["mlx-lm fp32"]["cache_bytes"]
    assert stock >= 2 * 1024 * 2 * 2 * 64 * 4
    for what, row in together.items():
        assert row["cache_bytes"] == pytest.approx(alone[what]["cache_bytes"], abs=64)
        for name in ("active_bytes", "fill_peak_bytes"):
            assert row[name] == pytest.approx(alone[what][name], abs=stock // 4), (what, name)
        # How much of two steps overlaps varies on the CPU; nobody else's cache is in it.
        assert row["peak_bytes"] == pytest.approx(alone[what]["peak_bytes"], abs=stock // 2)
    assert "time_of_fp16_p10" not in alone["K4V4"]
    expected = alone["K4V4"]["ms"] / alone["mlx-lm fp32"]["ms"]
    assert alone["K4V4"]["time_of_fp16"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sizes", "room", "groups"),
    [
        ([17, 5, 7, 3], 41, [[0, 1, 2, 3]]),  # 32, and half of 17 for a step
        ([17, 5, 7, 3], 39, [[0, 1], [0, 2], [0, 3]]),
        ([17, 5, 7, 3], 31, [[0, 1], [2], [0, 3]]),
        ([17, 5, 7, 3], 20, [[0], [1], [2], [3]]),
        ([17], 0, [[0]]),
    ],
)
def test_who_is_in_memory_together(sizes: list[int], room: int, groups: list[list[int]]) -> None:
    assert alternating(sizes, room) == groups


def test_pairs_where_not_all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"mlx-lm fp32": 10, "mlx-lm quantized": 99, "K4V4": 4, "K2V2": 3}
    monkeypatch.setattr(decode, "cache_bytes", lambda kind, *_: sizes[kind.name])
    held = mx.get_active_memory
    monkeypatch.setattr(mx, "get_memory_limit", lambda: held() + 19)
    rows = decoded(depth=256, steps=4)
    turns = {what: (row["turns"], row["blocks"]) for what, row in rows.items()}
    assert turns == {
        "mlx-lm fp32": ("pairs", 2),  # beside each of ours
        "mlx-lm quantized": ("runs", 1),
        "K4V4": ("pairs", 1),
        "K2V2": ("pairs", 1),
    }


def test_a_cache_that_does_not_run_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = decode._Run.block

    def breaks(run: Any) -> None:
        if run.tally.kind.name == "K4V4" and len(run.seconds) == 1:
            raise RuntimeError("out of memory")
        block(run)

    monkeypatch.setattr(decode._Run, "block", breaks)
    rows = decoded(tiny_llama(), depth=512, steps=8)  # 16 channels: no group of 64 fits
    assert "does not run" in rows["mlx-lm quantized"]["note"]
    assert rows["K4V4"]["note"] == "does not run: out of memory"
    assert [(r["status"], r["blocks"]) for r in (rows["mlx-lm fp32"], rows["K2V2"])] == [
        ("ok", 2)
    ] * 2


# What fails is a row


def place(**settings: Any) -> Place:
    small = pagedkv.TierConfig(hot_tokens=64, sink_tokens=4, page_tokens=256)
    given = {"rounds": 1, "working_set": 0, "copy_bytes": 2**20, "tiers": small, **settings}
    return Place(AttentionShape(4, 2, 64), 600, mx.float32, BenchSettings(**given))


def test_what_does_not_run_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(place: Place) -> Contender:
        raise RuntimeError("QuantizedMatmul has no\nimplementation " + "x" * 200)

    monkeypatch.setattr(attention, "quantized", broken)
    rows = {row["what"]: row for row in attention.measure_attention(place(shuffled=False))}
    assert rows["mlx-lm quantized"]["status"] == "failed"
    assert rows["mlx-lm quantized"]["note"].startswith(
        "does not run: QuantizedMatmul has no implementation xx"
    )
    assert len(rows["mlx-lm quantized"]["note"]) < 120
    assert {rows[name]["status"] for name in ("mlx fp32", "K4V4")} == {"ok"}


def test_what_breaks_half_way_and_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def breaks(q: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        if calls > 60:
            raise RuntimeError("out of memory")
        return q

    made = iter([Contender("K4V4", [breaks], 1), Contender("K2V2", [lambda q: q / 0], 1)])
    monkeypatch.setattr(attention, "paged", lambda *_: next(made))
    chosen = place(shuffled=False, kv=("K4V4", "K2V2"), rounds=30)
    rows = {row["what"]: row for row in attention.measure_attention(chosen)}
    assert rows["K4V4"]["note"] == "does not run: out of memory"
    assert rows["K2V2"]["note"] == "does not run: the output is not finite"
    assert rows["mlx fp32"]["rounds"] == 30


def test_several_queries_are_causal() -> None:
    rows = attention.measure_attention(place(queries=3, shuffled=False))
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert rows[2]["queries"] == 3
    assert rows[2]["difference"] < 0.5


# Results, campaigns, pages


def row(part: str = "decode", depth: int = 1024, what: str = "K4V4", **more: Any) -> Document:
    return {"part": part, "model": "m", "depth": depth, "what": what, **more}


def test_a_result_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    first = Result({}, path)
    first.add([succeeded(row(depth=1)), failed(row(depth=2), "no")])
    first.add([succeeded(row(depth=3)), skipped(row(depth=3, what="K2V2"), "late")])
    second = Result({}, path)
    assert second.resume() == 2
    assert [second.has(group_of(row(depth=depth))) for depth in (1, 2, 3)] == [True, True, False]

    document = json.loads(path.read_text())
    document["machine"]["mlx"] = "0.1"
    path.write_text(json.dumps(document))
    with pytest.raises(pagedkv.ConfigError, match=r"measured elsewhere \(mlx differ\)"):
        Result({}, path).resume()
    for text in ("{}", '{"schema": 1, "benchmark": "pagedkv eval", "rows": []}'):
        path.write_text(text)
        with pytest.raises(pagedkv.ConfigError, match="is no result of pagedkv bench"):
            Result({}, path).resume()
    path.write_text('{"schema": 2, "benchmark": "pagedkv bench"}')
    with pytest.raises(pagedkv.ConfigError, match="has schema 2, not 1"):
        Result({}, path).resume()


def test_a_campaign_writes_a_failed_task_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pagedkv.tools.bench import campaign

    def measure(place: Place, deadline: Deadline) -> list[Document]:
        if place.depth == 1:
            raise MemoryError
        return [succeeded({**task.row("m", 1), "what": "K4V4"})]

    monkeypatch.setattr(campaign, "measure_attention", measure)
    task = Task("attention", 2, AttentionShape(2, 1, 64))
    result, said = Result({}, tmp_path / "r.json"), []  # type: ignore[var-annotated]
    settings = BenchSettings()
    work = Campaign(settings, mx.float32, "m", tiny_llama, result, Deadline(), said.append)
    work.run([replace(task, depth=1), task, task])
    assert [(r["depth"], r["status"]) for r in result.rows] == [(1, "failed"), (2, "ok")]
    assert result.rows[0]["note"] == "does not run: MemoryError"
    assert len(said) == 2
    assert read_result(tmp_path / "r.json")["rows"] == result.rows


def test_tasks_of_a_run() -> None:
    shapes = [AttentionShape.parse("32/8x128"), AttentionShape.parse("4/1x256")]
    settings = BenchSettings(rounds=3, chunk=100)
    found = plan_tasks(("attention", "prefill"), shapes, (1, 2), settings)
    assert [(t.part, str(t.shape or ""), t.depth) for t in found] == [
        ("attention", "32/8x128", 1),
        ("attention", "32/8x128", 2),
        ("attention", "4/1x256", 1),
        ("attention", "4/1x256", 2),
        ("prefill", "", 1),
        ("prefill", "", 2),
        ("seal", "", 500),
    ]


def test_markdown_of_rows() -> None:
    numbers = {"ns_per_vector": 1234.5, "ns_per_vector_p10": 0.123456, "ns_per_vector_p90": 12.3}
    more = {"roofline_ns": 50.0, "achieved": 0.5, "limit": "bytes"}
    text = report.markdown(
        "seal",
        [succeeded(row("seal", **numbers, **more)), failed(row("seal", what="K2V2"), "no room")],
    )
    assert text.splitlines() == [
        "| model | pages | ns/vector | p10-p90 | roofline ns | of it | limit | note |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
        "| m | K4V4 | 1,234 | 0.123-12.3 | 50 | 50% | bytes | - |",
        "| m | K2V2 | - | - | - | - | - | no room |",
    ]
    assert report.markdown("decode", []) == ""


def test_the_page_is_filled(run: tuple[Document, Path, str], tmp_path: Path) -> None:
    document, folder, _ = run
    target = tmp_path / "performance.md"
    skeleton = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    target.write_text(skeleton, encoding="utf-8")
    assert page.fill_page(target, [folder / "result.json"]) == list(KINDS)
    text = target.read_text(encoding="utf-8")
    assert document["machine"]["device"] in text
    short = skeleton.partition("<!-- bench:paged -->")[2].partition("<!-- /bench:paged -->")[0]
    assert text.count("| K4V4 |") == 4 + short.count("| K4V4 |")  # what this run has not, stays
    links = [link.rpartition("(")[2] for link in text.split(")") if "result.json" in link]
    assert [(tmp_path / link).resolve() for link in links if "/" in link] == [
        (folder / "result.json").resolve()
    ] * 4
    assert ("![attention-4-2x64]" in text) == plots.available()
    page.fill_page(target, [folder / "result.json"])  # again: the same page
    assert target.read_text(encoding="utf-8") == text
    target.write_text("nothing here")
    with pytest.raises(pagedkv.ConfigError, match="no section for attention"):
        page.fill_page(target, [folder / "result.json"])


@pytest.fixture
def script() -> Any:
    """benchmarks/h100.py."""
    spec = importlib.util.spec_from_file_location("h100", ROOT / "benchmarks" / "h100.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_campaign_covers_what_is_promised(script: Any) -> None:
    settings = BenchSettings()
    found = script.tasks("attention", settings)
    depths = {s: {t.depth for t in found if str(t.shape) == s} for s in script.ATTENTION}
    assert {512, 1024, 131072, 262144} < depths["32/8x128"] == depths["32/4x128"]
    assert (
        depths["12/2x128"] == depths["4/1x256"] | {131072} == {256, 512, 1024, 2048, 4096, 131072}
    )
    assert {t.depth for t in script.tasks("decode", settings)} == {
        *(1024, 8192, 32768, 102400, 131072, 262144)
    }
    paged = {t.depth for t in script.tasks("paged", settings) if str(t.shape) == "4/1x256"}
    assert paged == {257, 513, 1025, 2049, 4097}
    assert script.tasks("prefill", settings) == [Task("prefill", 65536), Task("seal", 45056)]


def test_the_campaign_goes_on_part_by_part(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Task] = []

    def measure(self: Campaign, task: Task) -> list[Document]:
        if len(done) == 8:
            monkeypatch.setattr(Deadline, "passed", True)
        done.append(task)
        return [failed(task.row(self.model, 1), "not here")]

    monkeypatch.setattr(script, "ATTENTION", {"4/1x256": (256, 512)})
    monkeypatch.setattr(Campaign, "_require_subject", lambda self: None)
    monkeypatch.setattr(Campaign, "_measure", lambda self, task: measure(self, task))
    first, second = tmp_path / "first", tmp_path / "second"
    assert script.main(["--part", "all", "--out", str(first)]) == 0
    assert [task.part for task in done] == ["decode"] * 6 + ["prefill", "seal", "paged"]
    assert sorted(path.name for path in first.iterdir()) == [
        *("attention.json", "decode.json", "paged.json", "prefill.json")
    ]
    paged = read_result(first / "paged.json")
    assert paged["settings"]["tiers"]["hot_tokens"] == 1
    assert {row["part"] for row in paged["rows"]} == {"paged"}

    monkeypatch.setattr(Deadline, "passed", False)
    assert (
        script.main(["--part", "attention", "paged", "--out", str(second), "--resume", str(first)])
        == 0
    )
    assert [task.part for task in done[9:]] == ["paged"] * 9 + ["attention"] * 2
    assert len(set(done)) == len(done)
    for part, count in (("paged", 10), ("attention", 2)):
        rows = read_result(second / f"{part}.json")["rows"]
        assert [row["status"] for row in rows] == ["failed"] * count

"""Operations, faults and memory of a stress run: sound ones pass, planted mistakes are found."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv import ColdStoreError, ConfigError, PagedCache, TierConfig
from pagedkv.cli.main import main
from pagedkv.cli.stress_progress import StressProgress
from pagedkv.integrations.mlx_lm.model_notes import FOLDER
from pagedkv.integrations.mlx_lm.wrapping import Wrapping
from pagedkv.tiers import FileColdStore, HotBuffer
from pagedkv.tools.stress import (
    OPERATIONS,
    Check,
    ModelStress,
    Status,
    StressOptions,
    StressReport,
    SyntheticModel,
    SyntheticStress,
    killing,
    memory,
    operations,
    parse_ops,
    plots,
    schedule,
)
from pagedkv.tools.stress.faults import Faults
from tests.models import tiny_llama

MODEL = SyntheticModel(layers=2, query_heads=2, kv_heads=1, head_dim=64)
EVERYTHING = {"decode": 2, "trim": 3, "fork": 2, "save": 1, "kill": 1}


def options(ops: dict[str, int] | None = None, **more: Any) -> StressOptions:
    given = {"tokens": 3000, "needles": 4, "chunk": 300, "attend_every": 3, "seed": 1}
    return StressOptions(**{**given, "ops": EVERYTHING if ops is None else ops, **more})


def tiers(**more: Any) -> TierConfig:
    given = dict(hot_tokens=128, sink_tokens=4, kv="K4V4", page_tokens=256, warm="150KB")
    return TierConfig(**{**given, "cold": "16MB", **more})


def check(report: StressReport, name: str) -> Check:
    return next(c for c in report.checks if c.name == name)


def run(ops: dict[str, int] | None = None, **more: Any) -> StressReport:
    return SyntheticStress(MODEL, options(ops, **more), tiers()).run()


def test_everything_at_once_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    stress = SyntheticStress(MODEL, options(), tiers(cold_dir=str(tmp_path)))
    report = stress.run()
    assert report.ok, report.wrong
    assert {**report.operations, "prefill": 0} == {**EVERYTHING, "prefill": 0}
    assert (report.stats.tokens, report.notes) == (3004, [])
    assert check(report, "saved and loaded").count == 1
    assert check(report, "killed and resumed").count == 2
    assert report.stats.cold.tokens > 0
    assert list(tmp_path.iterdir()) == []
    document = json.loads(json.dumps(report.to_dict()))
    assert document["ok"] is True and document["wrong"] == []
    kinds = {row["kind"] for row in document["latencies"]}
    assert kinds == {"prefill", "prefill, attending", "decode", "fork"}


@pytest.mark.parametrize("seed", [0, 3])
def test_trims_and_forks_of_any_length(seed: int) -> None:
    ladder = tiers(kv="K8V4:600,K4V4:1200,K2V2", warm="400KB")
    ops = {"decode": 1, "trim": 10, "fork": 4}
    report = SyntheticStress(MODEL, options(ops, seed=seed, tokens=2500), ladder).run()
    assert report.ok, report.wrong


def test_the_schedule_is_the_seeds() -> None:
    plan = schedule(options())
    assert plan == schedule(options()) != schedule(options(seed=2))
    assert sorted(name for _, name in plan) == sorted(
        name for name, count in EVERYTHING.items() for _ in range(count)
    )
    assert all(0 < at < 3000 for at, _ in plan)


# Planted mistakes


def test_a_trim_that_forgets_one_token_too_few_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    trim = pagedkv.PagedCache.trim

    def off(self: pagedkv.PagedCache, n: int) -> int:
        return trim(self, n - 1) + 1

    monkeypatch.setattr(pagedkv.PagedCache, "trim", off)
    report = run({"trim": 1})
    assert "the run ended early" in check(report, "bookkeeping").failures[0]


def test_a_trim_that_keeps_the_wrong_tokens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    truncate = HotBuffer.truncate

    def off(self: HotBuffer, tokens: int) -> None:
        truncate(self, tokens)
        self._keys = mx.roll(self._keys, 1, axis=2)

    monkeypatch.setattr(HotBuffer, "truncate", off)
    report = run({"trim": 1})
    assert not check(report, "bookkeeping").failed
    assert "keys of" in check(report, "stored tokens").failures[0]


def test_a_fork_that_writes_into_its_parent_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(self: pagedkv.PagedCache) -> pagedkv.PagedCache:
        return self

    monkeypatch.setattr(pagedkv.PagedCache, "fork", same)
    monkeypatch.setattr(pagedkv.PagedCache, "close", lambda self: None)
    stress = SyntheticStress(MODEL, options({"fork": 1}), tiers())
    report = stress.run()
    assert not report.ok
    assert check(report, "bookkeeping").failed


def test_a_saved_file_with_a_wrong_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    save = pagedkv.PagedCache.save

    def damage(self: pagedkv.PagedCache, path: str) -> None:
        save(self, path)
        with Path(path).open("r+b") as file:
            file.seek(-1000, 2)
            byte = file.read(1)
            file.seek(-1000, 2)
            file.write(bytes([byte[0] ^ 0x40]))

    monkeypatch.setattr(pagedkv.PagedCache, "save", damage)
    report = run({"save": 1})
    assert "is not what was saved" in check(report, "saved and loaded").failures[0]


def test_a_flush_that_was_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # The process that is killed says that it flushed more than it did.
    kill_one = killing.kill_one

    def boast(*args: Any) -> killing.Killed:
        fate = kill_one(*args)
        fate.said.append(("flushed", 2999))
        return fate

    monkeypatch.setattr(operations, "kill_one", boast)
    report = run({"kill": 1})
    assert "flushed were [2999]" in check(report, "killed and resumed").failures[0]


@pytest.mark.parametrize("before_it_is_told_what_to_do", [False, True])
def test_a_process_that_ends_by_itself_is_found(
    before_it_is_told_what_to_do: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Process(killing.subprocess.Popen):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            if before_it_is_told_what_to_do:
                self.wait()

    monkeypatch.setattr(killing.subprocess, "Popen", Process)
    monkeypatch.setattr(killing.sys, "executable", "/bin/false")
    report = run({"kill": 1})
    assert "did not go on" in check(report, "killed and resumed").failures[0]


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ([("resumed", 10)], {10}),
        ([("resumed", 10), ("flushing", 12)], {10, 12}),
        ([("resumed", 10), ("flushing", 12), ("flushed", 12), ("appended", 14)], {12}),
        ([("flushing", 12), ("flushed", 12), ("flushing", 14)], {12, 14}),
    ],
)
def test_what_a_killed_process_may_leave(said: list[tuple[str, int]], found: set[int]) -> None:
    assert killing.Killed(said).lengths(10) == found


# Faults


@pytest.mark.parametrize("seed", [1, 2])
def test_faults_are_survived_and_counted(seed: int) -> None:
    report = run({"decode": 4, "trim": 2, "fork": 1, "save": 1}, faults=True, seed=seed)
    assert report.ok, report.wrong
    faults = report.faults
    assert faults["injected"] == sum(k["injected"] for k in faults["kinds"]) > 5
    assert all(k["injected"] == k["detected"] + k["absorbed"] for k in faults["kinds"])
    assert check(report, "faults survived").count > 10


@pytest.mark.parametrize("pages", [10, 1000])
def test_a_call_that_reads_every_page_goes_through(tmp_path: Path, pages: int) -> None:
    """However many there are: what a call meets does not grow with the context."""
    file = tmp_path / "f.pages"
    file.write_bytes(bytes(4096))
    faults = Faults(1, True, pages)
    buffer = bytearray(64)
    with faults.quietly():
        fd = faults.disk.open(file, os.O_RDONLY)

    def call() -> None:
        for _ in range(pages):
            try:
                while faults.disk.pread(fd, [buffer], 0) < len(buffer):
                    pass
            except InterruptedError:
                pass  # made again, as the tiers do
            except OSError as e:
                raise ColdStoreError(str(e)) from e

    for _ in range(30):
        faults.survive(call, lambda: None, lambda: None)
    faults.disk.close(fd)
    assert faults.check.ok
    assert 0 < faults.noticed["ColdStoreError"] < 30


@pytest.mark.parametrize("real_model", [False, True])
def test_saved_files_take_no_room_from_pages(
    monkeypatch: pytest.MonkeyPatch, real_model: bool
) -> None:
    beside: list[set[str]] = []
    save_file = PagedCache.save

    def save(cache: PagedCache, path: str, *args: Any, **more: Any) -> None:
        save_file(cache, path, *args, **more)
        store = Path(str(cache.context.config.cold_dir))
        beside.append({str(p) for p in store.rglob("*.safetensors")})
        assert store not in Path(path).parents and Path(path).exists()

    monkeypatch.setattr(PagedCache, "save", save)
    ops = {"save": 1, "kill": 1}
    report = real({}, tokens=1200, ops=ops) if real_model else run(ops)
    assert report.ok, report.wrong
    assert beside == [set()]


def test_a_damaged_page_is_made_again() -> None:
    stress = SyntheticStress(MODEL, options({}, faults=True), tiers())
    stress.faults._faulty._rates = {call: [] for call in stress.faults._faulty._rates}
    stress.faults._faulty.arm("zero", after=3)
    report = stress.run()
    assert report.ok, report.wrong
    (kind,) = [k for k in report.faults["kinds"] if k["injected"]]
    assert kind == {"kind": "zero", "injected": 1, "detected": 1, "absorbed": 0}
    assert report.faults["pages_made_again"] == 1


def test_damage_that_goes_unnoticed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from pagedkv.tiers.cold.page_reads import PageReads

    monkeypatch.setattr(PageReads, "_verify", lambda *_: None)  # the checksum is not looked at
    stress = SyntheticStress(MODEL, options({}, faults=True), tiers())
    stress.faults._faulty._rates = {call: [] for call in stress.faults._faulty._rates}
    stress.faults._faulty.arm("zero", after=3)
    report = stress.run()
    assert check(report, "stored tokens").failed


def test_a_failed_call_that_keeps_its_tokens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    from pagedkv.sequence.layer import PagedLayerCache

    monkeypatch.setattr(PagedLayerCache, "_taken_back_to", lambda *_: nullcontext())
    stress = SyntheticStress(MODEL, options({}, faults=True, attend_every=1), tiers())
    stress.faults._faulty._rates = {call: [] for call in stress.faults._faulty._rates}
    stress.faults._faulty.arm("eio_read")
    report = stress.run()
    assert "after a failed call the layers hold" in check(report, "bookkeeping").failures[0]


def test_a_disk_that_never_works_ends_the_run_with_a_finding() -> None:
    stress = SyntheticStress(MODEL, options({}, faults=True), tiers())
    stress.faults._faulty._rates["pread"] = [("eio_read", 1.0)]
    report = stress.run()
    assert "not in 12 tries" in check(report, "faults survived").failures[0]


# Memory


def test_memory_beyond_what_is_stated_fails_the_run() -> None:
    stress = SyntheticStress(MODEL, options({}), tiers())
    stress.memory.base = 0
    stress.memory.limits = {"warm": 1000}
    report = stress.run()
    assert "the process takes" in check(report, "process memory").failures[0]
    assert "of 1 KB" in report.wrong[0]


def test_the_process_is_sampled_between_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = memory._Sampler(0.001)
    monkeypatch.setattr(memory, "process_bytes", lambda: 7)
    sampler.start()
    while sampler.count < 5:
        pass
    sampler.stop()
    sampler.note(3)
    assert (sampler.take(), sampler.take()) == (7, 0)


def test_samples_stay_few_however_long_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_KEPT", 8)
    report = run({}, sample_seconds=1e-6)
    rows = report.memory.samples
    assert 2 < len(rows) <= 9
    assert rows[0]["tokens"] < 700 and rows[-1]["tokens"] == 3004
    assert rows[-1]["written"] > 0


# Real models


class Letters:
    """One token per letter."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(c) % 96 for c in text]


def real(more: dict[str, Any], **options_: Any) -> StressReport:
    config = tiers(warm="80KB", **more)
    stress = ModelStress("tiny", tiny_llama(), Letters(), options(**options_), config)
    return stress.run()


def test_every_operation_with_a_real_model() -> None:
    report = real({}, tokens=1500)
    assert report.ok, report.wrong
    assert check(report, "placement").count > 8
    assert check(report, "crashed and resumed").count == 1
    assert {n: report.operations[n] for n in EVERYTHING} == EVERYTHING


def test_layers_with_more_bits_are_no_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed and resumed, saved and loaded, forked: always with the same layers."""
    ladders: list[str] = []
    make_cache = Wrapping.make_cache

    def noted(wrapping: Wrapping) -> pagedkv.PagedCache:
        ladders.append(wrapping.pager.budget.ladders.others_text)
        return make_cache(wrapping)

    monkeypatch.setattr(Wrapping, "make_cache", noted)
    monkeypatch.setenv(FOLDER, "/dev/null/nowhere")
    monkeypatch.setattr(
        "pagedkv.integrations.mlx_lm.retrieval_layers.echoes", lambda model: {0: 0.0, 2: 0.5}
    )
    config = tiers(warm="240KB")
    stress = ModelStress("tiny", tiny_llama(layers=4), Letters(), options(tokens=1500), config)
    report = stress.run()
    assert report.ok, report.wrong
    assert {n: report.operations[n] for n in EVERYTHING} == EVERYTHING
    assert len(ladders) > 3
    assert set(ladders) == {"K8V8@2"}


def test_faults_with_a_real_model() -> None:
    report = real({}, tokens=1200, ops={"decode": 3, "trim": 1, "fork": 1}, faults=True, seed=3)
    assert report.ok, report.wrong
    assert report.faults["injected"] > 0
    silent = [k for k in report.faults["kinds"] if k["kind"] in ("zero", "drop", "stale")]
    assert sum(k["injected"] for k in silent) == 0


def test_a_real_models_fork_that_shares_too_much_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, first = pagedkv.PagedCache.fork, []

    def same(self: pagedkv.PagedCache) -> pagedkv.PagedCache:
        first.append(self)
        twin = fork(self)
        if len(first) == 1:
            twin[0].trim(1)
            twin[0].append(mx.zeros((1, 2, 1, 16)), mx.zeros((1, 2, 1, 16)))
        return twin

    monkeypatch.setattr(pagedkv.PagedCache, "fork", same)
    report = real({}, tokens=1200, ops={"fork": 1})
    assert "logits differ" in check(report, "placement").failures[0]


# The command

COMMAND = ["stress", "--model", "synthetic:tiny", "--tokens", "2K", "--warm", "300KB", "--cold"]
COMMAND += ["16MB", "--hot-tokens", "128", "--page-tokens", "256", "--needles", "2"]


def test_a_directory_gets_report_table_and_plots(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "folder"
    command = [*COMMAND, "--ops", "prefill,decode=2,trim=1", "--report", str(folder), "--seed", "5"]
    assert main([*command, "--heads", "1", "--layers", "1", "--format", "table"]) == 0
    printed = capsys.readouterr()
    assert "1 layers of 1 KV heads x 64, a slice of 2 layers of 2 KV heads" in printed.out
    assert "interpreter, MLX, libraries" in printed.out and "allowed in all" in printed.out
    assert (folder / "report.txt").read_text() == printed.out
    document = json.loads((folder / "report.json").read_text())
    assert document["memory"]["allowed"] > document["peaks"]["process"] > 0
    assert document["options"]["ops"] == {"prefill": 0, "decode": 2, "trim": 1}
    drawn = {path.name for path in folder.glob("*.png")}
    names = {"tiers.png", "memory.png", "latency.png", "traffic.png"}
    assert drawn == (names if plots.available() else set())
    assert all(path.stat().st_size < 200_000 for path in folder.iterdir())
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert plots.draw(document, folder) == []


def test_a_planted_mistake_makes_the_exit_code_1_and_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "allowance", lambda *_: {"warm": 1})
    from pagedkv.tools.stress import synthetic

    monkeypatch.setattr(
        synthetic, "allowance", lambda *_: {"scratch": 1, "attention temporaries": 0}
    )
    monkeypatch.setattr(synthetic, "SLACK", 0)
    monkeypatch.setattr(memory, "process_bytes", iter_of([100, *[10**12] * 10_000]))
    assert main([*COMMAND, "--ops", "prefill", "--format", "table"]) == 1
    assert "process memory: " in capsys.readouterr().out


def iter_of(values: list[int]) -> Callable[[], int]:
    left = iter(values)
    return lambda: next(left)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ops", "prefill,dance"], "list some of prefill, decode, trim, fork, save, kill"),
        (["--ops", "decode=-1"], "list some of"),
        (["--heads", "3"], "--heads 3: tiny has 2 KV heads"),
        (["--sample", "0"], "sample_seconds is more than 0"),
        (["--ops", "kill", "--cold", "0", "--warm", "9MB"], "leave out kill"),
    ],
)
def test_what_cannot_be_done_is_said(
    capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main([*COMMAND, *more]) == 1
    assert message in capsys.readouterr().err


def test_operations_are_listed_with_how_often() -> None:
    assert parse_ops("prefill,decode") == {"prefill": 0, "decode": OPERATIONS["decode"]}
    assert parse_ops("trim=20, kill=1") == {"trim": 20, "kill": 1}
    with pytest.raises(ConfigError):
        options({"dance": 1})


def test_progress_is_a_line_now_and_then_or_one_that_is_rewritten() -> None:
    status = Status("feeding", 500, 1000, {"warm": (10**6, 2 * 10**6)}, 5, 7, 3 * 10**6, 10**9, 9)
    stream = io.StringIO()
    with StressProgress(False, stream, pace=0.0) as progress:
        progress(status)
        progress(status)
    first, second = stream.getvalue().splitlines()
    assert "feeding 500/1,000 tokens 50%" in first and "warm 1 MB/2 MB" in first
    assert "process 3 MB/1 GB" in first and "NVMe" in first
    assert "0 tokens/s" in second
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    with StressProgress(False, stream, pace=0.0) as progress:
        progress(status)
    assert stream.getvalue().startswith("\r") and stream.getvalue().endswith("\x1b[2K")
    with StressProgress(True, stream := io.StringIO(), pace=0.0) as progress:
        progress(status)
    assert stream.getvalue() == ""


def test_a_store_that_does_not_count_its_traffic_twice() -> None:
    stress = SyntheticStress(MODEL, options({"save": 2}), tiers())
    written: list[int] = []
    close = FileColdStore.close

    def noted(self: FileColdStore) -> None:
        written.append(self.counters.bytes_written)
        close(self)

    FileColdStore.close = noted  # type: ignore[method-assign]
    try:
        report = stress.run()
    finally:
        FileColdStore.close = close  # type: ignore[method-assign]
    assert report.ok, report.wrong
    assert report.stats.nvme_bytes_written == sum(written) > 0
    assert np.isfinite(report.memory.samples[-1]["read"])

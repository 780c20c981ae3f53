"""`pagedkv eval` as a user calls it: tables, JSON, CSV, files, and what it says of bad input."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pagedkv.cli import loading, main
from pagedkv.errors import ConfigError
from pagedkv.tools.bench.result import OK
from pagedkv.tools.bench.timing import Deadline
from pagedkv.tools.evaluation import Evaluation, plots, read_result, report, retrieval
from pagedkv.tools.evaluation.haystack import digest
from pagedkv.tools.evaluation.retrieval_result import RetrievalResult
from tests.models import byte_model

Document = dict[str, Any]
SMALL = ("--page-tokens", "256", "--hot-tokens", "64", "--sink-tokens", "4")
SHORT = ("--tokens", "640", "--decode-tokens", "128", "--chunk", "128")
LABELS = ["mlx-lm fp32", "K8V8", "K2V2", "K8V8:256,K2V2", "mlx-lm 8 bit g64"]


def call(*argv: str) -> tuple[int, str, str]:
    """Run a command; its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main(argv)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return byte_model(tmp_path_factory.mktemp("model") / "", larger=True)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"Line {i * i} of a book about {i % 7}.\n" for i in range(100)))
    return str(path)


@pytest.fixture(scope="module")
def run(
    model: str, book: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Document, Path, str]:
    """One run: its JSON, its folder, and what it said on stderr."""
    folder = tmp_path_factory.mktemp("eval")
    code, out, err = call(
        *("eval", "--model", model, "--text", book, *SMALL, *SHORT, "--output", str(folder)),
        *("--kv", "K8V8,K2V2", "--kv", "K8V8:256,K2V2", "--mlx-lm", "8", "--segments", "2"),
        *("--format", "json"),
    )
    assert code == 0, err
    return json.loads(out), folder, err


def test_json_has_everything_that_made_it(
    run: tuple[Document, Path, str], model: str, book: str
) -> None:
    document, folder, _ = run
    assert read_result(folder / "result.json") == document
    settings = document["settings"]
    assert settings["command"].startswith(f"pagedkv eval --model {model} --text")
    assert settings["model"] == Path(model).name
    assert settings["texts"][0]["name"] == "book.txt"
    assert [v["what"] for v in settings["variants"]] == LABELS[1:]
    assert settings["variants"][0]["config"]["hot_tokens"] == 64
    assert (settings["tokens"], settings["seed"], settings["block"]) == (640, 0, 64)
    assert all(document["machine"][name] for name in ("device", "mlx", "mlx_lm", "pagedkv"))
    places = [(r["leg"], r["segment"], r["what"]) for r in document["rows"]]
    assert places == [(g, s, w) for g in ("prefill", "decode") for s in (0, 1) for w in LABELS]
    failed = [row["what"] for row in document["rows"] if row["status"] != OK]
    assert set(failed) == {"mlx-lm 8 bit g64"}  # heads of 32 channels
    assert [r["segments"] for r in document["summary"] if r["what"] == "K8V8"] == [2, 2]


def test_positions_are_the_rows_behind_the_means(run: tuple[Document, Path, str]) -> None:
    document, folder, _ = run
    arrays = np.load(folder / "result-positions.npz")
    for row in document["rows"]:
        if row["status"] != OK or row["kind"] == "reference":
            continue
        kl = arrays[f"book.txt/{row['segment']}/{row['leg']}/{row['what']}/kl"]
        assert kl.size == row["positions_all"]
        assert kl.mean() == pytest.approx(row["kl_mean_all"], rel=1e-4)
        assert kl[-row["positions"] :].mean() == pytest.approx(row["kl_mean"], rel=1e-4)
        if row["leg"] == "decode":
            slope = 1000 * np.polyfit(np.arange(kl.size), kl, 1)[0]
            assert row["slope_per_1000"] == pytest.approx(slope, rel=1e-3)
            read = arrays[f"book.txt/{row['segment']}/prefill/{row['what']}/kl"]
            added = kl - read[row["first_position"] :][: kl.size]
            slope = 1000 * np.polyfit(np.arange(kl.size), added, 1)[0]
            assert row["added_slope_per_1000"] == pytest.approx(slope, rel=1e-3, abs=1e-6)
        assert np.mean(row["kl_binned"]) == pytest.approx(row["kl_mean_all"], rel=1e-4)


def test_tables_have_the_spread_and_the_report_is_markdown(
    run: tuple[Document, Path, str], monkeypatch: pytest.MonkeyPatch, model: str, book: str
) -> None:
    document, folder, _ = run
    page = (folder / "report.md").read_text()
    assert page == report.page(document)
    assert page.count("| --- | --- | ---: |") == 2
    assert "mean of 2 segments" in page
    assert "positions from 68 on" in page
    row = next(r for r in document["summary"] if (r["leg"], r["what"]) == ("prefill", "K2V2"))
    low, high = report.small(row["kl_mean_min"]), report.small(row["kl_mean_max"])
    assert f"| {report.small(row['kl_mean'])} ({low} to {high}) |" in page


def test_plots_or_a_hint(run: tuple[Document, Path, str], tmp_path: Path) -> None:
    document, folder, err = run
    drawn = {path.name for path in folder.glob("*.svg")}
    if importlib.util.find_spec("matplotlib") is None:
        assert drawn == set()
        assert plots.HINT in err
        return
    name = document["settings"]["model"]
    assert drawn == {
        f"pareto-prefill-{name}.svg",
        f"pareto-decode-{name}.svg",
        f"kl-by-position-book.txt-{name}.svg",
    }
    for path in plots.draw(document["rows"], tmp_path):
        text = path.read_text()
        assert text == (folder / path.name).read_text()  # the same rows, the same bytes
        assert "K8V8:256,K2V2" in text
    pareto = (folder / f"pareto-prefill-{name}.svg").read_text()
    assert "one precision, book.txt" in pareto
    assert "ladder, book.txt" in pareto


def test_the_front_has_what_nothing_beats() -> None:
    points = [(4.0, 3.0), (1.0, 9.0), (2.0, 9.5), (3.0, 2.0), (5.0, 1.0), (5.0, 4.0)]
    assert plots.front(points) == [(1.0, 9.0), (3.0, 2.0), (5.0, 1.0)]


def test_table_and_csv(model: str, book: str) -> None:
    command = ("eval", "--model", model, "--text", book, *SMALL, *SHORT, "--quiet")
    more = ("--kv", "K4V4", "--mlx-lm", "none")
    code, out, err = call(*command, *more, "--format", "table")
    assert (code, err) == (0, "")
    prefill, decode = (table.splitlines() for table in out.strip().split("\n\n"))
    assert prefill[0].startswith("Prefill: the text in chunks")
    assert prefill[1].split()[:5] == ["text", "cache", "bits", "bytes/token", "memory"]
    assert [line.split()[1] for line in prefill[2:]] == ["mlx-lm", "K4V4"]
    assert "KL per 1,000 tokens" in decode[1]
    code, out, _ = call(*command, *more, "--legs", "decode", "--format", "csv")
    found = list(csv.DictReader(io.StringIO(out)))
    assert [row["what"] for row in found] == ["mlx-lm fp32", "K4V4"]
    assert float(found[1]["slope_per_1000_low"]) < float(found[1]["slope_per_1000_high"])
    assert "kl_binned" not in found[0]


def test_built_in_texts_and_two_of_one_name(model: str, book: str, tmp_path: Path) -> None:
    short = ("--tokens", "80", "--legs", "prefill", "--kv", "K8V8", "--mlx-lm", "none", *SMALL)
    code, out, _ = call("eval", "--model", model, *short, "--format", "json", "--quiet")
    assert [t["name"] for t in json.loads(out)["settings"]["texts"]] == ["english", "python"]
    assert code == 0
    other = tmp_path / "book.txt"
    other.write_text("x" * 100)
    command = ("eval", "--model", model, *short, "--text", book, "--text", str(other))
    _, out, _ = call(*command, "--format", "json", "--quiet")
    assert [t["name"] for t in json.loads(out)["settings"]["texts"]] == [book, str(other)]


def test_a_row_for_each_treatment(model: str, book: str) -> None:
    command = ("eval", "--model", model, "--text", book, *SMALL, *SHORT, "--legs", "prefill")
    more = ("--kv", "K8V8,K4V4", "--kv", "K8V8:256,K2V2", "--treatment", "none, hadamard")
    code, out, err = call(*command, *more, "--mlx-lm", "none", "--format", "json")
    assert code == 0, err
    document = json.loads(out)
    rows = {row["what"]: row for row in document["rows"][1:]}
    ladder = "K8V8:256,K2V2"
    labels = ["K8V8", "K4V4 none", "K4V4 hadamard", f"{ladder} none", f"{ladder} hadamard"]
    assert list(rows) == labels == [v["what"] for v in document["settings"]["variants"]]
    treatments = ["auto", "none", "hadamard", "none", "hadamard"]
    assert [v["config"]["treatment"] for v in document["settings"]["variants"]] == treatments
    assert [row["treatment"] for row in rows.values()] == treatments
    assert rows["K4V4 none"]["kl_mean"] != rows["K4V4 hadamard"]["kl_mean"]
    assert all(row["pages"] for row in rows.values())


# Retrieval tasks

CELLS = ("--tasks", "needle,aggregation", "--lengths", "1400,2K", "--depths", "0,50")


@pytest.fixture(scope="module")
def asked(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Document, Path]:
    """One run of tasks alone: its JSON and its folder."""
    folder = tmp_path_factory.mktemp("tasks")
    code, out, err = call(
        *("eval", "--model", model, *SMALL, *CELLS, "--task-seed", "3", "--chat"),
        *("--kv", "fp16,K2V2", "--mlx-lm", "8", "--chunk", "512"),
        *("--output", str(folder), "--format", "json"),
    )
    assert code == 0, err
    return json.loads(out), folder


def test_tasks_alone_are_run_for_the_same_rows(asked: tuple[Document, Path], model: str) -> None:
    document, folder = asked
    assert read_result(folder / "result.json") == document
    assert document["rows"] == [] and document["settings"]["texts"] == []
    assert "legs" not in document["settings"]
    found = document["retrieval"]
    grid = {"tasks": ["needle", "aggregation"], "lengths": [1400, 2048], "depths": [0, 50]}
    more = {"examples": 1, "seed": 3, "chat": True, "chunk": 512, "text": digest()}
    assert document["settings"]["retrieval"] == found["grid"] == grid | more
    assert found["caches"] == ["mlx-lm fp32", "fp16", "K2V2", "mlx-lm 8 bit g64"]
    assert found["complete"] and len(found["outcomes"]) == 2 * 2 * 2 * 4
    assert found["tiers"][2]["hot_tokens"] == 64 and found["tiers"][2]["kv"] == "K2V2"
    for outcome in found["outcomes"]:
        ours = outcome["cache"] in ("fp16", "K2V2")
        assert (outcome["paged_tokens"] > 500) == ours
        fails = outcome["cache"] == "mlx-lm 8 bit g64"  # heads of 32 channels
        assert (outcome["score"] is None) == bool(outcome["error"]) == fails
    wrote = {
        label: [o["text"] for o in found["outcomes"] if o["cache"] == label]
        for label in found["caches"]
    }
    assert all(wrote["fp16"]) and wrote["K2V2"] != wrote["mlx-lm fp32"]
    assert found["notes"][3].startswith("attended dequantized")
    places = [(c["cache"], c["task"]) for c in found["comparisons"]]
    tasks = ("needle", "aggregation", "all")
    assert places == [(label, task) for label in found["caches"][1:] for task in tasks]
    again = json.loads(json.dumps(RetrievalResult.from_dict(found).to_dict()))
    assert again == {name: value for name, value in found.items() if name != "comparisons"}


def test_the_report_and_the_plots_have_the_tasks(asked: tuple[Document, Path]) -> None:
    document, folder = asked
    page = (folder / "report.md").read_text()
    assert page == report.page(document)
    assert page.startswith("Retrieval: facts hidden in a text and asked for, ")
    assert ", 1400, 2K tokens.\n\n" in page
    assert "| K2V2 | one needle | 4 | 4 |" in page
    assert "K2V2, mean score, and cells lost:" in page
    assert "mlx-lm 8 bit g64: attended dequantized" in page
    assert "Without a score, 8 in all:" in page
    if plots.available():
        drawn = {path.name for path in folder.glob("*.svg")}
        assert drawn == {
            "retrieval-0-mlx-lm-fp32.svg",
            "retrieval-1-fp16.svg",
            "retrieval-2-K2V2.svg",
        }


def test_tasks_beside_legs_as_a_table_and_csv(model: str, book: str) -> None:
    command = ("eval", "--model", model, "--text", book, *SMALL, *SHORT, "--legs", "prefill")
    command += ("--tasks", "needle", "--lengths", "1400", "--depths", "50", "--quiet")
    code, out, err = call(*command, "--kv", "K4V4", "--format", "table")
    assert (code, err) == (0, "")
    prefill, lost = (table.splitlines() for table in out.strip().split("\n\n"))
    assert [line.split()[1] for line in prefill[2:]] == ["mlx-lm", "K4V4", "mlx-lm", "mlx-lm"]
    assert lost[0].startswith("Retrieval: facts hidden")
    assert lost[1].split()[:5] == ["cache", "task", "cells", "in", "pages"]
    assert [line.split()[0] for line in lost[2:]] == ["K4V4", "K4V4"]  # mlx-lm's was not asked for
    code, out, _ = call(*command, "--kv", "K4V4", "--mlx-lm", "none", "--format", "csv")
    found = list(csv.DictReader(io.StringIO(out)))
    assert [(r["leg"], r["text"], r["what"]) for r in found] == [
        ("prefill", "book.txt", "mlx-lm fp32"),
        ("prefill", "book.txt", "K4V4"),
        ("retrieval", "needle", "K4V4"),
        ("retrieval", "all", "K4V4"),
    ]
    assert (found[2]["cells"], found[2]["paged_cells"], found[2]["kl_mean"]) == ("1", "1", "")
    assert float(found[2]["difference"]) == float(found[2]["score"]) - float(
        found[2]["baseline_score"]
    )


def test_the_models_own_cache_again(model: str, book: str) -> None:
    command = ("eval", "--model", model, "--text", book, *SMALL, *SHORT, "--legs", "prefill")
    command += ("--tasks", "needle", "--lengths", "1400", "--depths", "50", "--quiet")
    more = ("--kv", "K2V2", "--mlx-lm", "none", "--again", "48,64", "--format", "json")
    code, out, err = call(*command, *more)
    assert code == 0, err
    document = json.loads(out)
    rows = {row["what"]: row for row in document["rows"]}
    assert list(rows) == ["mlx-lm fp32", "mlx-lm in calls of 48", "mlx-lm in calls of 64", "K2V2"]
    assert rows["mlx-lm in calls of 48"]["kl_mean"] < 1e-3 * rows["K2V2"]["kl_mean"]
    assert document["retrieval"]["again"] == [*rows][1:3]
    assert all(each["firm"] is not None for each in document["retrieval"]["comparisons"])
    # Only tasks are read in longer calls than that.
    at = command.index("--chunk")
    longer = (*command[:at], *command[at + 2 :])
    code, out, err = call(*longer, *more[:-4], "--again", "64,600", "--format", "json")
    assert code == 0, err
    document = json.loads(out)
    assert [row["what"] for row in document["rows"]] == [*list(rows)[:1], *list(rows)[2:]]
    assert document["retrieval"]["again"] == [f"mlx-lm in calls of {n}" for n in (64, 600)]
    code, out, err = call(*command, *more[:-4], "--again", "bfloat16", "--format", "json")
    assert code == 0, err
    document = json.loads(out)
    assert document["retrieval"]["again"] == ["mlx-lm bf16"]
    assert [row["what"] for row in document["rows"]] == ["mlx-lm fp32", "mlx-lm bf16", "K2V2"]


def test_the_time_holds_for_legs_and_tasks(
    model: str, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("eval", "--model", model, "--text", book, *SMALL, *SHORT, *CELLS, "--quiet")
    more = ("--legs", "prefill", "--kv", "K8V8", "--mlx-lm", "none", "--format", "table")
    code, out, _ = call(*command, *more, "--max-seconds", "0")
    assert code == 1
    assert "nothing was measured" in out
    assert "the time was up after 0 of 8 cells" in out
    real, run_cells = retrieval._outcome, []

    def outcome(*args: Any) -> Any:
        run_cells.append(args[2])
        if len(run_cells) == 6:
            monkeypatch.setattr(Deadline, "passed", True)
        return real(*args)

    monkeypatch.setattr(retrieval, "_outcome", outcome)
    code, out, _ = call(*command, *more, "--max-seconds", "1000")
    assert code == 0
    assert "the time was up after 3 of 8 cells" in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--tasks", "poem"), "unknown tasks ['poem']"),
        (("--tasks", "needle", "--lengths", "8K"), "made for 4,096 tokens"),
        (("--tasks", "records", "--lengths", "300"), "300 tokens are too few"),
        (("--tasks", "kv", "--legs", "prefill", "--lengths", "5K"), "made for 4,096 tokens"),
        (("--tasks", "all", "--tokens", "2K"), "--tokens is about legs"),
        (("--tasks", "all", "--text", "english"), "--text is about legs"),
        (("--lengths", "2K"), "--lengths is about tasks: give --tasks needle,"),
        (("--chat",), "--chat is about tasks"),
        (("--task-seed", "0"), "--task-seed is about tasks"),
        (("--legs", ""), "legs are prefill and decode"),
        (("--tasks", "needle", "--again", "2K"), "read in calls of 2,048 anyway"),
        (("--tasks", "needle", "--again", "64,64"), "is given twice"),
        (("--again", "0"), "1 token or more"),
        (("--again", "float64"), "unknown types ['float64']: there are float32, float16, bfloat16"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_runs(
    model: str, argv: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "_outcome", None)
    monkeypatch.setattr(Evaluation, "run", None)
    code, out, err = call("eval", "--model", model, *argv)
    assert (code, out) == (1, "")
    assert says in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--tokens", "100K"), "it has 2,854 tokens"),
        (("--kv", "K5V4"), "unknown precision K5V4"),
        (("--again", "512"), "read in calls of 128 anyway"),
        (("--kv", "K4V4,K4V4"), "K4V4 is given twice"),
        (("--legs", "prefill,speed"), "got speed"),
        (("--mlx-lm", "8,7"), "got 7"),
        (("--treatment", "none,salt"), "treatment is one of"),
        (("--kv", "K4V4", "--treatment", "none,none"), "K4V4 none is given twice"),
        (("--mlx-lm", "eight"), "give bits such as 8,4, or none"),
        (("--text", "/nowhere.txt"), "cannot read the text file"),
        (("--text", "english", "--text", "english"), "given twice"),
        (("--decode-tokens", "640"), "fewer decode_tokens"),
        (("--hot-tokens", "0"), "hot_tokens is a number"),
    ],
)
def test_bad_input_is_one_line_with_a_hint(
    model: str, book: str, argv: tuple[str, ...], says: str
) -> None:
    text = () if "--text" in argv else ("--text", book)
    code, out, err = call("eval", "--model", model, *SHORT, *text, *argv)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("pagedkv: error: ")
    assert says in err.splitlines()[-1]


def test_nothing_measured_is_no_success(model: str, book: str) -> None:
    command = ("eval", "--model", model, "--text", book, *SMALL, *SHORT, "--format", "table")
    code, out, _ = call(*command, "--max-seconds", "0", "--quiet")
    assert code == 1
    assert "the time was up" in out
    assert "nothing was measured" in out


def test_help_says_how_ladders_are_given() -> None:
    code, out, _ = call("eval", "--help")
    assert code == 0
    assert "--kv takes precisions with commas between them, a row each, or one ladder" in out
    assert "examples:" in out


def test_the_models_own_type_is_kept(model: str) -> None:
    loaded, _ = loading.load_model(model, "auto", lambda line: None)
    loaded.set_dtype(mx.bfloat16)
    loading.cast_model(loaded, loading.MODELS_OWN, lambda line: None)
    assert loaded.layers[0].self_attn.q_proj.weight.dtype == mx.bfloat16


def test_other_files_are_no_results(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text('{"schema": 1, "benchmark": "pagedkv bench"}')
    with pytest.raises(ConfigError, match="no result of pagedkv eval"):
        read_result(path)

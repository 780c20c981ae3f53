"""benchmarks/fidelity.py: what it covers, and that it goes on where its time was up."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from pagedkv.tools.bench.timing import Deadline
from pagedkv.tools.evaluation import EvalSettings, Evaluation, read_result, retrieval
from tests.models import lively, random_tokens, tiny_llama
from tests.retrieval_stand_ins import Characters

ROOT = Path(__file__).parent.parent
SHORT = ("--tokens", "640", "--decode-tokens", "128", "--chunk", "128", "--page-tokens", "256")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/fidelity.py, with a tiny model that reads random tokens."""
    spec = importlib.util.spec_from_file_location("fidelity", ROOT / "benchmarks" / "fidelity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fidelity", module)  # dataclasses look there
    spec.loader.exec_module(module)

    class Tokenizer:
        @staticmethod
        def encode(text: str, add_special_tokens: bool = True) -> list[int]:
            return random_tokens(4000, len(text))[0].tolist()  # type: ignore[no-any-return]

    def load(path: str, *rest: Any) -> tuple[Any, Any]:
        return lively(tiny_llama(heads=2, kv_heads=1, dim=128)), Tokenizer

    monkeypatch.setattr(module, "load_model", load)
    return module


def test_the_campaign_covers_what_is_promised(script: Any) -> None:
    prefill = script.PARTS["prefill"]
    assert prefill.kv[0] == "fp16,K8V8,K8V4,K4V8,K4V4,K4V2,K3V3,K2V2"
    assert len(prefill.kv) >= 3
    assert prefill.texts == script.PARTS["decode"].texts == ("english", "python")
    assert prefill.bits == (8, 4)
    args = script.parser().parse_args(["--part", "all", "--out", "x"])
    decode = script.settings(script.PARTS["decode"], args)
    assert decode == EvalSettings(legs=("prefill", "decode"))
    assert decode.tokens == 8192
    assert decode.decode_tokens >= 2048
    assert decode.decode_step == 1
    assert script.settings(script.PARTS["segments"], args).segments >= 3


def test_the_campaign_goes_on_where_its_time_was_up(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {
        "prefill": script.Part(("prefill",), ("K8V8", "K8V8:256,K2V2"), (8,)),
        "decode": script.Part(("decode",), ("K4V4",), texts=("english",)),
    }
    monkeypatch.setattr(script, "PARTS", small)
    read: list[tuple[str, str, str]] = []
    leg = Evaluation._attempt

    def counted(self: Evaluation, which: str, segment: Any, *rest: Any) -> Any:
        read.append((self.name, which, segment.text))
        if len(read) == 2:
            monkeypatch.setattr(Deadline, "passed", True)
        return leg(self, which, segment, *rest)

    monkeypatch.setattr(Evaluation, "_attempt", counted)
    models = ("--model", "one=/somewhere/else", "--model", "two=/nowhere")
    command = ("--part", "all", *models, "--out", str(tmp_path), "--seconds", "1000", *SHORT)
    assert script.main(command) == 0
    assert read == [("one", "prefill", "english"), ("one", "prefill", "python")]
    first = read_result(tmp_path / "one-prefill.json")
    assert [r["status"] for r in first["rows"]] == ["ok"] * 4 + ["skipped"] * 4
    assert "/somewhere" not in first["settings"]["command"]
    assert "one=DIR" in first["settings"]["command"]

    monkeypatch.setattr(Deadline, "passed", False)
    assert script.main(command) == 0
    assert read[2:] == [
        ("one", "prefill", "python"),
        ("two", "prefill", "english"),
        ("two", "prefill", "python"),
        ("one", "decode", "english"),
        ("two", "decode", "english"),
    ]
    again = read_result(tmp_path / "one-prefill.json")
    assert {r["status"] for r in again["rows"]} == {"ok"}
    assert again["rows"][:4] == first["rows"][:4]
    assert script.main(command) == 0
    assert len(read) == 7  # all of it was there

    tables = (tmp_path / "two-decode.md").read_text()
    assert "| english | K4V4 |" in tables
    (tmp_path / "two-decode.md").unlink()
    assert script.main(["--part", "page", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "two-decode.md").read_text() == tables


def test_the_campaign_asks_for_200_facts_and_more(script: Any) -> None:
    parts = script.PARTS["retrieval"], script.PARTS["records"]
    count, tasks = 0, list[str]()
    for cells in parts:
        assert cells.kv == ("fp16", "K4V4", "K8V4:2048,K4V4", script.LONG_LADDER)
        assert cells.same == ("K4V4",)
        assert cells.again == (512, 1024, "float32")
        tasks += cells.tasks
        for limit, longest in ((8192, 7 * 1024), (32768, 16 * 1024)):
            model = tiny_llama(max_position_embeddings=limit)
            lengths = cells.lengths_of(model)
            assert (min(lengths), max(lengths)) == (1024, longest)
            count += len(cells.grid(lengths, 0).cells())
    assert tasks == ["needle", "multikey", "kv", "records"]
    assert count >= 200


def test_cells_that_were_run_are_not_run_again(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = ((2048, 4096), (1400,))
    cells = script.Cells(("K4V4", "K8V8:256,K2V2"), ("needle", "kv"), lengths, again=(1024,))
    parts = {"retrieval": cells}
    monkeypatch.setattr(script, "PARTS", parts)
    model = tiny_llama(heads=2, kv_heads=1, dim=128, max_position_embeddings=2000)
    monkeypatch.setattr(script, "load_model", lambda *rest: (model, Characters()))
    real, asked, most = retrieval._outcome, list[tuple[str, int, int]](), 22

    def outcome(*args: Any) -> Any:
        cell = args[2]
        asked.append((cell.task, cell.tokens, cell.depth))
        if len(asked) == most:
            monkeypatch.setattr(Deadline, "passed", True)
        return real(*args)

    monkeypatch.setattr(retrieval, "_outcome", outcome)
    path = tmp_path / "one-retrieval.json"
    page_tokens = ("--page-tokens", "256")
    command = ("--part", "all", "--model", "one=/x", "--out", str(tmp_path), *page_tokens)
    assert script.main(command) == 0
    cut = read_result(path)["retrieval"]
    assert not cut["complete"] and len(cut["outcomes"]) == 6 * 4
    assert "6 of 10 cells were run" in (tmp_path / "one-retrieval.md").read_text()

    monkeypatch.setattr(Deadline, "passed", False)
    most = 0
    assert script.main(command) == 0
    every = [(t, n, d) for n in (1400,) for t in ("needle", "kv") for d in range(0, 101, 25)]
    assert asked == [cell for cell in every for _ in range(4)]
    whole = read_result(path)["retrieval"]
    assert whole["complete"] and whole["outcomes"][: 6 * 4] == cut["outcomes"]
    assert whole["caches"] == ["mlx-lm fp32", "mlx-lm in calls of 1024", "K4V4", "K8V8:256,K2V2"]
    paged = [o["paged_tokens"] for o in whole["outcomes"] if o["cache"].startswith("K")]
    assert min(paged) >= 256
    assert script.main(command) == 0
    assert len(asked) == 40  # all of it was there
    assert script.main((*command, "--seed", "1")) == 1  # other cells: not into the same file

    tables = (tmp_path / "one-retrieval.md").read_text()
    assert "| K8V8:256,K2V2 | key and value | 5 | 5 |" in tables
    (tmp_path / "one-retrieval.md").unlink()
    assert script.main(["--part", "page", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "one-retrieval.md").read_text() == tables


def test_models_need_a_name(script: Any, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        script.main(["--part", "all", "--out", str(tmp_path), "--model", "/nowhere"])
    assert "write NAME=FOLDER" in capsys.readouterr().err

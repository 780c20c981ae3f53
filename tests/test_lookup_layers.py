"""benchmarks/lookup_layers.py: rounding layers of a prompt that was read once."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pagedkv.tools.evaluation.prompts import build
from tests.models import lively, tiny_llama
from tests.retrieval_stand_ins import Characters

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location(
        "lookup_layers", ROOT / "benchmarks" / "lookup_layers.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    return lively(tiny_llama(layers=3, heads=2, kv_heads=1, dim=128))


def test_only_what_is_rounded_moves_an_answer(script: Any, model: Any) -> None:
    tokenizer = Characters()
    fact = script.Fact(model, tokenizer, build("needle", tokenizer, 1500, 50, 0, False))
    still = fact.moved({}, {})
    assert still == {"kl": 0.0, "margin_rms": 0.0}
    four, two = (dict.fromkeys(range(3), p) for p in ("K4V4", "K2V2"))
    assert 0 < fact.moved(four, four)["kl"] < fact.moved(two, two)["kl"]
    assert 0 < fact.moved({1: "K2V2"}, {})["kl"] < fact.moved(two, two)["kl"]


def test_the_table(
    script: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "load_model", lambda *rest: (model, Characters()))
    out = tmp_path / "rows.json"
    argv = ["lookup_layers.py", "--model", "x", "--facts", "needle:1500:50:0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    assert script.main() == 0
    rows = json.loads(out.read_text())["rows"]
    echo = [row["sum"] for row in rows if row["part"] == "echo"]
    assert len(echo) == 3
    assert echo == sorted(echo, reverse=True)
    assert sum(row["part"] == "alone" for row in rows) == 2 * 3
    kl = {row["all"]: row["kl"] for row in rows if row["part"] == "rows" and not row["first"]}
    assert kl["K8V8"] < kl["K4V4"] < kl["K3V3"]

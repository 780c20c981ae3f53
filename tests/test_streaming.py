"""`pagedkv bench streaming`, in small: that it measures what it says, not how fast that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagedkv.config.tier_config import TierConfig
from pagedkv.tools.bench import (
    AttentionShape,
    BenchSettings,
    Deadline,
    eviction,
    plan_tasks,
    streaming,
)
from pagedkv.tools.bench.quiet import Neighbours
from pagedkv.tools.bench.report import cells, yardstick_line

SHAPE = AttentionShape(2, 2, 64)
KIB = 1024


@pytest.fixture
def settings(tmp_path: Path) -> BenchSettings:
    tiers = TierConfig(hot_tokens=64, sink_tokens=4, page_tokens=256, cold_dir=str(tmp_path))
    return BenchSettings(rounds=3, chunk=512, working_set=2**20, tiers=tiers)


def base(part: str) -> dict[str, object]:
    return {"part": part, "shape": str(SHAPE), "depth": 0, "queries": 1}


def test_reads_are_held_against_plain_ones(
    settings: BenchSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(streaming, "REQUESTS", (256 * KIB, 512 * KIB))
    rows = streaming.measure_reads(settings, base("reads"), Deadline())
    assert [row["what"] for row in rows] == [
        f"{size} KiB x {n}" for size in (256, 512) for n in (1, 2, 4)
    ]
    for row in rows:
        assert row["status"] == "ok"
        assert row["plain_mb_per_s"] > 0
        assert 0.001 < row["share"] < 1000
        assert row["threads"] == 4
    assert list(tmp_path.iterdir()) == []  # nothing is left
    columns, lines = cells("reads", rows)
    assert "of plain" in [column.heading for column in columns]
    assert len(lines) == 6
    assert "4 reading threads" in yardstick_line(rows)


def test_overlap_reads_everything_while_attending(settings: BenchSettings) -> None:
    (row,) = streaming.measure_overlap(SHAPE, 2048, settings, base("overlap"), Deadline())
    assert row["status"] == "ok", row["note"]
    assert row["cold_bytes"] > 0
    for name in ("read_ms", "attend_ms", "both_ms", "overlap"):
        assert row[f"{name}_p10"] <= row[name] <= row[f"{name}_p90"]


def test_eviction_writes_only_in_its_own_blocks(
    settings: BenchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "BLOCK_STEPS", 4)
    monkeypatch.setattr(eviction, "TOKENS", 600)
    written: dict[bool, int] = {True: 0, False: 0}
    real = eviction._Steps.block

    def block(steps: eviction._Steps, evicting: bool) -> tuple[list[float], float]:
        before = steps._store.counters.pages_written
        result = real(steps, evicting)
        written[evicting] += steps._store.counters.pages_written - before
        return result

    monkeypatch.setattr(eviction._Steps, "block", block)
    (row,) = eviction.measure_eviction(SHAPE, settings, base("eviction"), Deadline())
    assert row["status"] == "ok", row["note"]
    assert written[True] > 0
    assert written[False] == 0
    assert row["p99"] > 0
    assert row["steps"] == 12


def test_disturbed_rounds_are_left_out_if_enough_are_left() -> None:
    others = Neighbours([0.9, 0.1, 0.0, 0.5, 0.05])
    assert others.undisturbed(3) == [1, 2, 4]
    assert others.undisturbed(4) == [0, 1, 2, 3, 4]
    assert others.fields([1, 2, 4]) == {"rounds": 3, "rounds_made": 5, "others": 0.05}


def test_streaming_is_asked_for_by_name(settings: BenchSettings) -> None:
    tasks = plan_tasks(["streaming"], [SHAPE], [1024], settings)
    assert [(task.part, task.depth) for task in tasks] == [
        ("reads", 0),
        ("overlap", 8192),
        ("eviction", 2048),
    ]

"""The ceiling that the disk sets: what is read per token, over the rate at which it is read."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

import pagedkv
from pagedkv.cli.generate_report import ceiling
from pagedkv.cli.main import main
from pagedkv.sequence.throughput import Pace
from tests.models import random_tokens, tiny_llama

CONFIG = pagedkv.TierConfig(
    hot_tokens=64, sink_tokens=4, page_tokens=256, warm=200_000, cold="64MB"
)


def test_stats_know_the_ceiling_and_what_was_reached() -> None:
    model = tiny_llama()
    with pagedkv.wrap(model, CONFIG) as cache:
        mx.eval(model(random_tokens(300), cache=cache))
        none = cache.stats()
        assert (none.decode_steps, none.steps_per_second) == (0, 0)
        assert none.nvme_steps_per_second is None
        assert ceiling(none) == "any speed: nothing is cold"
        mx.eval(model(random_tokens(2500), cache=cache))
        for _ in range(5):
            mx.eval(model(mx.array([[1]]), cache=cache))
        stats = cache.stats()
    assert stats.decode_steps == 5
    assert stats.nvme_bytes_per_step == stats.cold.bytes > 0
    assert stats.nvme_read_seconds > 0
    assert stats.nvme_read_rate == stats.nvme_bytes_read / stats.nvme_read_seconds
    assert stats.nvme_steps_per_second == stats.nvme_read_rate / stats.cold.bytes
    assert stats.to_dict()["nvme_steps_per_second"] == stats.nvme_steps_per_second
    assert 0 < stats.steps_per_second < 10_000
    assert ceiling(stats).startswith("at most ")


def test_pauses_and_prompts_are_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("pagedkv.sequence.throughput.time.perf_counter", lambda: now)
    pace = Pace()
    for seconds in (9, 2, 2, 2, 500, 2):  # a user who thinks for a while
        now += seconds
        pace.step()
    assert (pace.steps, pace.per_second) == (6, 0.5)
    assert pace.prompt_per_second == 0
    for _ in range(100):  # a short answer to every long prompt
        pace.prompt(512)
        now += 30
        pace.prompt(600)
        now += 40
        pace.step()
    assert (pace.steps, pace.per_second) == (106, 0.5)
    assert pace.prompt_per_second == pytest.approx((512 / 30 + 600 / 40) / 2)


def test_plan_tells_the_ceiling_by_length(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--model", "llama3-8b", "--context", "100K", "--warm", "1GB"]
    assert main([*argv, "--read-rate", "3GB/s", "--format", "json"]) == 0
    contexts = json.loads(capsys.readouterr().out)["contexts"]
    assert [c["context"] for c in contexts] == [4096, 8192, 16384, 32768, 65536, 102400]
    assert contexts[0] == {"context": 4096, "cold_bytes_per_token": 0, "tokens_per_second": None}
    shape = pagedkv.KVShape(8, 128, 128)
    for told in contexts:
        expected = pagedkv.plan(shape, 32, told["context"], pagedkv.TierConfig(warm="1GB"), 3e9)
        assert told["cold_bytes_per_token"] == expected.cold_bytes
        if expected.cold_bytes:
            assert told["tokens_per_second"] == 3e9 / expected.cold_bytes
    assert main([*argv, "--read-rate", "3GB/s", "--format", "table"]) == 0
    out = capsys.readouterr().out
    assert "the disk's ceiling, reading 3 GB/s" in out
    assert "not bound" in out
    assert main([*argv, "--format", "table"]) == 0
    assert "ceiling" not in capsys.readouterr().out

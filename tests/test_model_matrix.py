"""Every model type of mlx-lm with a paged cache, beside its own: `docs/models.md` has the results.

One test per type, so that the model and the logits of mlx-lm's cache are made once. Numbers are
compared with two things: with everything hot, with mlx-lm's caches, bit for bit; with pages of 8
and of 16 bit, with mlx-lm's caches whose tokens are rounded where a page was sealed, within
`TOLERANCE`. The context is read below, at and far past the edge of every window.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock

import pagedkv
from tests import model_table
from tests.model_matrix import (
    LONG_PREFILL,
    LONG_WINDOW,
    PREFILL,
    SHORT_PREFILL,
    Run,
    everything_hot,
    exercise,
    has_windows,
    ordered_caches,
    require_pages_in_windows,
    require_right_pages,
    tiny_budgets,
    tokens,
    wrapped,
)
from tests.model_zoo import UNBUILDABLE, WITHOUT_PAGES, build, model_types


@pytest.fixture(scope="module", autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """Compiling small functions with g++ takes seconds per model."""
    mx.disable_compile()
    yield
    mx.enable_compile()


PAGED = [t for t in model_types() if t not in UNBUILDABLE and t not in WITHOUT_PAGES]


@pytest.mark.parametrize("model_type", PAGED)
def test_a_model_type(model_type: str, tmp_path: Path) -> None:
    model = build(model_type)
    expected = exercise(model, ordered_caches(model), None, SHORT_PREFILL)
    with wrapped(model, everything_hot()) as cache:
        assert model_table.facts_of(model_type, model, cache).row() in model_table.committed_rows()
        eight, sixteen = (tiny_budgets(cache, kv) for kv in ("K8V8", "fp16"))
        hot = exercise(model, cache, None, SHORT_PREFILL)
        for layer in cache.paged_layers:
            assert layer.hot_held == layer.offset - layer.dropped
    assert hot.trimmable == expected.trimmable
    for name, logits in expected.logits.items():
        assert mx.array_equal(hot.logits[name], logits, equal_nan=True).item(), name

    _require_reloaded(require_right_pages(model, eight, PREFILL, tmp_path))
    require_right_pages(model, sixteen, LONG_PREFILL)
    if has_windows(model):
        require_pages_in_windows(build(model_type, window=LONG_WINDOW))


@pytest.mark.parametrize("model_type", PAGED)
def test_a_model_type_in_bfloat16(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are loaded: hot tokens of the model's own type, so again bit for bit."""
    monkeypatch.setattr(mx, "gather_mm", _gather_mm)
    model = build(model_type)
    model.set_dtype(mx.bfloat16)

    def logits(cache: list[Any]) -> list[mx.array]:
        return [model(tokens(count, seed=count), cache=cache) for count in (24, 1, 3)]

    expected = logits(ordered_caches(model))
    with wrapped(model, pagedkv.TierConfig(hot_tokens=64, cold=0)) as cache:
        for actual, right in zip(logits(cache), expected, strict=True):
            assert mx.array_equal(actual, right, equal_nan=True).item()
        assert all(c.keys.dtype == mx.bfloat16 for c in cache.paged_layers if not c.empty())


def _gather_mm(a: mx.array, b: mx.array, *rest: Any, **options: Any) -> mx.array:
    """Experts in 16 bit: MLX's CPU build multiplies them in float32 only."""
    wide = _plain_gather_mm(a.astype(mx.float32), b.astype(mx.float32), *rest, **options)
    return wide.astype(a.dtype)


_plain_gather_mm = mx.gather_mm


def _require_reloaded(run: Run) -> None:
    """Saved caches go on bit for bit."""
    assert run.reloaded
    for before, after in run.reloaded:
        assert mx.array_equal(before, after, equal_nan=True).item()


@pytest.mark.parametrize("model_type", WITHOUT_PAGES)
def test_a_model_type_without_anything_to_page_is_refused(model_type: str) -> None:
    model = build(model_type)
    with pytest.raises(pagedkv.ConfigError, match="there is nothing to page"):
        pagedkv.wrap(model)
    assert stock.make_prompt_cache(model)


def test_the_document_lists_every_model_type() -> None:
    assert [row.model_type for row in model_table.read()] == [*model_types()]


@pytest.mark.parametrize("model_type", UNBUILDABLE)
def test_what_cannot_run_here_still_cannot(model_type: str) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        mx.eval(build(model_type)(tokens(2, seed=0)))


def test_the_document_is_what_the_generator_writes() -> None:
    """But for the measured column, which the test of each type leaves out too."""
    rows = (model_table.read(library) for library in (model_table.LM, model_table.VLM))
    assert model_table.document(*rows) == model_table.DOCUMENT.read_text()

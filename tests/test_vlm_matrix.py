"""Every language model of mlx-vlm with a paged cache, beside its own: see `docs/models.md`.

As `test_model_matrix` does it for mlx-lm's, but with everything hot only as long as nothing is
sealed: to 256 tokens, and past every window.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

import pagedkv
from tests import model_table
from tests.model_matrix import (
    LONG_PREFILL,
    LONG_WINDOW,
    PREFILL,
    everything_hot,
    has_windows,
    require_pages_in_windows,
    require_right_pages,
    stock_caches,
    tiny_budgets,
    wrapped,
)
from tests.vlm_zoo import WITHOUT_PAGES, build, model_types

pytestmark = pytest.mark.filterwarnings("error:.*did not read random tokens")


@pytest.fixture(scope="module", autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """Compiling small functions with g++ takes seconds per model."""
    mx.disable_compile()
    yield
    mx.enable_compile()


PAGED = [t for t in model_types() if t not in WITHOUT_PAGES]


@pytest.mark.parametrize("model_type", PAGED)
def test_a_model_type(model_type: str) -> None:
    model = build(model_type)
    with wrapped(model, everything_hot()) as cache:
        row = model_table.facts_of(model_type, model, cache).row()
        assert row in model_table.committed_rows(model_table.VLM)
        eight, sixteen = (tiny_budgets(cache, kv) for kv in ("K8V8", "fp16"))
    require_right_pages(model, eight, PREFILL)
    require_right_pages(model, sixteen, LONG_PREFILL)
    if has_windows(model):
        require_pages_in_windows(build(model_type, window=LONG_WINDOW))


@pytest.mark.parametrize("model_type", WITHOUT_PAGES)
def test_a_model_type_without_anything_to_page_is_refused(model_type: str) -> None:
    model = build(model_type)
    with pytest.raises(pagedkv.ConfigError, match="there is nothing to page"):
        pagedkv.wrap(model)
    assert stock_caches(model)


def test_the_document_lists_every_model_type() -> None:
    assert [row.model_type for row in model_table.read(model_table.VLM)] == [*model_types()]

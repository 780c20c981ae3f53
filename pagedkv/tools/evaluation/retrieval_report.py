"""A run of retrieval tasks as Markdown: what each cache lost, and where."""

from __future__ import annotations

from pagedkv.tools.bench.report import markdown_table
from pagedkv.tools.evaluation.heat_map import text_table
from pagedkv.tools.evaluation.retrieval_comparison import ALL, CLOSE, Comparison, compare, pairs
from pagedkv.tools.evaluation.retrieval_result import Outcome, RetrievalResult
from pagedkv.tools.evaluation.tasks import TASKS

MOST_LOST = 20
"""Lost cells that are shown with what was written."""

_HEADINGS = tuple(
    "cache,task,cells,in pages,baseline,score,difference,95 %,lost,close,firm,gained".split(",")  # noqa: SIM905
)


def retrieval_report(result: RetrievalResult) -> str:
    """Tables of what was kept and lost, heat maps as text, and the lost cells, in Markdown."""
    baseline = result.caches[0]
    parts = [
        f"A cell is one prompt; its score is 1 or 0, or the share of records that are right. "
        f"`{baseline}` is the baseline: lost and gained count the cells in which a cache scores "
        f"less and more than it on the same prompt, close those lost where the baseline's own "
        f"answer was ahead of another by less than {CLOSE} nats, firm those lost that all other "
        f"readings with its own cache score as it does. The interval is a paired bootstrap of the "
        f"difference of mean scores. `in pages` counts cells in which part of the text was in "
        f"pages when the question came; in the others everything was 16 bit.",
        _comparisons(result),
        *(f"{c}: {note}." for c, note in zip(result.caches, result.notes, strict=False) if note),
        *(_heat_map(result, cache) for cache in result.caches),
        _lost(result),
        _errors(result),
    ]
    if not result.complete:
        run = len({outcome.cell for outcome in result.outcomes})
        all_ = len(result.grid.cells())
        parts.insert(1, f"{run} of {all_} cells were run: the time was up.")
    return "\n\n".join(part for part in parts if part) + "\n"


def comparison_rows(result: RetrievalResult) -> tuple[tuple[str, ...], list[list[str]]]:
    """Headings and text rows, for a table of any kind."""
    return _HEADINGS, [_row(comparison) for comparison in compare(result)]


def _comparisons(result: RetrievalResult) -> str:
    headings, rows = comparison_rows(result)
    return markdown_table(headings, rows, range(2)) if rows else ""


def _row(comparison: Comparison) -> list[str]:
    title = ALL if comparison.task == ALL else TASKS[comparison.task].title
    shown = [comparison.cache, title, f"{comparison.cells}", f"{comparison.paged_cells}"]
    interval = comparison.interval
    if interval is None:
        return [*shown, *"--------"]
    return [
        *shown,
        f"{comparison.baseline_score:.3f}",
        f"{comparison.score:.3f}",
        f"{interval.mean:+.3f}",
        f"{interval.low:+.3f} to {interval.high:+.3f}",
        f"{comparison.lost}",
        _count(comparison.close),
        _count(comparison.firm),
        f"{comparison.gained}",
    ]


def _count(cells: int | None) -> str:
    return "-" if cells is None else f"{cells}"


def _heat_map(result: RetrievalResult, cache: str) -> str:
    headings, rows = text_table(result, cache)
    what = "mean score" if cache == result.caches[0] else "mean score, and cells lost"
    return f"{cache}, {what}:\n\n{markdown_table(headings, rows, range(1))}" if rows else ""


def _lost(result: RetrievalResult) -> str:
    """The lost cells one by one, so that a reader can see what went wrong."""
    lost = [
        pair for cache in result.caches[1:] for pair in pairs(result, cache) if pair.difference < 0
    ]
    if not lost:
        return ""
    rows = [
        [
            pair.other.cache,
            *_place(pair.other),
            "-" if pair.baseline.margin is None else f"{pair.baseline.margin:.2f}",
            ", ".join(pair.other.answers),
            _code(pair.baseline.text),
            _code(pair.other.text),
        ]
        for pair in lost[:MOST_LOST]
    ]
    headings = (
        *("cache", "task", "tokens", "depth", "seed"),
        *("margin", "right", "baseline wrote", "it wrote"),
    )
    more = f"\n\nand {len(lost) - MOST_LOST} more" if len(lost) > MOST_LOST else ""
    return f"Lost:\n\n{markdown_table(headings, rows, range(len(headings)))}{more}"


def _errors(result: RetrievalResult) -> str:
    failed = [outcome for outcome in result.outcomes if outcome.error]
    rows = [[o.cache, *_place(o), _code(o.error)] for o in failed[:MOST_LOST]]
    if not rows:
        return ""
    headings = ("cache", "task", "tokens", "depth", "seed", "error")
    title = f"Without a score, {len(failed)} in all:"
    return f"{title}\n\n{markdown_table(headings, rows, range(len(headings)))}"


def _place(outcome: Outcome) -> list[str]:
    cell = outcome.cell
    depth = "-" if cell.depth is None else f"{cell.depth} %"
    return [cell.task, f"{cell.tokens:,}", depth, str(cell.seed)]


def _code(text: str) -> str:
    """Text as code in a cell: one line, and nothing that ends the cell."""
    line = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`" if line else "-"

"""Running retrieval tasks: what a cache loses is noticed, and nothing stays behind."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock

import pagedkv
from pagedkv.cache import sdpa_hook as hook
from pagedkv.cli.eval_retrieval import add_retrieval_arguments, retrieval_grid
from pagedkv.errors import ConfigError
from pagedkv.tools.bench import plots
from pagedkv.tools.bench.timing import Deadline
from pagedkv.tools.evaluation import retrieval
from pagedkv.tools.evaluation.bootstrap import paired_interval
from pagedkv.tools.evaluation.heat_map import draw, text_table
from pagedkv.tools.evaluation.prompts import Example
from pagedkv.tools.evaluation.retrieval import Again, run_retrieval
from pagedkv.tools.evaluation.retrieval_comparison import ALL, compare, squares
from pagedkv.tools.evaluation.retrieval_report import retrieval_report
from pagedkv.tools.evaluation.retrieval_result import Cell, Grid, Outcome, RetrievalResult
from pagedkv.tools.evaluation.scoring import Contains
from pagedkv.tools.evaluation.tasks import TASKS
from tests.retrieval_stand_ins import Characters, Looker

SIXTEEN = pagedkv.TierConfig(
    hot_tokens=64, sink_tokens=4, kv="fp16", page_tokens=256, warm="64MB", cold=0
)
K8V8, K2V2 = (replace(SIXTEEN, kv=kv) for kv in ("K8V8", "K2V2"))
WINDOW = replace(SIXTEEN, max_kv_size=512)
NEEDLE = Grid(("needle",), lengths=(1500, 2048), depths=(0, 50, 100), chunk=512)


def run(model: Any, configs: Any, grid: Grid, **options: Any) -> RetrievalResult:
    return run_retrieval(model, Characters(), configs, grid, **options)


# A model that answers if it sees the needle


def test_caches_that_keep_everything_lose_nothing() -> None:
    result = run(Looker(), [("16 bit", SIXTEEN), ("8 bit", K8V8)], NEEDLE)
    assert result.complete and result.caches == ("fp16", "16 bit", "8 bit")
    assert len(result.outcomes) == 6 * 3
    for outcome in result.outcomes:
        assert (outcome.score, outcome.margin) == (1, 1), outcome
        assert (outcome.paged_tokens > 700) == (outcome.cache != "fp16")
    for comparison in compare(result):
        assert comparison.lost == comparison.gained == 0
        assert comparison.paged_cells == comparison.cells == 6


def test_what_a_window_forgets_is_lost_where_it_was() -> None:
    result = run(Looker(), [("window", WINDOW)], NEEDLE)
    by_depth = {(o.cache, o.cell.depth, o.cell.tokens): o.score for o in result.outcomes}
    for tokens in NEEDLE.lengths:
        assert by_depth["fp16", 0, tokens] == by_depth["fp16", 50, tokens] == 1
        assert by_depth["window", 0, tokens] == by_depth["window", 50, tokens] == 0
        assert by_depth["window", 100, tokens] == 1
    needle, everything = compare(result)
    assert (needle.lost, needle.close, needle.gained, needle.cells) == (4, 0, 0, 6)
    assert {o.margin for o in result.outcomes if not o.score} == {None}
    assert everything == replace(needle, task=ALL)
    assert needle.interval and needle.interval.mean == pytest.approx(-2 / 3)
    assert needle.interval.high < 0
    assert squares(result, "window")[0, 2048].lost == 1
    assert squares(result, "window")[100, 2048].lost == 0
    assert "00000" in retrieval_report(result)


def test_what_rounding_destroys_is_lost() -> None:
    result = run(Looker(), [("2 bit", K2V2)], NEEDLE)
    lost = {o.cell.depth for o in result.outcomes if o.score == 0}
    assert {0, 50} <= lost
    assert all(o.score == 1 for o in result.outcomes if o.cache == "fp16")


def test_other_kinds_of_caches_are_made_by_a_function() -> None:
    class Forgetful(stock.KVCache):  # type: ignore[misc]
        def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
            keys, values = super().update_and_fetch(keys, values)
            return keys[:, :, -600:], values[:, :, -600:]

    result = run(Looker(), [("forgetful", lambda: [Forgetful()])], NEEDLE)
    assert result.tiers == (None, None)
    scores = {(o.cache, o.cell.depth): o.score for o in result.outcomes}
    assert scores["forgetful", 0] == 0 and scores["forgetful", 100] == scores["fp16", 0] == 1


def test_the_other_way_round_it_is_gained() -> None:
    result = run(Looker(), [("stock", None), ("window", WINDOW)], NEEDLE)
    swapped = replace(result, caches=result.caches[::-1])
    (needle, _) = compare(swapped)
    assert (needle.lost, needle.gained) == (0, 4)


def test_the_baseline_is_run_first_wherever_it_stands() -> None:
    grid = replace(NEEDLE, lengths=(1500,), depths=(50,))
    for configs in ([("16 bit", SIXTEEN), ("own", None)], [("own", None), ("16 bit", SIXTEEN)]):
        result = run(Looker(), configs, grid)
        assert result.caches == ("own", "16 bit")
        assert [outcome.cache for outcome in result.outcomes] == ["own", "16 bit"]
    assert run(Looker(), [], grid).caches == ("fp16",)


def test_the_question_is_a_call_of_its_own() -> None:
    model = Looker()
    grid = replace(NEEDLE, lengths=(1500,), depths=(50,))
    result = run(model, [("fp16", None)], grid)
    calls = model.calls
    assert sum(calls[:4]) == result.outcomes[0].prompt_tokens
    assert calls[:2] == [512, 512] and 300 < calls[2] < 512
    assert 80 < calls[3] < 120  # "What is …? The special magic number for … is"
    assert set(calls[4:]) == {1}


def test_the_baseline_again_reads_the_text_in_other_calls() -> None:
    model = Looker()
    grid = replace(NEEDLE, lengths=(1500,), depths=(50,))
    result = run(model, [("16 bit", SIXTEEN), ("in 400s", Again(400))], grid)
    assert result.caches == ("fp16", "16 bit", "in 400s") and result.again == ("in 400s",)
    assert result.tiers == (None, SIXTEEN, None)
    read = [n for n in model.calls if n in (400, 512)]
    assert read == [512, 512] * 2 + [400] * 3
    assert RetrievalResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    older = {k: v for k, v in result.to_dict().items() if k != "again"}
    assert RetrievalResult.from_dict(older).again == ()


# A random model


def small_model() -> Any:
    from mlx_lm.models import llama

    mx.random.seed(0)
    args = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128, vocab_size=97)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5)
    model = llama.Model(llama.ModelArgs(model_type="llama", **args, **heads))
    mx.eval(model.parameters())
    return model


def test_all_tasks_run_and_nothing_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, pagers = small_model(), []
    real = retrieval.wrap

    def wrap(model: Any, config: Any) -> Any:
        cache = real(model, config)
        pagers.append(cache.context.pager)
        return cache

    monkeypatch.setattr(retrieval, "wrap", wrap)
    grid = Grid(lengths=(1400,), depths=(50,), chunk=512)
    cold = replace(K8V8, warm="150KB", cold="64MB")
    seen = list[tuple[int, int]]()
    gc.collect()
    before = mx.get_active_memory()
    result = run(
        model, [("warm", K8V8), ("cold", cold)], grid, progress=lambda *at: seen.append(at)
    )
    assert len(result.outcomes) == len(TASKS) * 3
    assert seen == [(i + 1, 6) for i in range(6)]
    assert {o.score for o in result.outcomes} == {0.0}
    assert all(o.paged_tokens > 500 for o in result.outcomes if o.cache != "fp16")
    gc.collect()
    assert mx.get_active_memory() - before < 64 * 1024
    assert len(pagers) == 2
    for pager in pagers:
        assert not pager.users and not pager.layer_pagers
        assert pager.open_cold is None and pager.open_reader is None
    assert not hook.installed() and pagedkv.integrations.mlx_lm.wrapping.wrapping_of(model) is None
    document = json.loads(json.dumps(result.to_dict()))
    assert [tiers and tiers["kv"] for tiers in document["tiers"]] == [None, "K8V8", "K8V8"]
    assert len(document["grid"]["text"]) == 16
    assert document["outcomes"][0]["cell"] == {
        "task": "needle",
        "tokens": 1400,
        "depth": 50,
        "seed": 0,
    }
    assert result.rows()[0].keys() >= {"cache", "task", "tokens", "depth", "seed", "score"}
    assert "spread" in retrieval_report(result)


def test_both_caches_read_the_same_tokens_and_say_the_same_when_all_is_hot() -> None:
    hot = pagedkv.TierConfig(hot_tokens=4096, hot_dtype="model")
    result = run(small_model(), [("hot", hot)], replace(NEEDLE, lengths=(1500,)))
    texts = {(o.cache, o.cell.depth): o.text for o in result.outcomes}
    assert all(texts["fp16", depth] == texts["hot", depth] != "" for depth in NEEDLE.depths)
    (needle, _) = compare(result)
    assert needle.paged_cells == 0


def test_a_cache_that_is_too_small_is_an_error_in_its_cells_alone() -> None:
    model = Looker()
    tiny = replace(SIXTEEN, warm="200KB")
    result = run(model, [("tiny", tiny), ("16 bit", SIXTEEN)], NEEDLE)
    errors = {(o.cell.tokens, o.score) for o in result.outcomes if o.error}
    assert errors and all(score is None for _, score in errors)
    assert all("OutOfPagesError" in o.error for o in result.outcomes if o.error)
    assert all(o.score == 1 for o in result.outcomes if o.cache != "tiny")
    by_cache = {c.cache: c for c in compare(result) if c.task == ALL}
    assert by_cache["tiny"].errors == 6 - by_cache["tiny"].cells > 0
    assert by_cache["tiny"].lost == 0
    assert "Without a score" in retrieval_report(result)
    assert not hook.installed()


def test_a_run_can_be_cut_short() -> None:
    result = run(Looker(), [("16 bit", SIXTEEN)], NEEDLE, deadline=Deadline(0))
    assert not result.complete and not result.outcomes
    assert "the time was up" in retrieval_report(result)
    assert draw(result, Path("nowhere")) == []


def test_bad_requests_are_refused() -> None:
    model = small_model()
    with pytest.raises(ConfigError, match="same label"):
        run(model, [("a", SIXTEEN), ("a", K8V8)], NEEDLE)
    model.args.max_position_embeddings = 1024
    with pytest.raises(ConfigError, match="made for 1,024 tokens"):
        run(model, [], NEEDLE)
    with pagedkv.wrap(model, SIXTEEN), pytest.raises(ConfigError, match="wrapped"):
        run(model, [], NEEDLE)
    pagedkv.unwrap(model)
    bad: list[dict[str, Any]] = [
        {"tasks": ("poem",)},
        {"depths": (101,)},
        {"depths": ()},
        {"lengths": (1024, 1024)},
        {"examples": 0},
        {"chunk": 0},
    ]
    for options in bad:
        with pytest.raises(ConfigError):
            Grid(**options)


def test_every_task_has_as_many_cells() -> None:
    grid = Grid(lengths=(1024, 2048), depths=(0, 50, 100), examples=2)
    cells = grid.cells()
    assert len(set(cells)) == len(cells) == len(TASKS) * 2 * 3 * 2
    for name, task in TASKS.items():
        mine = [cell for cell in cells if cell.task == name]
        assert len(mine) == 12
        assert {cell.depth for cell in mine} == ({0, 50, 100} if task.has_depth else {None})
        assert len({cell.seed for cell in mine}) == 6


# Comparing


def made_up(scores: dict[str, list[float | None]], task: str = "needle") -> RetrievalResult:
    """A result with one cell for each number: seeds 0, 1, …, one depth each."""
    outcomes = [
        Outcome(cache, Cell(task, 1024, 10 * i, i), 1000, 500, ("1",), "x", score, 0.1)
        for cache, values in scores.items()
        for i, score in enumerate(values)
    ]
    depths = tuple(10 * i for i in range(len(next(iter(scores.values())))))
    grid = Grid((task,), (1024,), depths)
    return RetrievalResult(grid, tuple(scores), (None,) * len(scores), tuple(outcomes), True)


def test_lost_and_gained_are_counted_by_pairs() -> None:
    result = made_up({"fp16": [1, 1, 0, 0.5, 0.5], "other": [0, 1, 1, 0.25, None]})
    (needle, _) = compare(result)
    assert (needle.cells, needle.errors, needle.lost, needle.gained) == (4, 1, 2, 1)
    assert needle.baseline_score == pytest.approx(2.5 / 4)
    assert needle.score == pytest.approx(2.25 / 4)
    assert needle.interval and needle.interval.mean == pytest.approx(-0.25 / 4)


def test_the_report_shows_figures_and_lost_cells() -> None:
    text = retrieval_report(made_up({"fp16": [1, 1], "K2|V2": [0, 1]}))
    row = (
        "| K2|V2 | one needle | 2 | 2 | 1.000 | 0.500 | -0.500 | -1.000 to +0.000 | 1 | - | - | 0 |"
    )
    assert row in text
    assert "| K2|V2 | needle | 1,024 | 0 % | 0 | - | 1 | `x` | `x` |" in text
    assert "| 0 % | 0.00 -1 |" in text and "| 10 % | 1.00 |" in text


def test_lost_cells_whose_answers_hung_on_little_are_told_apart() -> None:
    result = made_up({"fp16": [1, 1, 1], "other": [0, 0, 1]})
    margins = (0.03, 2.0, 0.01)
    outcomes = [replace(o, margin=margins[o.cell.seed]) if o.score else o for o in result.outcomes]
    told = replace(result, outcomes=tuple(outcomes))
    (needle, _) = compare(told)
    assert (needle.lost, needle.close) == (2, 1)
    assert "| 2 | 1 | - | 0 |" in retrieval_report(told)
    assert "| 0 % | 0 | 0.03 | 1 |" in retrieval_report(told)
    (unknown, _) = compare(result)
    assert (unknown.lost, unknown.close) == (2, None)


def test_lost_cells_that_the_baseline_does_not_always_get_right_are_told_apart() -> None:
    scores: dict[str, list[float | None]] = {
        "fp16": [1, 1, 1, 0],
        "512": [1, 0, 1, 0],
        "256": [1, 1, None, 1],  # what was not read again is not firm
        "other": [0, 0, 0, 0],
    }
    told = replace(made_up(scores), again=("512", "256"))
    by_cache = {c.cache: c for c in compare(told) if c.task == ALL}
    assert (by_cache["other"].lost, by_cache["other"].firm) == (3, 1)
    assert (by_cache["512"].lost, by_cache["512"].firm) == (1, 0)
    assert "| 3 | - | 1 | 0 |" in retrieval_report(told)
    (alone, *_) = compare(made_up({"fp16": [1], "other": [0]}))
    assert (alone.lost, alone.firm) == (1, None)


@pytest.mark.parametrize(
    ("text", "gaps", "margin"),
    [
        (" 481.", (3.0, 2.0, 0.5, 1.0, 0.1), 0.5),  # what ends the sentence decides nothing
        (" 4810", (3.0, 2.0, 0.5, 1.0, 0.1), None),
        (" 48", (3.0, 2.0, 0.5), None),
        ("", (), None),
    ],
)
def test_the_margin_is_that_of_what_the_score_hangs_on(
    text: str, gaps: tuple[float, ...], margin: float | None
) -> None:
    example = Example("needle", (), 0, ("481",), Contains(("481",)), 12)
    texts = [text[:n] for n in range(len(text) + 1)]
    assert retrieval._margin(example, texts, gaps) == margin


def test_text_that_a_model_wrote_cannot_break_the_table() -> None:
    result = made_up({"fp16": [1], "other": [0]})
    odd = replace(result.outcomes[1], text="a | b\n`c`")
    text = retrieval_report(replace(result, outcomes=(result.outcomes[0], odd)))
    assert "`a \\| b 'c'` |" in text


# The bootstrap


def test_differences_that_are_all_alike_have_no_spread() -> None:
    interval = paired_interval([0.25] * 7)
    assert interval.mean == interval.low == interval.high == 0.25
    assert interval.excludes_zero


def test_the_interval_of_shares_is_the_normal_one() -> None:
    interval = paired_interval([-1.0] * 60 + [0.0] * 140)
    error = 1.96 * (0.3 * 0.7 / 200) ** 0.5
    assert interval.mean == pytest.approx(-0.3)
    assert interval.low == pytest.approx(-0.3 - error, abs=0.006)
    assert interval.high == pytest.approx(-0.3 + error, abs=0.006)


def test_two_pairs_can_be_drawn_in_three_ways() -> None:
    interval = paired_interval([0.0, 1.0])
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.0, 1.0)
    assert not interval.excludes_zero
    narrow = paired_interval([0.0, 1.0], level=0.4)  # a half of the draws are one of each
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_the_interval_is_the_same_each_time_and_drawn_in_blocks_it_hardly_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = [((7 * i) % 11) / 11 for i in range(150)]
    whole = paired_interval(values)
    assert paired_interval(values) == whole != paired_interval(values, seed=1)
    monkeypatch.setattr("pagedkv.tools.evaluation.bootstrap._BLOCK", 150 * 7)
    blocks = paired_interval(values)
    assert blocks.mean == whole.mean
    assert blocks.low == pytest.approx(whole.low, abs=0.005)
    assert blocks.high == pytest.approx(whole.high, abs=0.005)


def test_nothing_has_no_interval() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        paired_interval([])


# Heat maps


def test_heat_map_as_text() -> None:
    result = run(Looker(), [("window", WINDOW)], NEEDLE)
    headings, rows = text_table(result, "window")
    assert headings == ["depth", "1500", "2K"]
    assert rows == [
        ["0 %", "0.00 -1", "0.00 -1"],
        ["50 %", "0.00 -1", "0.00 -1"],
        ["100 %", "1.00", "1.00"],
    ]
    assert text_table(result, "fp16")[1][0] == ["0 %", "1.00", "1.00"]


def test_a_square_holds_all_cells_of_its_depth_and_length() -> None:
    result = made_up({"fp16": [1, 1, 0], "other": [1, 0, 0]})
    together = [replace(o, cell=replace(o.cell, depth=50)) for o in result.outcomes]
    _, rows = text_table(replace(result, outcomes=tuple(together)), "other")
    assert rows == [["50 %", "0.33 -1"]]


def test_heat_maps_are_drawn_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = made_up({"fp16": [1, 1], "K4V4, ladder": [0, 1]})
    files = draw(result, tmp_path / "a")
    assert [file.name for file in files] == ["retrieval-0-fp16.svg", "retrieval-1-K4V4-ladder.svg"]
    assert "lost 1" in files[1].read_text() and "lost" not in files[0].read_text()
    again = draw(result, tmp_path / "b")
    assert [f.read_bytes() for f in files] == [f.read_bytes() for f in again]


def test_without_matplotlib_there_are_no_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert draw(made_up({"fp16": [1]}), tmp_path / "a") == []
    assert not (tmp_path / "a").exists()


# Options


def parsed(*words: str) -> Grid | None:
    parser = argparse.ArgumentParser()
    add_retrieval_arguments(parser)
    return retrieval_grid(parser.parse_args(words))


def test_options_say_which_cells() -> None:
    assert parsed() is None
    assert parsed("--tasks", "all") == Grid()
    words = "--tasks needle,kv --lengths 1K,8192 --depths 0,50% --examples 3 --task-seed 7 --chat"
    assert parsed(*words.split()) == Grid(
        ("needle", "kv"), (1024, 8192), (0, 50), examples=3, seed=7, chat=True
    )


@pytest.mark.parametrize(
    "words",
    [
        ("--tasks", "poem"),
        ("--tasks", ""),
        ("--tasks", "all", "--lengths", "long"),
        ("--tasks", "all", "--depths", "middle"),
        ("--tasks", "all", "--depths", "-1"),
        ("--tasks", "all", "--examples", "0"),
    ],
)
def test_bad_options_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        parsed(*words)

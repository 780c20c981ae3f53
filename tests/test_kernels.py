"""The decode kernels in the emulator: numbers, races, bounds."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from pagedkv.attn.kernels import source
from pagedkv.attn.kernels.decode import SplitPlan, attend_splits, table_words
from tests import kernel_cases
from tests.emulator import EmulatorError, HostLauncher
from tests.kernel_cases import KINDS, TOLERANCE, Case, Run, error, outputs, treatment_of

AHEAD, WHERE_IT_IS = True, False

# Between them every pair of key and value bits; each has every number of bits on both sides.
SQUARES = (
    ("K2V8", "K3V2", "K4V3", "K8V4", "fp16"),
    ("K2V2", "K3V3", "K4V4", "K8V8", "fp16"),
    ("K2V3", "K3V4", "K4V8", "K8V2", "fp16"),
    ("K2V4", "K3V8", "K4V2", "K8V3", "fp16"),
)
LADDER = ("K8V4", "K4V4")
EIGHT = ("fp16", "K8V8", "K8V4", "K4V4", "K4V3", "K3V3", "K3V2", "K2V2")
BF16 = {"dtype": mx.bfloat16, "hot_dtype": mx.bfloat16}

SPLIT = [
    (AHEAD, Case(SQUARES[0], key_dim=64, repeats=1)),
    (WHERE_IT_IS, Case(SQUARES[1], key_dim=64, repeats=3, length=5, batch=2)),
    (AHEAD, Case(SQUARES[1], key_dim=80, repeats=2, length=2, sinks=True, together=True)),
    (WHERE_IT_IS, Case(SQUARES[2], key_dim=80, repeats=4, **BF16)),
    (AHEAD, Case(SQUARES[2], key_dim=96, repeats=6, batch=3, hot_dtype=mx.bfloat16, together=True)),
    (WHERE_IT_IS, Case(SQUARES[3], key_dim=96, heads=1, repeats=6, length=3, sinks=True)),
    (AHEAD, Case(SQUARES[3], heads=1, page_tokens=512, warps=8, together=True)),
    (WHERE_IT_IS, Case(SQUARES[0], repeats=8, heads=3)),
    (AHEAD, Case(EIGHT, repeats=16, heads=1, **BF16)),
    (AHEAD, Case(SQUARES[0], key_dim=192, heads=1, repeats=8, length=2)),
    (WHERE_IT_IS, Case(SQUARES[3], key_dim=192, heads=1, repeats=1, length=7, dtype=mx.bfloat16)),
    (
        AHEAD,
        Case(SQUARES[1], key_dim=256, heads=1, repeats=2, length=4, warps=2, together=True, **BF16),
    ),
    (WHERE_IT_IS, Case(SQUARES[2], key_dim=256, heads=1, repeats=16, sinks=True)),
    (
        AHEAD,
        Case(SQUARES[3], key_dim=192, value_dim=128, heads=1, repeats=16, length=8, together=True),
    ),
    (WHERE_IT_IS, Case(SQUARES[1], key_dim=64, value_dim=96, repeats=4, length=8, warps=8)),
]
WHOLE = [
    (AHEAD, Case(LADDER, repeats=4, length=8, final=True, warps=8)),
    (WHERE_IT_IS, Case(SQUARES[2], final=True, batch=2, **BF16)),
    (AHEAD, Case(SQUARES[3], key_dim=80, heads=1, repeats=3, page_tokens=512, final=True)),
]
# One row of pages of 1024 tokens, so that one page has many splits.
LONG = (AHEAD, Case(LADDER, key_dim=64, heads=1, page_tokens=1024, repeats=2, length=6, warps=8))
BORDER = (WHERE_IT_IS, Case(("K4V3", "fp16"), key_dim=64, heads=1, repeats=2, length=2))

RUNS = [
    Run(pages=(2, 1), hot=(65, 40), valid=(0, 100)),
    Run(pages=(3, 0, 1), hot=(8, 200), valid=(1, 0, 65), tiles=2, kind="sharp"),
    Run(pages=(2, 3), hot=(256, 257, 8), valid=(0, 64), tiles=8, kind="ramp", launches=2),
    Run(pages=(4, 1), hot=(257, 9), valid=(255, 0, 63), tiles=0, spare=0, kind="huge"),
    Run(pages=(0, 2), hot=(64, 8), spare=0, hot_per_split=128),
    Run(pages=(3, 1), hot=(70,), valid=(0, 65), tiles=1),  # more splits than are merged at once
]
BORDERS = [
    Run(pages=(pages,), hot=(hot,), valid=valid, tiles=tiles, hot_per_split=256, spare=spare)
    for hot in (2, 63, 64, 65, 255, 256, 257)
    for pages, valid, tiles, spare in (
        (0, (0,), 4, 0),
        (1, (1,), 4, 1),
        (2, (63, 64), 2, 0),
        (5, (65, 255, 0), 8, 64),
    )
]


def name(value: object) -> str:
    if not isinstance(value, Case):
        return {AHEAD: "ahead", WHERE_IT_IS: "direct"}[bool(value)]
    shape, rows = value.shape, f"{value.repeats}x{value.length}"
    return f"{'-'.join(value.precisions)}-{shape.key_dim}-{shape.value_dim}-{rows}"


def check(launcher: HostLauncher, case: Case, runs: list[Run]) -> None:
    for i, run in enumerate(runs):
        run = replace(run, seed=i, places=i)
        assert error(launcher, case, run) < TOLERANCE[case.dtype], run


@pytest.mark.parametrize(("ahead", "case"), SPLIT + WHOLE, ids=name)
def test_against_float64(ahead: bool, case: Case) -> None:
    """Four of the six runs, other ones for the next case, every third one with fused products.

    All of them take minutes.
    """
    left_out = (SPLIT + WHOLE).index((ahead, case)) % 3
    launcher = HostLauncher(ahead, contract=left_out == 0)
    check(launcher, case, [run for i, run in enumerate(RUNS) if i % 3 != left_out])


def test_the_cases_have_every_pair_of_bits() -> None:
    pairs = {p for _, case in SPLIT for p in case.precisions}
    assert pairs >= {f"K{k}V{v}" for k in (2, 3, 4, 8) for v in (2, 3, 4, 8)} | {"fp16"}


def test_lengths_around_every_border() -> None:
    ahead, case = BORDER
    check(HostLauncher(ahead), case, BORDERS)


def test_lengths_around_every_border_in_one_split() -> None:
    ahead, case = BORDER
    check(HostLauncher(ahead), replace(case, final=True), BORDERS)


def test_splits_of_large_pages() -> None:
    """Splits that are parts of a page, and splits in which nothing is visible at all."""
    ahead, case = LONG
    many = Run(pages=(5,), hot=(70,), valid=(0, 1000), tiles=1)  # more than one round of merging
    runs = [many] + [
        Run(pages=(2,), hot=(hot,), valid=valid, tiles=tiles, hot_per_split=256, kind=kind)
        for hot, valid, tiles, kind in (
            (6, (1, 0), 4, "plain"),
            (257, (1023,), 4, "sharp"),
            (260, (63, 1), 2, "ramp"),
            (100, (0,), 16, "huge"),
            (300, (960, 65), 0, "plain"),
        )
    ]
    check(HostLauncher(ahead), case, runs)


WINDOWED = [
    (AHEAD, Case(("K4V3", "fp16"), key_dim=64, repeats=2, windowed=True)),
    (WHERE_IT_IS, Case(LADDER, key_dim=64, heads=1, repeats=3, sinks=True, windowed=True, **BF16)),
    (AHEAD, Case(LADDER, key_dim=64, repeats=2, length=4, together=True, windowed=True)),
    (WHERE_IT_IS, Case(("K2V3",), key_dim=64, batch=2, final=True, windowed=True)),
]


_PLACES = (0, 1, 63, 64, 65, 127, 255, 256, 257, 300, 511, 512, 600)
_SHORT = (200, 130, 0)  # a window may begin in a page's part that has no valid tokens
WINDOW_RUNS = [
    *(
        Run(pages=(3, 4), hot=(70, 5), hidden=(place, 10 + place), tiles=4, kind=KINDS[i % 3])
        for i, place in enumerate(_PLACES)
    ),
    *(Run(pages=(3,), hidden=(p,), valid=_SHORT, tiles=2) for p in (199, 200, 250, 385, 386)),
    # Nothing of the pages is visible: for the kernels this is possible, too.
    Run(pages=(2,), hot=(9,), hidden=(512,)),
    Run(pages=(2,), hidden=(511,), launches=2),
]


@pytest.mark.parametrize(("ahead", "case"), WINDOWED, ids=name)
def test_pages_that_lie_partly_behind_a_window(ahead: bool, case: Case) -> None:
    """The first visible token at borders of tiles and pages, and behind the last valid one."""
    check(HostLauncher(ahead), case, WINDOW_RUNS)


TREATED = [
    (AHEAD, Case(("K4V4", "K3V2", "fp16"), key_dim=64, repeats=1, treated=True)),
    (WHERE_IT_IS, Case(("K8V4", "K4V3"), key_dim=80, repeats=3, length=5, batch=2, treated=True)),
    (AHEAD, Case(SQUARES[2], key_dim=96, repeats=6, sinks=True, together=True, treated=True)),
    (AHEAD, Case(LADDER, heads=3, repeats=4, batch=2, together=True, treated=True, **BF16)),
    (WHERE_IT_IS, Case(("K4V4", "fp16"), heads=1, repeats=16, length=8, treated=True, **BF16)),
    (AHEAD, Case(LADDER, key_dim=192, heads=1, repeats=5, length=2, warps=8, treated=True)),
    (AHEAD, Case(("K8V8", "fp16"), key_dim=256, heads=2, repeats=8, warps=2, treated=True)),
    (WHERE_IT_IS, Case(("K4V4",), key_dim=192, value_dim=128, heads=1, repeats=12, treated=True)),
    # Value channels that end in the middle of a block of 16, and of a SIMD group's share.
    (AHEAD, Case(("K4V4", "fp16"), key_dim=48, value_dim=40, repeats=2, length=3, treated=True)),
    (
        AHEAD,
        Case(
            ("K4V2",), key_dim=64, repeats=2, length=4, together=True, windowed=True, treated=True
        ),
    ),
    (WHERE_IT_IS, Case(LADDER, key_dim=64, sinks=True, windowed=True, treated=True, **BF16)),
]


@pytest.mark.parametrize(("ahead", "case"), TREATED, ids=name)
def test_treated_pages(ahead: bool, case: Case) -> None:
    """Pages of transformed keys and values beside plain hot tokens; half of the runs in turn."""
    i = TREATED.index((ahead, case))
    runs = (WINDOW_RUNS if case.windowed else RUNS)[i % 2 :: 2]
    check(HostLauncher(ahead, contract=i % 3 == 0), case, runs)


def test_what_is_not_treated_has_no_word_of_it() -> None:
    """Its text, and so the name that compiled kernels are kept under, is what it was before."""
    for together in (False, True):
        for file in ("attend.h", "layout.h"):
            assert "#if TREATED" in source._text(file)
        spec = Case(LADDER, together=together).spec(AHEAD)
        for text in (spec.attend, spec.merge):
            assert "TREAT" not in text.header("metal").upper()
        treated = replace(spec, treated=True)
        assert "stage_treated" in treated.attend.header("metal")
        assert treated.attend.name != spec.attend.name
        assert treated.merge == spec.merge


@pytest.mark.parametrize("tiles", [8, 1])
def test_where_pages_are_changes_no_bit(tiles: int) -> None:
    """Nor does who merges: the launch that attends, or another one after several."""
    ahead, case = BORDER
    together = replace(case, together=True)
    run = Run(pages=(6,), hot=(70,), tiles=tiles, seed=3)
    made = [outputs(HostLauncher(ahead), case, replace(run, places=i))[0] for i in range(3)]
    made.append(outputs(HostLauncher(ahead), case, replace(run, launches=3))[0])
    made.append(outputs(HostLauncher(ahead), together, run)[0])
    words = [np.asarray(x.view(mx.uint16)) for x in made]
    assert all((x == words[0]).all() for x in words)


def test_every_token_is_in_one_split() -> None:
    for page_tokens in (256, 512, 1024):
        for pages in (0, 1, 2, 3, 17, 100, 511, 4096):
            for hot in (1, 64, 257, 2048):
                for parallel in (1, 8, 64):
                    plan = SplitPlan.choose(pages, hot, parallel, page_tokens, 16)
                    tiles = pages * page_tokens // 64
                    assert plan.page_splits * plan.tiles_per_split >= tiles
                    assert (plan.page_splits - 1) * plan.tiles_per_split < max(tiles, 1)
                    assert (plan.splits - plan.first_hot) * plan.hot_per_split >= hot
                    assert plan.splits == 1 or plan.first_hot == plan.page_splits
                    apart = SplitPlan.choose(pages, hot, parallel, page_tokens, 16, apart=True)
                    assert apart.page_splits * apart.tiles_per_split >= tiles
                    assert apart.first_hot == apart.page_splits < apart.splits
                    assert (apart.splits - apart.first_hot) * apart.hot_per_split >= hot
                    assert plan.splits == 1 or apart == plan


@pytest.mark.parametrize("precisions", [("K8V8",), ("fp16",), ("K4V4", "fp16")])
def test_threadgroup_memory_of_apple_gpus_is_enough(precisions: tuple[str, ...]) -> None:
    for key_dim in (64, 80, 96, 112, 128, 192, 256):
        for rows in (1, 8, 9, 128):
            for warps in (4, 8):
                case = Case(precisions, key_dim=key_dim, repeats=rows, warps=warps)
                spec = case.spec(WHERE_IT_IS)
                for text in (spec.attend, spec.merge):
                    assert 4 * text.shared_words <= source.SHARED_LIMIT, case


# Mistakes that the emulator must notice, in a small case. A blank stands for any white space.
MISTAKES = {
    "one token too many": ("attend.h", "token >= limit[b][r]", "token > limit[b][r]"),
    "a query sees the next token": (
        "attend.h",
        "tokens - (QUERY_TOKENS - 1 - query)",
        "tokens - (QUERY_TOKENS - 2 - query)",
    ),
    "hot keys beyond the end": (
        "attend.h",
        "least(2 * (HOT_BLOCKS * at.g + m), last)",
        "2 * (HOT_BLOCKS * at.g + m)",
    ),
    "no barrier before scales are overwritten": (
        "attend.h",
        "Tile following = take_tile(tiles, table); simd_barrier();",
        "Tile following = take_tile(tiles, table);",
    ),
    "no barrier before scales are read": (
        "attend.h",
        "simd_barrier(); zero(scores)",
        "zero(scores)",
    ),
    "two equal large products are subtracted": (
        "attend.h",
        "factor[b][r] = exp2_fast((state.peak[b][r] - peak) * SCALE_LOG2E);",
        "factor[b][r] = exp2_fast(state.peak[b][r] * SCALE_LOG2E - peak * SCALE_LOG2E);",
    ),
    "a fetch is not waited for": ("attend.h", "fetch_wait<1>();", "fetch_wait<2>();"),
    "no barrier before the merge": ("attend.h", "barrier(); float factor", "float factor"),
    "old totals are not scaled down": ("attend.h", "[r] * keep + sum", "[r] + sum"),
    "staging is taken for the slab": ("layout.h", ">> 31 ? staged", ">> 31 ? source"),
    "three bytes across two words": ("page.h", "shift > 8 ?", "shift > 16 ?"),
    "sinks weigh too little": ("merge.h", "sink - peak + 15.0f", "sink - peak"),
    "no barrier before groups are merged": ("merge.h", "barrier(); if (4 * me", "if (4 * me"),
    "a split is merged twice": ("merge.h", "j < count ? exp2_fast", "j <= count ? exp2_fast"),
}
MISTAKES_TOGETHER = {
    "the last but one merges": ("together.h", "shared[0] == count - 1", "shared[0] == count - 2"),
    "everyone merges": ("together.h", "shared[0] == count - 1", "shared[0] < count"),
    "heads share their counters": ("together.h", "* ROW_GROUPS) + head_block)", "* ROW_GROUPS))"),
    "the next counters are not zero": ("together.h", "store(next_turns, turn + i, 0)", "(void)i"),
    "no barrier before counting": ("together.h", "barrier(); if (thread == 0)", "if (thread == 0)"),
    "no barrier after counting": ("together.h", "barrier(); return", "return"),
    "groups begin one split late": (
        "together.h",
        "first = mine * MERGE_GROUP",
        "first = mine * MERGE_GROUP + 1",
    ),
}
SMALL = Case(("K4V3",), heads=1, key_dim=64, repeats=2, length=2, sinks=True)
SMALL_RUNS = [
    Run(pages=(4,), hot=(70,), valid=(0, 65), tiles=16, spare=0, kind="ramp"),
    Run(pages=(1,), hot=(5,), valid=(65,), spare=0),
    Run(pages=(1,), hot=(65,), valid=(64,), hot_per_split=64),  # one query sees none
]


SMALL_WINDOW = replace(SMALL, windowed=True)
SMALL_RUNS_WINDOW = [
    Run(pages=(2,), hot=(2,), hidden=(hidden,), valid=(0, valid), tiles=4, spare=0)
    for hidden, valid in ((254, 1), (64 + 256, 70), (37, 0), (256 + 130, 133))
]
MISTAKES_WINDOW = {
    "one token too few": ("attend.h", "token < first", "token <= first"),
    "one token behind the window": ("attend.h", "token < first", "token + 1 < first"),
    "a tile is whole though it begins behind the window": (
        "attend.h",
        "(!WINDOWED || tile.first == 0)",
        "true",
    ),
    "a window begins a page late": ("attend.h", "- tiles.visible", "- (tiles.visible + 256)"),
    "a tile before the window counts": (
        "attend.h",
        "least(64 * tiles.next - tiles.visible, 0)",
        "least(64 * tiles.next - tiles.visible, 0) % 64",
    ),
    "no window": ("attend.h", "if (WINDOWED) tiles.visible", "if (false) tiles.visible"),
}

SMALL_TREATED = replace(SMALL, heads=2, key_dim=80, sinks=False, treated=True)
SMALL_RUNS_TREATED = [Run(pages=(2,), hot=(70,), valid=(0, 65), tiles=2, spare=0)]
MISTAKES_TREATED = {
    "a matrix is taken for its transpose": (
        "treat.h",
        "load(matrix, row * (DIM / 2) + pair)",
        "load16(matrix, 2 * pair * DIM + row) | load16(matrix, (2 * pair + 1) * DIM + row) << 16",
    ),
    "one head's outputs stay as they are": (
        "attend.h",
        "if (treated)",
        "if (treated && head == 0)",
    ),
    "hot values are treated": ("attend.h", "number < page_splits);", "true);"),
    "hot tokens get the pages' queries": (
        "attend.h",
        "stage_queries(at, shared, q, group);",
        "stage_treated(at, shared, q, group, treatment);",
    ),
    "pages get plain queries": (
        "attend.h",
        "stage_treated(at, queries, q, group, treatment);",
        "stage_queries(at, queries, q, group);",
    ),
    "heads share their matrices": ("treat.h", "treatment + group.head *", "treatment + 0 *"),
    "outputs are multiplied by the queries' matrix": (
        "treat.h",
        "treatment + (HEADS * (KEY_DIM * KEY_DIM / 2) +",
        "treatment + (",
    ),
    "no barrier before queries are multiplied": (
        "treat.h",
        "stage_queries(at, queries, q, group); barrier();",
        "stage_queries(at, queries, q, group);",
    ),
    "plain queries are overwritten too early": (
        "treat.h",
        "more. barrier();",
        "more.",
    ),
    "a lane keeps another's query": ("treat.h", "at.g >> 1) :", "at.g >> 2) :"),
    "large sums are no float16": ("treat.h", "(249u << 23)", "(263u << 23)"),
}


def test_the_small_treated_case_is_right() -> None:
    check(HostLauncher(AHEAD), SMALL_TREATED, SMALL_RUNS_TREATED)


@pytest.mark.parametrize("mistake", MISTAKES_TREATED.values(), ids=MISTAKES_TREATED.keys())
def test_mistakes_with_treatments_are_noticed(
    mistake: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(mistake, tmp_path / "kernels", monkeypatch)
    with pytest.raises(AssertionError):
        check(HostLauncher(AHEAD), SMALL_TREATED, SMALL_RUNS_TREATED)


def sums_beside_plain_ones() -> float:
    """How far treated sums are from plain ones times O, if queries stay as they are."""
    case = Case(("fp16",), heads=2, key_dim=64, value_dim=128, repeats=3, treated=True)
    plain, made = replace(case, treated=False), []
    identity = np.broadcast_to(np.eye(case.key_dim), (case.heads, case.key_dim, case.key_dim))
    matrices = replace(treatment_of(case), queries=identity)
    rng = np.random.default_rng(5)
    q = mx.array(rng.standard_normal((1, 6, 1, case.key_dim)).astype(np.float16))
    hot = (mx.zeros((1, 2, 64, 64), mx.float16), mx.zeros((1, 2, 64, 128), mx.float16))
    plan = SplitPlan(4, 2, 64, 2, 3, case.warps)
    params = mx.array(plan.params(2, 64, 64, 2), mx.uint32)
    table = mx.array(table_words([(0, 0, 256), (0, 1, 200)]), mx.uint32)
    for kind, words in ((plain, None), (case, matrices.words)):
        given = (HostLauncher(AHEAD), kind.spec(AHEAD), plan, q, params, table, hot)
        partial, stats = attend_splits(*given, kernel_cases.pages(plain, "plain")[0], 3, words)
        made.append((np.array(partial).astype(np.float64), np.array(stats)))
    (sums, stats), (treated, same) = made
    assert (stats == same).all() and (treated[2] == sums[2]).all()
    by_head = sums[:2].reshape(2, case.heads, case.repeats, -1)
    exact = (by_head @ matrices.outputs).reshape(2, 6, -1)
    return float(np.abs(treated[:2] - exact).max() / np.abs(exact).max())


def test_sums_are_treated_in_more_than_sixteen_bits() -> None:
    assert sums_beside_plain_ones() < 2**-20


@pytest.mark.parametrize(("old", "new"), [("* 2048.0f)", "* 0.0f)"), ("1.0f / 2048.0f", "0.0f")])
def test_sums_of_sixteen_bits_are_noticed(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(("treat.h", old, new), tmp_path / "kernels", monkeypatch)
    assert sums_beside_plain_ones() > 2**-16


SMALL_TOGETHER = replace(SMALL, heads=2, together=True)
SMALL_RUNS_TOGETHER = [Run(pages=(3,), hot=(70,), valid=(0, 65), tiles=1, spare=0)]


def plant(mistake: tuple[str, str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernels from a copy of their folder with one mistake in it."""
    shutil.copytree(source._FOLDER, folder, ignore=shutil.ignore_patterns("*.py*"))
    file, old, new = mistake
    anywhere = r"[\s\\]+".join(map(re.escape, old.split()))
    text, count = re.subn(anywhere, lambda _: new, (folder / file).read_text())
    assert count, f"{file} no longer has {old!r}"
    (folder / file).write_text(text)
    monkeypatch.setattr(source, "_FOLDER", folder)
    monkeypatch.setattr(source, "_text", source._text.__wrapped__)


@pytest.mark.parametrize("contract", [False, True])
def test_the_small_case_is_right(contract: bool) -> None:
    check(HostLauncher(AHEAD, contract), SMALL, SMALL_RUNS)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_noticed(
    mistake: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(mistake, tmp_path / "kernels", monkeypatch)
    contract = mistake == MISTAKES["two equal large products are subtracted"]
    with pytest.raises(AssertionError):
        check(HostLauncher(AHEAD, contract), SMALL, SMALL_RUNS)


def test_the_small_case_with_a_window_is_right() -> None:
    check(HostLauncher(AHEAD), SMALL_WINDOW, SMALL_RUNS_WINDOW)


@pytest.mark.parametrize("mistake", MISTAKES_WINDOW.values(), ids=MISTAKES_WINDOW.keys())
def test_mistakes_with_a_window_are_noticed(
    mistake: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(mistake, tmp_path / "kernels", monkeypatch)
    with pytest.raises(AssertionError):
        check(HostLauncher(AHEAD), SMALL_WINDOW, SMALL_RUNS_WINDOW)


def test_the_small_case_is_right_in_one_launch() -> None:
    check(HostLauncher(AHEAD), SMALL_TOGETHER, SMALL_RUNS_TOGETHER)


@pytest.mark.parametrize("mistake", MISTAKES_TOGETHER.values(), ids=MISTAKES_TOGETHER.keys())
def test_mistakes_in_one_launch_are_noticed(
    mistake: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(mistake, tmp_path / "kernels", monkeypatch)
    with pytest.raises(AssertionError):
        check(HostLauncher(AHEAD), SMALL_TOGETHER, SMALL_RUNS_TOGETHER)


@pytest.mark.parametrize(
    ("ahead", "case"),
    [
        (AHEAD, Case(("K3V4", "K8V2", "fp16"), heads=1, repeats=3, together=True)),
        (
            WHERE_IT_IS,
            Case(("K4V3",), heads=1, key_dim=80, repeats=2, length=2, sinks=True, batch=2),
        ),
        (AHEAD, Case(("K4V3",), key_dim=80, value_dim=40, repeats=9, together=True, treated=True)),
    ],
    ids=name,
)
def test_sanitizers_find_nothing(ahead: bool, case: Case) -> None:
    check(HostLauncher(ahead, sanitize=True), case, RUNS[1:4])


def test_the_sanitizers_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fragment index that is one too high reads past a lane's own array."""
    mistake = ("attend.h", "e < 4; e++) scores.s[b][m][e] = 0", "e < 5; e++) scores.s[b][m][e] = 0")
    plant(mistake, tmp_path / "kernels", monkeypatch)
    with pytest.raises(EmulatorError, match="runtime error: index 4 out of bounds"):
        check(HostLauncher(AHEAD, sanitize=True), SMALL, SMALL_RUNS)


NVCC = """
#include <cuda_fp16.h>
{header}
extern "C" __global__ void kernel({parameters}) {{
{body}
}}
"""


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on the PATH")
@pytest.mark.parametrize(
    ("case", "spills"),
    [
        (Case(("K4V4",), heads=8, repeats=4), False),
        (Case(("K4V4",), heads=8, repeats=4, together=True), False),
        (Case(("K4V4",), heads=8, repeats=8), False),
        (Case(LADDER, heads=8, repeats=4), False),
        (Case(LADDER, heads=8, repeats=8, together=True), False),
        (Case(("K3V2",), key_dim=256, repeats=8, length=2, **BF16), True),
        (Case(SQUARES[0], key_dim=80, repeats=3, final=True, sinks=True), True),
        (Case(("K4V4",), heads=8, repeats=4, together=True, windowed=True), False),
        (Case(LADDER, heads=8, repeats=8, windowed=True), False),
        (Case(("K4V4",), heads=8, repeats=4, together=True, treated=True), False),
        (Case(("K4V4",), heads=3, key_dim=64, repeats=3, together=True, treated=True), False),
        (Case(LADDER, heads=8, repeats=8, treated=True), False),
    ],
    ids=lambda x: name(x) if isinstance(x, Case) else "",
)
def test_cuda_text_compiles(case: Case, spills: bool, tmp_path: Path) -> None:
    spec = case.spec(AHEAD)
    for text in (spec.attend, spec.merge):
        parameters = [f"const void* {x}" for x in text.inputs] + [
            f"void* {x}" for x in text.outputs
        ]
        file = tmp_path / "kernel.cu"
        file.write_text(
            NVCC.format(
                header=text.header("cuda"),
                parameters=", ".join(parameters),
                body=text.body("cuda"),
            )
        )
        done = subprocess.run(
            [
                "nvcc",
                "-cubin",
                "-arch=sm_90",
                "-std=c++17",
                "-Xptxas",
                "-v",
                "-o",
                "kernel.cubin",
                file,
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.returncode, done.stderr
        if not spills:
            assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr

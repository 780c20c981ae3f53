"""Decode attention: splits of a page table and of the hot tokens, attended and merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from pagedkv.attn.kernels.launch import Launcher
from pagedkv.attn.kernels.source import LANES, MERGE_GROUP, MERGE_GROUPS, MERGE_WARPS, AttentionSpec

GROUPS_WANTED = 396
"""Threadgroups that run at once on a large GPU: three on each of an H100's 132 multiprocessors."""

HOT_PER_SPLIT, HOT_PER_LONG_SPLIT = 128, 256
"""Hot tokens of a split: few, for what they cost is waiting; more where page splits are long."""

WARPS = 4
"""SIMD groups of a threadgroup that attends."""

PARAMS = 16
LEAST_WORDS = 8
"""Metal keeps smaller inputs in another address space."""

PRECISION_SHIFT = 28
STAGED = 1 << 31


@dataclass(frozen=True)
class SplitPlan:
    """How a sequence's tokens are divided between threadgroups.

    It depends on numbers of pages and tokens only, so that where pages are changes nothing.

    Attributes:
        tiles_per_split: tiles of 64 tokens of one split, at most: whole pages, or a page's part.
        page_splits: splits that have pages.
        hot_per_split: hot tokens of one split, at most.
        first_hot: the first split that has hot tokens.
        splits: all of them.
        warps: SIMD groups of a threadgroup.
    """

    tiles_per_split: int
    page_splits: int
    hot_per_split: int
    first_hot: int
    splits: int
    warps: int

    @classmethod
    def choose(
        cls,
        pages: int,
        hot: int,
        parallel: int,
        page_tokens: int,
        pages_per_run: int,
        apart: bool = False,
    ) -> SplitPlan:
        """Fill the GPU in as few rounds as possible, each of them full.

        Args:
            pages: of the longest sequence.
            hot: tokens, likewise.
            parallel: threadgroups per split: KV heads, row blocks and sequences multiplied.
            page_tokens: tokens per page.
            pages_per_run: pages of a split, at most: what may be staged together.
            apart: whether no split may have both pages and hot tokens, as treated layers need it.
        """
        groups = page_tokens // 64
        tiles = pages * groups
        if tiles + -(-hot // 64) <= WARPS and not apart:
            return cls(max(1, tiles), 1, max(64, hot), 0, 1, WARPS)
        at_once = max(1, GROUPS_WANTED // parallel)
        rounds = -(-tiles // (at_once * pages_per_run * groups))
        per_hot = HOT_PER_SPLIT if rounds <= 1 else HOT_PER_LONG_SPLIT
        hot_splits = -(-hot // per_hot)
        per_split = WARPS
        if tiles > per_split * at_once:
            per_split = -(-pages // max(1, rounds * at_once - hot_splits)) * groups
            per_split = min(per_split, pages_per_run * groups)
        page_splits = -(-tiles // per_split)
        return cls(per_split, page_splits, per_hot, page_splits, page_splits + hot_splits, WARPS)

    def params(
        self, pages: int, hot: int, capacity: int, stride: int, first: int = 0, visible: int = 0
    ) -> list[int]:
        """The words that the kernels read, for one sequence.

        Args:
            pages: of this sequence.
            hot: its hot tokens.
            capacity: tokens that the hot arrays have room for.
            stride: pages per row of the table.
            first: the first split of the launch.
            visible: where the first visible token of the pages is: the number of its page times
                tokens per page, and its number within. Kernels for windows read it.
        """
        words = [pages, hot, self.tiles_per_split, self.page_splits, capacity, self.hot_per_split]
        words += [stride, self.splits, self.first_hot, first, visible]
        return words + [0] * (PARAMS - len(words))


def table_words(places: Sequence[tuple[int, int, int]]) -> list[int]:
    """A page table as the kernels read it.

    Args:
        places: per page: number of its precision, slot (`STAGED` set if in staging), valid tokens.

    Returns:
        Two words per page, padded to at least `LEAST_WORDS`.
    """
    words = [x for kind, slot, valid in places for x in (kind << PRECISION_SHIFT | slot, valid)]
    return words + [0] * (LEAST_WORDS - len(words))


def attend_splits(
    launcher: Launcher,
    spec: AttentionSpec,
    plan: SplitPlan,
    q: mx.array,
    params: mx.array,
    table: mx.array,
    hot: tuple[mx.array, mx.array],
    sources: Sequence[mx.array],
    splits: int,
    treatment: mx.array | None = None,
) -> list[mx.array]:
    """Launch the first kernel.

    Args:
        launcher: where.
        spec: of the kernel.
        plan: of the splits.
        q: ``[sequences, query_heads, L, key_dim]``.
        params: uint32 ``[sequences * 16]``, see `SplitPlan.params`.
        table: uint32, see `table_words`.
        hot: keys and values ``[sequences, kv_heads, capacity, dim]``.
        sources: page arrays, uint32 ``[slots, page_bytes / 4]``: slab and staging of each
            precision.
        splits: how many to run.
        treatment: uint32, of a treated layer: the matrices that ``treat.h`` names.

    Returns:
        The output and nothing of interest if the plan has one split; else partial outputs
        ``[splits, sequences * kv_heads * rows, value_dim]`` and their peaks and totals
        ``[splits, sequences * kv_heads * rows, 2]``, float32.
    """
    rows = _rows(spec)
    if spec.final:
        shapes: list[tuple[int, ...]] = [(*q.shape[:3], spec.value_dim), (1,)]
        dtypes = [q.dtype, mx.float32]
    else:
        shapes = [(splits, rows, spec.value_dim), (splits, rows, 2)]
        dtypes = [mx.float32, mx.float32]
    return launcher.launch(
        spec.attend,
        [q, params, table, *hot, *sources, *_matrices(spec, plan, treatment)],
        (splits, spec.heads * spec.row_blocks, spec.sequences),
        LANES * plan.warps,
        shapes,
        dtypes,
    )


def attend_and_merge(
    launcher: Launcher,
    spec: AttentionSpec,
    plan: SplitPlan,
    q: mx.array,
    params: mx.array,
    table: mx.array,
    hot: tuple[mx.array, mx.array],
    sources: Sequence[mx.array],
    sinks: mx.array | None,
    turns: mx.array,
    scratch: mx.array,
    treatment: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Everything in one launch.

    Args:
        launcher: where.
        spec: of the kernel, with `together`.
        plan: of the splits; `can_merge` tells whether there are few enough.
        q: ``[sequences, query_heads, L, key_dim]``.
        params: see `attend_splits`.
        table: likewise.
        hot: likewise.
        sources: the slab of each precision; no page may be staged.
        sinks: float32, the model's attention sinks, at least eight numbers; None if there are none.
        turns: uint32, zeros: `new_turns`, or what the launch before returned. The kernel counts in
            it: no two launches may be given the same.
        scratch: uint32, at least `scratch_words`, written in place: launches that share it must
            be of one chain of counters, which orders them. An array of its own for each launch
            is one more to make, and never in the processor's cache.
        treatment: see `attend_splits`.

    Returns:
        The output, ``[…, L, value_dim]`` like q, and the counters for the next launch.
    """
    matrices, logits = _matrices(spec, plan, treatment), [] if sinks is None else [sinks]
    out, following = launcher.launch(
        spec.attend,
        [q, params, table, *hot, *sources, *matrices, *logits, turns, scratch],
        (plan.splits, spec.heads * spec.row_blocks, spec.sequences),
        LANES * plan.warps,
        [(*q.shape[:3], spec.value_dim), (_turn_words(spec),)],
        [q.dtype, mx.uint32],
    )
    return out, following


def _matrices(spec: AttentionSpec, plan: SplitPlan, treatment: mx.array | None) -> list[mx.array]:
    """A treated kernel's last source; what it relies on is checked."""
    if not spec.treated:
        return []
    words = spec.heads * (spec.key_dim**2 + spec.value_dim**2) // 2
    if treatment is None or treatment.dtype != mx.uint32 or treatment.size != words:
        raise ValueError(f"a treated layer's kernel needs its matrices, {words} words")
    if plan.first_hot < plan.page_splits:
        raise ValueError("a split of a treated layer has both pages and hot tokens")
    return [treatment]


def can_merge(plan: SplitPlan) -> bool:
    """Whether a launch can merge so many splits itself."""
    return plan.splits <= MERGE_GROUP * MERGE_GROUPS


def scratch_words(spec: AttentionSpec, plan: SplitPlan) -> int:
    """Words that a launch needs for the partial softmaxes of splits and of their groups."""
    if not spec.together:
        return 0
    groups = -(-plan.splits // MERGE_GROUP)
    return (plan.splits + groups) * _rows(spec) * (spec.value_dim + 2)


def new_turns(spec: AttentionSpec) -> mx.array:
    """Counters for the first of a chain of launches."""
    return mx.zeros(_turn_words(spec), mx.uint32)


def _turn_words(spec: AttentionSpec) -> int:
    return spec.sequences * spec.heads * spec.row_blocks * (MERGE_GROUPS + 1)


def _rows(spec: AttentionSpec) -> int:
    return spec.sequences * spec.heads * spec.rows


def merge_splits(
    launcher: Launcher,
    spec: AttentionSpec,
    q: mx.array,
    partial: mx.array,
    stats: mx.array,
    params: mx.array,
    sinks: mx.array | None,
) -> mx.array:
    """Launch the second kernel: from all partials to the output, ``[…, L, value_dim]`` like q."""
    if stats.size < LEAST_WORDS:
        stats = mx.pad(stats.reshape(-1), (0, LEAST_WORDS - stats.size))
    (out,) = launcher.launch(
        spec.merge,
        [partial, stats, params, *([] if sinks is None else [sinks])],
        (_rows(spec), 1, 1),
        LANES * MERGE_WARPS,
        [(*q.shape[:3], spec.value_dim)],
        [q.dtype],
    )
    return out

"""Decode attention by the kernels and in float64, over the same random pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import mlx.core as mx
import numpy as np

from pagedkv.allocator import KVShape, Precision
from pagedkv.attn.kernels.decode import (
    STAGED,
    SplitPlan,
    attend_and_merge,
    attend_splits,
    merge_splits,
    new_turns,
    scratch_words,
    table_words,
)
from pagedkv.attn.kernels.launch import Launcher
from pagedkv.attn.kernels.source import AttentionSpec, group_count
from pagedkv.tiers.codec import transform as page_treatment
from pagedkv.tiers.codec.affine import codec_for
from pagedkv.tiers.codec.rounding import FLOAT16_MAX, feedback_for
from tests import reference

SLOTS = 3
"""Pages of each precision, in its slab and, one slot further, in staging: enough for any table."""

KINDS = ("plain", "sharp", "ramp", "huge")
TOLERANCE = {mx.float16: 1.5e-3, mx.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """What costs a compiler run."""

    precisions: tuple[str, ...]
    heads: int = 2
    key_dim: int = 128
    value_dim: int = 0  # 0: as key_dim
    page_tokens: int = 256
    repeats: int = 4
    length: int = 1
    batch: int = 1
    dtype: mx.Dtype = mx.float16
    hot_dtype: mx.Dtype = mx.float16
    sinks: bool = False
    final: bool = False
    together: bool = False
    warps: int = 4
    windowed: bool = False
    treated: bool = False

    @property
    def shape(self) -> KVShape:
        return KVShape(self.heads, self.key_dim, self.value_dim or self.key_dim)

    @property
    def rows(self) -> int:
        return self.repeats * self.length

    def spec(self, fetch_ahead: bool) -> AttentionSpec:
        shape = self.shape
        return AttentionSpec(
            geometries=tuple(c.geometry for c in codecs(self)),
            heads=self.heads,
            key_dim=shape.key_dim,
            value_dim=shape.value_dim,
            page_tokens=self.page_tokens,
            rows=self.rows,
            query_tokens=self.length,
            sequences=self.batch,
            scale=shape.key_dim**-0.5,
            query_bfloat=self.dtype == mx.bfloat16,
            hot_bfloat=self.hot_dtype == mx.bfloat16,
            causal=True,
            final=self.final,
            together=self.together,
            has_sinks=self.sinks,
            warps=self.warps,
            fetch_ahead=fetch_ahead,
            windowed=self.windowed,
            treated=self.treated,
        )


@dataclass(frozen=True)
class Run:
    """What does not: lengths, places and numbers.

    Attributes:
        pages: of each row of the batch, the last number for all further ones.
        hot: tokens, likewise.
        valid: visible tokens of pages, in turn; 0 for whole pages.
        hidden: where the first visible token of each row's pages is, a page having so many places
            whether full or not; for windowed cases.
        tiles: of 64 tokens that a split has, at most; 0 lets `SplitPlan.choose` decide.
        hot_per_split: likewise; a multiple of 64.
        spare: hot tokens that there is room for beyond the longest row's.
        launches: how many launches the splits are divided between.
        kind: of numbers, see `numbers`.
        seed: of numbers and pages.
        places: seed of which pages are read from staging.
    """

    pages: tuple[int, ...] = (3,)
    hot: tuple[int, ...] = (100,)
    valid: tuple[int, ...] = (0,)
    hidden: tuple[int, ...] = (0,)
    tiles: int = 4
    hot_per_split: int = 64
    spare: int = 37
    launches: int = 1
    kind: str = "plain"
    seed: int = 0
    places: int = 0

    def of_row(self, row: int) -> tuple[int, int]:
        return self.pages[min(row, len(self.pages) - 1)], self.hot[min(row, len(self.hot) - 1)]


def codecs(case: Case) -> list:
    return [
        codec_for(case.shape, case.page_tokens, Precision.parse(p), case.hot_dtype)
        for p in case.precisions
    ]


@dataclass(frozen=True)
class Treatment:
    """Random invertible transforms of pages, per KV head, and how the kernels undo them.

    Attributes:
        keys: multiplies keys on their way to pages, ``[heads, key_dim, key_dim]``.
        values: likewise, values.
        queries: what kernels multiply queries by, float16 numbers.
        outputs: likewise, outputs.
    """

    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    outputs: np.ndarray

    @property
    def words(self) -> mx.array:
        """The matrices as kernels read them."""
        halves = [x.astype(np.float16).reshape(-1) for x in (self.queries, self.outputs)]
        return mx.array(np.concatenate(halves).view(np.uint32))

    def undone(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What pages stand for: keys and values ``[heads, tokens, dim]``, float64."""
        return keys @ self.queries.swapaxes(1, 2), values @ self.outputs


@cache
def treatment(heads: int, key_dim: int, value_dim: int) -> Treatment:
    """Rotations between channel scales: no transposed or inverse matrix could stand in for them.

    The first channel of keys stays as it is: see `numbers` for what it is there for.
    """
    rng = np.random.default_rng(key_dim + 1000 * value_dim)

    def matrices(dim: int) -> np.ndarray:
        rotation = np.linalg.qr(rng.standard_normal((heads, dim, dim)))[0]
        before, after = 2.0 ** rng.uniform(-1, 1, (2, heads, dim))
        return before[:, :, None] * rotation * after[:, None, :]

    def half(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float16).astype(np.float64)

    keys, values = np.zeros((heads, key_dim, key_dim)), matrices(value_dim)
    keys[:, 0, 0] = 1
    keys[:, 1:, 1:] = matrices(key_dim - 1)
    queries, outputs = np.linalg.inv(keys).swapaxes(1, 2), np.linalg.inv(values)
    return Treatment(keys, values, half(queries), half(outputs))


def with_feedback(known: page_treatment.Treatment) -> page_treatment.Treatment:
    """The same, where errors of channels are made up for by others."""

    def feedback(dim: int) -> np.ndarray:
        x = np.random.default_rng(dim).standard_normal((known.shape.kv_heads, 2 * dim, dim))
        return np.stack([feedback_for(head.T @ head / len(head)) for head in x])

    keys, values = feedback(known.shape.key_dim), feedback(known.shape.value_dim)
    queries, outputs = (np.asarray(m, np.float64) for m in (known.queries, known.outputs))
    return page_treatment.Treatment.of(
        known.shape, queries, outputs, keys, known.kind, known.reason, values
    )


def treatment_of(case: Case) -> Treatment | None:
    shape = case.shape
    return treatment(case.heads, shape.key_dim, shape.value_dim) if case.treated else None


def numbers(
    rng: np.random.Generator, kind: str, leading: tuple[int, ...], tokens: int, dim: int, keys: bool
) -> np.ndarray:
    """Keys or values ``[*leading, tokens, dim]``; keys have outlier channels around 20.

    The first channel decides who is attended. ``"sharp"``: half of the tokens, in stretches, is so
    far below the others that their weights are zero. ``"ramp"``: every token beats those before it.
    ``"huge"``: as large as float16 goes, and beyond in bfloat16 (values only).
    """
    x = rng.standard_normal((*leading, tokens, dim))
    if keys:
        x[..., ::17] = 6 * x[..., ::17] + 20
        token = np.arange(tokens)
        if kind == "sharp":
            x[..., 0] = np.where(token // 50 % 2, 0, -4000)
        elif kind == "ramp":
            x[..., 0] = token * 0.5
    elif kind == "huge":
        x = x * 30000
    return x.astype(np.float32)


@cache
def pages(
    case: Case, kind: str
) -> tuple[list[mx.array], list[list[tuple[np.ndarray, np.ndarray]]]]:
    """Page arrays as the kernel gets them, and per precision the numbers in each page."""
    rng = np.random.default_rng(sum(map(ord, kind)))
    shape = case.shape
    transforms = treatment_of(case)
    arrays, contents = [], []
    for codec in codecs(case):
        tokens = SLOTS * case.page_tokens
        keys = numbers(rng, kind, (shape.kv_heads,), tokens, shape.key_dim, True)
        values = numbers(rng, kind, (shape.kv_heads,), tokens, shape.value_dim, False)
        if transforms is None:
            records = np.array(codec.encode(sixteen(keys, case), sixteen(values, case)))
        else:
            treated = (mx.array(keys @ transforms.keys), mx.array(values @ transforms.values))
            records = np.array(codec.encode(*(x.astype(mx.float32) for x in treated)))
        records[:, codec.geometry.payload_bytes // 4 :] = 0xFFFFFFFF  # NaN, if anyone looked
        arrays += [mx.array(records), mx.array(np.roll(records, 1, axis=0))]
        bfloat16 = case.hot_dtype == mx.bfloat16
        read = [clamped(*reference.page_arrays(r, codec.geometry, bfloat16)) for r in records]
        contents.append(read if transforms is None else [transforms.undone(*x) for x in read])
    return arrays, contents


def sixteen(x: np.ndarray, case: Case) -> mx.array:
    """Numbers of the hot type; in bfloat16 they may be larger than float16 goes."""
    limit = FLOAT16_MAX if case.hot_dtype == mx.float16 else np.inf
    return mx.array(np.clip(x, -limit, limit)).astype(case.hot_dtype)


def clamped(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What float16 cannot hold is clamped, everywhere."""
    return np.clip(keys, -FLOAT16_MAX, FLOAT16_MAX), np.clip(values, -FLOAT16_MAX, FLOAT16_MAX)


def plan_of(case: Case, run: Run) -> SplitPlan:
    """The plan of all rows; rows that are shorter than the longest leave splits empty."""
    longest = [run.of_row(b) for b in range(case.batch)]
    most_pages, most_hot = (max(x) for x in zip(*longest, strict=True))
    tiles = most_pages * case.page_tokens // 64
    if case.final:
        return SplitPlan(max(1, tiles), 1, max(64, most_hot), 0, 1, case.warps)
    if not run.tiles:
        parallel = case.heads * case.batch * group_count(case.rows)
        plan = SplitPlan.choose(
            most_pages, most_hot, parallel, case.page_tokens, 16, apart=case.treated
        )
        return replace(plan, warps=case.warps)
    page_splits = -(-tiles // run.tiles)
    splits = page_splits + -(-most_hot // run.hot_per_split)
    return SplitPlan(run.tiles, page_splits, run.hot_per_split, page_splits, splits, case.warps)


def error(launcher: Launcher, case: Case, run: Run) -> float:
    """The largest difference to float64, relative to the largest output.

    Values are about one: a largest output far below that is what a model's sinks have left, and may
    be less than float16 resolves.
    """
    out, exact = outputs(launcher, case, run)
    actual = np.asarray(out.astype(mx.float32)).astype(np.float64)
    difference = np.abs(actual - exact).max() / max(1e-2, np.abs(exact).max())
    return float("inf") if np.isnan(difference) else float(difference)


def outputs(launcher: Launcher, case: Case, run: Run) -> tuple[mx.array, np.ndarray]:
    """What the kernels make, and what is exact: ``[batch, query_heads, length, value_dim]``."""
    rng, place = np.random.default_rng(run.seed), np.random.default_rng(run.places)
    spec, shape, plan = case.spec(launcher.fetch_ahead), case.shape, plan_of(case, run)
    arrays, contents = pages(case, run.kind)
    capacity = max(run.of_row(b)[1] for b in range(case.batch)) + run.spare
    stride = max(4, max(run.of_row(b)[0] for b in range(case.batch)))

    q = rng.standard_normal((case.batch, case.heads * case.repeats, case.length, shape.key_dim)) / 4
    if run.kind in ("sharp", "ramp"):
        q[..., 0] = 2  # times a scale that is exact, too: what is tested here is the softmax
    q = mx.array(q.astype(np.float32)).astype(case.dtype)
    leading = (case.batch, case.heads)
    hot = [
        sixteen(numbers(rng, run.kind, leading, capacity, dim, keys), case)
        for dim, keys in ((shape.key_dim, True), (shape.value_dim, False))
    ]
    sinks = rng.standard_normal(max(8, case.heads * case.repeats)).astype(np.float32) * 2
    room = mx.arange(capacity)[:, None]
    table: list[int] = []
    params: list[list[int]] = []
    expected = []
    for b in range(case.batch):
        count, tokens = run.of_row(b)
        hidden = run.hidden[min(b, len(run.hidden) - 1)] if case.windowed else 0
        places, keys, values = [], [], []
        for i in range(count):
            kind, slot = int(rng.integers(len(contents))), int(rng.integers(SLOTS))
            valid = run.valid[i % len(run.valid)] or case.page_tokens
            staged = (slot + 1) % SLOTS | STAGED
            may_stage = not _together(case.spec(launcher.fetch_ahead), run.launches)
            stages = place.random() < 0.4 and may_stage
            places.append((kind, staged if stages else slot, valid))
            first = max(0, hidden - i * case.page_tokens)
            keys.append(contents[kind][slot][0][:, first:valid])
            values.append(contents[kind][slot][1][:, first:valid])
        words = table_words(places)[: 2 * stride]
        table += words + [0] * (2 * stride - len(words))
        params.append(plan.params(count, tokens, capacity, stride, 0, hidden))
        # What lies beyond a row's hot tokens is whatever was there before.
        for i in range(2):
            gone = (mx.arange(case.batch)[:, None, None, None] == b) & (room >= tokens)
            hot[i] = mx.where(gone, mx.array(float("nan")), hot[i]).astype(case.hot_dtype)
        k, v = (np.asarray(x[b, :, :tokens].astype(mx.float32)).astype(np.float64) for x in hot)
        for x, y in zip((keys, values), clamped(k, v), strict=True):
            x.append(y)
        expected.append(
            reference.attention(
                np.asarray(q[b].astype(mx.float32)),
                np.concatenate(keys, axis=1),
                np.concatenate(values, axis=1),
                spec.scale,
                sinks=sinks[: case.heads * case.repeats].astype(np.float64) if case.sinks else None,
            )
        )
    out = attend(
        launcher,
        spec,
        plan,
        q,
        params,
        mx.array(table, mx.uint32),
        hot,
        arrays,
        mx.array(sinks),
        run.launches,
        treatment_of(case),
    )
    return out, np.stack(expected)


def _together(spec: AttentionSpec, launches: int) -> bool:
    return spec.together and launches == 1


def attend(
    launcher: Launcher,
    spec: AttentionSpec,
    plan: SplitPlan,
    q: mx.array,
    params: list[list[int]],
    table: mx.array,
    hot: Sequence[mx.array],
    sources: list[mx.array],
    sinks: mx.array,
    launches: int,
    transforms: Treatment | None = None,
) -> mx.array:
    """Everything in one launch, or both kernels, the first in several launches if asked."""
    arrays = ((hot[0], hot[1]), sources)
    logits = sinks if spec.has_sinks else None
    matrices = None if transforms is None else transforms.words
    if _together(spec, launches):
        words, slabs = mx.array(params, mx.uint32).reshape(-1), sources[::2]
        given = (launcher, spec, plan, q, words, table, arrays[0], slabs)
        scratch = mx.full(scratch_words(spec, plan), 0x7FC07E7E, mx.uint32)  # NaN
        out, turns = attend_and_merge(*given, logits, new_turns(spec), scratch, matrices)
        assert not turns.any(), "the counters of the next launch do not begin at zero"
        return out
    spec = replace(spec, together=False)
    parts = []
    each = -(-plan.splits // launches)
    for first in range(0, plan.splits, each):
        words = [[*row[:9], first, *row[10:]] for row in params]
        parts.append(
            attend_splits(
                launcher,
                spec,
                plan,
                q,
                mx.array(words, mx.uint32).reshape(-1),
                table,
                *arrays,
                min(each, plan.splits - first),
                matrices,
            )
        )
    if spec.final:
        return parts[0][0]
    partial, stats = (mx.concatenate(list(x)) for x in zip(*parts, strict=True))
    words = mx.array(params, mx.uint32).reshape(-1)
    return merge_splits(launcher, spec, q, partial, stats, words, logits)

"""Self-check of kernels: each is compared with plain MLX on a small input before it is used.

What runs on a user's GPU was compiled there for the first time. A kernel that does not compile, or
gives other numbers than plain MLX, is not used: the composed path takes its place, one warning says
so, and `pagedkv doctor` lists it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import KVShape
from pagedkv.allocator.precision import GROUP_TOKENS
from pagedkv.attn.kernels.compensate import CompensateSpec, compensate
from pagedkv.attn.kernels.decode import (
    PRECISION_SHIFT,
    SplitPlan,
    attend_and_merge,
    attend_splits,
    merge_splits,
    new_turns,
    scratch_words,
    table_words,
)
from pagedkv.attn.kernels.expand import ExpandSpec, expand_pages
from pagedkv.attn.kernels.launch import Launcher
from pagedkv.attn.kernels.seal import SealSpec, seal_pages
from pagedkv.attn.kernels.source import AttentionSpec
from pagedkv.tiers import AffineCodec, Sixteen
from pagedkv.tiers.arrays import evaluated
from pagedkv.tiers.codec.rounding import compensated, compensated_rows, feedback_for, quantize

TOLERANCE = {mx.float16: 5e-3, mx.bfloat16: 3e-2}
"""Largest difference allowed, relative to the largest number: a few roundings to 16 bit."""

SEAL_TOLERANCE = 1e-3
"""A page may be so much farther from its numbers than plain MLX's, relative to the largest."""

COMPENSATE_TOLERANCE = 0.05
"""Of the error that is made up for, more or less: borders between codes are met by chance."""

HOT, CAPACITY, LAST_PAGE, HIDDEN = 70, 96, 100, 75
"""Tokens of the small input: hot ones, room for them, valid ones of its last page, and for windows
those of the second page that nobody sees."""

Codecs = list[AffineCodec | Sixteen]

results: dict[str, str] = {}
"""By kernel: why it is not used; empty if it is."""


def works(name: str, check: Callable[[], float], tolerance: float) -> bool:
    """Whether a kernel may be used; checks it the first time it is asked for.

    Args:
        name: of the kernel.
        check: returns its largest relative difference from plain MLX.
        tolerance: the difference allowed.
    """
    if name not in results:
        results[name] = _reason(check, tolerance)
        if results[name]:
            warnings.warn(
                f"the GPU kernel {name} is not used on this machine, plain MLX takes its place "
                f"and is slower: {results[name]}; please report it (`pagedkv doctor` shows more)",
                stacklevel=2,
            )
    return not results[name]


def _reason(check: Callable[[], float], tolerance: float) -> str:
    try:
        difference = check()
    except Exception as e:  # a compiler's or driver's error may be anything
        return " ".join(f"{type(e).__name__}: {e}".split())[:300]
    if not difference <= tolerance:  # NaN is no pass
        return f"its numbers differ by {difference:.2g} where {tolerance:.2g} is allowed"
    return ""


def attend_difference(launcher: Launcher, spec: AttentionSpec, codecs: Codecs) -> float:
    """Decode attention over two pages of each precision and some hot tokens.

    Args:
        launcher: where.
        spec: of the kernels; one sequence.
        codecs: one per precision, in the spec's order.
    """
    records, keys, values = [], [], []
    key, matrices = mx.random.key(7), _matrices(spec) if spec.treated else None
    for codec in codecs:
        k, v = _numbers(key, spec, 2 * spec.page_tokens, codec.geometry.shape.value_dim)
        page = codec.untreated.encode(k[0], v[0])
        records += [page, page]
        keys.append(codec.page_keys(page, mx.float32).swapaxes(2, 3))
        values.append(codec.page_values(page, mx.float32))
        if matrices is not None:
            keys[-1] = _product(keys[-1], matrices[0].swapaxes(1, 2))
            values[-1] = _product(values[-1], matrices[1])
    hot_keys, hot_values = _numbers(mx.random.key(8), spec, CAPACITY, spec.value_dim)
    # Often enough that groups of splits are merged as well.
    order = [(kind, slot) for kind in range(len(codecs)) for slot in (1, 0)] * 3
    valid = [spec.page_tokens] * (len(order) - 1) + [LAST_PAGE]
    hidden = spec.page_tokens + HIDDEN if spec.windowed else 0
    places = [(*place, n) for place, n in zip(order, valid, strict=True)]
    dense = [
        mx.concatenate(
            [x[kind][slot][:, :n] for kind, slot, n in places]
            + [hot[0, :, :HOT].astype(mx.float32)],
            axis=1,
        )[:, hidden:]
        for x, hot in ((keys, hot_keys), (values, hot_values))
    ]
    query_heads = spec.heads * spec.rows // spec.query_tokens
    dtype = mx.bfloat16 if spec.query_bfloat else mx.float16
    shape = (1, query_heads, spec.query_tokens, spec.key_dim)
    q = mx.random.normal(shape, key=mx.random.key(9)).astype(dtype)
    sinks = mx.random.normal((max(8, query_heads),), key=mx.random.key(10))
    plan = _small_plan(spec, len(places))
    words = plan.params(len(places), HOT, CAPACITY, len(places), 0, hidden)
    params, table = mx.array(words, mx.uint32), mx.array(table_words(places), mx.uint32)
    sources = records if spec.staging else records[::2]
    logits = sinks if spec.has_sinks else None
    treatment = None if matrices is None else _treatment_words(matrices)
    given = (launcher, spec, plan, q, params, table, (hot_keys, hot_values), sources)
    if spec.together:
        scratch = mx.full(scratch_words(spec, plan), 0x7FC07E7E, mx.uint32)  # NaN
        out, _ = attend_and_merge(*given, logits, new_turns(spec), scratch, treatment)
    else:
        out, stats = attend_splits(*given, plan.splits, treatment)
        if not spec.final:
            out = merge_splits(launcher, spec, q, out, stats, params, logits)
    expected = _attention(spec, q, dense[0], dense[1], sinks)
    return _difference(out, expected)


_Matrices = tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]


def _matrices(spec: AttentionSpec) -> _Matrices:
    """A treatment's matrices for queries and outputs: any would do; far from orthogonal."""
    rng = np.random.default_rng(11)

    def matrix(dim: int) -> npt.NDArray[np.float16]:
        scales = 2.0 ** rng.uniform(-1, 1, (2, spec.heads, dim))
        numbers = rng.standard_normal((spec.heads, dim, dim)) / math.sqrt(dim)
        numbers *= scales[0][:, :, None] * scales[1][:, None, :]
        return numbers.astype(np.float16)

    return matrix(spec.key_dim), matrix(spec.value_dim)


def _treatment_words(matrices: _Matrices) -> mx.array:
    halves = [matrix.reshape(-1) for matrix in matrices]
    return mx.array(np.concatenate(halves).view(np.uint32))


def _product(x: mx.array, matrix: npt.NDArray[np.float16]) -> mx.array:
    """A product in numpy: MLX's may be rounded to fewer bits than float32 has."""
    return mx.array(np.asarray(evaluated(x)) @ matrix.astype(np.float32))


def _small_plan(spec: AttentionSpec, pages: int) -> SplitPlan:
    groups = spec.page_tokens // 64
    if spec.final:
        return SplitPlan(pages * groups, 1, 128, 0, 1, spec.warps)
    tiles = pages * groups
    return SplitPlan(1, tiles, 64, tiles, tiles + math.ceil(HOT / 64), spec.warps)


def _numbers(
    key: mx.array, spec: AttentionSpec | ExpandSpec | SealSpec, tokens: int, value_dim: int
) -> tuple[mx.array, mx.array]:
    """Random keys, some channels of them large, and values, in the hot type."""
    heads, key_dim = (
        (spec.heads, spec.key_dim)
        if isinstance(spec, AttentionSpec)
        else (_shape(spec).kv_heads, _shape(spec).key_dim)
    )
    dtype = mx.bfloat16 if spec.hot_bfloat else mx.float16
    first, second = mx.random.split(key)
    large = mx.where(mx.arange(key_dim) % 17 == 0, 8.0, 1.0)
    keys = mx.random.normal((1, heads, tokens, key_dim), key=first) * large
    values = mx.random.normal((1, heads, tokens, value_dim), key=second)
    return keys.astype(dtype), values.astype(dtype)


def _shape(spec: ExpandSpec | SealSpec) -> KVShape:
    return spec.shape if isinstance(spec, ExpandSpec) else spec.geometry.shape


def _attention(
    spec: AttentionSpec, q: mx.array, keys: mx.array, values: mx.array, sinks: mx.array
) -> mx.array:
    """Softmax attention in float32; queries are the last tokens."""
    length, tokens = spec.query_tokens, keys.shape[1]
    repeats = spec.rows // length
    wide = q[0].astype(mx.float32).reshape(spec.heads, spec.rows, spec.key_dim)
    # Elementwise: matrix products may be rounded to fewer bits than float32 has.
    scores = (wide[:, :, None] * keys[:, None]).sum(-1) * spec.scale
    if spec.causal and length > 1:
        row = mx.arange(spec.rows) % length + tokens - length
        # Not infinity: MLX's softmax on CUDA makes NaN of several infinities side by side.
        scores = mx.where(row[:, None] >= mx.arange(tokens), scores, -1e30)
    if spec.has_sinks:
        per_row = mx.repeat(sinks[: spec.heads * repeats].reshape(spec.heads, repeats), length, 1)
        scores = mx.concatenate([scores, per_row[..., None]], axis=-1)
    p = mx.softmax(scores, axis=-1)[..., :tokens]
    out = mx.stack([(p[:, r, :, None] * values).sum(1) for r in range(spec.rows)], axis=1)
    return out.reshape(1, spec.heads * repeats, length, spec.value_dim)


def expand_difference(launcher: Launcher, spec: ExpandSpec, codecs: Codecs) -> float:
    """Dense keys and values of one page of each precision, and some hot tokens."""
    hot = _numbers(mx.random.key(8), spec, CAPACITY, spec.shape.value_dim)
    records, keys, values = [], [], []
    for codec in codecs:
        k, v = _numbers(mx.random.key(7), spec, spec.page_tokens, spec.shape.value_dim)
        page = codec.untreated.encode(k[0], v[0])
        records += [page, page]
        keys.append(codec.page_keys(page, mx.float32)[0].swapaxes(1, 2)[:, :LAST_PAGE])
        values.append(codec.page_values(page, mx.float32)[0][:, :LAST_PAGE])
    table = [(kind << PRECISION_SHIFT, LAST_PAGE) for kind in range(len(codecs))]
    dense = expand_pages(launcher, spec, np.array(table, np.uint32), hot, HOT, 4, records)
    worst = 0.0
    for out, pages, tokens in zip(dense, (keys, values), hot, strict=True):
        tail = tokens[0, :, :HOT].astype(mx.float32)
        expected = mx.concatenate([tail[:, :4], *pages, tail[:, 4:]], axis=1)[None]
        worst = max(worst, _difference(out, expected))
    return worst


def seal_difference(launcher: Launcher, spec: SealSpec, codec: AffineCodec | Sixteen) -> float:
    """How much farther from the numbers the kernel's pages are than the codec's.

    In parts of the largest number; not negative.
    """
    tokens = spec.geometry.tokens
    keys, values = _numbers(mx.random.key(7), spec, tokens + 8, spec.geometry.shape.value_dim)
    records = seal_pages(launcher, spec, (keys, values), 5, 1)
    keys, values = keys[:, :, 5 : 5 + tokens], values[:, :, 5 : 5 + tokens]
    reference = codec.encode(keys[0], values[0])
    worst = 0.0
    for decode, numbers in ((codec.keys, keys.swapaxes(2, 3)), (codec.values, values)):
        exact = numbers.astype(mx.float32)
        ours, theirs = (_difference(decode(r, mx.float32), exact) for r in (records, reference))
        worst = max(worst, ours - theirs)
    return worst


def compensate_difference(launcher: Launcher, spec: CompensateSpec) -> float:
    """How much more the kernel's numbers err, as weights see it, than plain MLX's; not negative."""
    geometry, dim, bits = spec.geometry, spec.dim, spec.bits
    heads, tokens = geometry.shape.kv_heads, geometry.tokens
    x = mx.random.normal((heads, 2 * dim, dim), key=mx.random.key(8))
    weights = (x.swapaxes(1, 2) @ x / x.shape[1]).astype(mx.float32)
    feedback = mx.array(
        np.stack([feedback_for(w) for w in np.asarray(evaluated(weights), np.float64)]), mx.float16
    )
    rows = mx.random.normal((1, heads, tokens, dim), key=mx.random.key(9)).astype(mx.float16)
    group = geometry.value_group if spec.values else GROUP_TOKENS

    def cost(moved: mx.array) -> float:
        if not spec.values:
            moved = moved.swapaxes(2, 3)
        padded = mx.pad(moved, [(0, 0)] * 3 + [(0, -moved.shape[3] % group)])
        codes, scales, biases = quantize(padded, group, bits)
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        said = mx.dequantize(codes, scales, biases, group_size=group, bits=bits)
        said = said[..., : moved.shape[3]]
        errors = ((said if spec.values else said.swapaxes(2, 3)) - rows.astype(mx.float32))[0]
        return float(np.asarray(evaluated((errors @ weights * errors).sum())))

    ours = cost(compensate(launcher, spec, rows, feedback))
    if spec.values:
        theirs = cost(compensated_rows(rows, feedback, group, bits))
    else:
        theirs = cost(compensated(rows.swapaxes(2, 3), feedback, group, bits).swapaxes(2, 3))
    return max(0.0, ours / theirs - 1)


def _difference(out: mx.array, expected: mx.array) -> float:
    wide = out.astype(mx.float32)
    ratio = mx.abs(wide - expected).max() / mx.abs(expected).max()
    return float(np.asarray(evaluated(ratio)))

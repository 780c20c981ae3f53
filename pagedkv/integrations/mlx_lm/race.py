"""A race for each layer's treatment: all that is known is tried, on tokens none was made from.

What rounding does to attention is what counts, so that is measured: a layer's queries attend to its
keys and values as they are, and to what pages would give back. Rules for good matrices are about
second moments; layers whose channels spread otherwise (a few huge numbers, QK norms) can lose by
them what others gain. So keys and values are raced apart, without any treatment, too, and what
does not clearly beat that is not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import KVShape, Precision
from pagedkv.allocator.geometry import PAGE_TOKENS
from pagedkv.allocator.precision import GROUP_TOKENS
from pagedkv.attn.driver import stock_attention
from pagedkv.calibration.equalization import turns_of
from pagedkv.calibration.layer_weights import LayerWeights
from pagedkv.calibration.moments import FIRST, NEAR
from pagedkv.calibration.treatment_rules import balanced, is_latent, rope_of, scaled
from pagedkv.integrations.mlx_lm.recording import AttentionCall, LastCall, Stream, measure
from pagedkv.tiers import Treatment
from pagedkv.tiers.arrays import evaluated
from pagedkv.tiers.codec.affine import codec_for

LEAST_GAIN = 0.1
"""A treatment has to take so much of the error away: less may be chance, and it costs a product."""

BY_HEAD = "mixed head by head"
"""What is told of a layer whose heads have different winners."""

QUERIES = 64
"""Of the last call, the newest."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int_]

Candidate = tuple[Treatment, tuple[bool, bool]]
"""A treatment, and whether it may be used for keys and for values."""


@dataclass(frozen=True)
class Wanted:
    """What a layer's pages are to be like.

    Attributes:
        shape: of the layer.
        precision: the fewest bits that its keys have in a page, and its values.
        keys: whether keys are to be treated.
        values: whether values are.
    """

    shape: KVShape
    precision: Precision
    keys: bool
    values: bool


def raced(
    model: Any, wanted: Mapping[int, Wanted], texts: list[list[int]], others: list[int]
) -> dict[int, Treatment]:
    """The treatments that change attention least.

    Args:
        model: of mlx-lm.
        wanted: by layer number.
        texts: ids that treatments are made from.
        others: ids that they are judged by.

    Returns:
        By layer number; layers that are best left as they are do not occur, nor those whose
        queries were not seen.

    Raises:
        ConfigError: if no layer's queries can be seen.
    """
    streams = measure(model, texts)
    calls = measure(model, [others], kind=LastCall)
    chosen: dict[int, Treatment] = {}
    for number, want in wanted.items():
        stream, last = streams.get(number), calls.pop(number, None)
        if stream is None or stream.shape != want.shape or number >= len(model.layers):
            continue
        assert isinstance(last, LastCall) and last.call is not None
        layer = model.layers[number]
        weights = LayerWeights.of(layer, want.shape, stream.seen.asks)
        candidates = _candidates(layer, stream, want, weights)
        if treatment := _winner(last.call, candidates, want, weights.outputs):
            chosen[number] = treatment
    return chosen


def _candidates(layer: Any, stream: Stream, want: Wanted, weights: LayerWeights) -> list[Candidate]:
    """All that is known to help a layer."""
    shape, both = want.shape, (want.keys, want.values)
    found: list[Candidate] = [(Treatment.plain(shape, "hadamard"), both)]
    if weights.spread is not None:
        with suppress(ValueError):  # numbers that are not finite, or that float16 does not hold
            found.append((scaled(weights.spread, shape), both))
    turns, keys = [], want.keys and not is_latent(layer)
    if keys:
        try:
            rope = rope_of(layer)
            turns, keys = turns_of(rope, shape.key_dim), rope is not None
        except Exception:  # whatever an unknown embedding raises
            keys = False  # nobody knows what becomes of keys farther away
    with suppress(ValueError):
        made = balanced(shape, stream.seen, turns if keys else None, weights, want.values)
        found.append((made, (keys, want.values)))
    return found


def _winner(
    call: AttentionCall,
    candidates: list[Candidate],
    want: Wanted,
    outputs: Floats | None,
) -> Treatment | None:
    """Of each head the best for keys, and the best for values; None if nothing is worth it."""
    plain = errors(call, None, want, outputs)
    least = (1 - LEAST_GAIN) * plain  # what has to be beaten
    winners = np.full(plain.shape, -1)
    for number, (treatment, parts) in enumerate(candidates):
        found = errors(call, treatment, want, outputs)
        # Not finite where numbers are not: whatever is compared with it does not win.
        wins = (found < least) & np.array(parts)[:, None]
        least, winners = np.where(wins, found, least), np.where(wins, number, winners)
    if (winners < 0).all():
        return None
    q, key_gains, kind = _assembled(0, winners[0], candidates)
    o, value_gains, other = _assembled(1, winners[1], candidates)
    treated = (winners >= 0).any(axis=1)
    costs = np.where(winners < 0, plain, least)[treated].sum(axis=1)
    ratios = [f"{ratio:.2g}" for ratio in costs / plain[treated].sum(axis=1)]
    kinds = dict.fromkeys(filter(None, (kind, other)))
    told = BY_HEAD if BY_HEAD in kinds else " / ".join(kinds)
    reason = f"attention errs {' and '.join(ratios)} times as much as without"
    return Treatment.of(want.shape, q, o, key_gains, told, reason, value_gains)


def _assembled(
    part: int, winners: Ints, candidates: list[Candidate]
) -> tuple[Floats | None, Floats | None, str]:
    """The winners' matrices, head by head; heads without one are left as they are.

    Args:
        part: 0 for keys, 1 for values.
        winners: numbers of candidates, ``[kv_heads]``, or -1.
        candidates: treatments.

    Returns:
        Matrices, feedback, and what is done, for people.
    """
    some = {n: candidates[n][0] for n in dict.fromkeys(winners.tolist()) if n >= 0}
    if not some:
        return None, None, ""
    shape = next(iter(some.values())).shape
    dim, heads = (shape.key_dim, shape.value_dim)[part], shape.kv_heads
    matrices, gains = np.tile(np.eye(dim), (heads, 1, 1)), np.zeros((heads, dim, dim))
    for number, treatment in some.items():
        mine = winners == number
        matrices[mine] = np.array((treatment.queries, treatment.outputs)[part])[mine]
        feedback = (treatment.feedback, treatment.value_feedback)[part]
        if feedback is not None:
            gains[mine] = np.array(feedback)[mine]
    kind = BY_HEAD if (winners != winners[0]).any() else some[int(winners[0])].kind
    return matrices, gains if gains.any() else None, kind


def errors(
    call: AttentionCall, treatment: Treatment | None, want: Wanted, outputs: Floats | None = None
) -> Floats:
    """By how much attention changes where keys, or values, are rounded.

    The newest `QUERIES` of the call attend. The first `FIRST` tokens and the `NEAR` before the
    oldest of them are as they are.

    Args:
        call: whose queries attend.
        treatment: of pages; None for none.
        want: what pages are like.
        outputs: products of what the output projection makes of value channels, ``[kv_heads,
            value_dim, value_dim]``, if that is known.

    Returns:
        Sums of squares over queries, ``[2, kv_heads]``: of keys, and of values; 0 where no token is
        rounded.
    """
    q, keys, values = (x.astype(mx.float32) for x in (call.q, call.keys, call.values))
    count, held = min(QUERIES, int(q.shape[2])), int(keys.shape[2])
    end = FIRST + (held - count - NEAR - FIRST) // GROUP_TOKENS * GROUP_TOKENS
    if end <= FIRST:
        return np.zeros((2, want.shape.kv_heads))
    q = q[:, :, -count:]
    mask = call.mask[..., -count:, :] if isinstance(call.mask, mx.array) else call.mask
    sinks = None if call.sinks is None else call.sinks.astype(mx.float32)

    def attended(keys: mx.array, values: mx.array) -> mx.array:
        out = stock_attention(q, keys, values, scale=call.scale, mask=mask, sinks=sinks)
        return out.reshape(want.shape.kv_heads, -1, want.shape.value_dim)

    rounded = _rounded(call.keys[0, :, FIRST:end], call.values[0, :, FIRST:end], treatment, want)
    page_keys, page_values = (
        mx.concatenate([x[:, :, :FIRST], part[None], x[:, :, end:]], axis=2)
        for x, part in zip((keys, values), rounded, strict=True)
    )
    exact = attended(keys, values)
    weights = mx.eye(exact.shape[2]) if outputs is None else mx.array(outputs, mx.float32)
    changes = attended(page_keys, values) - exact, attended(keys, page_values) - exact
    costs = mx.stack([((x @ weights) * x).sum(axis=(1, 2)) for x in changes])
    return np.array(evaluated(costs), np.float64)


def _rounded(
    keys: mx.array, values: mx.array, treatment: Treatment | None, want: Wanted
) -> tuple[mx.array, mx.array]:
    """Keys and values ``[kv_heads, tokens, dim]``, whole groups, as pages give them back."""
    tokens, size = int(keys.shape[1]), PAGE_TOKENS[0]
    codec = codec_for(want.shape, size, want.precision, keys.dtype, treatment)
    fill = [(0, 0), (0, -tokens % size), (0, 0)]  # in groups of its own
    records = codec.encode(mx.pad(keys, fill), mx.pad(values, fill))
    page_keys = codec.keys(records, mx.float32).transpose(1, 0, 3, 2)
    page_values = codec.values(records, mx.float32).swapaxes(0, 1)
    heads = want.shape.kv_heads
    page_keys = page_keys.reshape(heads, -1, want.shape.key_dim)[:, :tokens]
    return page_keys, page_values.reshape(heads, -1, want.shape.value_dim)[:, :tokens]

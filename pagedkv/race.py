"""A race for each layer's treatment: all that is known is tried, on tokens none was made from.

What rounding does to attention is what counts, so that is measured: a layer's queries attend to its
keys and values as they are, and to what pages would give back. Rules for good matrices are about
second moments; layers whose channels spread otherwise (a few huge numbers, QK norms) can lose by
them what others gain. So keys and values are raced apart, without any treatment, too, and what
does not clearly beat that is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import KVShape, Precision
from pagedkv.allocator.geometry import PAGE_TOKENS
from pagedkv.allocator.precision import GROUP_TOKENS
from pagedkv.attention import stock_attention
from pagedkv.balance import turns_of
from pagedkv.covariances import FIRST, NEAR
from pagedkv.layer_weights import LayerWeights
from pagedkv.recording import AttentionCall, LastCall, Stream, measure
from pagedkv.tiers import Treatment
from pagedkv.tiers.arrays import evaluated
from pagedkv.tiers.codec import codec_for
from pagedkv.treatment_rules import balanced, is_latent, rope_of, scaled

LEAST_GAIN = 0.1
"""A treatment has to take so much of the error away: less may be chance, and it costs a product."""

QUERIES = 64
"""Of the last call, the newest."""

Floats = npt.NDArray[np.float64]


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
    nobody: Callable[[int, int], None] = lambda done, total: None  # noqa: E731
    streams = measure(model, texts, nobody)
    calls = measure(model, [others], nobody, kind=LastCall)
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


def _candidates(
    layer: Any, stream: Stream, want: Wanted, weights: LayerWeights
) -> list[tuple[Treatment, tuple[bool, bool]]]:
    """Treatments, and whether they may be used for keys and for values."""
    shape, both = want.shape, (want.keys, want.values)
    found = [(Treatment.plain(shape, "hadamard"), both)]
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
    candidates: list[tuple[Treatment, tuple[bool, bool]]],
    want: Wanted,
    outputs: Floats | None,
) -> Treatment | None:
    """The best part for keys, and the best one for values; None if neither is worth it."""
    plain = errors(call, None, want, outputs)
    best: list[tuple[float, Treatment | None]] = [(1 - LEAST_GAIN, None)] * 2
    for treatment, parts in candidates:
        for part, error in enumerate(errors(call, treatment, want, outputs)):
            # Not finite where numbers are not: whatever is compared with it does not win.
            if parts[part] and error < best[part][0] * plain[part]:
                best[part] = error / plain[part], treatment
    (keys, first), (values, second) = best
    if first is None and second is None:
        return None
    ratios = (f"{r:.2g}" for r, winner in ((keys, first), (values, second)) if winner)
    reason = f"attention errs {' and '.join(ratios)} times as much as without"
    return Treatment.joined(want.shape, first, second, reason)


def errors(
    call: AttentionCall, treatment: Treatment | None, want: Wanted, outputs: Floats | None = None
) -> tuple[float, float]:
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
        Sums of squares over heads and queries; 0 where no token is rounded.
    """
    q, keys, values = (x.astype(mx.float32) for x in (call.q, call.keys, call.values))
    count, held = min(QUERIES, int(q.shape[2])), int(keys.shape[2])
    end = FIRST + (held - count - NEAR - FIRST) // GROUP_TOKENS * GROUP_TOKENS
    if end <= FIRST:
        return 0.0, 0.0
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
    costs = mx.stack([((x @ weights) * x).sum() for x in changes])
    first, second = np.asarray(evaluated(costs)).tolist()
    return first, second


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
    both = (x.reshape(heads, -1, x.shape[3])[:, :tokens] for x in (page_keys, page_values))
    first, second = both
    return first, second

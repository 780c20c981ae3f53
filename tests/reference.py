"""Attention in float64, over pages unpacked by numpy from their bytes: independent of MLX."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from pagedkv.allocator import PageGeometry
from pagedkv.cache.persistence.snapshot import page_records
from pagedkv.calibration.moments import ALIKE, AT_ONCE, FIRST, NEAR
from pagedkv.sequence.layer import PagedLayerCache


def unpack_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """Little-endian bit stream of codes along the last axis, as MLX packs them."""
    as_bytes = words.astype("<u4").view(np.uint8).reshape(*words.shape[:-1], -1)
    stream = np.unpackbits(as_bytes, axis=-1, bitorder="little")
    codes = stream.reshape(*stream.shape[:-1], -1, bits)
    return (codes << np.arange(bits, dtype=np.uint16)).sum(axis=-1)


def page_arrays(record: np.ndarray, geometry: PageGeometry, bfloat16: bool = False):
    """Keys ``[kv_heads, tokens, key_dim]`` and values ``[kv_heads, tokens, value_dim]``."""
    raw = record.view(np.uint8)
    parts = {}
    for part in geometry.parts:
        data = raw[part.offset : part.offset + part.nbytes]
        if part.dtype == "uint32":
            parts[part.name] = data.view(np.uint32).reshape(part.shape)
        elif part.dtype == "hot" and bfloat16:
            wide = data.view(np.uint16).astype(np.uint32) << 16
            parts[part.name] = wide.view(np.float32).astype(np.float64).reshape(part.shape)
        else:
            parts[part.name] = data.view(np.float16).astype(np.float64).reshape(part.shape)
    if not geometry.precision.quantized:
        return parts["keys"].swapaxes(1, 2), parts["values"]

    def dequantize(kind: str, bits: int, group: int) -> np.ndarray:
        codes = unpack_codes(parts[f"{kind}_codes"], bits).astype(np.float64)
        scales = np.repeat(parts[f"{kind}_scales"], group, axis=-1)
        return codes * scales + np.repeat(parts[f"{kind}_biases"], group, axis=-1)

    keys = dequantize("key", geometry.precision.key_bits, 64).swapaxes(1, 2)
    values = dequantize("value", geometry.precision.value_bits, geometry.value_group)
    return keys, values[..., : geometry.shape.value_dim]


def stored(cache: PagedLayerCache) -> tuple[np.ndarray, np.ndarray]:
    """All keys and values of a layer as they are stored, float64 ``[kv_heads, tokens, dim]``.

    Of a layer with a window: those it still holds, also where no query sees them any more.
    """
    hot_keys, hot_values = (
        np.asarray(x[0].astype(mx.float32)).astype(np.float64) for x in cache._hot.view()
    )
    sinks = min(cache.sink_tokens, hot_keys.shape[1])
    keys, values = [hot_keys[:, :sinks]], [hot_values[:, :sinks]]
    bfloat16 = cache._dtype == mx.bfloat16
    for entry, record in zip(cache._table, page_records(cache), strict=True):
        geometry = cache._pager.codecs[cache._pager.pages[entry.page].precision].geometry
        k, v = page_arrays(np.array(record), geometry, bfloat16)
        keys.append(k[:, : entry.tokens])
        values.append(v[:, : entry.tokens])
    keys.append(hot_keys[:, sinks:])
    values.append(hot_values[:, sinks:])
    return np.concatenate(keys, axis=1), np.concatenate(values, axis=1)


def attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    scale: float,
    mask: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Softmax attention in float64.

    q ``[query_heads, L, key_dim]``, keys and values ``[kv_heads, n, dim]``; causal with the queries
    last unless an additive mask ``[L, n]`` is given.
    """
    repeats = q.shape[0] // keys.shape[0]
    keys, values = np.repeat(keys, repeats, axis=0), np.repeat(values, repeats, axis=0)
    scores = scale * q.astype(np.float64) @ keys.swapaxes(1, 2)
    length, n = scores.shape[1:]
    if mask is None:
        mask = np.where(np.arange(n - length, n)[:, None] >= np.arange(n), 0.0, -np.inf)
    scores = scores + mask
    peak = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        peak = np.maximum(peak, sinks[:, None, None])
    p = np.exp(scores - peak)
    total = p.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - peak)
    return (p / total) @ values


def attention_moments(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    calls: Sequence[int],
    scale: float,
    sinks: np.ndarray | None = None,
    at_once: int = AT_ONCE,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Second moments of queries and values, and query heads, by attention as balancing has them.

    Args:
        queries: ``[query_heads, tokens, dim]``.
        keys: ``[kv_heads, tokens, dim]``.
        values: ``[kv_heads, tokens, value_dim]``.
        calls: where calls of the model begin, and where the last one ends.
        scale: of scores.
        sinks: scores of nothing, one per query head.
        at_once: queries of a call, at most.
    """
    heads, share, dims = len(keys), len(queries) // len(keys), (keys.shape[2], values.shape[2])
    attending, attended = (np.zeros((heads, dim, dim)) for dim in dims)
    total = np.zeros((heads, share))
    for start, end in itertools.pairwise(calls):
        for at in range(max(start, FIRST + NEAR), end, -(-(end - start) // at_once) or 1):
            for head, query in enumerate(queries[:, at]):
                g = head // share
                scores = np.exp(scale * (keys[g, : at + 1] @ query))
                nothing = 0.0 if sinks is None else np.exp(sinks[head])
                squares = np.square(scores / (scores.sum() + nothing))[FIRST : at - NEAR + 1]
                rows = values[g, FIRST : at - NEAR + 1]
                attending[g] += squares.sum() * np.outer(query, query)
                attended[g] += (squares[:, None] * rows).T @ rows
                total[g, head % share] += squares.sum()

    def mixed(rows: np.ndarray, weighted: np.ndarray) -> np.ndarray:
        rows = rows[:, FIRST : calls[-1]].reshape(heads, -1, rows.shape[2])
        alike = rows.swapaxes(1, 2) @ rows / rows.shape[1]
        return np.asarray(ALIKE * alike + (1 - ALIKE) * weighted / total.sum(axis=1)[:, None, None])

    asks = ALIKE + (1 - ALIKE) * total / total.mean(axis=1, keepdims=True)
    return mixed(queries, attending), mixed(values, attended), asks

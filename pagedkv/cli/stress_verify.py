"""Compares what a synthetic stress run got, and what it stored, with what it must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from pagedkv.allocator import Precision
from pagedkv.cli.stress_checks import Check
from pagedkv.cli.stress_tolerance import Tolerance
from pagedkv.errors import ColdStoreError
from pagedkv.layer import PagedLayerCache
from pagedkv.stress import Array, Cursor, ExactSoftmax, SyntheticTokens
from pagedkv.tiers import LayerPager, Run


@dataclass
class Outputs:
    """What attention returned in one layer.

    Attributes:
        prefill: of the last prompt chunk, ``[query_heads, rows, head_dim]``.
        decode: of each step, ``[query_heads, 1, head_dim]``.
    """

    prefill: Array
    decode: list[Array]


def asked(tokens: SyntheticTokens, rows: int, first: int) -> Array:
    """Which needle each query head asks for in each row, ``[query_heads, rows]``.

    Every head asks for another one, and for the next one in the next row or step.
    """
    heads = np.arange(tokens.model.query_heads)[:, None]
    needles: Array = (heads + first + np.arange(rows)) % len(tokens.needles)
    return needles


def kv_heads(tokens: SyntheticTokens) -> Array:
    """The KV head that each query head reads, ``[query_heads, 1]``."""
    repeats = tokens.model.query_heads // tokens.model.kv_heads
    heads: Array = np.arange(tokens.model.query_heads)[:, None] // repeats
    return heads


def place(cache: PagedLayerCache, position: int) -> tuple[str, Precision | None]:
    """The tier of a token, and its precision (None for hot tokens)."""
    for page, tokens in cache.located_pages():
        if page.position <= position < page.position + tokens:
            return ("cold" if page.slot is None else "warm"), page.precision
    return "hot", None


class Verifier:
    """Looks at every answer and every stored token, layer by layer.

    Attributes:
        answers: check of the needles' answers.
        stored: check of the numbers in the tiers.
        reads: check of the pages that were read.
        worst: per needle, the largest error and the least cosine.
    """

    def __init__(self, tokens: SyntheticTokens) -> None:
        self._tokens = tokens
        self.answers = Check("needle answers")
        self.stored = Check("stored tokens")
        self.reads = Check("page reads")
        self._key_step = 0.0
        self.worst = [{"error": 0.0, "cosine": 1.0} for _ in tokens.needles]

    # Answers

    def check_answers(self, cache: PagedLayerCache, outputs: Outputs) -> None:
        """Compare a layer's outputs with a softmax in float64 over the original tokens."""
        tokens, layer = self._tokens, cache.layer
        prompt = tokens.options.tokens
        self._key_step = self._mean_key_step(cache)
        exact = ExactSoftmax(tokens.planted(layer).queries, tokens.model.scale)
        for start, stop in tokens.chunks:
            if start == prompt:
                self._compare(cache, exact, outputs.prefill, 0, "prefill")
            exact.add(*tokens.chunk(layer, start, stop))
            if start >= prompt:
                step = start - prompt
                self._compare(cache, exact, outputs.decode[step], step, f"decode step {step}")

    def _compare(
        self, cache: PagedLayerCache, exact: ExactSoftmax, out: Array, first: int, phase: str
    ) -> None:
        errors, cosines = self._limits(cache, exact)
        needles, heads = asked(self._tokens, out.shape[1], first), kv_heads(self._tokens)
        wanted = exact.result()[heads, needles]
        difference = np.abs(out - wanted)
        length = np.linalg.norm(out, axis=-1) * np.linalg.norm(wanted, axis=-1)
        cosine = (out * wanted).sum(axis=-1) / np.maximum(length, 1e-30)
        off = (difference / errors[heads, needles]).max(axis=-1)
        turned = (1 - cosine) / np.maximum(1 - cosines[heads, needles], 1e-6)
        for i in np.unique(needles):
            mine, worst = needles == i, self.worst[i]
            worst["error"] = max(worst["error"], float(difference[mine].max()))
            worst["cosine"] = min(worst["cosine"], float(cosine[mine].min()))
            fraction = float(np.maximum(off, turned)[mine].max())
            self.answers.see(fraction, f"layer {cache.layer}, {phase}, needle {i}")

    def _limits(self, cache: PagedLayerCache, exact: ExactSoftmax) -> tuple[Array, Array]:
        """Largest errors ``[kv_heads, needles, head_dim]`` and least cosines, without the last."""
        tokens = self._tokens
        planted = tokens.planted(cache.layer)
        others = exact.others(planted.keys)
        errors, cosines = [], []
        for i, position in enumerate(tokens.needles):
            tolerance = _tolerance(cache, place(cache, position)[1])
            leak = tolerance.leak(
                others[:, i], self._key_step, tokens.sharpness, tokens.model.scale
            )
            value = planted.values[:, i].astype(np.float32)
            error, cosine = tolerance.answer(value, leak, exact.largest)
            errors.append(error)
            cosines.append(cosine)
        return np.stack(errors, axis=1), np.stack(cosines, axis=1)

    def _mean_key_step(self, cache: PagedLayerCache) -> float:
        """Of the coarsest pages there are, measured on the first chunk."""
        present = {page.precision for page, _ in cache.located_pages()}
        coarsest = min(present, key=lambda p: p.key_bits, default=None)
        keys, _ = self._tokens.chunk(cache.layer, *self._tokens.chunks[0])
        return float(_tolerance(cache, coarsest).keys(keys.astype(np.float32)).mean())

    # Stored tokens

    def check_stored(self, cache: PagedLayerCache) -> None:
        """Read every token of a layer back, in order, whatever tier it is in."""
        view, cursor = cache.view(), Cursor(self._tokens, cache.layer)
        hot = [np.array(x[0].astype(mx.float32)) for x in (view.keys, view.values)]
        exactly = _tolerance(cache, None)
        self._see(cache, "sinks", exactly, cursor, [x[:, : view.sinks] for x in hot])
        position = view.sinks
        try:
            for run, records, _ in view.runs() if view.entries else ():
                where = f"tokens {position:,} to {position + run.tokens - 1:,}"
                stored = _decoded(_pager(cache), run, records)
                self._see(cache, where, _tolerance(cache, run.precision), cursor, stored)
                position += run.tokens
                self.reads.count += 1
        except ColdStoreError as e:  # a page that cannot be read is a finding, not the end
            self.reads.fail(str(e))
            return
        self._see(cache, "hot tokens", exactly, cursor, [x[:, view.sinks :] for x in hot])

    def _see(
        self,
        cache: PagedLayerCache,
        where: str,
        tolerance: Tolerance,
        cursor: Cursor,
        stored: Sequence[Array],
    ) -> None:
        """Compare stored keys and values, ``[kv_heads, n, head_dim]``, with the next tokens."""
        keys, values = cursor.take(stored[0].shape[1])
        if not keys.size:
            return
        limits = (tolerance.keys(keys), tolerance.values(values))
        for name, was, limit, now in zip(
            ("keys", "values"), (keys, values), limits, stored, strict=True
        ):
            worst = float((np.abs(now - was) / limit).max())
            self.stored.see(worst, f"layer {cache.layer}, {name} of {where}")


def _pager(cache: PagedLayerCache) -> LayerPager:
    pager = cache.view().pager
    assert pager is not None  # the layer holds tokens
    return pager


def _tolerance(cache: PagedLayerCache, precision: Precision | None) -> Tolerance:
    """Of tokens stored at a precision; None is hot."""
    pager = _pager(cache)
    rounding = 2.0**-8 if pager.hot_dtype == mx.bfloat16 else 2.0**-11
    if precision is None:
        return Tolerance((), rounding=rounding)
    steps = pager.precisions
    group = pager.codecs[precision].geometry.value_group
    return Tolerance(steps[: steps.index(precision) + 1], group, rounding)


def _decoded(pager: LayerPager, run: Run, records: mx.array) -> list[Array]:
    """Keys and values of a run, float32 ``[kv_heads, tokens, head_dim]``."""
    codec = pager.codecs[run.precision]
    keys: Any = codec.keys(records, mx.float32).transpose(1, 0, 3, 2)
    values: Any = codec.values(records, mx.float32).transpose(1, 0, 2, 3)
    return [np.array(x).reshape(x.shape[0], -1, x.shape[3]) for x in (keys, values)]

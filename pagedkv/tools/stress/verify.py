"""Compares what a synthetic stress run got, and what it stored, with what it must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from pagedkv.allocator import Precision
from pagedkv.errors import ColdStoreError
from pagedkv.sequence.layer import PagedLayerCache
from pagedkv.tiers import LayerPager, Page, Run
from pagedkv.tiers.arrays import evaluated
from pagedkv.tools.stress.checks import Check
from pagedkv.tools.stress.exact import Truth
from pagedkv.tools.stress.tokens import Array, SyntheticTokens
from pagedkv.tools.stress.tolerance import Tolerance


def asked(tokens: SyntheticTokens, known: Sequence[int], rows: int, first: int) -> Array:
    """Which needle each query head asks for in each row, ``[query_heads, rows]``.

    Every head asks for another one of the `known`, and for the next one in the next row or step.
    """
    heads = np.arange(tokens.model.query_heads)[:, None]
    needles: Array = np.asarray(known)[(heads + first + np.arange(rows)) % len(known)]
    return needles


def kv_heads(tokens: SyntheticTokens) -> Array:
    """The KV head that each query head reads, ``[query_heads, 1]``."""
    repeats = tokens.model.query_heads // tokens.model.kv_heads
    heads: Array = np.arange(tokens.model.query_heads)[:, None] // repeats
    return heads


def page_at(cache: PagedLayerCache, position: int) -> Page | None:
    """The page that a token lies in; None if it is hot."""
    for page, tokens in cache.located_pages():
        if page.position <= position < page.position + tokens:
            return page
    return None


def place(cache: PagedLayerCache, position: int) -> tuple[str, Precision | None]:
    """The tier of a token, and its precision (None for hot tokens)."""
    page = page_at(cache, position)
    if page is None:
        return "hot", None
    return ("cold" if page.slot is None else "warm"), page.precision


class Verifier:
    """Looks at every answer and every stored token.

    Attributes:
        answers: check of the needles' answers, against the softmax in float64.
        found: check that an answer is nearer to the needle asked for than to any other.
        stored: check of the numbers in the tiers.
        reads: check of the pages that were read.
        worst: per needle, how often it was asked for, the largest error and the least cosine.
    """

    def __init__(self, tokens: SyntheticTokens) -> None:
        self._tokens = tokens
        self.answers = Check("needle answers")
        self.found = Check("needles found")
        self.stored = Check("stored tokens")
        self.reads = Check("page reads")
        self._key_steps: dict[tuple[int, Precision | None], float] = {}
        self.worst: list[dict[str, Any]] = [
            {"asked": 0, "error": 0.0, "cosine": 1.0} for _ in tokens.needles
        ]

    # Answers

    def check_answers(
        self, cache: PagedLayerCache, truth: Truth, out: Array, needles: Array, phase: str
    ) -> None:
        """Compare what a layer answered with a softmax in float64 over the original tokens.

        Args:
            cache: the layer.
            truth: of its sequence, the tokens of this call included.
            out: ``[query_heads, rows, head_dim]``.
            needles: which one each head and row asked for, ``[query_heads, rows]``.
            phase: said where something is wrong.
        """
        tokens, heads = self._tokens, kv_heads(self._tokens)
        values = tokens.planted(cache.layer, truth.history).values.astype(np.float32)
        errors, cosines = self._limits(cache, truth, np.unique(needles))
        wanted = truth.exact(cache.layer).result()[heads, needles]
        difference = np.abs(out - wanted)
        length = np.linalg.norm(out, axis=-1) * np.linalg.norm(wanted, axis=-1)
        cosine = (out * wanted).sum(axis=-1) / np.maximum(length, 1e-30)
        off = (difference / errors[heads, needles]).max(axis=-1)
        turned = (1 - cosine) / np.maximum(1 - cosines[heads, needles], 1e-6)
        fraction = np.where(np.isnan(off + turned), np.inf, np.maximum(off, turned))
        apart = ((out[:, :, None] - values[heads]) ** 2).sum(axis=-1)  # [heads, rows, needles]
        nearest = apart.argmin(axis=-1)
        for i in np.unique(needles):
            mine, worst = needles == i, self.worst[i]
            worst["asked"] += int(mine.sum())
            worst["error"] = max(worst["error"], float(difference[mine].max()))
            worst["cosine"] = min(worst["cosine"], float(cosine[mine].min()))
            where = f"layer {cache.layer}, {phase}, needle {i}"
            self.answers.see(float(fraction[mine].max()), where)
            right = bool((nearest[mine] == i).all()) and bool(np.isfinite(out[mine]).all())
            self.found.hold(right, f"{where}: the answer is another needle's value")

    def _limits(self, cache: PagedLayerCache, truth: Truth, needles: Array) -> tuple[Array, Array]:
        """Largest errors ``[kv_heads, needles, head_dim]`` and least cosines, without the last."""
        tokens, exact = self._tokens, truth.exact(cache.layer)
        planted = tokens.planted(cache.layer, truth.history)
        others, key_step = exact.others(planted.keys), self._mean_key_step(cache)
        errors = np.ones(planted.values.shape)
        cosines = np.zeros(planted.values.shape[:2])
        for i in needles:
            tolerance = _tolerance(cache, place(cache, tokens.needles[i])[1])
            leak = tolerance.leak(others[:, i], key_step, tokens.sharpness, tokens.model.scale)
            value = planted.values[:, i].astype(np.float32)
            errors[:, i], cosines[:, i] = tolerance.answer(value, leak, exact.largest)
        return errors, cosines

    def _mean_key_step(self, cache: PagedLayerCache) -> float:
        """Of the coarsest precision that pages may have, measured on random numbers."""
        pager = _pager(cache)
        coarsest = min(pager.precisions, key=lambda p: p.key_bits) if len(pager.pages) else None
        key = (cache.layer, coarsest)
        if key not in self._key_steps:
            m = self._tokens.model
            keys = np.random.default_rng(0).standard_normal((m.kv_heads, 1024, m.head_dim))
            self._key_steps[key] = float(_tolerance(cache, coarsest).keys(keys).mean())
        return self._key_steps[key]

    # Stored tokens

    def check_stored(self, cache: PagedLayerCache, truth: Truth) -> None:
        """Read every token of a layer back, in order, whatever tier it is in."""
        view = cache.view()
        hot = [np.array(evaluated(x[0].astype(mx.float32))) for x in (view.keys, view.values)]
        self._see_hot(cache, truth, 0, [x[:, : view.sinks] for x in hot])
        position = view.sinks
        try:
            for run, records, _ in view.runs() if view.entries else ():
                self._see_run(cache, truth, position, run, records)
                position += run.tokens
                self.reads.count += 1
        except ColdStoreError as e:  # a page that cannot be read is a finding, not the end
            self.reads.fail(str(e))
            return
        self._see_hot(cache, truth, position, [x[:, view.sinks :] for x in hot])

    def _see_hot(
        self, cache: PagedLayerCache, truth: Truth, start: int, stored: Sequence[Array]
    ) -> None:
        """Compare hot keys and values with the tokens from `start` on."""
        stop = start + stored[0].shape[1]
        if start < stop:
            wanted = self._tokens.read(cache.layer, truth.history, start, stop)
            where = f"hot tokens {start:,} to {stop - 1:,}"
            self._see(cache, where, _tolerance(cache, None), wanted, wanted, stored)

    def _see_run(
        self, cache: PagedLayerCache, truth: Truth, position: int, run: Run, records: mx.array
    ) -> None:
        """Compare the pages of a run: neighbours that are full at once, those cut into alone."""
        pager, layer = _pager(cache), cache.layer
        keys, values = _decoded(pager, run, records)  # [pages, kv_heads, tokens, head_dim]
        full, i = pager.page_tokens, 0
        while i < len(run.entries):
            stop = i + 1
            if run.entries[i].tokens == full:
                while stop < len(run.entries) and run.entries[stop].tokens == full:
                    stop += 1
            tokens = sum(e.tokens for e in run.entries[i:stop])
            wanted = self._tokens.read(layer, truth.history, position, position + tokens)
            sealed = wanted
            if tokens < full:
                # The whole page as it was sealed; the tokens beyond are no longer counted.
                history = truth.sealed.get(position, truth.history)
                sealed = self._tokens.read(layer, history, position, position + full)
            stored = [np.concatenate(list(x[i:stop]), axis=1)[:, :tokens] for x in (keys, values)]
            where = f"tokens {position:,} to {position + tokens - 1:,}"
            self._see(cache, where, _tolerance(cache, run.precision), sealed, wanted, stored)
            position, i = position + tokens, stop

    def _see(
        self,
        cache: PagedLayerCache,
        where: str,
        tolerance: Tolerance,
        sealed: Sequence[Array],
        wanted: Sequence[Array],
        stored: Sequence[Array],
    ) -> None:
        """Compare stored keys and values with what they must be, ``[kv_heads, n, head_dim]``."""
        count = wanted[0].shape[1]
        limit_of = (tolerance.keys, tolerance.values)
        for name, limits, was, wants, has in zip(
            ("keys", "values"), limit_of, sealed, wanted, stored, strict=True
        ):
            limit = limits(was.astype(np.float32))[:, :count]
            worst = float((np.abs(has - wants.astype(np.float32)) / limit).max())
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


def _decoded(pager: LayerPager, run: Run, records: mx.array) -> tuple[Array, Array]:
    """Keys and values of a run, float32 ``[pages, kv_heads, tokens, head_dim]``."""
    codec = pager.codecs[run.precision]
    keys = codec.keys(records, mx.float32).swapaxes(2, 3)
    values = codec.values(records, mx.float32)
    return np.array(evaluated(keys)), np.array(evaluated(values))

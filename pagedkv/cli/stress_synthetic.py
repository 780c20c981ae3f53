"""A stress run of the cache alone: random keys and values, planted needles, known answers."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import numpy as np

from pagedkv.allocator import KVShape
from pagedkv.cache import PagedCache, attention
from pagedkv.cli.loading import has_gpu
from pagedkv.cli.plan import require_room
from pagedkv.cli.stress_checks import BudgetWatch, Check, StressReport, Watch, check_books
from pagedkv.cli.stress_verify import Outputs, Verifier, asked, kv_heads, place
from pagedkv.config import TierConfig
from pagedkv.errors import ColdStoreError
from pagedkv.layer import PagedLayerCache
from pagedkv.stress import Array, StressOptions, SyntheticModel, SyntheticTokens


class SyntheticStress:
    """One run: `feed`, `decode`, `verify`, `report`; or `run` for all of them.

    Attributes:
        cache: that is driven.
        tokens: what is fed to it.
    """

    def __init__(
        self,
        model: SyntheticModel,
        options: StressOptions,
        config: TierConfig,
        watch: Watch = lambda *_: None,
        name: str = "synthetic",
    ) -> None:
        """Open the tiers.

        Args:
            model: its shape.
            options: tokens, needles, seed.
            config: tiers.
            watch: called often, for a progress line.
            name: of the model, in the report.

        Raises:
            ConfigError: if the budgets cannot hold that many tokens.
        """
        shape = KVShape(model.kv_heads, model.head_dim, model.head_dim)
        require_room(shape, model.layers, options.tokens + options.needles, config)
        self.model, self.options = model, options
        self.tokens = SyntheticTokens(model, options)
        self.cache = PagedCache.standalone(model.layers, config)
        self._name, self._watch = name, watch
        self._budgets = BudgetWatch(self.cache)
        self._books = Check("bookkeeping")
        self._verifier = Verifier(self.tokens)
        self._outputs = [Outputs(np.empty(0), []) for _ in self.cache]
        self._seconds: dict[str, float] = {}

    def feed(self) -> None:
        """Append the prompt chunk by chunk, attending as a model would."""
        started = time.perf_counter()
        end = self.options.tokens
        for i, (start, stop) in enumerate(c for c in self.tokens.chunks if c[1] <= end):
            attends = stop == end or i % self.options.attend_every == 0
            for cache in self.cache:
                keys, values = self._arrays(cache.layer, start, stop)
                if attends:
                    rows = min(self.options.queries, stop - start)
                    out = self._attend(cache, keys, values, rows, first=0)
                    self._outputs[cache.layer].prefill = out
                else:
                    cache.append(keys, values)
                self._budgets.sample()
            check_books(self.cache, stop, self._books)
            self._watch("prefill", stop, end, self._budgets.note())
        self._seconds["prefill"] = time.perf_counter() - started

    def decode(self) -> None:
        """Append one token per needle; every head asks for another needle each time."""
        started = time.perf_counter()
        steps = [c for c in self.tokens.chunks if c[0] >= self.options.tokens]
        for i, (start, stop) in enumerate(steps):
            for cache in self.cache:
                keys, values = self._arrays(cache.layer, start, stop)
                out = self._attend(cache, keys, values, 1, first=i)
                self._outputs[cache.layer].decode.append(out)
                self._budgets.sample()
            self._watch("decode", i + 1, len(steps), self._budgets.note())
        self._seconds["decode"] = time.perf_counter() - started

    def _arrays(self, layer: int, start: int, stop: int) -> tuple[mx.array, mx.array]:
        keys, values = self.tokens.chunk(layer, start, stop)
        return mx.array(keys[None]), mx.array(values[None])

    def _attend(
        self, cache: PagedLayerCache, keys: mx.array, values: mx.array, rows: int, first: int
    ) -> Array:
        """Append tokens, and let the last `rows` of them ask for needles."""
        needles = asked(self.tokens, rows, first)
        q = self.tokens.planted(cache.layer).queries[kv_heads(self.tokens), needles]
        # Matrix products in 16 bit are slow on a CPU.
        queries = mx.array(q[None]).astype(mx.float16 if has_gpu() else mx.float32)
        out = attention(queries, keys, values, cache=cache, scale=self.model.scale)
        return np.array(out[0].astype(mx.float32))

    def verify(self) -> None:
        """Compare every answer, and every stored token, with what they must be."""
        started = time.perf_counter()
        check_books(self.cache, self.options.tokens + self.options.needles, self._books)
        for cache in self.cache:
            self._verifier.check_answers(cache, self._outputs[cache.layer])
            self._verifier.check_stored(cache)
            self._budgets.sample()
            self._watch("verify", cache.layer + 1, self.model.layers, "")
        self._seconds["verify"] = time.perf_counter() - started

    def run(self) -> StressReport:
        """Feed, decode, verify and close.

        Raises:
            OutOfPagesError: if a tier fills up for another reason than its budget.
        """
        try:
            try:
                self.feed()
                self.decode()
                self.verify()
            except ColdStoreError as e:  # a page that cannot be read is a finding
                self._verifier.reads.fail(str(e))
            return self.report()
        finally:
            self.cache.close()

    def report(self) -> StressReport:
        """What was found so far."""
        found = self._verifier
        if not found.reads.count:
            found.reads.skipped = "no token left the hot window"
        return StressReport(
            self._name,
            self.options.tokens,
            [found.answers, found.stored, self._budgets.check, self._books, found.reads],
            self._seconds,
            self._budgets.peaks,
            self._budgets.budgets,
            self.cache.stats(),
            [self._needle(i) for i in range(self.options.needles)],
        )

    def _needle(self, i: int) -> dict[str, Any]:
        position = self.tokens.needles[i]
        tier, precision = place(self.cache[0], position)
        kept = str(precision) if precision else "16 bit"
        return {"token": position, "tier": tier, "precision": kept, **self._verifier.worst[i]}

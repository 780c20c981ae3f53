"""A stress run of the cache alone: random keys and values, planted needles, known answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pagedkv.allocator import KVShape
from pagedkv.cache.paged_cache import PagedCache
from pagedkv.config.planner import plan, require_room
from pagedkv.config.tier_config import TierConfig
from pagedkv.errors import ColdStoreError, ConfigError, OutOfPagesError, PagedKVError
from pagedkv.sequence.layer import PagedLayerCache
from pagedkv.tiers.pages.layer_pager import RUN_TOKENS
from pagedkv.tools.stress import operations
from pagedkv.tools.stress.checks import Check, check_books
from pagedkv.tools.stress.exact import Truth
from pagedkv.tools.stress.faults import Faults
from pagedkv.tools.stress.folder import STORE, run_folder
from pagedkv.tools.stress.memory import SLACK, Memory, allowance
from pagedkv.tools.stress.options import StressOptions, schedule
from pagedkv.tools.stress.report import Latencies, Status, StressReport, Watch, ignore
from pagedkv.tools.stress.sequence import Sequence, append, ask, open_cache, questions
from pagedkv.tools.stress.tokens import SyntheticModel, SyntheticTokens
from pagedkv.tools.stress.verify import Verifier, place

T = TypeVar("T")

_CHUNK_BYTES = 20  # of memory per number of a chunk: 16 bit twice or thrice, and float64
_RUN_BYTES = 36  # per number of a run that is read back: float32, some of it several times
_PAGE_BYTES = 2048  # of Python's memory for one page: its places, its identity, its table entry


class SyntheticStress:
    """One run: `feed`, `decode`, `verify`, `report`; or `run` for all of them.

    Attributes:
        tokens: what is fed.
        main: the sequence that grows.
        open: every sequence there is: `main`, and its fork while there is one.
        memory: what is taken, and what may be.
        faults: of the disk, and what became of them.
        verifier: of answers and stored tokens.
        rng: for what the operations do.
        done: how often each operation was done.
        notes: what was left out, and why.
    """

    def __init__(
        self,
        model: SyntheticModel,
        options: StressOptions,
        config: TierConfig,
        watch: Watch = ignore,
        name: str = "synthetic",
    ) -> None:
        """Open the tiers.

        Args:
            model: its shape.
            options: tokens, needles, seed, operations.
            config: tiers.
            watch: called often, for a progress line.
            name: of the model, in the report.

        Raises:
            ConfigError: if the budgets cannot hold that many tokens.
        """
        shape = KVShape(model.kv_heads, model.head_dim, model.head_dim)
        config = config.without_model
        require_room(shape, model.layers, options.tokens + options.needles, config)
        if options.ops.get("kill") and not config.budget().cold_bytes:
            raise ConfigError("a killed process can only be resumed from disk: leave out kill")
        self.model, self.options, self._name, self._watch = model, options, name, watch
        self.tokens = SyntheticTokens(model, options)
        self.rng = np.random.default_rng([options.seed, 5])
        self._home = run_folder(config.cold_dir)
        self.folder = Path(self._home.name)
        # A store that lasts, where one is needed, is this run's alone. Files that are saved lie
        # beside it: what a store does not know of takes room from its pages.
        self.config = replace(config, cold_dir=str(self.folder / STORE))
        page_tokens = plan(shape, model.layers, options.tokens, config).page_tokens
        pages = model.layers * -(-options.most_tokens // page_tokens)
        self.faults = Faults(options.seed, options.faults, pages)
        self.verifier = Verifier(self.tokens)
        self.latencies = Latencies()
        self.books = Check("bookkeeping")
        self.saves, self.resumes = Check("saved and loaded"), Check("killed and resumed")
        self.done: dict[str, int] = {}
        self.notes: list[str] = []
        self._seconds: dict[str, float] = {}
        try:
            self.main = Sequence(self.reopen(), Truth(self.tokens))
            self.open = [self.main]
            self.memory = Memory(
                self.main.cache, self._limits(page_tokens, pages), options.sample_seconds
            )
        except BaseException:
            self._home.cleanup()
            raise

    def _limits(self, page_tokens: int, pages: int) -> dict[str, int]:
        """What memory may be taken beyond what the process had at the start, part by part."""
        m, o = self.model, self.options
        limits = allowance(
            self.config.budget(), m.layers, 2 * m.token_numbers, page_tokens, o.chunk
        )
        known = Truth.memory_bytes(m.layers, m.kv_heads, o.needles, m.head_dim)
        attended = limits["scratch"] + limits["attention temporaries"]
        read_back = RUN_TOKENS * m.token_numbers * _RUN_BYTES
        return {
            **limits,
            "page tables": pages * _PAGE_BYTES,
            "tokens being made": o.chunk * m.token_numbers * _CHUNK_BYTES,
            "exact answers": 2 * known,
            "reading back, beyond attention": max(0, read_back - attended),
            "allocator slack": SLACK,
        }

    def reopen(self) -> PagedCache:
        """An empty cache over this run's store."""
        with self.faults.quietly():
            return open_cache(self.model.layers, self.config, self.faults.disk)

    def close(self, cache: PagedCache) -> None:
        """Close the last cache of its pager, and keep count of its traffic."""
        self.memory.traffic.add(cache)
        with self.faults.quietly():
            cache.close()

    # Steps

    def step(self, seq: Sequence, stop: int, rows: int, kind: str, first: int = 0) -> None:
        """Append tokens up to `stop` to every layer, and check what is answered.

        Args:
            seq: the sequence.
            stop: its length afterwards.
            rows: query tokens at the end that ask for needles; 0 appends only.
            kind: of step, for the latencies and in what is found.
            first: shifts which needle is asked for.
        """
        start, spent = seq.cache.offset, 0.0

        def call() -> None:
            nonlocal spent
            spent = sum(
                self._layer_step(seq, cache, start, stop, rows, kind, first)
                for cache in seq.cache.paged_layers
            )

        self.survive(seq, call, start)
        self.latencies.add(kind, stop, spent)
        self.report_progress(seq)

    def _layer_step(
        self,
        seq: Sequence,
        cache: PagedLayerCache,
        start: int,
        stop: int,
        rows: int,
        kind: str,
        first: int,
    ) -> float:
        """One layer's part; returns the seconds that the cache took."""
        truth = seq.truth
        keys, values = self.tokens.read(cache.layer, truth.history, start, stop)
        began = time.perf_counter()
        if rows:
            needles, there = questions(self.tokens, stop, rows, first)
            out = ask(self.tokens, cache, keys, values, needles)
        else:
            append(self.tokens, cache, truth.history, start, stop, (keys, values))
        spent = time.perf_counter() - began
        truth.extend(cache.layer, start, keys, values)
        if rows and there:
            where = f"{kind} at {stop:,} tokens"
            self.verifier.check_answers(cache, truth, out, needles, where)
        self.memory.look(stop)
        return spent

    def survive(self, seq: Sequence, call: Callable[[], T], length: int | None = None) -> T:
        """Make a call again while the disk fails; see `Faults.survive`.

        Args:
            seq: the sequence that it works on.
            call: to be made.
            length: that the sequence must have after a failure.
        """

        def check() -> None:
            lengths = {cache.offset for cache in seq.cache.paged_layers}
            self.books.hold(
                length is None or lengths == {length},
                f"after a failed call the layers hold {sorted(lengths)} tokens and not {length}",
            )

        return self.faults.survive(call, lambda: self.repair(seq), check)

    def repair(self, seq: Sequence) -> None:
        """Make damaged pages again, from their tokens."""
        while (at := self.faults.damaged(seq.cache)) is not None:
            length = seq.cache.offset
            seq.cache.trim(length - at)
            seq.truth.forget_pages(at)
            with self.faults.quietly():
                for start in range(at, length, self.options.chunk):
                    stop = min(start + self.options.chunk, length)
                    for cache in seq.cache.paged_layers:
                        append(self.tokens, cache, seq.truth.history, start, stop)

    def report_progress(self, seq: Sequence, phase: str = "feeding") -> None:
        """Tell the watcher where things stand."""
        taken, traffic = self.memory.taken(), self.memory.traffic.of(seq.cache)
        latest = self.memory.look(seq.cache.offset)
        self._watch(
            Status(
                phase,
                self.main.cache.offset,
                self.options.tokens + self.options.needles,
                {t: (taken[t], self.memory.budgets[t]) for t in ("warm", "cold")},
                traffic.read,
                traffic.written,
                latest["process"],
                self.memory.allowed,
                latest["mlx_active"],
            )
        )

    def check_books(self) -> None:
        """Offsets, pages, slots and references of every sequence."""
        for seq in self.open:
            others = [other.cache for other in self.open if other is not seq]
            check_books([seq.cache, *others], seq.truth.length, self.books)

    # Phases

    def feed(self) -> None:
        """Grow to the length asked for, with the operations where the schedule has them."""
        started, o = time.perf_counter(), self.options
        events, chunks = schedule(o), 0
        while True:
            length = self.main.cache.offset
            if events and events[0][0] <= length:
                _, name = events.pop(0)
                operations.DO[name](self)
                self.done[name] = self.done.get(name, 0) + 1
                self.check_books()
                continue
            if length >= o.tokens:
                break
            stop = min(length + o.chunk, o.tokens, events[0][0] if events else o.tokens)
            attends = stop == o.tokens or chunks % o.attends_every == 0
            rows = min(o.queries, stop - length) if attends else 0
            self.step(self.main, stop, rows, "prefill, attending" if attends else "prefill")
            self.done["prefill"] = self.done.get("prefill", 0) + 1
            if attends:
                self.check_books()
            chunks += 1
        self._seconds["feed"] = time.perf_counter() - started

    def decode(self) -> None:
        """Append one token per needle; every head asks for another needle each time."""
        started = time.perf_counter()
        for i in range(self.options.needles):
            self.step(self.main, self.main.cache.offset + 1, 1, "decode", first=i)
        self._seconds["decode"] = time.perf_counter() - started

    def verify(self) -> None:
        """Compare every stored token with what it must be."""
        started = time.perf_counter()
        wanted = self.options.tokens + self.options.needles
        self.books.hold(
            self.main.truth.length == wanted, f"{self.main.truth.length:,} of {wanted:,} were fed"
        )
        if self.faults.enabled:
            self.repair(self.main)
        with self.faults.quietly():
            self.check_books()
            for cache in self.main.cache.paged_layers:
                self.verifier.check_stored(cache, self.main.truth)
                self.report_progress(self.main, f"reading back layer {cache.layer}")
        self._seconds["verify"] = time.perf_counter() - started

    def run(self) -> StressReport:
        """Feed, decode, verify and close; what ends the run early is a finding."""
        try:
            try:
                self.feed()
                self.decode()
                self.verify()
            except (ColdStoreError, OutOfPagesError) as e:
                self.verifier.reads.fail(str(e))
            except PagedKVError as e:
                self.books.fail(f"the run ended early: {e}")
            return self.report()
        finally:
            self.finish()

    def finish(self) -> None:
        """Close everything, and remove this run's files."""
        self.memory.finish(self.main.cache.offset)
        for seq in self.open:
            seq.cache.close()
        self._home.cleanup()

    def report(self) -> StressReport:
        """What was found so far."""
        self.memory.finish(self.main.cache.offset)
        found = self.verifier
        if not found.reads.count:
            found.reads.skipped = "no token left the hot window"
        checks = [found.answers, found.found, found.stored, self.memory.tiers]
        checks += [self.memory.process, self.books, found.reads]
        if self.saves.count:
            checks.append(self.saves)
        if self.resumes.count:
            checks.append(self.resumes)
        if self.faults.enabled:
            checks.append(self.faults.check)
        return StressReport(
            self._name,
            self.model.describe(),
            self.options.tokens,
            checks,
            self._seconds,
            self.memory,
            self.memory.stats(),
            self.latencies,
            self.done,
            self.notes,
            [self._needle(i) for i in range(self.options.needles)],
            self.faults.to_dict(),
        )

    def _needle(self, i: int) -> dict[str, Any]:
        position = self.tokens.needles[i]
        tier, precision = place(self.main.cache[0], position)
        kept = str(precision) if precision else "16 bit"
        return {"token": position, "tier": tier, "precision": kept, **self.verifier.worst[i]}

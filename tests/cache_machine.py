"""A state machine over whole caches: tokens in, attention and tokens out, restarts between.

Slower than `tests/pager_machine.py` and above it: here pages are sealed by the hot window,
lowered by the ladder, saved to files and resumed. The oracle is the list of tokens that each
sequence holds; keys and values follow from a token's number alone.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import ClassVar
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import pagedkv
from pagedkv.cache.persistence import snapshot as state
from pagedkv.tiers import RealDisk
from tests.pager_life import where
from tests.pager_machine import NUMBER
from tests.pager_oracle import traffic
from tests.seeded_workers import ScheduledDisk, SeededWorkers
from tests.store_oracle import Violation

LAYERS, DIM = 2, 32
SINKS, WINDOW = 4, 32
LADDERS = ("fp16", "fp16:400,K8V8")
ROUNDING = {"fp16": 0.0, "fp16:400,K8V8": 0.06}
"""How far a stored number may be from the one that was given: half a step of 8 bits."""
TABLE = np.random.default_rng(0).standard_normal((1 << 15, DIM)).astype(np.float16)
MAX_SEQUENCES = 3
ERRORS = ("eio_read", "eio_write", "enospc", "fsync", "rename", "short_read", "short_write")


def numbers(kind: int, layer: int, tokens: list[int]) -> np.ndarray:
    """Queries, keys or values of these tokens, ``[tokens, DIM]``."""
    return TABLE[(np.array(tokens, int) * 7 + kind * 977 + layer * 4111) % len(TABLE)]


def given(kind: int, layer: int, tokens: list[int]) -> mx.array:
    return mx.array(numbers(kind, layer, tokens))[None, None]


def attended(layer: int, tokens: list[int]) -> np.ndarray:
    """What the last token sees, in double precision."""
    q, k, v = (numbers(kind, layer, tokens).astype(float) for kind in range(3))
    scores = k @ q[-1] * DIM**-0.5
    weights = np.exp(scores - scores.max())
    return weights @ v / weights.sum()


class CacheMachine(RuleBasedStateMachine):
    """Sequences of one model, several processes long.

    Attributes:
        counts: steps so far by rule, of all examples.
        seen: what else happened, of all examples.
    """

    counts: ClassVar[Counter[str]] = Counter()
    seen: ClassVar[Counter[str]] = Counter()

    @initialize(seed=st.integers(0, 2**32 - 1), kv=st.sampled_from(LADDERS))
    def begin(self, seed: int, kv: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="pagedkv-machine-", dir=where()))
        self.workers = SeededWorkers(seed)
        self.disk = ScheduledDisk(RealDisk(), seed)
        self.disk.workers = self.workers
        self.config = pagedkv.TierConfig(
            hot_tokens=WINDOW, sink_tokens=SINKS, kv=kv, page_tokens=256, warm="330KB",
            cold="1800KB", cold_dir=str(self.directory / "cold"), staging="512KiB",
            write_buffer=3 * 32768, backend="dequantize",
        )  # fmt: skip
        self.rounding = ROUNDING[kv]
        self.caches: list[tuple[pagedkv.PagedCache, list[int]]] = []
        self.stored: dict[str, dict[bytes, list[int]]] = {}  # by name and by what the file holds
        self.tokens = self.names = 0
        self.open()

    def open(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(patch("pagedkv.tiers.pager.RealDisk", lambda: self.disk))
            stack.enter_context(patch("pagedkv.tiers.pager.ThreadWorkers", lambda: self.workers))
            stack.enter_context(self.disk.quietly())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            self.root = pagedkv.PagedCache.standalone(LAYERS, self.config, model="machine")
        self.pager = self.root.context.pager
        self.damaged: set[tuple[str, int]] = set()
        self.faulty, self.age = False, 0
        assert self.pager.cold is not None

    def teardown(self) -> None:
        if not hasattr(self, "root"):
            return
        try:
            with self.disk.quietly():
                for cache, tokens in list(self.caches):
                    self.compare(cache, tokens)
        finally:
            self.disk.dead = True
            with suppress(Exception):
                self.end()
            self.seen.update(self.workers.seen)
            shutil.rmtree(self.directory, ignore_errors=True)

    def end(self) -> None:
        self.seen.update(traffic(self.pager))
        for cache in (*(c for c, _ in self.caches), self.root):
            cache.close()
        self.workers.finish()
        self.caches.clear()

    # Steps

    @rule(pick=NUMBER, count=st.integers(9, 700))
    def prefill(self, pick: int, count: int) -> None:
        self.extend(*self.chosen(pick, new=pick % 3 == 0), count)
        self.done("prefill")

    @rule(pick=NUMBER, count=st.integers(1, 8))
    def decode(self, pick: int, count: int) -> None:
        self.extend(*self.chosen(pick), count)
        self.done("decode")

    @rule(pick=NUMBER)
    def step(self, pick: int) -> None:
        for _ in range(3):
            self.extend(*self.chosen(pick), 1)
        self.done("three steps")

    @rule(pick=NUMBER, count=st.integers(1, 800))
    def trim(self, pick: int, count: int) -> None:
        cache, tokens = self.chosen(pick)
        if (dropped := cache.trim(count)) != min(count, len(tokens)):
            raise Violation(f"{dropped} of {len(tokens)} tokens were trimmed, not {count}")
        del tokens[max(0, len(tokens) - count) :]
        self.done("trim")

    @rule(pick=NUMBER)
    def fork(self, pick: int) -> None:
        self.make_room(pick)
        cache, tokens = self.chosen(pick)
        self.add(cache.fork(), list(tokens))
        self.done("fork")

    @precondition(lambda self: len(self.caches) > 1)
    @rule(pick=NUMBER)
    def close(self, pick: int) -> None:
        self.drop(self.chosen(pick)[0])
        self.done("close")

    @rule(pick=NUMBER)
    def save_and_load(self, pick: int) -> None:
        cache, tokens = self.chosen(pick)
        path = self.directory / "saved.safetensors"
        with self.may_fail():
            cache.save(str(path))
            self.make_room(pick)
            twin = self.add(self.root.fork(), [])
            try:
                for layer, saved in zip(twin, state.load_states(path), strict=True):
                    state.restore(layer, state.parse_meta(saved), saved)
            except BaseException:
                self.drop(twin)
                raise
            self.caches[-1][1][:] = tokens
        self.done("save and load")

    @rule(pick=NUMBER)
    def flush(self, pick: int) -> None:
        cache, tokens = self.chosen(pick)
        name = cache.context.sequence_id
        if name not in self.stored and len(self.stored) > 2:
            self.forget(next(iter(self.stored)))
        place = self.checkpoint(name)
        before = place.read_bytes() if place.exists() else None
        with self.may_fail():
            cache.flush("power" if pick % 4 == 0 else None)
        if place.exists() and (after := place.read_bytes()) != before:
            self.stored.setdefault(name, {})[after] = list(tokens)
        self.done("flush")

    @rule(kind=st.sampled_from(ERRORS), after=st.integers(0, 6))
    def arm(self, kind: str, after: int) -> None:
        self.disk.arm(kind, after)
        self.done(f"fault: {kind}")

    @precondition(lambda self: self.age > 8)
    @rule(pick=NUMBER, kind=st.sampled_from(("flip", "zero", "swap", "checkpoint")))
    def corrupt(self, pick: int, kind: str) -> None:
        random = Random(pick)
        pattern = "*.checkpoint" if kind == "checkpoint" else "*.kv"
        files = sorted(p for p in self.pager.cold.directory.glob(pattern) if p.stat().st_size)
        if not files:
            return
        path = random.choice(files)
        data = bytearray(path.read_bytes())
        if kind == "checkpoint":
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        else:
            unit = int(path.stem.rpartition("-")[2][:-1]) << 10
            a, b = (random.randrange(len(data) // unit) for _ in range(2))
            old, other = (bytes(data[i * unit : (i + 1) * unit]) for i in (a, b))
            if kind == "flip":
                data[a * unit + random.randrange(4096)] ^= 1 << random.randrange(8)
            elif kind == "zero":
                data[a * unit : (a + 1) * unit] = bytes(unit)
            else:
                data[a * unit : (a + 1) * unit] = other
                data[b * unit : (b + 1) * unit] = old
            self.damaged |= {(path.name, a), (path.name, b)}
        with path.open("r+b") as f:
            f.write(data)
        self.done(f"corrupt: {kind}")

    @precondition(lambda self: self.age > 8)
    @rule(killed=st.booleans())
    def reopen(self, killed: bool) -> None:
        """The process ends, by itself or not; another one finds what was flushed, and only that."""
        damaged = self.damaged
        self.disk.disarm()
        self.disk.dead = killed
        self.end()
        self.disk.dead = False
        self.open()
        self.damaged = damaged
        with self.disk.quietly():
            self.find_what_was_flushed()
        self.done("crash" if killed else "close and open")

    def find_what_was_flushed(self) -> None:
        checkpoints = self.pager.cold.sequences.checkpoints
        names = {s.sequence for s in checkpoints.stored()} | set(checkpoints.damaged)
        if names != self.stored.keys():
            raise Violation(f"the store knows {names}, flushed were {set(self.stored)}")
        for name, known in list(self.stored.items()):
            tokens = known.get(self.checkpoint(name).read_bytes())
            cache = self.add(self.root.fork(), [])
            try:
                cache.resume(name)
            except pagedkv.CorruptStoreError as e:
                if tokens is not None:
                    raise Violation(f"the checkpoint of {name} is whole: {e}") from e
                self.seen["damaged checkpoint"] += 1
                self.drop(cache)
                self.forget(name)
                continue
            if tokens is None:
                raise Violation(f"the checkpoint of {name} was changed, and nobody says so")
            self.caches[-1][1][:] = tokens
            self.compare(cache, self.caches[-1][1])
        while len(self.caches) > MAX_SEQUENCES:
            self.drop(self.caches[0][0])

    # What must be so after every step

    def done(self, step: str) -> None:
        self.counts[step] += 1
        self.age += 1
        self.workers.switch()
        self.take_note()
        for cache, tokens in self.caches:
            if [layer.offset for layer in cache] != [len(tokens)] * LAYERS:
                raise Violation(f"{[layer.offset for layer in cache]} tokens, not {len(tokens)}")
        for number, pager in enumerate(self.pager.layer_pagers):
            pager.check([c[number]._table for c, _ in self.caches if c[number]._table is not None])
        cold, budget = self.pager.cold, self.pager.budget
        cold.check()
        if cold.nbytes > budget.cold_bytes or cold.buffer_bytes > budget.write_buffer_bytes:
            raise Violation(f"{cold.nbytes:,} on disk, {cold.buffer_bytes:,} in buffers")
        if self.caches:
            self.compare(*self.caches[self.age % len(self.caches)])

    def compare(self, cache: pagedkv.PagedCache, tokens: list[int]) -> None:
        """Every key and value that the cache holds with those that it was given."""
        if not tokens:
            return
        for i, layer in enumerate(cache):
            try:
                dense = [np.asarray(a)[0, 0] for a in layer.view().dense(layer._dtype)]
            except pagedkv.ColdStoreError as e:
                self.excuse(e)
                self.drop(cache)  # as a user would: the text is read again
                return
            for kind, got in enumerate(dense, 1):
                want = numbers(kind, i, tokens).astype(float)
                if got.shape != want.shape or np.abs(got - want).max() > self.rounding:
                    raise Violation(f"layer {i} holds other tokens than it was given")
                hot = layer._hot.used - min(SINKS, layer._hot.used)
                for part in (slice(0, SINKS), slice(len(tokens) - hot, None)):
                    if not np.array_equal(got[part], want[part].astype(got.dtype)):
                        raise Violation(f"layer {i}: hot tokens are not the very bits")

    # Help

    def extend(self, cache: pagedkv.PagedCache, tokens: list[int], count: int) -> None:
        """Append tokens to every layer and attend; an error must leave the cache as it was."""
        new = list(range(self.tokens, self.tokens + count))
        self.tokens += count
        outs: list[mx.array] = []
        with self.may_fail():
            for i, layer in enumerate(cache):
                q, k, v = (given(kind, i, new) for kind in range(3))
                outs.append(pagedkv.attention(q, k, v, cache=layer, scale=DIM**-0.5))
                mx.eval(outs)
            tokens += new
        if len(outs) < LAYERS:
            return
        for i, out in enumerate(outs):
            wrong = np.abs(np.asarray(out)[0, 0, -1] - attended(i, tokens)).max()
            if not wrong <= 0.01 + self.rounding:
                raise Violation(f"layer {i}: attention is off by {wrong}")

    def chosen(self, pick: int, new: bool = False) -> tuple[pagedkv.PagedCache, list[int]]:
        if not self.caches or (new and len(self.caches) < MAX_SEQUENCES):
            self.add(self.root.fork(), [])
            return self.caches[-1]
        return self.caches[pick // 7 % len(self.caches)]

    def add(self, cache: pagedkv.PagedCache, tokens: list[int]) -> pagedkv.PagedCache:
        self.names += 1
        cache.context.sequence_id = f"{self.names:016x}"
        self.caches.append((cache, tokens))
        return cache

    def make_room(self, pick: int) -> None:
        if len(self.caches) >= MAX_SEQUENCES:
            self.drop(self.caches[(pick // 7 + 1) % len(self.caches)][0])

    def drop(self, cache: pagedkv.PagedCache) -> None:
        cache.close()
        self.caches[:] = [item for item in self.caches if item[0] is not cache]

    def forget(self, name: str) -> None:
        with self.may_fail():
            self.root.discard(name)
        if not self.checkpoint(name).exists():
            del self.stored[name]

    def checkpoint(self, name: str) -> Path:
        return self.pager.cold.directory / f"sequence-{name}.checkpoint"

    @contextmanager
    def may_fail(self) -> Iterator[None]:
        try:
            yield
        except pagedkv.OutOfPagesError:
            self.seen["refused"] += 1
        except pagedkv.ColdStoreError as e:
            self.excuse(e)

    def excuse(self, error: Exception) -> None:
        """See that an error is one that must be, and that it names the page."""
        self.take_note()
        if isinstance(error, pagedkv.CorruptPageError):
            for layer in self.pager.layer_pagers:
                for page in layer.pages.values():
                    if (r := page.record) is not None and str(r.identity) in str(error):
                        name = f"layer-{layer.layer:04d}-{r.nbytes // 1024}k.kv"
                        if (name, r.slot) in self.damaged:
                            self.seen["damaged page"] += 1
                            return
            raise Violation(f"no page that was damaged: {error}") from error
        if not self.faulty:
            raise Violation(f"nothing was injected, and still: {error}") from error
        self.seen["disk error"] += 1

    def take_note(self) -> None:
        self.faulty |= bool(self.disk.log)
        self.disk.log.clear()

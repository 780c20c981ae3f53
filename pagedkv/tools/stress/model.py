"""A stress run of a real model: a long text under tight budgets, beside the same with all warm.

The second run has no disk and is neither saved nor killed: neither where a page lies, nor that it
was saved or resumed meanwhile, changes a bit of any logit.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil

from pagedkv.allocator.geometry import PAGE_TOKENS
from pagedkv.cache.paged_cache import PagedCache
from pagedkv.cache.stats import CacheStats
from pagedkv.config.sizes import format_size
from pagedkv.config.tier_config import TierConfig
from pagedkv.errors import ColdStoreError, ConfigError
from pagedkv.integrations.mlx_lm.wrapping import Wrapping, load, resume, unwrap, wrap, wrapping_of
from pagedkv.tiers.arrays import evaluated
from pagedkv.tools.stress.checks import Check, check_books
from pagedkv.tools.stress.faults import Faults
from pagedkv.tools.stress.folder import STORE, run_folder
from pagedkv.tools.stress.memory import SLACK, Memory, allowance
from pagedkv.tools.stress.options import StressOptions, schedule
from pagedkv.tools.stress.report import Latencies, Status, StressReport, Watch, ignore
from pagedkv.tools.stress.tokens import Array

Row = tuple[str, Array]
"""Where logits were made, and the logits."""

_SHIFT = 977  # what another branch reads is so much further on in the text


class ModelStress:
    """One run. The text is Python's own manual, starting at a place that the seed chooses."""

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        options: StressOptions,
        config: TierConfig,
        watch: Watch = ignore,
    ) -> None:
        """Tokenize the text.

        Args:
            name: of the model, for the report.
            model: of mlx-lm.
            tokenizer: of the model.
            options: tokens, seed, chunk, operations; `needles` is the number of last decode steps.
            config: tiers.
            watch: called often, for a progress line.
        """
        if options.ops.get("kill") and not config.budget().cold_bytes:
            raise ConfigError("a killed process can only be resumed from disk: leave out kill")
        self._name, self._model, self._options = name, model, options
        self._config, self._watch = config, watch
        self._tokens = text_tokens(tokenizer, options.tokens + options.needles, options.seed)
        self._books = Check("bookkeeping")
        self._finite = Check("finite logits")
        self._placement = Check("placement")
        self._reads = Check("page reads")
        self._resumes = Check("crashed and resumed")
        pages = len(model.layers) * -(-options.most_tokens // min(PAGE_TOKENS))  # at most
        # A page that is damaged on disk cannot be made again to the bit: none is.
        self._faults = Faults(options.seed, options.faults, pages, silent=False, mortal=True)
        self._latencies, self._seconds = Latencies(), dict[str, float]()
        self._done: dict[str, int] = {}
        self._notes: list[str] = []

    def run(self) -> StressReport:
        """Run under the budgets, then with everything warm if that fits in memory, and compare."""
        mx.eval(self._model.parameters())
        with run_folder(self._config.cold_dir) as home, self._wrapped(Path(home)) as cache:
            folder = Path(home)
            self._left_out(cache)
            memory = Memory(cache, self._limits(cache), self._options.sample_seconds)
            play = _Play(self, cache, folder, memory)
            logits: list[Row] = []
            try:
                logits = self._play(play, "")
                self._reads.count += 1
            except ColdStoreError as e:  # a page that cannot be read is a finding
                self._reads.fail(str(e))
            finally:
                memory.finish(play.cache.offset)
            stats = memory.stats()
            play.cache.close()
        for where, row in logits:
            self._finite.hold(bool(np.isfinite(row).all()), f"{where} has no finite logits")
        if logits:
            self._compare(logits, stats)
        else:
            self._placement.skipped = self._finite.skipped = "the run did not end"
        checks = [self._placement, self._finite, memory.tiers, memory.process]
        checks += [self._books, self._reads]
        checks += [c for c in (self._resumes, self._faults.check) if c.count]
        return StressReport(
            self._name,
            f"{len(self._model.layers)} layers, weights and all",
            self._options.tokens,
            checks,
            self._seconds,
            memory,
            stats,
            self._latencies,
            self._done,
            self._notes,
            faults=self._faults.to_dict(),
        )

    @contextmanager
    def _wrapped(self, folder: Path) -> Iterator[PagedCache]:
        """The model with a paged cache, on the disk that may fail."""
        wrapping = self._wrap(replace(self._config, cold_dir=str(folder / STORE)))
        try:
            with self._faults.quietly():
                cache = wrapping.make_cache()
                if wrapping.pager.has_cold:
                    wrapping.pager.cold  # noqa: B018  # opened here, where nothing fails
            yield cache
        finally:
            self._unwrap()

    def _wrap(self, config: TierConfig) -> Wrapping:
        wrap(self._model, config).close()
        wrapping = wrapping_of(self._model)
        assert wrapping is not None
        wrapping.pager.disk = self._faults.disk
        return wrapping

    def _unwrap(self) -> TierConfig | None:
        """Give the model its own caches back; returns what it was wrapped with."""
        wrapping = wrapping_of(self._model)
        if wrapping is None:
            return None
        for user in list(wrapping.pager.users):
            user.close()
        unwrap(self._model)
        return wrapping.config

    def forget(self) -> None:
        """As in another process: nothing is known but what is in the store."""
        if config := self._unwrap():
            self._wrap(config)

    def _left_out(self, cache: PagedCache) -> None:
        """Leave out what this model's caches cannot do."""
        wanted = {name for name, count in self._options.ops.items() if count}
        if not cache.is_fully_paged:
            more = wanted & {"trim", "fork", "save", "kill"}
            if more:
                self._notes.append(f"not all layers are paged: {', '.join(sorted(more))} left out")
            ops = {n: 0 if n in more else c for n, c in self._options.ops.items()}
            self._options = replace(self._options, ops=ops)

    def _limits(self, cache: PagedCache) -> dict[str, int]:
        """What memory may be taken beyond what the process had at the start, part by part."""
        layers, args = cache.paged_layers, getattr(self._model, "args", None)
        hidden = int(getattr(args, "hidden_size", 4096) or 4096)
        inner = int(getattr(args, "intermediate_size", 0) or 4 * hidden)
        vocabulary = int(getattr(args, "vocab_size", 0) or 150_000)
        shapes = [layer.shape for layer in layers if layer.shape is not None]
        token = max((s.token_bytes(32) for s in shapes), default=8 * hidden)
        pages = max((layer._pager.page_tokens for layer in layers if layer._pager), default=1024)
        chunk = self._options.chunk
        budget = cache.context.pager.budget
        return {
            **allowance(budget, len(layers), token, pages, chunk),
            "activations": chunk * 4 * (2 * vocabulary + 16 * hidden + 4 * inner),
            "allocator slack": SLACK,
        }

    def _play(self, play: _Play, suffix: str) -> list[Row]:
        """Prefill, operate and decode; the logits of each decode step."""
        started, o = time.perf_counter(), self._options
        events = schedule(o)
        while True:
            length = play.cache.offset
            if events and events[0][0] <= length:
                play.operate(events.pop(0)[1])
                continue
            if length >= o.tokens:
                break
            play.feed(min(length + o.chunk, o.tokens, events[0][0] if events else o.tokens))
        self._seconds[f"feed{suffix}"] = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(o.needles):
            play.decode()
        self._seconds[f"decode{suffix}"] = time.perf_counter() - started
        return play.logits

    def _compare(self, logits: list[Row], stats: CacheStats) -> None:
        """Placement never changes a token: the same with all pages warm gives identical bits."""
        pages = stats.warm.bytes + stats.cold.bytes
        if not stats.cold.pages:
            self._placement.skipped = "no page is cold under these budgets: lower --warm"
            return
        # A fork and what is trimmed come on top; growing slabs hold back a part of their budget.
        warm = 2 * pages * self._options.most_tokens // self._options.tokens
        free = psutil.virtual_memory().available
        if free < warm:
            self._placement.skipped = (
                f"an all-warm run needs {format_size(warm)} of memory, {format_size(free)} are free"
            )
            return
        config = replace(self._config, warm=warm, cold=0, cold_dir=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say was said in the first run
            try:
                with wrap(self._model, config) as cache:
                    expected = self._play(_Play(self, cache, None, None), ", all warm")
            finally:
                unwrap(self._model)
        for (where, row), (_, other) in zip(logits, expected, strict=True):
            off = float(np.abs(row - other).max())
            self._placement.hold(
                np.array_equal(row, other), f"{where}: logits differ by up to {off:.3g}"
            )


class _Play:
    """One of the two runs; without memory to watch it is the one that everything is compared with.

    Attributes:
        cache: its cache at the moment.
        logits: of each decode step so far.
    """

    def __init__(
        self, stress: ModelStress, cache: PagedCache, folder: Path | None, memory: Memory | None
    ) -> None:
        self.cache, self.logits = cache, list[Row]()
        self._stress, self._folder, self._memory = stress, folder, memory
        self._branch, self._steps = 0, 0
        self._rng = np.random.default_rng([stress._options.seed, 5])

    def feed(self, stop: int) -> None:
        """Prefill up to a length."""
        self._call(self.cache, stop, self._branch)
        if self._memory:
            self._stress._done["prefill"] = self._stress._done.get("prefill", 0) + 1

    def decode(self, cache: PagedCache | None = None, branch: int | None = None) -> None:
        """One token, whose logits are kept."""
        cache = cache or self.cache
        out = self._call(cache, cache.offset + 1, self._branch if branch is None else branch)
        row = np.array(evaluated(out[0, -1].astype(mx.float32)))
        self.logits.append((f"decode step {self._steps} at {cache.offset:,} tokens", row))
        self._steps += 1

    def operate(self, name: str) -> None:
        """One of the operations; the run that is compared with is neither saved nor killed."""
        if self._memory or name not in ("save", "kill"):
            getattr(self, f"_{name}")()
        if self._memory:
            self._stress._done[name] = self._stress._done.get(name, 0) + 1

    def _call(self, cache: PagedCache, stop: int, branch: int) -> Any:
        """Run the model over the next tokens of a branch."""
        stress, start = self._stress, cache.offset
        text = stress._tokens
        places = (mx.arange(start, stop) + _SHIFT * branch) % text.size

        def call() -> Any:
            out = stress._model(text[places][None], cache=cache)
            mx.eval(out, [layer.state for layer in cache])  # as mlx-lm does after each chunk
            return out

        began = time.perf_counter()
        out = self._survive(call, cache, start) if self._memory else call()
        if self._memory:
            kind = "decode" if stop - start == 1 else "prefill"
            stress._latencies.add(kind, stop, time.perf_counter() - began)
            self._look(cache, stop)
        return out

    def _survive(self, call: Callable[[], Any], cache: PagedCache, length: int) -> Any:
        def check() -> None:
            lengths = {layer.offset for layer in cache.paged_layers}
            self._stress._books.hold(
                lengths == {length}, f"after a failed call the layers hold {sorted(lengths)} tokens"
            )

        return self._stress._faults.survive(call, lambda: None, check)

    def _look(self, cache: PagedCache, tokens: int) -> None:
        memory, stress = self._memory, self._stress
        assert memory is not None
        latest = memory.look(tokens)
        open_caches = [cache] if cache is self.cache else [cache, self.cache]
        forks = [c for c in getattr(self, "_open", []) if c is not cache]
        check_books(
            [*open_caches, *(f for f in forks if f is not self.cache)], tokens, stress._books
        )
        taken, traffic = memory.taken(), memory.traffic.of(self.cache)
        total = stress._options.tokens + stress._options.needles
        tiers = {t: (taken[t], memory.budgets[t]) for t in ("warm", "cold")}
        stress._watch(
            Status(
                "feeding",
                tokens,
                total,
                tiers,
                traffic.read,
                traffic.written,
                latest["process"],
                memory.allowed,
                latest["mlx_active"],
            )
        )

    # Operations

    def _room(self) -> int:
        return self._stress._options.tokens - self.cache.offset

    def _decode(self) -> None:
        for _ in range(min(int(self._rng.integers(1, 5)), self._room())):
            self.decode()

    def _trim(self) -> None:
        length, chunk = self.cache.offset, self._stress._options.chunk
        count = min(int(self._rng.integers(1, 2 * chunk + 1024)), length - 1)
        if count < 1:
            return
        trimmed = self.cache.trim(count)
        self._stress._books.hold(trimmed == count, f"a trim of {count} tokens did {trimmed}")
        self._branch += 1
        self.decode()

    def _fork(self) -> None:
        away = int(self._rng.integers(1, self._stress._options.chunk + 1))
        twin = self.cache.fork()
        self._open = [twin]
        try:
            branch = self._branch = self._branch + 1
            self._call(twin, twin.offset + away, branch)
            self._branch += 1
            if self._room():
                self.decode()
            self.decode(twin, branch)
        finally:
            self._open = []
            twin.close()

    def _save(self) -> None:
        stress = self._stress
        assert self._folder is not None and self._memory is not None
        path = str(self._folder / "saved.safetensors")
        length = self.cache.offset
        self._survive(lambda: self.cache.save(path), self.cache, length)
        self._memory.traffic.add(self.cache)
        with stress._faults.quietly():
            self.cache.close()
        stress.forget()
        self.cache = stress._faults.survive(
            lambda: load(path, stress._model), lambda: None, lambda: None
        )
        self._memory.cache = self.cache
        Path(path).unlink()

    def _kill(self) -> None:
        """Flush, go on, and lose the disk in the middle of that; resume what was flushed."""
        stress, length = self._stress, self.cache.offset
        assert self._memory is not None
        self._survive(self.cache.flush, self.cache, length)
        self._call(self.cache, length + min(stress._options.chunk, 256), self._branch)
        self._memory.traffic.add(self.cache)
        with stress._faults.crash():
            self.cache.close()
        stress.forget()
        self.cache = stress._faults.survive(
            lambda: resume(stress._model), lambda: None, lambda: None
        )
        self._memory.cache = self.cache
        stress._resumes.hold(
            self.cache.offset == length,
            f"resumed at {self.cache.offset:,} tokens, flushed were {length:,}",
        )
        self.cache.discard()


def text_tokens(tokenizer: Any, count: int, seed: int) -> mx.array:
    """`count` tokens of Python's manual, repeated if it is too short, as a 1-d array."""
    from pydoc_data.topics import topics  # half a megabyte, in every CPython

    names = sorted(topics)
    first = int(np.random.default_rng(seed).integers(len(names)))
    tokens: list[int] = []
    while len(tokens) < count:
        for name in names[first:] + names[:first]:
            tokens += tokenizer.encode(topics[name], add_special_tokens=False)
            if len(tokens) >= count:
                break
    return mx.array(tokens[:count])

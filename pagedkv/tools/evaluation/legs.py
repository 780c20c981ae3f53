"""A segment read by the reference and by every variant, side by side.

Logits of a whole text would not fit: 8,192 positions of 152,000 tokens are 5 GB in float32. So the
reference and all variants take the same call of tokens one after the other, and what is kept are
three numbers per position and variant.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from pagedkv.tools.bench.result import first_words
from pagedkv.tools.bench.timing import Deadline
from pagedkv.tools.evaluation.caches import Footprint
from pagedkv.tools.evaluation.metrics import Comparison, Series, compare, log_probabilities, losses
from pagedkv.tools.evaluation.settings import DECODE, PREFILL, EvalSettings
from pagedkv.tools.evaluation.variants import Variant

AHEAD = 3
"""Decode steps that are under way before one is waited for."""

Progress = Callable[[int], None]


class Reader:
    """One variant's caches while a segment goes through them.

    Attributes:
        variant: whose they are.
        error: why it went no further; empty if it did.
        seconds: that its calls took, the comparison with the reference included. Decode steps
            overlap on a GPU: theirs say how long Python had to build them.
        footprint: of the caches, when the segment is read.
    """

    def __init__(self, variant: Variant, model: Any, caches: list[Any]) -> None:
        self.variant = variant
        self.error = ""
        self.seconds = 0.0
        self.footprint: Footprint | None = None
        self._model, self._caches = model, caches
        self._parts: list[Comparison] = []

    def logits(self, tokens: mx.array) -> mx.array:
        """Predictions after each of some tokens, lazily: ``[len(tokens), vocabulary]``."""
        parts = [self._model(part[None], cache=self._caches)[0] for part in self._calls(tokens)]
        return mx.concatenate(parts) if len(parts) > 1 else parts[0]

    def skip(self, tokens: mx.array) -> None:
        """Read tokens, and do not ask what comes next."""
        for part in self._calls(tokens):
            self._model(part[None], cache=self._caches)
            mx.eval([cache.state for cache in self._caches])

    def _calls(self, tokens: mx.array) -> list[mx.array]:
        step = self.variant.calls or len(tokens)
        return [tokens[at : at + step] for at in range(0, len(tokens), step)]

    def compare(self, tokens: mx.array, reference: mx.array, targets: mx.array) -> Comparison:
        """Read tokens and compare what is predicted, lazily."""
        part = compare(reference, self.logits(tokens), targets)
        self._parts.append(part)
        return part

    def attempt(self, work: Callable[[], Any]) -> Any:
        """Do one thing; what goes wrong ends this variant's part, and no other's."""
        if self.error:
            return None
        started = time.perf_counter()
        try:
            return work()
        except Exception as e:
            self.error = first_words(e)
            self._parts = []
            return None
        finally:
            self.seconds += time.perf_counter() - started

    def finish(self, tokens: int) -> None:
        """Take the caches' measure."""
        self.footprint = self.attempt(lambda: Footprint.of(self._caches, tokens))

    def series(self, first: int, reference: Sequence[mx.array]) -> Series | None:
        """All that was compared; None if something went wrong."""
        return self.attempt(lambda: Series.of(first, self._parts, reference))  # type: ignore[no-any-return]


class Leg:
    """A segment on its way through the reference's caches and those of some variants.

    Attributes:
        first: position of the first prediction that was compared.
        losses: the reference's own, call by call.
        reached: tokens read so far: fewer than there are if the time was up.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        reference: Reader,
        readers: Sequence[Reader],
        settings: EvalSettings,
        progress: Progress = lambda done: None,
        deadline: Deadline | None = None,
    ) -> None:
        """Prepare a leg.

        Args:
            tokens: of the segment: one more than are fed.
            reference: what the others are compared with.
            readers: the others.
            settings: chunk and number of tokens.
            progress: called with the number of tokens read so far.
            deadline: when it passes, the leg ends where it is.
        """
        self.first = 0
        self.losses: list[mx.array] = []
        self.reached = 0
        self._tokens = mx.array(list(tokens), mx.int32)
        self._reference, self._readers, self._settings = reference, readers, settings
        self._progress, self._deadline = progress, deadline or Deadline()
        self._count = len(tokens) - 1

    def run(self, leg: str) -> None:
        """Run ``"prefill"`` or ``"decode"`` to its end, or until the time is up."""
        {PREFILL: self._prefill, DECODE: self._decode}[leg]()
        for reader in (self._reference, *self._readers):
            reader.finish(self.reached)

    def series(self, reader: Reader) -> Series | None:
        """What a reader's predictions were; the reference's own are compared with themselves."""
        if reader is self._reference:
            return Series.alone(self.first, self.losses)
        return reader.series(self.first, self.losses)

    def _prefill(self) -> None:
        for start, end in self._calls(0, self._count, self._settings.chunk):
            tokens, targets, log_p = self._ask(start, end)
            mx.eval(log_p, self.losses[-1])
            for reader in self._readers:
                reader.attempt(partial(_compared, reader, tokens, log_p, targets))

    def _decode(self) -> None:
        self.first = self._count - self._settings.decode_tokens
        for start, end in self._calls(0, self.first, self._settings.chunk):
            tokens = self._tokens[start:end]
            self._reference.skip(tokens)
            for reader in self._readers:
                reader.attempt(partial(reader.skip, tokens))
        if self.reached < self.first:
            return
        under_way: deque[list[mx.array]] = deque()
        for start, end in self._calls(self.first, self._count, self._settings.decode_step):
            under_way.append(self._step(start, end))
            if len(under_way) > AHEAD:
                mx.eval(under_way.popleft())
        mx.eval(list(under_way))

    def _calls(self, start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
        """Beginning and end of every call, until the time is up."""
        for at in range(start, stop, step):
            if self._deadline.passed:
                return
            end = min(at + step, stop)
            yield at, end
            self.reached = end
            self._progress(end)

    def _step(self, start: int, end: int) -> list[mx.array]:
        """Start one decode step of everybody, one after the other; nothing is waited for."""
        tokens, targets, log_p = self._ask(start, end)
        mx.async_eval(log_p, self.losses[-1])  # type: ignore[no-untyped-call]
        arrays = [self.losses[-1]]  # not log_p: it would be kept for nothing

        def begin(reader: Reader) -> None:
            part = reader.compare(tokens, log_p, targets).arrays
            mx.async_eval(*part)  # type: ignore[no-untyped-call]
            arrays.extend(part)

        for reader in self._readers:
            reader.attempt(partial(begin, reader))
        return arrays

    def _ask(self, start: int, end: int) -> tuple[mx.array, mx.array, mx.array]:
        """The tokens of a call, those that come after each, and what the reference expects."""
        tokens, targets = self._tokens[start:end], self._tokens[start + 1 : end + 1]
        log_p = log_probabilities(self._reference.logits(tokens))
        self.losses.append(losses(log_p, targets))
        return tokens, targets, log_p


def _compared(reader: Reader, tokens: mx.array, log_p: mx.array, targets: mx.array) -> None:
    mx.eval(reader.compare(tokens, log_p, targets).arrays)

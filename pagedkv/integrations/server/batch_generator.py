"""mlx-lm's batch generator over pages: what waits, what goes on, and what must end.

A new request waits until its whole prompt fits beside what is under way; prompts kept for reuse are
given up for it. One that cannot go on is answered with an error; the others do not notice. Where a
model is spread over several processes, all of them decide alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch
from mlx_lm.models.cache import CacheList

from pagedkv.cache.batch_cache import BatchPagedLayerCache
from pagedkv.cache.stats import rows_of
from pagedkv.errors import OutOfPagesError, PagedKVError
from pagedkv.integrations.server.answers import Answers, Ledger
from pagedkv.integrations.server.errors import GenerationError, RequestError, StoppedError, as_ours
from pagedkv.integrations.server.prompt_cache import Salted
from pagedkv.sequence.admission import Wish, refused


class Owner(Protocol):
    """Whose requests a batch answers: the generation thread.

    Attributes:
        answers: of the request that was taken last.
        ledger: of all that were taken.
        given: lists of caches that the last step gave to mlx-lm's loop.
    """

    answers: Answers | None
    ledger: Ledger
    given: list[list[Any]]

    @property
    def distributed(self) -> bool:
        """Whether several processes answer together."""

    def let_go(self) -> None:
        """Take back what the last step gave."""

    def give_one_up(self) -> bool:
        """Drop the prompt cache that is longest unused; False if there is none."""


class PagedBatchGenerator(BatchGenerator):  # type: ignore[misc]
    """mlx-lm's batch generator, which asks whether there is room before each step."""

    def __init__(self, owner: Owner, *args: Any, **options: Any) -> None:
        """As `BatchGenerator`.

        Args:
            owner: whose requests these are.
            args: see there.
            options: see there.
        """
        self._owner = owner
        self._answers: dict[int, Answers] = {}
        self._held: list[Any] = []
        super().__init__(*args, **options)

    def insert_segments(self, *args: Any, **options: Any) -> list[int]:
        """Add requests; see `BatchGenerator.insert_segments`.

        One that cannot be added is answered with the error, and dropped by the next step.
        """
        answers = self._owner.answers
        if answers is None:
            return list(super().insert_segments(*args, **options))
        for name in ("samplers", "logits_processors"):
            if name in options:
                options[name] = [_guarded(answers, given) for given in options[name]]
        try:
            uids: list[int] = super().insert_segments(*args, **options)
        except Exception as e:
            answers.fail(as_ours(e))
            uids = [self._uid_count]
            self._uid_count += 1
        self._answers.update(dict.fromkeys(uids, answers))
        return uids

    def remove(self, uids: Any, return_prompt_caches: bool = False) -> Any:
        """Drop requests; see `BatchGenerator.remove`."""
        for uid in uids:
            if answers := self._answers.pop(uid, None):
                self._owner.ledger.discard(answers)
        return super().remove(uids, return_prompt_caches)

    def extract_cache(self, uids: Any) -> Any:
        """Copies of requests' caches; see `BatchGenerator.extract_cache`."""
        waiting = {sequence[0] for sequence in self._unprocessed_sequences}
        found = {
            uid: (self._salted(uid, caches), tokens)
            for uid, (caches, tokens) in super().extract_cache(uids).items()
        }
        self._owner.given += [caches for uid, (caches, _) in found.items() if uid not in waiting]
        return found

    def _salted(self, uid: int, caches: list[Any]) -> Salted:
        return Salted(caches, self._answers[uid].salt if uid in self._answers else "")

    def next(self) -> tuple[list[Any], list[Any]]:
        """One step of every request; see `BatchGenerator.next`.

        A request that has no room, or whose pages cannot be read, is answered with the error and
        dropped; it is named once more among the prompts, for the server to forget it.
        """
        self._owner.let_go()
        self._owner.ledger.beat = time.monotonic()
        if not self._owner.distributed:
            self._forget_abandoned()
        with self._held_back(self._refuse()):
            prompts, answers = self._step()
        for response in answers:
            if response.finish_reason is not None:
                self._owner.given.append(response.prompt_cache)
                response.prompt_cache = self._salted(response.uid, response.prompt_cache)
                self._owner.given.append(response.prompt_cache)
                self._answers.pop(response.uid, None)
        gone = [uid for uid, answers_to in self._answers.items() if answers_to.failed]
        prompts += [PromptProcessingBatch.Response(uid, (0, 0), False, False) for uid in gone]
        return prompts, answers

    def _forget_abandoned(self) -> None:
        gone = [uid for uid, answers in self._answers.items() if answers.abandoned]
        if gone:
            super().remove(gone)
        for uid in gone:
            logging.info(f"Request {uid}: the client has gone")
            self._answers[uid].fail(StoppedError("the client has gone"))

    def _step(self) -> tuple[list[Any], list[Any]]:
        steps, waiting = self._counters.generation_steps, len(self._generation_batch)
        try:
            prompts, answers = super().next()
            return list(prompts), list(answers)
        except Exception as e:
            if self._owner.distributed:
                raise  # the other processes wait in the middle of this step
            error = as_ours(e)
            answering = self._generation_batch.uids
            if waiting and steps == self._counters.generation_steps and error.rows:
                # Nothing else has begun in this step: it can be made again without these.
                self._fail({answering[row]: error for row in error.rows})
            else:
                self._fail_all(error)
            return [], []

    # Room

    def _refuse(self) -> int:
        """Drop what has no room to go on; returns how many new requests may begin."""
        going = sorted(self._going(), key=lambda item: item[0])
        problems = self._no_room([(uid, row, now) for uid, row, now, _ in going])
        self._fail(problems)
        # Beside new prompts, those under way need room for all that is left of theirs.
        wishes = [(uid, row, left) for uid, row, _, left in going if uid not in problems]
        while self._unprocessed_sequences:
            begin, problem = self._may_begin(wishes)
            if begin or wishes or problem is None:
                return begin
            # Nothing is under way that could end and make room, but others that wait may hold
            # pages: they found their beginnings among the prompts that were kept.
            queue = self._unprocessed_sequences
            fits = (i for i, wish in enumerate(self._wanted()) if not self._no_room([wish]))
            if (first := next(fits, None)) is None:
                self._fail({queue[0][0]: problem})
                continue
            sequence = queue[first]
            del queue[first]
            queue.appendleft(sequence)
        return 0

    def _wanted(self) -> Iterator[tuple[int, Any, int]]:
        """What the requests that wait ask for: number, one row, and tokens."""
        for uid, segments, _, cache, *_ in self._unprocessed_sequences:
            yield uid, next(rows_of(_flat(cache)), None), sum(map(len, segments))

    def _may_begin(self, going: list[tuple[int, Any, int]]) -> tuple[int, PagedKVError | None]:
        """How many requests may begin, in order, and why not the next one."""
        wishes = list(going)
        for i, wish in enumerate(self._wanted()):
            wishes.append(wish)
            if problem := self._no_room(wishes).get(wish[0]):
                return i, problem
        return len(self._unprocessed_sequences), None

    def _going(self) -> Iterator[tuple[int, Any, int, int]]:
        """Requests under way: number, one of its rows, and tokens it takes in this step and yet."""
        for uid, row in self._rows(self._generation_batch):
            yield uid, row, 1, 1
        rows = dict(self._rows(self._prompt_batch))
        for uid, (segments, *_) in zip(
            self._prompt_batch.uids, self._currently_processing, strict=True
        ):
            if uid in rows:
                now = min(len(segments[0]), self.prefill_step_size)
                yield uid, rows[uid], now, sum(map(len, segments))

    def _rows(self, batch: Any) -> Iterator[tuple[int, Any]]:
        caches = _flat(batch.prompt_cache)
        rows = next((c.rows for c in caches if isinstance(c, BatchPagedLayerCache)), [])
        yield from zip(batch.uids, rows, strict=False)  # no rows if no layer is paged

    def _no_room(self, wanted: list[tuple[int, Any, int]]) -> dict[int, PagedKVError]:
        here = [wish for wish in wanted if wish[1] is not None]  # else none of its layers is paged
        problems = refused(Wish(row, tokens) for _, row, tokens in here)
        found: dict[int, PagedKVError] = {
            here[i][0]: OutOfPagesError(
                f"out of pages at {here[i][1].offset:,} tokens (+{here[i][2]:,}) with "
                f"{len(here) - 1} other requests: {problem}; raise the warm or cold budget, "
                f"lower the precision, or send fewer requests at once"
            )
            for i, problem in problems.items()
        }
        if self._owner.distributed and wanted:
            for uid in self._short_elsewhere([uid for uid, *_ in wanted], found):
                found[uid] = OutOfPagesError(
                    "out of pages in another process of the group: raise its warm or cold budget, "
                    "lower the precision, or send fewer requests at once"
                )
        return found

    def _short_elsewhere(self, uids: list[int], here: Iterable[int]) -> list[int]:
        """Requests that have no room in some other process only: all must refuse alike."""
        known = set(here)
        flags = mx.array([uid in known for uid in uids], mx.int32)
        short: Any = mx.distributed.all_max(flags).tolist()
        return [uid for uid, there in zip(uids, short, strict=True) if there and uid not in known]

    @contextmanager
    def _held_back(self, begin: int) -> Iterator[None]:
        """Let no more than the first so many requests of the queue begin."""
        queue = self._unprocessed_sequences
        self._held = [queue.pop() for _ in range(len(queue) - begin)]
        try:
            yield
        finally:
            self._unprocessed_sequences.extend(reversed(self._held))
            self._held = []

    # Errors

    def _fail(self, errors: dict[int, PagedKVError]) -> None:
        if not errors:
            return
        super().remove(list(errors))
        for uid, error in errors.items():
            logging.error(f"Request {uid}: {error}")
            if uid in self._answers:
                self._answers[uid].fail(error)

    def _fail_all(self, error: PagedKVError) -> None:
        """A step failed in its middle: nobody's tokens are where they should be."""
        ours = not isinstance(error, GenerationError)
        while ours and self._owner.give_one_up():
            pass  # they may hold the pages that cannot be read
        waiting = {sequence[0] for sequence in (*self._unprocessed_sequences, *self._held)}
        self._prompt_batch = PromptProcessingBatch.empty(
            self.model, self.sampler, prefill_step_size=self.prefill_step_size
        )
        self._generation_batch = GenerationBatch.empty(self.model, self.sampler)
        self._currently_processing: list[Any] = []
        self._fail({uid: error for uid in self._answers if uid not in waiting})


def _guarded(answers: Answers, given: Any) -> Any:
    """A request's sampler, or its logits processors, whose errors end this request alone.

    From the first one on the request is dropped: what is taken in their place is never seen.
    """
    if given is None:
        return None
    if isinstance(given, (list, tuple)):
        return [_guard(answers, processor, lambda tokens, logits: logits) for processor in given]
    return _guard(answers, given, lambda logprobs: mx.argmax(logprobs, axis=-1))


def _guard(
    answers: Answers, function: Callable[..., mx.array], otherwise: Callable[..., mx.array]
) -> Callable[..., mx.array]:
    def call(*args: Any) -> mx.array:
        if not answers.failed:
            try:
                return function(*args)
            except Exception as e:
                reason = f"its options cannot be followed: {type(e).__name__}: {e}"
                answers.fail(RequestError(reason))
        return otherwise(*args)

    return call


def _flat(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches, and in place of a list of several for one layer its members."""
    for cache in caches:
        yield from _flat(cache.caches) if isinstance(cache, CacheList) else (cache,)

"""Requests to mlx_lm.server whose caches are paged: what waits, what goes on, and what must end.

A new request waits until its whole prompt fits beside what is under way; prompts kept for reuse are
given up for it. One that cannot go on is answered with an error; the others do not notice.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Queue
from typing import Any

from mlx_lm import server
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch
from mlx_lm.models.cache import CacheList

from pagedkv.admission import Wish, refused
from pagedkv.batch import BatchPagedLayerCache
from pagedkv.errors import OutOfPagesError, PagedKVError
from pagedkv.kept_prompts import KeptPrompts
from pagedkv.models import wrapping_of
from pagedkv.sizes import format_size
from pagedkv.stats import rows_of


class _Answers:
    """The queue on which one request is answered.

    Attributes:
        failed: whether it was answered with an error; what comes later is left out.
    """

    def __init__(self, queue: Queue[Any]) -> None:
        self._queue = queue
        self._context: Any = None
        self.failed = False

    def put(self, item: Any) -> None:
        """As `Queue.put`."""
        if self.failed:
            return
        if isinstance(item, server.GenerationContext):
            self._context = item
        if isinstance(item, BaseException):
            # Its frames hold caches, and the thread that gets it must not be who lets go of them.
            item.__traceback__ = item.__context__ = item.__cause__ = None
        self._queue.put(item)

    def fail(self, error: BaseException) -> None:
        """Answer with an error, and have the server forget the request."""
        self.put(error)
        self.failed = True
        if self._context is not None:
            self._context.stop()


class PagedResponseGenerator(server.ResponseGenerator):  # type: ignore[misc]
    """mlx-lm's generation thread, which alone calls MLX.

    Attributes:
        answers: of the request that was taken last.
        given: lists of caches that the last step gave to mlx-lm's loop.
    """

    def __init__(self, provider: Any, kept: KeptPrompts) -> None:
        """Start the thread, which loads the model.

        Args:
            provider: a `PagedModelProvider`.
            kept: prompt caches for reuse; the first thing to go when pages are short.
        """
        provider.kept = kept
        kept.model = lambda: provider.model
        self.answers: _Answers | None = None
        self.given: list[list[Any]] = []
        self._loaded = threading.Event()
        self._failure: BaseException | None = None
        super().__init__(provider, kept)

    def wait(self) -> None:
        """Until the model is loaded.

        Raises:
            Exception: whatever loading it raised.
        """
        self._loaded.wait()
        if self._failure is not None:
            raise self._failure

    def _generate(self) -> None:
        try:
            self.model_provider.load_default()
        except Exception as e:
            self._failure = e
            self._generation_failed = True
            return
        finally:
            self._loaded.set()
        with in_place(server, BatchGenerator=partial(PagedBatchGenerator, self)):
            super()._generate()

    def let_go(self) -> None:
        """Take back what the last step gave: mlx-lm's loop holds it until there is another.

        What is to be kept of it is among the prompt caches by now, in lists of their own.
        """
        for caches in self.given:
            caches.clear()
        self.given = []

    def _next_request(self, timeout: float | None = None) -> Any:
        self.let_go()
        request = super()._next_request(timeout)
        if request is None:
            return None
        queue, *rest = request
        self.answers = _Answers(queue)
        return (self.answers, *rest)

    def _log_cache_stats(self) -> None:
        super()._log_cache_stats()
        if wrapping := wrapping_of(self.model_provider.model):
            pager = wrapping.pager
            warm = sum(layer.warm_bytes for layer in pager.layer_pagers)
            cold = pager.open_cold.nbytes if pager.open_cold else 0
            budget = pager.budget
            logging.info(
                f"Pages: warm {format_size(warm)} of {format_size(budget.warm_bytes)}, "
                f"cold {format_size(cold)} of {format_size(budget.cold_bytes)}"
            )


class PagedBatchGenerator(BatchGenerator):  # type: ignore[misc]
    """mlx-lm's batch generator, which asks whether there is room before each step."""

    def __init__(self, owner: PagedResponseGenerator, *args: Any, **options: Any) -> None:
        """As `BatchGenerator`.

        Args:
            owner: whose requests these are.
            args: see there.
            options: see there.
        """
        self._owner = owner
        self._answers: dict[int, _Answers] = {}
        self._held: list[Any] = []
        super().__init__(*args, **options)

    def insert_segments(self, *args: Any, **options: Any) -> list[int]:
        """Add requests; see `BatchGenerator.insert_segments`."""
        uids: list[int] = super().insert_segments(*args, **options)
        if self._owner.answers is not None:
            self._answers.update(dict.fromkeys(uids, self._owner.answers))
        return uids

    def remove(self, uids: Any, return_prompt_caches: bool = False) -> Any:
        """Drop requests; see `BatchGenerator.remove`."""
        for uid in uids:
            self._answers.pop(uid, None)
        return super().remove(uids, return_prompt_caches)

    def extract_cache(self, uids: Any) -> Any:
        """Copies of requests' caches; see `BatchGenerator.extract_cache`."""
        found = super().extract_cache(uids)
        waiting = {sequence[0] for sequence in self._unprocessed_sequences}
        self._owner.given += [caches for uid, (caches, _) in found.items() if uid not in waiting]
        return found

    def next(self) -> tuple[list[Any], list[Any]]:
        """One step of every request; see `BatchGenerator.next`.

        A request that has no room, or whose pages cannot be read, is answered with the error and
        dropped; it is named once more among the prompts, for the server to forget it.
        """
        self._owner.let_go()
        with self._held_back(self._refuse()):
            prompts, answers = self._step()
        for response in answers:
            if response.finish_reason is not None:
                self._answers.pop(response.uid, None)
                self._owner.given.append(response.prompt_cache)
        gone = [uid for uid, answers_to in self._answers.items() if answers_to.failed]
        prompts += [PromptProcessingBatch.Response(uid, (0, 0), False, False) for uid in gone]
        return prompts, answers

    def _step(self) -> tuple[list[Any], list[Any]]:
        steps, waiting = self._counters.generation_steps, len(self._generation_batch)
        try:
            prompts, answers = super().next()
            return list(prompts), list(answers)
        except PagedKVError as e:
            answering = self._generation_batch.uids
            if waiting and steps == self._counters.generation_steps and e.rows:
                # Nothing else has begun in this step: it can be made again without these.
                self._fail({answering[row]: e for row in e.rows})
            else:
                self._fail_all(e)
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
        wanted = [wish for wish in wanted if wish[1] is not None]  # none of its layers is paged
        problems = refused(Wish(row, tokens) for _, row, tokens in wanted)
        return {
            wanted[i][0]: OutOfPagesError(
                f"out of pages at {wanted[i][1].offset:,} tokens (+{wanted[i][2]:,}) with "
                f"{len(wanted) - 1} other requests: {problem}; raise the warm or cold budget, "
                f"lower the precision, or send fewer requests at once"
            )
            for i, problem in problems.items()
        }

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
        """The disk failed in the middle of a step: nobody's tokens are where they should be."""
        while self._owner.model_provider.give_one_up():
            pass  # they may hold the pages that cannot be read
        waiting = {sequence[0] for sequence in (*self._unprocessed_sequences, *self._held)}
        self._prompt_batch = PromptProcessingBatch.empty(
            self.model, self.sampler, prefill_step_size=self.prefill_step_size
        )
        self._generation_batch = GenerationBatch.empty(self.model, self.sampler)
        self._currently_processing: list[Any] = []
        self._fail({uid: error for uid in self._answers if uid not in waiting})


def _flat(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches, and in place of a list of several for one layer its members."""
    for cache in caches:
        yield from _flat(cache.caches) if isinstance(cache, CacheList) else (cache,)


@contextmanager
def in_place(module: Any, **names: Any) -> Iterator[None]:
    """Put things in place of a module's own for a while."""
    before = {name: getattr(module, name) for name in names}
    for name, value in names.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)

"""Requests to mlx_lm.server whose caches are paged: what waits, what goes on, and what must end.

A new request waits until its whole prompt fits beside what is under way; prompts kept for reuse are
given up for it. One that cannot go on, or that cannot be understood, is answered with an error; the
others do not notice. Where a model is spread over several processes, all of them decide alike.
"""

from __future__ import annotations

import _thread
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, Queue
from typing import Any
from weakref import WeakSet

import mlx.core as mx
from mlx_lm import server
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch
from mlx_lm.models.cache import CacheList

from pagedkv.admission import Wish, refused
from pagedkv.batch import BatchPagedLayerCache
from pagedkv.errors import OutOfPagesError, PagedKVError
from pagedkv.models import wrapping_of
from pagedkv.server.errors import GenerationError, RequestError, StoppedError, as_ours
from pagedkv.server.prompt_cache import KeptPrompts, Salted
from pagedkv.sizes import format_size
from pagedkv.stats import rows_of

_PATIENCE = 10.0
"""Seconds that another process of a group waits for the first one to end it."""


_MOST_IN_VAIN = 5
"""So many errors of the loop without a request between them are not any request's."""


class Refusal(BaseException):
    """An error that comes before an answer has begun.

    Not an `Exception`: mlx-lm's handler gives each of those that it sees then status 404.

    Attributes:
        error: what happened.
    """

    def __init__(self, error: Exception) -> None:
        """Wrap the error."""
        super().__init__(str(error))
        self.error = error


class _Answers:
    """The queue on which one request is answered.

    Attributes:
        salt: what its sequences are kept apart by.
        failed: whether it was answered with an error; what comes later is left out.
        alone: whether it is served outside of the batch, so that it may be ended in its midst.
    """

    def __init__(self, queue: Queue[Any], salt: str, owner: PagedResponseGenerator) -> None:
        self._queue, self.salt, self._owner = queue, salt, owner
        self._context: Any = None
        self.failed = self.alone = False
        with owner.answering:
            owner.unanswered.add(self)

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return _abandoned(self._queue)

    def put(self, item: Any) -> None:
        """As `Queue.put`."""
        self._owner.beat = time.monotonic()
        if self.failed:
            return
        if isinstance(item, server.GenerationContext):
            self._context = item
        if isinstance(item, BaseException):
            # Its frames hold caches, and the thread that gets it must not be who lets go of them.
            item.__traceback__ = item.__context__ = item.__cause__ = None
        if item is None or isinstance(item, BaseException):  # the last one
            with self._owner.answering:
                self._owner.unanswered.discard(self)
        elif self.alone and self.abandoned:
            raise ConnectionAbortedError("the client has gone")
        self._queue.put(item)

    def fail(self, error: BaseException) -> None:
        """Answer with an error, and have the server forget the request."""
        self.put(error)
        self.failed = True
        if self._context is not None:
            self._context.stop()


def _abandoned(queue: Queue[Any]) -> bool:
    return bool(getattr(queue, "abandoned", False))


class PagedResponseGenerator(server.ResponseGenerator):  # type: ignore[misc]
    """mlx-lm's generation thread, which alone calls MLX.

    Attributes:
        answers: of the request that was taken last.
        unanswered: requests that were taken and are not at their end.
        answering: held by who looks at these, on any thread.
        given: lists of caches that the last step gave to mlx-lm's loop.
        beat: when something was last done, on `time.monotonic`'s clock.
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
        self.unanswered: WeakSet[_Answers] = WeakSet()  # the loop forgets those that were left
        self.answering = threading.Lock()
        self.beat = time.monotonic()
        self._reading = threading.Lock()
        self._here = threading.local()
        self._ending = False
        self._in_vain = 0  # errors of the loop since the last request
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
        self.require_well()

    def require_well(self) -> None:
        """Check that the thread did not fail.

        Raises:
            Exception: with which it ended.
        """
        if self._failure is not None:
            raise self._failure

    def end_within(self, seconds: float) -> None:
        """Say how long there is for what is written to disk at the end; the first word counts."""
        provider = self.model_provider
        provider.end = min(provider.end, time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds of that time that are left."""
        return float(max(0.0, self.model_provider.end - time.monotonic()))

    def stop(self) -> None:
        """Have the thread end after the step under way; all requests are answered with an error."""
        self._ending = True
        if self._is_distributed:
            return  # the others are told where all of them listen
        self._stop = True
        error = StoppedError("the server is about to end; its next start finds what it has kept")
        with self.answering:
            left = list(self.unanswered)
        for answers in left:
            answers.fail(error)
        with suppress(Empty):
            while True:
                self.requests.get_nowait()[0].put(error)

    def stop_and_join(self, seconds: float | None = None) -> bool:
        """End the thread, and those of the other processes of a group with that of the first.

        Args:
            seconds: how long to wait for it; None is for ever.

        Returns:
            Whether it has ended.
        """
        self.stop()
        if self._is_distributed and self._rank:
            seconds = _PATIENCE  # it is not for this process to end by itself
        self._generation_thread.join(seconds)
        return not self._generation_thread.is_alive()

    @property
    def still(self) -> float:
        """Seconds since the thread did anything; 0 while it loads."""
        return time.monotonic() - self.beat if self._loaded.is_set() else 0.0

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
            while True:
                try:
                    super()._generate()
                    return
                except Exception as e:
                    self._go_on_after(e)

    def _go_on_after(self, error: Exception) -> None:
        """Answer all requests with an error that escaped mlx-lm's loop, which then begins anew.

        Raises:
            Exception: the error, if it comes again and again without a request, or the other
                processes of a group would wait for this one where it is no more.
        """
        self._in_vain += not self.unanswered
        if self._is_distributed or self._in_vain > _MOST_IN_VAIN:
            self._failure = as_ours(error)
            if self._is_distributed and self._rank == 0:
                _thread.interrupt_main()  # it listens
            raise error
        # As text: who keeps the traceback keeps the caches in its frames.
        where = traceback.extract_tb(error.__traceback__)[-1]
        logging.error(
            f"All requests under way end with {type(error).__name__} in {where.name} "
            f"({where.filename}:{where.lineno})"
        )
        with self.answering:
            left = list(self.unanswered)
        for answers in left:
            answers.fail(as_ours(error))
        self.answers = None
        self.let_go()

    def generate(self, request: Any, generation_args: Any, *args: Any, **options: Any) -> Any:
        """Hand a request to the thread; see `ResponseGenerator.generate`.

        Args:
            request: mlx-lm's, with ``salt`` and ``gone`` (a `threading.Event`) besides, if any.
            generation_args: see there.
            args: see there.
            options: see there.

        Raises:
            Refusal: if it is answered with an error.
        """
        # An event cannot be sent to other processes, and this thread alone asks for it.
        self._here.gone = vars(request).pop("gone", None)
        provider = self.model_provider
        try:
            provider.require_known(generation_args.model)
            if self._ending or not self.generation_available():
                raise StoppedError("the server is about to end")
            if not provider.others and not _has_parts(request):
                # Here, where others are not held up by it.
                with self._reading:
                    request.found = self._understood(provider.tokenizer, request, generation_args)
            return super().generate(request, generation_args, *args, **options)
        except BrokenPipeError:
            raise
        except Exception as e:
            raise Refusal(e) from None

    def _await_response(self, response_queue: Any) -> Any:
        while True:
            if (gone := self._here.gone) is not None and gone.is_set():
                response_queue.abandoned = True
                raise BrokenPipeError("the client has gone")
            try:
                return response_queue.get(timeout=0.5)
            except Empty:
                if not self.generation_available():
                    raise StoppedError("the generation thread has ended") from None

    def _understood(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """A prompt's tokens, with what mlx-lm tells of them.

        Raises:
            RequestError: if there are none, or too many.
        """
        try:
            found = super()._tokenize(tokenizer, request, args)
            tokens = list(found[0])
        except Exception as e:
            raise RequestError(f"the request is not understood: {type(e).__name__}: {e}") from e
        if not tokens:
            raise RequestError("the prompt has no tokens: there is nothing to answer")
        if not all(isinstance(token, int) for token in tokens):
            raise RequestError("the prompt was not made into a list of tokens")
        most = self.model_provider.limits.prompt
        if most is not None and len(tokens) > most:
            raise RequestError(
                f"the prompt has {len(tokens):,} tokens, and this server takes {most:,} at most"
            )
        return found

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """Tokenize a prompt, and try what else mlx-lm makes of the request.

        mlx-lm does the rest where an error would end the thread, and this where it would not.

        Raises:
            RequestError: if the request cannot be understood.
        """
        found = vars(request).pop("found", None) or self._understood(tokenizer, request, args)
        known = self.model_provider.vocabulary
        if beyond := [token for token in args.logits.logit_bias or () if not 0 <= token < known]:
            raise RequestError(
                f"there is no token {beyond[0]}, only 0 to {known - 1}", "logit_bias"
            )
        if args.sampling.top_k >= known:
            raise RequestError(f"there are {known:,} tokens, so at most {known - 1:,}", "top_k")
        try:
            self._make_state_machine(self.model_provider.model_key, tokenizer, args.stop_words)
            server._make_sampler(args, tokenizer)
            server._make_logits_processors(args)
        except Exception as e:
            raise RequestError(f"the request is not understood: {type(e).__name__}: {e}") from e
        return found

    def _serve_single(self, request: Any, stream: Any) -> None:
        request[0].alone = True
        super()._serve_single(request, stream)

    def let_go(self) -> None:
        """Take back what the last step gave: mlx-lm's loop holds it until there is another.

        What is to be kept of it is among the prompt caches by now, in lists of their own.
        """
        for caches in self.given:
            caches.clear()
        self.given = []

    def _next_request(self, timeout: float | None = None) -> Any:
        self.let_go()
        self.beat = time.monotonic()
        request = super()._next_request(timeout)
        if request is not None:
            self._in_vain = 0
        if request is None or (not self._is_distributed and _abandoned(request[0])):
            return None
        queue, *rest = request
        self.answers = _Answers(queue, getattr(rest[0], "salt", ""), self)
        self.prompt_cache.salt = self.answers.salt
        return (self.answers, *rest)

    def _share_request(self, request: Any) -> Any:
        """Have all processes of a group take the same request, or end together."""
        if self._is_distributed and self._share_object(self._ending or None):
            self._stop = True
            return None
        return super()._share_request(request)

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
            self._answers.pop(uid, None)
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
        self._owner.beat = time.monotonic()
        if not self._owner._is_distributed:
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
            if self._owner._is_distributed:
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
        if self._owner._is_distributed and wanted:
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
        while ours and self._owner.model_provider.give_one_up():
            pass  # they may hold the pages that cannot be read
        waiting = {sequence[0] for sequence in (*self._unprocessed_sequences, *self._held)}
        self._prompt_batch = PromptProcessingBatch.empty(
            self.model, self.sampler, prefill_step_size=self.prefill_step_size
        )
        self._generation_batch = GenerationBatch.empty(self.model, self.sampler)
        self._currently_processing: list[Any] = []
        self._fail({uid: error for uid in self._answers if uid not in waiting})


def _guarded(answers: _Answers, given: Any) -> Any:
    """A request's sampler, or its logits processors, whose errors end this request alone.

    From the first one on the request is dropped: what is taken in their place is never seen.
    """
    if given is None:
        return None
    if isinstance(given, (list, tuple)):
        return [_guard(answers, processor, lambda tokens, logits: logits) for processor in given]
    return _guard(answers, given, lambda logprobs: mx.argmax(logprobs, axis=-1))


def _guard(
    answers: _Answers, function: Callable[..., mx.array], otherwise: Callable[..., mx.array]
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


def _has_parts(request: Any) -> bool:
    """Whether a chat has images: what becomes of them is computed with the model."""
    contents = [message.get("content") for message in request.messages]
    return any(
        part.get("type") != "text"
        for parts in contents
        if isinstance(parts, list)
        for part in parts
    )


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

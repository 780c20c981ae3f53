"""mlx-lm's generation thread over a wrapped model: no request ends it.

A request that cannot be understood, or that something fails for, is answered with an error; the
others do not notice, and the loop goes on.
"""

from __future__ import annotations

import _thread
import logging
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty
from typing import Any

from mlx_lm import server

from pagedkv.config.sizes import format_size
from pagedkv.integrations.mlx_lm.wrapping import wrapping_of
from pagedkv.integrations.server.answers import Answers, Ledger, abandoned
from pagedkv.integrations.server.batch_generator import PagedBatchGenerator
from pagedkv.integrations.server.errors import RequestError, StoppedError, as_ours
from pagedkv.integrations.server.prompt_cache import KeptPrompts

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


class PagedResponseGenerator(server.ResponseGenerator):  # type: ignore[misc]
    """mlx-lm's generation thread, which alone calls MLX.

    Attributes:
        answers: of the request that was taken last.
        ledger: requests that were taken and are not at their end.
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
        self.answers: Answers | None = None
        self.ledger = Ledger()
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
        for answers in self.ledger.all():
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
        return time.monotonic() - self.ledger.beat if self._loaded.is_set() else 0.0

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
        self._in_vain += not self.ledger.all()
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
        for answers in self.ledger.all():
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

    @property
    def distributed(self) -> bool:
        """Whether several processes answer together."""
        return bool(self._is_distributed)

    def give_one_up(self) -> bool:
        """Drop the prompt cache that is longest unused; False if there is none."""
        return bool(self.model_provider.give_one_up())

    def let_go(self) -> None:
        """Take back what the last step gave: mlx-lm's loop holds it until there is another.

        What is to be kept of it is among the prompt caches by now, in lists of their own.
        """
        for caches in self.given:
            caches.clear()
        self.given = []

    def _next_request(self, timeout: float | None = None) -> Any:
        self.let_go()
        self.ledger.beat = time.monotonic()
        request = super()._next_request(timeout)
        if request is not None:
            self._in_vain = 0
        if request is None or (not self._is_distributed and abandoned(request[0])):
            return None
        queue, *rest = request
        self.answers = Answers(queue, getattr(rest[0], "salt", ""), self.ledger)
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


def _has_parts(request: Any) -> bool:
    """Whether a chat has images: what becomes of them is computed with the model."""
    contents = [message.get("content") for message in request.messages]
    return any(
        part.get("type") != "text"
        for parts in contents
        if isinstance(parts, list)
        for part in parts
    )


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

"""mlx_lm.server with a paged cache: the same server, and what it lacks where pages run out.

Batches, prompt caches and the HTTP side are mlx-lm's. Added here: models are wrapped when they are
loaded; requests wait until their prompt fits; sequences kept for reuse are given up when pages are
short; and a request that cannot go on gets an error, while the others and the server live on.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Queue
from typing import Any

from mlx_lm import server
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch
from mlx_lm.models.cache import CacheList, LRUPromptCache

from pagedkv.admission import Wish, refused
from pagedkv.batch import BatchPagedLayerCache
from pagedkv.config import TierConfig
from pagedkv.errors import OutOfPagesError, PagedKVError
from pagedkv.models import unwrap, wrap, wrapping_of
from pagedkv.sizes import format_size
from pagedkv.stats import rows_of


class PagedModelProvider(server.ModelProvider):  # type: ignore[misc]
    """Loads models as mlx-lm's server does, and wraps them."""

    def __init__(
        self,
        cli_args: argparse.Namespace,
        config: TierConfig,
        prepare: Callable[[Any], None] = lambda model: None,
    ) -> None:
        """Make a provider; nothing is loaded yet.

        Args:
            cli_args: mlx_lm.server's own options.
            config: tiers of every model that is loaded.
            prepare: called with a model that was just loaded, such as to change its type.
        """
        self._config, self._prepare = config, prepare
        self.kept: LRUPromptCache | None = None
        super().__init__(cli_args)

    def _load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> None:
        super()._load(model_path, adapter_path, draft_model_path)
        self._prepare(self.model)
        cache = wrap(self.model, self._config)
        self.is_batchable = self.draft_model is None and all(hasattr(c, "merge") for c in cache)
        wrapping = wrapping_of(self.model)
        assert wrapping is not None
        wrapping.pager.relief.append(self._give_one_up)

    def _give_one_up(self) -> bool:
        """Drop the prompt cache that is longest unused; see `Pager.relief`."""
        if not self.kept:
            return False
        self.kept.trim_to(n_sequences=len(self.kept) - 1)
        return True

    def reset(self) -> None:
        """Let go of the model, and of everything that was kept of it."""
        wrapping = wrapping_of(self.model)
        if self.kept:
            self.kept.trim_to(n_sequences=0)
        if wrapping is not None:
            unwrap(self.model)
            wrapping.pager.close()
        super().reset()


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
    """

    def __init__(self, provider: PagedModelProvider, kept: LRUPromptCache) -> None:
        """Start the thread, which loads the model.

        Args:
            provider: of models.
            kept: prompt caches for reuse; the first thing to go when pages are short.
        """
        provider.kept = kept
        self.answers: _Answers | None = None
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
        with _instead(server, BatchGenerator=partial(PagedBatchGenerator, self)):
            super()._generate()

    def _next_request(self, timeout: float | None = None) -> Any:
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

    def next(self) -> tuple[list[Any], list[Any]]:
        """One step of every request; see `BatchGenerator.next`.

        A request that has no room, or whose pages cannot be read, is answered with the error and
        dropped; it is named once more among the prompts, for the server to forget it.
        """
        with self._held_back(self._refuse()):
            prompts, answers = self._step()
        for response in answers:
            if response.finish_reason is not None:
                self._answers.pop(response.uid, None)
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
        self._fail(self._no_room([(uid, row, now) for uid, row, now, _ in going]))
        if not self._unprocessed_sequences:
            return 0
        going = [item for item in going if item[0] in self._answers]
        wishes = [(uid, row, left) for uid, row, _, left in going if not self._is_failed(uid)]
        begin = len(self._unprocessed_sequences)
        for i, (uid, segments, _, cache, *_) in enumerate(list(self._unprocessed_sequences)):
            row = next(rows_of(_flat(cache)), None)
            if row is None:
                continue
            wishes.append((uid, row, sum(map(len, segments))))
            problem = self._no_room(wishes).get(uid)
            if problem is None:
                continue
            wishes.pop()
            if wishes:
                begin = i  # in order: who comes later does not overtake it
                break
            self._fail({uid: problem})
            return self._refuse()
        return begin

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
        held = [queue.pop() for _ in range(len(queue) - begin)]
        try:
            yield
        finally:
            self._unprocessed_sequences.extend(reversed(held))

    # Errors

    def _is_failed(self, uid: int) -> bool:
        answers = self._answers.get(uid)
        return answers is not None and answers.failed

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
        while self._owner.model_provider._give_one_up():
            pass  # they may hold the pages that cannot be read
        waiting = {sequence[0] for sequence in self._unprocessed_sequences}
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


class PagedAPIHandler(server.APIHandler):  # type: ignore[misc]
    """mlx-lm's handler, which tells the client about errors in the middle of an answer."""

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """Answer; see `APIHandler.handle_completion`."""
        try:
            super().handle_completion(request, stop_words)
        except PagedKVError as e:
            self._tell(e)

    def _tell(self, error: PagedKVError) -> None:
        """As an event where a stream has begun, else as a status of its own."""
        told = {"error": {"message": str(error), "type": type(error).__name__}}
        if self.stream:
            self.wfile.write(f"data: {json.dumps(told)}\n\n".encode())
            self.wfile.flush()
            return
        body = json.dumps(told).encode()
        self._headers_buffer: list[bytes] = []  # those of the answer that does not come
        self._set_completion_headers(503 if isinstance(error, OutOfPagesError) else 500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def serve(provider: PagedModelProvider, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until the process is interrupted.

    Args:
        provider: with mlx_lm.server's options.
        ready: called when the model is loaded and requests can come.

    Raises:
        Exception: if the model cannot be loaded.
        OSError: if the port cannot be had.
    """
    args = provider.cli_args
    generator = PagedResponseGenerator(provider, LRUPromptCache(args.prompt_cache_size))
    try:
        generator.wait()
        ready()
        server._run_http_server(args.host, args.port, generator, handler_class=PagedAPIHandler)
    finally:
        generator.stop_and_join()


def server_options(argv: list[str], parser: type[argparse.ArgumentParser]) -> argparse.Namespace:
    """Read mlx_lm.server's own options with its own parser.

    Args:
        argv: the options.
        parser: made in place of argparse's, to say in its way what is wrong.
    """
    found: list[argparse.Namespace] = []
    own = argparse.Namespace(ArgumentParser=parser)
    with (
        _instead(server, argparse=own, ModelProvider=lambda args: args),
        _instead(server, run=lambda host, port, args: found.append(args)),
        _instead(sys, argv=["", *argv]),
    ):
        server.main()
    return found[0]


@contextmanager
def _instead(module: Any, **names: Any) -> Iterator[None]:
    """Put things in place of a module's own for a while."""
    before = {name: getattr(module, name) for name in names}
    for name, value in names.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)

"""The requests that a generation thread has taken, each until its last word is said."""

from __future__ import annotations

import threading
import time
from queue import Queue
from typing import Any
from weakref import WeakSet

from mlx_lm import server


class Ledger:
    """Requests that are not at their end, for any thread to look at.

    Attributes:
        beat: when something was last done for one, on `time.monotonic`'s clock.
    """

    def __init__(self) -> None:
        """Make an empty one."""
        self.beat = time.monotonic()
        self._open: WeakSet[Answers] = WeakSet()  # mlx-lm's loop forgets those that were left
        self._lock = threading.Lock()

    def add(self, answers: Answers) -> None:
        """Note that a request was taken."""
        with self._lock:
            self._open.add(answers)

    def discard(self, answers: Answers) -> None:
        """Note that a request is at its end."""
        with self._lock:
            self._open.discard(answers)

    def all(self) -> list[Answers]:
        """Those that are not."""
        with self._lock:
            return list(self._open)


class Answers:
    """The queue on which one request is answered.

    Attributes:
        salt: what its sequences are kept apart by.
        failed: whether it was answered with an error; what comes later is left out.
        alone: whether it is served outside of the batch, so that it may be ended in its midst.
    """

    def __init__(self, queue: Queue[Any], salt: str, ledger: Ledger) -> None:
        self._queue, self.salt, self._ledger = queue, salt, ledger
        self._context: Any = None
        self.failed = self.alone = False
        ledger.add(self)

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return abandoned(self._queue)

    def put(self, item: Any) -> None:
        """As `Queue.put`."""
        self._ledger.beat = time.monotonic()
        if self.failed:
            return
        if isinstance(item, server.GenerationContext):
            self._context = item
        if isinstance(item, BaseException):
            # Its frames hold caches, and the thread that gets it must not be who lets go of them.
            item.__traceback__ = item.__context__ = item.__cause__ = None
        if item is None or isinstance(item, BaseException):  # the last one
            self._ledger.discard(self)
        elif self.alone and self.abandoned:
            raise ConnectionAbortedError("the client has gone")
        self._queue.put(item)

    def fail(self, error: BaseException) -> None:
        """Answer with an error, and have the server forget the request."""
        self.put(error)
        self.failed = True
        if self._context is not None:
            self._context.stop()


def abandoned(queue: Queue[Any]) -> bool:
    """Whether nobody waits for what is put on a request's queue."""
    return bool(getattr(queue, "abandoned", False))

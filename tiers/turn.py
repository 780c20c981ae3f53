"""One thread at a time in the caches of a model, and what it leaves behind for the next one."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import mlx.core as mx

if TYPE_CHECKING:
    from pagedkv.tiers.pages.warm_slab import WarmSlab

Method = TypeVar("Method", bound=Callable[..., Any])


class Turn:
    """The lock of a model's caches.

    Sequences share page numbers, slots and slabs, so of a model's threads one at a time changes
    them. A lazy array can only be evaluated by the thread that made it, and one that is being
    evaluated is safe to share only when that is over: once a second thread has come, slabs that
    were written are evaluated before the lock is released. While there is one thread alone, nothing
    waits.

    Attributes:
        lock: to be held for `begin` … `end`; the same thread may take it again.
        shared: whether more than one thread has come.
        written: slabs that may not be evaluated yet.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.shared = False
        self.written: set[WarmSlab] = set()
        self._thread = 0

    def begin(self) -> None:
        """Note whose turn it is."""
        thread = threading.get_ident()
        if thread != self._thread:
            self.shared = self.shared or self._thread != 0
            self._thread = thread
            self.end()

    def end(self) -> None:
        """Leave nothing to others that is not evaluated."""
        if self.shared and self.written:
            arrays = [slab.array for slab in self.written]
            mx.eval(arrays)
            mx.eval(arrays)  # the first time waits; now they count as there, with no event to ask
            self.written.clear()
        if self.shared and mx.default_device() == mx.gpu:
            mx.synchronize()  # nothing is under way on this thread's stream when another one comes


def exclusive(method: Method) -> Method:
    """Make a method run in its thread's turn.

    The object it belongs to has the turn as ``_turn``.
    """

    @functools.wraps(method)
    def in_turn(self: Any, /, *args: Any, **options: Any) -> Any:
        turn: Turn = self._turn
        with turn.lock:
            turn.begin()
            try:
                return method(self, *args, **options)
            finally:
                turn.end()

    return cast(Method, in_turn)

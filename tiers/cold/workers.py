"""Who does the background work: threads, or, in tests, a scheduler that a seed decides."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Executor(Protocol):
    """Does tasks in the background; those of one thread in the order in which they came."""

    def submit(self, task: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a task; its result or its error is in the future."""
        ...

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; those that run are waited for, those queued done or cancelled."""
        ...


class Workers(Protocol):
    """Makes executors, and waits for what they do.

    All that depends on the order in which background work happens goes through here, so that a
    test can decide that order, and see it again.
    """

    def executor(self, name: str, threads: int) -> Executor:
        """An executor of so many threads, whose names begin with `name`."""
        ...

    def wait_for(
        self, condition: threading.Condition, ready: Callable[[], bool], timeout: float | None
    ) -> bool:
        """`condition.wait_for(ready, timeout)`, the condition being held."""
        ...


class ThreadWorkers:
    """Threads of the system."""

    def executor(self, name: str, threads: int) -> Executor:
        """See `Workers.executor`."""
        return ThreadPoolExecutor(threads, thread_name_prefix=name)

    def wait_for(
        self, condition: threading.Condition, ready: Callable[[], bool], timeout: float | None
    ) -> bool:
        """See `Workers.wait_for`."""
        return condition.wait_for(ready, timeout)

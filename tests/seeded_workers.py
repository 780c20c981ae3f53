"""Background work in an order that a seed decides, for tests of what depends on that order.

One thing runs at a time. Most tasks run as a whole, on whichever thread waits or pauses at that
moment; some get a thread of their own and are interrupted where they meet the disk, so that others
go on in the middle of them. Who goes on is drawn from one random generator: the same seed and the
same calls give the same order.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from random import Random
from typing import Any

from pagedkv.tiers.disk.disk import Buffer
from pagedkv.tools.stress.faulty_disk import SILENT, FaultyDisk

IDLE: list[_Helper] = []
"""Threads without a task: making one costs more than most tasks."""


class Deadlock(AssertionError):
    """Somebody waits for what nobody will do."""


class _Strand:
    """A place from which the program can go on: the test's own, or that of an interrupted task."""

    def __init__(self) -> None:
        self.go = threading.Lock()
        self.go.acquire()
        self.ready: Callable[[], bool] | None = None


class _Helper(_Strand):
    def __init__(self) -> None:
        super().__init__()
        self.work: Callable[[], None] = lambda: None
        threading.Thread(target=self._run, daemon=True, name="seeded-worker").start()

    def _run(self) -> None:
        while True:
            self.go.acquire()
            self.work()


class SeededWorkers:
    """`Workers` that do their tasks when a random generator says so.

    Attributes:
        pace: how probable it is that others go on where they may.
        interrupted: how probable it is that a task is one that may be interrupted.
        seen: what happened how often.
    """

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.pace = self.random.choice((0.02, 0.2, 0.6))
        self.interrupted = self.random.choice((0.0, 0.1, 0.3))
        self.seen: Counter[str] = Counter()
        self._executors: list[SeededExecutor] = []
        self._main = self._running = _Strand()
        self._paused: list[_Strand] = []
        self._whole = 0  # tasks that run as a whole now, one above the other
        self._stuck = False

    # What the product calls

    def executor(self, name: str, threads: int) -> SeededExecutor:
        """See `Workers.executor`."""
        made = SeededExecutor(self, name, threads)
        self._executors.append(made)
        return made

    def wait_for(
        self, condition: threading.Condition, ready: Callable[[], bool], timeout: float | None
    ) -> bool:
        """See `Workers.wait_for`; a time runs out by chance, or when nothing else can happen."""
        if timeout == 0:
            return ready()

        def locked() -> bool:
            with condition:
                return ready()

        condition.release()
        try:
            if timeout is not None and self.random.random() < 0.1:
                self.seen["time ran out"] += 1
            elif not self.wait(locked) and timeout is None:
                raise Deadlock("waits for a buffer that nobody gives back")
        finally:
            condition.acquire()
        return ready()

    # What the test calls

    def switch(self) -> None:
        """Others may go on here, as far as chance has it."""
        if not self._whole:
            while self.random.random() < self.pace and self._let_another_go(None):
                pass

    def wait(self, ready: Callable[[], bool]) -> bool:
        """Let others go on until `ready`; False if it never will be."""
        while not ready():
            if self._whole:
                raise Deadlock("a task waits for another one")
            if not self._let_another_go(ready):
                return False
        return True

    def finish(self) -> None:
        """Let everybody go on to the end."""
        while self._let_another_go(None):
            pass

    # The order

    def _others(self) -> list[_Strand | SeededExecutor]:
        paused = [s for s in self._paused if s.ready is None or s.ready()]
        return [*paused, *(e for e in self._executors if e.can_start)]

    def _let_another_go(self, ready: Callable[[], bool] | None) -> bool:
        """Run another task, or a part of it; False if there is none."""
        others = self._others()
        if not others:
            return False
        chosen = others[self.random.randrange(len(others))]
        if isinstance(chosen, SeededExecutor):
            if self.random.random() >= self.interrupted:
                self.seen["task as a whole"] += 1
                self._whole += 1
                try:
                    chosen.take()
                    chosen.run_taken()
                finally:
                    self._whole -= 1
                return True
            self.seen["task with interruptions"] += 1
            helper = IDLE.pop() if IDLE else _Helper()
            helper.work = lambda: self._help(helper, chosen)
            chosen.take()
        else:
            helper = chosen  # type: ignore[assignment]
            self._paused.remove(chosen)
        me, me.ready = self._running, ready
        self._paused.append(me)
        self._hand_to(helper)
        me.go.acquire()
        if self._stuck:
            self._stuck = False
            return False
        return True

    def _hand_to(self, strand: _Strand) -> None:
        self._running = strand
        strand.go.release()

    def _help(self, me: _Helper, executor: SeededExecutor) -> None:
        """On a helper's thread: do a task, then let somebody else go on."""
        executor.run_taken()
        while others := self._others():
            chosen = others[self.random.randrange(len(others))]
            if isinstance(chosen, _Strand):
                self._paused.remove(chosen)
                break
            chosen.take()
            chosen.run_taken()
        else:
            chosen, self._stuck = self._main, True
            self._paused.remove(chosen)
        IDLE.append(me)
        self._hand_to(chosen)


class SeededExecutor:
    """First in, first out; as many at a time as it has threads."""

    def __init__(self, workers: SeededWorkers, name: str, threads: int) -> None:
        self.name = name
        self._workers = workers
        self._threads = threads
        self._queue: deque[tuple[Future[Any], Callable[..., Any], Any]] = deque()
        self._running = 0
        self._closed = False

    def submit(self, task: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """See `Executor.submit`."""
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future = SeededFuture(self._workers)
        self._queue.append((future, task, args))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `Executor.shutdown`."""
        self._closed = True
        while cancel_futures and self._queue:
            self._queue.popleft()[0].cancel()
        if wait and not self._workers.wait(lambda: not (self._running or self._queue)):
            raise Deadlock(f"{self.name} never ends")

    @property
    def can_start(self) -> bool:
        return bool(self._queue) and self._running < self._threads

    def take(self) -> None:
        """Begin the next task; it is run by `run_taken`."""
        self._running += 1
        self._next = self._queue.popleft()

    def run_taken(self) -> None:
        future, task, args = self._next
        try:
            if future.set_running_or_notify_cancel():
                future.set_result(task(*args))
        except BaseException as e:
            future.set_exception(e)
        finally:
            self._running -= 1


class SeededFuture(Future[Any]):
    """A future whose waiting lets others go on."""

    def __init__(self, workers: SeededWorkers) -> None:
        super().__init__()
        self._workers = workers

    def done(self) -> bool:
        self._workers.switch()
        return super().done()

    def result(self, timeout: float | None = None) -> Any:
        self._wait()
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._wait()
        return super().exception(0)

    def _wait(self) -> None:
        if not self._workers.wait(super().done):
            raise Deadlock("waits for a task that nobody does")
        self._workers.switch()  # who waited is not the first to go on


class ScheduledDisk(FaultyDisk):
    """A disk that may fail, and at whose page files tasks are interrupted.

    Attributes:
        workers: who decides the order.
        fuse: so many calls are still made before the process dies; None if it lives on.
    """

    workers: SeededWorkers
    fuse: int | None = None

    def _next(self, call: str) -> str | None:
        if self.fuse is not None:
            self.fuse -= 1
            self.dead |= self.fuse < 0
        return super()._next(call)

    def pread(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """See `Disk.pread`."""
        if not self._of_pages(fd):
            return super().pread(fd, buffers, offset)
        self.workers.switch()
        count = super().pread(fd, buffers, offset)
        self.workers.switch()
        return count

    def pwrite(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """See `Disk.pwrite`. What nobody is told of happens to page files only."""
        if not self._of_pages(fd):
            if self.silent:
                with self.quietly():
                    return super().pwrite(fd, buffers, offset)
            return super().pwrite(fd, buffers, offset)
        self.workers.switch()
        count = super().pwrite(fd, buffers, offset)
        self.workers.switch()
        return count

    def _of_pages(self, fd: int) -> bool:
        path = self._paths.get(fd)
        return path is not None and path.suffix == ".kv"

    @property
    def silent(self) -> bool:
        """Whether the fault that is to come is one that nobody is told of."""
        return self._armed is not None and self._armed[0] in SILENT

    def disarm(self) -> None:
        """The fault that was to come does not."""
        self._armed = None

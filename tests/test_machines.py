"""Thousands of random steps over the store and the cache, and mistakes that they must find."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from pagedkv.allocator import PageAllocator, PageTable
from pagedkv.tiers.checkpoints.index import Checkpoints
from pagedkv.tiers.cold.prefetch import ColdReader
from pagedkv.tiers.cold.writer import WriteBehind
from tests import machine_campaign
from tests.cache_machine import CacheMachine
from tests.machine_campaign import Outcome, run
from tests.pager_machine import PagerMachine
from tests.seeded_workers import Deadlock, SeededExecutor, SeededWorkers

PARTS, STEPS = (1, 2, 3, 5), 2_500


@pytest.mark.slow
@pytest.mark.parametrize("number", PARTS)
def test_ten_thousand_steps_of_the_pager(number: int) -> None:
    counts, seen = Counter[str](), Counter[str]()
    for batch in range(10):
        if counts.total() < STEPS:
            outcome = run(PagerMachine, number * 100 + batch, examples=5, steps=200)
            assert outcome.wrong is None, outcome.wrong
            counts.update(outcome.counts)
            seen.update(outcome.seen)
    assert counts.total() >= STEPS
    for step in ("seal", "read", "flush", "fork", "trim", "crash"):
        assert counts[step], f"never: {step}"
    for what in ("demoted", "written", "read", "read before they were written"):
        assert seen[f"pages {what}"], f"never: {what}"


@pytest.mark.slow
def test_hundreds_of_steps_of_whole_caches() -> None:
    # What Hypothesis draws depends on the modules that are loaded: one run may not do everything.
    wanted, seen = [f"pages {what}" for what in ("sealed", "demoted", "lowered")], Counter[str]()
    for number in (4, 1, 2):
        outcome = run(CacheMachine, number, examples=9, steps=40)
        assert outcome.wrong is None, outcome.wrong
        assert outcome.counts.total() >= 300
        seen.update(outcome.seen)
        if all(seen[what] for what in wanted):
            break
    for what in wanted:
        assert seen[what], f"never: {what}"


# Mistakes, planted


def lets_go_before_the_next_one_is_in_place(patch: pytest.MonkeyPatch) -> None:
    """Slots of the checkpoint on disk go to other pages while the next one is being written."""
    commit = Checkpoints.commit

    def early(self: Checkpoints, state: Any, *args: Any) -> int:
        if old := self._committed.get(state.sequence):
            self._files.let_go(old.places)
            old.places = []
        return commit(self, state, *args)

    patch.setattr(Checkpoints, "commit", early)


def forks_without_a_reference(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PageAllocator, "retain", lambda self, page: None)


def trims_a_page_too_many(patch: pytest.MonkeyPatch) -> None:
    """A page that keeps some of its tokens is let go as well, though a fork holds it."""
    trim = PageTable.trim

    def hasty(self: PageTable, tokens: int) -> int:
        dropped = trim(self, tokens)
        if self._entries and self._entries[-1].tokens < self._page_tokens:
            last = self._entries[-1].page
            if self._allocator.references(last) > 1:
                self._allocator.release(last)
        return dropped

    patch.setattr(PageTable, "trim", hasty)


def writes_the_last_page_first(patch: pytest.MonkeyPatch) -> None:
    def take(self: SeededExecutor) -> None:
        self._running += 1
        last = self.name == "pagedkv-writer"
        self._next = self._queue.pop() if last else self._queue.popleft()

    patch.setattr(SeededExecutor, "take", take)


def forgets_the_bytes_in_the_checksum(patch: pytest.MonkeyPatch) -> None:
    from pagedkv.tiers.disk import checksum as checksums

    real = checksums.sector_sums

    def some(data: Any) -> Any:
        sums = real(data)
        sums[np.arange(len(sums)) % 4 > 0] = 0  # three sectors of four
        return sums

    patch.setattr(checksums, "sector_sums", some)


def does_not_wait_for_the_writer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WriteBehind, "wait", lambda self: None)


def takes_a_buffer_back_that_is_being_read_into(patch: pytest.MonkeyPatch) -> None:
    def hasty(self: ColdReader, batch: Any) -> None:
        self._release(self._tickets.pop(batch))

    patch.setattr(ColdReader, "_discard", hasty)


Mistake = Callable[[pytest.MonkeyPatch], None]
OTHERS = ("discard", "store_page", "promote", "use", "corrupt_checkpoint")
PATIENT = bool(os.environ.get("MACHINE_MISTAKES"))
MISTAKES: dict[Mistake, tuple[str, ...]] = {
    lets_go_before_the_next_one_is_in_place: (
        *(*OTHERS, "corrupt", "look", "fork", "settle", "replace", "close", "read"),
    ),
    forks_without_a_reference: (),
    trims_a_page_too_many: (),
    writes_the_last_page_first: (),
    forgets_the_bytes_in_the_checksum: (*OTHERS, "arm", "flush", "reopen", "fork", "trim", "look"),
    does_not_wait_for_the_writer: (),
    takes_a_buffer_back_that_is_being_read_into: (
        *(*OTHERS, "arm", "flush", "reopen", "corrupt", "settle", "fork", "read", "close"),
    ),
}
"""Each with the steps that are left out, so that it is found soon."""
RARE = (lets_go_before_the_next_one_is_in_place, takes_a_buffer_back_that_is_being_read_into)
"""Found by some 3,000 steps and not by some 500: only with `MACHINE_MISTAKES=1`."""


def found(patch: pytest.MonkeyPatch, mistake: Mistake, number: int = 1) -> Outcome:
    with patch.context() as planted:
        mistake(planted)
        without = MISTAKES[mistake]
        return run(PagerMachine, number, examples=60, steps=100, shrink=False, without=without)


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if PATIENT or m not in RARE])
def test_a_mistake_is_found(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(found(monkeypatch, mistake, number).wrong for number in range(8 if PATIENT else 3))


def test_a_failure_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one depends on the order of the background work."""
    mistake = writes_the_last_page_first
    first, second = (found(monkeypatch, mistake) for _ in range(2))
    assert first.counts == second.counts
    assert first.seen == second.seen
    assert steps_of(first) == steps_of(second)


def steps_of(outcome: Outcome) -> list[str]:
    assert outcome.wrong is not None
    steps = [line for line in outcome.wrong.splitlines() if line.startswith("state.")]
    assert steps[0].startswith("state.begin(seed=")
    return steps


def test_a_campaign_counts_its_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(machine_campaign.EXAMPLES, "cache", 2)
    assert machine_campaign.main(["--seed", "3", "--batch", "9", "--machine", "cache"]) == 0
    out = capsys.readouterr().out
    assert "every one checked, no violation" in out
    assert out.count("  cache: ") > 8


# The scheduler


def order(seed: int) -> list[str]:
    """Which tasks ran when, of one writer and two readers that are interrupted."""
    workers, done = SeededWorkers(seed), list[str]()

    def task(name: str) -> str:
        done.append(f"{name} begins")
        workers.switch()
        done.append(f"{name} ends")
        return name

    writer, readers = workers.executor("writer", 1), workers.executor("reader", 2)
    futures = [writer.submit(task, f"w{i}") for i in range(4)]
    futures += [readers.submit(task, f"r{i}") for i in range(4)]
    for future in reversed(futures):
        workers.switch()
        done.append(f"{future.result()} is there")
    writer.shutdown()
    readers.shutdown()
    return done


def test_one_seed_gives_one_order_and_others_give_others() -> None:
    assert all(order(seed) == order(seed) for seed in range(20))
    assert len({tuple(order(seed)) for seed in range(40)}) > 30


def test_one_thread_takes_one_task_at_a_time_in_order() -> None:
    interrupted = 0
    for seed in range(40):
        done = order(seed)
        writes = [line for line in done if line.startswith("w") and "there" not in line]
        assert writes == [f"w{i} {what}" for i in range(4) for what in ("begins", "ends")]
        reads = [line for line in done if line.startswith("r") and "begins" in line]
        assert reads == sorted(reads)
        between = [b for a, b in pairwise(done) if a.endswith("begins")]
        interrupted += sum(not line.endswith("ends") for line in between)
    assert interrupted > 5


def test_who_waits_for_nothing_is_told() -> None:
    workers = SeededWorkers(1)
    executor = workers.executor("reader", 1)
    inner = executor.submit(lambda: executor.submit(lambda: 1).result())
    with pytest.raises(Deadlock):
        inner.result()
    condition = threading.Condition()
    with condition, pytest.raises(Deadlock):
        workers.wait_for(condition, lambda: False, None)


def test_an_error_and_a_cancelled_task_are_as_in_a_pool_of_threads() -> None:
    workers = SeededWorkers(1)
    executor = workers.executor("reader", 1)
    failed = executor.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failed.result()
    late = executor.submit(lambda: 1)
    executor.shutdown(cancel_futures=True)
    assert late.cancelled()
    with pytest.raises(RuntimeError):
        executor.submit(lambda: 1)

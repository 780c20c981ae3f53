"""Threads that share a wrapped model; see `tests.thread_campaign`."""

from __future__ import annotations

import subprocess
import sys
import threading

import mlx.core as mx
import pytest

import pagedkv
from pagedkv.tiers.pages.warm_slab import WarmSlab
from pagedkv.tiers.turn import Turn, exclusive


@pytest.mark.slow
@pytest.mark.parametrize("treatment", ["auto", "none"])
def test_threads_with_caches_of_their_own_get_what_they_get_alone(treatment: str) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.thread_campaign",
        "--requests",
        "3",
        "--runs",
        "1",
        "--prompts",
        "6",
    ]
    done = subprocess.run(
        [*command, "--treatment", treatment], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Shared:
    def __init__(self) -> None:
        self._turn = Turn()
        self.inside = self.most = 0

    @exclusive
    def work(self) -> int:
        self.inside += 1
        self.most = max(self.most, self.inside)
        if self.inside < 2:
            self.work()  # the same thread may enter again
        threading.Event().wait(0.001)
        self.inside -= 1
        return self.most


def test_one_thread_at_a_time_is_inside() -> None:
    shared = Shared()
    threads = [threading.Thread(target=shared.work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shared.most == 2 and shared.inside == 0 and shared._turn.shared


def test_what_a_thread_wrote_can_be_read_by_the_next() -> None:
    """A lazy array of another thread cannot be evaluated: MLX has no such stream here."""
    turn, slab = Turn(), WarmSlab(64, 4)

    def write() -> None:
        with turn.lock:
            turn.begin()
            slab.write([slab.take()], mx.ones((1, 16), mx.uint32))
            turn.written.add(slab)
            turn.end()

    turn.begin()
    assert not turn.shared
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert turn.shared and not turn.written
    assert slab.page_view(0).view("uint32").tolist() == [1] * 16


def test_an_error_inside_gives_the_turn_back() -> None:
    cache = pagedkv.PagedCache.standalone(1)
    with pytest.raises(pagedkv.ShapeError):
        cache[0].append(mx.zeros((1, 2)), mx.zeros((1, 2)))
    done = threading.Event()
    threading.Thread(target=lambda: (cache.close(), done.set())).start()
    assert done.wait(10)

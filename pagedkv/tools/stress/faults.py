"""A stress run on a disk that fails: what was injected, what was noticed, what was survived.

A fault that a call of the cache reports is survived by making the call again: the cache has taken
the call's tokens back. A page that is damaged on disk can only be made again from its tokens: the
sequence is trimmed to the first such page and fed once more. Whatever is not noticed this way
would show in the answers, and in the stored tokens, all of which are read in the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from pagedkv.cache.paged_cache import PagedCache
from pagedkv.errors import (
    ColdStoreError,
    CorruptPageError,
    CorruptStoreError,
    OutOfPagesError,
    PagedKVError,
)
from pagedkv.tiers import Disk, Page, RealDisk
from pagedkv.tiers.disk.disk import Buffer
from pagedkv.tools.stress.checks import Check
from pagedkv.tools.stress.faulty_disk import APPLIES, SILENT, FaultyDisk, Injection

T = TypeVar("T")

TRIES = 12
"""How often a call is made before it counts as not survived."""

TOLD = 0.01
"""Probability of each fault that the disk reports, in each call that may have it."""

FEW_PAGES = 16
"""Pages of a run up to which that holds for reads and writes of pages.

A call of the cache may read and write every page, and has to go through without a fault: with more
pages the probability goes down, so that about every fifth call fails, however long the context.
"""

DAMAGE = 0.6
"""How many faults of each silent kind are to be expected in a run."""

_LEAST_SILENT, _MOST_SILENT = 2e-4, 0.02
_OF_PAGES = ("eio_read", "flip_read", "eio_write", "enospc")


class _PageFaults(FaultyDisk):
    """Leaves what is written to checkpoints alone: a damaged one ends a sequence, as it must."""

    def pwrite(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """See `Disk.pwrite`."""
        path = self._paths.get(fd)
        if path is None or path.suffix != ".kv":
            return self._disk.pwrite(fd, buffers, offset)
        return super().pwrite(fd, buffers, offset)


class Faults:
    """The disk of a run, and what became of its faults.

    Attributes:
        disk: to be given to the pager.
        enabled: whether there are faults at all.
        noticed: errors that calls of the cache raised, by type.
        detected: silent faults by kind that were found in a damaged page.
        told: faults by kind that made a call raise.
        repaired: pages made again.
        check: whether everything was survived.
    """

    def __init__(
        self, seed: int, enabled: bool, pages: int, silent: bool = True, mortal: bool = False
    ) -> None:
        """Make the disk.

        Args:
            seed: of the schedule.
            enabled: let it fail.
            pages: that the run will write, about.
            silent: also with faults that nobody is told of.
            mortal: the disk can be taken away by `crash`.
        """
        self.enabled = enabled
        rate = min(_MOST_SILENT, max(_LEAST_SILENT, DAMAGE / max(1, pages)))
        rates = {kind: rate if kind in SILENT else TOLD for kind in APPLIES}
        for kind in _OF_PAGES:
            rates[kind] = TOLD * FEW_PAGES / max(FEW_PAGES, pages)
        if not silent:
            rates = {kind: rate for kind, rate in rates.items() if kind not in SILENT}
        self._faulty: _PageFaults | None = None
        if enabled or mortal:
            self._faulty = _PageFaults(RealDisk(), seed, rates if enabled else None)
        self.disk: Disk = self._faulty or RealDisk()
        self.noticed: Counter[str] = Counter()
        self.told: Counter[str] = Counter()
        self.detected: Counter[str] = Counter()
        self.repaired = 0
        self.check = Check("faults survived")
        self._silent: list[Injection] = []

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """No faults in here."""
        if self._faulty is None:
            yield
            return
        with self._faulty.quietly():
            yield

    @contextmanager
    def crash(self) -> Iterator[None]:
        """The disk is gone in here, as for a process that was killed: nothing more is written."""
        assert self._faulty is not None, "a mortal disk is needed"
        self._faulty.dead = True
        try:
            yield
        finally:
            self._faulty.dead = False

    def survive(
        self, call: Callable[[], T], repair: Callable[[], None], check: Callable[[], None]
    ) -> T:
        """Make a call until it succeeds; without faults, once.

        Args:
            call: to be made.
            repair: makes damaged pages again; used from the second time on that a page is bad.
            check: looks whether a failed call left everything as it was.

        Raises:
            ColdStoreError, OutOfPagesError: what the last try raised.
        """
        if not self.enabled:
            return call()
        for left in range(TRIES - 1, -1, -1):
            try:
                result = call()
            except (ColdStoreError, OutOfPagesError) as e:
                self._note(e)
                check()
                if not left:
                    self.check.fail(f"not in {TRIES} tries: {e}")
                    raise
                if isinstance(e, (CorruptPageError, CorruptStoreError)):
                    repair()
            else:
                self._collect(raised=False)
                self.check.count += 1
                return result
        raise AssertionError("unreachable")

    def _note(self, error: PagedKVError) -> None:
        self.noticed[type(error).__name__] += 1
        self._collect(raised=True)

    def _collect(self, raised: bool) -> None:
        """Look through the faults since the last time."""
        if self._faulty is None:
            return
        with self._faulty._lock:
            fresh, self._faulty.log = self._faulty.log, []
        for fault in fresh:
            if fault.kind in SILENT:
                self._silent.append(fault)
            elif raised:
                self.told[fault.kind] += 1

    def damaged(self, cache: PagedCache) -> int | None:
        """Read every page that is on disk; the token position of the first that is damaged.

        Warm pages are looked at as well: what was flushed of them must be sound. Silent faults that
        touched a damaged page are noted as detected.
        """
        self._collect(raised=False)
        first: int | None = None
        with self.quietly():
            for layer in cache.paged_layers:
                table, pager = layer._table, layer._pager
                for entry in table.entries if table is not None else ():
                    assert pager is not None
                    page = pager.pages[entry.page]
                    if page.record is None:
                        continue  # warm, and nowhere else
                    try:
                        for _ in pager.stream([(page.record,)]):
                            pass
                    except CorruptPageError as e:
                        self.noticed[type(e).__name__] += 1
                        self._match(cache, page)
                        self.repaired += 1
                        first = page.position if first is None else min(first, page.position)
        return first

    def _match(self, cache: PagedCache, page: Page) -> None:
        store, record = cache.context.pager.cold, page.record
        assert record is not None
        name = store._files.extent(record.place).file.path.name
        stop = record.offset + record.nbytes
        for fault in list(self._silent):
            inside = fault.start < stop and fault.stop > record.offset
            if fault.path is not None and fault.path.name == name and inside:
                self._silent.remove(fault)
                if fault.call != "also":
                    self.detected[fault.kind] += 1

    def to_dict(self) -> dict[str, Any]:
        """What happened, by kind, for the report.

        *detected* faults made a call raise, or were found in a damaged page. The others changed
        nothing: they were tried again inside the tiers, or hit bytes that nobody needed any more.
        """
        self._collect(raised=False)
        if self._faulty is None or not self.enabled:
            return {}
        kinds = []
        for kind in APPLIES:
            injected = self._faulty.injected[kind]
            detected = min(injected, self.told[kind] + self.detected[kind])
            kinds.append(
                {
                    "kind": kind,
                    "injected": injected,
                    "detected": detected,
                    "absorbed": injected - detected,
                }
            )
        return {
            "kinds": kinds,
            "injected": sum(k["injected"] for k in kinds),
            "errors": dict(self.noticed),
            "pages_made_again": self.repaired,
        }

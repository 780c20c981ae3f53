"""A store under test through its several processes: what it is made of, and what must be so.

The steps are in `tests/pager_machine.py`.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import numpy as np
from hypothesis.stateful import RuleBasedStateMachine

import pagedkv
from pagedkv.allocator import PAGE_ALIGNMENT, PageTable
from pagedkv.tiers import ColdRecord, LayerPager, Lineage, RealDisk
from pagedkv.tiers.checkpoints.file_format import Checkpoint, read_hot
from pagedkv.tiers.disk.io import aligned_buffer
from tests.pager_oracle import (
    SHAPES,
    Sequence_,
    Snapshot,
    Want,
    content,
    hot_parts,
    is_damaged,
    located,
    make_pager,
    on_disk,
    traffic,
)
from tests.seeded_workers import ScheduledDisk, SeededWorkers
from tests.store_oracle import Violation

MAX_SEQUENCES, MAX_STORED = 4, 4
TOLD = ("eio_read", "eio_write", "enospc", "fsync", "rename", "flip_read")
UNTOLD = ("flip_write", "zero", "drop", "misplace", "tear_4k", "cut")
HARMLESS = ("short_read", "short_write", "eintr")
SHM = Path("/dev/shm")


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """`np.array_equal`, of bytes, several times as fast."""
    return len(a) == len(b) and bool((a == b).all())


def blocks(name: str, start: int, stop: int) -> Iterator[tuple[str, int]]:
    """The units of a file that some of its bytes lie in."""
    return ((name, block) for block in range(start // PAGE_ALIGNMENT, -(-stop // PAGE_ALIGNMENT)))


def where() -> str | None:
    """Memory, if the system has it as a directory: the disk is not what is tested."""
    return str(SHM) if SHM.is_dir() else None


class PagerLife(RuleBasedStateMachine):
    """Sequences over one pager, several processes long, without the steps.

    Attributes:
        counts: steps so far by rule, of all examples.
        seen: what else happened, of all examples.
    """

    counts: ClassVar[Counter[str]] = Counter()
    seen: ClassVar[Counter[str]] = Counter()

    def start(self, seed: int) -> None:
        """An empty directory, and the first process; everything random follows from the seed."""
        self.directory = Path(tempfile.mkdtemp(prefix="pagedkv-machine-", dir=where()))
        self.workers = SeededWorkers(seed)
        self.disk = ScheduledDisk(RealDisk(), seed)
        self.disk.workers = self.workers
        self.sequences: list[Sequence_] = []
        self.stored: dict[str, dict[bytes, Snapshot]] = {}  # by name and by what the file holds
        self.touched: set[tuple[str, int]] = set()  # what somebody else changed
        self.older: dict[tuple[str, int, int], bytes] = {}  # earlier contents of slots
        self.rewound = False  # a checkpoint refers to slots that others may have by now
        self.moment = self.names = 0
        self.open()

    def open(self) -> None:
        self.pager, self.layers = make_pager(self.directory, disk=self.disk, workers=self.workers)
        self.age = 0  # steps since then
        self.faults: Counter[str] = Counter()  # of this process, as far as it was told
        self.tampered = False
        with self.disk.quietly(), self.no_warnings():
            self.store = self.pager.cold
        self.keeps_all = bool(self.store.sequences.checkpoints.damaged)

    def teardown(self) -> None:
        if not hasattr(self, "pager"):
            return
        try:
            with self.disk.quietly():
                self.read_everything()
        finally:
            self.disk.dead = True
            with suppress(Exception):
                self.seen.update(traffic(self.pager))
                self.pager.close()
                self.workers.finish()
            self.seen.update(self.workers.seen)
            shutil.rmtree(self.directory, ignore_errors=True)

    def end_and_begin(self, killed: bool) -> None:
        self.seen.update(traffic(self.pager))
        self.disk.disarm()
        self.disk.dead = killed
        self.pager.close()
        self.workers.finish()
        self.disk.dead = False
        self.sequences.clear()
        self.open()
        with self.disk.quietly():
            self.find_what_was_flushed()

    # What is there after a restart

    def find_what_was_flushed(self) -> None:
        store = self.store.sequences
        names = {s.sequence for s in store.checkpoints.stored()} | set(store.checkpoints.damaged)
        there = {n for n in self.stored if self.checkpoint(n).exists()}
        if names != there:
            raise Violation(f"the store knows {sorted(names)}, flushed were {sorted(there)}")
        for name in list(self.stored):
            if name not in there:
                del self.stored[name]
                continue
            data = self.checkpoint(name).read_bytes()
            wanted = self.stored[name].get(data)
            try:
                checkpoint = store.load(name)
                parts = [p for _, *pair in read_hot(self.disk, checkpoint) for p in pair]
            except pagedkv.CorruptStoreError as e:
                if wanted is not None or name not in str(e):
                    raise Violation(f"the checkpoint of {name} is whole: {e}") from e
                self.seen["damaged checkpoint"] += 1
                self.discard_name(name)
                continue
            if wanted is None:
                raise Violation(f"the checkpoint of {name} was changed, and nobody says so")
            self.match(checkpoint, parts, wanted)
            self.rewound |= wanted is not list(self.stored[name].values())[-1]
            self.stored[name] = {data: wanted}
            self.resume(name, checkpoint, wanted)
        self.read_everything()

    def match(self, checkpoint: Checkpoint, parts: list[np.ndarray], wanted: Snapshot) -> None:
        if checkpoint.state != wanted.state:
            raise Violation(f"{wanted.state.sequence}: the checkpoint tells of another state")
        for part, hot in zip(parts, hot_parts(wanted.state), strict=True):
            if not same(part, hot):
                raise Violation(f"{wanted.state.sequence}: its hot tokens are others")

    def resume(self, name: str, checkpoint: Checkpoint, wanted: Snapshot) -> None:
        """As `PagedCache.resume` does it."""
        sequence = self.named([layer.table() for layer in self.layers], Lineage(), name)
        wants = [(i, *page) for i, pages in enumerate(wanted.wants) for page in pages]
        done = 0
        try:
            for record, position, tokens in self.store.sequences.records(checkpoint):
                layer = self.layers[record.identity.layer]
                page = layer.adopt(record, position, sequence.lineage)
                sequence.tables[layer.layer].append(page, tokens)
                sequence.wants[layer.layer].append(wants[done][1:])
                done += 1
        except pagedkv.CorruptPageError as e:
            row = checkpoint.entries[done]
            want = wants[done][1]
            nbytes, offset = int(row["page_bytes"]), int(row["slot"] * row["page_bytes"])
            path = self.store.directory / f"layer-{want.layer:04d}-{nbytes // 1024}k.kv"
            held = path.read_bytes()[offset:] if path.exists() else b""
            if held.startswith(on_disk(want)):
                raise Violation(f"a page of {name} is in its file, and still: {e}") from e
            self.require_touched(nbytes, want.layer, offset, e)
            self.seen["missing page"] += 1
            self.rewound = True  # what lies beyond a file's end is not held
            self.let_go(sequence)
        else:
            if done != len(wants):
                raise Violation(f"{name} came back with {done} of {len(wants)} pages")

    def read_everything(self) -> None:
        for sequence in list(self.sequences):
            for layer in self.layers:
                self.read_pages(layer, sequence, layer)

    # What must be so after every step

    def done(self, step: str) -> None:
        self.counts[step] += 1
        self.age += 1
        self.workers.switch()
        self.take_note()
        self.check_everything()
        if self.sequences and self.age % 8 == 0:
            sequence = self.sequences[self.age // 16 % len(self.sequences)]
            layer = self.layers[self.age // 8 % len(SHAPES)]
            self.read_pages(layer, sequence, layer)

    def check_everything(self) -> None:
        records = {}
        for layer in self.layers:
            layer.check([s.tables[layer.layer] for s in self.sequences])
            slabs = dict(zip(layer.precisions, layer.slabs, strict=True))
            warm = {p: np.asarray(slab).view(np.uint8) for p, slab in slabs.items()}
            for sequence in self.sequences:
                for page, want in located(layer, sequence):
                    if page.slot is not None and not same(
                        warm[page.precision][page.slot], content(want)
                    ):
                        raise Violation(f"warm page {page.number} of {sequence.name} is another")
                    if (record := page.record) is None:
                        continue
                    records[id(record)] = record
                    if (pending := record.pending) is not None and not same(
                        pending[: record.nbytes], content(want)
                    ):
                        raise Violation(f"{record.identity} waits to be written and is another")
        store, budget = self.store, self.pager.budget
        store.check()
        places = [r.place for r in records.values()]
        held = sum(e.holders.total() for e in store._files._extents.values())
        kept = [*store.sequences.checkpoints.places()]
        if not self.keeps_all and held != len(places) + len(kept):
            raise Violation(f"{held} slots are held for {len(places)} pages and {len(kept)} kept")
        identities = {(r.place, r.identity) for r in records.values()}
        if not self.rewound and len(identities) != len(set(places)):
            raise Violation("two pages have one slot on disk")
        if store.nbytes > budget.cold_bytes or store.buffer_bytes > budget.write_buffer_bytes:
            raise Violation(f"{store.nbytes:,} on disk, {store.buffer_bytes:,} in buffers")
        if (reader := self.pager.open_reader) and reader.nbytes > budget.staging_bytes:
            raise Violation(f"{reader.nbytes:,} bytes of staging")

    # Help

    def chosen(self, pick: int, new: bool = False) -> Sequence_:
        if not self.sequences or (new and len(self.sequences) < MAX_SEQUENCES):
            return self.named([layer.table() for layer in self.layers], Lineage())
        return self.sequences[pick // 7 % len(self.sequences)]

    def named(
        self, tables: list[PageTable], lineage: Lineage, name: str | None = None
    ) -> Sequence_:
        self.names += name is None
        sequence = Sequence_(name or f"{self.names:016x}", lineage, tables)
        self.sequences.append(sequence)
        return sequence

    def let_go(self, sequence: Sequence_) -> None:
        for table in sequence.tables:
            table.clear()
        self.sequences.remove(sequence)

    def fresh(self, layer: LayerPager, precision: pagedkv.Precision) -> Want:
        self.moment += 1
        return Want(layer.layer, precision, self.moment)

    def checkpoint(self, name: str) -> Path:
        return self.store.directory / f"sequence-{name}.checkpoint"

    def discard_name(self, name: str) -> None:
        try:
            self.store.sequences.checkpoints.discard(name, durable=False)
        except pagedkv.SequenceNotFoundError:
            if self.checkpoint(name).exists() and not self.tampered:
                raise
        except pagedkv.ColdStoreError as e:
            self.excuse(e)
        if not self.checkpoint(name).exists():
            del self.stored[name]

    def overwrite(self, path: Path, data: bytes) -> None:
        self.tampered = True
        with path.open("r+b") as f:
            f.write(data)
            f.truncate(len(data))

    def read_pages(
        self, layer: LayerPager, sequence: Sequence_, following: LayerPager, stop: int = 0
    ) -> None:
        """Compare every byte of a sequence's pages with what it must be."""
        entries = sequence.tables[layer.layer].entries
        after = following.cold_batches(sequence.tables[following.layer].entries)
        wants, at = [want for want, _ in sequence.wants[layer.layer]], 0
        with self.may_fail(sequence, layer):
            runs = layer.records(layer.runs(entries), after)
            for number, (run, records, _) in enumerate(runs, 1):
                for got, want in zip(np.asarray(records), wants[at:], strict=False):
                    if not same(got.view(np.uint8), content(want)):
                        raise Violation(f"{sequence.name}: page {at} came back as another one")
                    at += 1
                if len(records) != len(run.entries):
                    raise Violation(f"{len(records)} of {len(run.entries)} pages came")
                if number == stop:
                    runs.close()
                    return
            if at != len(wants):
                raise Violation(f"{sequence.name}: {at} of {len(wants)} pages came")

    @contextmanager
    def may_fail(
        self,
        sequence: Sequence_ | None = None,
        layer: LayerPager | None = None,
        refused: Callable[[], bool] | None = None,
    ) -> Iterator[None]:
        """Errors are right where something was injected or damaged, and nowhere else."""
        try:
            yield
        except pagedkv.OutOfPagesError as e:
            self.seen["refused"] += 1
            if refused is not None and not refused() and not self.faulty():
                raise Violation(f"there is room, and still: {e}") from e
        except pagedkv.ColdStoreError as e:
            self.excuse(e, sequence, layer)

    def excuse(
        self,
        error: Exception,
        sequence: Sequence_ | None = None,
        layer: LayerPager | None = None,
    ) -> None:
        """See that an error is one that must be, and that it names the page."""
        self.take_note()
        if isinstance(error, pagedkv.CorruptPageError):
            for other in self.layers if layer is None else [layer]:
                for page, want in located(other, sequence) if sequence else ():
                    record = page.record
                    if record is not None and str(record.identity) in str(error):
                        if is_damaged(self.pager, record, want):
                            self.require_touched(record.nbytes, want.layer, record.offset, error)
                            self.seen["damaged page"] += 1
                            return
                        # A file whose end was lost may have grown again since, with zeros where
                        # the page had some.
                        touched = self.was_touched(record.nbytes, want.layer, record.offset)
                        if self.tampered or self.faults["flip_read"] or touched:
                            self.read_again(record, want)
                            return
            raise Violation(f"no page that was damaged: {error}") from error
        if not self.faulty():
            raise Violation(f"nothing was injected, and still: {error}") from error
        self.seen["disk error"] += 1

    def require_touched(self, nbytes: int, layer: int, offset: int, error: Exception) -> None:
        """A page that is not in its file any more must have been changed from outside."""
        if not self.rewound and not self.was_touched(nbytes, layer, offset):
            raise Violation(f"nobody but the store itself changed this page: {error}") from error

    def was_touched(self, nbytes: int, layer: int, offset: int) -> bool:
        """Whether a fault that nobody was told of changed some of these bytes of a layer's file."""
        name = f"layer-{layer:04d}-{nbytes // 1024}k.kv"
        return bool(self.touched & set(blocks(name, offset, offset + nbytes)))

    def read_again(self, record: ColdRecord, want: Want) -> None:
        """It was damaged when it was read ahead, or only read wrongly; now it must be right."""
        self.seen["page right again"] += 1
        out = aligned_buffer(record.nbytes)
        with self.disk.quietly():
            self.store.fetch([record], out).result()
        if not same(out, content(want)):
            raise Violation(f"{record.identity} came back as another one")

    def faulty(self) -> bool:
        self.take_note()
        return bool(self.faults) or self.tampered

    def take_note(self) -> None:
        for fault in self.disk.log:
            self.faults[fault.kind] += fault.kind not in HARMLESS
            if fault.path is not None and fault.kind in UNTOLD:
                self.touched.update(blocks(fault.path.name, fault.start, fault.stop))
        self.faults = +self.faults
        self.disk.log.clear()

    @contextmanager
    def no_warnings(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

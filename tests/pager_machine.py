"""A state machine over the pager and the cold store: pages sealed, moved, forked, lost and found.

Every step is checked against plain lists (`tests/pager_oracle.py`). Background work happens in an
order that one integer decides (`tests/seeded_workers.py`), so an example that fails is whole: its
steps and that integer.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import pagedkv
from pagedkv.allocator import PAGE_ALIGNMENT
from pagedkv.tiers import ColdRecord, LayerPager, Lineage, Pager, RealDisk
from pagedkv.tiers.checkpoint import Checkpoint, read_hot
from pagedkv.tiers.files import aligned_buffer
from tests.pager_oracle import (
    FAR,
    NEAR,
    RUN,
    SHAPES,
    SINKS,
    TOKENS,
    Sequence_,
    Snapshot,
    Want,
    content,
    encoded,
    hot_parts,
    is_damaged,
    located,
    make_pager,
    on_disk,
    snapshot,
)
from tests.seeded_workers import ScheduledDisk, SeededWorkers
from tests.store_oracle import Violation

NUMBER = st.integers(0, 2**16 - 1)
MAX_SEQUENCES, MAX_STORED = 4, 4
TOLD = ("eio_read", "eio_write", "enospc", "fsync", "rename", "flip_read")
UNTOLD = ("flip_write", "zero", "drop", "misplace", "tear_4k", "cut")
HARMLESS = ("short_read", "short_write", "eintr")
READS = {"eio_read", "flip_read"}
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


class PagerMachine(RuleBasedStateMachine):
    """Sequences over one pager, several processes long.

    Attributes:
        counts: steps so far by rule, of all examples.
        seen: what else happened, of all examples.
    """

    counts: Counter[str] = Counter()
    seen: Counter[str] = Counter()

    @initialize(seed=st.integers(0, 2**32 - 1))
    def begin(self, seed: int) -> None:
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
        self.pager, self.layers = make_pager(
            self.directory, disk=self.disk, workers=self.workers
        )
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
                self.pager.close()
                self.workers.finish()
            self.seen.update(self.workers.seen)
            shutil.rmtree(self.directory, ignore_errors=True)

    # Steps

    @rule(pick=NUMBER, count=st.integers(1, 4))
    def seal(self, pick: int, count: int) -> None:
        """New pages at the end of a sequence, at the near or the far step of the ladder."""
        sequence = self.chosen(pick, new=pick % 5 == 0)
        self.add_pages(sequence, FAR if pick % 3 == 0 else NEAR, count)
        self.done("seal")

    def add_pages(self, sequence: Sequence_, precision: pagedkv.Precision, count: int) -> None:
        self.pager.use(sequence.lineage)
        sure = all(l.shortage({precision: count}) is None for l in self.layers)
        for layer in self.layers:
            wants = [self.fresh(layer, precision) for _ in range(count)]
            start = SINKS + sequence.tables[layer.layer].tokens
            positions = [start + i * TOKENS for i in range(count)]
            pages = layer.seal(encoded(wants), precision, positions, sequence.lineage)
            mx.eval(*layer.slabs)
            for page, want in zip(pages, wants, strict=False):
                sequence.tables[layer.layer].append(page)
                sequence.wants[layer.layer].append((want, TOKENS))
            if len(pages) < count:
                self.seen["seal refused"] += 1
                if sure and not self.faulty():
                    raise Violation(f"room for {count} pages was promised, {len(pages)} had it")

    @rule(pick=NUMBER)
    def decode(self, pick: int) -> None:
        """The sequence used last goes on by a page, and is attended."""
        sequence = max(self.sequences, key=lambda s: s.lineage.tick, default=None)
        self.add_pages(sequence or self.chosen(pick), NEAR, 1)
        self.attend(sequence or self.chosen(pick))
        self.done("decode")

    @rule(pick=NUMBER)
    def store_page(self, pick: int) -> None:
        """One page more, encoded elsewhere."""
        sequence = self.chosen(pick)
        layer = self.layers[pick % len(SHAPES)]
        want = self.fresh(layer, (NEAR, FAR)[pick // 2 % 2])
        position = SINKS + sequence.tables[layer.layer].tokens
        with self.may_fail(refused=lambda: layer.shortage({want.precision: 1}) is not None):
            page = layer.store(encoded([want]), want.precision, position, sequence.lineage)
            sequence.tables[layer.layer].append(page)
            sequence.wants[layer.layer].append((want, TOKENS))
        self.done("store")

    @rule(pick=NUMBER)
    def replace(self, pick: int) -> None:
        """Another page in the place of one: what lowering does, and forks must not see."""
        sequence = self.chosen(pick)
        layer = self.layers[pick % len(SHAPES)]
        pages = sequence.wants[layer.layer]
        if not pages:
            return
        index = pick // 2 % len(pages)
        want = self.fresh(layer, FAR)
        entry = sequence.tables[layer.layer].entries[index]
        position = layer.pages[entry.page].position
        with self.may_fail(refused=lambda: layer.shortage({FAR: 1}) is not None):
            page = layer.store(encoded([want]), FAR, position, sequence.lineage)
            sequence.tables[layer.layer].replace(index, page)
            pages[index] = (want, pages[index][1])
        self.done("replace")

    @rule(pick=NUMBER)
    def use(self, pick: int) -> None:
        """Another sequence is the one used last: that decides who is demoted."""
        self.pager.use(self.chosen(pick).lineage)
        self.done("use")

    @rule(pick=NUMBER)
    def read(self, pick: int) -> None:
        """Attend: all layers one after the other, each reading ahead for the next."""
        self.attend(self.chosen(pick))
        self.done("read")

    def attend(self, sequence: Sequence_) -> None:
        for i, layer in enumerate(self.layers):
            self.read_pages(layer, sequence, self.layers[(i + 1) % len(SHAPES)])

    @rule(pick=NUMBER)
    def look(self, pick: int) -> None:
        """Begin to attend, and give up: what was read ahead stays."""
        sequence = self.chosen(pick)
        layer = self.layers[pick % len(SHAPES)]
        self.read_pages(layer, sequence, layer, stop=1 + pick // 2 % 2)
        self.done("look")

    @rule(pick=NUMBER)
    def promote(self, pick: int) -> None:
        sequence = self.chosen(pick)
        for layer in self.layers:
            entries = sequence.tables[layer.layer].entries
            with self.may_fail(sequence, layer):
                layer.promote(entries)
        self.done("promote")

    @rule(pick=NUMBER, tokens=st.integers(1, 4 * TOKENS))
    def trim(self, pick: int, tokens: int) -> None:
        sequence = self.chosen(pick)
        for layer in self.layers:
            held = sequence.tokens(layer.layer)
            dropped = sequence.tables[layer.layer].trim(tokens)
            if dropped != min(tokens, held):
                raise Violation(f"{dropped} of {held} tokens were trimmed, not {tokens}")
            sequence.trim(layer.layer, tokens)
        self.done("trim")

    @rule(pick=NUMBER)
    def fork(self, pick: int) -> None:
        sequence = self.chosen(pick)
        if len(self.sequences) >= MAX_SEQUENCES:
            self.let_go(self.sequences[(pick + 1) % len(self.sequences)])
        if sequence not in self.sequences:
            return
        twin = self.named([table.fork() for table in sequence.tables], sequence.lineage)
        twin.wants = [list(pages) for pages in sequence.wants]
        self.done("fork")

    @precondition(lambda self: len(self.sequences) > 2)
    @rule(pick=NUMBER)
    def close(self, pick: int) -> None:
        """A sequence goes: at once, or when the pager is used the next time."""
        sequence = self.chosen(pick)
        if pick % 2:
            for layer, table in zip(self.layers, sequence.tables, strict=True):
                layer.abandon(table)
            self.sequences.remove(sequence)
            self.pager.use(Lineage())
        else:
            self.let_go(sequence)
        self.done("close")

    @rule(pick=NUMBER)
    def flush(self, pick: int) -> None:
        """As `PagedCache.flush` does it."""
        sequence = self.chosen(pick)
        self.disk.disarm() if self.disk.silent else None
        names = [n for n in self.stored if n != sequence.name]
        if sequence.name not in self.stored and len(names) >= MAX_STORED:
            self.discard_name(names[pick // 2 % len(names)])
        self.moment += 1
        new = snapshot(sequence, self.moment)
        place = self.checkpoint(sequence.name)
        before = place.read_bytes() if place.exists() else None
        try:
            pages = []
            for layer, table in zip(self.layers, sequence.tables, strict=True):
                entries = table.entries
                for record, entry in zip(layer.copy_down(entries), entries, strict=True):
                    pages.append((record, layer.pages[entry.page].position, entry.tokens))
            self.store.sequences.commit(new.state, pages, hot_parts(new.state), pick % 4 == 0)
        except pagedkv.OutOfPagesError:
            self.seen["flush refused"] += 1
        except pagedkv.ColdStoreError as e:
            self.excuse(e, sequence)
        else:
            if self.store._writer.unwritten(record for record, _, _ in pages):
                raise Violation("a flush returned, and pages are not in their files")
            self.stored.setdefault(sequence.name, {})[place.read_bytes()] = new
            self.done("flush")
            return
        after = place.read_bytes() if place.exists() else None
        if after != before:  # it failed after the last step but one
            assert after is not None
            self.stored.setdefault(sequence.name, {})[after] = new
        self.done("flush that failed")

    @precondition(lambda self: len(self.stored) > 1)
    @rule(pick=NUMBER)
    def discard(self, pick: int) -> None:
        self.discard_name(list(self.stored)[pick % len(self.stored)])
        self.done("discard")

    @rule()
    def settle(self) -> None:
        """Wait for the writer."""
        self.store.flush()
        self.done("settle")

    @rule(kind=st.sampled_from(TOLD + UNTOLD + HARMLESS), after=st.integers(0, 5))
    def arm(self, kind: str, after: int) -> None:
        """One of the disk's next calls fails, or does something else than it says."""
        self.disk.arm(kind, after)
        self.done(f"fault: {kind}")

    @rule(pick=NUMBER, kind=st.sampled_from(("flip", "swap", "copy", "stale", "zero", "cut")))
    def corrupt(self, pick: int, kind: str) -> None:
        """Somebody changes a page file."""
        files = sorted(self.store.directory.glob("*.pages"))
        if not files:
            return
        random = Random(pick)
        path = random.choice(files)
        unit = int(path.stem.rpartition("-")[2][:-1]) << 10
        data = bytearray(path.read_bytes())
        slots = len(data) // unit
        if not slots:
            return
        a, b = (random.randrange(slots) * unit for _ in range(2))
        key = (path.name, a, unit)
        was = bytes(data[a : a + unit])
        if kind == "flip":
            data[a + random.choice((0, 7, 4100, unit - 1))] ^= 1 << random.randrange(8)
        elif kind == "zero":
            data[a : a + unit] = bytes(unit)
        elif kind == "cut":
            del data[a + random.choice((0, unit // 2)) :]
        elif kind == "stale":
            data[a : a + unit] = self.older.get(key, was)
        else:
            other = bytes(data[b : b + unit])
            data[b : b + unit] = was if kind == "swap" else other
            data[a : a + unit] = other
        self.older[key] = was
        for start in (a, b) if kind in ("swap", "copy") else (a,):
            stop = slots * unit + unit if kind == "cut" else start + unit
            self.touched.update(blocks(path.name, start, stop))
        self.overwrite(path, data)
        self.done(f"corrupt: {kind}")

    @rule(pick=NUMBER, kind=st.sampled_from(("flip", "cut", "swap", "stale")))
    def corrupt_checkpoint(self, pick: int, kind: str) -> None:
        """Somebody changes a checkpoint."""
        paths = {n: self.checkpoint(n) for n in self.stored}
        names = [n for n, path in paths.items() if path.exists() and path.stat().st_size]
        if not names:
            return
        random = Random(pick)
        name = random.choice(names)
        data = bytearray(self.checkpoint(name).read_bytes())
        if kind == "flip":
            at = random.choice((0, 9, 70, random.randrange(2**16)))
            data[at % len(data)] ^= 1 << random.randrange(8)
        elif kind == "cut":
            del data[random.randrange(len(data)) :]
        elif kind == "swap":
            data[:] = self.checkpoint(random.choice(names)).read_bytes()
        else:
            data[:] = random.choice(list(self.stored[name]))
        self.overwrite(self.checkpoint(name), data)
        self.done(f"corrupt checkpoint: {kind}")

    @precondition(lambda self: self.age > 12)
    @rule(killed=st.booleans())
    def reopen(self, killed: bool) -> None:
        """The process ends, by itself or not, and another one begins."""
        self.disk.disarm()
        self.disk.dead = killed
        self.pager.close()
        self.workers.finish()
        self.disk.dead = False
        self.sequences.clear()
        self.open()
        with self.disk.quietly():
            self.find_what_was_flushed()
        self.done("crash" if killed else "close and open")

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
            path = self.store.directory / f"layer-{want.layer:04d}-{nbytes // 1024}k.pages"
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
        if self.sequences and self.age % 4 == 0:
            sequence = self.sequences[self.age // 8 % len(self.sequences)]
            layer = self.layers[self.age // 4 % len(SHAPES)]
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

    def named(self, tables: list, lineage: Lineage, name: str | None = None) -> Sequence_:
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
    def may_fail(self, sequence: Sequence_ | None = None, layer=None, refused=None) -> Iterator:
        """Errors are right where something was injected or damaged, and nowhere else."""
        try:
            yield
        except pagedkv.OutOfPagesError as e:
            self.seen["refused"] += 1
            if refused is not None and not refused() and not self.faulty():
                raise Violation(f"there is room, and still: {e}") from e
        except pagedkv.ColdStoreError as e:
            self.excuse(e, sequence, layer)

    def excuse(self, error: Exception, sequence: Sequence_ | None = None, layer=None) -> None:
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
                        if self.tampered or self.faults["flip_read"]:
                            self.read_again(record, want)
                            return
            raise Violation(f"no page that was damaged: {error}") from error
        if not self.faulty():
            raise Violation(f"nothing was injected, and still: {error}") from error
        self.seen["disk error"] += 1

    def require_touched(self, nbytes: int, layer: int, offset: int, error: Exception) -> None:
        """A page that is not in its file any more must have been changed from outside."""
        name = f"layer-{layer:04d}-{nbytes // 1024}k.pages"
        if not self.rewound and not self.touched & set(blocks(name, offset, offset + nbytes)):
            raise Violation(f"nobody but the store itself changed this page: {error}") from error

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
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


__all__ = ["RUN", "Pager", "PagerMachine"]

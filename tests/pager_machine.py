"""A state machine over the pager and the cold store: pages sealed, moved, forked, lost and found.

Every step is checked against plain lists (`tests/pager_oracle.py`). Background work happens in an
order that one integer decides (`tests/seeded_workers.py`), so an example that fails is whole: its
steps and that integer.
"""

from __future__ import annotations

from random import Random

import mlx.core as mx
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

import pagedkv
from pagedkv.tiers import Lineage
from tests.pager_life import (
    HARMLESS,
    MAX_SEQUENCES,
    MAX_STORED,
    TOLD,
    UNTOLD,
    PagerLife,
    blocks,
)
from tests.pager_oracle import (
    FAR,
    NEAR,
    SHAPES,
    SINKS,
    TOKENS,
    Sequence_,
    encoded,
    hot_parts,
    snapshot,
)
from tests.store_oracle import Violation

NUMBER = st.integers(0, 2**16 - 1)


class PagerMachine(PagerLife):
    """The steps. Each ends in `done`, which checks everything."""

    @initialize(seed=st.integers(0, 2**32 - 1))
    def begin(self, seed: int) -> None:
        self.start(seed)

    # Steps

    @rule(pick=NUMBER, count=st.integers(1, 4))
    def seal(self, pick: int, count: int) -> None:
        """New pages at the end of a sequence, at the near or the far step of the ladder."""
        sequence = self.chosen(pick, new=pick % 5 == 0)
        self.add_pages(sequence, FAR if pick % 3 == 0 else NEAR, count)
        self.done("seal")

    def add_pages(self, sequence: Sequence_, precision: pagedkv.Precision, count: int) -> None:
        self.pager.use(sequence.lineage)
        sure = all(layer.shortage({precision: count}) is None for layer in self.layers)
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
                self.pager.abandoned.append((layer, table._entries))  # as when it dies
            self.sequences.remove(sequence)
            self.pager.use(Lineage())
        else:
            self.let_go(sequence)
        self.done("close")

    @rule(pick=NUMBER)
    def flush(self, pick: int) -> None:
        """As `PagedCache.flush` does it."""
        self.done("flush" if self.flush_one(pick) else "flush that failed")

    def flush_one(self, pick: int) -> bool:
        sequence = self.chosen(pick)
        if self.disk.silent:
            self.disk.disarm()  # a checkpoint's pages are to be what they were when it was made
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
            return True
        after = place.read_bytes() if place.exists() else None
        if after != before:  # it failed after the last step but one
            assert after is not None
            self.stored.setdefault(sequence.name, {})[after] = new
        return False

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
        files = sorted(self.store.directory.glob("*.kv"))
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
        self.end_and_begin(killed)
        self.done("crash" if killed else "close and open")

    @precondition(lambda self: self.age > 12)
    @rule(pick=NUMBER, calls=st.integers(0, 30))
    def die_in_a_flush(self, pick: int, calls: int) -> None:
        """After so many calls of the system: there is the last checkpoint, or this one."""
        self.disk.disarm()
        self.faults["death"] += 1
        self.disk.fuse = calls
        done = self.flush_one(pick)
        self.disk.fuse = None
        self.end_and_begin(killed=True)
        self.done("crash after a flush" if done else "crash in a flush")

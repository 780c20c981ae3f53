"""The sealed pages of one layer: where each is, and how it gets there."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import (
    CacheStateError,
    ColdStoreError,
    KVShape,
    OutOfPagesError,
    PageAllocator,
    PagedKVError,
    PageGeometry,
    PageTable,
    Precision,
    TableEntry,
)
from pagedkv.allocator.geometry import PAGE_TOKENS
from pagedkv.tiers.codec.affine import AffineCodec, Sixteen, codec_for
from pagedkv.tiers.codec.transform import Treatment
from pagedkv.tiers.cold.page_lru import KeptPages
from pagedkv.tiers.cold.prefetch import Batch
from pagedkv.tiers.cold.record import ColdRecord
from pagedkv.tiers.pages.bounds import LayerBounds
from pagedkv.tiers.pages.demotion import DemotionOrder
from pagedkv.tiers.pages.page import Lineage, Page, Run
from pagedkv.tiers.pages.warm_slab import WarmSlab
from pagedkv.tiers.shared import SharedTiers

RUN_TOKENS = 4096
"""Tokens attended together, at most; a run of cold pages is also one read from disk."""

FEW_PAGES = 8
"""A window that holds fewer pages gets the smallest ones."""

LEAST_SLOTS = 2
"""A slab keeps so many slots however short memory is."""

RELIEF_PAGES = 4
"""Pages demoted beyond need each time pages are sealed while memory is short."""

RUN_BYTES = 4 * 2**20
"""Bytes of a run, at most, unless a single page is larger. Staging holds eight of them, so the disk
stays busy while one is copied and another one attended: 8-bit runs of twice that overlap at 0.77,
these at 0.93 (`docs/design.md`)."""


def choose_page_tokens(
    shape: KVShape, precisions: Sequence[Precision], span: int | None = None
) -> int:
    """Tokens per page: what the geometry prefers, but small pages where few of them fit.

    Args:
        shape: what the layer caches per token.
        precisions: of its pages.
        span: tokens of a sequence that are ever in pages, if that is bounded.
    """
    preferred = PageGeometry.choose_tokens(shape, precisions)
    if span is not None and span < FEW_PAGES * preferred:
        return PAGE_TOKENS[0]  # padding costs less than what whole large pages leave in 16 bit
    return preferred


class LayerPager:
    """The sealed pages of one layer, of all sequences."""

    def __init__(
        self,
        pager: SharedTiers,
        layer: int,
        shape: KVShape,
        hot_dtype: mx.Dtype,
        span: int | None = None,
        treatment: Treatment | None = None,
    ) -> None:
        budget = pager.budget
        self._pager = pager
        self.layer = layer
        self.shape = shape
        self.hot_dtype = hot_dtype
        self.treatment = treatment
        self.precisions = budget.ladders.of(layer).beyond(budget.hot_tokens)
        self.page_tokens = budget.page_tokens or choose_page_tokens(shape, self.precisions, span)
        self.codecs: dict[Precision, AffineCodec | Sixteen] = {
            p: codec_for(shape, self.page_tokens, p, hot_dtype, treatment) for p in self.precisions
        }
        # A run's length is a matter of geometry alone, so that budgets change no result.
        largest = max(codec.geometry.page_bytes for codec in self.codecs.values())
        self.least_page_bytes = min(codec.geometry.page_bytes for codec in self.codecs.values())
        self.pages_per_run = max(1, min(RUN_TOKENS // self.page_tokens, RUN_BYTES // largest))
        self.allocator = PageAllocator()
        self.pages: dict[int, Page] = {}
        self.moves = 0  # how often a page went to another tier
        self._slabs = self._make_slabs()
        self._order = {p: DemotionOrder() for p in self.precisions}
        self._sized = False
        self.bounds = LayerBounds(budget.bounds_bytes // pager.layers)
        self._unbounded: dict[ColdRecord, int] = {}  # pages that came without theirs
        self.kept = KeptPages(budget.kept_pages)
        self._tables: weakref.WeakSet[PageTable] = weakref.WeakSet()
        self._moving: tuple[Precision, mx.array, list[Page]] | None = None

    def treat(self, treatment: Treatment | None) -> None:
        """Settle what is done to keys and values.

        Raises:
            CacheStateError: if there are pages, made otherwise.
        """
        if self.pages:
            raise CacheStateError(
                f"layer {self.layer} has {len(self.pages)} pages, and those of one layer are all "
                f"made with the same matrices; please report this"
            )
        self.treatment = treatment
        self._pager.settle(self.layer, treatment)
        for precision in self.precisions:
            self.codecs[precision] = codec_for(
                self.shape, self.page_tokens, precision, self.hot_dtype, treatment
            )

    def _make_slabs(self) -> dict[Precision, WarmSlab]:
        sizes = {p: codec.geometry.page_bytes for p, codec in self.codecs.items()}
        budget, layers = self._pager.budget, self._pager.layers
        slots = budget.warm_slots(layers, self.layer, self.page_tokens, sizes)
        if self._pager.has_cold:
            budget.require_cold(layers, self.layer, max(sizes.values()), self.pages_per_run)
        return {p: WarmSlab(sizes[p], slots[p]) for p in self.precisions}

    @property
    def warm_tokens(self) -> int:
        """Tokens in pages that are in memory, of all sequences, at most."""
        return self.page_tokens * sum(slab.max_slots for slab in self._slabs.values())

    @property
    def run_tokens(self) -> int:
        """Tokens in a full run."""
        return self.pages_per_run * self.page_tokens

    # Tables

    def table(self) -> PageTable:
        """An empty page table over this layer's pages."""
        return PageTable(self.allocator, self.page_tokens, self._forget, self._watch)

    def _watch(self, table: PageTable, entries: list[TableEntry]) -> None:
        """Release the pages of a table that nobody has any more at the next safe point."""
        self._tables.add(table)
        # No function of ours: an exception in a finalizer would be lost, and the pages with it.
        weakref.finalize(table, self._pager.abandoned.append, (self, entries))

    def release_entries(self, entries: list[TableEntry]) -> None:
        """Release the pages of a table that nobody has any more."""
        gone = PageTable(self.allocator, self.page_tokens, self._forget)  # not watched again
        gone.adopt(entries)
        gone.clear()

    def _forget(self, number: int) -> None:
        page = self.pages.get(number)
        if page is None:
            return  # released: its cache was dropped, not closed, and is found only now
        self.bounds.forget(number)
        if page.record is not None:
            self._unbounded.pop(page.record, None)
            self.kept.forget(page.record)
            self._pager.cold.free(page.record)
            self._pager.reader.forget_freed()
        if page.slot is not None:
            slot, page.slot = page.slot, None
            self._slabs[page.precision].give(slot)
        del self.pages[number]  # last: `recover` finds by it what was not given back yet

    # Sealing

    def shortage(self, more: Mapping[Precision, int]) -> str | None:
        """Why pages cannot be stored, with the numbers; None if they can.

        Args:
            more: per precision, the pages to come less the pages that leave it.
        """
        beyond = {p: n - self._slabs[p].room for p, n in more.items() if n > self._slabs[p].room}
        if not beyond:
            return None  # without asking the cold store, which may not even be open
        growth = self._pager.cold.growth(self.layer) if self._pager.has_cold else 0
        for precision, pages in beyond.items():
            slab = self._slabs[precision]
            room = clean = 0
            if self._pager.has_cold:
                room = self._pager.cold.room(self.layer, slab.page_bytes, growth)
            if pages > room or len(beyond) > 1:  # else it need not be counted, page by page
                clean = len(self._clean_pages(precision))
            if pages > clean + room:
                return (
                    f"layer {self.layer} needs {more[precision]} more {precision} pages of "
                    f"{slab.page_bytes:,} bytes: warm holds {slab.used} of {slab.max_slots}, "
                    f"cold {self._pager.cold_summary()} and takes {room}"
                )
            growth -= max(0, pages - clean) * slab.page_bytes
        return None

    def seal(
        self,
        records: mx.array,
        precision: Precision,
        positions: Sequence[int],
        lineage: Lineage,
    ) -> list[int]:
        """Store encoded pages warm, demoting the farthest pages if need be.

        Writes lazily: evaluate `slabs`, or start to, before they are used again.

        Args:
            records: uint32 ``[pages, page_bytes / 4]``.
            precision: one of `precisions`.
            positions: first token position of each page.
            lineage: whose pages these are.

        Returns:
            Page numbers, each with one reference that the caller owns. Fewer than asked for if
            no tier took more (full, or the disk failed); the pages returned are the first ones.
        """
        slab, numbers = self._slabs[precision], list[int]()
        while len(numbers) < len(positions):
            done = len(numbers)
            # Pages that are written together cannot make room for each other.
            most = max(LEAST_SLOTS, slab.capacity) if self.pressed else slab.max_slots
            slots = self._take_slots(precision, min(len(positions) - done, most, slab.max_slots))
            slab.write(slots, records[done : done + len(slots)])
            self._pager.turn.written.add(slab)
            for slot, position in zip(slots, positions[done:], strict=False):
                page = Page(self.allocator.allocate(), precision, position, lineage, slot=slot)
                self.pages[page.number] = page
                self._order[precision].add(page, slab.used)
                numbers.append(page.number)
            if not slots:
                break
        self._pager.counters.sealed += len(numbers)
        return numbers

    def _take_slots(self, precision: Precision, count: int) -> list[int]:
        """Up to so many warm slots, of pages that are demoted where none is free."""
        slab, slots = self._slabs[precision], list[int]()
        if self.pressed:
            for each in self.precisions:
                self._relieve(each)
        else:
            slab.reserve(slab.used + count)
        try:
            while len(slots) < count:
                self._make_room(precision)
                slots.append(slab.take())
        except (OutOfPagesError, ColdStoreError):
            pass  # what there is has to do; the tokens of the others stay hot
        return slots

    def lower(self, number: int, precision: Precision) -> int:
        """Encode a page again at a lower precision, as a new page.

        Starts from the stored numbers: the 16-bit ones are gone. Keys or values that keep their
        bits are copied. The old page is untouched. Writes lazily, as `seal` does.

        Returns:
            The new page's number, with one reference that the caller owns.

        Raises:
            OutOfPagesError: if no tier has room.
            ColdStoreError: if the disk failed.
        """
        old = self.pages[number]
        record = self._one_record(old)
        fresh = self.codecs[precision].recode(record, self.codecs[old.precision])
        number = self._put(fresh, precision, old.position, old.lineage)
        self._pager.counters.lowered += 1
        return number

    def store(self, record: mx.array, precision: Precision, position: int, lineage: Lineage) -> int:
        """Store a page that is encoded already, such as one from a saved cache.

        Returns:
            The page's number, with one reference that the caller owns.

        Raises:
            OutOfPagesError: if no tier has room.
            ColdStoreError: if making room for it failed on the disk.
        """
        while True:
            try:
                number = self._put(record, precision, position, lineage)
                break
            except OutOfPagesError:
                if not self._pager.relieve():
                    raise
        mx.eval(self._slabs[precision].array)
        return number

    def _put(self, record: mx.array, precision: Precision, position: int, lineage: Lineage) -> int:
        """See `store`; lazily."""
        slab = self._slabs[precision]
        self._make_room(precision)
        slot = slab.take()
        slab.write([slot], record)
        self._pager.turn.written.add(slab)
        page = Page(self.allocator.allocate(), precision, position, lineage, slot=slot)
        self.pages[page.number] = page
        self._order[precision].add(page, slab.used)
        return page.number

    @property
    def pressed(self) -> bool:
        """Whether memory is short and pages may go to disk instead."""
        return self._pager.has_cold and self._pager.pressure.high

    def _make_room(self, precision: Precision) -> None:
        """See that the slab has a slot: by growing within its share, else by demoting a page.

        While memory is short the other way round. No page is refused for that: where the disk
        takes none, the slab grows.
        """
        slab = self._slabs[precision]
        if not slab.room:
            self._demote_farthest(precision)
        elif not slab.free and self.pressed and self._warm_pages(precision):
            with suppress(OutOfPagesError, ColdStoreError):
                self._demote_farthest(precision)
                self._pager.counters.pressed += 1

    def _relieve(self, precision: Precision) -> None:
        """Demote a few pages, and give memory back once half of the slab is free.

        Called where pages are sealed: nothing reads the slab then, and a few pages at a time keep
        the pause short.
        """
        slab = self._slabs[precision]
        smaller = max(LEAST_SLOTS, slab.capacity // 2)
        if smaller >= slab.capacity:
            return
        with suppress(OutOfPagesError, ColdStoreError):
            for _ in range(min(RELIEF_PAGES, slab.used + 1 - smaller)):
                self._demote_farthest(precision)
                self._pager.counters.pressed += 1
        if slab.used >= smaller:  # one slot is left for the page that comes
            return
        pages, before = sorted(self._warm_pages(precision), key=lambda p: p.slot or 0), slab.nbytes
        moved = slab.gathered(smaller, [self._slot_of(page) for page in pages])
        self._moving = precision, moved, pages
        self._finish_moving()
        self.moves += 1
        self._pager.counters.warm_bytes_returned += before - slab.nbytes
        mx.clear_cache()  # MLX would keep it otherwise

    def _finish_moving(self) -> None:
        """Have pages where their slab's new array has them; doing it twice is fine."""
        if self._moving is not None:
            precision, array, pages = self._moving
            for slot, page in enumerate(pages):
                page.slot = slot
            self._slabs[precision].exchange(array, range(len(pages)))
            self._moving = None

    def _demote_farthest(self, precision: Precision) -> None:
        """Move one page to the cold tier: of the sequence longest unused, the oldest token's."""
        slab = self._slabs[precision]
        if not self._pager.has_cold:
            raise OutOfPagesError(
                f"warm tier full: layer {self.layer} holds {slab.used} {precision} pages "
                f"({slab.nbytes:,} bytes) and there is no cold tier"
            )
        page = self._order[precision].farthest()
        try:
            self._copy_down(page)
        except (OutOfPagesError, ColdStoreError):
            if not (clean := self._clean_pages(precision)):
                raise
            page = _farthest(clean)  # nearer, but the disk has it already
        assert page.slot is not None
        if self._pager.budget.bounds_bytes:
            self.bounds.add(page.number, self._geometry(page), slab.page_view(page.slot))
        slot, page.slot = page.slot, None
        slab.give(slot)
        self.moves += 1
        self._pager.counters.demoted += 1

    def _warm_pages(self, precision: Precision) -> list[Page]:
        """The pages in a slab; looks at all pages."""
        pages = self.pages.values()
        return [p for p in pages if p.slot is not None and p.precision == precision]

    def _clean_pages(self, precision: Precision) -> list[Page]:
        """Those of them that have a copy on disk."""
        return [p for p in self._warm_pages(precision) if p.record is not None]

    def _copy_down(self, page: Page) -> None:
        """See that a page has a copy on disk; written once, since its bytes never change."""
        if page.record is None:
            assert page.slot is not None
            layout = (page.precision.key_bits, page.precision.value_bits, self.page_tokens)
            data = self._slabs[page.precision].page_view(page.slot)
            page.record = self._pager.cold.put(self.layer, page.number, layout, data)

    def copy_down(self, entries: Sequence[TableEntry]) -> list[ColdRecord]:
        """Give every page of a table a copy on disk, in the background; warm ones stay warm.

        Returns:
            The copies, in order.

        Raises:
            OutOfPagesError: if the cold tier is full; the copies made so far are kept.
            ColdStoreError: if the disk failed.
        """
        records = []
        for entry in entries:
            page = self.pages[entry.page]
            while page.record is None:
                try:
                    self._copy_down(page)
                except OutOfPagesError:
                    if not self._pager.relieve():
                        raise
            records.append(page.record)
        return records

    def adopt(self, record: ColdRecord, position: int, lineage: Lineage) -> int:
        """Take over a page that is on disk already.

        Returns:
            The page's number, with one reference that the caller owns.

        Raises:
            KeyError: if the page's precision is none of `precisions`.
        """
        precision = Precision(*record.identity.layout[:2])
        if precision not in self.precisions:
            raise KeyError(f"no {precision} pages here")
        page = Page(self.allocator.allocate(), precision, position, lineage, record=record)
        self.pages[page.number] = page
        if self._pager.budget.bounds_bytes:
            self._unbounded[record] = page.number
        return page.number

    def _geometry(self, page: Page) -> PageGeometry:
        return self.codecs[page.precision].geometry

    def page_bytes(self, number: int) -> int:
        """Bytes of a page."""
        return self._geometry(self.pages[number]).page_bytes

    def promote(self, entries: Sequence[TableEntry]) -> int:
        """Bring cold pages back into free warm slots, nearest to the current token first.

        Their copies on disk stay: they can go down again without a write.

        Returns:
            How many pages moved up.
        """
        moved = 0
        for entry in reversed(entries):
            page = self.pages[entry.page]
            slab = self._slabs[page.precision]
            if page.slot is not None or not slab.room or (not slab.free and self.pressed):
                continue
            record = self._one_record(page)
            if page.record is not None:
                self.kept.forget(page.record)
            slot = slab.take()
            slab.write([slot], record)
            mx.eval(slab.array)
            page.slot = slot  # only now: its copy on disk is what counts until then
            self._order[page.precision].add(page, slab.used)
            self.moves += 1
            moved += 1
        self._pager.counters.promoted += moved
        return moved

    # Reading

    def runs(self, entries: Sequence[TableEntry]) -> list[Run]:
        """Cut a table into runs: at every change of precision and every `pages_per_run` pages."""
        per_run = self.pages_per_run
        runs = []
        numbered = enumerate(entries)
        for (_, precision), group in itertools.groupby(
            numbered, key=lambda item: (item[0] // per_run, self.pages[item[1].page].precision)
        ):
            runs.append(Run(tuple(entry for _, entry in group), precision))
        return runs

    def records(
        self, runs: Sequence[Run], following: Sequence[Batch] = ()
    ) -> Iterator[tuple[Run, mx.array, bool]]:
        """Yield the page records of each run, in order, wherever the pages are.

        Cold pages come through the staging ring, read ahead. For a run that had any, the third
        item is True, and the caller evaluates what it makes of the records before it asks for
        the next run: that is what keeps the memory of a long cold context bounded.

        Args:
            runs: from `runs`.
            following: cold batches that the next layer will want.

        Yields:
            The run, its records (uint32 ``[pages, page_bytes / 4]``), and whether it had cold
            pages.
        """
        batches = [self._cold_batch(run) for run in runs]
        staged = iter(())  # type: Iterator[npt.NDArray[np.uint8]]
        if any(batches):
            staged = self.stream([b for b in batches if b], following)
        for run, batch in zip(runs, batches, strict=True):
            if batch:
                yield run, self._assemble(run, next(staged)), True
            else:
                slots = [self._slot(e) for e in run.entries]
                yield run, self._slabs[run.precision].records(slots), False

    @property
    def slabs(self) -> list[mx.array]:
        """The page arrays, uint32 ``[slots, page_bytes / 4]``, in the order of `codecs`.

        Read them, never assign to them or keep them across a seal.
        """
        return [slab.array for slab in self._slabs.values()]

    @property
    def all_slabs_have_slots(self) -> bool:
        """Whether no page array is empty; once it is so it stays so."""
        if not self._sized:
            self._sized = all(slab.array.size for slab in self._slabs.values())
        return self._sized

    @property
    def any_cold(self) -> bool:
        """Whether pages of any layer have gone to disk."""
        return self._pager.open_cold is not None

    def stream(
        self, batches: Sequence[Batch], following: Sequence[Batch] = ()
    ) -> Iterator[npt.NDArray[np.uint8]]:
        """The bytes of cold batches, in order; see `ColdReader.stream`."""
        staged = self._pager.reader.stream(batches, following) if batches else iter(())
        # A prompt reads every page: keeping some of those would help no step.
        keep = 0 < sum(map(len, batches)) <= self.kept.most
        return self._seen(batches, staged, keep) if keep or self._unbounded else staged

    def _seen(
        self, batches: Sequence[Batch], staged: Iterator[npt.NDArray[np.uint8]], keep: bool
    ) -> Iterator[npt.NDArray[np.uint8]]:
        """What is staged; bounds are made of pages that were adopted without, copies are kept."""
        for batch, rows in zip(batches, staged, strict=True):
            at = 0
            for record in batch:
                page = rows[at : at + record.nbytes]
                number = self._unbounded.pop(record, None)
                if number is not None:
                    self.bounds.add(number, self._geometry(self.pages[number]), page)
                if keep:
                    self.kept.keep(record, page)
                at += record.nbytes
            yield rows

    def cold_batches(self, entries: Sequence[TableEntry]) -> list[Batch]:
        """The batches that attending `entries` will read, in order."""
        return [batch for run in self.runs(entries) if (batch := self._cold_batch(run))]

    def _slot(self, entry: TableEntry) -> int:
        return self._slot_of(self.pages[entry.page])

    def _slot_of(self, page: Page) -> int:
        assert page.slot is not None
        return page.slot

    def _cold_batch(self, run: Run) -> Batch:
        pages = (self.pages[e.page] for e in run.entries)
        return tuple(p.record for p in pages if p.slot is None and p.record is not None)

    def _assemble(self, run: Run, staged: npt.NDArray[np.uint8]) -> mx.array:
        """Warm and staged pages of a run, in page order."""
        geometry = self.codecs[run.precision].geometry
        rows = staged.view(np.uint32).reshape(-1, geometry.page_bytes // 4)
        pieces, row = [], 0
        cold = lambda e: self.pages[e.page].slot is None  # noqa: E731
        for is_cold, group in itertools.groupby(run.entries, key=cold):
            entries = list(group)
            if is_cold:
                pieces.append(mx.array(rows[row : row + len(entries)]))  # copies out of staging
                row += len(entries)
            else:
                slots = [self._slot(e) for e in entries]
                pieces.append(self._slabs[run.precision].records(slots))
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=0)

    def _one_record(self, page: Page) -> mx.array:
        entry = TableEntry(page.number, self.page_tokens)
        _, record, _ = next(self.records([Run((entry,), page.precision)]))
        return record  # staged bytes were copied; those of a slab are read when it is evaluated

    def release(self) -> None:
        """Let go of all memory; no page is there any more."""
        self.pages, self._slabs, self._order, self._unbounded = {}, {}, {}, {}
        self.bounds, self.kept = LayerBounds(0), KeptPages(0)

    def recover(self) -> None:
        """Let everything follow from the tables, after an operation that was broken off.

        Tables say which pages there are, a page says where it is; references, slots and the order
        of demotion are counted again. What is on disk, `FileColdStore.recover` sees to.
        """
        self._finish_moving()
        tables = list(self._tables)
        for table in tables:
            table.recover()
        held = Counter(entry.page for table in tables for entry in table)
        for number in self.pages.keys() - held:
            page = self.pages[number]
            self.bounds.forget(number)
            if page.record is not None:
                self._unbounded.pop(page.record, None)
                self.kept.forget(page.record)
            del self.pages[number]
        self.allocator.reset(held)
        for precision, slab in self._slabs.items():
            warm = self._warm_pages(precision)
            slab.exchange(slab.array, [self._slot_of(page) for page in warm])
            order = DemotionOrder()
            for page in warm:
                order.add(page, len(warm))
            self._order[precision] = order

    # Accounts

    @property
    def warm_bytes(self) -> int:
        """Bytes allocated in warm slabs."""
        return sum(slab.nbytes for slab in self._slabs.values())

    def check(self, tables: Sequence[PageTable]) -> None:
        """Conservation over pages, references, warm slots and cold records.

        Args:
            tables: every table of this layer that is alive.

        Raises:
            PagedKVError: naming what does not add up.
        """
        self.allocator.check([[e.page for e in table] for table in tables])
        for table in tables:
            table.check()
        if self.pages.keys() != self.allocator.pages():
            raise PagedKVError("located pages and allocated pages differ")
        for precision, slab in self._slabs.items():
            slab.check()
            slots = [
                p.slot
                for p in self.pages.values()
                if p.precision == precision and p.slot is not None
            ]
            if len(slots) != slab.used or len(set(slots)) != len(slots):
                raise PagedKVError(f"{precision}: {len(slots)} warm pages in {slab.used} slots")
        for page in self.pages.values():
            if page.slot is None and page.record is None:
                raise PagedKVError(f"page {page.number} is in no tier")
            if page.record is not None and not page.record.live:
                raise PagedKVError(f"page {page.number} has a copy on disk that was freed")


def _farthest(pages: Sequence[Page]) -> Page:
    """Of the sequence longest unused, the oldest token's."""
    return min(pages, key=lambda p: (p.lineage.tick, p.position))

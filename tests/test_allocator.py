"""Slots, pages and tables: a state machine that states the conservation law after every step."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from pagedkv.allocator import OutOfPagesError, PageAllocator, PagedKVError, PageTable, SlotPool

TOKENS = 256


class Tables(RuleBasedStateMachine):
    """Sequences that grow, shrink, fork and end; beside each table a plain list as its model."""

    tables = Bundle("tables")

    @initialize()
    def start(self) -> None:
        self.allocator = PageAllocator()
        self.freed: list[int] = []
        self.alive: list[tuple[PageTable, list[tuple[int, int]]]] = []

    @rule(target=tables)
    def new(self) -> int:
        self.alive.append((PageTable(self.allocator, TOKENS, self.freed.append), []))
        return len(self.alive) - 1

    @rule(table=tables, tokens=st.integers(1, TOKENS))
    def append(self, table: int, tokens: int) -> None:
        real, model = self.alive[table]
        page = self.allocator.allocate()
        real.append(page, tokens)
        model.append((page, tokens))

    @rule(table=tables, tokens=st.integers(0, 5 * TOKENS))
    def trim(self, table: int, tokens: int) -> None:
        real, model = self.alive[table]
        before = sum(n for _, n in model)
        assert real.trim(tokens) == min(tokens, before)
        left = max(0, before - tokens)
        kept: list[tuple[int, int]] = []
        for page, n in model:
            if left:
                kept.append((page, min(n, left)))
                left -= kept[-1][1]
        model[:] = kept

    @rule(target=tables, table=tables)
    def fork(self, table: int) -> int:
        real, model = self.alive[table]
        self.alive.append((real.fork(), list(model)))
        return len(self.alive) - 1

    @rule(table=tables, index=st.integers(0, 20))
    def replace(self, table: int, index: int) -> None:
        """Copy on write: only this table sees the new page."""
        real, model = self.alive[table]
        if index < len(model):
            page = self.allocator.allocate()
            real.replace(index, page)
            model[index] = (page, model[index][1])

    @rule(table=consumes(tables))
    def end(self, table: int) -> None:
        real, model = self.alive[table]
        real.clear()
        model.clear()

    @invariant()
    def conserved(self) -> None:
        self.allocator.check([[e.page for e in real] for real, _ in self.alive])
        for real, model in self.alive:
            real.check()
            assert [(e.page, e.tokens) for e in real] == model
            assert real.tokens == sum(n for _, n in model)
        held = {page for _, model in self.alive for page, _ in model}
        assert self.allocator.pages() == held


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


class Slots(RuleBasedStateMachine):
    """A pool that takes, gives and grows."""

    @initialize(capacity=st.integers(0, 5))
    def start(self, capacity: int) -> None:
        self.pool = SlotPool(capacity)
        self.model: set[int] = set()
        self.capacity = capacity

    @rule()
    def take(self) -> None:
        if len(self.model) == self.capacity:
            with pytest.raises(OutOfPagesError, match=str(self.capacity)):
                self.pool.take()
            return
        slot = self.pool.take()
        assert slot == min(set(range(self.capacity)) - self.model)  # the lowest free one
        self.model.add(slot)

    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        if self.model:
            slot = data.draw(st.sampled_from(sorted(self.model)))
            self.pool.give(slot)
            self.model.remove(slot)

    @rule(slot=st.integers(0, 10))
    def give_what_is_not_taken(self, slot: int) -> None:
        if slot not in self.model:
            with pytest.raises(PagedKVError, match="not taken"):
                self.pool.give(slot)

    @rule(more=st.integers(0, 4))
    def grow(self, more: int) -> None:
        self.capacity += more
        self.pool.grow(self.capacity)

    @invariant()
    def conserved(self) -> None:
        self.pool.check()
        assert self.pool.taken() == self.model
        assert self.pool.free == self.capacity - len(self.model)


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=50, deadline=None)


def test_check_notices_a_leak() -> None:
    allocator = PageAllocator()
    table = PageTable(allocator, TOKENS)
    table.append(allocator.allocate())
    leaked = allocator.allocate()  # in no table
    with pytest.raises(PagedKVError, match=f"{leaked}: \\(0, 1\\)"):
        allocator.check([[e.page for e in table]])


def test_check_notices_a_double_hold() -> None:
    allocator = PageAllocator()
    page = allocator.allocate()
    first, second = PageTable(allocator, TOKENS), PageTable(allocator, TOKENS)
    first.append(page)
    second.append(page)  # without retaining it
    with pytest.raises(PagedKVError, match="differ"):
        allocator.check([[e.page for e in t] for t in (first, second)])


def test_releasing_what_is_free_is_an_error() -> None:
    allocator = PageAllocator()
    page = allocator.allocate()
    assert allocator.release(page)
    with pytest.raises(PagedKVError, match="not allocated"):
        allocator.release(page)


def test_a_page_cannot_hold_more_than_it_holds() -> None:
    table = PageTable(PageAllocator(), TOKENS)
    with pytest.raises(PagedKVError, match="256 tokens cannot hold 257"):
        table.append(0, TOKENS + 1)

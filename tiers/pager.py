"""The tiers below the hot one, for all layers: budgets, cold store, staging, and their life."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from pagedkv.allocator import KVShape, LayerLadders, TableEntry
from pagedkv.tiers.budget import TierBudget
from pagedkv.tiers.checkpoints.file_format import ENTRY
from pagedkv.tiers.checkpoints.manifest import StoreIdentity
from pagedkv.tiers.codec.transform import Treatment, file_bytes, treated_parts
from pagedkv.tiers.cold.prefetch import ColdReader
from pagedkv.tiers.cold.workers import ThreadWorkers, Workers
from pagedkv.tiers.disk.disk import Disk, RealDisk
from pagedkv.tiers.memory_pressure import Pressure
from pagedkv.tiers.pages.layer_pager import LayerPager
from pagedkv.tiers.pages.page import Lineage
from pagedkv.tiers.shared import PagerCounters
from pagedkv.tiers.store import FileColdStore
from pagedkv.tiers.turn import Turn


@dataclass
class Pager:
    """The tiers below the hot one, for all layers and sequences of a wrapped model.

    The cold store's directory exists from its first mention until `close`, its threads and files
    from the first demotion.

    Attributes:
        budget: limits.
        layers: layers that share the budgets, in proportion to what a token takes in each.
        abandoned: entries of tables that are gone, to be released at the next safe point.
        inconsistent: whether an operation was broken off (Ctrl-C, no memory, an error that is
            not ours): `recover` comes before anything else.
        users: open layer caches, whatever their class; the last one to go closes the pager.
        disk: the file system of the cold tier.
        identity: of a cold store that lasts; None for one that goes with `close`.
        workers: who moves bytes in the background.
        pressure: says whether memory is short.
        relief: asked in turn when there is no room for pages: each gives up a sequence that it
            keeps for later, and says whether it had one.
        treatments: of layers' keys and values, to be set before a layer's first page.
        rotation: of layers that have none of those; empty for none.
        turn: of the threads that use it.
    """

    budget: TierBudget
    layers: int
    counters: PagerCounters = field(default_factory=PagerCounters)
    abandoned: deque[tuple[LayerPager, list[TableEntry]]] = field(default_factory=deque)
    inconsistent: bool = False
    users: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    disk: Disk = field(default_factory=lambda: RealDisk())
    identity: StoreIdentity | None = None
    workers: Workers = field(default_factory=lambda: ThreadWorkers())
    pressure: Pressure = field(init=False)
    relief: list[Callable[[], bool]] = field(default_factory=list)
    treatments: dict[int, Treatment] = field(default_factory=dict)
    rotation: str = ""
    turn: Turn = field(default_factory=Turn)

    def __post_init__(self) -> None:
        self.pressure = Pressure(self.budget.keep_free)
        self._layer_pagers: dict[int, LayerPager] = {}
        self._cold: FileColdStore | None = None
        self._reader: ColdReader | None = None
        self._tick = 0

    def layer(
        self, layer: int, shape: KVShape, hot_dtype: mx.Dtype, span: int | None = None
    ) -> LayerPager:
        """The pages of one layer; made at the first call, which fixes its shape.

        Args:
            layer: index among the model's layers.
            shape: what it caches per token.
            hot_dtype: type of its hot tokens.
            span: tokens of a sequence that are ever in pages, if that is bounded.

        Raises:
            ConfigError: if the warm budget holds no page of this shape.
        """
        if layer not in self._layer_pagers:
            treatment = self._treatment(layer, shape)
            self._layer_pagers[layer] = LayerPager(self, layer, shape, hot_dtype, span, treatment)
            if self._cold:
                self._cold.budget.reserve = self._checkpoint_reserve()
        return self._layer_pagers[layer]

    def _treatment(self, layer: int, shape: KVShape) -> Treatment | None:
        """Of a layer, if it is to have one and its keys and values are what was expected."""
        treatment = self.treatments.get(layer)
        if treatment is None and self.rotation:
            ladder = self.budget.ladders.of(layer)
            parts = treated_parts(ladder.beyond(self.budget.hot_tokens), self.rotation)
            treatment = Treatment.plain(shape, self.rotation).only(*parts) if any(parts) else None
        return treatment if treatment and treatment.shape == shape else None

    def settle(self, layer: int, treatment: Treatment | None) -> None:
        """Note a layer's treatment for as long as this pager is used."""
        self.treatments.pop(layer, None)
        if treatment:
            self.treatments[layer] = treatment

    def set_ladders(self, ladders: LayerLadders) -> None:
        """Give layers other ladders, before any of them is made."""
        assert not self._layer_pagers
        self.budget = replace(self.budget, ladders=ladders)
        if self._cold:
            self._cold.budget.ladders = ladders

    @property
    def layer_pagers(self) -> list[LayerPager]:
        """The layers that have a shape, in order."""
        return [self._layer_pagers[i] for i in sorted(self._layer_pagers)]

    @property
    def has_cold(self) -> bool:
        """Whether pages may go to disk at all."""
        return self.budget.cold_bytes > 0

    @property
    def cold(self) -> FileColdStore:
        """The cold store, opened at first use."""
        if self._cold is None:
            budget = self.budget
            reserve = self._checkpoint_reserve()
            store = FileColdStore(
                budget.cold_dir,
                budget.cold_bytes,
                self.layers,
                budget.write_buffer_bytes,
                disk=self.disk,
                identity=self.identity,
                write_limit=budget.write_limit,
                workers=self.workers,
            )
            store.budget.ladders, store.budget.reserve = budget.ladders, reserve
            self._cold = store
        return self._cold

    def _checkpoint_reserve(self) -> int:
        """Bytes for two checkpoints of a sequence: while one is replaced, both are there."""
        if self.identity is None:
            return 0
        budget, total = self.budget, 0
        for layer in self._layer_pagers.values():
            hot = budget.sink_tokens + budget.hot_tokens + layer.page_tokens
            pages = budget.cold_share(self.layers, layer.layer) // layer.least_page_bytes
            total += layer.shape.token_bytes(8 * layer.hot_dtype.size) * hot
            if layer.treatment:
                total += file_bytes(layer.shape)
            total += pages * ENTRY.itemsize
        return 2 * total

    @property
    def open_cold(self) -> FileColdStore | None:
        """The cold store if it is open."""
        return self._cold

    @property
    def reader(self) -> ColdReader:
        """The staging ring, made at first use."""
        if self._reader is None:
            self._reader = ColdReader(self.cold, self.budget.staging_bytes, workers=self.workers)
        return self._reader

    @property
    def open_reader(self) -> ColdReader | None:
        """The staging ring if there is one."""
        return self._reader

    def cold_summary(self) -> str:
        """The cold tier's state in a few words, for error messages."""
        if not self.has_cold:
            return "is off (cold=0)"
        error = self.cold.last_error
        state = f"has taken {self.cold.nbytes:,} of {self.budget.cold_bytes:,} bytes"
        if self.cold.budget.foreign:
            state += f" (other files: {self.cold.budget.foreign:,})"
        if self.cold.sequences and (kept := len(self.cold.sequences.checkpoints.stored())):
            state += f", keeps {kept} flushed sequences"
        return f"{state}, cannot write ({error})" if error else state

    def use(self, lineage: Lineage) -> None:
        """Mark a sequence as used now, and release what dead sequences left behind."""
        self._tick += 1
        lineage.tick = self._tick
        self.reclaim()

    def reclaim(self) -> None:
        """Release what sequences left behind that were dropped and not closed."""
        if self.inconsistent:
            self.recover()
        while self.abandoned:
            layer, entries = self.abandoned.popleft()
            layer.release_entries(entries)

    def recover(self) -> None:
        """Make everything agree again, after an operation that was broken off at any point.

        Layers cut what they hold to their length, pages that no table has are given up, and all
        counts follow. May be broken off itself: it is done again then.
        """
        self.inconsistent = True
        self.abandoned.clear()  # those tables are gone, and so are not counted
        for user in list(self.users):
            user.recover()
        for layer in self._layer_pagers.values():
            layer.recover()
        if self._reader:
            # Who was waiting for what is not known: those reads go where nobody looks.
            self._reader = self._reader.afresh()
        if self._cold:
            pages = [page for layer in self._layer_pagers.values() for page in layer.pages.values()]
            self._cold.recover([page.record for page in pages if page.record is not None])
        self.inconsistent = False

    def relieve(self) -> bool:
        """See that somebody gives up a sequence, if there is one to give up."""
        if not any(give_up() for give_up in self.relief):
            return False
        self.reclaim()
        return True

    def close(self) -> None:
        """Release everything; the pager can be used again afterwards, from empty."""
        self.abandoned.clear()
        self.turn.written.clear()
        for layer in self._layer_pagers.values():
            layer.release()  # closed caches still know theirs
        self._layer_pagers.clear()
        if self._reader and not (self._cold and self._cold.inherited):  # nobody reads in a fork
            self._reader.close()
        if self._cold:
            self._cold.close()
        self._reader = self._cold = None
        self.inconsistent = False

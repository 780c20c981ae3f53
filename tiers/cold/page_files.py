"""The page files of a store: who holds which slot, and how far the files may grow."""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pagedkv.allocator import (
    PAGE_ALIGNMENT,
    CorruptStoreError,
    OutOfPagesError,
    PagedKVError,
    SlotPool,
)
from pagedkv.tiers.cold.disk_budget import DiskBudget
from pagedkv.tiers.disk.disk import Disk
from pagedkv.tiers.disk.io import again, remove_file, told
from pagedkv.tiers.disk.page_file import PageFile

MAX_SLOTS = 2**22
"""Slots of one file, at most: a longer file was not written by us."""

SUFFIX = ".kv"
EARLIER_SUFFIX = ".pages"
"""Of Apple's text documents: macOS would look into such files, and show them as texts."""

_NAME = re.compile(r"layer-(\d{4,9})-(\d{2,9})k\.kv")


class Place(NamedTuple):
    """Where a page lies on disk.

    Attributes:
        layer: layer number.
        page_bytes: size of the page.
        slot: place in the file, in units of the page size.
    """

    layer: int
    page_bytes: int
    slot: int


@dataclass
class Extent:
    """The file of one layer and page size.

    A slot may be held several times: by a page that is in use, and by each checkpoint that
    refers to it. It goes to another page when nobody holds it.

    Attributes:
        file: the file.
        page_bytes: size of a slot.
        slots: those held, and those free.
        holders: how many hold each.
        failures: how often the disk failed to make writes durable. What was written before a
            failure may be lost although the system no longer knows, and is written again.
        pinned: so many slots, from the first on, have a holder that cannot be read: a damaged
            checkpoint.
    """

    file: PageFile
    page_bytes: int
    slots: SlotPool = field(default_factory=SlotPool)
    holders: Counter[int] = field(default_factory=Counter)
    failures: int = 0
    pinned: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the file, at the largest size it reached."""
        return self.slots.capacity * self.page_bytes

    def hold(self, slot: int) -> None:
        """One holder more; the first one takes the slot."""
        if not self.holders[slot]:
            self.slots.claim([slot])
        self.holders[slot] += 1

    def let_go(self, slot: int) -> None:
        """One holder less; after the last one the slot is free."""
        if self.holders[slot] < 1:
            raise PagedKVError(f"slot {slot} of {self.file.path.name} is let go but was not held")
        self.holders[slot] -= 1
        if not self.holders[slot]:
            del self.holders[slot]
            self.slots.give(slot)

    def check(self) -> None:
        """Conservation: the slots that are taken are the ones that somebody holds."""
        self.slots.check()
        if self.slots.taken() != self.holders.keys():
            raise PagedKVError(f"{self.file.path.name}: slots taken and slots held differ")


class PageFiles:
    """All page files of a store, within one budget: one file per layer and page size.

    Used by the generation thread; worker threads only look files up.
    """

    def __init__(self, directory: Path, disk: Disk, budget: DiskBudget) -> None:
        self.directory = directory
        self.budget = budget
        self._disk = disk
        self._extents: dict[tuple[int, int], Extent] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all page files."""
        return sum(extent.nbytes for extent in self._extents.values())

    def extent(self, place: Place) -> Extent:
        """The file in which a page lies.

        Raises:
            KeyError: if there is none.
        """
        return self._extents[place.layer, place.page_bytes]

    # Room

    def growth(self, layer: int) -> int:
        """Bytes by which the layer's files may still grow."""
        taken = sum(extent.nbytes for (i, _), extent in self._extents.items() if i == layer)
        return min(self.budget.layer_share(layer) - taken, self.budget.for_pages - self.nbytes)

    def room(self, layer: int, page_bytes: int, growth: int) -> int:
        """Pages of this size that the layer can still take, with so much new space."""
        extent = self._extents.get((layer, page_bytes))
        return (extent.slots.free if extent else 0) + max(0, growth) // page_bytes

    def take(self, layer: int, page_bytes: int) -> Place:
        """A slot for a new page, held once.

        Raises:
            OutOfPagesError: if the layer's share is used up.
            ColdStoreError: if the layer's file cannot be made.
        """
        extent = self._extents.get((layer, page_bytes))
        if not extent or not extent.slots.free:
            if self.growth(layer) < page_bytes:
                raise OutOfPagesError(
                    f"cold tier full: layer {layer} has used its {self.budget.told(layer)}; "
                    f"raise the cold budget or trim the context"
                )
            extent = extent or self._open(layer, page_bytes, create=True)
            extent.slots.grow(extent.slots.capacity + 1)
        slot = extent.slots.take()
        extent.holders[slot] = 1
        return Place(layer, page_bytes, slot)

    def hold(self, places: Iterable[Place]) -> None:
        """Keep slots from being given to other pages."""
        for place in places:
            self.extent(place).hold(place.slot)

    def let_go(self, places: Iterable[Place]) -> None:
        """Undo `hold`, or the first hold of `take`."""
        for place in places:
            self.extent(place).let_go(place.slot)

    def hold_only(self, places: Iterable[Place]) -> None:
        """Have these holders and no others, whatever was held before."""
        held = {key: Counter(range(extent.pinned)) for key, extent in self._extents.items()}
        for layer, page_bytes, slot in places:
            held[layer, page_bytes][slot] += 1
        for key, holders in held.items():
            extent = self._extents[key]
            extent.holders = holders
            extent.slots.reset(holders)

    def holds(self, place: Place) -> bool:
        """Whether the slot is held by anyone."""
        extent = self._extents.get((place.layer, place.page_bytes))
        return extent is not None and extent.holders[place.slot] > 0

    def sizes(self) -> dict[tuple[int, int], int]:
        """The files' real lengths by layer and page size."""
        return {key: extent.file.size for key, extent in self._extents.items()}

    @property
    def free_space(self) -> str:
        """Room on the file system, for error messages."""
        try:
            return f"{again(self._disk.free_space, self.directory):,} bytes free there"
        except OSError:
            return "its free space is not known"

    # Life

    def open_existing(self, held: Iterable[Place], keep_all: bool) -> None:
        """Take over the files of an earlier process; what nobody refers to is cut off or deleted.

        Args:
            held: every slot that some checkpoint refers to, once for each.
            keep_all: overwrite and delete nothing: a checkpoint could not be read, and may refer
                to any slot.

        Raises:
            ColdStoreError: if a file cannot be opened, or is no file of ours.
        """
        referred: dict[tuple[int, int], Counter[int]] = {}
        for place in held:
            referred.setdefault((place.layer, place.page_bytes), Counter())[place.slot] += 1
        names = again(self._disk.list, self.directory)
        for name in (self._renamed(name, names) for name in names):
            match = _NAME.fullmatch(name)
            if not match:
                continue
            key = (int(match[1]), int(match[2]) * 1024)
            if name != _name(*key) or key[1] % PAGE_ALIGNMENT:
                continue  # not a name that we give
            slots = referred.get(key)
            if slots is None and not keep_all:
                remove_file(self._disk, self.directory / name)
            else:
                self._take_over(self._open(*key, create=False), slots or Counter(), keep_all)

    def _renamed(self, name: str, names: Collection[str]) -> str:
        """The name of a file, after those of a version with another suffix got ours."""
        ours = f"{name.removesuffix(EARLIER_SUFFIX)}{SUFFIX}"
        if not name.endswith(EARLIER_SUFFIX) or not _NAME.fullmatch(ours) or ours in names:
            return name
        again(self._disk.rename, self.directory / name, self.directory / ours)
        return ours

    def _take_over(self, extent: Extent, slots: Counter[int], keep_all: bool) -> None:
        size = extent.file.size
        there = -(-size // extent.page_bytes)
        if there > MAX_SLOTS:
            raise CorruptStoreError(
                errno.EFBIG,
                f"{extent.file.path} has {size:,} bytes: a page file has at most "
                f"{MAX_SLOTS * extent.page_bytes:,}; it was not written by pagedkv, remove it",
            )
        # A slot beyond the end holds nothing to protect: whoever reads it is told.
        extent.holders = Counter({slot: n for slot, n in slots.items() if slot < there})
        if keep_all:
            extent.pinned = there
            extent.holders.update(range(there))
        end = max(extent.holders, default=-1) + 1
        if size > end * extent.page_bytes:
            extent.file.truncate(end * extent.page_bytes)
        extent.slots.grow(end)
        extent.slots.claim(extent.holders)

    def _open(self, layer: int, page_bytes: int, create: bool) -> Extent:
        path = self.directory / _name(layer, page_bytes)
        with told(f"cannot open {path}"):
            try:
                file = PageFile(path, self._disk, create)
            except FileExistsError:  # left by an attempt of ours that failed half way
                remove_file(self._disk, path)
                file = PageFile(path, self._disk, create)
        extent = Extent(file, page_bytes)
        self._extents[layer, page_bytes] = extent
        return extent

    def trim(self, held: Iterable[Place]) -> None:
        """Cut off or delete what lies beyond these slots, as the next opening would.

        Raises:
            OSError: from the disk.
        """
        ends: dict[tuple[int, int], int] = {}
        for layer, page_bytes, slot in held:
            ends[layer, page_bytes] = max(ends.get((layer, page_bytes), 0), slot + 1)
        for key, extent in self._extents.items():
            end = ends.get(key, 0) * extent.page_bytes
            if not end:
                remove_file(self._disk, extent.file.path)
            elif extent.file.size > end:
                extent.file.truncate(end)

    def close(self) -> None:
        """Close the files; they stay where they are."""
        for extent in self._extents.values():
            with suppress(OSError):  # what had to be safe was synced before
                extent.file.close()
        self._extents.clear()

    def check(self) -> None:
        """Every file's slots obey the conservation law, and the budget is kept."""
        for extent in self._extents.values():
            extent.check()


def _name(layer: int, page_bytes: int) -> str:
    return f"layer-{layer:04d}-{page_bytes // 1024}k{SUFFIX}"

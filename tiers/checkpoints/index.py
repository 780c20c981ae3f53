"""The flushed sequences of a store: one checkpoint file each, replaced in one step.

Sealed pages never change, so there is no journal: a slot that a checkpoint refers to is held, and
goes to no other page until a newer checkpoint of that sequence is in place. Whenever the process
ends, the last checkpoint and everything it refers to are there.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pagedkv.allocator import CorruptStoreError, OutOfPagesError, SequenceNotFoundError
from pagedkv.tiers.checkpoints.file_format import (
    Bytes,
    Checkpoint,
    Entries,
    damaged,
    file_bytes,
    read_checkpoint,
    write_checkpoint,
)
from pagedkv.tiers.checkpoints.manifest import SequenceState, StoreIdentity
from pagedkv.tiers.cold.page_files import PageFiles, Place
from pagedkv.tiers.disk.disk import READ, Disk
from pagedkv.tiers.disk.io import (
    TEMPORARY,
    again,
    open_private,
    put_in_place,
    read_exactly,
    remove_file,
    replace_file,
    sync_directory,
    told,
    write_new,
)

_NAME = re.compile(r"sequence-([0-9a-f]{16})\.checkpoint")

KEPT = ".json"
"""Ends the names of files that are kept beside the checkpoints."""


@dataclass(frozen=True)
class StoredSequence:
    """A sequence that can be resumed.

    Attributes:
        sequence: its name.
        tokens: tokens held.
        pages: pages of all layers.
        checkpoint_bytes: bytes of its checkpoint file, hot tokens included; its pages come on top.
        flushed_at: seconds since 1970.
        prefix: digests of its tokens; see `SequenceState`.
        prompt_rate: prompt tokens per second where it was computed; 0 if that is not known.
        spare: whether it is kept for prompts that begin alike only, and may be discarded.
    """

    sequence: str
    tokens: int
    pages: int
    checkpoint_bytes: int
    flushed_at: float
    prefix: tuple[str, ...] = field(default=(), repr=False)
    prompt_rate: float = 0.0
    spare: bool = False


@dataclass
class _Committed:
    """A checkpoint on disk, and the slots it holds."""

    summary: StoredSequence
    places: list[Place]


class _Kept(NamedTuple):
    """What `Checkpoints.keep` wrote: a mark of its content, whether it is durable, its bytes."""

    mark: str
    durable: bool
    size: int


class Checkpoints:
    """The checkpoints of one store, whose lock this process holds."""

    def __init__(
        self, directory: Path, identity: StoreIdentity, disk: Disk, files: PageFiles
    ) -> None:
        """Read what is there, hold its slots, and clear away what nobody refers to.

        A checkpoint that cannot be read is kept, and with it every page there is.

        Raises:
            UnsafeStoreError: if a file is a link, or not ours alone.
            ColdStoreError: if the disk fails.
        """
        self.directory, self.identity = directory, identity
        self._disk, self._files = disk, files
        self._committed: dict[str, _Committed] = {}
        self._doubtful: dict[str, list[Place]] = {}
        self._names_durable = False
        self._kept: dict[str, _Kept] = {}
        self.damaged: dict[str, CorruptStoreError] = {}
        with told(f"cannot open the store {directory}"):
            self._read_all()

    def _read_all(self) -> None:
        names = again(self._disk.list, self.directory)
        for name in names:
            if name.endswith(TEMPORARY):
                remove_file(self._disk, self.directory / name)
            elif match := _NAME.fullmatch(name):
                self._read(match[1])
            elif name.endswith(KEPT):
                self._files.budget.checkpoints += self._size(self.directory / name)
        held = chain.from_iterable(c.places for c in self._committed.values())
        self._files.open_existing(held, keep_all=bool(self.damaged))
        for committed in self._committed.values():  # not those beyond the end of a file
            committed.places = [p for p in committed.places if self._files.holds(p)]

    def _read(self, sequence: str) -> None:
        path = self._path(sequence)
        self._files.budget.checkpoints += again(self._disk.lstat, path).st_size
        try:
            checkpoint = self._verified(sequence)
        except CorruptStoreError as e:
            self.damaged[sequence] = e
            warnings.warn(f"{e}. Until then no page in there is overwritten", stacklevel=2)
        else:
            places = list(_places(checkpoint.entries))
            self._committed[sequence] = _Committed(_summary(checkpoint.state), places)

    def _verified(self, sequence: str) -> Checkpoint:
        checkpoint = read_checkpoint(self._disk, self._path(sequence))
        state = checkpoint.state
        if (state.sequence, state.identity) != (sequence, self.identity):
            raise damaged(
                checkpoint.path,
                f"it is of sequence {state.sequence} of {state.identity}; was it moved here?",
            )
        return checkpoint

    def _path(self, sequence: str) -> Path:
        return self.directory / f"sequence-{sequence}.checkpoint"

    # What there is

    def stored(self) -> list[StoredSequence]:
        """The sequences that can be resumed, the newest first."""
        found = [c.summary for c in self._committed.values()]
        return sorted(found, key=lambda s: s.flushed_at, reverse=True)

    def places(self) -> Iterator[Place]:
        """Every slot that a checkpoint refers to."""
        for committed in self._committed.values():
            yield from committed.places
        for places in self._doubtful.values():
            yield from places

    @property
    def empty(self) -> bool:
        """Whether there is no checkpoint, not even a damaged one."""
        return not (self._committed or self._doubtful or self.damaged)

    def load(self, sequence: str | None = None) -> Checkpoint:
        """Read a checkpoint again.

        Args:
            sequence: its name; the newest if None.

        Raises:
            SequenceNotFoundError: if there is none, with those that there are.
            CorruptStoreError: if it is damaged, or none was named and one of them is.
            ColdStoreError: if the disk fails.
        """
        stored = self.stored()
        if sequence is None and self.damaged:
            names = ", ".join(s.sequence for s in stored)
            error = next(iter(self.damaged.values()))
            others = f"; or choose another with sequence=: {names}" if stored else ""
            raise CorruptStoreError(error.errno, f"{error.strerror}{others}") from error
        if sequence is None and stored:
            sequence = stored[0].sequence
        if sequence is not None and sequence in self.damaged:
            raise self.damaged[sequence]
        if sequence is None or sequence not in self._committed:
            raise SequenceNotFoundError(self._nothing(sequence, stored))
        return self._verified(sequence)

    def _nothing(self, sequence: str | None, stored: list[StoredSequence]) -> str:
        if not stored:
            return (
                f"{self.directory.parent} holds no flushed sequence of {self.identity}: "
                f"call flush() on a cache with this cold_dir first"
            )
        there = ", ".join(f"{s.sequence} ({s.tokens:,} tokens)" for s in stored)
        return f"{self.directory.parent} holds no sequence {sequence}; there are {there}"

    def elsewhere(self) -> list[StoreIdentity]:
        """Identities of the other stores beside this one, as far as they can be read."""
        found: dict[StoreIdentity, None] = {}
        parent = self.directory.parent
        with suppress(OSError):
            for store in sorted(again(self._disk.list, parent)):
                if store.startswith("store-") and store != self.directory.name:
                    found.update(dict.fromkeys(self._identities(parent / store)))
        return list(found)

    def _identities(self, store: Path) -> Iterator[StoreIdentity]:
        with suppress(OSError):
            for name in sorted(again(self._disk.list, store)):
                if _NAME.fullmatch(name):
                    yield read_checkpoint(self._disk, store / name).state.identity

    # Changes

    def commit(
        self, state: SequenceState, entries: Entries, hot: Iterable[Bytes], durable: bool
    ) -> int:
        """Put a checkpoint in the place of the sequence's last one.

        Its pages must be on disk already, and durable if it is to be.

        Args:
            state: what the sequence is.
            entries: its pages.
            hot: its hot tokens, layer by layer.
            durable: return only when a power failure cannot undo it.

        Returns:
            Bytes written.

        Raises:
            OutOfPagesError: if the disk budget does not hold it.
            ColdStoreError: if the disk fails. The last checkpoint is as it was; if the failure
                came at the very end, one of the two is in place, and the pages of both are kept.
        """
        sequence, path = state.sequence, self._path(state.sequence)
        size = file_bytes(state)
        self._require_room(size)
        places = list(_places(entries))
        self._files.hold(places)
        try:
            with told(f"cannot write the checkpoint {path}"):
                if durable:
                    self._make_names_durable()
                fill = lambda fd: write_checkpoint(self._disk, fd, state, entries, hot)  # noqa: E731
                temporary = write_new(self._disk, path, fill, durable)
        except BaseException:
            self._files.let_go(places)
            raise
        # Which of the two is in place is not known until this is over: the pages of both are kept.
        summary, doubtful = _summary(state), self._doubtful.setdefault(sequence, [])
        doubtful += places
        with told(f"cannot put the checkpoint {path} in place"):
            put_in_place(self._disk, temporary, path, durable)
        self._replace(sequence, _Committed(summary, places))
        return size

    def _replace(self, sequence: str, committed: _Committed | None) -> None:
        """Note what is in place now, and let go of what was before."""
        old = self._committed.get(sequence)
        if committed:
            self._committed[sequence] = committed
            self._files.budget.checkpoints += committed.summary.checkpoint_bytes
        else:
            self._committed.pop(sequence, None)
        doubtful = self._doubtful.pop(sequence, [])
        if committed:
            del doubtful[len(doubtful) - len(committed.places) :]  # its own came last
        if old:
            self._files.let_go(old.places)
            self._files.budget.checkpoints -= old.summary.checkpoint_bytes
        self._files.let_go(doubtful)

    def recover(self) -> None:
        """Count again what checkpoints and the files beside them take, as far as it can be told."""
        with suppress(OSError):
            names = again(self._disk.list, self.directory)
            for name in names:
                if name.endswith(TEMPORARY):
                    remove_file(self._disk, self.directory / name)
            ours = [n for n in names if _NAME.fullmatch(n) or n.endswith(KEPT)]
            self._files.budget.checkpoints = sum(self._size(self.directory / n) for n in ours)

    def keep(self, name: str, mark: str, content: Callable[[], bytes], durable: bool) -> None:
        """Put a file beside the checkpoints, in the place of the last one; they need it.

        Args:
            name: of the file.
            mark: of its content: if what is there has the same, nothing is made or written.
            content: makes it.
            durable: return only when a power failure cannot undo it.

        Raises:
            OutOfPagesError: if the disk budget does not hold it.
            ColdStoreError: if the disk fails.
        """
        kept = self._kept.get(name)
        if kept and kept.mark == mark and kept.durable >= durable and self.wrote(name):
            return
        budget, path, made = self._files.budget, self.directory / name, content()
        with told(f"cannot write {path}"):
            before = kept.size if kept else self._size(path)
            self._require_room(len(made))
            self._kept.pop(name, None)
            try:
                replace_file(self._disk, path, made, durable)
            finally:  # it may be in place though the disk failed
                budget.checkpoints += self._size(path) - before
        self._kept[name] = _Kept(mark, durable, len(made))

    def drop(self, name: str) -> None:
        """Remove a file that `keep` wrote, now or before; nothing may need it any more.

        Raises:
            ColdStoreError: if the disk fails.
        """
        path = self.directory / name
        with told(f"cannot remove {path}"):
            if size := self._size(path):
                remove_file(self._disk, path)
                self._files.budget.checkpoints -= size
        self._kept.pop(name, None)

    def wrote(self, name: str) -> bool:
        """Whether `keep` put a file there since the store was opened, and nobody took it away.

        Raises:
            ColdStoreError: if the disk fails.
        """
        path = self.directory / name
        with told(f"cannot look at {path}"):
            return name in self._kept and self._size(path) == self._kept[name].size

    def kept(self, name: str) -> bytes | None:
        """The content of a file that `keep` wrote; None if there is none.

        Raises:
            ColdStoreError, UnsafeStoreError: if it cannot be read, or is not ours.
        """
        path = self.directory / name
        with told(f"cannot read {path}"):
            try:
                fd = open_private(self._disk, path, READ)
            except FileNotFoundError:
                return None
            try:
                content = np.zeros(again(self._disk.fstat, fd).st_size, np.uint8)
                if content.size:
                    read_exactly(self._disk, fd, [content], 0)
            except EOFError:
                return None  # cut short meanwhile
            finally:
                self._disk.close(fd)
        return content.tobytes()

    def _size(self, path: Path) -> int:
        """Of a file, 0 if there is none."""
        try:
            return again(self._disk.lstat, path).st_size
        except FileNotFoundError:
            return 0

    def discard(self, sequence: str, durable: bool) -> None:
        """Delete a checkpoint; its pages' slots are free for others.

        Raises:
            SequenceNotFoundError: if there is none of that name.
            ColdStoreError: if the disk fails; the checkpoint may be there or not, and its pages
                are kept.
        """
        known = {*self._committed, *self._doubtful, *self.damaged}
        if sequence not in known:
            raise SequenceNotFoundError(self._nothing(sequence, self.stored()))
        gone = 0
        with told(f"cannot delete the checkpoint {self._path(sequence)}"):
            with suppress(FileNotFoundError):
                gone = again(self._disk.lstat, self._path(sequence)).st_size
            remove_file(self._disk, self._path(sequence))
            if durable:
                sync_directory(self._disk, self.directory)
        if self.damaged.pop(sequence, None):
            self._files.budget.checkpoints -= gone
        self._replace(sequence, None)

    def _require_room(self, size: int) -> None:
        budget = self._files.budget
        taken = self._files.nbytes + budget.foreign + budget.checkpoints
        if taken + size > budget.limit:
            raise OutOfPagesError(
                f"no room for a checkpoint of {size:,} bytes: {self._files.nbytes:,} for pages, "
                f"{budget.checkpoints:,} for checkpoints and {budget.foreign:,} for other files "
                f"are {taken:,} of the cold budget's {budget.limit:,}; raise it, trim, or discard "
                f"sequences"
            )

    def _make_names_durable(self) -> None:
        """The names of page files, of the store, and of the directories made for it."""
        sync_directory(self._disk, self.directory)
        if not self._names_durable:
            sync_directory(self._disk, self.directory.parent)
            with suppress(PermissionError):  # there before us, then
                sync_directory(self._disk, self.directory.parent.parent)
            self._names_durable = True


def _places(entries: Entries) -> Iterator[Place]:
    columns = (entries[name].tolist() for name in ("layer", "page_bytes", "slot"))
    return (Place(*place) for place in zip(*columns, strict=True))


def _summary(state: SequenceState) -> StoredSequence:
    return StoredSequence(
        state.sequence,
        state.tokens,
        state.pages,
        file_bytes(state),
        state.flushed_at / 1e9,
        state.prefix,
        state.prompt_rate,
        state.spare,
    )

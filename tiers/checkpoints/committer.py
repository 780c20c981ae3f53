"""Sequences that outlive the process: their pages made durable, then their checkpoint committed."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pagedkv.allocator import (
    ColdStoreError,
    CorruptPageError,
    SequenceNotFoundError,
    StoreMismatchError,
)
from pagedkv.tiers.checkpoints.file_format import ENTRY, Bytes, Checkpoint, Entries, file_bytes
from pagedkv.tiers.checkpoints.index import Checkpoints
from pagedkv.tiers.checkpoints.manifest import SequenceState
from pagedkv.tiers.cold.page_files import PageFiles
from pagedkv.tiers.cold.page_reads import PageReads
from pagedkv.tiers.cold.record import ColdRecord, PageIdentity
from pagedkv.tiers.cold.writer import WriteBehind
from pagedkv.tiers.disk.io import told

StoredPage = tuple[ColdRecord, int, int]
"""A page of a sequence: its record, the position of its first token, and its valid tokens."""


class SequenceStore:
    """Commits sequences to a store that lasts, and finds their pages again."""

    def __init__(
        self, checkpoints: Checkpoints, files: PageFiles, writer: WriteBehind, reads: PageReads
    ) -> None:
        self.checkpoints = checkpoints
        self._files = files
        self._writer = writer
        self._reads = reads

    def commit(
        self,
        state: SequenceState,
        pages: Sequence[StoredPage],
        hot: Iterable[Bytes],
        durable: bool,
    ) -> int:
        """Make a sequence the one that is found when the store is opened again.

        Args:
            state: what it is.
            pages: its pages, layer by layer.
            hot: its hot tokens, layer by layer.
            durable: return only when a power failure cannot undo it.

        Returns:
            Bytes of the checkpoint.

        Raises:
            OutOfPagesError: if the budget does not hold the checkpoint.
            ColdStoreError: if the disk fails, does not take the pages, or somebody took their files
                away.
        """
        records = [record for record, _, _ in pages]
        self._settle(records)
        if durable:
            self._make_durable(records)
        self._require_in_place(records)
        self._writer.charge(file_bytes(state))
        return self.checkpoints.commit(state, _entries(pages), hot, durable)

    def load(self, sequence: str | None) -> Checkpoint:
        """Read a checkpoint; see `Checkpoints.load`.

        Raises:
            StoreMismatchError: if there is none, but there are some of another model or of other
                settings.
        """
        try:
            return self.checkpoints.load(sequence)
        except SequenceNotFoundError as e:
            others = [] if self.checkpoints.stored() else self.checkpoints.elsewhere()
            if not others:
                raise
            mine = self.checkpoints.identity
            alike = "@" in mine.kv and any("@" not in other.kv for other in others)
            hint = " (a kv that names no layers is that of layer_kv='same')" if alike else ""
            raise StoreMismatchError(
                f"{self.checkpoints.directory.parent} holds no sequence of {mine}, but of: "
                f"{'; of: '.join(map(str, others))}. Resume with the model and the settings that "
                f"it was flushed with{hint}"
            ) from e

    def _settle(self, records: Sequence[ColdRecord]) -> None:
        """Wait until these pages are in their files."""
        self._writer.wait()
        if self._writer.unwritten(records):
            self._writer.retry()
        if stuck := self._writer.unwritten(records):
            error = self._writer.last_error
            raise ColdStoreError(
                getattr(error, "errno", None) or errno.EIO,
                f"{len(stuck)} of {len(records)} pages cannot be written to "
                f"{self._files.directory} ({error}): the last checkpoint stays in place; free "
                f"disk space and flush again",
            )

    def _require_in_place(self, records: Sequence[ColdRecord]) -> None:
        """See that the next process would find these pages.

        Somebody may have removed their files, or put others in their place: what is open goes on
        as if nothing were.
        """
        places = {record.place[:2]: record.place for record in records}
        files = [self._files.extent(place).file for place in places.values()]
        with told(f"cannot look at the page files in {self._files.directory}"):
            gone = [file.path.name for file in files if not file.in_place()]
        if gone:
            raise ColdStoreError(
                errno.ENOENT,
                f"{len(gone)} of {len(files)} page files were removed from {self._files.directory} "
                f"or replaced by somebody else, such as {gone[0]}: nothing was flushed. "
                f"This cache can read them until it is closed: save() it to a file, and keep other "
                f"programs out of the cold_dir or name another",
            )

    def _make_durable(self, records: Sequence[ColdRecord]) -> None:
        by_file: dict[tuple[int, int], list[ColdRecord]] = {}
        for record in records:
            if not record.durable:
                by_file.setdefault((record.identity.layer, record.nbytes), []).append(record)
        for fresh in by_file.values():
            extent = self._files.extent(fresh[0].place)
            failures = extent.failures
            for record in fresh:
                if record.failures < failures:
                    self._write_again(record)
            try:
                with told(f"cannot make {extent.file.path} durable"):
                    extent.file.sync()
            except ColdStoreError:
                extent.failures += 1
                raise
            for record in fresh:
                record.durable = True

    def _write_again(self, record: ColdRecord) -> None:
        """After a failed fsync the system may believe that pages are on disk which are not."""
        stored = self._reads.read_stored(record)
        extent = self._files.extent(record.place)
        with told(f"cannot write cold {record.identity} again"):
            extent.file.write(stored, record.offset)
        record.failures = extent.failures

    def records(
        self, checkpoint: Checkpoint, entries: Entries | None = None
    ) -> Iterator[StoredPage]:
        """The pages of a checkpoint, each held as by `FileColdStore.put`.

        Args:
            checkpoint: what they belong to.
            entries: only these of its entries; all if None.

        Raises:
            CorruptPageError: naming a page that is beyond the end of its file.
        """
        owner = self.checkpoints.identity.digest
        with told(f"cannot look at the page files in {self._files.directory}"):
            sizes = self._files.sizes()
        for row in (checkpoint.entries if entries is None else entries).tolist():
            layer, tokens, position, page, page_tokens, key_bits, value_bits = row[:7]
            generation, slot, page_bytes, stored_bytes, digest = row[7:]
            layout = (key_bits, value_bits, page_tokens)
            identity = PageIdentity(owner, layer, page, generation, layout)
            record = ColdRecord(identity, page_bytes, slot, stored_bytes, bytes(digest))
            size = sizes.get((layer, page_bytes), 0)
            if record.offset + stored_bytes > size:
                raise CorruptPageError(
                    errno.EBADMSG,
                    f"cold {identity} is missing: its file in {self._files.directory} has "
                    f"{size:,} bytes and the page begins at {record.offset:,}",
                )
            self._files.hold([record.place])
            yield record, position, tokens


def _entries(pages: Sequence[StoredPage]) -> Entries:
    """As a checkpoint file holds them."""
    entries = np.zeros(len(pages), ENTRY)
    for i, (record, position, tokens) in enumerate(pages):
        identity = record.identity
        key_bits, value_bits, page_tokens = identity.layout
        entries[i] = (
            identity.layer,
            tokens,
            position,
            identity.page,
            page_tokens,
            key_bits,
            value_bits,
            identity.generation,
            record.slot,
            record.nbytes,
            record.stored_bytes,
            np.frombuffer(record.checksum, np.uint8),
        )
    return entries

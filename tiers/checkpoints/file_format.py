"""The checkpoint file of a sequence; docs/format.md shows it.

Fixed header, JSON of bounded length, page entries of fixed size, hot arrays. Everything is checked
before it is used, and nothing is allocated that the file's own length does not vouch for.
"""

from __future__ import annotations

import errno
import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pagedkv.allocator import (
    PAGE_ALIGNMENT,
    ConfigError,
    CorruptStoreError,
    PageGeometry,
    Precision,
)
from pagedkv.tiers.checkpoints.manifest import (
    LayerState,
    MalformedError,
    SequenceState,
    parse_sequence,
)
from pagedkv.tiers.disk.disk import READ, Disk
from pagedkv.tiers.disk.io import again, open_private, read_exactly, told, write_exactly

Bytes = npt.NDArray[np.uint8]
Entries = npt.NDArray[np.void]

MAGIC = b"PAGEDKV\n"
VERSION = 2
"""1 had SHA-256 over all bytes of a page as its checksum; see `pagedkv.tiers.disk.checksum`."""
HEADER = struct.Struct("<8sIIQQ16s16s")
"""Magic, version, bytes of JSON, bytes of JSON and page entries, bytes of hot arrays, checksum of
the hot arrays, checksum of all before them. Every version has this header: it can be told whether
a file is whole, whoever wrote it."""

MAX_JSON = 2**20
"""Bytes of JSON, at most: 7,000 layers."""

ENTRY = np.dtype(
    [
        ("layer", "<u4"),
        ("tokens", "<u4"),
        ("position", "<u8"),
        ("page", "<u4"),
        ("page_tokens", "<u2"),
        ("key_bits", "u1"),
        ("value_bits", "u1"),
        ("generation", "<u8"),
        ("slot", "<u8"),
        ("page_bytes", "<u4"),
        ("stored_bytes", "<u4"),
        ("checksum", "u1", (16,)),
    ]
)
"""A page: which one, where, and the checksum of its bytes. `tokens` of them belong to the
sequence; `position` is the first one's."""

assert HEADER.size == ENTRY.itemsize == 64

REMEDY = "remove the file to give up the sequence, or copy it back from where it is whole"


@dataclass(frozen=True)
class Checkpoint:
    """The part of a checkpoint file before its hot arrays.

    Attributes:
        path: the file.
        state: the sequence.
        entries: one `ENTRY` per page, layer by layer, in the sequence's order.
        hot_checksum: of the hot arrays.
        nbytes: length of the file.
    """

    path: Path
    state: SequenceState
    entries: Entries
    hot_checksum: bytes
    nbytes: int


def file_bytes(state: SequenceState) -> int:
    """Length of the file that will hold this."""
    return HEADER.size + len(state.to_json()) + state.pages * ENTRY.itemsize + state.hot_bytes


# Writing


def write_checkpoint(
    disk: Disk, fd: int, state: SequenceState, entries: Entries, hot: Iterable[Bytes]
) -> None:
    """Write a checkpoint into an empty file, the header last.

    Args:
        disk: the file system.
        fd: of the file.
        state: what the sequence is.
        entries: `ENTRY` per page.
        hot: the hot keys and values of each layer, one array in memory at a time.

    Raises:
        MalformedError: if entries or hot arrays are not what the state says.
        OSError: from the disk.
    """
    text = state.to_json()
    body = np.frombuffer(text + entries.tobytes(), np.uint8)
    write_exactly(disk, fd, [body], HEADER.size)
    at, digest = HEADER.size + len(body), hashlib.sha256()
    for part in hot:
        write_exactly(disk, fd, [part], at)
        digest.update(part.data)
        at += len(part)
    if at != file_bytes(state):  # better no checkpoint than one that will be called damaged
        raise MalformedError(f"{file_bytes(state):,} bytes were described and {at:,} given")
    start = (MAGIC, VERSION, len(text), len(body), state.hot_bytes, digest.digest()[:16])
    head = HEADER.pack(*start, _checksum(HEADER.pack(*start, bytes(16)), body))
    write_exactly(disk, fd, [np.frombuffer(head, np.uint8)], 0)


# Reading


def read_checkpoint(disk: Disk, path: Path) -> Checkpoint:
    """Read a checkpoint, all but its hot arrays.

    Raises:
        CorruptStoreError: if it is damaged, cut short, or of another version.
        UnsafeStoreError: if it is a link, or not ours alone.
        ColdStoreError: if the disk fails.
    """
    with told(f"cannot read the checkpoint {path}"):
        fd = open_private(disk, path, READ)
        try:
            size = again(disk.fstat, fd).st_size
            return _parse(disk, fd, path, size)
        except (EOFError, MalformedError) as e:
            raise damaged(path, str(e)) from e
        finally:
            disk.close(fd)


def read_hot(disk: Disk, checkpoint: Checkpoint) -> Iterator[tuple[LayerState, Bytes, Bytes]]:
    """The hot keys and values of each layer, after all of them were verified.

    Yields:
        The layer, its keys' bytes and its values' bytes.

    Raises:
        CorruptStoreError: if they do not match their checksum.
        ColdStoreError: if the disk fails.
    """
    path, wanted = checkpoint.path, checkpoint.state.hot_bytes
    hot = np.empty(wanted, np.uint8)
    with told(f"cannot read the checkpoint {path}"):
        fd = open_private(disk, path, READ)
        try:
            read_exactly(disk, fd, [hot], checkpoint.nbytes - wanted)
        except EOFError as e:
            raise damaged(path, str(e)) from e
        finally:
            disk.close(fd)
    if hashlib.sha256(hot.data).digest()[:16] != checkpoint.hot_checksum:
        raise damaged(path, "its hot tokens do not match their checksum")
    at = 0
    for layer in checkpoint.state.layers:
        middle, end = at + layer.key_bytes, at + layer.key_bytes + layer.value_bytes
        yield layer, hot[at:middle], hot[middle:end]
        at = end


def damaged(path: Path, problem: str) -> CorruptStoreError:
    """The error for a checkpoint that cannot be used."""
    return CorruptStoreError(
        errno.EBADMSG, f"the checkpoint {path} is damaged: {problem}; {REMEDY}"
    )


def _checksum(head: bytes, body: Bytes) -> bytes:
    """Over the header, its own 16 bytes being zero, and what lies between it and the hot arrays."""
    digest = hashlib.sha256(head)
    digest.update(body.data)
    return digest.digest()[:16]


def _parse(disk: Disk, fd: int, path: Path, size: int) -> Checkpoint:
    head = np.zeros(HEADER.size, np.uint8)
    read_exactly(disk, fd, [head], 0)
    magic, version, text, length, hot, hot_checksum, checksum = HEADER.unpack(head.tobytes())
    if magic != MAGIC:
        raise MalformedError(f"it begins with {magic!r}, not {MAGIC!r}")
    if HEADER.size + length + hot != size or text > min(length, MAX_JSON):
        raise MalformedError(
            f"it has {size:,} bytes and its header tells of {HEADER.size} + {length:,} + {hot:,} "
            f"({text:,} of them description)"
        )
    body = np.empty(length, np.uint8)
    read_exactly(disk, fd, [body], HEADER.size)
    if _checksum(head[: HEADER.size - 16].tobytes() + bytes(16), body) != checksum:
        raise MalformedError("its description and page entries do not match their checksum")
    if version != VERSION:
        raise CorruptStoreError(
            errno.ENOTSUP,
            f"the checkpoint {path} has version {version}, this pagedkv reads {VERSION}: "
            f"use the pagedkv that wrote it, or name another cold_dir",
        )
    if (length - text) % ENTRY.itemsize:
        raise MalformedError(f"{length - text:,} bytes are no page entries of {ENTRY.itemsize}")
    state = parse_sequence(body[:text].tobytes())
    pages = (length - text) // ENTRY.itemsize
    entries = np.frombuffer(body, ENTRY, pages, text) if pages else np.zeros(0, ENTRY)
    _check(state, entries, hot)
    return Checkpoint(path, state, entries, hot_checksum, size)


def _check(state: SequenceState, entries: Entries, hot: int) -> None:
    """Description, entries and lengths must say the same.

    Raises:
        MalformedError: naming what does not.
    """
    if state.hot_bytes != hot:
        raise MalformedError(f"its layers have {state.hot_bytes:,} hot bytes, its header {hot:,}")
    if state.pages != len(entries):
        raise MalformedError(f"its layers have {state.pages:,} pages, its entries {len(entries):,}")
    at = 0
    for layer in state.layers:
        pages = entries[at : at + layer.pages]
        _check_layer(state, layer, pages)
        at += layer.pages
        # Else pages that are sealed later would be found as those of other tokens.
        unit = max(each.page_tokens for each in state.layers)
        if len(state.prefix) * unit > int(pages["tokens"].sum(dtype=np.uint64)):
            raise MalformedError(
                f"it has digests of {len(state.prefix):,} units of {unit} tokens, and layer "
                f"{layer.layer} has not so many in pages"
            )


def _check_layer(state: SequenceState, layer: LayerState, pages: Entries) -> None:
    where = f"layer {layer.layer}"
    held = int(pages["tokens"].sum(dtype=np.uint64)) + layer.hot_tokens + layer.dropped
    if held != state.tokens:
        raise MalformedError(f"{where} holds {held:,} of {state.tokens:,} tokens")
    if not ((pages["layer"] == layer.layer) & (pages["page_tokens"] == layer.page_tokens)).all():
        raise MalformedError(f"{where} has pages of another layer or size")
    if not ((pages["tokens"] > 0) & (pages["tokens"] <= layer.page_tokens)).all():
        raise MalformedError(f"{where} has a page that is empty or too full")
    try:
        kinds = precisions(pages)
    except ConfigError as e:
        raise MalformedError(f"{where}: {e}") from e
    for precision in kinds:
        size = PageGeometry(layer.shape, layer.page_tokens, precision).page_bytes
        alike = pages[
            (pages["key_bits"] == precision.key_bits)
            & (pages["value_bits"] == precision.value_bits)
        ]
        stored = alike["stored_bytes"]
        if not (alike["page_bytes"] == size).all():
            raise MalformedError(f"{where} has {precision} pages that are not {size:,} bytes long")
        if not ((stored > 0) & (stored <= size) & (stored % PAGE_ALIGNMENT == 0)).all():
            raise MalformedError(f"{where} has {precision} pages of an impossible stored length")


def precisions(entries: Entries) -> list[Precision]:
    """The precisions that occur, each once.

    Raises:
        ConfigError: if one is not offered.
    """
    pairs = np.stack([entries["key_bits"], entries["value_bits"]], axis=1)
    return [Precision(int(k), int(v)) for k, v in np.unique(pairs, axis=0)]

"""A page in the cold tier: its identity, its checksum, its bytes on disk."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import lz4.block
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import PAGE_ALIGNMENT, CorruptPageError
from pagedkv.tiers.cold.page_files import Place
from pagedkv.tiers.disk.io import aligned_buffer

Bytes = npt.NDArray[np.uint8]
WORTHWHILE = 7 / 8
"""lz4 must bring a page below this part of its size: packed pages cannot be read in one request
with their neighbours, and real pages shrink by 3 to 10 % at best (`docs/design.md`)."""

SAMPLES, SAMPLE_BYTES = 4, 4096
"""What of a page is tried first."""


@dataclass(frozen=True)
class PageIdentity:
    """What a page is, mixed into its checksum: the right bytes at the wrong place are refused.

    Attributes:
        owner: 16 bytes that name the store: random for a temporary one, the model's and the
            settings' for one that lasts.
        layer: layer number.
        page: page number within the layer.
        generation: counts the pages that a store is given, from a number that never repeats.
        layout: key bits, value bits and tokens of the page.
    """

    owner: bytes
    layer: int
    page: int
    generation: int
    layout: tuple[int, int, int]

    def pack(self) -> bytes:
        """Fixed-size bytes, little-endian: the prefix of the checksummed data."""
        return struct.pack(
            "<16sIIQHHI", self.owner, self.layer, self.page, self.generation, *self.layout
        )

    def __str__(self) -> str:
        key_bits, value_bits, tokens = self.layout
        return (
            f"layer {self.layer} page {self.page} (generation {self.generation}, "
            f"K{key_bits}V{value_bits}, {tokens} tokens)"
        )


@dataclass(eq=False)
class ColdRecord:
    """One page in the cold tier.

    Attributes:
        identity: which page.
        nbytes: bytes of the page.
        slot: place in its file, in units of the page size.
        stored_bytes: bytes on disk; fewer than `nbytes` if lz4 saved whole 16 KiB units.
        checksum: over identity and page bytes.
        live: False once freed.
        pending: the page's bytes while they are not on disk yet.
        kept: a copy in memory of what was read; see `KeptPages`.
        error: why the last attempt to write it failed.
        durable: whether a power failure cannot undo it.
        failures: `Extent.failures` when it was written.
    """

    identity: PageIdentity
    nbytes: int
    slot: int
    stored_bytes: int = 0
    checksum: bytes = b""
    live: bool = True
    pending: Bytes | None = None
    kept: Bytes | None = None
    error: Exception | None = None
    durable: bool = False
    failures: int = 0

    @property
    def place(self) -> Place:
        """Its file and slot."""
        return Place(self.identity.layer, self.nbytes, self.slot)

    @property
    def offset(self) -> int:
        """Bytes from the file's start."""
        return self.slot * self.nbytes


def pack(page: Bytes) -> Bytes:
    """The page itself, or its lz4 block padded to 16 KiB where that is much smaller."""
    if not _promising(page):
        return page
    block = lz4.block.compress(page.data, mode="fast", store_size=False)
    size = 4 + len(block)
    padded = -(-size // PAGE_ALIGNMENT) * PAGE_ALIGNMENT
    if padded > WORTHWHILE * len(page):
        return page
    out = aligned_buffer(padded)
    out[:4] = np.frombuffer(struct.pack("<I", len(block)), np.uint8)
    out[4:size] = np.frombuffer(block, np.uint8)
    return out


def _promising(page: Bytes) -> bool:
    """Whether lz4 saves anything on some 4 KiB of each quarter: on most pages it does not.

    Trying whole pages took longer than writing them.
    """
    step = len(page) // SAMPLES
    if step < 4 * SAMPLE_BYTES:
        return True
    sample = page[: SAMPLES * step].reshape(SAMPLES, step)[:, :SAMPLE_BYTES].tobytes()
    block = lz4.block.compress(sample, mode="fast", store_size=False)
    return len(block) < WORTHWHILE * len(sample)


def unpack(identity: PageIdentity, stored: Bytes, out: Bytes) -> None:
    """Undo `pack` into `out`.

    Raises:
        CorruptPageError: if the block is damaged or does not fill `out`.
    """
    (length,) = struct.unpack("<I", stored[:4].tobytes())
    if length > len(stored) - 4:
        raise CorruptPageError(f"cold {identity} claims {length} of {len(stored) - 4} packed bytes")
    try:
        data = lz4.block.decompress(stored[4 : 4 + length].data, uncompressed_size=len(out))
    except lz4.block.LZ4BlockError as e:
        raise CorruptPageError(f"cold {identity} cannot be unpacked: {e}") from e
    if len(data) != len(out):
        raise CorruptPageError(f"cold {identity} unpacks to {len(data)} of {len(out)} bytes")
    out[:] = np.frombuffer(data, np.uint8)

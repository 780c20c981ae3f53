"""The checksum of a page: sums of its 4 KiB sectors, and SHA-256 over those and its identity.

SHA-256 over every byte took longer than a fast disk and a whole core: numpy's integer products are
four times faster here. They are exact, so every machine gets the same numbers.

A sector of 512 words of 64 bits, ``w``, has two sums modulo 2^64: of ``a[i] · w[i]``, and of
``b[i] · (w[i] >> 32)``, the factors being odd numbers that look random. Whatever two sectors differ
in, chance makes both sums equal at most once in 2^32 choices of factors: where the upper halves
differ, ``b[i]`` times a difference below 2^32 hits a given number for at most 2^32 of 2^64 factors;
where only lower halves do, so does ``a[i]``. Damage that is not made of a few high bits is missed
once in 2^64 or less, and damage to a single word never. Against forgery there is no protection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

CHECKSUM_BYTES = 16
SECTOR_BYTES = 4096
_WORDS = SECTOR_BYTES // 8
_AT_ONCE = 2**20
"""Bytes that are summed in one go: they are read twice, the second time from the cache. Less would
mean more waiting for the interpreter's lock."""

_FACTORS = np.frombuffer(
    hashlib.shake_128(b"pagedkv page checksum 2").digest(2 * SECTOR_BYTES), "<u8"
).reshape(2, _WORDS) | np.uint64(1)


def sector_sums(data: Bytes) -> npt.NDArray[np.uint64]:
    """Both sums of every sector, ``[sectors, 2]`` little-endian.

    Args:
        data: whole sectors, contiguous.
    """
    sums = np.empty((len(data) // SECTOR_BYTES, 2), "<u8")
    np.einsum("sw,w->s", data.view("<u8").reshape(-1, _WORDS), _FACTORS[0], out=sums[:, 0])
    upper = data.view("<u4").reshape(-1, _WORDS, 2)[:, :, 1]
    np.einsum("sw,w->s", upper, _FACTORS[1], out=sums[:, 1], dtype=np.uint64, casting="safe")
    return sums


def checksum(identity: bytes, page: Bytes) -> bytes:
    """Of one page, with what it is: SHA-256 over both, cut to 128 bits.

    Args:
        identity: what the page is; the same bytes as another page are refused.
        page: a multiple of 4 KiB, contiguous.
    """
    (digest,) = checksums([identity], page)
    return digest


def checksums(identities: Sequence[bytes], pages: Bytes) -> Iterator[bytes]:
    """Of pages of one size that lie one after the other; see `checksum`."""
    nbytes = len(pages) // len(identities)
    group, sums_bytes = max(1, _AT_ONCE // nbytes), 16 * nbytes // SECTOR_BYTES
    for start in range(0, len(identities), group):
        some = identities[start : start + group]
        sums = sector_sums(pages[start * nbytes : (start + len(some)) * nbytes]).tobytes()
        for i, identity in enumerate(some):
            own = sums[i * sums_bytes : (i + 1) * sums_bytes]
            yield hashlib.sha256(identity + own).digest()[:CHECKSUM_BYTES]

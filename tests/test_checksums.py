"""The checksum of a page: what docs/format.md says it is, and what it must notice."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pagedkv.tiers.disk.checksum import checksum, checksums

PAGE = 16384


def page(seed: int = 0) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(seed).bytes(PAGE), np.uint8).copy()


def by_the_book(identity: bytes, data: bytes) -> bytes:
    """docs/format.md in plain Python."""
    text = hashlib.shake_128(b"pagedkv page checksum 2").digest(8192)
    factors = [int.from_bytes(text[i : i + 8], "little") | 1 for i in range(0, 8192, 8)]
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    whole = hashlib.sha256(identity)
    for start in range(0, len(words), 512):
        sector = words[start : start + 512]
        low = sum(a * w for a, w in zip(factors[:512], sector, strict=True))
        high = sum(b * (w >> 32) for b, w in zip(factors[512:], sector, strict=True))
        for total in (low, high):
            whole.update((total % 2**64).to_bytes(8, "little"))
    return whole.digest()[:16]


def test_it_is_what_the_format_says() -> None:
    for data in (page(), np.zeros(PAGE, np.uint8), np.full(PAGE, 255, np.uint8)):
        assert checksum(b"who", data) == by_the_book(b"who", data.tobytes())
    counting = np.arange(PAGE // 4, dtype="<u4").view(np.uint8)
    assert checksum(b"", counting).hex() == "1c15b7a1ae23902f6db43130c15fc042"


def test_pages_together_have_the_checksums_that_they_have_alone() -> None:
    pages = np.concatenate([page(seed) for seed in range(150)])  # more than are summed in one go
    names = [bytes([seed]) for seed in range(150)]
    alone = [checksum(name, page(seed)) for seed, name in enumerate(names)]
    assert list(checksums(names, pages)) == alone
    assert len(set(alone)) == 150


def damages() -> dict[str, np.ndarray]:
    """A page, damaged in the ways of memories, buses and disks."""
    good, found = page(), {}
    for bit in (0, 31, 32, 62, 63):  # one bit, two words: carries run out of the top ones
        mask = np.uint64(1 << bit)
        for name, where in (("one", [5]), ("two", [5, 300]), ("column", slice(None, None, 7))):
            words = good.copy().view(np.uint64)
            words[where] ^= mask
            found[f"bit {bit} in {name}"] = words.view(np.uint8)
    stuck = good.copy().view(np.uint32)  # the same line of a 32-bit bus
    stuck ^= np.uint32(1 << 31)
    found["stuck line"] = stuck.view(np.uint8)
    sectors = good.reshape(4, 4096)
    found["sectors exchanged"] = sectors[[1, 0, 2, 3]].reshape(-1)
    found["a sector twice"] = sectors[[0, 0, 2, 3]].reshape(-1)
    found["words exchanged"] = good.view(np.uint64).reshape(-1, 2)[:, ::-1].reshape(-1).view("u1")
    found["a torn end"] = np.concatenate([good[:8192], np.zeros(8192, np.uint8)])
    found["one byte on"] = np.roll(good, 1)
    found["zeros"] = np.zeros(PAGE, np.uint8)
    found["another"] = page(1)
    return found


@pytest.mark.parametrize("name", damages())
def test_damage_is_noticed(name: str) -> None:
    assert checksum(b"who", damages()[name]) != checksum(b"who", page())


def test_who_a_page_is_counts() -> None:
    assert checksum(b"one", page()) != checksum(b"two", page())

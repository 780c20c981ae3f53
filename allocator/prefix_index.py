"""Which prefixes of token sequences are known: a chain of digests over units of tokens.

Digest i is of the key, of digest i - 1 and of the tokens of unit i: two sequences share it only if
they share every token up to there. It is BLAKE2b, keyed and 256 bits long (RFC 7693), so that
nobody finds other tokens with the same digest, and that sequences under different keys (other
models, other settings, other salts) have nothing in common.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

from pagedkv.allocator.errors import ConfigError

DIGEST_BYTES = 32

Name = TypeVar("Name", bound=Hashable)


def prefix_key(*parts: object) -> bytes:
    """A key from everything that decides what the pages of some tokens hold.

    Args:
        parts: plain values, such as a model's fingerprint, a precision, a salt.
    """
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(b"pagedkv prefix 1 " + text.encode(), digest_size=32).digest()


def prefix_digests(
    key: bytes, tokens: Iterable[int], unit: int, first: int = 0, most: int | None = None
) -> list[bytes]:
    """The chain of digests over the full units of some tokens.

    Args:
        key: from `prefix_key`.
        tokens: token ids, each from 0 up and below 2^63.
        unit: tokens per unit.
        first: tokens that come before the first unit and belong to it.
        most: units at most; all if None.

    Returns:
        One digest per full unit.

    Raises:
        ConfigError: if something is not a token id.
    """
    try:
        ids = array("q", tokens)
    except (TypeError, OverflowError) as e:
        raise ConfigError(f"tokens are integers from 0 up: {e}") from e
    if ids and min(ids) < 0:
        raise ConfigError(f"tokens are integers from 0 up, got {min(ids)}")
    units = max(0, (len(ids) - first) // unit)
    digests: list[bytes] = []
    link, start = b"", 0
    for i in range(units if most is None else min(units, most)):
        stop = first + (i + 1) * unit
        link = hashlib.blake2b(
            link + ids[start:stop].tobytes(), key=key, digest_size=DIGEST_BYTES
        ).digest()
        digests.append(link)
        start = stop
    return digests


class PrefixIndex(Generic[Name]):
    """Finds the known sequence that shares most with a new one."""

    def __init__(self) -> None:
        self._chains: dict[Name, tuple[bytes, ...]] = {}  # the one used longest ago comes first
        self._holders: dict[bytes, dict[Name, None]] = {}

    def __len__(self) -> int:
        return len(self._chains)

    def __contains__(self, name: Name) -> bool:
        return name in self._chains

    def add(self, name: Name, digests: Sequence[bytes]) -> None:
        """Know a sequence by this chain, instead of what it was known by before."""
        self.remove(name)
        self._chains[name] = tuple(digests)
        for digest in digests:
            self._holders.setdefault(digest, {})[name] = None

    def remove(self, name: Name) -> None:
        """Forget a sequence; one that is not known is fine."""
        for digest in self._chains.get(name, ()):
            holders = self._holders.get(digest, {})
            holders.pop(name, None)
            if not holders:
                self._holders.pop(digest, None)
        self._chains.pop(name, None)  # last: who was interrupted does it again

    def longest(self, digests: Sequence[bytes]) -> tuple[Name, int] | None:
        """The sequence that shares the most units with a chain, and how many; None if none does.

        Of several, the one that was added last.
        """
        for units in range(len(digests), 0, -1):
            if holders := self._holders.get(digests[units - 1]):
                return next(reversed(holders)), units
        return None

    def touch(self, name: Name) -> None:
        """Note that a sequence was used."""
        self._chains[name] = self._chains.pop(name)

    @property
    def oldest(self) -> Name | None:
        """The sequence that was used longest ago; None if there is none."""
        return next(iter(self._chains), None)

    def covered(self, digests: Sequence[bytes]) -> list[Name]:
        """Sequences whose whole chain is the beginning of this one: they add nothing to it."""
        known = self._holders
        ends = [d for d in digests if d in known]
        return [n for d in ends for n in known[d] if self._chains[n][-1] == d]

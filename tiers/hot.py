"""The hot tier: the sinks and the newest tokens of one sequence and layer, in 16 bit."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from pagedkv.allocator.errors import ShapeError

ALL = slice(None)

STEP = 256
"""Tokens by which the buffer grows while the sequence is short (as mlx-lm's KVCache does)."""


class HotTokens(NamedTuple):
    """The hot tokens of one moment; later writes do not change it.

    Attributes:
        keys: ``[batch, kv_heads, capacity, key_dim]``, of which the first `used` tokens count.
        values: ``[batch, kv_heads, capacity, value_dim]``, likewise.
        used: tokens.
        capacity: tokens that the arrays have room for.
    """

    keys: mx.array
    values: mx.array
    used: int
    capacity: int


class HotBuffer:
    """Keys and values of a sequence's first `sink_tokens` and its newest tokens, contiguous.

    Written in place, token by token. Sealing removes a run of tokens behind the sinks and moves
    the rest up, once per page. The arrays are MLX values: a fork shares them until one side
    writes, and a reader still in flight makes MLX copy this buffer and nothing larger.
    """

    def __init__(self, limit: int) -> None:
        """Make an empty buffer.

        Args:
            limit: tokens that the buffer holds between seals (sinks + window + one page). A
                larger prefill chunk is taken whole and makes room again when it is sealed.
        """
        self._limit = -(-limit // 64) * 64
        self._keys: mx.array | None = None
        self._values: mx.array | None = None
        self.used = 0
        self.capacity = 0
        """Tokens that fit without another allocation."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        if self._keys is None or self._values is None:
            return 0
        return int(self._keys.nbytes + self._values.nbytes)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """The backing arrays, for evaluation; empty before the first token."""
        return () if self._keys is None or self._values is None else (self._keys, self._values)

    def exchange(self, keys: mx.array | None, values: mx.array | None) -> None:
        """Put other arrays in the place of the backing ones.

        Raises:
            ShapeError: if there are none yet, or a shape or type differs.
        """
        for mine, other in zip(self.arrays or (None, None), (keys, values), strict=True):
            if (
                mine is None
                or other is None
                or (mine.shape, mine.dtype) != (other.shape, other.dtype)
            ):
                here, given = _tell(mine), _tell(other)
                raise ShapeError(f"{given} cannot take the place of a hot tier's {here}")
        self._keys, self._values = keys, values

    def append(self, keys: mx.array, values: mx.array, count: int) -> None:
        """Add tokens at the end.

        Args:
            keys: ``[batch, kv_heads, count, key_dim]``.
            values: ``[batch, kv_heads, count, value_dim]``.
            count: tokens.
        """
        start, used = self.used, self.used + count
        if used > self.capacity:
            self._reserve(used, keys, values)
        assert self._keys is not None and self._values is not None
        # New handles: assigning to an array changes it for whoever else holds the object.
        own_keys, own_values = self._keys[...], self._values[...]
        place = (ALL, ALL, slice(start, used))
        own_keys[place] = keys
        own_values[place] = values
        self._keys, self._values, self.used = own_keys, own_values, used

    @property
    def tokens(self) -> HotTokens:
        """The present contents.

        Raises:
            ValueError: if the buffer is empty.
        """
        if self._keys is None or self._values is None:
            raise ValueError("the hot buffer is empty")
        return HotTokens(self._keys, self._values, self.used, self.capacity)

    def view(self, start: int = 0, stop: int | None = None) -> tuple[mx.array, mx.array]:
        """Keys and values of tokens ``start … stop``, as lazy slices."""
        if self._keys is None or self._values is None:
            raise ValueError("the hot buffer is empty")
        stop = self.used if stop is None else stop
        return self._keys[:, :, start:stop], self._values[:, :, start:stop]

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""
        self.used = min(self.used, tokens)

    def without(self, start: int, count: int) -> HotBuffer:
        """A buffer without the `count` tokens from `start` on, lazily, to take this one's place."""
        twin = HotBuffer(self._limit)
        twin.used = self.used - count
        twin.capacity = max(self._limit, twin.used)
        twin._keys = self._gathered(self._keys, start, count, twin.capacity)
        twin._values = self._gathered(self._values, start, count, twin.capacity)
        return twin

    def share(self) -> HotBuffer:
        """A second buffer with the same tokens; memory is shared until one of them writes."""
        twin = HotBuffer(self._limit)
        twin._keys, twin._values = self._keys, self._values
        twin.used, twin.capacity = self.used, self.capacity
        if self._keys is not None and self._values is not None:
            # New array handles: an in-place write through one handle must not reach the other.
            twin._keys, twin._values = self._keys[:], self._values[:]
        return twin

    def copy(self, tokens: int) -> HotBuffer:
        """The first `tokens` tokens in a buffer whose memory is its own, lazily."""
        twin = HotBuffer(self._limit)
        if tokens:
            twin.append(*self.view(0, tokens), tokens)
        return twin

    def load(self, keys: mx.array, values: mx.array) -> None:
        """Hold these tokens and nothing else, in no more memory than they take.

        Empty arrays are kept too: who saves the tokens wants to know the heads and channels.
        """
        self._keys, self._values = keys, values
        self.used = self.capacity = int(keys.shape[2])

    def _reserve(self, wanted: int, keys: mx.array, values: mx.array) -> None:
        """Have room for so many tokens; those that there are stay."""
        used, grown = self.used, -(-wanted // STEP) * STEP
        capacity = max(wanted, min(grown, self._limit))

        def enlarge(old: mx.array | None, like: mx.array) -> mx.array:
            batch, heads, _, dim = like.shape
            if old is None or not used:
                return mx.zeros((batch, heads, capacity, dim), like.dtype)
            room = mx.zeros((batch, heads, capacity - used, dim), old.dtype)
            return mx.concatenate([old[:, :, :used], room], axis=2)

        larger = enlarge(self._keys, keys), enlarge(self._values, values)
        (self._keys, self._values), self.capacity = larger, capacity

    def _gathered(self, old: mx.array | None, start: int, count: int, capacity: int) -> mx.array:
        assert old is not None
        batch, heads, _, dim = old.shape
        room = mx.zeros((batch, heads, capacity - (self.used - count), dim), old.dtype)
        kept = [old[:, :, :start], old[:, :, start + count : self.used], room]
        return mx.concatenate(kept, axis=2)


def _tell(array: mx.array | None) -> str:
    return "nothing" if array is None else f"{array.dtype} {array.shape}"

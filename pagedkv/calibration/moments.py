"""What queries, keys and values of a layer are like: second moments of those that were seen."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator.precision import GROUP_TOKENS
from pagedkv.tiers.arrays import evaluated

FIRST = 64
"""Tokens at the beginning that are not looked at: sinks are in 16 bit, and unlike all others."""

NEAR = 64
"""The newest tokens, likewise: every query looks at them."""

AT_ONCE = 512
"""Queries of a call, at most, whose attention is looked at: spread evenly over it."""

BLOCK, SCORES = 64, 2**22
"""Of these so many together, and no more than have so many scores: they are in memory."""

ALIKE = 0.2
"""The part of what queries are like that is the same for all of them, however they attend."""

LEAST_SPREAD = 0.01
"""Of key channels within groups, as a part of their root mean square."""

Floats = npt.NDArray[np.float64]


class Covariances:
    """Sums of products of channels, per KV head, in float32.

    The arrays are MLX's and lazy; whoever adds to them has them computed now and then.

    Attributes:
        query_tokens: whose queries were seen.
        key_tokens: whose keys were.
        value_tokens: likewise.
    """

    def __init__(self) -> None:
        self.query_tokens = self.key_tokens = self.value_tokens = 0
        self._rows = 0
        self._queries = self._keys = self._values = mx.array(0.0)
        self._attending = self._attended = self._attention = mx.array(0.0)

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be computed some time."""
        sums = self._queries, self._keys, self._values
        return [*sums, self._attending, self._attended, self._attention]

    def add_queries(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        position: int,
        scale: float,
        sinks: mx.array | None = None,
        at_once: int = AT_ONCE,
    ) -> None:
        """Count queries in, and once more by how they attend; likewise what they attend to.

        An error e of a key at which a query looks with probability p moves the sum of values by
        p times the error of the score, ``q · e``, and an error of its value by p times that. So a
        query asks as much of errors as the sum of its p² over tokens that are to be rounded, and a
        token's value as much as the sum of p² of all queries. Most heads look at the first tokens
        most of the time, and then errors are nothing to them; what they are like when they look
        something up is what counts.

        Args:
            queries: ``[1, query_heads, tokens, key_dim]``.
            keys: of all tokens until the last of these, ``[1, kv_heads, tokens, key_dim]``; the
                oldest may be missing.
            values: of the same, ``[1, kv_heads, tokens, value_dim]``.
            position: of the first query's token.
            scale: of scores.
            sinks: scores of nothing, one per query head, where a model has them.
            at_once: the most queries whose attention is looked at.
        """
        heads = int(keys.shape[1])
        self._add_attention(queries[0], keys[0], values[0], position, scale, sinks, at_once)
        queries = queries[0, :, max(0, FIRST - position) :]
        rows = queries.astype(mx.float32).reshape(heads, -1, queries.shape[2])
        if rows.shape[1]:
            self._queries = self._queries + rows.swapaxes(1, 2) @ rows
            self._rows += int(rows.shape[1])
            self.query_tokens += int(queries.shape[1])

    def _add_attention(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        position: int,
        scale: float,
        sinks: mx.array | None,
        at_once: int,
    ) -> None:
        heads, held, dim = keys.shape
        end, first = position + queries.shape[1], max(0, FIRST + NEAR - position)
        chosen = list(range(first, queries.shape[1], max(1, -(-queries.shape[1] // at_once))))
        if not chosen:
            return
        at = end - held + mx.arange(held)  # positions of keys
        columns = keys.astype(mx.float32)[:, None].swapaxes(2, 3)
        asked = mx.zeros((heads, held, 1))
        size = max(1, min(BLOCK, SCORES // (queries.shape[0] * held)))
        for start in range(0, len(chosen), size):
            some = mx.array(chosen[start : start + size])
            rows = queries[:, some].astype(mx.float32).reshape(heads, -1, some.size, dim)
            own = (position + some)[:, None]
            scores = mx.where(at <= own, scale * (rows @ columns), -mx.inf)
            if sinks is not None:
                none = sinks.astype(mx.float32).reshape(heads, -1, 1, 1)
                none = mx.broadcast_to(none, (*scores.shape[:3], 1))
                scores = mx.concatenate([scores, none], axis=3)
            shares = mx.softmax(scores, axis=3)[..., :held]
            squares = ((at >= FIRST) & (at <= own - NEAR)) * mx.square(shares)
            weights = squares.sum(axis=3, keepdims=True)
            weighted = (weights * rows).reshape(heads, -1, dim)
            rows = rows.reshape(heads, -1, dim)
            self._attending = self._attending + weighted.swapaxes(1, 2) @ rows
            self._attention = self._attention + weights.sum(axis=(2, 3))
            asked = asked + squares.sum(axis=(1, 2))[..., None]
            if len(chosen) > size:  # else the caller decides when
                mx.async_eval(self._attending, self._attention, asked)  # type: ignore[no-untyped-call]
        never = max(0, FIRST - (end - held))
        numbers = values[:, never:].astype(mx.float32)
        self._attended = self._attended + (asked[:, never:] * numbers).swapaxes(1, 2) @ numbers

    def add_keys(self, keys: mx.array, position: int) -> None:
        """Count keys in: how they spread within groups that share a scale and a bias.

        Args:
            keys: ``[1, kv_heads, tokens, key_dim]``; what is beyond whole groups is not looked at.
            position: of their first token.
        """
        keys = keys[0, :, max(0, FIRST - position) :]
        heads, tokens, dim = keys.shape
        if groups := tokens // GROUP_TOKENS:
            parts = keys[:, : groups * GROUP_TOKENS].astype(mx.float32)
            parts = parts.reshape(heads, groups, GROUP_TOKENS, dim)
            rows = (parts - parts.mean(axis=2, keepdims=True)).reshape(heads, -1, dim)
            # Pages hold what is constant, too, in 16 bit: a channel counts as no quieter than that.
            least = LEAST_SPREAD**2 * mx.square(parts).sum(axis=(1, 2))
            more = mx.maximum(least - mx.square(rows).sum(axis=1), 0)
            self._keys = self._keys + rows.swapaxes(1, 2) @ rows + more[..., None] * mx.eye(dim)
            self.key_tokens += groups * GROUP_TOKENS

    def add_values(self, values: mx.array, position: int) -> None:
        """Count values in.

        Args:
            values: ``[1, kv_heads, tokens, value_dim]``.
            position: of their first token.
        """
        rows = values[0, :, max(0, FIRST - position) :].astype(mx.float32)
        if rows.shape[1]:
            self._values = self._values + rows.swapaxes(1, 2) @ rows
            self.value_tokens += int(rows.shape[1])

    @property
    def queries(self) -> Floats:
        """Mean products of query channels, ``[kv_heads, key_dim, key_dim]``.

        Queries count by how they attend, and `ALIKE` of it all alike.
        """
        alike = np.array(evaluated(self._queries), np.float64) / max(1, self._rows)
        return self._weighted(alike, self._attending)

    @property
    def keys(self) -> Floats:
        """Covariances of key channels within groups, ``[kv_heads, key_dim, key_dim]``."""
        return np.array(evaluated(self._keys), np.float64) / max(1, self.key_tokens)

    @property
    def attention(self) -> Floats:
        """How much query heads look up: sums of p², ``[kv_heads, query heads of each]``.

        Over tokens that are to be rounded, and all queries that were looked at.
        """
        heads = int(self._queries.shape[0])
        none = np.zeros((heads, self._rows // max(1, self.query_tokens)))
        return np.array(evaluated(self._attention), np.float64) if self._attention.ndim else none

    @property
    def asks(self) -> Floats:
        """How much each query head asks of values, ``[kv_heads, query heads of each]``, mean 1."""
        attention = self.attention
        mean = attention.mean(axis=1, keepdims=True)
        share = attention / np.where(mean > 0, mean, 1.0)
        return np.where(mean > 0, ALIKE + (1 - ALIKE) * share, 1.0)

    @property
    def values(self) -> Floats:
        """Mean products of value channels, ``[kv_heads, value_dim, value_dim]``.

        Tokens count by how they are attended to, and `ALIKE` of it all alike.
        """
        alike = np.array(evaluated(self._values), np.float64) / max(1, self.value_tokens)
        return self._weighted(alike, self._attended)

    def _weighted(self, alike: Floats, attention: mx.array) -> Floats:
        """Means in part by attention, of heads that attended to something."""
        if not self._attention.ndim:
            return alike
        total = np.array(evaluated(self._attention), np.float64).sum(axis=1)[:, None, None]
        mean = np.array(evaluated(attention), np.float64) / np.where(total > 0, total, 1.0)
        return np.where(total > 0, ALIKE * alike + (1 - ALIKE) * mean, alike)

"""What queries, keys and values of a layer are like: second moments of those that were seen."""

from __future__ import annotations

import base64
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator.precision import GROUP_TOKENS

FIRST = 64
"""Tokens at the beginning that are not looked at: sinks are in 16 bit, and unlike all others."""

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

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be computed some time."""
        return [self._queries, self._keys, self._values]

    def add_queries(self, queries: mx.array, heads: int, position: int) -> None:
        """Count queries in.

        Args:
            queries: ``[1, query_heads, tokens, key_dim]``.
            heads: KV heads.
            position: of their first token.
        """
        queries = queries[0, :, max(0, FIRST - position) :]
        rows = queries.astype(mx.float32).reshape(heads, -1, queries.shape[2])
        if rows.shape[1]:
            self._queries = self._queries + rows.swapaxes(1, 2) @ rows
            self._rows += int(rows.shape[1])
            self.query_tokens += int(queries.shape[1])

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

    def to_dict(self) -> dict[str, Any]:
        """The queries seen so far, bit for bit, for JSON."""
        sums = np.asarray(self._queries).astype("<f4").tobytes()
        queries = base64.b64encode(sums).decode()
        return {"tokens": self.query_tokens, "rows": self._rows, "queries": queries}

    def recall(self, told: dict[str, Any], heads: int, dim: int) -> int:
        """Go on from what `to_dict` gave.

        Args:
            told: by `to_dict`.
            heads: KV heads.
            dim: channels of a key.

        Returns:
            Query heads per KV head.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: if it is none.
        """
        sums = np.frombuffer(base64.b64decode(told["queries"], validate=True), "<f4")
        sums = sums.astype(np.float32).reshape(heads, dim, dim)
        tokens, rows = int(told["tokens"]), int(told["rows"])
        if not (0 < tokens <= rows and rows % tokens == 0 and np.isfinite(sums).all()):
            raise ValueError(f"{rows} rows of {tokens} tokens")
        self._queries, self._rows, self.query_tokens = mx.array(sums), rows, tokens
        return rows // tokens

    @property
    def queries(self) -> Floats:
        """Mean products of query channels, ``[kv_heads, key_dim, key_dim]``."""
        return np.array(self._queries, np.float64) / max(1, self._rows)

    @property
    def keys(self) -> Floats:
        """Covariances of key channels within groups, ``[kv_heads, key_dim, key_dim]``."""
        return np.array(self._keys, np.float64) / max(1, self.key_tokens)

    @property
    def values(self) -> Floats:
        """Mean products of value channels, ``[kv_heads, value_dim, value_dim]``."""
        return np.array(self._values, np.float64) / max(1, self.value_tokens)

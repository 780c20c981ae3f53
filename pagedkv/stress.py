"""A context whose every answer is known: what `pagedkv stress` feeds, and what must come out.

Random keys and values are regenerated from a seed whenever they are needed, so none is kept.
Needles are planted at random depths: keys in a direction of their own, which a query can ask for,
with values of their own. The exact answer is a softmax in float64 over the original numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.errors import ConfigError

Array = npt.NDArray[Any]

GAIN = 2.0
"""How much longer a needle's key is than the others."""

MARGIN = 16.0
"""Nats between a needle's score and all other tokens' together."""


@dataclass(frozen=True)
class SyntheticModel:
    """The shape of a model that does not exist.

    Attributes:
        layers: attention layers.
        query_heads: heads of a query; a multiple of `kv_heads`.
        kv_heads: key/value heads.
        head_dim: channels per head.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied with."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class StressOptions:
    """What to run.

    Attributes:
        tokens: prompt tokens.
        needles: needles to plant; as many decode steps follow the prompt.
        seed: of everything random.
        chunk: tokens per prefill chunk.
        queries: query tokens per prefill chunk, its last ones.
        attend_every: attend in every n-th prefill chunk (and the last), append only in others.
    """

    tokens: int
    needles: int = 8
    seed: int = 0
    chunk: int = 2048
    queries: int = 16
    attend_every: int = 1

    def __post_init__(self) -> None:
        least = (self.needles, self.chunk, self.queries, self.attend_every)
        if min(least) < 1 or self.seed < 0:
            raise ConfigError(
                f"needles, chunk, queries and attend_every are from 1 up and the seed from 0 up, "
                f"got {least} and {self.seed}"
            )
        if self.tokens < self.queries + self.needles:
            raise ConfigError(
                f"{self.tokens} tokens cannot hold {self.needles} needles: give at least "
                f"{self.queries + self.needles}"
            )


class Planted(NamedTuple):
    """The needles of one layer, each array ``[kv_heads, needles, head_dim]``.

    Attributes:
        keys: float16.
        values: float16.
        queries: float32; each finds its needle.
    """

    keys: Array
    values: Array
    queries: Array


class SyntheticTokens:
    """Keys, values, needles and queries of every layer, from the seed.

    Attributes:
        needles: the token position of each needle, ascending.
        sharpness: length of a query.
    """

    def __init__(self, model: SyntheticModel, options: StressOptions) -> None:
        self.model, self.options = model, options
        rng = np.random.default_rng([options.seed, 0])
        end = options.tokens - options.queries  # the last queries must see every needle
        edges = np.linspace(0, end, options.needles + 1).astype(int)
        self.needles = [int(rng.integers(*pair)) for pair in itertools.pairwise(edges)]
        self.sharpness = _sharpness(model.head_dim, options.tokens)

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """First and last token (exclusive) of each prefill chunk, then of each decode step."""
        o = self.options
        prompt = [(i, min(i + o.chunk, o.tokens)) for i in range(0, o.tokens, o.chunk)]
        return [*prompt, *((i, i + 1) for i in range(o.tokens, o.tokens + o.needles))]

    def chunk(self, layer: int, start: int, stop: int) -> tuple[Array, Array]:
        """Keys and values of one of `chunks`, each float16 ``[kv_heads, n, head_dim]``."""
        m = self.model
        rng = np.random.default_rng([self.options.seed, 1, layer, start])
        keys, values = (
            rng.standard_normal((m.kv_heads, stop - start, m.head_dim), np.float32)
            for _ in range(2)
        )
        planted = self.planted(layer)
        for i, position in enumerate(self.needles):
            if start <= position < stop:
                keys[:, position - start] = planted.keys[:, i]
                values[:, position - start] = planted.values[:, i]
        return keys.astype(np.float16), values.astype(np.float16)

    def planted(self, layer: int) -> Planted:
        """The layer's needles."""
        m = self.model
        rng = np.random.default_rng([self.options.seed, 2, layer])
        shape = (m.kv_heads, len(self.needles), m.head_dim)
        directions = rng.standard_normal(shape, np.float32)
        directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
        return Planted(
            (GAIN * math.sqrt(m.head_dim) * directions).astype(np.float16),
            rng.standard_normal(shape, np.float32).astype(np.float16),
            directions * np.float32(self.sharpness),
        )


def _sharpness(head_dim: int, tokens: int) -> float:
    """The length b of a query whose needle outweighs all other tokens by `MARGIN`.

    The needle scores ``GAIN · b``. The others score normally with deviation ``b / sqrt(d)``, so
    together they weigh ``log(tokens) + b² / 2d``.
    """
    wanted = math.log(tokens) + MARGIN
    root = GAIN**2 - 2 * wanted / head_dim
    return head_dim * (GAIN - math.sqrt(max(root, 0.0)))


class Cursor:
    """Reads the tokens of a layer in order, in pieces of any length."""

    def __init__(self, tokens: SyntheticTokens, layer: int) -> None:
        self._chunks: Iterator[tuple[Array, Array]] = (
            tokens.chunk(layer, *chunk) for chunk in tokens.chunks
        )
        empty = np.empty((tokens.model.kv_heads, 0, tokens.model.head_dim), np.float16)
        self._left = (empty, empty)

    def take(self, count: int) -> tuple[Array, Array]:
        """The next `count` tokens: keys and values, float32 ``[kv_heads, count, head_dim]``."""
        while self._left[0].shape[1] < count:
            fresh = next(self._chunks)
            pair = zip(self._left, fresh, strict=True)
            keys, values = (np.concatenate(both, axis=1) for both in pair)
            self._left = keys, values
        keys, values = self._left
        self._left = keys[:, count:], values[:, count:]
        return keys[:, :count].astype(np.float32), values[:, :count].astype(np.float32)


class ExactSoftmax:
    """Attention of some queries in float64, over tokens that come piece by piece."""

    def __init__(self, queries: Array, scale: float) -> None:
        """Begin with no tokens.

        Args:
            queries: ``[kv_heads, rows, head_dim]``.
            scale: of the scores.
        """
        self._q = queries.astype(np.float64) * scale
        self._peak = np.full((*queries.shape[:2], 1), -np.inf)
        self._total = np.zeros_like(self._peak)
        self._weighted = np.zeros(queries.shape)
        self.largest = 0.0

    def add(self, keys: Array, values: Array) -> None:
        """Attend to more tokens, ``[kv_heads, n, head_dim]`` each."""
        keys, values = keys.astype(np.float64), values.astype(np.float64)
        scores = (keys @ self._q.swapaxes(1, 2)).swapaxes(1, 2)  # twice as fast as q @ keys
        peak = np.maximum(self._peak, scores.max(axis=2, keepdims=True))
        p, fade = np.exp(scores - peak), np.exp(self._peak - peak)
        self._total = self._total * fade + p.sum(axis=2, keepdims=True)
        self._weighted = self._weighted * fade + p @ values
        self._peak = peak
        self.largest = max(self.largest, float(np.abs(values).max()))

    def result(self) -> Array:
        """The answers so far, ``[kv_heads, rows, head_dim]``."""
        answers: Array = self._weighted / self._total
        return answers

    def others(self, keys: Array) -> Array:
        """Weight of everything but the token row i asks for.

        Args:
            keys: of those tokens, ``[kv_heads, rows, head_dim]``.

        Returns:
            ``[kv_heads, rows]``.
        """
        scores = (self._q * keys.astype(np.float64)).sum(axis=2)
        mine: Array = np.exp(scores - self._peak[..., 0]) / self._total[..., 0]
        rest: Array = np.clip(1 - mine, 0, 1)
        return rest

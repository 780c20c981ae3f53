"""A context whose every answer is known: random keys and values, and needles among them.

Keys and values are regenerated from a seed whenever they are needed, so none is kept. What a
token is depends on its layer, its position, and the *branch* that wrote it: after a trim, and in
a fork, the same positions are written again by another branch, with other numbers. A needle has
the same key on every branch and another value, so that what a trim should have removed, or what
belongs to the other fork, is found by the same query and shows in the answer.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.tools.stress.options import StressOptions

Array = npt.NDArray[Any]

GAIN = 2.0
"""How much longer a needle's key is than the others."""

MARGIN = 16.0
"""Nats between a needle's score and all other tokens' together."""

BLOCK = 64
"""Tokens that one random sequence makes; a piece of any length is cut from such blocks."""


@dataclass(frozen=True)
class SyntheticModel:
    """The shape of a model that does not exist.

    Attributes:
        layers: attention layers.
        query_heads: heads of a query; a multiple of `kv_heads`.
        kv_heads: key/value heads.
        head_dim: channels per head.
        whole: layers and KV heads of the model that this one is a slice of, if it is one.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    whole: tuple[int, int] | None = None

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied with."""
        return float(self.head_dim**-0.5)

    @property
    def token_numbers(self) -> int:
        """Numbers that one layer caches per token."""
        return 2 * self.kv_heads * self.head_dim

    def describe(self) -> str:
        """The shape in words, and what was cut off."""
        text = f"{self.layers} layers of {self.kv_heads} KV heads x {self.head_dim}"
        if self.whole and self.whole != (self.layers, self.kv_heads):
            text += f", a slice of {self.whole[0]} layers of {self.whole[1]} KV heads"
        return text


@dataclass(frozen=True)
class History:
    """Which branch wrote which tokens of a sequence.

    Attributes:
        cuts: where each branch begins, ascending, and its number.
    """

    cuts: tuple[tuple[int, int], ...] = ((0, 0),)

    def cut(self, length: int, branch: int) -> History:
        """The same up to `length`, and another branch from there on."""
        kept = tuple(cut for cut in self.cuts if cut[0] < length)
        return History((*kept, (length, branch)))

    def branch(self, position: int) -> int:
        """Which branch a token is of."""
        return self.cuts[bisect.bisect_right(self.cuts, (position, math.inf)) - 1][1]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Branch, first token and end of each piece of a stretch of tokens."""
        ends = [first for first, _ in self.cuts[1:]]
        for (first, branch), end in itertools.zip_longest(self.cuts, ends):
            low, high = max(first, start), stop if end is None else min(end, stop)
            if low < high:
                yield branch, low, high


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
        self._branches = itertools.count(1)
        self._latest: dict[int, tuple[tuple[int, int], Array]] = {}

    def new_branch(self) -> int:
        """The number of a branch that no sequence has yet."""
        return next(self._branches)

    def read(self, layer: int, history: History, start: int, stop: int) -> tuple[Array, Array]:
        """Keys and values of tokens `start` to `stop`, each float16 ``[kv_heads, n, head_dim]``."""
        m = self.model
        both = np.empty((2, m.kv_heads, stop - start, m.head_dim), np.float16)
        for branch, low, high in history.pieces(start, stop):
            for block in range(low // BLOCK, -(-high // BLOCK)):
                first = block * BLOCK
                a, b = max(low, first), min(high, first + BLOCK)
                both[:, :, a - start : b - start] = self._block(layer, branch, block)[
                    :, :, a - first : b - first
                ]
        return both[0], both[1]

    def _block(self, layer: int, branch: int, block: int) -> Array:
        """One block, float16 ``[2, kv_heads, BLOCK, head_dim]``; a layer's latest one is kept."""
        key = (branch, block)
        if layer in self._latest and self._latest[layer][0] == key:
            return self._latest[layer][1]
        m, first = self.model, block * BLOCK
        rng = np.random.default_rng([self.options.seed, 1, layer, branch, block])
        both = rng.standard_normal((2, m.kv_heads, BLOCK, m.head_dim), np.float32)
        fresh: Array = both.astype(np.float16)
        i = bisect.bisect_left(self.needles, first)
        while i < len(self.needles) and self.needles[i] < first + BLOCK:
            at = self.needles[i] - first
            fresh[0, :, at] = self._needle_keys(self._direction(layer, i))
            fresh[1, :, at] = self._needle_values(layer, i, branch)
            i += 1
        self._latest[layer] = (key, fresh)
        return fresh

    def _direction(self, layer: int, needle: int) -> Array:
        shape = (self.model.kv_heads, self.model.head_dim)
        rng = np.random.default_rng([self.options.seed, 2, layer, needle])
        directions = rng.standard_normal(shape, np.float32)
        unit: Array = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
        return unit

    def _needle_keys(self, directions: Array) -> Array:
        keys: Array = (GAIN * math.sqrt(self.model.head_dim) * directions).astype(np.float16)
        return keys

    def _needle_values(self, layer: int, needle: int, branch: int) -> Array:
        shape = (self.model.kv_heads, self.model.head_dim)
        rng = np.random.default_rng([self.options.seed, 3, layer, needle, branch])
        values: Array = rng.standard_normal(shape, np.float32).astype(np.float16)
        return values

    def planted(self, layer: int, history: History) -> Planted:
        """The layer's needles, as a sequence has them."""
        numbers = range(len(self.needles))
        directions = np.stack([self._direction(layer, i) for i in numbers], axis=1)
        values = [self._needle_values(layer, i, history.branch(self.needles[i])) for i in numbers]
        return Planted(
            self._needle_keys(directions),
            np.stack(values, axis=1),
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

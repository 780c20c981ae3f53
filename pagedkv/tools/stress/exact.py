"""What attention must answer: a softmax in float64 over the original numbers, kept as they come."""

from __future__ import annotations

import copy

import numpy as np

from pagedkv.tools.stress.tokens import Array, History, SyntheticTokens

_MARK_TOKENS = 4096
_MARKS = 3
_PIECE = 2048


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
        # New arrays each time: copies of this object share the old ones.
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


class Truth:
    """What a sequence holds, and what every layer must answer when it is asked for a needle.

    Grows with the sequence. A few earlier states are kept, so that a trim costs little.

    Attributes:
        history: which branch wrote which tokens.
        lengths: tokens known of each layer.
        sealed: of pages that a trim cut into, by position: what they were sealed from. Their bytes
            do not change, so neither do the scales, which forgotten tokens had a part in.
    """

    def __init__(self, tokens: SyntheticTokens) -> None:
        self._tokens = tokens
        self.history = History()
        self.sealed: dict[int, History] = {}
        layers = range(tokens.model.layers)
        self.lengths = [0 for _ in layers]
        self._sums = []
        for layer in layers:
            queries = tokens.planted(layer, self.history).queries
            self._sums.append(ExactSoftmax(queries, tokens.model.scale))
        self._marks = [[(0, copy.copy(s))] for s in self._sums]

    @property
    def length(self) -> int:
        """Tokens that every layer holds."""
        return min(self.lengths)

    @staticmethod
    def memory_bytes(layers: int, kv_heads: int, needles: int, head_dim: int) -> int:
        """What the sums take, at most."""
        return layers * (_MARKS + 2) * kv_heads * needles * head_dim * 8

    def exact(self, layer: int) -> ExactSoftmax:
        """The sums of a layer."""
        return self._sums[layer]

    def extend(self, layer: int, start: int, keys: Array, values: Array) -> None:
        """Take in the tokens from `start` on, unless they are known (a call was made again)."""
        stop = start + keys.shape[1]
        if self.lengths[layer] >= stop:
            return
        self._sums[layer].add(keys, values)
        self.lengths[layer] = stop
        marks = self._marks[layer]
        if stop - marks[-1][0] >= _MARK_TOKENS:
            marks.append((stop, copy.copy(self._sums[layer])))
            del marks[1:-_MARKS]

    def read_to(self, length: int) -> None:
        """Take in what the history says comes next, in every layer, up to `length`."""
        for layer, known in enumerate(self.lengths):
            for start in range(known, length, _PIECE):
                stop = min(start + _PIECE, length)
                self.extend(layer, start, *self._tokens.read(layer, self.history, start, stop))

    def cut(self, length: int, page: int | None) -> None:
        """Forget what comes after `length`; what is written there next is of a new branch.

        Args:
            length: tokens to keep.
            page: position of the page that `length` lies in, if it does.
        """
        self.forget_pages(length)
        if page is not None:
            self.sealed.setdefault(page, self.history)
        for layer, marks in enumerate(self._marks):
            while marks[-1][0] > length:
                marks.pop()
            self.lengths[layer], self._sums[layer] = marks[-1][0], copy.copy(marks[-1][1])
        self.read_to(length)
        self.history = self.history.cut(length, self._tokens.new_branch())

    def forget_pages(self, length: int) -> None:
        """Pages from `length` on are no more."""
        self.sealed = {at: history for at, history in self.sealed.items() if at < length}

    def fork(self) -> Truth:
        """Of a second sequence, which goes on with a branch of its own."""
        twin = copy.copy(self)
        twin.lengths, twin.sealed = list(self.lengths), dict(self.sealed)
        twin._sums = [copy.copy(s) for s in self._sums]
        twin._marks = [list(marks) for marks in self._marks]
        twin.history = self.history.cut(self.length, self._tokens.new_branch())
        return twin

"""Random batches in step with mlx-lm's own batch cache, and with every row by itself."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as stock

import pagedkv
from pagedkv.attn.driver import stock_attention
from pagedkv.cache import sdpa_hook as hook
from pagedkv.cache.batch_cache import BatchPagedLayerCache

LAYERS, HEADS, QUERY_HEADS, DIM = 2, 2, 4, 64
SCALE = DIM**-0.5
MOST_ROWS = 5


class BatchMachine:
    """One batch, seen three ways: ours, mlx-lm's, and a list of caches that hold one row each.

    Attributes:
        ours: a `BatchPagedLayerCache` per layer.
        theirs: mlx-lm's `BatchKVCache` per layer.
        alone: per row, paged caches of its own that are given the row's tokens alone.
    """

    def __init__(self, seed: int, config: pagedkv.TierConfig, way: str, exact: bool) -> None:
        """Begin with a batch of empty and filled rows.

        Args:
            seed: of everything.
            config: tiers.
            way: how attention is reached: ``"tagged"``, ``"array mask"``, or ``"dense"``.
            exact: nothing is quantized, so mlx-lm's batch gives the same numbers.
        """
        self.random, self.way, self.exact = random.Random(seed), way, exact
        self.numbers = np.random.default_rng(seed)
        hook.install()
        self.base = pagedkv.PagedCache.standalone(LAYERS, config)
        self.other = pagedkv.PagedCache.standalone(LAYERS, config)
        self.steps = 0
        self.ours, self.theirs, self.alone = self.new_batch()

    def new_batch(self) -> tuple[list[Any], list[Any], list[Any]]:
        """One to three rows, some with a history."""
        singles = [self.new_row() for _ in range(self.random.randint(1, 3))]
        ours = [BatchPagedLayerCache.merge([s[0][i] for s in singles]) for i in range(LAYERS)]
        theirs = [singles[0][1][i].merge([s[1][i] for s in singles]) for i in range(LAYERS)]
        return ours, theirs, [s[2] for s in singles]

    def new_row(self) -> tuple[Any, list[Any], Any]:
        ours, theirs = self.base.fork(), [stock.KVCache() for _ in range(LAYERS)]
        alone = self.other.fork()
        if self.random.random() < 0.7:
            n = self.random.choice([1, 30, 200, 400, 700])
            for i in range(LAYERS):
                q, k, v = self.qkv(1, n)
                pagedkv.attention(q, k, v, cache=ours[i], scale=SCALE)
                pagedkv.attention(q, k, v, cache=alone[i], scale=SCALE)
                theirs[i].update_and_fetch(k, v)
        return ours, theirs, alone

    def qkv(self, rows: int, n: int) -> list[mx.array]:
        shapes = [(rows, h, n, DIM) for h in (QUERY_HEADS, HEADS, HEADS)]
        return [mx.array(self.numbers.standard_normal(s, np.float32)) for s in shapes]

    # Steps

    def step(self) -> None:
        """Something happens; then everything is compared."""
        steps: list[tuple[Callable[[], None], int]] = [
            (self.prompt, 4), (self.decode, 6), (self.filter, 2), (self.extend, 2),
            (self.extract, 2), (self.trim, 1), (self.split, 1), (self.restart, 1),
        ]  # fmt: skip
        kinds, weights = zip(*steps, strict=True)
        self.random.choices(kinds, weights)[0]()
        self.steps += 1
        self.check()

    def prompt(self) -> None:
        """Prompts of several lengths, padded on the right, in chunks."""
        most = self.random.choice([3, 20, 150, 500])
        lengths = [self.random.randint(1, most) for _ in self.alone]
        chunk = self.random.choice([most, max(1, most // 3)])
        self.prefill(lengths, chunk)

    def prefill(self, lengths: list[int], chunk: int) -> None:
        longest = max(lengths)
        padding = [longest - n for n in lengths]
        told = True
        if max(padding):
            # mlx-lm's own batch needs the padding alone. It is stored then, until it is over, and
            # seals pages that a row alone would not have sealed yet.
            told = not self.exact or self.random.random() < 0.7
            for c in (*self.ours, *self.theirs):
                c.prepare(lengths=lengths if told else None, right_padding=padding)
        for start in range(0, longest, chunk):
            n = min(chunk, longest - start)
            places = [(0, max(0, min(n, length - start))) for length in lengths]
            self.call(n, places, bits=told)
        if max(padding):
            for c in (*self.ours, *self.theirs):
                c.finalize()

    def decode(self) -> None:
        n = self.random.choice([1, 1, 1, 3])
        for _ in range(self.random.randint(1, 3)):
            self.call(n, [(0, n)] * len(self.alone))

    def filter(self) -> None:
        rows = range(len(self.alone))
        keep = self.random.sample(rows, self.random.randint(1, len(rows)))
        if len(keep) < 3 and self.random.random() < 0.3:
            keep.append(keep[0])
        for c in (*self.ours, *self.theirs):
            c.filter(keep)
        old, seen = self.alone, set[int]()
        self.alone = []
        for i in keep:
            self.alone.append(old[i].fork() if i in seen else old[i])
            seen.add(i)

    def extend(self) -> None:
        if len(self.alone) >= MOST_ROWS:
            return
        ours, theirs, alone = self.new_batch()
        for mine, more in zip((*self.ours, *self.theirs), (*ours, *theirs), strict=True):
            mine.extend(more)
        self.alone += alone
        for c in ours:
            c.trim(1)  # it stays a batch of its own

    def extract(self) -> None:
        """One row leaves, goes on by itself, and comes back; the batch keeps what it had."""
        i = self.random.randrange(len(self.alone))
        if self.alone[i][0].empty():
            return
        ours = [c.extract(i) for c in self.ours]
        theirs = [c.extract(i) for c in self.theirs]
        assert len({id(c._context) for c in ours}) == 1
        alone = self.alone[i].fork()
        for a, b, c in zip(ours, theirs, alone, strict=True):
            q, k, v = self.qkv(1, 5)
            out = pagedkv.attention(q, k, v, cache=a, scale=SCALE)
            expected = pagedkv.attention(q, k, v, cache=c, scale=SCALE)
            assert mx.array_equal(out, expected).item()
            dense = b.update_and_fetch(k, v)
            if self.exact:
                _close(out, stock_attention(q, *dense, scale=SCALE, mask="causal"))
        if len(self.alone) < MOST_ROWS:
            for i in range(LAYERS):
                self.ours[i].extend(BatchPagedLayerCache.merge([ours[i]]))
                self.theirs[i].extend(theirs[i].merge([theirs[i]]))
            self.alone.append(alone)

    def trim(self) -> None:
        n = self.random.randint(0, min(c.offset for c in self.alone))
        assert {c.trim(n) for c in self.ours} == {n}
        for c in (*self.theirs, *self.alone):
            c.trim(n)

    def split(self) -> None:
        """As mlx-lm's prompt batch does it: a copy, and each keeps some rows."""
        ours, theirs = copy.deepcopy(self.ours), copy.deepcopy(self.theirs)
        keep = sorted(self.random.sample(range(len(self.alone)), len(self.alone) // 2 + 1))
        self.call(2, [(0, 2)] * len(self.alone), alone=[c.fork() for c in self.alone])
        for c in (*ours, *theirs):
            c.filter(keep)
        self.ours, self.theirs = ours, theirs
        self.alone = [self.alone[i] for i in keep]

    def restart(self) -> None:
        """New rows, with prompts that are padded on the left."""
        rows = self.random.randint(1, 3)
        lengths = [self.random.randint(1, 300) for _ in range(rows)]
        most = max(lengths) + self.random.choice([0, 0, 3])
        left = [most - n for n in lengths]
        empty = [self.base.fork() for _ in range(rows)]
        self.ours = [BatchPagedLayerCache.merge([e[i] for e in empty]) for i in range(LAYERS)]
        self.theirs = [stock.BatchKVCache([0] * rows) for _ in range(LAYERS)]
        self.alone = [self.other.fork() for _ in range(rows)]
        for c in (*self.ours, *self.theirs):
            c.prepare(left_padding=left)
        for start in range(0, most, 100):
            n = min(100, most - start)
            first = [max(0, min(n, pad - start)) for pad in left]
            self.call(n, [(f, n - f) for f in first])

    # One call of a model

    def call(
        self,
        n: int,
        places: list[tuple[int, int]],
        alone: list[Any] | None = None,
        bits: bool = True,
    ) -> None:
        """`n` new columns; per row, the first that is a token's, and how many are."""
        alone = self.alone if alone is None else alone
        for i in range(LAYERS):
            q, k, v = self.qkv(len(places), n)
            ours, theirs = self.ours[i], self.theirs[i]
            assert ours.offset.tolist() == theirs.offset.tolist()
            out = self.attend(ours, q, k, v)
            expected = self.attend_stock(theirs, q, k, v)
            for r, (first, count) in enumerate(places):
                own = slice(first, first + count)
                if not count:
                    continue
                mine = [x[r : r + 1, :, own] for x in (q, k, v)]
                single = pagedkv.attention(*mine, cache=alone[r][i], scale=SCALE)
                _close(out[r : r + 1, :, own], single)
                if self.way == "tagged" and bits:
                    assert mx.array_equal(out[r : r + 1, :, own], single).item()
                if self.exact:
                    _close(out[r, :, own], expected[r, :, own])

    def attend(self, cache: Any, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        if self.way == "dense":  # a model that was seen to use keys and values by itself
            cache.reaches_hook = {True: False, False: False}
        mask = cache.make_mask(q.shape[2])
        keys, values = cache.update_and_fetch(k, v)
        assert keys.shape[2] == values.shape[2] == mask.shape[3]
        if self.way == "dense":
            keys, values = keys * 1, values * 1
        if self.way != "tagged":
            mask = mask & mx.array(True)
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=SCALE, mask=mask)

    def attend_stock(self, cache: Any, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        mask = cache.make_mask(q.shape[2])
        keys, values = cache.update_and_fetch(k, v)
        return stock_attention(q, keys, values, scale=SCALE, mask=mask)

    # What must be true

    def check(self) -> None:
        lengths = [c.offset for c in self.alone]
        for ours, theirs in zip(self.ours, self.theirs, strict=True):
            assert [row.offset for row in ours.rows] == lengths
            assert ours.offset.tolist() == theirs.offset.tolist() == lengths
            assert ours.size() == max(lengths) and ours.empty() == (max(lengths) == 0)
            assert ours.nbytes == sum(row.nbytes for row in ours.rows)
        for pager in (self.base.context.pager, self.other.context.pager):
            pager.reclaim()
            for layer in pager.layer_pagers:
                layer.check([c._table for c in pager.users if c._pager is layer])

    def close(self) -> None:
        """Everything goes; nothing may be left."""
        self.ours, self.theirs, self.alone = [], [], []
        for base in (self.base, self.other):
            pager = base.context.pager
            pager.reclaim()
            assert len(pager.users) == LAYERS  # those of `base`
            assert not any(layer.pages for layer in pager.layer_pagers)
            base.close()
        hook.uninstall()


def _close(a: mx.array, b: mx.array, tolerance: float = 1e-5) -> None:
    assert mx.abs(a - b).max().item() < tolerance

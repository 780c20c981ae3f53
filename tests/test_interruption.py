"""Whatever is broken off at any point: tokens are all there or gone everywhere, pages never kept.

An interruption comes at the entry of the n-th function of pagedkv that an operation enters. CI
takes some of all n; ``INTERRUPTIONS=all`` takes all of them (`make interruptions`).
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv import PagedCache
from pagedkv.cache.batch_cache import BatchPagedLayerCache
from pagedkv.sequence.layer import PagedLayerCache
from pagedkv.sequence.sequence import SequenceContext
from pagedkv.sequence.window import WindowedLayerCache
from tests.models import random_tokens, tiny_llama

# What is raised in a finalizer goes nowhere but here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

LAYERS, DIM, SINKS, WINDOW = 3, 32, 4, 600
TABLE = np.random.default_rng(0).standard_normal((1 << 13, DIM)).astype(np.float16)
ROUNDING = 0.06
"""How far a stored number may be from the one that was given: half a step of 8 bits."""
HERE = str(Path(pagedkv.__file__).parent)
SOME = 12
"""Points of each operation that CI takes."""
BEGINNING = 20
"""Points until a call's first layer has begun it."""


class Interrupted:
    """Raises at the entry of the n-th function of ours; afterwards nothing more."""

    def __init__(self, n: int) -> None:
        self.n, self.entered = n, 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if frame.f_code.co_filename.startswith(HERE):
            self.entered += 1
            if self.entered == self.n:
                raise (KeyboardInterrupt if self.n % 2 else MemoryError)(frame.f_code.co_qualname)


def broken_off(n: int, operation: Callable[[], Any]) -> tuple[int, str]:
    """Do it and interrupt it; returns the functions entered so far, and where it ended if so."""
    interrupted, before = Interrupted(n), sys.gettrace()
    sys.settrace(interrupted)
    try:
        operation()
    except (KeyboardInterrupt, MemoryError) as e:
        return interrupted.entered, str(e)
    finally:
        sys.settrace(before)
    return interrupted.entered, ""


def points(operation: Callable[[], Any], first: int = 1) -> list[int]:
    """Numbers of the function entries to be interrupted: all of them, or the first and some."""
    count, _ = broken_off(0, operation)
    every = list(range(1, count + 1))
    if os.environ.get("INTERRUPTIONS") == "all" or count <= SOME:
        return every
    seed = int(os.environ.get("SEED", "1"))
    return [*every[:first], *sorted(random.Random(seed).sample(every[first:], SOME))]


# A model without a model: keys, values and queries follow from a token's number


def numbers(kind: int, layer: int, tokens: Sequence[int]) -> np.ndarray:
    return TABLE[(np.array(tokens, int) * 7 + kind * 977 + layer * 4111) % len(TABLE)]


def read(cache: PagedCache, tokens: Sequence[int]) -> np.ndarray:
    """What the last token sees in each layer."""
    outs = []
    for layer in cache:
        q, k, v = (
            mx.array(numbers(kind, layer.layer, tokens))[None, None].astype(mx.float16)
            for kind in range(3)
        )
        outs.append(pagedkv.attention(q, k, v, cache=layer, scale=DIM**-0.5)[0, 0, -1])
    mx.eval(outs)
    return np.array(mx.stack(outs).astype(mx.float32))


def holds(cache: PagedCache, tokens: Sequence[int]) -> None:
    """Every layer holds these tokens, up to rounding, as far as it is to see them."""
    for layer in cache:
        assert layer.offset == len(tokens)
        if not tokens:
            continue
        seen = np.array(layer.view().dense(mx.float32)[0][0, 0])
        right = numbers(1, layer.layer, tokens)
        if layer.keeps_all:
            assert len(seen) == len(tokens)
        assert np.abs(seen - right[len(right) - len(seen) :]).max() < ROUNDING


def settings(**other: Any) -> pagedkv.TierConfig:
    return pagedkv.TierConfig(
        **{
            "hot_tokens": 32, "sink_tokens": SINKS, "kv": "fp16:400,K8V8", "page_tokens": 256,
            "warm": "450KB", "cold": "4MB", "staging": "512KiB", "write_buffer": 3 * 32768,
            "backend": "dequantize", **other,
        }
    )  # fmt: skip


class Course:
    """A sequence that others are forked from, each to be interrupted."""

    def __init__(self, windows: bool, **other: Any) -> None:
        self.windows = windows
        self.root = PagedCache.standalone(LAYERS, settings(**other), model="course")
        self.pager = self.root.context.pager
        self.tokens = list(range(1, 1201))
        self.base = self.empty()
        for start in range(0, 1200, 300):
            read(self.base, self.tokens[start : start + 300])
        assert self.base.stats().cold.pages and self.base.stats().warm.pages
        self.held: list[PagedCache] = []

    def empty(self) -> PagedCache:
        """A cache of the same tiers; its layer in the middle has a window, if any."""
        mine = self.root.context
        context = SequenceContext(
            mine.config, self.pager, fingerprint="course", prefixes=mine.prefixes
        )
        layers: list[PagedLayerCache] = []
        for i in range(LAYERS):
            window = self.windows and i == 1
            layers.append(
                WindowedLayerCache(context, i, WINDOW) if window else PagedLayerCache(context, i)
            )
        return PagedCache(layers, context)

    def twin(self) -> PagedCache:
        self.held.append(self.base.fork())
        return self.held[-1]

    def check(self) -> None:
        """All but the first sequence are gone, and everything adds up."""
        for cache in self.held:
            cache.close()
        self.held.clear()
        self.root.forget_prefixes()
        self.pager.reclaim()
        for layer, pager in zip(self.base, self.pager.layer_pagers, strict=True):
            earlier = getattr(layer, "_earlier", None)
            pager.check([layer._table, *([earlier.table] if earlier else [])])
        if self.pager.open_cold:
            self.pager.open_cold.flush()
            self.pager.open_cold.check()
            live = [p.record for pager in self.pager.layer_pagers for p in pager.pages.values()]
            held = sum(
                sum(extent.holders.values())
                for extent in self.pager.open_cold._files._extents.values()
            )
            store = self.pager.open_cold.sequences
            kept = len(list(store.checkpoints.places())) if store else 0
            assert held == len([r for r in live if r is not None]) + kept
        holds(self.base, self.tokens)

    def end(self) -> None:
        self.base.close()
        self.root.close()
        assert self.pager.open_cold is None
        assert not [t for t in threading.enumerate() if t.name.startswith("pagedkv")]


@contextmanager
def course(windows: bool, **other: Any) -> Iterator[Course]:
    made = Course(windows, **other)
    yield made
    made.check()
    made.end()


def once_more(cache: PagedCache, tokens: list[int], start: int, where: str) -> np.ndarray | None:
    """Make a call again that was to read `tokens` from `start` on; None if it was over."""
    if all(layer.offset == len(tokens) for layer in cache):
        return None
    assert all(layer.offset >= start for layer in cache), where
    if cache.offset > start:
        cache.trim(cache.offset - start)
    for _ in range(2):
        try:
            return read(cache, tokens[start:])
        except pagedkv.CacheStateError:
            assert [layer.offset for layer in cache] == [start] * LAYERS, where
    raise AssertionError(where)


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("new", [1, 5, 40, 300])
def test_a_call_can_be_made_again(windows: bool, new: int) -> None:
    """Bit for bit if the call sealed nothing behind its own tokens' beginning, which 300 do."""
    exact = new < 300
    with course(windows) as a:
        read(a.base, more := list(range(1300, 1300 + 160)))
        a.tokens = [*a.tokens, *more]
        start = len(a.tokens) + 10

        def twin() -> PagedCache:
            """With a call of its own, whose tokens stay; the next ones make a page due."""
            read(cache := a.twin(), range(1460, 1470))
            return cache

        after = [*a.tokens, *range(1460, 1470), *range(2000, 2000 + new)]
        next_one = [*after, 5]
        plain = twin()
        right = read(plain, after[start:])
        right_next = read(plain, [5])
        called = twin()
        for n in points(lambda: read(called, after[start:]), BEGINNING):
            cache = twin()
            _, where = broken_off(n, lambda c=cache: read(c, after[start:]))  # type: ignore[misc]
            again = once_more(cache, after, start, where)
            holds(cache, after)
            if exact and again is not None:
                assert (again == right).all(), where
            following = read(cache, [5])
            holds(cache, next_one)
            if exact:
                assert (following == right_next).all(), where
            a.check()


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("count", [3, 500])
def test_a_trim_is_completed(windows: bool, count: int) -> None:
    if windows and count > 16:
        pytest.skip("a window that dropped tokens refuses")
    with course(windows) as a:
        left = a.tokens[: len(a.tokens) - count]
        for n in points(lambda: a.twin().trim(count)):
            cache = a.twin()
            _, where = broken_off(n, lambda c=cache: c.trim(count))  # type: ignore[misc]
            if cache.offset > len(left):
                assert cache.trim(cache.offset - len(left)), where
            try:
                read(cache, [7])
            except pagedkv.CacheStateError:
                read(cache, [7])
            holds(cache, [*left, 7])
            a.check()


@pytest.mark.parametrize("windows", [False, True])
def test_a_fork_is_a_whole_one_or_none(windows: bool) -> None:
    with course(windows) as a:
        for n in points(lambda: a.held.append(a.base.fork())):
            a.check()
            broken_off(n, lambda: a.held.append(a.base.fork()))
            a.check()
            holds(again := a.twin(), a.tokens)
            read(again, [3])
            holds(again, [*a.tokens, 3])
            a.check()


def test_what_is_remembered_is_whole_or_not_there() -> None:
    with course(windows=False) as a:

        def both() -> None:
            a.base.remember(a.tokens)
            a.held.append(cache := a.empty())
            for layer in cache:
                layer.bind(a.base[0].shape, mx.float16)
            cache.reuse([*a.tokens, *range(500)])

        for n in points(both):
            a.check()
            broken_off(n, both)
            for cache in a.held:
                length = cache.offset
                if {layer.offset for layer in cache} == {length}:
                    holds(cache, a.tokens[:length])
                else:
                    with pytest.raises(pagedkv.CacheStateError):
                        read(cache, [1])
            both()
            assert a.held[-1].offset > 700
            holds(a.held[-1], a.tokens[: a.held[-1].offset])
            a.check()


def test_a_flush_leaves_one_sequence_that_can_be_resumed(tmp_path: Path) -> None:
    with course(windows=True, cold_dir=str(tmp_path)) as a:
        a.base.flush()
        read(a.base, [9])
        a.tokens = [*a.tokens, 9]

        def again() -> None:
            read(a.base, [len(a.tokens)])
            a.tokens = [*a.tokens, len(a.tokens)]
            a.base.flush()

        for n in points(again):
            before = len(a.tokens)
            read_first = [*a.tokens, 11]
            read(a.base, [11])
            a.tokens = read_first
            _, where = broken_off(n, a.base.flush)
            stored = a.base.stored_sequences()
            assert len(stored) == 1, where
            assert before - 2 <= stored[0].tokens <= len(a.tokens), where
            a.base.flush()
            assert a.base.stored_sequences()[0].tokens == len(a.tokens)
            a.held.append(twin := a.empty())
            name, a.base.context.sequence_id = a.base.context.sequence_id, "0" * 16
            _, where = broken_off(n, lambda c=twin, s=name: c.resume(s))  # type: ignore[misc]
            if twin.offset != len(a.tokens) or {x.offset for x in twin} != {twin.offset}:
                twin.close()
                a.held.append(twin := a.empty())
                twin.resume(name)
            holds(twin, a.tokens)
            a.base.context.sequence_id = name
            a.check()
            assert not list(tmp_path.glob("*/*.tmp"))


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("windows", [False, True])
def test_a_close_is_completed(windows: bool, lasting: bool, tmp_path: Path) -> None:
    where = str(tmp_path) if lasting else None
    if not lasting:
        tempfile.tempdir = str(tmp_path)
    try:
        closing = Course(windows, cold_dir=where)

        def close() -> None:
            closing.base.close()
            closing.root.close()

        for n in points(close):
            closing = Course(windows, cold_dir=where)
            broken_off(n, close)
            closing.base.close()
            closing.root.close()
            closing.end()
            assert not list(tmp_path.rglob("*.pages"))
            assert lasting or not list(tmp_path.iterdir())
    finally:
        tempfile.tempdir = None


# Between our functions


class Stops(Exception):
    """An error of the model."""


@pytest.mark.parametrize("again", ["alike", "trimmed"])
@pytest.mark.parametrize("start", [0, 700])
def test_a_model_that_fails_between_two_layers(start: int, again: str) -> None:
    model = tiny_llama(layers=4)
    config = settings(kv="K8V8", hot_tokens=64, treatment="none", layer_kv="same")
    ids = random_tokens(start + 30)
    with pagedkv.wrap(model, config) as cache:

        def begin(some: PagedCache) -> None:
            if start:
                mx.eval(model(ids[:, :start], cache=some))

        def call(some: PagedCache) -> np.ndarray:
            return np.array(model(ids[:, start:], cache=some)[0, -1])

        begin(cache)
        right = call(cache)
        other = model.make_cache()
        begin(other)
        broken = model.model.layers[2]

        class Broken:
            use_sliding = False

            def __call__(self, *args: Any, **options: Any) -> Any:
                raise Stops

        model.model.layers[2] = Broken()
        with pytest.raises(Stops):
            call(other)
        model.model.layers[2] = broken
        assert [layer.offset for layer in other] == [start + 30] * 2 + [start] * 2
        if again == "trimmed":
            other.trim(30)
        else:
            message = "every layer holds" if start else "left layers of 0"
            with pytest.raises(pagedkv.CacheStateError, match=message):
                call(other)
        assert [layer.offset for layer in other] == [start] * 4
        assert (call(other) == right).all()
        other.close()
    pagedkv.unwrap(model)


def read_rows(batch: list[Any], tokens: Sequence[Sequence[int]]) -> np.ndarray:
    """What the last token of each row sees in each layer; all rows are given as many."""
    outs = []
    for number, layer in enumerate(batch):
        q, k, v = (
            mx.array(np.stack([numbers(kind, number, row) for row in tokens]))[:, None]
            for kind in range(3)
        )
        mask = layer.make_mask(q.shape[2])
        view = layer.update_and_fetch(k, v)
        attend = mx.fast.scaled_dot_product_attention
        outs.append(attend(q, *view, scale=DIM**-0.5, mask=mask)[:, 0, -1])
    mx.eval(outs)
    return np.array(mx.stack(outs).astype(mx.float32))


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("new", [1, 40])
def test_a_call_of_a_batch_can_be_made_again(windows: bool, new: int) -> None:
    with course(windows) as a, pagedkv.hooked():

        def rows() -> list[Any]:
            longer = a.twin()
            read(longer, range(1400, 1420))
            both = [longer, a.twin()]
            batch = [BatchPagedLayerCache.merge(layers) for layers in zip(*both, strict=True)]
            read_rows(batch, [range(1420, 1430)] * 2)
            return batch

        more = [range(2000, 2000 + new), range(3000, 3000 + new)]
        plain = rows()
        right, following = read_rows(plain, more), read_rows(plain, [[5], [6]])
        before = [1230, 1210]
        called = [rows()]
        for n in points(lambda: read_rows(called.pop(), more), BEGINNING):
            batch = rows()
            _, where = broken_off(n, lambda b=batch: read_rows(b, more))  # type: ignore[misc]
            lengths = [[row.offset for row in layer.rows] for layer in batch]
            assert (np.array(lengths) >= before).all(), where
            if lengths != [[held + new for held in before]] * LAYERS:
                try:
                    again = read_rows(batch, more)
                except pagedkv.CacheStateError:
                    assert [[r.offset for r in x.rows] for x in batch] == [before] * LAYERS, where
                    again = read_rows(batch, more)
                assert (again == right).all(), where
            assert (read_rows(batch, [[5], [6]]) == following).all(), where
            for layer in (*batch, *plain):
                layer.close()
            a.check()


# Models that give layers their tokens in other ways


def rows(count: int) -> tuple[mx.array, mx.array]:
    return mx.zeros((1, 2, count, DIM), mx.float16), mx.ones((1, 2, count, DIM), mx.float16)


def split_call(cache: PagedCache, count: int, until: tuple[int, int] | None = None) -> None:
    """Layer by layer, one token after the other; broken off after so many of one layer."""
    for number, layer in enumerate(cache.paged_layers):
        for token in range(count):
            layer.append(*rows(1))
            if (number, token + 1) == until:
                return


@pytest.mark.parametrize("until", [(n, t) for n in range(LAYERS) for t in (1, 3, 5)])
def test_tokens_one_by_one(until: tuple[int, int]) -> None:
    with PagedCache.standalone(LAYERS, pagedkv.TierConfig(cold=0)) as cache:
        for layer in cache.paged_layers:
            layer.splits = True
        for count in (9, 5, 1, 1, 4, 5):
            split_call(cache, count)
        whole = until == (LAYERS - 1, 5)
        split_call(cache, 5, until)
        if whole:
            split_call(cache, 2)
            return
        with pytest.raises(pagedkv.CacheStateError, match="every layer holds 25 tokens now"):
            split_call(cache, 5)
        assert {layer.offset for layer in cache.paged_layers} == {25}
        split_call(cache, 5)
        assert {layer.offset for layer in cache.paged_layers} == {30}


@pytest.mark.parametrize("uneven", range(LAYERS))
def test_a_layer_that_takes_fewer_tokens(uneven: int) -> None:
    """It holds a summary of every four; nothing tells how many of them are of a call."""

    def call(cache: PagedCache, count: int, until: int = LAYERS) -> None:
        for layer in cache.paged_layers[:until]:
            summaries = (seen[0] + count) // 4 - seen[0] // 4
            if layer.in_step:
                layer.append(*rows(count))
            elif summaries:
                layer.append(*rows(summaries))
        seen[0] += count * (until == LAYERS)

    for broken in (1, 8):
        seen = [0]
        with PagedCache.standalone(LAYERS, pagedkv.TierConfig(cold=0)) as cache:
            cache.paged_layers[uneven].in_step = False
            for count in (9, 1, 1, 1, 1, 8, 1, 2, 1, 1, 1):
                call(cache, count)
            lengths = [layer.offset for layer in cache.paged_layers]
            assert lengths[uneven] == 6 and {*lengths} == {6, 27}
            call(cache, broken, until=1 if uneven == 2 else 2)
            with pytest.raises(pagedkv.CacheStateError, match="was broken off"):
                call(cache, 1)
                call(cache, 1)  # where it began with the layer that was not reached
            if uneven < 2:
                with pytest.raises(pagedkv.CacheStateError, match="not all of its layers can give"):
                    call(cache, 8)


def ctrl_c(*args: Any) -> None:
    raise KeyboardInterrupt


def test_the_only_layer_takes_its_tokens_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tells where a call of it began, so nothing is said to be what it was."""
    with PagedCache.standalone(1, pagedkv.TierConfig(cold=0)) as cache:
        cache.paged_layers[0].splits = True
        for count in (9, 5):
            split_call(cache, count)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(PagedLayerCache, "_start_call", ctrl_c)
            split_call(cache, 1)
        with pytest.raises(pagedkv.CacheStateError, match="not all of its layers can give"):
            split_call(cache, 1)


@pytest.mark.parametrize("uneven", [False, True])
def test_a_call_broken_off_before_it_begins(uneven: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of the one before stay."""
    with PagedCache.standalone(LAYERS, pagedkv.TierConfig(cold=0)) as cache:
        cache.paged_layers[0].in_step = not uneven
        for count in (20, 5):
            for layer in cache.paged_layers:
                layer.append(*rows(count if layer.in_step else 1))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(SequenceContext, "begin", ctrl_c)
            cache.paged_layers[0].append(*rows(5))
        lengths = [layer.offset for layer in cache.paged_layers]
        assert lengths == ([2, 25, 25] if uneven else [25, 25, 25])
        for layer in cache.paged_layers:
            layer.append(*rows(5 if layer.in_step else 1))


def test_a_probe_tells_how_layers_are_called() -> None:
    from tests.vlm_zoo import build

    model = build("deepseek_v4")
    with pagedkv.wrap(model) as cache:
        assert all(layer.splits and layer.in_step for layer in cache.paged_layers)
    pagedkv.unwrap(model)
    model = build("glm5_next")
    with pagedkv.wrap(model) as cache:
        assert {layer.in_step for layer in cache.paged_layers} == {True, False}
    pagedkv.unwrap(model)

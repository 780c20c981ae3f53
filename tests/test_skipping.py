"""Cold pages that are left out: nothing is missed beyond the bound that is reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv.allocator import KVShape, PageGeometry, Precision
from pagedkv.attn.driver import KVView, attend
from pagedkv.attn.selection import ColdSelection
from pagedkv.cli.main import main
from pagedkv.sequence import layer as layer_module
from pagedkv.tiers.codec.affine import codec_for
from pagedkv.tiers.pages.bounds import LayerBounds, bounds_bytes
from tests.models import random_tokens, tiny_llama
from tests.test_placement import smallest_warm

ROUNDING = 1e-5
"""Of the largest value: what two orders of adding float32 numbers may differ by."""


def random_kv(seed: int, heads: int, tokens: int, dim: int) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((1, heads, tokens, dim)) * rng.exponential(1, (1, heads, 1, dim))
    keys += 3 * rng.standard_normal((1, heads, 1, dim))
    values = rng.standard_normal((1, heads, tokens, dim))
    return mx.array(keys.astype(np.float32)), mx.array(values.astype(np.float32))


# Bounds


@pytest.mark.parametrize("kv", ["K2V2", "K3V3", "K4V4", "K8V8", "K4V2", "K2V8"])
@pytest.mark.parametrize("dim", [32, 80, 128])
def test_no_score_of_a_page_is_above_its_bound(kv: str, dim: int) -> None:
    geometry = PageGeometry(KVShape(2, dim, dim), 256, Precision.parse(kv))
    codec = codec_for(geometry.shape, 256, geometry.precision, mx.float16)
    keys, values = random_kv(dim, 2, 5 * 256, dim)
    records = codec.encode(keys[0], values[0])
    bounds = LayerBounds(2**24)
    for i, page in enumerate(np.array(records).view(np.uint8)):
        bounds.add(10 * i, geometry, page)
    q = mx.array(np.random.default_rng(1).standard_normal((2, 6, dim)).astype(np.float32))
    upper = bounds.upper(q, [0, 10, 30, 40, 77])
    assert sorted(upper.numbers) == [0, 10, 30, 40]
    stored = np.array(codec.keys(records, mx.float32)).astype(np.float64)
    scores = np.einsum("hrd,phdt->phrt", np.array(q).astype(np.float64), stored)
    mass = np.log(np.exp(scores - scores.max()).sum(axis=3)) + scores.max()
    peaks = np.abs(np.array(codec.values(records, mx.float32))).max(axis=(2, 3))
    for i, number in enumerate(upper.numbers):
        assert (mass[number // 10] <= upper.log_mass[i]).all()
        assert (peaks[number // 10] <= upper.value_peak[i] * (1 + 1e-6)).all()
    # They bound, and they are no constants: the loosest corner of the box is farther away.
    assert (upper.log_mass.mean() - mass.mean()) < 3 * (mass.std() + np.sqrt(dim) * scores.std())


def test_a_key_at_a_corner_reaches_the_bound() -> None:
    """All tokens alike: the box has no width and the bound is the score."""
    geometry = PageGeometry(KVShape(1, 64, 64), 256, Precision.parse("K8V8"))
    codec = codec_for(geometry.shape, 256, geometry.precision, mx.float16)
    one = mx.array(np.random.default_rng(0).standard_normal((1, 1, 64)).astype(np.float32))
    records = codec.encode(mx.repeat(one, 256, axis=1), mx.zeros((1, 256, 64)))
    bounds = LayerBounds(2**20)
    bounds.add(0, geometry, np.array(records).view(np.uint8)[0])
    q = mx.ones((1, 1, 64))
    score = float((codec.keys(records, mx.float32)[0, 0, :, 0]).sum().item())
    assert bounds.upper(q, [0]).log_mass.item() == pytest.approx(score + np.log(256), abs=0.02)


def test_bounds_keep_to_their_budget_and_forget() -> None:
    geometry = PageGeometry(KVShape(2, 64, 64), 256, Precision.parse("K4V4"))
    codec = codec_for(geometry.shape, 256, geometry.precision, mx.float16)
    each = bounds_bytes((2, 64, 4))
    bounds = LayerBounds(20 * each)
    keys, values = random_kv(3, 2, 256, 64)
    q = mx.ones((2, 1, 64))
    pages = {}
    for i in range(30):
        record = codec.encode(keys[0] * (1 + i), values[0])
        pages[i] = np.array(record).view(np.uint8)[0]
        bounds.add(i, geometry, pages[i])
        bounds.add(i, geometry, pages[i])
        if i % 3 == 0:
            bounds.forget(i)
            bounds.forget(i)
    assert bounds.nbytes == 20 * each
    upper = bounds.upper(q, range(30))
    assert sorted(upper.numbers) == [i for i in range(30) if i % 3][:20]
    for i, number in enumerate(upper.numbers):
        alone = LayerBounds(each)
        alone.add(number, geometry, pages[number])
        assert np.allclose(alone.upper(q, [number]).log_mass[0], upper.log_mass[i])


def test_a_16_bit_page_has_no_bounds() -> None:
    geometry = PageGeometry(KVShape(1, 64, 64), 256, Precision.parse("fp16"))
    bounds = LayerBounds(2**20)
    bounds.add(0, geometry, np.zeros(geometry.page_bytes, np.uint8))
    assert 0 not in bounds and not bounds.upper(mx.ones((1, 1, 64)), [0]).numbers


# Steps


class Drive:
    """One layer whose topics differ: queries look for some of its tokens more than for others."""

    def __init__(self, seed: int, kv: str, heads: int, repeats: int, dim: int, gap: float) -> None:
        config = pagedkv.TierConfig(
            hot_tokens=96, sink_tokens=4, kv=kv, page_tokens=256, cold="64MB", warm="1GB",
            bounds=3 * bounds_bytes((heads, dim, 4)) if seed == 1 else "1MB", skip_below=1e-4,
        )  # fmt: skip
        least = smallest(config, KVShape(heads, dim, dim))
        self.cache = pagedkv.PagedCache.standalone(1, replace(config, warm=least))
        self.rng = np.random.default_rng(seed)
        self.heads, self.repeats, self.dim = heads, repeats, dim
        self.topics = self.rng.standard_normal((3, heads, dim))
        self.topics *= gap / np.linalg.norm(self.topics, axis=2, keepdims=True)
        for i in range(int(self.rng.integers(4, 9))):
            self.append(300, i % 2)
        self.append(100, 2)

    def append(self, tokens: int, topic: int) -> KVView:
        keys, values = random_kv(int(self.rng.integers(1 << 30)), self.heads, tokens, self.dim)
        keys = 0.15 * keys + mx.array(self.topics[topic].astype(np.float32))[None, :, None]
        return self.cache[0].append(keys, values)

    def queries(self, topic: int, length: int) -> mx.array:
        heads = self.heads * self.repeats
        q = self.rng.standard_normal((1, heads, length, self.dim))
        q += np.repeat(self.topics[topic], self.repeats, axis=0)[None, :, None]
        return mx.array(q.astype(np.float32))


def smallest(config: pagedkv.TierConfig, shape: KVShape) -> int:
    """One page of each precision and not more."""
    kinds = config.ladder.beyond(config.hot_tokens)
    return -(-3 * sum(PageGeometry(shape, 256, p).page_bytes for p in kinds) // 2)


def largest_value(view: KVView) -> float:
    return float(mx.abs(view.dense(mx.float32)[1]).max().item())


def check_step(
    view: KVView,
    q: mx.array,
    scale: float,
    mask: str | None,
    sinks: mx.array | None,
    selection: ColdSelection,
) -> tuple[int, int]:
    """Compare with attention over everything; how many pages were left out, of how many."""
    exact = attend(view, q, scale, mask, sinks)
    narrowed = selection.narrowed(view, q, scale, mask, sinks)
    out = attend(narrowed, q, scale, mask, sinks)
    selection.attended(out)
    counters = selection.counters
    off = float(mx.abs(out - exact).max().item())
    assert off <= counters.error_bound + ROUNDING * largest_value(view)
    left = {e.page for e in view.entries} - {e.page for e in narrowed.entries}
    assert len(left) == counters.skipped_pages
    assert narrowed.paged_tokens == sum(e.tokens for e in narrowed.entries)
    if left and view.tokens % 3 == 0:
        missed = true_weight(view, q, scale, mask, sinks, left)
        assert missed <= counters.weight_bound + 1e-6
    return counters.skipped_pages, counters.pages


def true_weight(
    view: KVView,
    q: mx.array,
    scale: float,
    mask: str | None,
    sinks: mx.array | None,
    left: set[int],
) -> float:
    """The largest share of a head's attention that the pages have, in float64."""
    keys = np.array(view.dense(mx.float32)[0])[0].astype(np.float64)
    heads, tokens, dim = keys.shape
    length = q.shape[2]
    rows = np.array(q)[0].astype(np.float64).reshape(heads, -1, dim) * scale
    scores = rows @ keys.swapaxes(1, 2)
    if mask == "causal":
        hidden = np.arange(tokens) > np.arange(tokens - length, tokens)[:, None]
        scores[:, np.tile(hidden, (rows.shape[1] // length, 1))] = -np.inf
    if sinks is not None:
        logits = np.repeat(np.array(sinks).astype(np.float64), length).reshape(heads, -1, 1)
        scores = np.concatenate([scores, logits], axis=2)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    at, share = view.sinks, np.zeros(weights.shape[:2])
    for entry in view.entries:
        if entry.page in left:
            share += weights[:, :, at : at + entry.tokens].sum(axis=2)
        at += entry.tokens
    return float(share.max())


CASES = [  # kv, KV heads, query heads of each, channels, how far topics lie apart
    ("K4V4", 1, 1, 32, 9.0),
    ("K4V4", 2, 4, 64, 14.0),
    ("K8V4", 1, 6, 80, 16.0),
    ("K2V2", 2, 1, 64, 16.0),
    ("K3V3", 1, 2, 64, 20.0),
    ("fp16:600,K8V8:900,K4V4", 1, 2, 64, 14.0),
]


def test_the_output_differs_by_no_more_than_the_reported_bound() -> None:
    """852 steps: any mix of 1 to 8 query tokens, masks, sinks, trims; some pages unknown."""
    skipped = steps = saving = 0
    for seed, (kv, heads, repeats, dim, gap) in enumerate(CASES):
        drive = Drive(seed, kv, heads, repeats, dim, gap)
        rng = np.random.default_rng(seed)
        for i in range(142):
            if i % 40 == 39:
                drive.cache.trim(int(rng.integers(1, 90)))  # inside the last sealed page
            length = int(rng.choice([1, 1, 1, 2, 5, 8]))
            view = drive.append(length, 2)
            q = drive.queries(int(rng.choice([2, 2, 0])), length)
            mask = "causal" if length > 1 or rng.random() < 0.5 else None
            logits = rng.standard_normal(heads * repeats) * 3 if rng.random() < 0.3 else None
            sinks = None if logits is None else mx.array(logits.astype(np.float32))
            selection = ColdSelection(1e-4, None)
            left, _ = check_step(view, q, dim**-0.5, mask, sinks, selection)
            assert selection.counters.weight_bound <= 1e-4
            skipped, steps, saving = skipped + left, steps + 1, saving + (left > 0)
        drive.cache.close()
    assert steps == 852
    assert saving > 200 and skipped > 1000  # else the test says nothing


def test_the_n_pages_that_could_weigh_most_are_read() -> None:
    drive = Drive(3, "K4V4", 2, 2, 64, 10.0)
    for i in range(40):
        view = drive.append(1, 2)
        cold = sum(view.pager.pages[e.page].slot is None for e in view.entries)
        wanted = i % 5
        selection = ColdSelection(0.0, wanted)
        left, pages = check_step(view, drive.queries(i % 3, 1), 0.125, None, None, selection)
        assert pages == cold and left == max(0, cold - wanted)
        assert selection.counters.weight_bound <= 1
    drive.cache.close()


def test_the_needle_is_among_the_pages_that_are_read() -> None:
    """Queries for one old topic, of which one page tells: that page is read, of many."""
    drive = Drive(5, "K4V4", 1, 2, 64, 12.0)
    found = 0
    for _ in range(20):
        view = drive.append(1, 2)
        needle = view.entries[1]
        keys = view.dense(mx.float32)[0]
        start = view.sinks + sum(e.tokens for e in view.entries[:1])
        q = mx.tile(keys[:, :, start + 7 : start + 8], (1, 2, 1, 1)) * 2
        narrowed = ColdSelection(0.0, 3).narrowed(view, q, 0.125, None, None)
        found += needle in narrowed.entries
    drive.cache.close()
    assert found == 20


def test_pages_that_a_step_wants_again_are_not_read_again() -> None:
    drive = Drive(9, "K4V4", 1, 1, 64, 12.0)
    pager = drive.cache[0]._pager
    pager.kept.most = 3
    q = drive.queries(0, 1)
    view = drive.append(1, 2)
    drive.cache.context.pager.cold.flush()  # what is still being written is not read from the disk
    outs, reads = [], []
    for _ in range(3):
        before = drive.cache.stats().nvme_bytes_read
        narrowed = ColdSelection(0.0, 3).narrowed(view, q, 0.125, None, None)
        outs.append(attend(narrowed, q, 0.125))
        mx.eval(outs[-1])
        for ticket in drive.cache.context.pager.reader._tickets.values():
            ticket.done.result()  # what is read ahead is this step's, whenever it ends
        reads.append(drive.cache.stats().nvme_bytes_read - before)
    assert reads[0] > 0 and reads[1:] == [0, 0]
    assert all(mx.array_equal(out, outs[0]).item() for out in outs)
    drive.cache.trim(drive.cache.offset)  # the pages are gone, and their copies
    assert pager.kept.nbytes == 0
    drive.cache.close()


# Through a model


def test_a_wrapped_model_reads_less_and_says_what_it_left_out(tmp_path: Path) -> None:
    model = tiny_llama(layers=2, heads=4, kv_heads=2, dim=64)
    config = pagedkv.TierConfig(
        hot_tokens=64, sink_tokens=4, page_tokens=256, warm="64MB", cold="64MB",
        cold_dir=str(tmp_path), cold_pages=2,
    )  # fmt: skip
    config = replace(config, warm=smallest_warm(config))
    tokens = random_tokens(2600)
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(tokens[:, :2500], cache=cache))
        cache.flush()
        before = cache.stats().nvme_bytes_read
        for i in range(2500, 2520):
            mx.eval(model(tokens[:, i : i + 1], cache=cache))
        stats = cache.stats()
        assert stats.skipped is not None and stats.bounds_bytes > 0
        assert stats.skipped.steps == 40
        assert stats.skipped.skipped_pages == stats.skipped.pages - 2 * 40
        assert stats.skipped.error_bound > 0
        # Pages that the step before read are in memory; of the others each is read once.
        assert stats.nvme_bytes_read - before <= stats.skipped.bytes - stats.skipped.skipped_bytes
        each = cache[0].page_bytes(cache[0]._pager.precisions[0])
        assert stats.kept_bytes == 2 * 2 * each
        assert stats.to_dict()["skipped"]["skipped_pages"] == stats.skipped.skipped_pages
    config = replace(config, cold_pages=3)
    with pagedkv.resume(model, config) as cache:  # pages come without bounds and are read once
        for i in range(2520, 2523):
            mx.eval(model(tokens[:, i : i + 1], cache=cache))
        skipped = cache.stats().skipped
        assert skipped.steps == 6
        assert skipped.skipped_pages == skipped.pages * 2 // 3 - 3 * 4
    pagedkv.unwrap(model)


def test_without_the_options_every_page_is_read(small: pagedkv.TierConfig) -> None:
    model = tiny_llama()
    with pagedkv.wrap(model, small) as cache:
        mx.eval(model(random_tokens(900), cache=cache))
        assert cache.stats().skipped is None and cache.stats().bounds_bytes == 0
    pagedkv.unwrap(model)


@pytest.mark.parametrize(
    "options",
    [
        {"skip_below": -1e-4}, {"skip_below": 1.0}, {"skip_below": True}, {"skip_below": "little"},
        {"cold_pages": -1}, {"cold_pages": 1.5}, {"cold_pages": True}, {"bounds": "much"},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(pagedkv.ConfigError, match=next(iter(options))):
        pagedkv.TierConfig(cold_pages=options.pop("cold_pages", 1), **options)


def test_a_stress_run_refuses_them(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["stress", "--model", "synthetic:tiny", "--tokens", "2K", "--cold-pages", "2"]
    assert main(command) == 1
    assert "leave out --skip-below and --cold-pages" in capsys.readouterr().err


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_models_own_steps_stay_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """90 steps of SmolLM2's layers, each compared with attention over everything."""
    from pydoc_data.topics import topics

    from mlx_lm import load

    from pagedkv.tools.demo.demo_model import ensure_demo_model

    model, tokenizer = load(str(ensure_demo_model()))[:2]
    model.set_dtype(mx.float32)
    compared: list[tuple[int, int]] = []
    real = layer_module.attend

    def attend_twice(view: KVView, q: mx.array, scale: float, mask: Any, *rest: Any) -> mx.array:
        if q.shape[2] == 1:
            for selection in (ColdSelection(1e-4, None), ColdSelection(0.0, 1)):
                compared.append(check_step(view, q, scale, mask, rest[0], selection))
        return real(view, q, scale, mask, *rest)

    monkeypatch.setattr(layer_module, "attend", attend_twice)
    config = pagedkv.TierConfig(
        hot_tokens=64,
        warm="2.5MB",
        cold="256MB",
        page_tokens=256,
        skip_below=1e-300,
    )
    prompt = mx.array(tokenizer.encode(topics["assignment"])[:900])[None]
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(prompt[:, :895], cache=cache))
        for i in range(895, 898):
            mx.eval(model(prompt[:, i : i + 1], cache=cache))
    pagedkv.unwrap(model)
    assert len(compared) == 2 * 90
    assert sum(left for left, _ in compared[1::2]) > 0

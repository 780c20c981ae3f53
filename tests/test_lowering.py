"""A page that crosses a step of the ladder: which numbers it is made from, and what stays."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv import KVShape, Precision
from pagedkv.tiers import Treatment
from pagedkv.tiers.codec.affine import QuantizedTriple, codec_for
from pagedkv.tiers.codec.rounding import quantize, to_16_bit

SHAPE = KVShape(2, 64, 72)  # values are padded to 96 channels
PAGE = 256


def treatment(shape: KVShape = SHAPE) -> Treatment:
    return Treatment.plain(shape, "hadamard", seed=3)


def numbers(tokens: int, seed: int = 0) -> tuple[mx.array, mx.array]:
    """Keys with outlier channels, and values, ``[kv_heads, tokens, channels]``."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((2, tokens, 64)) + 6 * (rng.random(64) < 0.1)
    values = rng.standard_normal((2, tokens, 72)) + rng.standard_normal(72)
    return mx.array(keys, mx.float32), mx.array(values, mx.float32)


def again(x: mx.array, group: int, bits: int) -> mx.array:
    """Numbers of a page rounded to float16, quantized and dequantized."""
    extra = -x.shape[-1] % group
    padded = mx.pad(to_16_bit(x, mx.float16), [(0, 0)] * 3 + [(0, extra)])
    triple = QuantizedTriple(*quantize(padded, group, bits), group, bits)
    return triple.dequantize(mx.float32)[..., : x.shape[-1]]


@pytest.mark.parametrize("treated", [False, True])
@pytest.mark.parametrize(
    "step",
    ["K8V8>K4V4", "K8V4>K4V4", "K4V2>K2V2", "K4V3>K2V3", "K3V4>K3V2", "fp16>K8V4", "K8V2>K2V4"],
)
def test_a_lowered_page_is_its_own_numbers_quantized(step: str, treated: bool) -> None:
    """Keys or values whose bits stay keep every bit, scale and bias."""
    old, new = (
        codec_for(SHAPE, PAGE, Precision.parse(name), mx.float16, treatment() if treated else None)
        for name in step.split(">")
    )
    records = old.encode(*numbers(2 * PAGE))
    lowered = new.recode(records, old)
    assert lowered.shape[1] == new.geometry.page_bytes // 4
    before, after = old.geometry.precision, new.geometry.precision
    keys, values = (read(records, mx.float32) for read in (old.page_keys, old.page_values))
    if before.key_bits != after.key_bits:
        keys = again(keys, 64, after.key_bits)
    if before.value_bits != after.value_bits:
        values = again(values, 32, after.value_bits)
    assert mx.array_equal(new.page_keys(lowered, mx.float32), keys)
    assert mx.array_equal(new.page_values(lowered, mx.float32), values)
    first = new.recode(records[:1], old)  # no page depends on its neighbours
    assert mx.array_equal(lowered[:1], first)


def stored(kv: str, treated: bool) -> list[tuple[str, mx.array, mx.array]]:
    """Pages of 1,500 tokens: precision, keys and values as they hold them, in token order."""
    config = pagedkv.TierConfig(
        kv=kv, warm="64MB", cold=0, hot_tokens=64, sink_tokens=0, page_tokens=PAGE
    )
    with pagedkv.PagedCache.standalone(1, config) as cache:
        if treated:
            cache.context.pager.treatments[0] = treatment()
        keys, values = numbers(1500)
        for start in range(0, 1500, 50):
            part = [x[None, :, start : start + 50] for x in (keys, values)]
            mx.eval(cache[0].append(*part).keys)
        pager, pages = cache[0]._pager, []
        assert pager.treatment == (treatment() if treated else None)
        for page, _ in cache[0].located_pages():
            record, codec = pager._one_record(page), pager.codecs[page.precision]
            read = [f(record, mx.float32) for f in (codec.page_keys, codec.page_values)]
            mx.eval(*read)
            pages.append((str(page.precision), *read))
    return pages


@pytest.mark.parametrize("treated", [False, True])
def test_a_ladder_lowers_what_it_sealed_step_by_step(treated: bool) -> None:
    """Beside a cache that keeps the first precision: keys are rounded at each step, values once."""
    near = stored("K4V2", treated)
    ladder = stored("K4V2:300,K3V2:700,K2V2", treated)
    assert [p for p, _, _ in ladder] == ["K2V2"] * 2 + ["K3V2"] * 2 + ["K4V2"]
    for (precision, keys, values), (_, own_keys, own_values) in zip(ladder, near, strict=True):
        want = own_keys
        for bits in {"K2V2": (3, 2), "K3V2": (3,), "K4V2": ()}[precision]:
            want = again(want, 64, bits)
        assert mx.array_equal(keys, want)
        assert mx.array_equal(values, own_values)

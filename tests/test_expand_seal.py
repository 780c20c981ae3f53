"""The prefill and sealing kernels in the emulator, against the page codecs and numpy."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from pagedkv.allocator import KVShape, PageGeometry, Precision
from pagedkv.attn.fused.self_check import COMPENSATE_TOLERANCE, compensate_difference
from pagedkv.attn.kernels.compensate import CompensateSpec, compensate
from pagedkv.attn.kernels.decode import PRECISION_SHIFT, STAGED
from pagedkv.attn.kernels.expand import ExpandSpec, expand_pages
from pagedkv.attn.kernels.seal import SealSpec, seal_pages
from pagedkv.attn.kernels.source import SHARED_LIMIT
from pagedkv.tiers.codec.affine import codec_for
from pagedkv.tiers.codec.rounding import BLOCKS, compensated, compensated_rows, feedback_for
from tests.emulator import EmulatorError, HostLauncher
from tests.reference import page_arrays
from tests.test_kernels import plant

LAUNCHER = HostLauncher()
F16, BF16 = mx.float16, mx.bfloat16


def numbers(seed: int, *shape: int, dtype: mx.Dtype = F16) -> mx.array:
    """Rows of several magnitudes around offsets, as keys with outlier channels are."""
    rng = np.random.default_rng(seed)
    scale = np.exp2(rng.integers(-6, 4, shape[-1]))
    x = rng.standard_normal(shape) * scale + rng.standard_normal(shape[-1]) * 4 * scale
    return mx.array(x.astype(np.float32)).astype(dtype)


def ulps(a: mx.array, b: mx.array) -> int:
    """The largest distance of two arrays, in steps of their 16-bit type."""

    def ordered(x: mx.array) -> np.ndarray:
        bits = np.asarray(x.view(mx.uint16)).astype(np.int64)
        return np.where(bits & 0x8000, 0x8000 - bits, bits)

    assert a.dtype == b.dtype
    assert a.shape == b.shape
    return int(np.abs(ordered(a) - ordered(b)).max(initial=0))


class Pages:
    """Encoded pages of each precision, and what they hold."""

    def __init__(self, spec: ExpandSpec, pages: int = 3) -> None:
        self.spec = spec
        self.hot_dtype = BF16 if spec.hot_bfloat else F16
        self.dtype = BF16 if spec.bfloat else F16
        shape, tokens = spec.shape, spec.page_tokens
        self.records, self.sources = [], []
        for i, geometry in enumerate(spec.geometries):
            codec = codec_for(shape, tokens, geometry.precision, self.hot_dtype)
            keys = numbers(i, shape.kv_heads, pages * tokens, shape.key_dim, dtype=self.hot_dtype)
            values = numbers(
                i + 50, shape.kv_heads, pages * tokens, shape.value_dim, dtype=self.hot_dtype
            )
            records = codec.encode(keys, values)
            self.records.append((codec, records))
            # The staged pages are the slab's, in another order.
            self.sources += [records, records[::-1]]

    def slot(self, kind: int, slot: int) -> int:
        """The number of a table's slot among this precision's records."""
        return self.records[kind][1].shape[0] - 1 - (slot & ~STAGED) if slot & STAGED else slot

    def arrays(self, kind: int, slot: int) -> tuple[mx.array, mx.array]:
        """Keys and values of a page from its codec, ``[kv_heads, tokens, dim]``."""
        codec, records = self.records[kind]
        one = records[self.slot(kind, slot)][None]
        keys, values = codec.keys(one, self.dtype)[0], codec.values(one, self.dtype)[0]
        return keys.swapaxes(1, 2), values

    def reference(self, kind: int, slot: int) -> tuple[mx.array, mx.array]:
        """The same from the bytes, in float64 and rounded once."""
        codec, records = self.records[kind]
        record = np.array(records[self.slot(kind, slot)])
        keys, values = page_arrays(record, codec.geometry, self.hot_dtype == BF16)
        if self.dtype == BF16:
            return tuple(mx.array(x.astype(np.float32)).astype(BF16) for x in (keys, values))
        return tuple(mx.array(x.astype(np.float16)) for x in (keys, values))


def expand_and_check(
    pages: Pages,
    places: list[tuple[int, int, int]],
    hot_tokens: int,
    sinks: int,
    launcher: HostLauncher = LAUNCHER,
) -> None:
    spec, shape = pages.spec, pages.spec.shape
    capacity = hot_tokens + 3
    hot = tuple(
        numbers(90 + i, 1, shape.kv_heads, capacity, dim, dtype=pages.hot_dtype)
        for i, dim in enumerate((shape.key_dim, shape.value_dim))
    )
    # What lies behind the hot tokens is not read.
    for x in hot:
        x[:, :, hot_tokens:] = float("nan")
    words = [(kind << PRECISION_SHIFT | slot, valid) for kind, slot, valid in places]
    table = np.array(words, np.uint32).reshape(-1, 2)
    got = expand_pages(launcher, spec, table, hot, hot_tokens, sinks, pages.sources)
    tokens = hot_tokens + sum(valid for _, _, valid in places)
    for i, out in enumerate(got):
        assert out.dtype == pages.dtype
        assert out.shape == (1, shape.kv_heads, tokens, (shape.key_dim, shape.value_dim)[i])
        dense = hot[i][0].astype(pages.dtype)
        assert ulps(out[0, :, :sinks], dense[:, :sinks]) == 0
        token = sinks
        for kind, slot, valid in places:
            part = out[0, :, token : token + valid]
            coded = spec.geometries[kind].precision.quantized
            assert ulps(part, pages.arrays(kind, slot)[i][:, :valid]) <= coded
            assert ulps(part, pages.reference(kind, slot)[i][:, :valid]) <= (coded and spec.bfloat)
            token += valid
        assert ulps(out[0, :, token:], dense[:, sinks:hot_tokens]) == 0


def expand_spec(
    shape: tuple[int, int, int],
    page_tokens: int,
    precisions: str,
    dtype: mx.Dtype = F16,
    hot_dtype: mx.Dtype = F16,
) -> ExpandSpec:
    kv_shape = KVShape(*shape)
    geometries = tuple(
        PageGeometry(kv_shape, page_tokens, Precision.parse(p)) for p in precisions.split()
    )
    return ExpandSpec(geometries, kv_shape, page_tokens, dtype == BF16, hot_dtype == BF16)


def test_expand_a_ladder_with_trimmed_and_staged_pages() -> None:
    pages = Pages(expand_spec((2, 64, 64), 256, "fp16 K8V4 K4V4 K3V3 K2V2"))
    everything = [(kind, slot, 256) for kind in range(5) for slot in (2, STAGED | 2)]
    expand_and_check(pages, everything, 37, 4)
    borders = [1, 63, 64, 65, 191, 255]
    expand_and_check(pages, [(i % 5, i % 3, n) for i, n in enumerate(borders)], 131, 65)
    expand_and_check(pages, [(4, 0, 100), (0, 1, 3)], 64, 0)  # no sinks
    expand_and_check(pages, [(3, STAGED | 1, 77)], 5, 5)  # nothing after the pages
    expand_and_check(pages, [(2, 0, 129)], 0, 0)  # nothing hot
    expand_and_check(pages, [], 70, 4)


@pytest.mark.parametrize(
    ("shape", "page_tokens", "precisions", "dtype", "hot_dtype"),
    [
        ((3, 80, 72), 512, "K4V4 fp16", BF16, BF16),
        ((1, 256, 256), 256, "fp16 K8V8", F16, F16),
        ((1, 16, 8), 1024, "K2V8 fp16", F16, BF16),
        ((2, 48, 40), 256, "K3V2 fp16", BF16, F16),
        ((1, 144, 96), 256, "K4V3", F16, F16),
        ((1, 128, 192), 256, "K8V2", BF16, BF16),
    ],
)
def test_expand_shapes_and_types(
    shape: tuple[int, int, int],
    page_tokens: int,
    precisions: str,
    dtype: mx.Dtype,
    hot_dtype: mx.Dtype,
) -> None:
    pages = Pages(expand_spec(shape, page_tokens, precisions, dtype, hot_dtype))
    last = len(pages.spec.geometries) - 1
    expand_and_check(pages, [(last, 1, page_tokens - 31), (0, STAGED | 2, page_tokens)], 69, 3)


def test_expand_stays_within_threadgroup_memory() -> None:
    for dim in (16, 128, 256):
        spec = expand_spec((1, dim, dim), 256, "fp16 K8V8 K2V2")
        assert 4 * spec.shared_words <= SHARED_LIMIT
        assert spec.warps * 32 <= 256


def test_expand_does_not_read_beyond_the_slab() -> None:
    spec = expand_spec((1, 144, 96), 256, "K4V3")
    pages = Pages(spec, pages=1)
    with pytest.raises(EmulatorError, match="source0"):
        expand_and_check(pages, [(0, 1, 256)], 0, 0)


def awkward(shape: tuple[int, ...], dtype: mx.Dtype, limit: float) -> mx.array:
    """Ordinary numbers with some groups, along either axis, in which rounding has to decide."""
    rng = np.random.default_rng(7)
    x = np.array(numbers(1, *shape).astype(mx.float32))
    tokens, channels = shape[-2:]
    fills = [
        0.0,
        -0.0,
        3.25,
        -3.25,
        2.0**-24,
        -(2.0**-24),
        limit,
        rng.integers(0, 16, tokens),  # a grid that needs no rounding
        rng.integers(0, 31, tokens) / 2,  # halves of its steps
        -rng.integers(0, 511, tokens) / 2,
        rng.random(tokens) + 1,  # all of one sign
        -rng.random(tokens) - 1,
        rng.standard_normal(tokens) * 2.0**-20,  # subnormal
        rng.choice([-limit, limit], tokens),
        np.where(rng.random(tokens) < 0.02, 1000.0, rng.standard_normal(tokens)),
        rng.choice([-1.0, 1.0], tokens),  # both edges as large
    ]
    for i, fill in enumerate(fills):
        x[..., :, (3 * i + 1) % channels] = fill
        row = fill[:channels] if isinstance(fill, np.ndarray) else fill
        if np.ndim(row) and len(row) < channels:
            row = np.resize(row, channels)
        x[..., (5 * i + 2) % tokens, :] = row
    return mx.array(x).astype(dtype)


SEALED = [
    ((2, 128, 128), 256, "K4V4", F16),
    ((1, 80, 72), 512, "K3V3", BF16),
    ((3, 48, 40), 256, "K8V2", F16),
    ((1, 16, 8), 1024, "K2V8", BF16),
    ((1, 256, 256), 256, "K8V3", F16),
    ((2, 64, 96), 256, "fp16", BF16),
    ((1, 80, 72), 256, "fp16", F16),
]


@pytest.mark.parametrize(("shape", "page_tokens", "precision", "dtype"), SEALED)
def test_seal_equals_the_codec(
    shape: tuple[int, int, int], page_tokens: int, precision: str, dtype: mx.Dtype
) -> None:
    geometry = PageGeometry(KVShape(*shape), page_tokens, Precision.parse(precision))
    heads, key_dim, value_dim = shape
    # Of the floats that bfloat16 has, this is the largest that float16 has too.
    limit = 65280.0 if dtype == BF16 else 65504.0
    first, pages = 5, 2
    stop = first + pages * page_tokens
    hot = []
    for dim in (key_dim, value_dim):
        x = awkward((1, heads, stop + 4, dim), dtype, limit)
        # Its neighbours are not read.
        x[:, :, :first] = x[:, :, stop:] = float("nan")
        hot.append(x)
    codec = codec_for(geometry.shape, page_tokens, geometry.precision, dtype)
    want = codec.encode(hot[0][0, :, first:stop], hot[1][0, :, first:stop])
    got = seal_pages(LAUNCHER, SealSpec(geometry, dtype == BF16), (hot[0], hot[1]), first, pages)
    assert got.dtype == mx.uint32
    start = 0
    for part in geometry.parts:
        stop_word = start + part.nbytes // 4
        assert mx.array_equal(got[:, start:stop_word], want[:, start:stop_word]), part.name
        start = stop_word
    assert mx.array_equal(got, want), "padding"


def test_seal_clamps_what_float16_cannot_hold() -> None:
    shape, page_tokens = KVShape(1, 16, 8), 1024
    geometry = PageGeometry(shape, page_tokens, Precision.parse("K2V8"))
    rng = np.random.default_rng(3)
    hot, clamped = [], []
    for dim in (16, 8):
        size = (1, 1, page_tokens, dim)
        x = mx.array((rng.standard_normal(size) * 1e5).astype(np.float32)).astype(BF16)
        hot.append(x)
        clamped.append(mx.clip(x.astype(mx.float32), -65504, 65504).astype(F16)[0])
    want = codec_for(shape, page_tokens, geometry.precision, F16).encode(*clamped)
    got = seal_pages(LAUNCHER, SealSpec(geometry, True), (hot[0], hot[1]), 0, 1)
    assert mx.array_equal(got, want)


def test_seal_and_expand_are_inverse() -> None:
    """16-bit pages keep every bit, a NaN's too, through both kernels."""
    spec = expand_spec((1, 80, 72), 256, "fp16")
    rng = np.random.default_rng(5)
    hot = [
        mx.array(rng.integers(0, 1 << 16, (1, 1, 256, dim), dtype=np.uint16)).view(F16)
        for dim in (80, 72)
    ]
    record = seal_pages(LAUNCHER, SealSpec(spec.geometries[0], False), (hot[0], hot[1]), 0, 1)
    page = np.array([[0, 256]], np.uint32)
    got = expand_pages(LAUNCHER, spec, page, (hot[0], hot[1]), 0, 0, [record, record])
    for a, b in zip(got, hot, strict=True):
        assert mx.array_equal(a.view(mx.uint16), b.view(mx.uint16))


@pytest.mark.parametrize("target", ["cuda", "metal"])
@pytest.mark.parametrize(
    ("shape", "page_tokens", "precision", "values"),
    [
        ((2, 128, 64), 256, "K4V4", False),
        ((1, 80, 64), 512, "K3V4", False),
        ((2, 64, 64), 256, "K2V4", False),
        ((1, 16, 8), 1024, "K2V4", False),
        ((2, 64, 128), 256, "K4V4", True),
        ((1, 64, 80), 512, "K4V3", True),
        ((2, 64, 64), 256, "K4V2", True),
        ((1, 16, 16), 1024, "K8V2", True),
    ],
)
def test_compensate_equals_plain_mlx(
    target: str, shape: tuple[int, int, int], page_tokens: int, precision: str, values: bool
) -> None:
    """But for numbers next to the border between two codes, and those that follow from them."""
    geometry = PageGeometry(KVShape(*shape), page_tokens, Precision.parse(precision))
    spec, launcher = CompensateSpec(geometry, values), HostLauncher(target=target)
    heads, dim, bits = shape[0], spec.dim, spec.bits
    rng = np.random.default_rng(dim)
    x = rng.standard_normal((heads, 2 * dim, dim))
    feedback = mx.array(np.stack([feedback_for(h.T @ h / len(h)) for h in x]), mx.float16)
    given = numbers(1, 2, heads, page_tokens, dim)
    if values:
        given[:, :, 7, 3:5] = mx.array([-65504.0, 65504.0])  # and what comes of those
    else:
        given[..., 3] = mx.array([-65504.0, 65504.0] * (page_tokens // 2))
    got = compensate(launcher, spec, given, feedback)
    if values:
        want = compensated_rows(given, feedback, geometry.value_group, bits)
    else:
        want = compensated(given.swapaxes(2, 3), feedback, 64, bits).swapaxes(2, 3)
    assert (got.dtype, got.shape) == (mx.float16, given.shape)
    a, b, plain = (np.array(x, np.float64) for x in (got, want, given))
    size = dim // BLOCKS
    np.testing.assert_array_equal(a[..., :size], plain[..., :size])
    same = np.abs(a - b) <= 2e-3 * np.maximum(1, np.abs(b))
    assert same.mean() > 0.8
    assert (np.abs(a - plain)[..., size:] > 0).mean() > 0.8, "they are moved"
    assert compensate_difference(launcher, spec) < 0.02
    alone = compensate(launcher, spec, given[1:], feedback)
    assert mx.array_equal(alone, got[1:]).item(), "no page depends on another"


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("compensate", "plain[n] - move", "plain[n] + move"),
        ("compensate", "feedback + head *", "feedback + 0 *"),
        ("feedback", "(start + c) * ROW", "c * ROW"),
        ("compensate", "mask < 32", "mask < 16"),
        ("compensate", "* a.scale + a.bias - plain[n]", "* a.scale - plain[n]"),
        ("compensate", "(token + 32) * ROW;", "(token + 16) * ROW;"),
        ("compensate_rows", "within(plain - move", "within(plain + move"),
        ("compensate_rows", "feedback + head *", "feedback + 0 *"),
        ("compensate_rows", "(token + 32) * ROW;", "(token + 16) * ROW;"),
        ("compensate_rows", "scale_of(second, g", "scale_of(first, g"),
        ("compensate_rows", "i < start + GROUP", "i < start + GROUP / 2"),
        ("compensate_rows", "plain == e.low || plain == e.high ? plain :", ""),
        ("compensate_rows", "+ s.affine.bias - plain", "- plain"),
    ],
)
def test_compensate_is_watched(
    file: str, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistakes are found by the check that comes before its first use."""
    plant((f"{file}.h", right, wrong), tmp_path / "kernels", monkeypatch)
    geometry = PageGeometry(KVShape(2, 64, 64), 256, Precision.parse("K4V4"))
    spec = CompensateSpec(geometry, file == "compensate_rows")
    off = compensate_difference(HostLauncher(), spec)
    assert off > 2 * COMPENSATE_TOLERANCE


def test_the_texts_for_metal() -> None:
    launcher = HostLauncher(target="metal")
    pages = Pages(expand_spec((1, 80, 72), 256, "K4V3 fp16", F16, BF16))
    expand_and_check(pages, [(1, 0, 130), (0, STAGED | 1, 256)], 66, 3, launcher)
    codec, _ = pages.records[0]
    x = [numbers(i, 1, 1, 256, dim, dtype=BF16) for i, dim in enumerate((80, 72))]
    got = seal_pages(launcher, SealSpec(codec.geometry, True), (x[0], x[1]), 0, 1)
    assert mx.array_equal(got, codec.encode(x[0][0], x[1][0]))

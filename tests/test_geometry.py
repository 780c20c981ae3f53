"""Bytes of pages, precisions and ladders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.allocator import (
    PAGE_ALIGNMENT,
    ConfigError,
    KVShape,
    Ladder,
    PageGeometry,
    Precision,
)

BITS = (2, 3, 4, 8)
precisions = st.one_of(
    st.just(Precision(16, 16)),
    st.builds(Precision, st.sampled_from(BITS), st.sampled_from(BITS)),
)
shapes = st.builds(
    KVShape, st.integers(1, 64), st.sampled_from([64, 72, 80, 96, 112, 128, 192, 256]),
    st.sampled_from([64, 80, 96, 128, 256]),
)  # fmt: skip


@given(shapes, precisions, st.sampled_from([256, 512, 1024]))
def test_parts_are_dense_aligned_and_counted(
    shape: KVShape, precision: Precision, tokens: int
) -> None:
    geometry = PageGeometry(shape, tokens, precision)
    at = 0
    for part in geometry.parts:
        assert part.offset == at
        assert part.offset % 4 == 0
        at += part.nbytes
    assert at == geometry.payload_bytes <= geometry.page_bytes
    assert geometry.page_bytes % PAGE_ALIGNMENT == 0
    assert geometry.page_bytes - geometry.payload_bytes < PAGE_ALIGNMENT
    if precision.quantized:
        codes = shape.kv_heads * tokens * shape.key_dim * precision.key_bits // 8
        assert geometry.parts[0].nbytes == codes
        scales = shape.kv_heads * shape.key_dim * tokens // 64 * 2
        assert geometry.parts[1].nbytes == geometry.parts[2].nbytes == scales


@pytest.mark.parametrize(
    ("precision", "units"), [("K4V4", 18), ("K8V8", 34), ("K8V4", 26), ("fp16", 64)]
)
def test_eight_heads_of_128_fit_exactly(precision: str, units: int) -> None:
    geometry = PageGeometry(KVShape(8, 128, 128), 256, Precision.parse(precision))
    assert geometry.payload_bytes == geometry.page_bytes == units * PAGE_ALIGNMENT


def test_effective_bits_count_scales() -> None:
    shape = KVShape(8, 128, 128)
    assert PageGeometry(shape, 256, Precision(4, 4)).bits_per_element == 4.5
    assert PageGeometry(shape, 256, Precision(8, 4)).bits_per_element == 6.5


def test_choice_of_tokens() -> None:
    k4v4 = [Precision(4, 4)]
    assert PageGeometry.choose_tokens(KVShape(8, 128, 128), k4v4) == 256
    assert PageGeometry.choose_tokens(KVShape(3, 64, 64), k4v4) == 512  # 6.75 of 7 units
    assert PageGeometry.choose_tokens(KVShape(2, 64, 64), k4v4) == 1024  # 9 of 9


@given(shapes, precisions)
def test_the_choice_is_the_smallest_with_little_padding(
    shape: KVShape, precision: Precision
) -> None:
    padding = {t: PageGeometry(shape, t, precision).padding for t in (256, 512, 1024)}
    chosen = PageGeometry.choose_tokens(shape, [precision])
    good = [t for t in padding if padding[t] <= 0.04]
    assert chosen == (good[0] if good else min(padding, key=lambda t: padding[t]))


@pytest.mark.parametrize("text", ["K5V4", "K4", "int4", "K16V4", "", "fp8", "K0V0", "K4V4V4"])
def test_unknown_precisions(text: str) -> None:
    with pytest.raises(ConfigError):
        Precision.parse(text)


def test_ladder_reads_and_writes() -> None:
    text = "fp16:512,K8V4:8192,K4V4:65536,K4V2"
    ladder = Ladder.parse(text)
    assert str(ladder) == text
    expected = {0: "fp16", 511: "fp16", 512: "K8V4", 8191: "K8V4", 8192: "K4V4", 65536: "K4V2"}
    assert {d: str(ladder.at(d)) for d in expected} == expected
    assert [str(p) for p in ladder.beyond(512)] == ["K8V4", "K4V4", "K4V2"]
    assert [str(p) for p in ladder.beyond(100)] == ["fp16", "K8V4", "K4V4", "K4V2"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("K8V4,K4V4", "needs a distance"),
        ("K8V4:8192", "takes no distance"),
        ("K8V4:0,K4V4", "increase"),
        ("K8V4:900,K4V4:800,K4V2", "increase"),
        ("K8V4:many,K4V4", "'many' is not a distance"),
        ("K4V4:100,K8V8", "more precise with distance"),
        ("K4V4:", "not a distance"),
        ("K4V4:-5,K2V2", "not a distance"),
    ],
)
def test_ladders_that_cannot_be_meant(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Ladder.parse(text)

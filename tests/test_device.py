"""The kernels on this machine's GPU, through MLX; without one there is nothing to test here."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from pagedkv.allocator import KVShape, Precision
from pagedkv.attn.fused import self_check as check
from pagedkv.attn.kernels.compensate import CompensateSpec
from pagedkv.attn.kernels.expand import ExpandSpec
from pagedkv.attn.kernels.launch import DeviceLauncher
from pagedkv.attn.kernels.seal import SealSpec
from pagedkv.tiers.codec.affine import codec_for
from tests.kernel_cases import TOLERANCE, Case, error
from tests.on_gpu import CASES
from tests.test_kernels import BORDER, BORDERS, RUNS, SPLIT, WINDOW_RUNS

GPU = mx.metal.is_available() or mx.cuda.is_available()
pytestmark = pytest.mark.skipif(not GPU, reason="MLX drives no GPU here: its kernels are not run")


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.gpu)
    yield
    mx.set_default_device(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_against_float64(case: Case) -> None:
    launcher = DeviceLauncher()
    if case.together and not launcher.together:
        pytest.skip("Metal has no fence for one launch that attends and merges")
    runs = BORDERS if case is BORDER[1] else WINDOW_RUNS if case.windowed else RUNS
    assert max(error(launcher, case, run) for run in runs) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_pages_are_sealed_and_expanded_as_the_codec_does(dim: int, dtype: mx.Dtype) -> None:
    shape, bfloat16 = KVShape(2, dim, dim), dtype == mx.bfloat16
    names = ("K8V8", "K4V4", "K3V2", "fp16")
    codecs = [codec_for(shape, 256, Precision.parse(name), dtype) for name in names]
    geometries = tuple(codec.geometry for codec in codecs)
    launcher = DeviceLauncher()
    expand = ExpandSpec(geometries[:3], shape, 256, bfloat16, bfloat16)
    assert check.expand_difference(launcher, expand, codecs[:3]) < check.TOLERANCE[dtype]
    for geometry, codec in zip(geometries, codecs, strict=True):
        spec = SealSpec(geometry, bfloat16)
        assert check.seal_difference(launcher, spec, codec) <= check.SEAL_TOLERANCE


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("name", ["K4V4", "K2V2"])
def test_errors_are_compensated_as_plain_mlx_does(name: str, values: bool) -> None:
    codec = codec_for(KVShape(2, 128, 128), 256, Precision.parse(name), mx.float16)
    spec = CompensateSpec(codec.geometry, values)
    assert check.compensate_difference(DeviceLauncher(), spec) <= check.COMPENSATE_TOLERANCE


def test_the_same_launch_gives_the_same_bits() -> None:
    """Races would show in one of so many."""
    launcher, (_, case) = DeviceLauncher(), SPLIT[0]
    errors = {error(launcher, case, RUNS[2]) for _ in range(30)}
    assert len(errors) == 1

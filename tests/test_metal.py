"""The text that goes to Metal, without a Mac: analyzed by clang, and run on the emulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from pagedkv.attn.kernels.compensate import CompensateSpec
from pagedkv.attn.kernels.expand import ExpandSpec
from pagedkv.attn.kernels.seal import SealSpec
from pagedkv.attn.kernels.source import KernelText
from tests.emulator import METAL_STUBS, EmulatorError, HostLauncher
from tests.kernel_cases import Case, Run, codecs
from tests.test_kernels import (
    EIGHT,
    LADDER,
    RUNS,
    SMALL,
    SMALL_RUNS,
    SQUARES,
    check,
    name,
    plant,
)

BF16 = {"dtype": mx.bfloat16, "hot_dtype": mx.bfloat16}

# C++ for OpenCL has Metal's address spaces and keywords, and clang knows it: that language, without
# its library, and with constants at namespace scope in `constant` only.
LANGUAGE = (
    "-x", "cl", "-cl-std=clc++2021", "-cl-no-stdinc", "-nogpulib", "-target", "spir64",
    "-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space",
    f"-I{METAL_STUBS / 'check'}", "-ferror-limit=0",
    "-Wall", "-Wno-unused", "-Wno-constant-logical-operand",
)  # fmt: skip
KERNEL = """
__kernel void test_({parameters}, uint thread_index_in_simdgroup,
                    uint simdgroup_index_in_threadgroup, uint3 threadgroup_position_in_grid) {{
{body}
}}
"""


def complaints(text: KernelText) -> list[str]:
    """What clang has to say, and what Metal lacks besides."""
    clang = pytest.importorskip("clang.cindex", reason="needs the package libclang")
    parameters = [f"const device uint* {x}" for x in text.inputs]
    parameters += [f"device uint* {x}" for x in text.outputs]
    kernel = KERNEL.format(parameters=", ".join(parameters), body=text.body("metal"))
    program = text.header("metal") + kernel
    file = "kernel.clcpp"
    unit = clang.Index.create().parse(file, args=LANGUAGE, unsaved_files=[(file, program)])
    lines = program.splitlines()
    said = [
        f"{d.spelling}: {lines[d.location.line - 1]}" if d.location.line else d.spelling
        for d in unit.diagnostics
    ]
    for cursor in unit.cursor.walk_preorder():
        place = cursor.location
        if place.file is None or place.file.name != file:
            continue
        # Expressions may be generic: implicit copies are, here.
        if "__generic" in cursor.type.spelling and cursor.kind.is_declaration():
            said.append(f"no address space: {cursor.spelling}: {lines[place.line - 1]}")
        if "double" in cursor.type.spelling:
            said.append(f"no float64: {cursor.spelling}: {lines[place.line - 1]}")
    return said


CASES = [
    Case(("K4V4",), heads=8),
    Case(("K4V4",), heads=8, windowed=True),
    Case(SQUARES[0], key_dim=80, repeats=3, length=5, sinks=True, batch=2, **BF16),
    Case(SQUARES[1], key_dim=256, repeats=2, final=True),
    Case(EIGHT, key_dim=192, value_dim=128, repeats=16, length=8, page_tokens=1024),
    Case(LADDER, heads=8, length=3, windowed=True, sinks=True, treated=True),
    Case(("K4V4", "fp16"), key_dim=80, value_dim=40, batch=2, treated=True, **BF16),
]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_clang_finds_nothing(case: Case) -> None:
    spec = case.spec(fetch_ahead=False)
    bfloat16 = case.hot_dtype == mx.bfloat16
    geometries = tuple(codec.geometry for codec in codecs(case))
    texts = [
        spec.attend,
        spec.merge,
        ExpandSpec(geometries, case.shape, case.page_tokens, spec.query_bfloat, bfloat16).text,
        *(SealSpec(geometry, bfloat16).text for geometry in geometries),
        *(CompensateSpec(g).text for g in geometries if g.precision.key_bits < 8),
        *(CompensateSpec(g, True).text for g in geometries if g.precision.value_bits < 8),
    ]
    for text in texts:
        assert complaints(text) == []


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("FN void zero(THREAD Scores& scores)", "FN void zero(Scores& scores)", "no address space"),
        ("SHARED q = queries", "THREAD u32* q = queries", "cannot initialize"),
        ("CONSTANT int STEPS", "constexpr int STEPS", "must reside in constant address space"),
        ("float factor[", "double factor[", "no float64"),
        ("int entry =", "int half =", "cannot combine"),
        ("int entry =", "int thread =", "expected"),
    ],
)
def test_clang_watches(
    old: str, new: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(("attend.h", old, new), tmp_path / "kernels", monkeypatch)
    assert why in "\n".join(complaints(CASES[0].spec(fetch_ahead=False).attend))


@pytest.mark.parametrize(
    "case",
    [
        Case(SQUARES[1], key_dim=64, repeats=3, length=3, batch=2, sinks=True),
        Case(SQUARES[2], key_dim=128, heads=1, repeats=4, **BF16),
        Case(SQUARES[3], key_dim=80, heads=1, repeats=16, length=2, final=True),
        Case(("K4V3", "fp16"), key_dim=80, repeats=5, length=3, sinks=True, treated=True),
    ],
    ids=name,
)
def test_against_float64(case: Case) -> None:
    check(HostLauncher(fetch_ahead=False, target="metal"), case, RUNS)


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        Case(("K8V2", "fp16"), heads=1, key_dim=96, repeats=6, length=3, final=True),
        Case(("K4V4",), heads=2, key_dim=48, value_dim=40, repeats=3, treated=True),
    ],
    ids=name,
)
def test_bounds(case: Case) -> None:
    """Plain pointers here: what they must not touch is watched by AddressSanitizer."""
    runs = [Run(pages=(2,), hot=(65,), valid=(0, 63), spare=0), *SMALL_RUNS]
    check(HostLauncher(fetch_ahead=False, sanitize=True, target="metal"), case, runs)


def test_bounds_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = (
        "attend.h",
        "least(2 * (HOT_BLOCKS * at.g + m), last)",
        "2 * (HOT_BLOCKS * at.g + m)",
    )
    plant(mistake, tmp_path / "kernels", monkeypatch)
    with pytest.raises(EmulatorError, match="heap-buffer-overflow"):
        launcher = HostLauncher(fetch_ahead=False, sanitize=True, target="metal")
        check(launcher, replace(SMALL, sinks=False), SMALL_RUNS)

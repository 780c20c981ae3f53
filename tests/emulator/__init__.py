"""Runs kernel texts on the host, lane by lane, with every memory access checked."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from pagedkv.kernels.source import KernelText

MAIN = """
static emulator::Buffer input_buffers[32], output_buffers[8];
static u32 *shared_memory, position[3];
static void lane_body(u32 thread) {{
  emulator::SharedWords shared{{shared_memory, int64_t({shared}), 0}};
  pagedkv::{call}(thread & 31, thread >> 5, position[0], position[1], position[2], shared{arguments});
}}
extern "C" const char* run(const u32* grid, u32 threads, u32** data, const int64_t* words, u32 seed) {{
  static std::string failure;
  const char* names[] = {{{names}}};
  for (int i = 0; i < {inputs}; i++) input_buffers[i] = {{data[i], words[i], 0, names[i]}};
  for (int i = 0; i < {outputs}; i++)
    output_buffers[i] = {{data[{inputs} + i], words[{inputs} + i], 0, names[{inputs} + i]}};
  std::vector<u32> memory({shared} + 8);
  shared_memory = (u32*)((uintptr_t(memory.data()) + 15) & ~uintptr_t(15));
  for (position[2] = 0; position[2] < grid[2]; position[2]++)
    for (position[1] = 0; position[1] < grid[1]; position[1]++)
      for (position[0] = 0; position[0] < grid[0]; position[0]++) {{
        std::fill(memory.begin(), memory.end(), 0x7fc07e7e);
        failure = emulator::run_group(threads, lane_body, seed++);
        if (!failure.empty()) return failure.c_str();
      }}
  return nullptr;
}}
"""


class EmulatorError(AssertionError):
    """A kernel read or wrote where it must not, or its lanes wait for each other."""


def source(text: KernelText) -> str:
    """The C++ program of a kernel."""
    arguments = [f", input_buffers[{i}]" for i in range(len(text.inputs))]
    arguments += [f", output_buffers[{i}]" for i in range(len(text.outputs))]
    main = MAIN.format(
        shared=text.shared_words,
        call=text.call,
        arguments="".join(arguments),
        names=", ".join(f'"{name}"' for name in (*text.inputs, *text.outputs)),
        inputs=len(text.inputs),
        outputs=len(text.outputs),
    )
    prelude = (Path(__file__).parents[2] / "pagedkv/kernels/prelude_host.h").read_text()
    return f"{prelude}\nnamespace pagedkv {{\n{text.functions}\n}}\n{main}"


@cache
def _library(program: str) -> ctypes.CDLL:
    folder = Path(tempfile.gettempdir()) / f"pagedkv-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w"]
    digest = hashlib.sha256((program + " ".join(flags)).encode()).hexdigest()[:24]
    library = folder / f"{digest}.so"
    if not library.exists():
        path = folder / f"{digest}.{os.getpid()}.cpp"
        built = path.with_suffix(".so")
        path.write_text(program)
        subprocess.run(["g++", *flags, "-o", built, path], check=True)
        built.rename(library)
        path.unlink()
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = ctypes.c_char_p
    return loaded


class HostLauncher:
    """Launches kernels in the emulator; outputs are poisoned with NaN before each run."""

    def __init__(self, fetch_ahead: bool = True) -> None:
        self.fetch_ahead = fetch_ahead

    def launch(
        self,
        text: KernelText,
        inputs: Sequence[mx.array],
        groups: tuple[int, int, int],
        threads: int,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """See `pagedkv.kernels.launch.Launcher.launch`."""
        mx.eval(*inputs)
        arrays = [_words(x) for x in inputs]
        sizes = [-(-int(np.prod(s)) * d.size // 4) for s, d in zip(shapes, dtypes, strict=True)]
        arrays += [np.full(n, 0x7FC07E7E, np.uint32) for n in sizes]
        pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
        words = (ctypes.c_int64 * len(arrays))(*(a.size for a in arrays))
        grid = (ctypes.c_uint32 * 3)(*groups)
        failure = _library(source(text)).run(grid, threads, pointers, words, len(arrays))
        if failure:
            raise EmulatorError(f"{text.name}: {failure.decode()}")
        made = arrays[len(inputs) :]
        return [
            mx.array(a).view(d)[: int(np.prod(s))].reshape(tuple(s))
            for a, s, d in zip(made, shapes, dtypes, strict=True)
        ]


def _words(x: mx.array) -> np.ndarray:
    """An aligned copy of an array's words."""
    raw = np.asarray(mx.contiguous(x).reshape(-1).view(mx.uint8 if x.nbytes % 4 else mx.uint32))
    raw = np.concatenate([raw.view(np.uint8), np.zeros(-raw.nbytes % 4, np.uint8)])
    buffer = np.empty(raw.nbytes + 16, np.uint8)
    start = -buffer.ctypes.data % 16
    aligned = buffer[start : start + raw.nbytes]
    aligned[:] = raw
    return aligned.view(np.uint32)

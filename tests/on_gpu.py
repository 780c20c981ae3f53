"""The kernel tests on a real CUDA GPU: numbers through MLX, and compute-sanitizer without it.

    python -m tests.on_gpu numbers            # float64 beside the kernels, as CI does it emulated
    python -m tests.on_gpu build              # compile the sanitizer's programs (needs nvcc only)
    python -m tests.on_gpu sanitize           # run them under memcheck and racecheck
    python -m tests.on_gpu cost               # what a treatment adds to decode attention

For the sanitizer each kernel becomes a program of its own, in which every buffer is an allocation
of exactly its size: MLX's would lie in pools, where an access beyond the end goes unnoticed.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from pagedkv.attn.kernels.launch import DeviceLauncher
from pagedkv.attn.kernels.source import KernelText
from tests.kernel_cases import TOLERANCE, Case, error
from tests.test_kernels import (
    BORDER,
    BORDERS,
    LONG,
    RUNS,
    SPLIT,
    TREATED,
    WHOLE,
    WINDOW_RUNS,
    WINDOWED,
)
from tests.treatment_cost import cost

CASES = [case for _, case in (*SPLIT, *WHOLE, LONG, BORDER, *WINDOWED, *TREATED)]
SANITIZED = [CASES[i] for i in (0, 2, 4, 7, 8, 11, 13, 15)]
SANITIZED += [TREATED[i][1] for i in (1, 2, 4, 8)]
PROGRAMS = Path(os.environ.get("PAGEDKV_GPU_PROGRAMS", tempfile.gettempdir())) / "kernel_programs"
WORKERS = 12

MAIN = """
#include <cstdio>
#include <cstdlib>
#include <vector>
#define OK(x) if (cudaError_t e = (x)) {{ puts(cudaGetErrorString(e)); exit(3); }}
int main(int, char** argv) {{
  FILE* in = fopen(argv[1], "rb");
  unsigned head[5 + {buffers}];
  if (fread(head, 4, 5 + {buffers}, in) != 5 + {buffers}) return 4;
  unsigned* data[{buffers}];
  for (int i = 0; i < {buffers}; i++) {{
    std::vector<unsigned> words(head[5 + i]);
    if (fread(words.data(), 4, words.size(), in) != words.size()) return 4;
    OK(cudaMalloc(&data[i], 4 * words.size()));
    OK(cudaMemcpy(data[i], words.data(), 4 * words.size(), cudaMemcpyHostToDevice));
  }}
  OK(cudaFuncSetAttribute({name}, cudaFuncAttributeMaxDynamicSharedMemorySize, head[4]));
  {name}<<<dim3(head[0], head[1], head[2]), head[3], head[4]>>>({arguments});
  OK(cudaGetLastError());
  OK(cudaDeviceSynchronize());
  FILE* out = fopen(argv[2], "wb");
  for (int i = {inputs}; i < {buffers}; i++) {{
    std::vector<unsigned> words(head[5 + i]);
    OK(cudaMemcpy(words.data(), data[i], 4 * words.size(), cudaMemcpyDeviceToHost));
    fwrite(words.data(), 4, words.size(), out);
  }}
  fclose(out);
  return 0;
}}
"""


def program(text: KernelText) -> Path:
    """The compiled program of a kernel."""
    path = PROGRAMS / text.name
    if path.exists():
        return path
    PROGRAMS.mkdir(exist_ok=True, parents=True)
    names = (*text.inputs, *text.outputs)
    signature = ", ".join(f"unsigned* {name}" for name in names)
    main = MAIN.format(
        buffers=len(names),
        inputs=len(text.inputs),
        name=text.name,
        arguments=", ".join(f"data[{i}]" for i in range(len(names))),
    )
    source = path.with_suffix(".cu")
    source.write_text(
        "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"
        + text.header("cuda")
        + f"__global__ void {text.name}({signature}) {{\n{text.body('cuda')}\n}}\n"
        + main
    )
    flags = ["-arch=sm_90a", "-std=c++17", "-lineinfo", "-diag-suppress=177"]
    subprocess.run(["nvcc", *flags, "-o", path, source], check=True)
    return path


class SanitizedLauncher:
    """Runs each launch as a program under one of compute-sanitizer's tools."""

    fetch_ahead, together, traceable, trusted = True, True, False, True

    def __init__(self, tool: str) -> None:
        self._tool = tool

    def launch(
        self,
        text: KernelText,
        inputs: Sequence[mx.array],
        groups: tuple[int, int, int],
        threads: int,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        mx.eval(*inputs)
        arrays = [words(x) for x in inputs]
        sizes = [-(-int(np.prod(s)) * d.size // 4) for s, d in zip(shapes, dtypes, strict=True)]
        arrays += [np.full(n, 0x7FC07E7E, np.uint32) for n in sizes]
        head = [*groups, threads, 4 * text.shared_words, *(a.size for a in arrays)]
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder) / "in", Path(folder) / "out"
            given.write_bytes(b"".join(a.tobytes() for a in (np.array(head, np.uint32), *arrays)))
            check = ["compute-sanitizer", "--tool", self._tool, "--error-exitcode", "9"]
            run = subprocess.run(
                [*check, program(text), given, made], capture_output=True, text=True, check=False
            )
            if run.returncode:
                raise AssertionError(f"{text.name}: {(run.stdout + run.stderr)[-2000:]}")
            out = np.frombuffer(made.read_bytes(), np.uint32)
        parts = np.split(out, np.cumsum(sizes)[:-1])
        return [
            mx.array(a).view(d)[: int(np.prod(s))].reshape(tuple(s))
            for a, s, d in zip(parts, shapes, dtypes, strict=True)
        ]


def words(x: mx.array) -> np.ndarray:
    """An array's 32-bit words."""
    raw = np.asarray(mx.contiguous(x).reshape(-1).view(mx.uint8)).tobytes()
    return np.frombuffer(raw + bytes(-len(raw) % 4), np.uint32)


def numbers(case: Case) -> str:
    """Largest error of a case over all runs, on the GPU through MLX."""
    launcher, started = DeviceLauncher(), time.perf_counter()
    runs = BORDERS if case is BORDER[1] else WINDOW_RUNS if case.windowed else RUNS
    worst = max(error(launcher, case, run) for run in runs)
    verdict = "ok" if worst < TOLERANCE[case.dtype] else "WRONG"
    return f"{verdict} {worst:.1e} {case} {time.perf_counter() - started:.0f} s"


def sanitize(case: Case) -> str:
    """Both tools over one run of a case."""
    with mx.stream(mx.cpu):
        for tool in ("memcheck", "racecheck"):
            worst = error(SanitizedLauncher(tool), case, RUNS[0])
            if not worst < TOLERANCE[case.dtype]:
                return f"WRONG {worst:.1e} {case}"
    return f"ok {worst:.1e} memcheck and racecheck {case}"


def build() -> None:
    """Compile the sanitizer's programs."""
    texts = {}
    for case in SANITIZED:
        spec = case.spec(fetch_ahead=True)
        alone = spec.final or spec.together
        texts |= {t.name: t for t in ((spec.attend,) if alone else (spec.attend, spec.merge))}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path in pool.map(program, texts.values()):
            print(path)


def main() -> int:
    what = sys.argv[1] if len(sys.argv) > 1 else "numbers"
    if what == "build":
        build()
        return 0
    if what == "cost":
        return int(not cost())
    cases = CASES if what == "numbers" else SANITIZED
    bad = 0
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(_safely, [what] * len(cases), range(len(cases))):
            bad += not line.startswith("ok")
            print(line, flush=True)
    print(f"{len(cases)} cases, {bad} bad")
    return int(bad > 0)


def _safely(what: str, i: int) -> str:
    job, case = (numbers, CASES[i]) if what == "numbers" else (sanitize, SANITIZED[i])
    try:
        return job(case)
    except Exception as e:
        return f"FAILED {case}: {type(e).__name__}: {str(e)[-1500:]}"


if __name__ == "__main__":
    sys.exit(main())

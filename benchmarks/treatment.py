"""What balanced keys cost on a GPU: rounding them with their errors made up for, prompts, decoding.

    python benchmarks/treatment.py --out benchmarks/results/treatment-h100.json

check    how much more the kernel errs than plain MLX, as queries see it, for head sizes and bits
race     wrapping a model that was never seen: what it writes and reads, the race; and once more
seal     a layer's pages (8 heads of 128): sealing as they are, and the kernel, or compiled MLX,
         before it
prefill  a prompt of an 8B-shaped model (random weights of 4 bits): mlx-lm's own cache, K4V4 pages
         as they are, scaled and rotated by the weights, and balanced, all layers alike or a layer
         in four with 8 bits; the first prompt's matrices are not in it, but told beside it
decode   steps after a longer one, more than a page of them, so that every layer seals. All caches
         take turns of some steps: what the host does besides is then the same for all of them
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from pagedkv import KVShape, Precision, TierConfig, unwrap, wrap
from pagedkv.allocator import PageGeometry
from pagedkv.attn.fused.self_check import compensate_difference, results
from pagedkv.attn.kernels.compensate import CompensateSpec, compensate
from pagedkv.attn.kernels.launch import DeviceLauncher
from pagedkv.attn.kernels.seal import SealSpec, seal_pages
from pagedkv.integrations.mlx_lm import race as race_module
from pagedkv.integrations.mlx_lm import retrieval_layers as lookup_layers
from pagedkv.integrations.mlx_lm import treatments
from pagedkv.integrations.mlx_lm.model_notes import FOLDER
from pagedkv.integrations.mlx_lm.wrapping import wrapping_of
from pagedkv.tiers.codec.rounding import compensated, compensated_rows, feedback_for
from pagedkv.tools.bench.result import describe_machine
from pagedkv.tools.bench.subject import WIDTHS, LlamaShape, random_llama
from pagedkv.tools.bench.timing import Sample
from pagedkv.tools.evaluation.caches import hooked, own_caches

LAUNCHES, ROUNDS = 20, 15
CHUNK = 2048
TURN = 16  # steps
DTYPE = mx.float16 if mx.default_device() == mx.gpu else mx.float32
EIGHT_BITS = "K8V8@" + ",".join(map(str, range(3, 32, 4)))
"""A layer in four, as those have that look things up: which ones is no matter of time."""
SETTINGS = {
    "none": {"treatment": "none", "layer_kv": "same"},
    "hadamard": {"treatment": "hadamard", "layer_kv": "same"},
    "auto": {"treatment": "auto", "layer_kv": "same"},
    "auto, layers with 8 bits": {"treatment": "auto", "layer_kv": EIGHT_BITS},
}
KINDS = ("fp16", *SETTINGS)
Row = dict[str, Any]


def check() -> Iterator[Row]:
    launcher = DeviceLauncher()
    for dim in (16, 64, 80, 96, 128, 256):
        for bits in (4, 3, 2):
            geometry = PageGeometry(KVShape(2, dim, dim), 256, Precision.parse(f"K{bits}V{bits}"))
            for what in ("keys", "values"):
                spec = CompensateSpec(geometry, what == "values")
                off = compensate_difference(launcher, spec)
                yield {"part": "check", "of": what, "dim": dim, "bits": bits, "more_error": off}


def seal(heads: int = 8, dim: int = 128, tokens: int = 256) -> Iterator[Row]:
    launcher = DeviceLauncher()
    geometry = PageGeometry(KVShape(heads, dim, dim), tokens, Precision.parse("K4V4"))
    spec, rows = CompensateSpec(geometry), CompensateSpec(geometry, True)
    sealing = SealSpec(geometry, False)
    x = np.random.default_rng(0).standard_normal((heads, 2 * dim, dim))
    feedback = mx.array(np.stack([feedback_for(h.T @ h / len(h)) for h in x]), mx.float16)
    for pages in (1, 8):
        keys = mx.random.normal((pages, heads, tokens, dim)).astype(mx.float16)
        flat = keys.swapaxes(0, 1).reshape(1, heads, pages * tokens, dim)
        mx.eval(keys, flat)
        ways: dict[str, Callable[[], mx.array]] = {
            "seal": lambda: seal_pages(launcher, sealing, (flat, flat), 0, pages),  # noqa: B023
            "kernel": lambda: compensate(launcher, spec, keys, feedback),  # noqa: B023
            "kernel, values": lambda: compensate(launcher, rows, keys, feedback),  # noqa: B023
            "compiled MLX": lambda: compensated(keys.swapaxes(2, 3), feedback, 64, 4),  # noqa: B023
            "compiled MLX, values": lambda: compensated_rows(keys, feedback, 64, 4),  # noqa: B023
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(ROUNDS + 3):
            for name, way in ways.items():
                start = time.perf_counter()
                mx.eval([way() for _ in range(LAUNCHES)])
                if turn >= 3:
                    times[name].append((time.perf_counter() - start) / LAUNCHES)
        for name, seconds in times.items():
            yield {
                "part": "seal",
                "pages": pages,
                "way": name,
                **Sample.of(seconds).fields("us", 1e6),
            }


class Kinds:
    """The caches of one model: mlx-lm's, and one wrapping for each treatment."""

    def __init__(self, model: Any, tokens: int) -> None:
        self._model = model
        self._wrappings: dict[str, Any] = {}
        for kind, settings in SETTINGS.items():
            with wrap(model, TierConfig(kv="K4V4", **settings)):
                self._wrappings[kind] = wrapping_of(model)
            unwrap(model)
        self.prompt = mx.random.randint(0, 1000, (1, tokens))

    @contextmanager
    def opened(self, kind: str) -> Iterator[list[Any]]:
        """Empty caches."""
        if kind == "fp16":
            yield own_caches(self._model)
        else:
            with hooked(), self._wrappings[kind].make_cache() as cache:
                yield cache
        mx.clear_cache()

    def read(self, cache: list[Any]) -> float:
        """Seconds of the prompt."""
        start = time.perf_counter()
        for at in range(0, self.prompt.shape[1], CHUNK):
            logits = self._model(self.prompt[:, at : at + CHUNK], cache=cache)
            mx.eval([layer.state for layer in cache], logits[:, -1])
            del logits
        return time.perf_counter() - start

    def step(self, cache: list[Any], token: mx.array) -> mx.array:
        """The next token, ``[1, 1]``, lazily."""
        return mx.argmax(self._model(token, cache=cache)[:, -1:], axis=-1)

    def decode(self, cache: list[Any], steps: int) -> float:
        """Seconds of some steps, the next one under way as mlx-lm does it."""
        start = time.perf_counter()
        token = self.step(cache, self.prompt[:, -1:])
        mx.async_eval(token)  # type: ignore[no-untyped-call]
        for _ in range(steps - 1):
            following = self.step(cache, token)
            mx.async_eval(following)  # type: ignore[no-untyped-call]
            mx.eval(token)
            token = following
        mx.eval(token)
        return time.perf_counter() - start


def model_of(args: argparse.Namespace) -> Any:
    layers, heads = (32, (32, 8, 128)) if args.shape == "llama3-8b" else (2, (4, 2, 64))
    return random_llama(LlamaShape(layers, *heads, *WIDTHS[args.shape]), DTYPE)


def race(args: argparse.Namespace) -> Iterator[Row]:
    model = model_of(args)
    mx.eval(model.parameters())
    wrap(model, TierConfig(cold=0, treatment="none", layer_kv="same")).close()
    unwrap(model)  # the hash of its weights is known
    watched = (
        (treatments, "own_texts"),
        (race_module, "measure"),
        (treatments, "raced"),
        (lookup_layers, "echoes"),
    )
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {FOLDER: folder}):
        for what in ("first", "second"):
            took: dict[str, float] = {}
            with ExitStack() as stack:
                for module, name in watched:
                    watching = timed(getattr(module, name), took)
                    stack.enter_context(mock.patch.object(module, name, watching))
                start = time.perf_counter()
                wrap(model, TierConfig(cold=0)).close()
                seconds = time.perf_counter() - start
            unwrap(model)
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
            yield {"part": "race", "wrap": what, "seconds": seconds, "bytes": size, "of_it": took}


def timed(function: Callable[..., Any], took: dict[str, float]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            before = took.get(function.__name__, 0.0)
            took[function.__name__] = before + time.perf_counter() - start

    return run


def kinds_of(args: argparse.Namespace, tokens: int) -> Kinds:
    return Kinds(model_of(args), tokens)


def prefill(args: argparse.Namespace) -> Iterator[Row]:
    kinds = kinds_of(args, args.tokens)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(args.rounds + 1):
        for kind in KINDS:
            with kinds.opened(kind) as cache:
                seconds = kinds.read(cache)
            if turn:
                times[kind].append(seconds)
            else:
                yield {"part": "first prompt", "kind": kind, "seconds": seconds}
    for kind, some in times.items():
        fields = Sample.of(some).fields("seconds")
        yield {"part": "prefill", "kind": kind, "tokens": args.tokens, **fields}


def decode(args: argparse.Namespace) -> Iterator[Row]:
    kinds = kinds_of(args, args.decode_tokens)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        caches = {kind: stack.enter_context(kinds.opened(kind)) for kind in KINDS}
        for cache in caches.values():
            kinds.read(cache)
            kinds.decode(cache, TURN)
        for turn in range(args.steps // TURN):
            for at in range(len(KINDS)):
                kind = KINDS[(turn + at) % len(KINDS)]  # nobody always follows the same one
                times[kind].append(kinds.decode(caches[kind], TURN) / TURN)
    plain = np.array(times["none"])
    draws = np.random.default_rng(0).integers(0, len(plain), (2000, len(plain)))
    for kind, some in times.items():
        ratios = np.array(some) / plain
        low, high = np.percentile(np.median(ratios[draws], axis=1), (2.5, 97.5))
        yield {
            "part": "decode",
            "kind": kind,
            "tokens": args.decode_tokens,
            "steps": TURN * len(some),
            **Sample.of(some).fields("ms", 1e3),
            "mean_ms": 1e3 * float(np.mean(some)),
            "beside_none": float(np.median(ratios)),
            "beside_none_low": float(low),
            "beside_none_high": float(high),
            "mean_beside_none": float(np.sum(some) / plain.sum()),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    parser.add_argument("--part", nargs="+", default=["check", "race", "seal", "prefill", "decode"])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--decode-tokens", type=int, default=32768, help="before decoding")
    parser.add_argument("--shape", choices=("llama3-8b", "tiny"), default="llama3-8b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1024)
    args = parser.parse_args()
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "check": check,
        "race": lambda: race(args),
        "seal": seal,
        "prefill": lambda: prefill(args),
        "decode": lambda: decode(args),
    }
    rows: list[Row] = []
    for part in args.part:
        for row in parts[part]():
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            document = {"machine": describe_machine(), "rows": rows, "kernels": dict(results)}
            args.out.write_text(json.dumps(document, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

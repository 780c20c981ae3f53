"""Kernel variants side by side on a GPU: correctness, then microseconds per call, beside MLX's.

A development tool: it launches kernels directly, over random page bytes, without a cache. One call
chains `links` dependent calls over rotating inputs, so that launches overlap as they do in a model
and nothing is read from the L2 cache; the time is the chain's divided by its links.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from pagedkv.allocator import KVShape, PageGeometry, Precision
from pagedkv.kernels import decode
from pagedkv.kernels.decode import SplitPlan, attend_splits, merge_splits, table_words
from pagedkv.kernels.launch import DeviceLauncher
from pagedkv.kernels.source import AttentionSpec


def random_slab(geometry: PageGeometry, slots: int, seed: int) -> mx.array:
    """Pages of random codes with scales and biases of ordinary size."""
    words = geometry.page_bytes // 4
    page = np.random.default_rng(seed).integers(0, 2**32, words, np.uint32)
    halves = page.view(np.float16)
    for part in geometry.parts:
        if part.dtype != "uint32":
            at = part.offset // 2
            noise = np.random.default_rng(seed).standard_normal(part.nbytes // 2) / 8
            halves[at : at + part.nbytes // 2] = noise.astype(np.float16)
    base = mx.array(page)[None]
    keys = mx.random.randint(0, 2**31 - 1, (slots, words // 4)).astype(mx.uint32)
    codes = mx.concatenate([base[:, : words // 4] ^ keys, mx.repeat(base[:, words // 4 :], slots, 0)], 1)
    mx.eval(codes)
    # Scales may lie in the scrambled quarter only if codes are tiny; they never are.
    return codes


class Chain:
    """Calls over `layers` rotating inputs, each call's queries the output before."""

    def __init__(self, job: Callable[[mx.array, int], mx.array], q: mx.array, links: int) -> None:
        self.job, self.q, self.links = job, q, links

    def seconds(self) -> float:
        out = self.q
        for i in range(self.links):
            out = self.job(out, i)
        started = time.perf_counter()
        mx.eval(out)
        mx.synchronize()
        return (time.perf_counter() - started) / self.links

    def single(self) -> float:
        out = self.job(self.q, 0)
        started = time.perf_counter()
        mx.eval(out)
        mx.synchronize()
        return time.perf_counter() - started


def interleaved(chains: dict[str, Chain], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in chains}
    for turn in range(rounds + 2):
        for name, chain in chains.items():
            seconds = chain.seconds()
            if turn >= 2:
                times[name].append(seconds)
    return {name: statistics.median(t) for name, t in times.items()}


def ours(
    launcher: DeviceLauncher,
    kv: str,
    heads: int,
    repeats: int,
    dim: int,
    depth: int,
    page_tokens: int,
    layers: int,
    ordered: bool = False,
    plan: SplitPlan | None = None,
    **changes: Any,
) -> Callable[[mx.array, int], mx.array]:
    geometry = PageGeometry(KVShape(heads, dim, dim), page_tokens, Precision.parse(kv))
    pages = max(1, depth // page_tokens)
    slab = random_slab(geometry, pages * layers, 0)
    rng = np.random.default_rng(1)
    hot = [mx.zeros((1, heads, 64, dim), mx.float16) for _ in range(2)]
    tables = []
    order = np.arange(pages * layers) if ordered else rng.permutation(pages * layers)
    for i in range(layers):
        slots = order[i * pages : (i + 1) * pages]
        tables.append(mx.array(table_words([(0, int(s), page_tokens) for s in slots]), mx.uint32))
    plan = plan or SplitPlan.choose(pages, 0, heads * decode.group_count(repeats), page_tokens, 16)
    spec = AttentionSpec(
        (geometry,), heads, dim, dim, page_tokens, repeats, 1, 1, dim**-0.5,
        False, False, True, plan.splits == 1, False, plan.warps, launcher.fetch_ahead,
    )  # fmt: skip
    spec = replace(spec, **changes)
    params = mx.array(plan.params(pages, 0, 64, pages), mx.uint32)
    sinks = mx.zeros(8)
    mx.eval(tables, params, hot, slab, sinks)

    def call(q: mx.array, i: int) -> mx.array:
        table = tables[i % layers]
        out, stats = attend_splits(
            launcher, spec, plan, q, params, table, (hot[0], hot[1]), [slab, slab], plan.splits
        )
        return out if spec.final else merge_splits(launcher, spec, q, out, stats, params, sinks)

    return call


def mlx_fp16(heads: int, dim: int, depth: int, layers: int) -> Callable[[mx.array, int], mx.array]:
    keys = [mx.random.normal((1, heads, depth, dim)).astype(mx.float16) for _ in range(layers)]
    values = [mx.random.normal((1, heads, depth, dim)).astype(mx.float16) for _ in range(layers)]
    mx.eval(keys, values)
    return lambda q, i: mx.fast.scaled_dot_product_attention(
        q, keys[i % layers], values[i % layers], scale=dim**-0.5
    )


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, reads and writes counted."""
    x = mx.zeros((256, 2**20), mx.float32)
    mx.eval(x)
    times = []
    for _ in range(8):
        started = time.perf_counter()
        y = x
        for _ in range(8):
            y = y + 1.0
            y = mx.depends(y, [y])
            mx.eval(y)
        mx.synchronize()
        times.append((time.perf_counter() - started) / 8)
    return 2 * x.nbytes / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["32/8x128"])
    parser.add_argument("--depths", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--kv", nargs="+", default=["K4V4"])
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    launcher = DeviceLauncher()
    print(f"copy {copy_bandwidth() / 1e12:.2f} TB/s", flush=True)
    for shape in args.shapes:
        queries, _, rest = shape.partition("/")
        heads, dim = (int(x) for x in rest.split("x"))
        repeats = int(queries) // heads
        q = (mx.random.normal((1, heads * repeats, 1, dim)) / 4).astype(mx.float16)
        tokens = 256 if heads * dim >= 512 else 512
        for depth in args.depths:
            fp16 = 4 * depth * heads * dim
            layers = max(1, min(64, int(400e6 // fp16)))
            links = max(32, layers)
            chains = {"mlx fp16": Chain(mlx_fp16(heads, dim, depth, layers), q, links)}
            for kv in args.kv:
                small = max(1, min(64, int(400e6 // (fp16 * 4.5 / 16))))
                for name, options in VARIANTS.items():
                    job = ours(launcher, kv, heads, repeats, dim, depth, tokens, small, **options(depth, heads, tokens, repeats))
                    chains[f"{kv} {name}"] = Chain(job, q, max(32, small))
            times = interleaved(chains, args.rounds)
            base = times["mlx fp16"]
            for name, chain in chains.items():
                single = statistics.median(chain.single() for _ in range(9))
                bits = 16.0 if name.startswith("mlx") else 4.5
                rate = 2 * depth * heads * dim * bits / 8 / times[name]
                print(
                    f"{shape:>9} {depth:>7} {name:<28} {1e6 * times[name]:8.1f} us "
                    f"{base / times[name]:6.2f}x  {rate / 1e12:5.2f} TB/s  single {1e6 * single:7.1f} us",
                    flush=True,
                )
            chains.clear()
            mx.clear_cache()


def _plan(per_split: int, warps: int) -> Callable[..., dict[str, Any]]:
    def options(depth: int, heads: int, tokens: int, repeats: int) -> dict[str, Any]:
        pages = max(1, depth // tokens)
        per = min(per_split, pages)
        n = -(-pages // per)
        return {"plan": SplitPlan(per, n, 256, n, n, warps)}

    return options


VARIANTS: dict[str, Callable[..., dict[str, Any]]] = {
    "auto": lambda *_: {},
    "ordered": lambda *_: {"ordered": True},
    "2 pages 4 warps": _plan(2, 4),
    "4 pages 4 warps": _plan(4, 4),
    "8 pages 4 warps": _plan(8, 4),
    "8 pages 8 warps": _plan(8, 8),
}

if __name__ == "__main__":
    main()
    sys.stdout.flush()
    json.dumps({})

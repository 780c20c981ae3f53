"""What one decode step's attention costs in each tier, beside MLX's own fp16 attention.

The physics first. A decode step reads every key and value once, so its floor is bytes over
bandwidth: memory bandwidth for hot and warm pages, the disk's read rate for cold ones. A K4V4 page
has 4.5 bits per number where fp16 has 16, so a kernel that is bound by bytes could be 3.56 times
faster than fp16. The composed backends here are not: they write dequantized pages to memory and
read them again. This benchmark says by how much, and is the yardstick for a fused kernel.

One layer, one query token, random numbers; every row is measured in the same run, interleaved, and
the median of the repeats is kept. Sealing is timed per vector of 128 numbers.

    python benchmarks/decode.py [--depths 4096 16384 65536] [--heads 32 --kv-heads 8 --dim 128]

Prints a table, and one line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

import pagedkv
from pagedkv.attention import attend, stock_attention
from pagedkv.backends import DequantizeBackend, QuantizedBackend

LADDERS = ("fp16", "K8V4", "K4V4", "K2V2")


def fill(config: pagedkv.TierConfig, depth: int, heads: int, dim: int, dtype: mx.Dtype) -> Any:
    """A one-layer cache with `depth` random tokens, and the seconds that sealing them took."""
    cache = pagedkv.PagedCache.standalone(1, config)
    layer, chunk, seconds = cache[0], 2048, 0.0
    for start in range(0, depth, chunk):
        n = min(chunk, depth - start)
        keys = mx.random.normal((1, heads, n, dim)).astype(dtype)
        values = mx.random.normal((1, heads, n, dim)).astype(dtype)
        mx.eval(keys, values)
        layer.append(keys, values)
        mx.eval(*layer._hot.arrays)
        started = time.perf_counter()
        layer._settle()
        seconds += time.perf_counter() - started
    return cache, seconds


def interleaved(jobs: dict[str, Callable[[], mx.array]], repeats: int) -> dict[str, float]:
    """Median seconds per job; each round runs all of them."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 2):
        for name, job in jobs.items():
            started = time.perf_counter()
            mx.eval(job())
            mx.synchronize()
            if turn >= 2:  # the first rounds warm up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def usable(job: Callable[[], mx.array]) -> bool:
    """Whether this device implements what the job needs."""
    try:
        mx.eval(job())
    except (RuntimeError, ValueError):
        return False
    return True


def measure(depth: int, args: argparse.Namespace, dtype: mx.Dtype) -> list[dict[str, Any]]:
    """All rows of one depth."""
    heads, kv_heads, dim = args.heads, args.kv_heads, args.dim
    q = mx.random.normal((1, heads, 1, dim)).astype(dtype)
    keys = mx.random.normal((1, kv_heads, depth, dim)).astype(dtype)
    values = mx.random.normal((1, kv_heads, depth, dim)).astype(dtype)
    mx.eval(q, keys, values)
    scale = dim**-0.5
    jobs: dict[str, Callable[[], mx.array]] = {
        "mlx fp16": lambda: stock_attention(q, keys, values, scale=scale)
    }
    caches, seal = [], {}
    for kv in LADDERS:
        config = pagedkv.TierConfig(kv=kv, warm="16GB", cold=0)
        cache, seconds = fill(config, depth, kv_heads, dim, dtype)
        caches.append(cache)
        sealed = cache.stats().warm.tokens * kv_heads * 2 * dim / 128
        seal[f"{kv} warm dequantize"] = 1e9 * seconds / sealed if sealed else 0.0
        for backend in (DequantizeBackend(), QuantizedBackend()):
            view = cache[0].view()
            jobs[f"{kv} warm {backend.name}"] = lambda v=view, b=backend: attend(
                v, q, scale, None, None, b
            )
    page = pagedkv.PageGeometry(
        pagedkv.KVShape(kv_heads, dim, dim), 256, pagedkv.Precision(4, 4)
    ).page_bytes
    cold, _ = fill(
        pagedkv.TierConfig(kv="K4V4", page_tokens=256, warm=2 * page, cold="16GB"),
        depth,
        kv_heads,
        dim,
        dtype,
    )
    caches.append(cold)
    cold_view = cold[0].view()
    jobs["K4V4 cold dequantize"] = lambda: attend(
        cold_view, q, scale, None, None, DequantizeBackend()
    )
    jobs = {name: job for name, job in jobs.items() if usable(job)}
    times = interleaved(jobs, args.repeats)
    rows = [
        {
            "depth": depth,
            "what": name,
            "microseconds": round(1e6 * seconds, 1),
            "times_fp16": round(times["mlx fp16"] / seconds, 3),
            "seal_ns_per_vector": round(seal[name], 1) if name in seal else None,
        }
        for name, seconds in times.items()
    ]
    for cache in caches:
        cache.close()
    mx.clear_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    gpu = mx.default_device() == mx.gpu
    dtype = mx.float16 if gpu else mx.float32  # 16-bit products are slow on MLX's CPU
    rows = [row for depth in args.depths for row in measure(depth, args, dtype)]
    print(f"{'depth':>7}  {'what':<24} {'us':>10} {'x fp16':>7} {'seal ns/vector':>15}")
    for row in rows:
        seal = row["seal_ns_per_vector"]
        print(
            f"{row['depth']:>7}  {row['what']:<24} {row['microseconds']:>10} "
            f"{row['times_fp16']:>7} {'' if seal is None else seal:>15}"
        )
    machine = {
        "device": str(mx.device_info().get("device_name", platform.processor())) if gpu else "cpu",
        "mlx": mx.__version__,
        "pagedkv": pagedkv.__version__,
        "dtype": str(dtype),
        "shape": [args.heads, args.kv_heads, args.dim],
    }
    print(json.dumps({"benchmark": "decode", "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()

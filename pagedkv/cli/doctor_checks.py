"""What `pagedkv doctor` looks at, one function per row or two."""

from __future__ import annotations

import math
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil

import pagedkv
from pagedkv.allocator import KVShape, Precision
from pagedkv.attn.backends import choose_backend
from pagedkv.attn.driver import attend
from pagedkv.attn.fused import self_check as kernel_check
from pagedkv.cache.paged_cache import PagedCache
from pagedkv.cli.disk import measure_disk
from pagedkv.cli.loading import has_gpu
from pagedkv.config.sizes import format_size
from pagedkv.config.tier_config import BACKENDS, TierConfig
from pagedkv.errors import PagedKVError
from pagedkv.integrations import blas
from pagedkv.integrations.releases import unsupported, version_of
from pagedkv.tiers import RealDisk, codec_for
from pagedkv.tiers.arrays import evaluated
from pagedkv.tools.stress.tolerance import Tolerance

OK, WARN, FAIL = "ok", "warn", "fail"

_LEAST_READ_RATE = 500e6  # bytes per second: what any NVMe disk does, and others do not
_PRODUCT_ERROR = 1e-2  # of sums of 768 products in float32, numbers being of size 1
_ATTENTION_ERROR = 2e-3  # of 16-bit outputs and float32 sums, values being of size 1


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        name: what was looked at.
        status: ``"ok"``, ``"warn"`` or ``"fail"``.
        value: what was found.
        hint: what to do about it; empty if nothing.
    """

    name: str
    status: str
    value: str
    hint: str = ""


def check_versions() -> Iterator[Row]:
    """Of Python and the packages."""
    yield Row("python", OK, f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield Row("pagedkv", OK, pagedkv.__version__)
    yield Row("numpy", OK, version_of("numpy") or "without a version")
    for package, upgrade in (("mlx", "--upgrade pagedkv"), ("mlx-lm", "'pagedkv[lm]'")):
        found = version_of(package)
        if problem := unsupported(package):
            yield Row(package, FAIL, str(found), f"{problem}: pip install {upgrade}")
        elif found or package == "mlx":
            yield Row(package, OK, found or "without a version")
        else:
            yield Row(package, WARN, "not installed", f"to run models: pip install {upgrade}")


def check_device(config: TierConfig) -> Iterator[Row]:
    """Where MLX computes, and with which backend and BLAS."""
    metal, cuda = mx.metal.is_available(), mx.cuda.is_available()
    kinds = ", ".join(
        f"{name} {'available' if there else 'not available'}"
        for name, there in (("Metal", metal), ("CUDA", cuda))
    )
    device = str(mx.default_device()).removeprefix("Device(").split(",")[0]
    if has_gpu():
        yield Row("device", OK, f"{device} ({kinds})")
    else:
        yield Row(
            "device", WARN, f"{device} ({kinds})", "everything works on a CPU, in float32, slowly"
        )
    chosen = choose_backend(config.backend).name
    yield Row("backend", OK, f"{chosen} (--backend {config.backend})")
    if sys.platform == "linux" and not has_gpu():
        yield _check_blas()


def _check_blas() -> Row:
    """Which BLAS serves MLX on a Linux CPU, whether it computes right, and how fast."""
    rate, error = _matrix_products()
    speed = f"{rate / 1e9:.0f} GFLOP/s in float32"
    libraries = ", ".join(blas.in_use())
    if error > _PRODUCT_ERROR:
        value = f"{libraries or 'MLX'}: products are wrong by {error:.2g}"
        return Row("BLAS", FAIL, value, "PAGEDKV_OPENBLAS=0 leaves MLX its own; please report it")
    if libraries:
        return Row("BLAS", OK, f"{libraries}: {speed}")
    hint = blas.problem or "PAGEDKV_OPENBLAS=0 is set, or MLX was imported before pagedkv"
    return Row("BLAS", WARN, f"MLX's reference BLAS: {speed}", f"no OpenBLAS is used: {hint}")


def _matrix_products(n: int = 768) -> tuple[float, float]:
    """Floating-point operations per second of a float32 product, and its error beside float64."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((n, n), np.float32) for _ in range(2))
    left, right = mx.array(a), mx.array(b)
    best = math.inf
    for _ in range(4):  # the first one starts threads, and others may use the machine
        started = time.perf_counter()
        product = left @ right
        mx.eval(product)
        best = min(best, time.perf_counter() - started)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    return 2 * n**3 / best, float(np.abs(np.asarray(product) - exact).max())


def check_memory(config: TierConfig) -> Iterator[Row]:
    """Whether the budgets that must be in memory are there."""
    memory, budget = psutil.virtual_memory(), config.budget()
    value = f"{format_size(memory.total)}, {format_size(memory.available)} available"
    needed = budget.warm_bytes + budget.staging_bytes + budget.write_buffer_bytes
    needed += budget.scratch_bytes
    if needed <= memory.available:
        yield Row("memory", OK, value)
    else:
        yield Row(
            "memory",
            WARN,
            value,
            f"the budgets take {format_size(needed)}: lower --warm {config.warm}",
        )


def check_disk(config: TierConfig) -> Iterator[Row]:
    """Free space, uncached I/O and speed of the cold directory."""
    where = config.cold_dir or tempfile.gettempdir()
    try:
        rate = measure_disk(config.cold_dir)
        free = RealDisk().free_space(Path(where))
    except (PagedKVError, OSError) as e:
        yield Row("cold directory", FAIL, where, " ".join(str(e).split()))
        return
    cold = config.budget().cold_bytes
    space = f"{where}: {format_size(free)} free"
    if cold <= free:
        yield Row("cold directory", OK, space)
    else:
        hint = f"--cold {config.cold} is more than is free: lower it, or choose another --cold-dir"
        yield Row("cold directory", WARN, space, hint)
    if rate.uncached:
        yield Row("uncached I/O", OK, "O_DIRECT" if sys.platform == "linux" else "F_NOCACHE")
    else:
        hint = (
            "this file system reads through the page cache, whose memory the budgets do not count"
        )
        yield Row("uncached I/O", WARN, "not available", hint)
    speed = f"{format_size(rate.write_rate)}/s written, {format_size(rate.read_rate)}/s read"
    if rate.read_rate >= _LEAST_READ_RATE:
        yield Row("disk speed", OK, speed)
    else:
        yield Row("disk speed", WARN, speed, "slower than an NVMe disk: name one with --cold-dir")


def check_codecs() -> Iterator[Row]:
    """Each precision: encode, decode, and compare with what went in."""
    shape, tokens = KVShape(2, 64, 64), 256
    rng = np.random.default_rng(0)
    keys, values = (rng.standard_normal((2, tokens, 64), np.float32) for _ in range(2))
    for name in ("K8V8", "K8V4", "K4V4", "K3V3", "K2V2", "fp16"):
        precision = Precision.parse(name)
        codec = codec_for(shape, tokens, precision, mx.float16)
        record = codec.encode(mx.array(keys), mx.array(values))
        got = (
            codec.keys(record, mx.float32)[0].swapaxes(1, 2),
            codec.values(record, mx.float32)[0],
        )
        tolerance = Tolerance((precision,), codec.geometry.value_group)
        limits = (tolerance.keys(keys), tolerance.values(values))
        errors = [
            np.abs(np.array(evaluated(g)) - x) for g, x in zip(got, (keys, values), strict=True)
        ]
        worst = max(float((e / limit).max()) for e, limit in zip(errors, limits, strict=True))
        value = f"largest error {max(float(e.max()) for e in errors):.2g}, {worst:.0%} of its limit"
        yield Row(f"codec {name}", *_verdict(worst <= 1, value))


def check_backends(config: TierConfig) -> Iterator[Row]:
    """Each backend: attention over hot and warm tokens beside float64."""
    chosen = choose_backend(config.backend).name
    options = [option for option in BACKENDS if option != "kernel" or has_gpu()]
    for name, option in {choose_backend(b).name: b for b in options}.items():
        try:
            error = _attention_error(option)
        except Exception as e:  # a backend may fail in any way; the row says how
            reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            if name == chosen:
                yield Row(f"attention {name}", FAIL, reason, "choose another with --backend")
            else:
                yield Row(f"attention {name}", WARN, reason, f"not needed: {chosen} is used here")
            continue
        value = f"largest error {error:.2g} beside float64"
        yield Row(f"attention {name}", *_verdict(error <= _ATTENTION_ERROR, value))
    for kernel, reason in kernel_check.results.items():
        name = kernel.removeprefix("pagedkv_").rpartition("_")[0].replace("_", " ")
        if reason:
            yield Row(f"kernel {name}", WARN, reason, "plain MLX takes its place: report it")
        else:
            yield Row(f"kernel {name}", OK, "agrees with plain MLX")


def _verdict(well: bool, value: str) -> tuple[str, str, str]:
    if well:
        return OK, value, ""
    return FAIL, value, "wrong results: please report it, with this table"


def _attention_error(backend: str) -> float:
    """Largest error of one query token over 600 tokens, 8 query heads on 2 KV heads of 64."""
    config = TierConfig(
        hot_tokens=64, sink_tokens=4, page_tokens=256, warm="8MB", cold=0, backend=backend
    )
    rng = np.random.default_rng(1)
    keys, values = (
        mx.array(rng.standard_normal((1, 2, 600, 64), np.float32)).astype(mx.float16)
        for _ in range(2)
    )
    # The kernels are made for 16-bit models; the others are measured without that rounding.
    dtype = mx.float16 if choose_backend(backend).name == "kernel" else mx.float32
    q = mx.array(rng.standard_normal((1, 8, 1, 64), np.float32)).astype(dtype)
    with PagedCache.standalone(1, config) as cache:
        layer = cache[0]
        layer.append(keys[:, :, :599], values[:, :, :599])
        view = layer.append(keys[:, :, 599:], values[:, :, 599:])
        out = attend(view, q, 0.125, backend=choose_backend(backend))
        dense = view.dense(mx.float32)
        k, v = (np.array(evaluated(x[0])).astype(np.float64) for x in dense)
        got, queries = (np.array(evaluated(x[0].astype(mx.float32))) for x in (out, q))
    return float(np.abs(got - _exact(queries, k, v, 0.125)).max())


def _exact(q: Any, keys: Any, values: Any, scale: float) -> Any:
    """Attention in float64: q ``[query_heads, 1, d]``, keys and values ``[kv_heads, n, d]``."""
    repeats = q.shape[0] // keys.shape[0]
    keys, values = np.repeat(keys, repeats, axis=0), np.repeat(values, repeats, axis=0)
    scores = scale * q.astype(np.float64) @ keys.swapaxes(1, 2)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (p / p.sum(axis=-1, keepdims=True)) @ values

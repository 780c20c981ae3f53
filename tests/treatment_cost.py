"""What a treatment costs: decode attention with and without it, in turns, on a GPU.

The matrices differ from layer to layer, as those of a model do, so that none is found in the
processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pagedkv.attn.fused import self_check as kernel_check
from pagedkv.tools.bench.contenders import Contender, Place, paged
from pagedkv.tools.bench.settings import AttentionShape, BenchSettings
from pagedkv.tools.bench.timing import Chain, Sample, chain_lengths

SHAPES = ("32/8x128", "9/3x64")
DEPTH, ROUNDS, WARM_UP = 32 * 1024, 30, 3
PRECISION = "K4V4"

LAYER_SECONDS, SHARE = 200e-6, 0.03
"""What a layer of an 8B model takes in a decode step at that depth; what may come on top."""


@dataclass(frozen=True)
class Matrices:
    """All of a treatment that decode attention needs."""

    words: mx.array


def matrices(shape: AttentionShape, seed: int) -> Matrices:
    """Random rotations, for queries and for outputs."""
    rng = np.random.default_rng(seed)
    x = np.linalg.qr(rng.standard_normal((2 * shape.kv_heads, shape.dim, shape.dim)))[0]
    words = mx.array(x.astype(np.float16).reshape(-1).view(np.uint32))
    mx.eval(words)
    return Matrices(words)


def _contender(place: Place, treated: bool) -> Contender:
    contender = paged(place, PRECISION)
    assert contender is not None
    if treated:
        for seed, cache in enumerate(contender.caches):
            pager = cache[0]._pager
            assert pager is not None
            pager.treatment = matrices(place.shape, seed)
    return contender


def measure(shape: AttentionShape, depth: int, rounds: int) -> tuple[Sample, Sample, Sample]:
    """Seconds per call: plain, treated, and by how much the second of a round was longer."""
    place = Place(shape, depth, mx.float16, BenchSettings(shuffled=False))
    q = mx.random.normal((1, shape.query_heads, 1, shape.dim)).astype(place.dtype)
    mx.eval(q)
    contenders = [_contender(place, treated) for treated in (False, True)]
    chains = [Chain(c.calls, q) for c in contenders]
    length = min(chain_lengths(chains, [chain.call_seconds() for chain in chains]))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(WARM_UP + rounds):
        for i in (0, 1) if turn % 2 else (1, 0):
            _, seconds = chains[i].run(length)
            if turn >= WARM_UP:
                times[i].append(seconds / length)
    for contender in contenders:
        contender.close()
    more = [treated - plain for plain, treated in zip(*times, strict=True)]
    return Sample.of(times[0]), Sample.of(times[1]), Sample.of(more)


def cost(shapes: Sequence[str] = SHAPES, depth: int = DEPTH, rounds: int = ROUNDS) -> bool:
    """Measure and print; whether a treatment is as cheap as it has to be."""
    cheap = True
    for name in shapes:
        plain, treated, more = measure(AttentionShape.parse(name), depth, rounds)
        fits = more.median <= SHARE * LAYER_SECONDS
        cheap &= fits
        texts = [
            f"{what} {1e6 * s.median:.2f} us ({1e6 * s.p10:.2f} to {1e6 * s.p90:.2f})"
            for what, s in (("plain", plain), ("treated", treated), ("more", more))
        ]
        share = f"{100 * more.median / LAYER_SECONDS:.2f} % of {1e6 * LAYER_SECONDS:.0f} us"
        verdict = "ok" if fits else "TOO MUCH"
        print(f"{verdict} {name} at {depth}: {', '.join(texts)}: {share}", flush=True)
    unused = {name: reason for name, reason in kernel_check.results.items() if reason}
    if unused:
        print(f"kernels that are not used: {unused}")
    return cheap and not unused

"""What sealing costs: quantizing pages that left the hot window, per vector of 128 numbers."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from pagedkv.allocator import KVShape
from pagedkv.cache.paged_cache import PagedCache
from pagedkv.tools.bench.caches import append_and_seal, budgeted, own, random_tokens, release
from pagedkv.tools.bench.result import Row, failed, first_words, succeeded
from pagedkv.tools.bench.settings import BenchSettings
from pagedkv.tools.bench.subject import Subject
from pagedkv.tools.bench.timing import Sample
from pagedkv.tools.bench.yardstick import YardstickMeter, call_limit, roofline_fields

VECTOR = 128
"""Numbers in a vector, as sealing is counted."""

WARM_UP_CHUNKS = 2


class _Sealer:
    """One precision's cache, sealed chunk by chunk; times are seconds per vector."""

    def __init__(self, kv: str, shape: KVShape, tokens: int, settings: BenchSettings) -> None:
        config = budgeted(replace(settings.tiers, kv=kv), shape, 1, tokens)
        self.cache = PagedCache.standalone(1, config)
        self.kv, self._shape = kv, shape
        self.times: list[float] = []
        self.vectors_per_call = 0.0

    def chunk(self, keys: mx.array, values: mx.array, keep: bool) -> None:
        """Append a chunk, and time what it pushes out of the window."""
        seconds, sealed = append_and_seal(self.cache[0], own(keys), own(values))
        if keep and sealed:
            self.vectors_per_call = sealed * _vectors(self._shape)
            self.times.append(seconds / self.vectors_per_call)

    @property
    def bytes_per_vector(self) -> float:
        """Bytes read in 16 bit (or what the hot tier has) and written as a page."""
        layer = self.cache[0]
        view = layer.view()
        pages = sum(layer.page_bytes(page.precision) for page, _ in layer.located_pages())
        read = self._shape.token_bytes(layer.hot_bits)
        return float(read + pages / max(1, view.paged_tokens)) / _vectors(self._shape)


def _vectors(shape: KVShape) -> float:
    """Vectors of 128 numbers in a token."""
    return shape.kv_heads * (shape.key_dim + shape.value_dim) / VECTOR


def seal_tokens(settings: BenchSettings) -> int:
    """Tokens that `measure_seal` goes through."""
    return (WARM_UP_CHUNKS + settings.rounds) * settings.chunk


def measure_seal(subject: Subject, settings: BenchSettings) -> list[Row]:
    """Time the sealing of a layer's pages at each precision, chunk by chunk, in turns.

    Args:
        subject: the model whose first layer's shape is taken.
        settings: precisions, rounds (one chunk each), chunk, tiers.

    Returns:
        A row for each precision.
    """
    name, shape, dtype = subject.name, subject.shapes[0], subject.dtype
    count, tokens = WARM_UP_CHUNKS + settings.rounds, seal_tokens(settings)
    meter = YardstickMeter(settings.copy_bytes)
    rows: list[Row] = []
    sealers: list[_Sealer] = []
    for kv in settings.kv:
        try:
            sealers.append(_Sealer(kv, shape, tokens, settings))
        except Exception as e:
            rows.append(failed(_base(name, tokens, kv), f"does not run: {first_words(e)}"))
    for i in range(count):
        keys, values = random_tokens(shape, i * settings.chunk, settings.chunk, dtype)
        meter.round()
        for sealer in sealers:
            sealer.chunk(keys, values, keep=i >= WARM_UP_CHUNKS)
    rows += [_row(sealer, name, tokens, meter) for sealer in sealers]
    for sealer in sealers:
        sealer.cache.close()
    release()
    return rows


def _base(name: str, tokens: int, kv: str) -> Row:
    return {"part": "seal", "model": name, "depth": tokens, "what": kv}


def _row(sealer: _Sealer, name: str, tokens: int, meter: YardstickMeter) -> Row:
    row = _base(name, tokens, sealer.kv)
    if not sealer.times:
        return failed(row, "no page left the hot window: raise --chunk or --rounds")
    time, yard = Sample.of(sealer.times), meter.result()
    nbytes, vectors = sealer.bytes_per_vector, sealer.vectors_per_call
    return succeeded(
        {
            **row,
            **time.fields("ns_per_vector", 1e9),
            **roofline_fields(time.median, nbytes, yard, "ns", 1e9),
            "limit": call_limit(time.median * vectors, nbytes * vectors, yard),
            "rounds": time.count,
        }
    )

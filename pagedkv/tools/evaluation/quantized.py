"""mlx-lm's quantized cache, also where MLX has no product of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from pagedkv.cache.nested import replaced, streams
from pagedkv.errors import ConfigError
from pagedkv.tools.bench.contenders import QUANTIZED_GROUP
from pagedkv.tools.bench.result import first_words

TRIED = (9, 1)
"""Tokens of the calls that show whether the product runs: a prompt's and a decode step's."""


class Dequantized:
    """What mlx-lm's `QuantizedKVCache` stores, handed out as plain arrays.

    The rounding of keys and values is the same; attention over them is MLX's own, with products of
    whole numbers in place of quantized ones.
    """

    def __init__(self, bits: int) -> None:
        """Make an empty cache of so many bits, in groups of 64."""
        from mlx_lm.models.cache import QuantizedKVCache

        self.stored: Any = QuantizedKVCache(QUANTIZED_GROUP, bits)
        self._bits = bits  # a cache with `bits` would get the quantized product

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Quantize and append; returns all keys and values, dequantized."""
        pair = self.stored.update_and_fetch(keys, values)
        first, second = (self._plain(*part) for part in pair)
        return first, second

    def _plain(self, codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return mx.dequantize(codes, scales, biases, group_size=QUANTIZED_GROUP, bits=self._bits)

    @property
    def offset(self) -> int:
        """Tokens held."""
        return int(self.stored.offset)

    @property
    def state(self) -> Any:
        """For evaluation."""
        return self.stored.state

    def make_mask(self, *args: Any, **options: Any) -> Any:
        """As mlx-lm's caches do."""
        return self.stored.make_mask(*args, **options)


def quantized_caches(model: Any, bits: int, dequantized: bool) -> list[Any]:
    """Empty caches as mlx-lm's ``--kv-bits`` makes them, all layers quantized from the beginning.

    Raises:
        ConfigError: if the model has caches that mlx-lm does not quantize.
    """
    from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

    caches = list(make_prompt_cache(model))
    strangers = sorted({type(c).__name__ for c in streams(caches) if type(c) is not KVCache})
    if strangers:
        raise ConfigError(f"mlx-lm quantizes plain KV caches, and here are {', '.join(strangers)}")
    if dequantized:
        return replaced(caches, lambda _, __: Dequantized(bits))
    return replaced(caches, lambda _, __: QuantizedKVCache(QUANTIZED_GROUP, bits))


def product_fails(model: Any, bits: int) -> str:
    """Why attention over mlx-lm's quantized cache does not run here; empty if it does."""
    try:
        caches = quantized_caches(model, bits, dequantized=False)
        for tokens in TRIED:
            mx.eval(model(mx.zeros((1, tokens), mx.int32), cache=caches))
    except Exception as e:
        return first_words(e)
    return ""


def stored_in(caches: Sequence[Any]) -> list[Any]:
    """The caches that hold the numbers, in order, for counting bytes."""
    return [c.stored if isinstance(c, Dequantized) else c for c in streams(caches)]

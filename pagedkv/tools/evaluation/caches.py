"""The caches that a text is read with, and the bytes they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx

from pagedkv.cache import sdpa_hook as hook
from pagedkv.cache.nested import streams
from pagedkv.cache.paged_cache import PagedCache
from pagedkv.integrations.mlx_lm.wrapping import unwrap, wrap
from pagedkv.tools.bench.settings import short_dtype
from pagedkv.tools.evaluation.quantized import product_fails, quantized_caches, stored_in
from pagedkv.tools.evaluation.variants import Variant


@contextmanager
def opened(variant: Variant, model: Any) -> Iterator[list[Any]]:
    """Empty caches of a variant, one per layer; several may be open at a time.

    The model runs over them while it is not wrapped and `hooked`.

    Raises:
        ConfigError: if the model's layers cannot have such caches.
    """
    if variant.config is None:
        yield stock_caches(variant, model)
        return
    cache = wrap(model, variant.config)
    unwrap(model)
    with cache:
        yield cache


@contextmanager
def hooked() -> Iterator[None]:
    """Let attention calls reach caches of ours; those over others go to MLX as ever."""
    hook.install()
    try:
        yield
    finally:
        hook.uninstall()


def own_caches(model: Any) -> list[Any]:
    """Empty caches as mlx-lm makes them, in 16 bit."""
    from mlx_lm.models.cache import make_prompt_cache

    return list(make_prompt_cache(model))


def stock_caches(variant: Variant, model: Any) -> list[Any]:
    """Empty caches of mlx-lm's own kinds."""
    if variant.bits is None:
        return own_caches(model)
    return quantized_caches(model, variant.bits, variant.dequantized)


def as_it_runs(variant: Variant, model: Any) -> Variant:
    """The variant; if MLX has no product for it here, with another one, and a note of that."""
    if variant.bits is None:
        return variant
    why = product_fails(model, variant.bits)
    if not why:
        return variant
    note = f"attended dequantized, since the quantized product does not run: {why}"
    return replace(variant, dequantized=True, note=note)


@dataclass(frozen=True)
class Own:
    """What one token shows of a model's own cache.

    Attributes:
        label: of its rows: mlx-lm, and the type of its keys.
        token_bytes: that a token takes in all layers together.
        vocabulary: of the model.
    """

    label: str
    token_bytes: int
    vocabulary: int

    @classmethod
    def of(cls, model: Any) -> Own:
        """Look at a model; nothing is computed."""
        caches = own_caches(model)
        logits = model(mx.array([[1]]), cache=caches)
        nbytes, dtype = token_bytes(caches)
        return cls(f"mlx-lm {short_dtype(dtype or logits.dtype)}", nbytes, int(logits.shape[-1]))


@dataclass(frozen=True)
class Footprint:
    """What caches take for the tokens they hold, scales, biases, padding and 16-bit tokens with it.

    Attributes:
        cache_bytes: all layers; room for tokens to come is not counted.
        fp16_bytes: the same tokens in a 16-bit cache.
        bytes_per_token: `cache_bytes` over the tokens.
        bits: per number of keys and values.
        pages: in all layers; None if the cache is not paged.
        layers: how many are of which kind, as ``stats().layers`` tells them; empty if it is not.
        layer_kv: layers with another ladder, as `TierConfig.layer_kv` names them, likewise.
    """

    cache_bytes: int
    fp16_bytes: int
    bytes_per_token: float
    bits: float
    pages: int | None = None
    layers: str = ""
    layer_kv: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Entries of a row."""
        return asdict(self)

    @classmethod
    def of(cls, caches: Sequence[Any], tokens: int) -> Footprint:
        """Measure caches; those of layers that hold no keys count as they are.

        Args:
            caches: of any variant.
            tokens: that were fed.
        """
        if isinstance(caches, PagedCache):
            stats = caches.stats()
            held = stats.hot.bytes + stats.warm.bytes + stats.cold.bytes
            fp16, bits = stats.fp16_bytes, stats.bits_per_element
            fixed = sum(map(_nbytes, caches.context.others))
            pages: int | None = stats.warm.pages + stats.cold.pages
            layers = ", ".join(f"{n} {kind}" for kind, n in Counter(stats.layers).items())
            layer_kv = caches.context.settled.layer_kv
        else:
            held_in = stored_in(caches)
            keyed = [c for c in held_in if _elements(c)]
            held = sum(map(_held_bytes, keyed))
            elements = sum(map(_elements, keyed))
            fp16, bits = 2 * elements, 8 * held / max(1, elements)
            fixed = sum(_nbytes(c) for c in held_in if not _elements(c))
            pages, layers, layer_kv = None, "", ""
        each = (held + fixed) / tokens
        return cls(held + fixed, fp16 + fixed, each, bits, pages, layers, layer_kv)


def token_bytes(caches: Sequence[Any]) -> tuple[int, mx.Dtype | None]:
    """What a token takes in mlx-lm's own caches, and the type of its keys; they may be lazy.

    Args:
        caches: that hold at least one token.

    Returns:
        Bytes in all layers together, and the type; None if there are no keys.
    """
    parts = [part for cache in streams(caches) for part in _parts(cache)]
    nbytes = sum(int(part.shape[1] * part.shape[3]) * part.dtype.size for part in parts)
    return nbytes, parts[0].dtype if parts else None


def _nbytes(cache: Any) -> int:
    return int(getattr(cache, "nbytes", 0))


def _elements(cache: Any) -> int:
    """Numbers that one of mlx-lm's caches holds as keys and values; 0 if it is of another kind."""
    bits = getattr(cache, "bits", None)
    width = 0
    for part in _parts(cache):
        width += int(part.shape[1] * part.shape[3]) * (32 if bits else 1) // (bits or 1)
    return width * _tokens(cache) if width else 0


def _held_bytes(cache: Any) -> int:
    """Bytes of its tokens, without the room for more that it has taken already."""
    room = _parts(cache)[0].shape[2]
    return int(cache.nbytes * _tokens(cache) // room)


def _tokens(cache: Any) -> int:
    return int(min(cache.offset, _parts(cache)[0].shape[2]))


def _parts(cache: Any) -> tuple[mx.array, ...]:
    """Keys and values, of a quantized cache their codes; empty if there are none."""
    keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
    if keys is None or values is None:
        return ()
    return tuple(part[0] if isinstance(part, (list, tuple)) else part for part in (keys, values))

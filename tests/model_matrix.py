"""What is done to every model type with a paged cache and with mlx-lm's own, side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

import pagedkv
from pagedkv.allocator import KVShape, PageGeometry, Precision
from pagedkv.cache.nested import replaced, streams
from pagedkv.tiers.codec.affine import codec_for
from tests.vlm_package import load

WINDOWS = (24, 1, 1, 5, 1, 1, 87, 136)
"""Chunks and steps to 256 tokens: below windows of 32, over their edge one by one, far past it."""

PREFILL = (*WINDOWS, 256, 24)
"""Chunks of the prompt: two pages of 256 tokens are out of a window of 16 then."""

LONG_PREFILL = (256, 256, 24)
"""The same context in chunks that are all longer than a window."""

SHORT_PREFILL = (*WINDOWS, 8)
"""Where nothing is sealed: past every window and chunk, and past the first 256 hot tokens."""

PAGES = 2
TRIMMED = 150
"""Tokens that are taken back: into the middle of the second page."""

SINKS, HOT = 4, 16

PLAIN = ("KVCache", "HyV4KVCache")
"""Classes of mlx-lm and mlx-vlm that keep every token, and nothing else."""

CHUNKED = ("ChunkedKVCache", "PagedChunkedKVCache")


def logits_of(output: Any) -> mx.array:
    """The logits of a call: mlx-vlm's models return them with other things."""
    return getattr(output, "logits", output)  # type: ignore[no-any-return]


def tokens(count: int, seed: int, vocabulary: int = 120) -> mx.array:
    """Random token numbers ``[1, count]``."""
    return mx.random.randint(0, vocabulary, (1, count), key=mx.random.key(seed))


def error(actual: mx.array, expected: mx.array) -> float:
    """How far logits are from others: their distance over what the others spread; NaN is 1e9."""
    finite = mx.isfinite(expected)
    a = mx.where(finite, actual, 0.0)
    b = mx.where(finite, expected, 0.0)
    spread = b - b.sum(axis=-1, keepdims=True) / finite.sum(axis=-1, keepdims=True)
    spread = mx.where(finite, spread, 0.0)
    ratio = mx.sqrt(mx.square(a - b).sum() / mx.square(spread).sum()).item()
    return float(ratio) if ratio == ratio else 1e9


def everything_hot() -> pagedkv.TierConfig:
    """Nothing is sealed, and hot tokens are float32 as the model is."""
    return pagedkv.TierConfig(hot_tokens=4096, hot_dtype="model", warm="64MB", cold=0)


def tiny_budgets(cache: pagedkv.PagedCache, kv: str = "K8V8") -> pagedkv.TierConfig:
    """One warm page per stream, the others on disk.

    Args:
        cache: an empty one of the model, for the shapes of its streams.
        kv: precision of the pages.
    """
    precision = Precision.parse(kv)
    pages = [
        PageGeometry(layer.shape, 256, precision).page_bytes
        for layer in cache.paged_layers
        if layer.shape is not None
    ]
    return pagedkv.TierConfig(
        hot_tokens=HOT, sink_tokens=SINKS, kv=kv, page_tokens=256, hot_dtype="model",
        warm=2 * len(cache.paged_layers) * max(pages, default=2**16), cold="64MB",
        staging="8MiB", write_buffer="1MiB",
    )  # fmt: skip


class OrderedCache(stock.RotatingKVCache):  # type: ignore[misc]
    """mlx-lm's ring, its tokens handed out from the oldest to the newest.

    Sums over tokens in another order differ in their last bits, and muse_spark makes more of it.
    """

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What a single token sees, and what layers that share keys see."""
        return _in_order(self, *super().keys_and_values())


def _in_order(ring: Any, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    if ring.offset > ring.max_size == keys.shape[2]:
        return ring._temporal_order(keys), ring._temporal_order(values)
    return keys, values


def stock_caches(model: Any) -> list[Any]:
    """The caches that a model of mlx-lm or mlx-vlm has without us."""
    if type(model).__module__.startswith("mlx_vlm"):
        return list(load("models.cache").make_prompt_cache(model))
    return list(stock.make_prompt_cache(model))


def ordered_caches(model: Any) -> list[Any]:
    """A model's own caches, windows in order."""

    def ordered(_: int, cache: Any) -> Any:
        if type(cache).__name__ != "RotatingKVCache":
            return cache
        if type(cache).__module__.startswith("mlx_vlm"):
            return _ordered_vlm(type(cache))(cache.max_size, cache.keep)
        return OrderedCache(cache.max_size, cache.keep)

    return replaced(stock_caches(model), ordered)


@cache
def _ordered_vlm(kind: type) -> type:
    """`OrderedCache` for mlx-vlm."""

    def update_and_fetch(self: Any, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return _in_order(self, *kind.update_and_fetch(self, keys, values))  # type: ignore

    def state(self: Any) -> tuple[mx.array, mx.array]:
        return _in_order(self, *kind.state.fget(self))  # type: ignore[attr-defined]

    members = {"update_and_fetch": update_and_fetch, "state": property(state)}
    return type("OrderedCache", (kind,), members)


class RoundedCache:
    """A plain cache, with the pages that ours would have sealed rounded in place.

    What a paged cache has to agree with closely, whatever its precision: it differs from it in
    the order of float32 operations only. `rounded_kind` mixes it into a library's own class.
    """

    def __init__(self, config: pagedkv.TierConfig) -> None:
        super().__init__()
        self.config = config
        self.sealed = config.sink_tokens  # where the next page begins

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Round the pages that have left the window, then append."""
        numbers = mx.issubdtype(keys.dtype, mx.floating)  # flags of tokens are left alone
        while numbers and self.offset - self.sealed - self.config.hot_tokens >= 256:
            page = slice(self.sealed, self.sealed + 256)
            rounded = _rounded(self.keys[0, :, page], self.values[0, :, page], self.config.kv)
            self.keys[0, :, page], self.values[0, :, page] = rounded
            self.sealed += 256
        return super().update_and_fetch(keys, values)  # type: ignore[no-any-return]

    def trim(self, n: int) -> int:
        """What is left of a page stays as it is, and the next page begins behind it."""
        n = super().trim(n)
        self.sealed = min(self.sealed, max(self.offset, self.config.sink_tokens))
        return n


def _rounded(keys: mx.array, values: mx.array, kv: str) -> tuple[mx.array, mx.array]:
    """A page's keys and values ``[kv_heads, 256, dim]`` as they come back from a record."""
    heads, _, key_dim = keys.shape
    shape = KVShape(heads, key_dim, max(1, values.shape[2]))
    codec = codec_for(shape, 256, Precision.parse(kv), mx.float32)
    if not values.shape[2]:
        record = codec.encode(keys, mx.zeros((heads, 256, 1)))
        return codec.keys(record, mx.float32)[0].swapaxes(1, 2), values
    record = codec.encode(keys, values)
    return (
        codec.keys(record, mx.float32)[0].swapaxes(1, 2),
        codec.values(record, mx.float32)[0],
    )


def rounded_caches(model: Any, config: pagedkv.TierConfig) -> list[Any]:
    """The same, those that are paged rounded as pages would be."""

    def rounded(_: int, cache: Any) -> Any:
        return _rounded_kind(type(cache))(config) if type(cache).__name__ in PLAIN else cache

    return replaced(ordered_caches(model), rounded)


@cache
def _rounded_kind(kind: type) -> type:
    return type("RoundedCache", (RoundedCache, kind), {})


Logits = dict[str, mx.array]


@dataclass
class Run:
    """One pass over a model.

    Attributes:
        logits: by the name of what was done.
        trimmable: whether the cache could forget tokens.
        reloaded: of the same step before and after saving and loading the cache.
    """

    logits: Logits
    trimmable: bool
    reloaded: list[tuple[mx.array, mx.array]]


def exercise(
    model: Any, cache: list[Any], folder: Path | None, prefill: Sequence[int] = PREFILL
) -> Run:
    """Prefill in chunks, decode, copy, trim, extend, go on with the copy, save and load.

    Nothing is trimmed in chunks: mlx-lm does it as far as the present chunk reaches, and the next
    chunk then begins elsewhere.

    Args:
        model: called with tokens and cache.
        cache: an empty one.
        folder: for saved caches; None saves none.
        prefill: tokens of each chunk of the prompt.
    """
    logits: Logits = {}
    for remembered in ("_position_ids", "_rope_deltas"):  # mlx-vlm forgets them with each prompt
        if hasattr(model, remembered):
            setattr(model, remembered, None)

    def step(name: str, given: mx.array, on: list[Any]) -> None:
        logits[name] = logits_of(model(given, cache=on))
        mx.eval(logits[name], [c.state for c in on])

    for i, count in enumerate(prefill):
        step(f"prefill {i}", tokens(count, seed=i), cache)
    for i in range(2):
        step(f"decode {i}", tokens(1, seed=10 + i), cache)
    twin = copy.deepcopy(cache)
    chunked = any(type(c).__name__ in CHUNKED for c in streams(cache))
    trimmable = stock.can_trim_prompt_cache(cache) and not chunked
    if trimmable:
        stock.trim_prompt_cache(cache, TRIMMED)
    step("extend", tokens(40, seed=20), cache)
    step("decode after", tokens(1, seed=21), cache)
    step("copy", tokens(3, seed=22), twin)
    step("decode beside the copy", tokens(1, seed=24), cache)
    reloaded = []
    for loaded in _saved_and_loaded(twin, folder) if folder else ():
        given = tokens(1, seed=23)
        mine = logits_of(model(given, cache=copy.deepcopy(twin)))
        reloaded.append((mine, logits_of(model(given, cache=loaded))))
        mx.eval(reloaded)
    return Run(logits, trimmable, reloaded)


def _saved_and_loaded(cache: list[Any], folder: Path) -> Iterator[list[Any]]:
    path = str(folder / "cache.safetensors")
    stock.save_prompt_cache(path, cache)
    yield stock.load_prompt_cache(path)
    if isinstance(cache, pagedkv.PagedCache) and cache.is_fully_paged:
        cache.save(path)
        yield stock.load_prompt_cache(path)


TOLERANCE = 2.5e-4
"""Distance between logits, as a share of how far they spread. Seen: at most 1.1e-5 with MLX's own
BLAS, and 1.4e-4 (muse_spark) with OpenBLAS, which sums otherwise for other numbers of rows."""

NOTICED = 8 * TOLERANCE
"""What one page of values that is off by a token changes, at least. Seen: 0.009 to 1.2."""


class wrapped:
    """A wrapped model for the time of a block, its caches closed afterwards."""

    def __init__(self, model: Any, config: pagedkv.TierConfig) -> None:
        self.model, self.cache = model, pagedkv.wrap(model, config)

    def __enter__(self) -> pagedkv.PagedCache:
        return self.cache

    def __exit__(self, *exc: object) -> None:
        for user in list(self.cache.context.pager.users):
            user.close()
        pagedkv.unwrap(self.model)


def require_right_pages(
    model: Any, config: pagedkv.TierConfig, prefill: Sequence[int], folder: Path | None = None
) -> Run:
    """Compare a context with pages, most of them on disk, with the model's own rounded caches.

    And see that a page that is off by a token would be noticed.

    Returns:
        What the paged caches gave.
    """
    plain = rounded_caches(model, config)
    rounded = exercise(model, plain, None, prefill)
    if (changed := broken(model, plain)) is not None:
        right = logits_of(model(tokens(1, seed=30), cache=copy.deepcopy(plain)))
        assert NOTICED < error(changed, right) < 1e9
    with wrapped(model, config) as cache:
        paged = exercise(model, cache, folder, prefill)
        used = [layer for layer in cache.paged_layers if not layer.empty()]
        # glm5_next of mlx-vlm has caches that its prompts alone are put into.
        whole = [layer for layer in used if layer.keeps_all and layer.offset == cache.offset]
        pages = [len(list(layer.located_pages())) for layer in whole]
        assert set(pages) <= {PAGES}
        if pages and len({layer.shape for layer in used}) == 1:  # budgets follow the largest
            assert cache.stats().cold.pages
    assert paged.trimmable == rounded.trimmable
    for name, logits in rounded.logits.items():
        assert (off := error(paged.logits[name], logits)) < TOLERANCE, (name, off)
    return paged


LONG_WINDOW = 600
"""Tokens of a window that has whole pages behind the newest 16."""


def has_windows(model: Any) -> bool:
    """Whether some of a model's own caches forget what lies behind a window or chunk."""
    return any(
        type(c).__name__ in (*CHUNKED, "RotatingKVCache") for c in streams(stock_caches(model))
    )


def require_pages_in_windows(model: Any) -> None:
    """Compare windows that are paged in 16 bit with the model's own, which hold such numbers."""
    config = pagedkv.TierConfig(
        hot_tokens=HOT, sink_tokens=SINKS, kv="fp16", page_tokens=256, warm="64MB", cold=0,
        layer_kv="same",
    )  # fmt: skip
    own = ordered_caches(model)
    for stream in streams(own):
        if type(stream).__name__ in HALVED:
            stream.update_and_fetch = _halved(stream.update_and_fetch)
    with wrapped(model, config) as cache:
        for i, count in enumerate((500, 1, 1, 400, 1, 3, 1)):
            given = tokens(count, seed=i)
            right = logits_of(model(given, cache=own))
            assert error(logits_of(model(given, cache=cache)), right) < 10 * TOLERANCE, i
        windows = [c for c in cache.paged_layers if not c.keeps_all and not c.empty()]
        assert windows and all(list(layer.located_pages()) for layer in windows)


HALVED = (*PLAIN, *CHUNKED, "OrderedCache")


def _halved(update: Any) -> Any:
    def half(x: mx.array) -> mx.array:
        return x.astype(mx.float16).astype(x.dtype)

    return lambda keys, values: update(half(keys), half(values))


def broken(model: Any, cache: list[Any]) -> mx.array | None:
    """Logits of a decode step with mlx-lm's cache, one page of its values moved by a token.

    What a test that compares logits has to notice. None if no stream is a plain `KVCache`.
    """
    twin = copy.deepcopy(cache)
    plain = [c for c in streams(twin) if isinstance(c, RoundedCache) and not c.empty()]
    plain = [c for c in plain if mx.issubdtype(c.keys.dtype, mx.floating)]
    for layer in plain:
        held = layer.values if layer.values.shape[3] else layer.keys  # an index, or a latent
        held[:, :, SINKS : SINKS + 256] = mx.roll(held[:, :, SINKS : SINKS + 256], 1, axis=2)
    return logits_of(model(tokens(1, seed=30), cache=twin)) if plain else None

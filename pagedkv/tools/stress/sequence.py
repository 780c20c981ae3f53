"""A cache that is driven by synthetic tokens, with what is known of its contents."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pagedkv.cache.paged_cache import PagedCache, attention
from pagedkv.config.tier_config import TierConfig
from pagedkv.sequence.layer import PagedLayerCache
from pagedkv.sequence.sequence import SequenceContext
from pagedkv.tiers import Disk, Pager, RealDisk
from pagedkv.tiers.arrays import evaluated
from pagedkv.tools.stress.exact import Truth
from pagedkv.tools.stress.tokens import Array, History, SyntheticTokens
from pagedkv.tools.stress.verify import asked, kv_heads

STORE_NAME = "pagedkv stress"


@dataclass
class Sequence:
    """One of the sequences of a run: the only one, but while there is a fork.

    Attributes:
        cache: its layers.
        truth: what they hold and must answer.
    """

    cache: PagedCache
    truth: Truth


def open_cache(layers: int, config: TierConfig, disk: Disk | None = None) -> PagedCache:
    """As `PagedCache.standalone`, on a given disk; with a ``cold_dir`` it can be resumed."""
    identity = config.store_identity(STORE_NAME, layers)
    pager = Pager(config.budget(), layers, disk=disk or RealDisk(), identity=identity)
    context = SequenceContext(config, pager, fingerprint=STORE_NAME)
    if pager.has_cold:
        pager.cold  # noqa: B018  # a bad directory shows here
    return PagedCache([PagedLayerCache(context, i) for i in range(layers)], context)


def append(
    tokens: SyntheticTokens,
    cache: PagedLayerCache,
    history: History,
    start: int,
    stop: int,
    made: tuple[Array, Array] | None = None,
) -> None:
    """Append tokens `start` to `stop` to a layer; `made` are their keys and values, if known."""
    keys, values = made or tokens.read(cache.layer, history, start, stop)
    cache.append(mx.array(keys[None]), mx.array(values[None]))
    mx.eval(cache.state)  # as mlx-lm does after each chunk


def ask(
    tokens: SyntheticTokens,
    cache: PagedLayerCache,
    keys: Array,
    values: Array,
    needles: Array,
) -> Array:
    """Append tokens, and let the last ones ask for needles.

    Args:
        tokens: of the run.
        cache: a layer.
        keys: ``[kv_heads, n, head_dim]``.
        values: likewise.
        needles: which one each head and row asks for, ``[query_heads, rows]``.

    Returns:
        ``[query_heads, rows, head_dim]``, float32.
    """
    # The queries are the same on every branch.
    planted = tokens.planted(cache.layer, History())
    q = mx.array(planted.queries[kv_heads(tokens), needles][None])
    if mx.default_device() == mx.gpu:  # products in 16 bit are slow on a CPU
        q = q.astype(mx.float16)
    k, v = mx.array(keys[None]), mx.array(values[None])
    out = attention(q, k, v, cache=cache, scale=tokens.model.scale)
    return np.array(evaluated(out[0].astype(mx.float32)))


def questions(tokens: SyntheticTokens, stop: int, rows: int, first: int) -> tuple[Array, bool]:
    """What the last `rows` of a chunk that ends at `stop` ask for, and whether that is there yet.

    No needle among the rows themselves is asked for: only some of them would see it.
    """
    known = [i for i, position in enumerate(tokens.needles) if position < stop - rows]
    return asked(tokens, known or [0], rows, first), bool(known)

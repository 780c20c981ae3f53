"""How paged attention gets into a model that knows nothing of it.

A cache hands the model its keys and values as *tagged* arrays: instances of a subclass of
`mx.array` that remember the `KVView` they stand for; or, where the numbers are not wanted, as
`pagedkv.attn.stand_in.StandIn`. A dispatcher in place of `mx.fast.scaled_dot_product_attention`
recognises a matching pair and runs paged attention.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx

from pagedkv.attn.driver import KVView, set_hot_attention
from pagedkv.attn.stand_in import KEYS, VALUES, StandIn
from pagedkv.cache.batch_layout import BatchView


class Attends(Protocol):
    """What a tag needs of the cache that made it."""

    def attend_tagged(
        self,
        view: Any,
        q: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attention of `q` over the view, and whatever the cache does afterwards."""
        ...


class TaggedArray(mx.array):
    """Keys or values of a cached layer, complete: an array that remembers what it holds.

    Attributes:
        owner: the cache.
        kv: what it stands for: a `KVView`, or a `BatchView` of several sequences.
        role: ``"keys"`` or ``"values"``.
    """

    owner: Attends
    kv: KVView | BatchView
    role: str


def tag_pair(
    owner: Attends, view: KVView | BatchView, keys: mx.array, values: mx.array
) -> tuple[TaggedArray, TaggedArray]:
    """Tag keys and values as those of `view`."""
    first, second = TaggedArray(keys), TaggedArray(values)
    first.owner, first.kv, first.role = owner, view, KEYS
    second.owner, second.kv, second.role = owner, view, VALUES
    return first, second


_Attention = Callable[..., mx.array]


def _dispatcher(beneath: _Attention) -> _Attention:
    """`mx.fast.scaled_dot_product_attention`, paged where keys and values are tagged.

    Args:
        beneath: what was in its place: MLX's own, or what another library had put there.
    """

    def scaled_dot_product_attention(
        q: mx.array,
        k: Any,
        v: Any,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
        **options: Any,
    ) -> mx.array:
        if (
            isinstance(k, (StandIn, TaggedArray))
            and isinstance(v, (StandIn, TaggedArray))
            and k.kv is v.kv
            and (k.role, v.role) == (KEYS, VALUES)
        ):
            return k.owner.attend_tagged(k.kv, q, scale, mask, sinks)
        q, k, v = (x.numbers("attention") if isinstance(x, StandIn) else x for x in (q, k, v))
        return beneath(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)

    return scaled_dot_product_attention


_lock = threading.Lock()
_installed = 0
_mine: _Attention | None = None
_beneath: _Attention = mx.fast.scaled_dot_product_attention


def install() -> None:
    """Put a dispatcher in place; counted, so that each `install` needs one `uninstall`.

    What was there is what it calls for attention that is not paged.
    """
    global _installed, _mine, _beneath
    with _lock:
        _installed += 1
        if _installed > 1:
            return
        _beneath = mx.fast.scaled_dot_product_attention
        _mine = mx.fast.scaled_dot_product_attention = _dispatcher(_beneath)
        set_hot_attention(_beneath)


def uninstall() -> None:
    """Undo one `install`; the last one puts back what was there.

    What somebody else has put on top since stays, and goes on calling the dispatcher, which passes
    everything on.
    """
    global _installed
    with _lock:
        _installed = max(0, _installed - 1)
        if not _installed and mx.fast.scaled_dot_product_attention is _mine:
            mx.fast.scaled_dot_product_attention = _beneath


def installed() -> bool:
    """Whether attention calls go through the dispatcher."""
    return _installed > 0

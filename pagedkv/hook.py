"""How paged attention gets into a model that knows nothing of it.

A cache hands the model its keys and values as *tagged* arrays: instances of a subclass of
`mx.array` that remember the `KVView` they stand for. One dispatcher in place of
`mx.fast.scaled_dot_product_attention` recognises a matching pair and runs paged attention.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import mlx.core as mx

from pagedkv.attention import KVView, stock_attention
from pagedkv.batch_layout import BatchView
from pagedkv.errors import PagedKVError

KEYS, VALUES = "keys", "values"


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
    """Keys or values of a cached layer: an array that remembers where the real ones are.

    Attributes:
        owner: the cache.
        kv: what it stands for: a `KVView`, or a `BatchView` of several sequences.
        role: ``"keys"`` or ``"values"``.
        placeholder: True if the array itself holds NaN and only its shape is real.
    """

    owner: Attends
    kv: KVView | BatchView
    role: str
    placeholder: bool


def tag_pair(
    owner: Attends, view: KVView | BatchView, keys: mx.array, values: mx.array, placeholder: bool
) -> tuple[TaggedArray, TaggedArray]:
    """Tag keys and values as standing for `view`."""
    first, second = TaggedArray(keys), TaggedArray(values)
    first.owner, first.kv, first.role, first.placeholder = owner, view, KEYS, placeholder
    second.owner, second.kv, second.role, second.placeholder = owner, view, VALUES, placeholder
    return first, second


def placeholders(view: KVView) -> tuple[mx.array, mx.array]:
    """NaN arrays with the shape of the view's keys and values, without their memory."""
    pager = view.pager
    assert pager is not None
    shape = pager.shape
    return _nothing(pager.hot_dtype, shape.kv_heads, view.tokens, shape.key_dim, shape.value_dim)


@lru_cache(maxsize=4)  # the layers of a model ask for the same, step by step
def _nothing(
    dtype: mx.Dtype, heads: int, tokens: int, key_dim: int, value_dim: int
) -> tuple[mx.array, mx.array]:
    nan = mx.array(float("nan"), dtype)
    return (
        mx.broadcast_to(nan, (1, heads, tokens, key_dim)),
        mx.broadcast_to(nan, (1, heads, tokens, value_dim)),
    )


def _dispatch(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    **options: Any,
) -> mx.array:
    """`mx.fast.scaled_dot_product_attention`, paged where keys and values are tagged."""
    if (
        isinstance(k, TaggedArray)
        and isinstance(v, TaggedArray)
        and k.kv is v.kv
        and (k.role, v.role) == (KEYS, VALUES)
    ):
        return k.owner.attend_tagged(k.kv, q, scale, mask, sinks)
    for array in (k, v):
        if isinstance(array, TaggedArray) and array.placeholder:
            raise PagedKVError(
                f"attention got the cached {array.role} without their partner: this model uses "
                f"its cache in a way that was not seen when it was wrapped; please report it"
            )
    return stock_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)


_installed = 0


def install() -> None:
    """Put the dispatcher in place; counted, so that each `install` needs one `uninstall`."""
    global _installed
    _installed += 1
    mx.fast.scaled_dot_product_attention = _dispatch


def uninstall() -> None:
    """Undo one `install`; the last one puts MLX's own function back."""
    global _installed
    _installed = max(0, _installed - 1)
    if not _installed:
        mx.fast.scaled_dot_product_attention = stock_attention


def installed() -> bool:
    """Whether attention calls go through the dispatcher."""
    return _installed > 0

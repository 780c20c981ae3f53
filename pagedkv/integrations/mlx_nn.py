"""Attention for models that nobody wraps: a drop-in module, and the hook on its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.transformer import MultiHeadAttention

from pagedkv.cache import sdpa_hook as hook
from pagedkv.cache.paged_cache import attention
from pagedkv.errors import ConfigError, ShapeError
from pagedkv.sequence.layer import PagedLayerCache


class PagedMultiHeadAttention(MultiHeadAttention):
    """`mlx.nn.MultiHeadAttention` with one more argument: a layer of a `PagedCache`.

    Same parameters under the same names, so that weights load as before. Without a cache it does
    what its parent does.
    """

    @classmethod
    def of(cls, module: MultiHeadAttention) -> PagedMultiHeadAttention:
        """The same module, its parameters shared, that takes a cache.

        Raises:
            ConfigError: if it is not an `mlx.nn.MultiHeadAttention`.
        """
        if not isinstance(module, MultiHeadAttention):
            raise ConfigError(
                f"a {type(module).__name__} is no mlx.nn.MultiHeadAttention: call "
                f"pagedkv.attention() in it instead"
            )
        paged = cls.__new__(cls)
        Module.__init__(paged)  # type: ignore[no-untyped-call]
        for name, child in module.items():  # a module is a dict of its children
            paged[name] = child
        paged.num_heads = module.num_heads
        return paged

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: mx.array | str | None = None,
        cache: PagedLayerCache | None = None,
    ) -> mx.array:
        """Attention over everything in the cache, the given tokens appended first.

        Args:
            queries: inputs of the L last new tokens, ``[1, L, dims]``.
            keys: inputs of the n new tokens, ``[1, n, dims]``, n at least L.
            values: the same for their values.
            mask: with a cache as for `pagedkv.attention`; None is causal then, because what comes
                later cannot be in the cache.
            cache: of this layer; None attends to what is given, as the parent does.

        Returns:
            ``[1, L, dims]``.

        Raises:
            ShapeError: if the arrays do not fit the cache.
        """
        if cache is None:
            alone: mx.array = super().__call__(queries, keys, values, mask)  # type: ignore[no-untyped-call]
            return alone
        if queries.ndim != 3 or queries.shape[0] != 1:
            raise ShapeError(
                f"queries {queries.shape} were given: a paged cache holds one sequence, [1, L, "
                f"dims]; use one cache per row"
            )
        q, k, v = (
            self._heads(project(x))
            for project, x in (
                (self.query_proj, queries),
                (self.key_proj, keys),
                (self.value_proj, values),
            )
        )
        out = attention(
            q, k, v, cache=cache, scale=q.shape[-1] ** -0.5, mask="causal" if mask is None else mask
        )
        return self.out_proj(out.transpose(0, 2, 1, 3).flatten(-2, -1))

    def _heads(self, x: mx.array) -> mx.array:
        return mx.unflatten(x, -1, (self.num_heads, -1)).transpose(0, 2, 1, 3)


def page_attention(model: Any) -> list[str]:
    """Put a `PagedMultiHeadAttention` in the place of every `MultiHeadAttention` of a model.

    Args:
        model: an `mlx.nn.Module`; changed in place.

    Returns:
        Their names, in order: as many layers does its cache need. What calls them has to hand
        them their layer of the cache.

    Raises:
        ConfigError: if there is none.
    """
    from mlx.utils import tree_unflatten

    found = [
        (name, PagedMultiHeadAttention.of(module))
        for name, module in model.named_modules()
        if isinstance(module, MultiHeadAttention)
    ]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no mlx.nn.MultiHeadAttention: call pagedkv.attention() "
            f"where it attends"
        )
    found.sort(key=lambda item: [int(p) if p.isdigit() else p for p in item[0].split(".")])
    model.update_modules(tree_unflatten(found))
    return [name for name, _ in found]


@contextmanager
def hooked() -> Iterator[None]:
    """While inside, `mx.fast.scaled_dot_product_attention` attends to pages.

    For models that call it themselves, with what ``cache.update_and_fetch(keys, values)`` of a
    layer of `PagedCache.standalone` returned. Outside they compute the same from dequantized
    copies of all keys and values. (`pagedkv.wrap` does this by itself, until `unwrap`.)
    """
    hook.install()
    try:
        yield
    finally:
        hook.uninstall()

"""Stand-ins for cached keys and values: their shape at once, their numbers only when asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from pagedkv.errors import PagedKVError

KEYS, VALUES = "keys", "values"

Dense = Callable[[], tuple[mx.array, mx.array]]
"""Makes all keys and values of a view, dequantized."""


class StandIn:
    """Keys or values of a layer as a model gets them, without their numbers.

    Attention through the dispatcher (`pagedkv.hook`) never needs them. Whatever else a model does
    with them gives the true numbers or an error at once, for there are no others: methods,
    operators and indexing are those of an `mx.array` of all tokens, dequantized then, and functions
    of MLX that take nothing but an `mx.array` raise TypeError, in words that name the function
    and, through the name of this class, the layer.

    Attributes:
        owner: the cache.
        kv: what it stands for: a `KVView`, or a `BatchView` of several sequences.
        role: ``"keys"`` or ``"values"``.
        shape: ``(rows, kv_heads, tokens, dim)``.
        dtype: of the numbers.
    """

    __slots__ = ("_dense", "dtype", "kv", "owner", "role", "shape")

    def __init__(
        self,
        owner: Any,
        view: Any,
        role: str,
        shape: tuple[int, ...],
        dtype: mx.Dtype,
        dense: Dense,
    ) -> None:
        self.owner, self.kv, self.role = owner, view, role
        self.shape, self.dtype, self._dense = shape, dtype, dense

    @property
    def ndim(self) -> int:
        """Number of dimensions: four."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Numbers that it stands for."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one of them."""
        return int(self.dtype.size)

    @property
    def nbytes(self) -> int:
        """Bytes that all of them would take as an array."""
        return self.size * self.itemsize

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.dtype} {self.shape}>"

    def numbers(self, operation: str) -> _Numbers:
        """Dequantize all tokens.

        Args:
            operation: what the model does with them, for a warning that is given once.

        Returns:
            An array of `shape` and `dtype`.

        Raises:
            CorruptPageError, ColdStoreError: if a cold page cannot be read.
        """
        warnings.warn(
            f"{type(self).__name__}: the model does not only attend to them ({operation}): "
            f"the whole context of the layer is dequantized for that, at every call",
            stacklevel=2,  # in this file: one warning for each text
        )
        keys, values = self._dense()
        return _Numbers(keys if self.role == KEYS else values)

    def __setitem__(self, *_: object) -> None:
        raise PagedKVError(
            f"{type(self).__name__}: the model writes into what its cache returned, which is in "
            f"pages by now: this model cannot be paged; please report it"
        )

    @property
    def __mlx_array__(self) -> _Numbers:
        return self.numbers("an operation with another array")

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return mx.array  # for isinstance(): models tell arrays from other things by that

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(mx.array, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.numbers(name), name)


class _Numbers(mx.array):
    """An array that is its own ``__mlx_array__``: MLX takes that attribute, or calls it."""

    def __call__(self) -> _Numbers:
        return self


def _passed_on(name: str) -> Callable[..., Any]:
    def method(self: StandIn, *args: Any, **options: Any) -> Any:
        return getattr(self.numbers(name), name)(*args, **options)

    return method


# Special methods are looked up in the class. Not the in-place ones: Python takes the plain operator
# then, and the result is an array of the model's own. Nor those that MLX would prefer to
# `__mlx_array__`, nor what makes a sequence: some functions would take it for a list of arrays.
_INPLACE = {n for n in dir(mx.array) if n.startswith("__i") and hasattr(mx.array, f"__{n[3:]}")}
_COMPARISONS = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
_ELSEWHERE = {"__dlpack__", "__dlpack_device__", "__array_namespace__", *vars(StandIn)}
_ELSEWHERE |= {"__len__", "__iter__"}
_SPECIAL = {n for n in dir(mx.array) if n.startswith("__")} - set(dir(object)) | _COMPARISONS
for _name in _SPECIAL - _INPLACE - _ELSEWHERE:
    setattr(StandIn, _name, _passed_on(_name))
StandIn.__iter__ = None  # type: ignore[attr-defined]
StandIn.__hash__ = object.__hash__  # type: ignore[method-assign]


@lru_cache(maxsize=4096)
def _kind(layer: int, role: str) -> type[StandIn]:
    """The class of a layer's stand-ins: its name is what MLX's own errors say."""
    name = f"cached {role} of layer {layer}"
    return type(name, (StandIn,), {"__slots__": (), "__module__": "pagedkv"})


def stand_ins(
    owner: Any,
    layer: int,
    view: Any,
    rows: int,
    heads: int,
    tokens: int,
    dims: tuple[int, int],
    dtype: mx.Dtype,
    dense: Dense,
) -> tuple[mx.array, mx.array]:
    """Make stand-ins for the keys and the values of a view; to a model they are arrays.

    Args:
        owner: the cache, which attends to the view.
        layer: index among the model's layers.
        view: what they stand for.
        rows: sequences.
        heads: KV heads.
        tokens: that a query may see.
        dims: channels of keys and of values.
        dtype: of the numbers.
        dense: makes them; called once, at most.
    """
    made: list[tuple[mx.array, mx.array]] = []

    def once() -> tuple[mx.array, mx.array]:
        if not made:
            made.append(dense())
        return made[0]

    def stand_in(role: str, dim: int) -> Any:
        return _kind(layer, role)(owner, view, role, (rows, heads, tokens, dim), dtype, once)

    return stand_in(KEYS, dims[0]), stand_in(VALUES, dims[1])

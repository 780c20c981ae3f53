"""Copies of a model that compute in another type."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx


class Copies:
    """A model, and copies of it in other types, made when they are first asked for."""

    def __init__(self, model: Any) -> None:
        self._models: dict[str | None, Any] = {None: model}

    def of(self, dtype: str | None) -> Any:
        """The model that computes in a type.

        Args:
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; None for the model itself.
        """
        if dtype not in self._models:
            other = copy.deepcopy(self._models[None])
            other.set_dtype(getattr(mx, str(dtype)))
            self._models[dtype] = other
        return self._models[dtype]

"""What is done to keys and values before they are quantized, and undone around attention.

Per KV head a page holds ``K · A`` and ``V · B`` instead of keys K and values V: channels scaled,
then mixed by a fixed rotation with random signs (the subsampled randomized Hadamard or Fourier
transform without the subsampling). Rotated numbers are close to normally distributed, so a group's
range is small beside its spread. Queries are multiplied once by ``Q = A^-T``, so that products with
page keys are products of queries and keys; what pages sum up is multiplied once by ``O = B^-1``.

Scales: a rotation gives every channel the same error, whether queries make much of the channel or
not. With errors proportional to a channel's spread, the sum of squared errors of the scores is
least if channels are scaled by the square root of query spread over key spread before they are
rotated (Cauchy-Schwarz), and then never above that without a rotation. `pagedkv.treatments`
chooses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import ConfigError, KVShape, Precision

ROTATIONS = ("hadamard", "fourier", "householder")
STEPS_PER_OCTAVE = 4
MOST_STEPS = 24
"""Scales are powers of two in quarter steps, between 1/64 and 64: rounding them costs nothing."""

LEAST_BITS = 8
"""Keys or values of so many bits are left as they are: the error of rounding is small already."""

Steps = tuple[tuple[int, ...] | None, ...]
"""Per KV head the scales of its channels, in steps; None for a head that is left as it is."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Treatment:
    """How one layer's keys and values are transformed; decided before its first page is sealed.

    Attributes:
        rotation: one of `ROTATIONS`, see `rotation_matrix`.
        seed: of the signs.
        key_steps: scales of key channels, per KV head.
        value_steps: likewise of values.
        shape: what the layer caches per token.
        reason: why it was chosen, for people.
    """

    rotation: str
    seed: int
    key_steps: Steps
    value_steps: Steps
    shape: KVShape
    reason: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.rotation not in ROTATIONS:
            raise ConfigError(f"a rotation is one of {', '.join(ROTATIONS)}, got {self.rotation!r}")
        for name, steps, dim in (
            ("key", self.key_steps, self.shape.key_dim),
            ("value", self.value_steps, self.shape.value_dim),
        ):
            if len(steps) != self.shape.kv_heads:
                raise ConfigError(
                    f"{name} scales are given for {len(steps)} heads of {self.shape.kv_heads}"
                )
            for head in steps:
                if head is None:
                    continue
                if len(head) != dim:
                    raise ConfigError(f"a head has {dim} {name} channels, not {len(head)}")
                if any(abs(n) > MOST_STEPS for n in head):
                    raise ConfigError(f"scales are within {MOST_STEPS} steps, got {head}")

    @classmethod
    def plain(cls, shape: KVShape, rotation: str, seed: int = 0) -> Treatment:
        """A rotation of all heads without scales."""
        keys = ((0,) * shape.key_dim,) * shape.kv_heads
        values = ((0,) * shape.value_dim,) * shape.kv_heads
        return cls(rotation, seed, keys, values, shape, "asked for")

    def only(self, keys: bool, values: bool) -> Treatment:
        """The same for keys or values alone."""
        untouched: Steps = (None,) * self.shape.kv_heads
        return replace(
            self,
            key_steps=self.key_steps if keys else untouched,
            value_steps=self.value_steps if values else untouched,
        )

    def __str__(self) -> str:
        parts = [("keys", self.key_steps), ("values", self.value_steps)]
        told = []
        for name, heads in parts:
            scaled = any(head and any(head) for head in heads)
            if any(head is not None for head in heads):
                told.append(f"{name} {'scaled and rotated' if scaled else 'rotated'}")
        text = f"{', '.join(told) or 'none'} ({self.rotation})"
        return f"{text}: {self.reason}" if self.reason else text

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "rotation": self.rotation,
            "seed": self.seed,
            "keys": [list(head) if head else None for head in self.key_steps],
            "values": [list(head) if head else None for head in self.value_steps],
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any], shape: KVShape) -> Treatment:
        """What `to_dict` gave.

        Raises:
            ConfigError: if it is none, or of another shape.
        """
        try:
            keys, values = (_steps(saved[name]) for name in ("keys", "values"))
            return cls(str(saved["rotation"]), int(saved["seed"]), keys, values, shape)
        except (KeyError, TypeError, ValueError) as e:
            if isinstance(e, ConfigError):
                raise
            raise ConfigError(f"this is not the treatment of a layer's pages: {e}") from e

    @cached_property
    def digest(self) -> str:
        """16 hex digits that name it."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(f"pagedkv treatment 1 {text}".encode()).hexdigest()[:16]

    # The arrays

    @property
    def _query_matrices(self) -> Floats:
        """Q per head, in numbers that float16 holds: kernels keep them so."""
        return self._matrices(self.key_steps, self.shape.key_dim, "key", transpose=False)

    @property
    def _output_matrices(self) -> Floats:
        """O per head, likewise."""
        return self._matrices(self.value_steps, self.shape.value_dim, "value", transpose=True)

    def _matrices(self, steps: Steps, dim: int, kind: str, transpose: bool) -> Floats:
        rotation = rotation_matrix(self.rotation, dim, self.seed, kind)
        out = np.empty((len(steps), dim, dim))
        for matrix, head in zip(out, steps, strict=True):
            if head is None:
                matrix[:] = np.eye(dim)
                continue
            undone = 2.0 ** (-np.array(head) / STEPS_PER_OCTAVE)
            matrix[:] = rotation.T * undone if transpose else undone[:, None] * rotation
        return out.astype(np.float16).astype(np.float64)

    # Made from `words` each time, which takes little: kept, they would be as large as all the rest.

    @property
    def queries(self) -> mx.array:
        """Q, float32 ``[kv_heads, key_dim, key_dim]``: query rows times this meet page keys."""
        heads, dim = self.shape.kv_heads, self.shape.key_dim
        halves = self.words.view(mx.float16)[: heads * dim * dim]
        return halves.reshape(heads, dim, dim).astype(mx.float32)

    @property
    def outputs(self) -> mx.array:
        """O, float32 ``[kv_heads, value_dim, value_dim]``: sums of page values times this."""
        heads, dim = self.shape.kv_heads, self.shape.value_dim
        halves = self.words.view(mx.float16)[-heads * dim * dim :]
        return halves.reshape(heads, dim, dim).astype(mx.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of memory: float32 A and B, float16 Q and O."""
        return treatment_bytes(self.shape)

    @cached_property
    def keys(self) -> mx.array:
        """A, the inverse of Q transposed, float32."""
        inverse = np.linalg.inv(self._query_matrices).swapaxes(1, 2)
        return mx.array(np.ascontiguousarray(inverse, np.float32))

    @cached_property
    def values(self) -> mx.array:
        """B, the inverse of O, float32."""
        return mx.array(np.linalg.inv(self._output_matrices).astype(np.float32))

    @cached_property
    def words(self) -> mx.array:
        """For kernels: float16 Q of all heads, row by row, then O, as uint32."""
        both = [m.astype(np.float16).ravel() for m in (self._query_matrices, self._output_matrices)]
        return mx.array(np.concatenate(both).view(np.uint32))

    @cached_property
    def output_gain(self) -> npt.NDArray[np.float32]:
        """By how much the largest page value of a head may grow, ``[kv_heads]``."""
        gain = np.abs(self._output_matrices).sum(axis=1).max(axis=1)
        return np.asarray(gain, np.float32)

    # What is multiplied. Rows are `[..., kv_heads, rows, dim]`; results are float32.

    def page_keys(self, keys: mx.array) -> mx.array:
        """Keys as pages hold them."""
        return keys.astype(mx.float32) @ self.keys

    def page_values(self, values: mx.array) -> mx.array:
        """Values as pages hold them."""
        return values.astype(mx.float32) @ self.values

    def own_keys(self, page_keys: mx.array) -> mx.array:
        """Keys from what pages hold."""
        return page_keys.astype(mx.float32) @ self.queries.swapaxes(1, 2)

    def own_values(self, page_values: mx.array) -> mx.array:
        """Values, or weighted sums of them, from what pages hold."""
        return page_values.astype(mx.float32) @ self.outputs

    def page_queries(self, rows: mx.array) -> mx.array:
        """Query rows ``[kv_heads, rows, key_dim]`` whose products with page keys are the scores."""
        return rows.astype(mx.float32) @ self.queries


def treatment_bytes(shape: KVShape) -> int:
    """What a layer's treatment takes, of keys alone or values alone as well: matrices of both."""
    return 6 * shape.kv_heads * (shape.key_dim**2 + shape.value_dim**2)


def treated_parts(precisions: Iterable[Precision], treatment: str) -> tuple[bool, bool]:
    """Whether keys and values are treated, in pages of these precisions."""
    if treatment == "none":
        return False, False
    bits = [(p.key_bits, p.value_bits) for p in precisions]
    return any(k < LEAST_BITS for k, _ in bits), any(v < LEAST_BITS for _, v in bits)


def rotation_matrix(rotation: str, dim: int, seed: int, kind: str) -> Floats:
    """An orthogonal matrix: random signs, then a fixed transform.

    Args:
        rotation: ``"hadamard"``: Sylvester's matrix of the largest power of two in `dim`, and the
            Fourier one for what is left; ``"fourier"``: the real transform of Hartley,
            ``cos + sin``, of any size; ``"householder"``: a reflection along random signs, with
            2/dim beside its diagonal and 1 - 2/dim on it, so it hardly mixes.
        dim: rows and columns.
        seed: of the signs.
        kind: told apart by their signs, such as keys and values.

    Returns:
        float64 ``[dim, dim]``; rows times it are rotated.
    """
    signs = random_signs(f"signs {kind} {dim} {seed}", dim)
    if rotation == "householder":
        along = random_signs(f"reflection {kind} {dim} {seed}", dim)
        return signs[:, None] * (np.eye(dim) - 2 / dim * np.outer(along, along))
    odd = dim
    transform = np.ones((1, 1))
    while rotation == "hadamard" and odd % 2 == 0:
        odd //= 2
        transform = np.block([[transform, transform], [transform, -transform]]) / np.sqrt(2)
    return signs[:, None] * np.kron(_hartley(odd), transform)


def random_signs(name: str, count: int) -> Floats:
    """Fixed random signs, 1 and -1: the same for a name on every machine."""
    bits = hashlib.shake_256(f"pagedkv {name}".encode()).digest(-(-count // 8))
    return np.where(np.unpackbits(np.frombuffer(bits, np.uint8))[:count], -1.0, 1.0)


def _hartley(dim: int) -> Floats:
    angles = 2 * np.pi * np.outer(np.arange(dim), np.arange(dim)) / dim
    return np.asarray((np.cos(angles) + np.sin(angles)) / np.sqrt(dim))


def scale_steps(scales: Floats) -> tuple[int, ...]:
    """Scales of a head's channels in steps, their geometric mean taken out.

    Args:
        scales: positive, ``[channels]``.
    """
    octaves = np.log2(scales)
    steps = np.rint(STEPS_PER_OCTAVE * (octaves - octaves.mean()))
    return tuple(int(n) for n in np.clip(steps, -MOST_STEPS, MOST_STEPS))


def _steps(saved: Sequence[Sequence[int] | None]) -> Steps:
    return tuple(None if head is None else tuple(int(n) for n in head) for head in saved)

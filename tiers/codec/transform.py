"""What is done to keys and values before they are quantized, and undone around attention.

Per KV head a page holds ``K · A`` and ``V · B`` instead of keys K and values V: channels scaled or
mixed by what they matter, then by a fixed rotation with random signs (the subsampled randomized
Hadamard or Fourier transform without the subsampling). Rotated numbers are close to normally
distributed, so a group's range is small beside its spread. Queries are multiplied once by
``Q = A^-T``, so that products with page keys are products of queries and keys; what pages sum up is
multiplied once by ``O = B^-1``. A rotation alone gives every channel the same error, whether
queries make much of the channel or not: a policy (`treatments`) chooses what comes before it.

Q and O are what a treatment is: in float16, as kernels read them. A and B are made from those, so
that both belong together whatever rounding did.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import ConfigError, KVShape, Precision

ROTATIONS = ("hadamard", "fourier", "householder")

MOST_SCALE = 64.0
"""Scales are between 1/64 and 64 times their geometric mean, so that float16 holds all products."""

LEAST_BITS = 8
"""Keys or values of so many bits are left as they are: the error of rounding is small already."""

Floats = npt.NDArray[np.float64]
Halves = npt.NDArray[np.float16]
Scales = Sequence[Floats | None] | Floats


@dataclass(frozen=True, eq=False)
class Treatment:
    """How one layer's keys and values are transformed; decided before its first page is sealed.

    Equal where the matrices are, however they came about.

    Attributes:
        shape: what the layer caches per token.
        words: for kernels: float16 Q of all heads, row by row, then O, as uint32; with ones on the
            diagonal where nothing is done.
        parts: whether anything is done to keys, and to values.
        feedback: how errors of channels are made up for by others when keys are rounded, float16
            ``[kv_heads, key_dim, key_dim]``, see `rounding.compensated`; None if they are not.
        kind: what is done, for people.
        reason: why it was chosen, for people.
        value_feedback: likewise of values, ``[kv_heads, value_dim, value_dim]``, see
            `rounding.compensated_rows`.
    """

    shape: KVShape
    words: mx.array
    parts: tuple[bool, bool]
    feedback: mx.array | None = None
    kind: str = ""
    reason: str = ""
    value_feedback: mx.array | None = None

    @classmethod
    def of(
        cls,
        shape: KVShape,
        queries: Floats | None,
        outputs: Floats | None,
        feedback: Floats | None = None,
        kind: str = "",
        reason: str = "",
        value_feedback: Floats | None = None,
    ) -> Treatment:
        """From matrices, which are rounded to float16.

        Args:
            shape: of the layer.
            queries: Q, invertible ``[kv_heads, key_dim, key_dim]``; None to leave keys alone.
            outputs: O, likewise of values; None to leave them alone.
            feedback: see the class.
            kind: what is done, for people.
            reason: why it was chosen, for people.
            value_feedback: see the class.

        Raises:
            ConfigError: if matrices have other sizes, or numbers that float16 does not hold.
        """
        heads, key_dim, value_dim = shape.kv_heads, shape.key_dim, shape.value_dim
        q, o = (
            _halves(queries, heads, key_dim, "keys"),
            _halves(outputs, heads, value_dim, "values"),
        )
        words = mx.array(_words(np.concatenate([q.ravel(), o.ravel()])))
        gains = [
            None
            if part is None or errors is None
            else mx.array(_halves(errors, heads, d, "errors"))
            for part, errors, d in (
                (queries, feedback, key_dim),
                (outputs, value_feedback, value_dim),
            )
        ]
        parts = queries is not None, outputs is not None
        return cls(shape, words, parts, gains[0], kind, reason, gains[1])

    @classmethod
    def plain(cls, shape: KVShape, rotation: str, seed: int = 0) -> Treatment:
        """A rotation of all heads.

        Args:
            shape: of the layer.
            rotation: one of `ROTATIONS`, see `rotation_matrix`.
            seed: of the signs.
        """
        keys = np.ones((shape.kv_heads, shape.key_dim))
        values = np.ones((shape.kv_heads, shape.value_dim))
        rotated = cls.scaled(shape, keys, values, rotation, seed)
        return replace(rotated, kind=f"rotated ({rotation})", reason="asked for")

    @classmethod
    def scaled(
        cls,
        shape: KVShape,
        keys: Scales,
        values: Scales,
        rotation: str = "hadamard",
        seed: int = 0,
        reason: str = "",
    ) -> Treatment:
        """Channels scaled, then rotated.

        Args:
            shape: of the layer.
            keys: scales of key channels per KV head, positive ``[kv_heads][key_dim]``; None for a
                head that is left as it is. What all scales of a head share does not matter.
            values: likewise of values.
            rotation: one of `ROTATIONS`.
            seed: of the signs.
            reason: why.
        """
        q = [_unscaled(head, shape.key_dim, rotation, seed, "key") for head in keys]
        o = [_unscaled(head, shape.value_dim, rotation, seed, "value").T for head in values]
        kind = f"scaled and rotated ({rotation})"
        return cls.of(shape, np.stack(q), np.stack(o), None, kind, reason)

    def only(self, keys: bool, values: bool) -> Treatment:
        """The same for keys or values alone."""
        q = np.asarray(self.queries, np.float64) if keys and self.parts[0] else None
        o = np.asarray(self.outputs, np.float64) if values and self.parts[1] else None
        gains = [
            None if told is None else np.asarray(told, np.float64)
            for told in (self.feedback, self.value_feedback)
        ]
        return Treatment.of(self.shape, q, o, gains[0], self.kind, self.reason, gains[1])

    def __str__(self) -> str:
        names = ("keys", "values")
        told = " and ".join(name for name, on in zip(names, self.parts, strict=True) if on)
        text = f"{told} {self.kind}" if told else "none"
        return f"{text}: {self.reason}" if self.reason else text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Treatment) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that name the matrices."""
        sizes = [self.shape.kv_heads, self.shape.key_dim, self.shape.value_dim, *self.parts]
        digest = hashlib.sha256(f"pagedkv treatment 2 {sizes}".encode())
        digest.update(np.asarray(self.all_words).tobytes())
        return digest.hexdigest()[:16]

    @property
    def all_words(self) -> mx.array:
        """`words`, and those of both feedbacks behind them: what a file keeps."""
        gains = [x for x in (self.feedback, self.value_feedback) if x is not None]
        more = [mx.array(_words(np.asarray(x).ravel())) for x in gains]
        return mx.concatenate([self.words, *more])

    def describe(self) -> dict[str, Any]:
        """All but `all_words`, for JSON."""
        return {
            "kind": self.kind,
            "parts": [*self.parts],
            "feedback": self.feedback is not None,
            "value_feedback": self.value_feedback is not None,
            "digest": self.digest,
        }

    @classmethod
    def restore(
        cls, told: dict[str, Any], words: npt.NDArray[np.uint32], shape: KVShape, reason: str = ""
    ) -> Treatment:
        """What `describe` and `all_words` gave.

        Args:
            told: by `describe`.
            words: `all_words`.
            shape: of the layer.
            reason: why it was chosen, for people.

        Raises:
            ConfigError: if it is none, damaged, or of another shape.
        """
        try:
            keys, values = (bool(part) for part in told["parts"])
            words = np.ascontiguousarray(words)
            heads, at = shape.kv_heads, -(-_numbers(shape) // 2)
            # Those that older files tell nothing of have none of values.
            dims = (
                shape.key_dim if told["feedback"] else 0,
                shape.value_dim if told.get("value_feedback", False) else 0,
            )
            sizes = [at, *(-(-heads * dim * dim // 2) for dim in dims)]
            if words.size != sum(sizes):
                raise ValueError(f"{2 * words.size} numbers, and {shape} needs {2 * sum(sizes)}")
            if not np.isfinite(words.view(np.float16)).all():
                raise ValueError("numbers are not finite")
            first, *rest = np.split(words, np.cumsum(sizes)[:-1])
            gains = [
                mx.array(part.view(np.float16)[: heads * dim * dim].reshape(heads, dim, dim))
                if dim
                else None
                for part, dim in zip(rest, dims, strict=True)
            ]
            parts, kind = (keys, values), str(told["kind"])
            found = cls(shape, mx.array(first), parts, gains[0], kind, reason, gains[1])
            if found.digest != told["digest"]:
                raise ValueError(f"their digest is {found.digest}, not {told['digest']!r}")
        except (KeyError, TypeError, ValueError) as e:
            what = f"there is no {e}" if isinstance(e, KeyError) else e
            raise ConfigError(f"these are not the matrices of a layer's pages: {what}") from e
        return found

    # The arrays

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
        before = heads * self.shape.key_dim**2
        halves = self.words.view(mx.float16)[before : before + heads * dim * dim]
        return halves.reshape(heads, dim, dim).astype(mx.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of memory: float32 A and B, float16 Q, O and feedback."""
        gains = self.feedback is not None, self.value_feedback is not None
        return treatment_bytes(self.shape, gains)

    @cached_property
    def keys(self) -> mx.array:
        """A, the inverse of Q transposed, float32."""
        inverse = np.linalg.inv(np.asarray(self.queries, np.float64)).swapaxes(1, 2)
        return mx.array(np.ascontiguousarray(inverse, np.float32))

    @cached_property
    def values(self) -> mx.array:
        """B, the inverse of O, float32."""
        return mx.array(np.linalg.inv(np.asarray(self.outputs, np.float64)).astype(np.float32))

    @cached_property
    def output_gain(self) -> npt.NDArray[np.float32]:
        """By how much the largest page value of a head may grow, ``[kv_heads]``."""
        gain = np.abs(np.asarray(self.outputs)).sum(axis=1).max(axis=1)
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


def file_bytes(shape: KVShape) -> int:
    """Bytes of a layer's `Treatment.all_words` in base64, at most."""
    return 6 * _numbers(shape)


def treatment_bytes(shape: KVShape, feedback: tuple[bool, bool]) -> int:
    """What a layer's treatment takes, of keys alone or values alone as well: matrices of both.

    Args:
        shape: of the layer.
        feedback: whether errors of keys, and of values, are made up for.
    """
    gains = feedback[0] * shape.key_dim**2 + feedback[1] * shape.value_dim**2
    return 6 * _numbers(shape) + 2 * shape.kv_heads * gains


def _numbers(shape: KVShape) -> int:
    """In Q and O of a layer."""
    return shape.kv_heads * (shape.key_dim**2 + shape.value_dim**2)


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


def _unscaled(scales: Floats | None, dim: int, rotation: str, seed: int, kind: str) -> Floats:
    """Inverse scales of a head, then a rotation; ``[dim, dim]``."""
    turned = rotation_matrix(rotation, dim, seed, kind)
    if scales is None:
        return np.eye(dim)
    if len(scales) != dim:
        raise ConfigError(f"a head has {dim} {kind} channels, not {len(scales)}")
    scales = np.clip(scales / np.exp(np.log(scales).mean()), 1 / MOST_SCALE, MOST_SCALE)
    return np.asarray(turned / scales[:, None])


def _words(halves: Halves) -> npt.NDArray[np.uint32]:
    """As uint32, with a zero at the end if their number is odd."""
    return np.pad(halves, (0, halves.size % 2)).view(np.uint32)


def _halves(matrices: Floats | None, heads: int, dim: int, what: str) -> Halves:
    if matrices is None:
        return np.tile(np.eye(dim, dtype=np.float16), (heads, 1, 1))
    if matrices.shape != (heads, dim, dim):
        raise ConfigError(
            f"matrices for {what} are {[heads, dim, dim]}, got {list(matrices.shape)}"
        )
    with np.errstate(over="ignore"):
        halves = matrices.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ConfigError(f"matrices for {what} have numbers that float16 does not hold")
    return halves

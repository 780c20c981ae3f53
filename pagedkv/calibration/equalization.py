"""Matrices that make rounding cost least: keys mixed by how they spread and by what is asked.

With S the covariance of keys and C that of queries, keys are stored as ``K · A``. Rounding errs in
every channel in proportion to its spread ``(A' S A)_ii``. What that costs is said by what queries
make of errors, ``W = A^-1 C A'^-1``; and as channels that are rounded later make up for errors
(`rounding.compensated`), a block of channels costs no more than the trace of its Schur complement
in W, given the blocks behind it. The product of their determinants is that of W, and the product of
the spreads is at least that of A' S A. So the sum is least (arithmetic and geometric mean) where
keys are white, ``A' S A = 1``, and every block counts alike. White they are for any rotation behind
the whitening; one that makes blocks count alike always exists (`evened`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.tiers.codec.rounding import blocks_of, feedback_for

STEP = 128
"""Tokens of the shortest turn."""

DOUBLINGS = 6
"""Turns are by 1, 2, 4, ... steps: together they cover 8K tokens."""

SHRINK = 0.5
"""Added to covariances, as a part of their own diagonal: some hundred tokens do not show how all
channels go together. In proportion to each channel, so that what a channel is counted in does not
matter: a model with planted outliers gets the matrices of the model without them."""

FEEDBACK_SHRINK = 0.2
"""Likewise where errors are made up for."""

LEAST_EIGENVALUE = 1e-9

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Turn:
    """What a rotary embedding does to rows when they move on: pairs of channels are turned.

    Attributes:
        kept: of each channel, how much of it stays.
        other: the channel that it is turned with.
        taken: how much of that one is added.
    """

    kept: Floats
    other: npt.NDArray[np.intp]
    taken: Floats

    def moved(self, covariances: Floats) -> Floats:
        """Covariances ``[..., dim, dim]`` of the rows when they have moved on."""
        columns = covariances * self.kept + covariances[..., self.other] * self.taken
        rows = columns * self.kept[:, None] + columns[..., self.other, :] * self.taken[:, None]
        return np.asarray(rows)


def turns_of(rope: Any, dim: int) -> list[Turn]:
    """How a rotary embedding moves rows of `dim` channels on: by 1, 2, 4, ... steps.

    Args:
        rope: a layer's module, called with rows and their offset; None if there is none.
        dim: channels of a key.

    Returns:
        The turns; none without an embedding.

    Raises:
        ValueError: if it does something else than turning pairs.
    """
    turns = []
    for n in range(DOUBLINGS if rope is not None else 0):
        rows = rope(mx.eye(dim)[:, None, None, :], offset=STEP * 2**n)
        turn = np.array(rows.astype(mx.float32), np.float64).reshape(dim, dim)
        turn /= np.linalg.norm(turn, axis=1, keepdims=True)  # some scale queries and keys as well
        kept, rest = np.diag(turn), turn - np.diag(np.diag(turn))
        other = np.abs(rest).argmax(axis=0)
        found = Turn(kept, other, rest[other, np.arange(dim)])
        alone = np.zeros((dim, dim))
        alone[other, np.arange(dim)] = found.taken
        if not np.abs(rest - alone).max() < 1e-3:
            raise ValueError("these embeddings do not turn pairs of channels")
        turns.append(found)
    return turns


def averaged(covariances: Floats, turns: Sequence[Turn]) -> Floats:
    """Covariances as they are over a long context, from those at its beginning.

    Args:
        covariances: ``[..., dim, dim]``.
        turns: by one, two, four steps: each doubles what is covered.
    """
    for turn in turns:
        covariances = (covariances + turn.moved(covariances)) / 2
    return covariances


def balanced_keys(queries: Floats, keys: Floats, turns: Sequence[Turn]) -> tuple[Floats, Floats]:
    """What queries are multiplied with, and how errors are made up for.

    Args:
        queries: covariances C, ``[kv_heads, dim, dim]``.
        keys: covariances S within groups, likewise.
        turns: by the layer's rotary embedding, see `turns_of`.

    Returns:
        Q, the inverse of A transposed, with determinant 1; and the feedback
        (`rounding.feedback_for`). Both ``[kv_heads, dim, dim]``.

    Raises:
        ValueError: if numbers are not finite.
    """
    if not (np.isfinite(queries).all() and np.isfinite(keys).all()):
        raise ValueError("covariances are not finite")
    heads = [_balanced(c, s, turns) for c, s in zip(queries, keys, strict=True)]
    q, feedback = (np.stack(arrays) for arrays in zip(*heads, strict=True))
    return q, feedback


def _balanced(queries: Floats, keys: Floats, turns: Sequence[Turn]) -> tuple[Floats, Floats]:
    """See `balanced_keys`, of one head."""
    asked, spread = averaged(queries, turns), averaged(keys, turns)
    # With C = L L' and L' S L = V diag(v) V', keys are white by L V diag(v)^-1/2, and W = diag(v).
    lower = np.linalg.cholesky(_shrunk(asked, SHRINK))
    values, vectors = np.linalg.eigh(lower.T @ _shrunk(spread, SHRINK) @ lower)
    values = np.maximum(values, LEAST_EIGENVALUE * values[-1])
    q = np.linalg.solve(lower.T, vectors * np.sqrt(values) @ evened(values))
    q /= np.exp(np.linalg.slogdet(q)[1] / len(q))
    return q, feedback_for(q.T @ _shrunk(asked, FEEDBACK_SHRINK) @ q)


def balanced_values(values: Floats, outputs: Floats) -> tuple[Floats, Floats]:
    """What sums of page values are multiplied with, and how errors are made up for.

    Likewise: a token's channels share their scale, and err by the mean of their spreads.

    Args:
        values: second moments of their channels, ``[kv_heads, dim, dim]``.
        outputs: products of what the output projection makes of them, likewise.

    Returns:
        O, with determinant 1; and the feedback. Both ``[kv_heads, dim, dim]``.

    Raises:
        ValueError: if numbers are not finite.
    """
    q, feedback = balanced_keys(outputs, values, [])
    return q.swapaxes(1, 2), feedback


def evened(weights: Floats) -> Floats:
    """A rotation after which all blocks of channels count alike.

    From the last block to the first: a channel that counts more than the geometric mean is turned
    with one that counts less until the one of them counts as much as the mean. The other is left
    for the blocks before, and counts ``more * less / mean`` where the first makes up for its
    errors. (By single channels this is the geometric mean decomposition of Jiang, Hager and Li,
    Linear Algebra and its Applications 396, 2005.)

    Args:
        weights: of the channels, positive, ``[dim]``.

    Returns:
        R, ``[dim, dim]``, orthogonal: the Schur complement of each block in
        ``R' diag(weights) R``, given those behind it, is the geometric mean of the weights times 1,
        as far as there are as many weights above it as below.
    """
    left, axes = weights, np.eye(len(weights))
    out = np.zeros_like(axes)
    for start, end in reversed(blocks_of(len(weights))[1:]):
        order = np.argsort(left)
        left, axes = left[order], axes[:, order]
        mean = np.exp(np.log(left).mean())
        pairs = min(end - start, int((left < mean).sum()), int((left > mean).sum()))
        less, more = left[:pairs], left[::-1][:pairs]
        under, over = axes[:, :pairs], axes[:, ::-1][:, :pairs]
        share = (mean - less) / (more - less)
        a, b = np.sqrt(share), np.sqrt(1 - share)
        left, axes = left[pairs : end - pairs], axes[:, pairs : end - pairs]
        order = np.argsort(np.abs(np.log(left / mean)))
        alone, rest = np.split(order, [end - start - pairs])
        out[:, start:end] = np.concatenate([a * over + b * under, axes[:, alone]], axis=1)
        axes = np.concatenate([a * under - b * over, axes[:, rest]], axis=1)
        left = np.concatenate([less * more / mean, left[rest]])
    out[:, : len(left)] = axes
    return out


def _shrunk(covariances: Floats, part: float) -> Floats:
    diagonal = np.einsum("...ii->...i", covariances)
    # A channel that nobody asks for, or that is always the same, keeps a little.
    diagonal = np.maximum(diagonal, LEAST_EIGENVALUE * diagonal.mean(axis=-1, keepdims=True))
    diagonal = np.where(diagonal > 0, diagonal, 1.0)  # a head of zeros, or that nobody asks
    return np.asarray(covariances + part * diagonal[..., None] * np.eye(covariances.shape[-1]))

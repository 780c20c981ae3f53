"""How far two predictions are apart, position by position, and what is said of many of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.tiers.arrays import evaluated

Floats = npt.NDArray[np.float64]

BEYOND, ALL = "", "_all"
SCOPES = (BEYOND, ALL)
"""Endings of a number's name: over positions whose context reaches beyond what is always in 16 bit,
and over all."""

SMALL = 0.5  # where expm1 is more precise than a difference of probabilities


@dataclass(frozen=True)
class Comparison:
    """A model's predictions beside the reference's, one number per position.

    Attributes:
        kl: KL(reference || this) in nats, float32.
        loss: -log of the probability of the token that came, float32.
        flips: 1 where another token has the largest logit, float32.
    """

    kl: mx.array
    loss: mx.array
    flips: mx.array

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All of them, to be evaluated."""
        return self.kl, self.loss, self.flips


def log_probabilities(logits: mx.array) -> mx.array:
    """Log softmax in float32, along the last axis."""
    x = logits.astype(mx.float32)
    return x - mx.logsumexp(x, axis=-1, keepdims=True)


def compare(reference: mx.array, logits: mx.array, targets: mx.array) -> Comparison:
    """Compare predictions, lazily.

    KL is the sum of ``p (d + exp(-d) - 1)`` with ``d = log p - log q``. That is the sum of ``p d``,
    since p and q both add up to 1, but no term is negative, and the rounding of the two log-sums
    drops out: plain float32 sums cannot tell a KL of 1e-6 from none.

    Args:
        reference: log probabilities, float32 ``[positions, vocabulary]``.
        logits: ``[positions, vocabulary]``, any float type.
        targets: tokens that came, int ``[positions]``.
    """
    log_q = log_probabilities(logits)
    p = mx.exp(reference)
    d = reference - log_q
    near = p * (d + mx.expm1(-d))
    far = p * d - p + mx.exp(log_q)
    terms = mx.where(mx.abs(d) < SMALL, near, far)
    terms = mx.where(p == 0, mx.exp(log_q), terms)  # 0 log 0 is 0; -inf - -inf is not
    flips = mx.argmax(reference, axis=-1) != mx.argmax(logits, axis=-1)
    return Comparison(terms.sum(axis=-1), losses(log_q, targets), flips.astype(mx.float32))


def losses(log_p: mx.array, targets: mx.array) -> mx.array:
    """-log probability of the tokens that came, ``[positions]``."""
    return -mx.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]


@dataclass(frozen=True)
class Series:
    """A row's numbers over a leg, in order of position.

    Attributes:
        first: position of the first of them.
        kl: nats.
        loss: -log probability of the token that came, nats.
        flips: 1 where the top token is another.
        reference_loss: the reference's `loss`.
    """

    first: int
    kl: Floats
    loss: Floats
    flips: Floats
    reference_loss: Floats

    @classmethod
    def of(cls, first: int, parts: Sequence[Comparison], reference: Sequence[mx.array]) -> Series:
        """Join what was compared call by call; waits for it."""
        joined = [
            _joined(arrays)
            for arrays in (
                [part.kl for part in parts],
                [part.loss for part in parts],
                [part.flips for part in parts],
                reference,
            )
        ]
        return cls(first, *joined)

    @classmethod
    def alone(cls, first: int, reference: Sequence[mx.array]) -> Series:
        """The reference's own; nothing but its losses says anything."""
        loss = _joined(reference)
        return cls(first, np.zeros_like(loss), loss, np.zeros_like(loss), loss)

    def kl_beside(self, other: Series) -> Floats | None:
        """`kl` at the positions of another series; None if some of them are not here."""
        start = other.first - self.first
        stop = start + other.kl.size
        return self.kl[start:stop] if start >= 0 and stop <= self.kl.size else None

    @property
    def broken(self) -> int:
        """Positions whose prediction was none: not finite."""
        return int((~(np.isfinite(self.kl) & np.isfinite(self.loss))).sum())

    @property
    def finite(self) -> bool:
        """Whether every prediction was one."""
        return not self.broken

    def summary(self, beyond: int) -> dict[str, Any]:
        """What a row says of them, twice: see `SCOPES`.

        Args:
            beyond: the first position whose context reaches beyond what is always in 16 bit.
        """
        late = max(0, beyond - self.first)
        return {
            "first_position": max(self.first, beyond),
            **self._numbers(late, BEYOND),
            **self._numbers(0, ALL),
        }

    def _numbers(self, start: int, scope: str) -> dict[str, Any]:
        kl = self.kl[start:]
        if not kl.size:
            return {f"positions{scope}": 0}
        loss, reference = self.loss[start:].mean(), self.reference_loss[start:].mean()
        numbers = {
            "positions": int(kl.size),
            "perplexity": math.exp(loss),
            "perplexity_reference": math.exp(reference),
            "perplexity_percent": 100 * math.expm1(loss - reference),
            "kl_mean": float(kl.mean()),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
            "top1_percent": 100 * (1 - float(self.flips[start:].mean())),
            "flips": int(self.flips[start:].sum()),
        }
        return {f"{name}{scope}": value for name, value in numbers.items()}

    def binned_kl(self, width: int) -> list[float]:
        """Mean KL of every `width` positions, the last maybe of fewer."""
        starts = range(0, self.kl.size, width)
        return [float(self.kl[start : start + width].mean()) for start in starts]


def _joined(arrays: Sequence[mx.array]) -> Floats:
    return np.array(evaluated(mx.concatenate(list(arrays)))).astype(np.float64)

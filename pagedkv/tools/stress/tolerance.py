"""How far stored tokens and needles' answers may be off, derived from the precision of a page.

- A stored number is within one quantization step of its group, ``(max - min) / (2^bits - 1)``:
  half a step of rounding, at 2 and 3 bits what is left out at either end, and what rounding scale
  and bias to float16 moves. A page that was encoded again at a lower precision may be one step off
  for each time.
- A needle's answer is within one step of its value, plus what leaks in from other tokens. Rounded
  keys shift a score by a random amount of deviation ``σ = scale · |q| · 0.375 step`` (that of a
  number within a step, and a third more for the moved scale), so the exact weight of all other
  tokens may grow by ``exp(6σ + σ²)``. Queries are sharp enough to keep that small.
- The cosine to the exact answer is at least ``1 / sqrt(1 + r²)``, r being half a step over the
  root mean square of the value, less the leak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pagedkv.allocator import Precision
from pagedkv.allocator.precision import GROUP_TOKENS
from pagedkv.tools.stress.tokens import Array

ROUNDING = 2.0**-9
"""Of the largest number: what 16-bit outputs, scales and biases cost."""


def step_sizes(x: Array, group: int, bits: Sequence[int]) -> Array:
    """The quantization step of each group along the last axis, summed over re-encodings.

    Args:
        x: original numbers; a last axis that is no multiple of `group` is padded with zeros, as
            in a page.
        group: numbers that share a scale.
        bits: of each encoding the numbers went through; 16 costs nothing.

    Returns:
        The same shape as x.
    """
    n = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % group)])
    groups = padded.reshape(*x.shape[:-1], -1, group)
    spread = groups.max(axis=-1, keepdims=True) - groups.min(axis=-1, keepdims=True)
    step = np.zeros_like(spread)
    for b in bits:
        if b < 16:
            step = step + (spread + 2 * step) / (2**b - 1)
    return np.broadcast_to(step, groups.shape).reshape(padded.shape)[..., :n]


@dataclass(frozen=True)
class Tolerance:
    """How far tokens of a page may be off.

    Attributes:
        history: the precisions it was encoded at, the present one last; empty for hot tokens.
        value_group: channels that share a value's scale.
        rounding: of a 16-bit number, relative.
    """

    history: tuple[Precision, ...]
    value_group: int = 64
    rounding: float = 2.0**-11

    def keys(self, keys: Array) -> Array:
        """Largest error of each stored key number; `keys` is ``[..., tokens, head_dim]``."""
        turned = keys.swapaxes(-1, -2)
        steps = step_sizes(turned, GROUP_TOKENS, [p.key_bits for p in self.history])
        limits: Array = steps.swapaxes(-1, -2) + self._rounded(keys)
        return limits

    def values(self, values: Array) -> Array:
        """Largest error of each stored value number; `values` is ``[..., tokens, head_dim]``."""
        steps = step_sizes(values, self.value_group, [p.value_bits for p in self.history])
        limits: Array = steps + self._rounded(values)
        return limits

    def _rounded(self, x: Array) -> float:
        quantized = any(p.quantized for p in self.history)
        relative = max(ROUNDING, self.rounding) if quantized else self.rounding
        return relative * float(np.abs(x).max())

    def leak(self, others: Array, key_step: float, query: float, scale: float) -> Array:
        """The most that other tokens may weigh once keys are rounded.

        Args:
            others: their exact weight.
            key_step: mean quantization step of the keys.
            query: length of the query.
            scale: of the scores.
        """
        deviation = scale * query * 0.375 * key_step
        return np.minimum(1.0, others * math.exp(min(6 * deviation + deviation**2, 700.0)))

    def answer(self, value: Array, leak: Array, largest: float) -> tuple[Array, Array]:
        """Largest error and least cosine of a needle's answer.

        Args:
            value: of the needle, ``[kv_heads, head_dim]``.
            leak: weight of other tokens, ``[kv_heads]``.
            largest: value number in the context.

        Returns:
            Two arrays: ``[kv_heads, head_dim]`` and ``[kv_heads]``.
        """
        step = self.values(value[:, None])[:, 0]
        error = step + (4 * leak[:, None] + ROUNDING) * largest
        size = np.sqrt((value.astype(np.float64) ** 2).mean(axis=-1))
        r = 0.5 * np.sqrt((step**2).mean(axis=-1)) / size
        return error, 1 / np.sqrt(1 + r**2) - 4 * leak * largest / size

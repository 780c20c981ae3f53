"""Precision of a page, and the ladder that chooses it by distance from the current token."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pagedkv.allocator.errors import ConfigError

QUANTIZED_BITS = (2, 3, 4, 8)
GROUP_TOKENS = 64
"""Tokens that share one key scale and bias per channel; page sizes are multiples of it."""

_PRECISION = re.compile(r"K(\d{1,4})V(\d{1,4})", re.IGNORECASE)
_DISTANCE = re.compile(r"\d{1,15}")


@dataclass(frozen=True)
class Precision:
    """Bits per key and per value element of a page: 16/16 is the hot type stored as it is.

    Attributes:
        key_bits: 2, 3, 4, 8 or 16.
        value_bits: 2, 3, 4, 8 or 16; 16 exactly when `key_bits` is 16.
    """

    key_bits: int
    value_bits: int

    def __post_init__(self) -> None:
        pair = (self.key_bits, self.value_bits)
        if pair != (16, 16) and not all(bits in QUANTIZED_BITS for bits in pair):
            raise ConfigError(
                f"unknown precision K{self.key_bits}V{self.value_bits}: "
                f"bits are {', '.join(map(str, QUANTIZED_BITS))} (as in K8V4), or write fp16"
            )

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Read ``"fp16"`` or ``"K<bits>V<bits>"``, in any case.

        Raises:
            ConfigError: if the text is neither, or the bits are not offered.
        """
        word = text.strip()
        if word.lower() == "fp16":
            return cls(16, 16)
        match = _PRECISION.fullmatch(word)
        if not match:
            raise ConfigError(
                f"unknown precision {text!r}: write fp16, or key and value bits as in K4V4"
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def quantized(self) -> bool:
        """Whether pages of this precision hold codes and not 16-bit numbers."""
        return self.key_bits != 16

    @property
    def doubled(self) -> Precision:
        """With twice the bits, or the next number that there is, but no more than 8."""
        if not self.quantized:
            return self
        key, value = (
            next((n for n in QUANTIZED_BITS if n >= 2 * bits), QUANTIZED_BITS[-1])
            for bits in (self.key_bits, self.value_bits)
        )
        return Precision(key, value)

    def __str__(self) -> str:
        return f"K{self.key_bits}V{self.value_bits}" if self.quantized else "fp16"


@dataclass(frozen=True)
class Ladder:
    """Precision by distance: step i holds below ``reach[i]`` tokens, the last for all beyond.

    Written ``"K8V4:8192,K4V4"``: pages whose newest token is fewer than 8192 tokens away are
    K8V4, all others K4V4. A leading ``fp16:N`` keeps 16-bit pages up to distance N; the hot
    window (`TierConfig.hot_tokens`) is 16 bit whatever the ladder says.

    Attributes:
        steps: precisions, nearest first, each storing no more bits in total than the one before.
        reach: distances in tokens where a step ends, increasing; one fewer than `steps`.
    """

    steps: tuple[Precision, ...]
    reach: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.steps or len(self.reach) != len(self.steps) - 1:
            raise ConfigError(
                f"a ladder needs a distance on each step but the last, as in 'K8V4:8192,K4V4': "
                f"got {len(self.steps)} steps and {len(self.reach)} distances"
            )
        if any(a >= b for a, b in zip((0, *self.reach), self.reach, strict=False)):
            raise ConfigError(f"ladder distances must increase from 1 up, got {list(self.reach)}")
        sums = [p.key_bits + p.value_bits for p in self.steps]
        if any(a < b for a, b in itertools.pairwise(sums)):
            raise ConfigError(
                f"ladder '{self}' grows more precise with distance: a page only ever loses bits, "
                f"so order the steps from most to fewest bits"
            )

    @classmethod
    def parse(cls, text: str) -> Ladder:
        """Read a ladder such as ``"fp16:512,K8V4:8192,K4V4"`` or a single precision.

        Raises:
            ConfigError: on an unknown precision, a missing or non-increasing distance, or steps
                that gain bits with distance.
        """
        steps: list[Precision] = []
        reach: list[int] = []
        parts = text.split(",")
        for i, part in enumerate(parts):
            name, colon, distance = part.partition(":")
            steps.append(Precision.parse(name))
            if not colon and i < len(parts) - 1:
                raise ConfigError(
                    f"ladder {text!r}: step {part.strip()!r} needs a distance, as in 'K8V4:8192'"
                )
            if colon:
                if not _DISTANCE.fullmatch(distance.strip()):
                    raise ConfigError(f"ladder {text!r}: {distance!r} is not a distance in tokens")
                reach.append(int(distance))
        if len(reach) == len(steps):
            raise ConfigError(
                f"ladder {text!r}: the last step holds for everything beyond, "
                f"so it takes no distance (append a step, or drop ':{reach[-1]}')"
            )
        return cls(tuple(steps), tuple(reach))

    def at(self, distance: int) -> Precision:
        """The precision for a page whose newest token is `distance` tokens before the current."""
        for precision, end in zip(self.steps, self.reach, strict=False):
            if distance < end:
                return precision
        return self.steps[-1]

    def rank(self, precision: Precision) -> int:
        """How far down the ladder `precision` stands (the deepest such step); -1 if on no step."""
        return max((i for i, p in enumerate(self.steps) if p == precision), default=-1)

    @property
    def doubled(self) -> Ladder:
        """With twice the bits on every step (`Precision.doubled`), and on none less than beyond."""
        steps = [self.steps[-1].doubled]
        for precision in reversed(self.steps[:-1]):
            more, beyond = precision.doubled, steps[0]
            keys, values = (more.key_bits, beyond.key_bits), (more.value_bits, beyond.value_bits)
            steps.insert(0, Precision(max(keys), max(values)))
        ends = [i for i, pair in enumerate(itertools.pairwise(steps)) if pair[0] != pair[1]]
        return Ladder(
            tuple(steps[i] for i in [*ends, len(steps) - 1]), tuple(self.reach[i] for i in ends)
        )

    @property
    def weight(self) -> int:
        """What a token far away takes, beside other ladders: half bits of a key and a value.

        Codes come with a scale and a bias in 16 bits for 64 numbers (`PageGeometry`).
        """
        last = self.steps[-1]
        return 2 * (last.key_bits + last.value_bits) + (2 if last.quantized else 0)

    def beyond(self, distance: int) -> tuple[Precision, ...]:
        """The steps that can occur at `distance` or farther, each once, nearest first."""
        first = sum(distance >= end for end in self.reach)
        return _unique(self.steps[first:])

    def __str__(self) -> str:
        parts = [f"{p}:{r}" for p, r in zip(self.steps, self.reach, strict=False)]
        return ",".join([*parts, str(self.steps[-1])])


def _unique(items: Iterable[Precision]) -> tuple[Precision, ...]:
    return tuple(dict.fromkeys(items))

"""How answers are compared: lengths, legs, segments, and the bootstrap."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pagedkv.errors import ConfigError

PREFILL, DECODE = "prefill", "decode"
LEGS = (PREFILL, DECODE)
MOST_STEP = 8
"""Tokens of a call that is attended as a decode step, at most."""


@dataclass(frozen=True)
class EvalSettings:
    """How to compare. Validated when it is made.

    Attributes:
        tokens: of a segment; in the decode leg the last `decode_tokens` of them come one by one.
        chunk: tokens per call of a prompt.
        legs: ``"prefill"``, ``"decode"`` or both.
        decode_tokens: true tokens that follow the prompt of the decode leg.
        decode_step: of these per call: 1 to 8.
        segments: disjoint pieces of each text.
        offset: tokens of a text before the first of them.
        seed: of the bootstrap.
        resamples: of it.
        block: positions that it draws together, since neighbours have much in common.

    Raises:
        ConfigError: naming the setting, what was given, and what would do.
    """

    tokens: int = 8192
    chunk: int = 256
    legs: tuple[str, ...] = LEGS
    decode_tokens: int = 2048
    decode_step: int = 1
    segments: int = 1
    offset: int = 0
    seed: int = 0
    resamples: int = 2000
    block: int = 64

    def __post_init__(self) -> None:
        leasts = {"tokens": 2, "offset": 0}
        for name in ("tokens", "chunk", "decode_tokens", "segments", "offset", "resamples"):
            value, least = getattr(self, name), leasts.get(name, 1)
            if value < least:
                raise ConfigError(f"{name} is a number from {least} up, got {value}")
        if not 1 <= self.decode_step <= MOST_STEP:
            raise ConfigError(
                f"decode_step is 1 to {MOST_STEP} tokens (more are a prompt), "
                f"got {self.decode_step}"
            )
        unknown = [leg for leg in self.legs if leg not in LEGS]
        if unknown or not self.legs:
            raise ConfigError(f"legs are {' and '.join(LEGS)}, got {', '.join(unknown) or 'none'}")
        if DECODE in self.legs and self.decode_tokens >= self.tokens:
            raise ConfigError(
                f"the decode leg needs a prompt before its {self.decode_tokens:,} tokens, and a "
                f"segment has {self.tokens:,}: give more tokens or fewer decode_tokens"
            )
        if DECODE in self.legs and self.decode_tokens < 2 * self.block:
            raise ConfigError(
                f"a trend over {self.decode_tokens:,} decode_tokens says nothing: give "
                f"{2 * self.block} or more, or only the leg {PREFILL}"
            )

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the decode leg begins with."""
        return self.tokens - self.decode_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

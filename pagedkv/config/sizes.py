"""Numbers as people write them: ``"8GB"`` is 8e9 bytes, ``"8GiB"`` is 8 · 2^30."""

from __future__ import annotations

import re
from typing import Any

from pagedkv.errors import ConfigError

_UNITS = {"": 1, "B": 1}
_UNITS.update({f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")})
_UNITS.update({f"{p}IB": 1024 ** (i + 1) for i, p in enumerate("KMGT")})
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_DIGITS = 40
"""More are no size that can be meant, and beyond a few thousand Python does not read them."""

MOST = 2**63 - 1
"""Bytes or tokens that can be meant."""

_SHOWN = 60
"""Characters of a wrong value in an error."""


def parse_size(size: int | str, name: str = "size") -> int:
    """Bytes of a size.

    Args:
        size: an int in bytes, or text such as ``"64MB"``, ``"1.5GiB"``, ``"4096"``.
        name: what the size is for, used in the error.

    Raises:
        ConfigError: if the text is no size, or negative.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ConfigError(f"{name}={shown(size)} is not a size: give bytes, or text such as '2GB'")
    nbytes = size if isinstance(size, int) else _parse(size, name)
    if not 0 <= nbytes <= MOST:
        problem = "negative" if nbytes < 0 else "more than there can be"
        raise ConfigError(f"{name}={shown(size)} is {problem}: give bytes, or text such as '2GB'")
    return nbytes


def _parse(size: str, name: str) -> int:
    match = _SIZE.fullmatch(size.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ConfigError(
            f"{name}={shown(size)} is not a size: write a number with B, KB, MB, GB, TB "
            f"(powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)"
        )
    if len(match[1]) > _DIGITS:
        return MOST + 1
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def whole_number(value: Any, name: str) -> int:
    """A number without a fraction, of whatever type.

    Raises:
        ConfigError: if it is none.
    """
    try:
        number = int(value)
        if number == value and not isinstance(value, (str, bytes)):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{name} is a whole number, got {shown(value)}")


def shown(value: object) -> str:
    """A value for an error: short, and without an error of its own."""
    try:
        text = repr(value)
    except Exception:  # such as of a number of more than 4,300 digits
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def format_size(nbytes: float) -> str:
    """Bytes for reading: three digits and a decimal unit, such as ``"57.7 MB"``."""
    value = float(nbytes)
    for unit in ("B", "KB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB" if value < 999.5 else f"{value:.0f} TB"

"""The releases of MLX and mlx-lm that are supported, as pyproject.toml declares them."""

from __future__ import annotations

import importlib.metadata
import re

MLX = "0.32.4"
"""The oldest. 0.32.0 to 0.32.2 have no `mx.get_memory_limit`; up to 0.32.3 an error in what numpy
has evaluated, such as a kernel that does not compile, ends the process, and one in a thread of MLX
is lost: numbers are missing without a word."""

MLX_LM, NEXT_MLX_LM = "0.32", "0.33"
"""The oldest, and the first that was not tried: `pagedkv serve` leans on inner names."""


def version_of(package: str) -> str | None:
    """The installed version; None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def unsupported(package: str) -> str:
    """Why the installed release of a package is none that pagedkv is made for.

    Empty if it is, or if there is none.

    Args:
        package: ``"mlx"`` or ``"mlx-lm"``.
    """
    oldest, above = (MLX, None) if package == "mlx" else (MLX_LM, NEXT_MLX_LM)
    found = version_of(package)
    if found is None:
        return ""
    if _numbers(found) < _numbers(oldest) or (above and _numbers(found) >= _numbers(above)):
        below = f" and older than {above}" if above else ""
        return f"{package} {found} is installed, and must be {oldest} or newer{below}"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])

"""mlx-vlm for tests: the package as it is published, stand-ins for what it needs beside its models.

Importing any part of mlx-vlm imports its server, its training and its image and audio
processing, and they a gigabyte of other packages. Its language models, caches and generators need
none of those. `tests/mlx_vlm.txt` pins the release, which is installed without what it requires.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest

STAND_INS = frozenset({
    "PIL", "cryptography", "cv2", "datasets", "fastapi", "llguidance", "miniaudio", "mlx_audio",
    "requests", "sounddevice", "soundfile", "starlette", "torch", "uvicorn", "websockets",
})  # fmt: skip
"""Packages that mlx-vlm imports, and that no test needs."""


MISSING = "mlx-vlm is not installed: pip install --no-deps -r tests/mlx_vlm.txt"


class _Nothing(type):
    """Classes that have every attribute and can be called, as decorators or bases for instance."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing(name)

    def __or__(cls, other: Any) -> Any:
        return Any

    __ror__ = __or__

    def __getitem__(cls, _: Any) -> Any:
        return cls


def _nothing(name: str) -> _Nothing:
    return _Nothing(name, (_Anything,), {})


class _Anything(metaclass=_Nothing):
    """What stands for each name in a package that is not there."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __init_subclass__(cls, **_: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing(name)

    def __call__(self, *given: Any, **_: Any) -> Any:
        return given[0] if len(given) == 1 and callable(given[0]) else self


class _Module(ModuleType):
    __path__: Sequence[str] = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of `STAND_INS`; asked last, so that a package that is there is used."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in STAND_INS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def load(name: str = "") -> ModuleType:
    """A module of mlx-vlm; the test that asks is skipped if the package is not installed.

    Args:
        name: below ``mlx_vlm``, as in ``"models.cache"``; the package itself if empty.

    Raises:
        ImportError: if the module needs what is neither there nor stood in for.
    """
    if importlib.util.find_spec("mlx_vlm") is None:
        pytest.skip(MISSING, allow_module_level=True)
    # Looks for packages when it is imported, and must not find stand-ins.
    images = importlib.import_module("transformers.image_utils")
    if not hasattr(images, "PILImageResampling"):  # there with PIL only
        images.PILImageResampling = _nothing("PILImageResampling")  # type: ignore[attr-defined]
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        return importlib.import_module(f"mlx_vlm.{name}" if name else "mlx_vlm")
    finally:
        sys.meta_path.remove(finder)

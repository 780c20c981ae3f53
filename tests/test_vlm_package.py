"""mlx-vlm as the tests have it: the real package, nothing real in it replaced."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests import vlm_package


def test_it_is_the_release_that_is_pinned() -> None:
    package = vlm_package.load()
    pinned = re.search(r"^mlx-vlm==(\S+)", _requirements(), re.MULTILINE)
    assert pinned and package.__version__ == pinned[1]


def test_stand_ins_are_found_while_it_is_imported_only() -> None:
    vlm_package.load("server.app")
    assert not [f for f in vlm_package.sys.meta_path if isinstance(f, vlm_package._Finder)]
    with pytest.raises(ImportError):
        importlib.import_module("torch.not_imported_by_mlx_vlm")


def test_what_is_there_is_not_stood_in_for() -> None:
    numpy, finder = importlib.util.find_spec("numpy"), vlm_package._Finder()
    assert numpy and finder.find_spec("numpy") is None and finder.find_spec("mlx_lm") is None


def _requirements() -> str:
    return Path(__file__).with_name("mlx_vlm.txt").read_text()

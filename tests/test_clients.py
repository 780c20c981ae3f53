"""OpenAI's client for Python gets from `serve` what it gets from mlx_lm.server.

`make protocols` has Node's, litellm and mlx-lm's own tests too, and a model that calls tools.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.client_campaign import campaign, python_client
from tests.models import byte_model


def test_openai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "model").mkdir()
    folder = byte_model(tmp_path / "model", larger=True)
    found = campaign(folder, {"openai": python_client})
    assert found == {"openai": (11, [])}

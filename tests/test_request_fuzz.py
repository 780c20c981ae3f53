"""Some of the requests of `tests.request_fuzz`; `make requests` sends more."""

from __future__ import annotations

from pathlib import Path

from tests.models import byte_model
from tests.request_fuzz import campaign


def test_requests_of_every_kind_harm_nobody(tmp_path: Path) -> None:
    seen = campaign(byte_model(tmp_path, larger=True), 300, seed_=1)
    assert seen["known"] > 10 and seen["whole 200"] > 10 and seen["whole 400"] > 50, seen

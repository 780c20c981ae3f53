"""Some of the ends of `tests.server_kills`; `make ends` makes more."""

from __future__ import annotations

import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.models import byte_model
from tests.served import NO_END, TIERS, Served
from tests.server_kills import LIMIT, Campaign, campaign


def test_servers_that_are_stopped_and_killed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    made = campaign(byte_model(tmp_path / "model", larger=True), tmp_path / "cold", 8, seed=1)
    assert isinstance(made, Campaign) and made.seen["found"] and made.seen["flushed"]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_an_answer_under_way_ends_with_an_error(tmp_path: Path, sign: int) -> None:
    folder = byte_model(tmp_path, larger=True)
    with Served(folder, *TIERS, "--warm", "4MB", "--stop-seconds", "4") as server:
        got: list[bytes] = []
        body = {"prompt": "hello", "max_tokens": 100_000, "stream": True, "logit_bias": NO_END}
        client = threading.Thread(target=lambda: got.append(server.send(body)[1]))
        client.start()

        time.sleep(1.5)
        code, took = server.stop(sign)
        client.join()
        assert code == (143 if sign == signal.SIGTERM else 130) and took < LIMIT
        assert b"StoppedError" in got[0] and b"data: [DONE]" not in got[0]
        assert "Traceback" not in server.text()


def test_bodies_that_never_come_hold_up_no_end(tmp_path: Path) -> None:
    folder = byte_model(tmp_path, larger=True)
    with Served(folder, *TIERS, "--warm", "4MB", "--stop-seconds", "4") as server:
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n"
            s.sendall(head + b"{")
            time.sleep(0.5)
            code, took = server.stop()
            assert code == 143 and took < LIMIT
            assert s.recv(100).startswith(b"HTTP/1.1 503")
        assert "Traceback" not in server.text()

"""`pagedkv serve` as a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TIERS = ("--hot-tokens", "64", "--sink-tokens", "4", "--kv", "fp16", "--page-tokens", "256")
"""16-bit pages behind a small window: what is reused changes no number."""


NO_END = {"256": -100}
"""`logit_bias` with which a model of bytes does not end its text."""


def send(
    port: int,
    body: Any,
    path: str = "/v1/completions",
    method: str = "POST",
    headers: dict[str, str] | None = None,
    seconds: float = 60,
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers (names in lower case) of one request.

    Args:
        port: on 127.0.0.1.
        body: bytes as they are, None for none, or what is sent as JSON.
        path: where.
        method: how.
        headers: besides those that are needed.
        seconds: to wait.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(method, path, data, headers or {})
        response = connection.getresponse()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return response.status, response.read(), fields
    finally:
        connection.close()


class Served:
    """A server, from its first line to its end.

    Attributes:
        port: where it listens on 127.0.0.1.
        process: what runs it.
        log: the lines that it wrote to standard error.
    """

    def __init__(
        self,
        folder: str,
        *options: str,
        command: Sequence[str] = ("pagedkv", "serve"),
        wait: bool = True,
    ) -> None:
        """Start one.

        Args:
            folder: of its model.
            options: of the command.
            command: a module and what follows it.
            wait: until it listens.
        """
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        line = [sys.executable, "-m", *command, "--model", folder, "--port", str(self.port)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*line, *options], env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            self.wait()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(iter(self.process.stderr.readline, ""))

    def wait(self, seconds: float = 120) -> None:
        """Until it listens."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, "".join(self.log)[-2000:]
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.02)
        raise AssertionError("it does not listen")

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def stop(self, sign: int = signal.SIGTERM, seconds: float = 60) -> tuple[int, float]:
        """End it; returns the exit code and the seconds that it took."""
        start = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(sign)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise
        took = time.monotonic() - start
        self._reader.join(10)
        return self.process.returncode, took

    def send(self, body: Any, *args: Any, **options: Any) -> tuple[int, bytes, dict[str, str]]:
        """See `send`."""
        return send(self.port, body, *args, **options)

    def ask(self, prompt: str, max_tokens: int = 3, **more: Any) -> dict[str, Any]:
        """The answer to a prompt, which has to be 200."""
        status, data, _ = self.send({"prompt": prompt, "max_tokens": max_tokens, **more})
        assert status == 200, (status, data[:500])
        answer: dict[str, Any] = json.loads(data)
        return answer

    def text(self) -> str:
        """What it wrote to standard error."""
        return "".join(self.log)

"""mlx-lm's handler without a socket: what it writes goes to the event loop, piece by piece.

Everything that it makes of chats, tools, reasoning and events is mlx-lm's own; the door is not.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
import time
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

from mlx_lm import server

from pagedkv.errors import PagedKVError
from pagedkv.integrations.server.errors import as_ours, fields_of, status_of, told
from pagedkv.integrations.server.requests import PagedResponseGenerator, Refusal
from pagedkv.integrations.server.schema import Asked

_IN_FLIGHT = 32
"""Pieces of an answer that wait for a client, at most."""


@dataclass
class Head:
    """Status and header fields of an answer."""

    status: int
    fields: list[tuple[str, str]] = field(default_factory=list)


class Exchange:
    """One answer on its way from the thread that writes it to the event loop.

    Attributes:
        pieces: the head, then bytes, then None.
        gone: set once nobody waits for the answer any more.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make one, in the event loop."""
        self._loop = loop
        self.pieces: asyncio.Queue[Head | bytes | None] = asyncio.Queue(_IN_FLIGHT)
        self.gone = threading.Event()

    def put(self, piece: Head | bytes | None) -> None:
        """Hand a piece over, when there is room for it.

        Raises:
            BrokenPipeError: if nobody waits for it.
        """
        while not self.gone.is_set():
            try:
                handed = asyncio.run_coroutine_threadsafe(self.pieces.put(piece), self._loop)
            except RuntimeError:  # the loop has ended
                break
            try:
                while not self.gone.is_set():
                    try:
                        return handed.result(0.5)
                    except NotYet:
                        pass
            finally:
                handed.cancel()
        raise BrokenPipeError("the client has gone")


class SocketlessHandler(server.APIHandler):  # type: ignore[misc]
    """Answers one request; every error is told to the client, also in mid-answer."""

    def __init__(  # not the base's, which reads from a socket
        self,
        generator: PagedResponseGenerator,
        path: str,
        asked: Asked,
        named: str,
        exchange: Exchange,
        fingerprint: str,
    ) -> None:
        """Make one for one request.

        Args:
            generator: the generation thread.
            path: of the endpoint.
            asked: what the request says.
            named: how the answer is to name the model.
            exchange: where the answer goes.
            fingerprint: of the system, for the answer.
        """
        body = json.dumps(asked.body).encode()
        self.created, self.response_generator = int(time.time()), generator
        self.system_fingerprint, self.path, self._named = fingerprint, path, named
        self.headers = Message()
        self.headers["Content-Length"] = str(len(body))
        self.rfile, self.wfile = io.BytesIO(body), self
        self._exchange, self._asked, self._head, self._begun = exchange, asked, Head(500), False

    def run(self) -> None:
        """Answer; returns when the whole answer has been handed over, or nobody waits for it."""
        try:
            try:
                self.do_POST()
            except BrokenPipeError:
                raise
            except Exception as e:
                # Its text may have parts of a prompt in it: that is for the client alone.
                logging.error(f"A request ends with {type(e).__name__}")
                self._tell(as_ours(e))
            self._exchange.put(None)
        except BrokenPipeError:
            pass

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """Answer; see `APIHandler.handle_completion`."""
        request.salt, request.gone = self._asked.salt, self._exchange.gone
        try:
            super().handle_completion(request, stop_words)
        except Refusal as e:
            self._tell(e.error)
        except PagedKVError as e:
            self._tell(e)

    def generate_response(self, *args: Any, **options: Any) -> dict[str, Any]:
        """See `APIHandler.generate_response`; the model has the name that was asked for."""
        return {**super().generate_response(*args, **options), "model": self._named}

    def completion_usage_response(self, *args: Any, **options: Any) -> dict[str, Any]:
        """See `APIHandler.completion_usage_response`."""
        return {**super().completion_usage_response(*args, **options), "model": self._named}

    def _tell(self, error: Exception) -> None:
        """As an event where a stream has begun, else as a status of its own."""
        body = json.dumps(told(error)).encode()
        if self._begun:
            if self.stream:
                self.write(b"data: " + body + b"\n\n")
            return
        self._set_completion_headers(status_of(error))
        for name, value in fields_of(error).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.write(body)

    # What BaseHTTPRequestHandler does with a socket

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin a head, in place of one that was not sent."""
        self._head = Head(int(code))

    def send_header(self, keyword: str, value: str) -> None:
        """Add a field to the head."""
        self._head.fields.append((keyword, value))

    def _set_cors_headers(self) -> None:
        """The door's."""

    def end_headers(self) -> None:
        """Send the head."""
        self._begun = True
        self._exchange.put(self._head)

    def write(self, data: bytes) -> int:
        """Send a part of the body."""
        self._exchange.put(data)
        return len(data)

    def flush(self) -> None:
        """Nothing waits here."""

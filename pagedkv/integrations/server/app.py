"""The door: who may ask, how much at once, and how answers reach them. An ASGI application."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlx_lm import server
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pagedkv.config.sizes import format_size
from pagedkv.integrations.server.access import Access, Limits
from pagedkv.integrations.server.errors import (
    AccessError,
    BusyError,
    ForeignError,
    LateError,
    RequestError,
    StoppedError,
    TooLargeError,
    UnknownModelError,
    fields_of,
    status_of,
    told,
)
from pagedkv.integrations.server.handler import Exchange, Head, SocketlessHandler
from pagedkv.integrations.server.requests import PagedResponseGenerator
from pagedkv.integrations.server.schema import SCHEMAS, Asked, read

BODY_SECONDS = 30.0
"""A body that has not come by then does not come."""

SEND_SECONDS = 60.0
"""A client that takes nothing of its answer for so long has gone."""

STILL_SECONDS = 120.0
"""A generation thread that has done nothing for so long is said to stand still."""


class Door:
    """Middleware that lets nobody in who may not ask."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        """Stand in front of an application."""
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        try:
            needs_none = scope["path"] == "/health" or scope["method"] == "OPTIONS"
            scope["client_key"] = self._access.check(headers, needs_none)
        except (ForeignError, AccessError) as e:
            await _refused(e)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _refused(error: Exception) -> Response:
    status = status_of(error)
    logging.info(f"A request is refused with {status}, {type(error).__name__}")
    return JSONResponse(told(error), status, fields_of(error))


class _Answering(Response):
    """The answer to one request, as the generation thread makes it."""

    def __init__(self, owner: Endpoints, asked: Asked, path: str) -> None:
        super().__init__()
        self._owner, self._asked, self._path = owner, asked, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(asyncio.get_running_loop())
        self._owner.start(self._path, self._asked, exchange)
        left = asyncio.ensure_future(_left(receive))
        try:
            while True:
                piece = asyncio.ensure_future(exchange.pieces.get())
                await asyncio.wait({piece, left}, return_when=asyncio.FIRST_COMPLETED)
                if not piece.done():
                    piece.cancel()
                    return
                if (message := piece.result()) is None:
                    break
                await asyncio.wait_for(send(_as_message(message)), SEND_SECONDS)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (OSError, TimeoutError):
            pass  # the client has gone
        except asyncio.CancelledError:
            logging.warning("An answer is cut off: the server ends")
        finally:
            exchange.gone.set()
            left.cancel()


async def _left(receive: Receive) -> None:
    """Until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _as_message(piece: Head | bytes) -> dict[str, Any]:
    if isinstance(piece, bytes):
        return {"type": "http.response.body", "body": piece, "more_body": True}
    headers = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in piece.fields]
    return {"type": "http.response.start", "status": piece.status, "headers": headers}


class Endpoints:
    """What can be asked for."""

    def __init__(self, generator: PagedResponseGenerator, limits: Limits) -> None:
        """Make them for one generation thread."""
        self._generator, self._limits = generator, limits
        self._fingerprint = server.get_system_fingerprint()
        self._created = int(time.time())
        self._under_way = 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(limits.requests, "pagedkv-answer")

    def start(self, path: str, asked: Asked, exchange: Exchange) -> None:
        """Have a thread answer a request; see `_Answering`."""
        provider = self._generator.model_provider
        named = asked.body.get("model") or provider.name
        mine = Asked(provider.own(asked.body), asked.salt)
        handler = SocketlessHandler(self._generator, path, mine, named, exchange, self._fingerprint)
        self._threads.submit(handler.run).add_done_callback(lambda done: self._leave())

    def _enter(self) -> None:
        with self._lock:
            if self._under_way >= self._limits.requests:
                raise BusyError(
                    f"{self._under_way:,} requests are under way or wait, and this server takes no "
                    f"more at once: come again in a while"
                )
            self._under_way += 1

    def _leave(self) -> None:
        with self._lock:
            self._under_way -= 1

    async def complete(self, request: Request) -> Response:
        """``POST /v1/completions``, ``/v1/chat/completions``."""
        try:
            self._enter()
        except BusyError as e:
            return _refused(e)
        try:
            asked = await self._read(request)
        except BaseException as e:
            self._leave()
            return _refused(_unread(e))
        salt = ":".join(filter(None, (request.scope.get("client_key", ""), asked.salt)))
        return _Answering(self, Asked(asked.body, salt), request.url.path)

    async def _read(self, request: Request) -> Asked:
        raw = await asyncio.wait_for(self._body(request), BODY_SECONDS)
        # Elsewhere: a large one takes a while to be read.
        return await asyncio.to_thread(read, request.url.path, raw, self._limits)

    async def _body(self, request: Request) -> bytes:
        most = self._limits.body
        error = TooLargeError(f"a body has at most {format_size(most)} here (--max-body)")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise error
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise error
        return bytes(body)

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``, ``/v1/models/NAME``."""
        provider = self._generator.model_provider
        model = {
            "id": provider.name,
            "object": "model",
            "created": self._created,
            "owned_by": "pagedkv",
        }
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != provider.name:
            return _refused(UnknownModelError(f"there is only {provider.name!r} here"))
        return JSONResponse(model)

    async def health(self, request: Request) -> Response:
        """``GET /health``: whether requests are answered."""
        if not self._generator.is_healthy:
            return JSONResponse({"status": "unavailable"}, 503)
        if (still := self._generator.still) > STILL_SECONDS:
            return JSONResponse({"status": "stands still", "seconds": round(still)}, 503)
        return JSONResponse({"status": "ok"})

    async def watch(self, every: float = 5.0) -> None:
        """Say so whenever the generation thread stands still, and when it goes on."""
        limit = STILL_SECONDS
        while True:
            await asyncio.sleep(every)
            still = self._generator.still
            if still > limit:
                logging.error(f"The generation thread has done nothing for {still:.0f} s")
                limit *= 2
            elif still < STILL_SECONDS < limit:
                logging.warning("The generation thread goes on")
                limit = STILL_SECONDS


def _unread(error: BaseException) -> Exception:
    """What to answer where a request could not be read."""
    if isinstance(error, asyncio.CancelledError):  # the server ends, and has waited for this
        return StoppedError("the server is about to end")
    if isinstance(error, TimeoutError):
        return LateError(f"the body did not come within {BODY_SECONDS:.0f} s")
    if isinstance(error, (RequestError, TooLargeError)):
        return error
    if not isinstance(error, ClientDisconnect):  # who has gone sees no answer
        logging.error(f"A request cannot be read: {type(error).__name__}")
    return RequestError(f"the body cannot be read: {type(error).__name__}")


async def _absent(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    what = "no such address" if status == 404 else "this address does not take that method"
    posts = ", ".join(sorted(SCHEMAS))
    return JSONResponse(
        told(RequestError(f"{what}: POST {posts}; GET /v1/models, /health")),
        status,
        getattr(error, "headers", None),
    )


async def _failed(request: Request, error: Exception) -> Response:
    logging.error(f"A request ends with {type(error).__name__}")
    return JSONResponse(told(error), 500)


def make_app(endpoints: Endpoints, access: Access) -> ASGIApp:
    """The application: the door, answers for pages that may ask, and the endpoints."""
    routes: Sequence[Route] = [
        *(Route(path, endpoints.complete, methods=["POST"]) for path in SCHEMAS),
        Route("/v1/models", endpoints.models, methods=["GET"]),
        Route("/v1/models/{name:path}", endpoints.models, methods=["GET"]),
        Route("/health", endpoints.health, methods=["GET"]),
    ]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(access.origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
    )
    app = Starlette(
        routes=routes,
        middleware=[cors],
        exception_handlers={404: _absent, 405: _absent, Exception: _failed},
    )
    return Door(app, access)

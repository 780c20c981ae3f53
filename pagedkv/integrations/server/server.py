"""A server for one wrapped model: it listens, answers, and ends in time when it is told to."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import uvicorn
from mlx_lm import server

from pagedkv.errors import ConfigError, PagedKVError
from pagedkv.integrations.server.access import STOP_SECONDS, Access
from pagedkv.integrations.server.app import Endpoints, make_app
from pagedkv.integrations.server.prompt_cache import KeptPrompts
from pagedkv.integrations.server.provider import PagedModelProvider
from pagedkv.integrations.server.requests import PagedResponseGenerator, in_place

_GRACE, _TOLD, _WRITTEN = 0.2, 0.4, 0.8
"""Parts of that time: answers may go on; they are cut off with an error; prompts are on disk."""

CONNECTIONS = 1000
"""Clients that are connected at once; more are told to come again."""


class _Listening(uvicorn.Server):
    """uvicorn's server, which says when it listens and ends answers when it is to end."""

    def __init__(
        self,
        config: uvicorn.Config,
        generator: PagedResponseGenerator,
        endpoints: Endpoints,
        ready: Callable[[], None],
        seconds: float,
    ) -> None:
        super().__init__(config)
        self._generator, self._endpoints, self._ready = generator, endpoints, ready
        self._seconds = seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._watching = asyncio.ensure_future(self._endpoints.watch())
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watching.cancel()
        self._generator.end_within(self._seconds * _WRITTEN)
        asyncio.get_running_loop().call_later(self._seconds * _GRACE, self._generator.stop)
        await super().shutdown(sockets)


def listening(
    generator: PagedResponseGenerator,
    access: Access,
    ready: Callable[[], None] = lambda: None,
    seconds: float = STOP_SECONDS,
) -> uvicorn.Server:
    """A server that answers with a generation thread; `uvicorn.Server.run` runs it."""
    endpoints = Endpoints(generator, generator.model_provider.limits)
    config = uvicorn.Config(
        make_app(endpoints, access),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(seconds * _TOLD)),
    )
    return _Listening(config, generator, endpoints, ready, seconds)


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet.

    Raises:
        ConfigError: if it cannot be had.
    """
    made = None
    if not 0 <= port < 1 << 16:  # the system would take the rest of a division
        raise ConfigError(f"cannot listen at {host}:{port}: a port is a number from 0 to 65535")
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, UnicodeError) as e:
        if made is not None:
            made.close()
        reason = getattr(e, "strerror", None) or str(e)
        raise ConfigError(f"cannot listen at {host}:{port}: {reason}") from None
    return made


def serve(
    provider: PagedModelProvider,
    access: Access,
    ready: Callable[[], None] = lambda: None,
    explain: Callable[[Exception], str] = str,
    seconds: float = STOP_SECONDS,
) -> None:
    """Serve until the process is interrupted.

    Of several processes that share a model the first one listens. The others take part in what it
    generates, until it ends.

    Args:
        provider: with mlx_lm.server's options.
        access: who may ask.
        ready: called when the model is loaded and requests can come.
        explain: says why a model cannot be loaded.
        seconds: in which it ends when it is told to.

    Raises:
        ConfigError: if the model cannot be loaded, or not with these tiers, or the address cannot
            be had.
        PagedKVError: if a process of a group cannot go on.
    """
    args = provider.cli_args
    first = not mx.distributed.init().rank()
    sockets = [bound(args.host, args.port)] if first else []  # before the model takes its time
    generator = PagedResponseGenerator(provider, KeptPrompts(args.prompt_cache_size))
    try:
        try:
            generator.wait()
        except PagedKVError:
            raise
        except Exception as e:  # whatever a damaged folder makes of mlx-lm
            raise ConfigError(f"cannot load the model {args.model!r}: {explain(e)}") from e
        if first:
            listening(generator, access, ready, seconds).run(sockets)
        else:
            generator.join()
        if provider.is_distributed:
            generator.require_well()
    finally:
        for made in sockets:
            made.close()
        generator.end_within(seconds * _WRITTEN)
        if not generator.stop_and_join(None if provider.is_distributed else generator.left + 1):
            logging.error("The generation thread does not end: what it keeps may not be on disk")


def server_options(argv: Sequence[str], parser: type[argparse.ArgumentParser]) -> Any:
    """Read mlx_lm.server's own options with its own parser.

    Args:
        argv: the options.
        parser: made in place of argparse's, to say in its way what is wrong.
    """
    found: list[argparse.Namespace] = []
    own = argparse.Namespace(ArgumentParser=parser)
    with (
        in_place(server, argparse=own, ModelProvider=lambda args: args),
        in_place(server, run=lambda host, port, args: found.append(args)),
        in_place(sys, argv=["", *argv]),
    ):
        server.main()
    return found[0]

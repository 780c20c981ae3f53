"""mlx_lm.server with a paged cache: the same server, its models wrapped when they are loaded.

Batches, prompt caches and the HTTP side are mlx-lm's; `serving_requests` sees to requests that
want more pages than there are.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any

import mlx.core as mx
from mlx_lm import server, utils

from pagedkv.config import TierConfig
from pagedkv.errors import ConfigError, OutOfPagesError, PagedKVError
from pagedkv.kept_prompts import KeptPrompts
from pagedkv.models import unwrap, wrap, wrapping_of
from pagedkv.serving_requests import PagedResponseGenerator, Refusal, RequestError, in_place


class UnknownModelError(PagedKVError):
    """A request that names a model or an adapter that is nowhere to be found."""


class PagedModelProvider(server.ModelProvider):  # type: ignore[misc]
    """Loads models as mlx-lm's server does, and wraps them."""

    def __init__(
        self,
        cli_args: argparse.Namespace,
        config: TierConfig,
        prepare: Callable[[Any], None] = lambda model: None,
    ) -> None:
        """Make a provider; nothing is loaded yet.

        Args:
            cli_args: mlx_lm.server's own options.
            config: tiers of every model that is loaded.
            prepare: called with a model that was just loaded, such as to change its type.
        """
        self._config, self._prepare = config, prepare
        self.kept: KeptPrompts | None = None
        super().__init__(cli_args)

    def _load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> None:
        super()._load(model_path, adapter_path, draft_model_path)
        self._prepare(self.model)
        cache = wrap(self.model, self._config)
        self.is_batchable = self.draft_model is None and all(hasattr(c, "merge") for c in cache)
        wrapping = wrapping_of(self.model)
        assert wrapping is not None
        wrapping.pager.relief.append(self.give_one_up)

    def add_name(self, name: str, path: str) -> None:
        """Have requests that ask for `name` get the model at `path`."""
        self._model_map[name] = path

    def load_default(self) -> None:
        """Load the model of the command line, if there is none."""
        if self.model is None:
            super().load_default()

    def require_known(self, asked: server.ModelDescription) -> None:
        """Check that there is what a request names; nothing is loaded or given up for it.

        Args:
            asked: the names of a model, of a draft model and of an adapter.

        Raises:
            RequestError: if it names something by what is no text.
            UnknownModelError: if it is nowhere to be found.
        """
        loaded = self.model_key or ()  # also where it is no longer found
        wanted: tuple[tuple[str, Any, Any, str], ...] = (
            ("model", asked.model, self._model_map, "config.json"),
            ("draft_model", asked.draft, self._draft_model_map, "config.json"),
            ("adapters", asked.adapter, {}, "adapter_config.json"),
        )
        for what, given, names, file in wanted:
            if not isinstance(given, (str, NoneType)):
                raise RequestError(f"{what} is a name, got {type(given).__name__}")
            name = names.get(given, given)
            if name is not None and name not in loaded and not _found(name, file):
                raise UnknownModelError(
                    f"{what}: there is no {name!r}; name a folder or a hub id (owner/name), or "
                    f"leave it out for what this server has loaded"
                )

    def give_one_up(self) -> bool:
        """Drop the prompt cache that is longest unused; see `Pager.relief`."""
        if not self.kept:
            return False
        self.kept.trim_to(n_sequences=len(self.kept) - 1)
        return True

    def reset(self) -> None:
        """Let go of the model, and of everything that was kept of it but in ``cold_dir``."""
        wrapping = wrapping_of(self.model)
        if self.kept:
            if written := self.kept.flush():
                logging.info(f"{written} prompts stay in {self._config.cold_dir}")
            self.kept.trim_to(n_sequences=0)
        if wrapping is not None:
            wrapping.pager.relief.remove(self.give_one_up)
            unwrap(self.model)
            wrapping.pager.close()
        super().reset()


def _found(name: str, file: str) -> bool:
    """Whether there is a folder with a file, here or at the hub."""
    try:
        if Path(name).exists() or name.count("/") != 1:
            return Path(name, file).is_file()
        return Path(utils.snapshot_download(name, allow_patterns=[file]), file).is_file()
    except Exception as e:  # no name at all, none of the hub's, no network, no right to it
        logging.info(f"There is no {name!r}: {e}")
        return False


class PagedAPIHandler(server.APIHandler):  # type: ignore[misc]
    """mlx-lm's handler, which tells the client about every error, also in mid-answer."""

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """Answer; see `APIHandler.handle_completion`."""
        try:
            super().handle_completion(request, stop_words)
        except Refusal as e:
            self._tell(e.error, begun=False)
        except (PagedKVError, RuntimeError) as e:
            self._tell(e, begun=self.stream)

    def _tell(self, error: Exception, begun: bool) -> None:
        """As an event where a stream has begun, else as a status of its own."""
        told = {"error": {"message": str(error), "type": type(error).__name__}}
        if begun:
            self.wfile.write(f"data: {json.dumps(told)}\n\n".encode())
            self.wfile.flush()
            return
        body = json.dumps(told).encode()
        self._headers_buffer: list[bytes] = []  # those of the answer that does not come
        self._set_completion_headers(
            next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)
        )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


_STATUS: dict[type[Exception], int] = {
    RequestError: 400,
    UnknownModelError: 404,
    OutOfPagesError: 503,
}


def serve(
    provider: PagedModelProvider,
    ready: Callable[[], None] = lambda: None,
    explain: Callable[[Exception], str] = str,
) -> None:
    """Serve until the process is interrupted.

    Of several processes that share a model the first one listens. The others take part in what it
    generates, until it ends.

    Args:
        provider: with mlx_lm.server's options.
        ready: called when the model is loaded and requests can come.
        explain: says why a model cannot be loaded.

    Raises:
        ConfigError: if the model cannot be loaded, or not with these tiers.
        OSError: if the port cannot be had.
        PagedKVError: if a process of a group cannot go on.
    """
    args = provider.cli_args
    generator = PagedResponseGenerator(provider, KeptPrompts(args.prompt_cache_size))
    try:
        try:
            generator.wait()
        except PagedKVError:
            raise
        except Exception as e:  # whatever a damaged folder makes of mlx-lm
            raise ConfigError(f"cannot load the model {args.model!r}: {explain(e)}") from e
        if mx.distributed.init().rank():
            generator.join()
        else:
            ready()
            server._run_http_server(args.host, args.port, generator, handler_class=PagedAPIHandler)
        if generator.model_provider.is_distributed:
            generator.require_well()
    finally:
        generator.stop_and_join()


def server_options(argv: list[str], parser: type[argparse.ArgumentParser]) -> argparse.Namespace:
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

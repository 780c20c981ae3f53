"""The model that is served: loaded as mlx-lm's server does, wrapped, and known by its names."""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any

from mlx_lm import server, utils

from pagedkv.config.tier_config import TierConfig
from pagedkv.integrations.mlx_lm.probe import vocabulary_of
from pagedkv.integrations.mlx_lm.wrapping import unwrap, wrap, wrapping_of
from pagedkv.integrations.server.access import Limits
from pagedkv.integrations.server.errors import RequestError, UnknownModelError
from pagedkv.integrations.server.prompt_cache import KeptPrompts

DEFAULT = "default_model"
"""mlx-lm's name for the model of the command line."""


class PagedModelProvider(server.ModelProvider):  # type: ignore[misc]
    """Loads models as mlx-lm's server does, and wraps them.

    Attributes:
        limits: of what requests may ask for.
        others: whether requests may have other models, drafts and adapters loaded.
        any_name: whether the model that is served answers to every name.
        name: what it is called.
        vocabulary: tokens that the model knows, from 0 on; 0 while none is loaded.
        end: no prompt is written to disk after that, on `time.monotonic`'s clock.
    """

    def __init__(
        self,
        cli_args: argparse.Namespace,
        config: TierConfig,
        prepare: Callable[[Any], None] = lambda model: None,
        *,
        name: str = "",
        limits: Limits | None = None,
        others: bool = False,
        any_name: bool = False,
    ) -> None:
        """Make a provider; nothing is loaded yet.

        Args:
            cli_args: mlx_lm.server's own options.
            config: tiers of every model that is loaded.
            prepare: called with a model that was just loaded, such as to change its type.
            name: what the model is called; where it is if empty.
            limits: of what requests may ask for; see there if None.
            others: whether requests may have other models loaded.
            any_name: whether the model answers to every name.
        """
        self._config, self._prepare = config, prepare
        self.kept: KeptPrompts | None = None
        self.limits, self.others, self.any_name = limits or Limits(), others, any_name
        self.name = name or str(cli_args.model)
        self.vocabulary, self.end = 0, math.inf
        super().__init__(cli_args)
        path = str(cli_args.model)
        self._names = {DEFAULT, self.name, path, str(Path(path).resolve()), Path(path).name}

    def own(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request with mlx-lm's name for what is served, where it names that or nothing.

        Requests that name one model in several ways can share a batch then.
        """
        if self.any_name or body.get("model") in self._names:
            body = {**body, "model": DEFAULT}
        if "draft_model" in body and body["draft_model"] == self.cli_args.draft_model:
            body = {**body, "draft_model": DEFAULT}
        if body.get("adapters") == self.cli_args.adapter_path:
            body = {key: value for key, value in body.items() if key != "adapters"}
        if body.get("adapters") is not None and body.get("model", DEFAULT) == DEFAULT:
            # By that name mlx-lm would leave the adapter out.
            body = {**body, "model": str(self.cli_args.model)}
        return body

    def _load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> None:
        super()._load(model_path, adapter_path, draft_model_path)
        try:
            self._prepare(self.model)
            cache = wrap(self.model, self._config)
            self.vocabulary = vocabulary_of(self.model)
        except BaseException:
            self.reset()  # or it would be served as it is, by who asks for it again
            raise
        self.is_batchable = self.draft_model is None and all(hasattr(c, "merge") for c in cache)
        wrapping = wrapping_of(self.model)
        assert wrapping is not None
        wrapping.pager.relief.append(self.give_one_up)

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
            UnknownModelError: if it is not served, or nowhere to be found.
        """
        loaded = self.model_key or ()  # also where it is no longer found
        wanted: tuple[tuple[str, Any, Any, str], ...] = (
            ("model", asked.model, self._model_map, "config.json"),
            ("draft_model", asked.draft, self._draft_model_map, "config.json"),
            ("adapters", asked.adapter, {}, "adapter_config.json"),
        )
        for what, given, names, file in wanted:
            if not isinstance(given, (str, NoneType)):
                raise RequestError(f"it is a name, got {type(given).__name__}", what)
            if given is None or given == DEFAULT:
                continue
            if not self.others:
                raise UnknownModelError(
                    f"{what}: there is no {given[:80]!r} here, only {self.name!r}: leave it out "
                    f"for what is served (--any-model-name answers to every name, --other-models "
                    f"loads what is asked for)"
                )
            name = names.get(given, given)
            if name not in loaded and not _found(name, file):
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
            if written := self.kept.flush(self.end - time.monotonic()):
                logging.info(f"{written} prompts stay in {self._config.cold_dir}")
            self.kept.trim_to(n_sequences=0)
        if wrapping is not None:
            if self.give_one_up in wrapping.pager.relief:
                wrapping.pager.relief.remove(self.give_one_up)
            unwrap(self.model)
            wrapping.pager.close()
        self.vocabulary = 0
        super().reset()


def _found(name: str, file: str) -> bool:
    """Whether there is a folder with a file, here or at the hub."""
    try:
        if Path(name).exists() or name.count("/") != 1:
            return Path(name, file).is_file()
        return Path(utils.snapshot_download(name, allow_patterns=[file]), file).is_file()
    except Exception as e:  # no name at all, none of the hub's, no network, no right to it
        logging.info(f"There is no {name[:200]!r}: {type(e).__name__}")
        return False

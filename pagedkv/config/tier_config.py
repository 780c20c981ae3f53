"""What a user sets: `TierConfig`."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from pagedkv.allocator import Ladder, LayerLadders
from pagedkv.allocator.geometry import PAGE_TOKENS
from pagedkv.config.sizes import MOST, parse_size, shown
from pagedkv.errors import ConfigError
from pagedkv.tiers.budget import TierBudget
from pagedkv.tiers.checkpoints.manifest import StoreIdentity
from pagedkv.tiers.codec.transform import ROTATIONS

BACKENDS = ("auto", "kernel", "quantized", "dequantize")
TREATMENTS = ("auto", "none", *ROTATIONS)
DURABILITIES = ("process", "power")
HOT_DTYPES = ("model", "float16", "bfloat16")
AUTO, ALIKE = "auto", "same"
"""Of `TierConfig.layer_kv`: layers that look things up have twice the bits, or all are alike."""
LOOKUP_PART = 4
"""Of so many layers one is taken for one that looks things up (`retrieval_layers`)."""
KEPT_TOKENS = 4
"""First tokens that a cache of `max_kv_size` keeps for ever, as in mlx-lm."""
LEAST_KV_SIZE = 8
"""Those, and some new ones."""


@dataclass(frozen=True)
class TierConfig:
    """Budgets and precisions of a paged cache. Validated when it is made.

    Sizes are ints in bytes or text: ``"8GB"`` is 8e9, ``"8GiB"`` is 8 · 2^30.

    Attributes:
        hot_tokens: newest tokens kept in 16 bit, at least.
        sink_tokens: first tokens of the sequence kept in 16 bit for ever.
        kv: precision of older tokens: one for all (``"K4V4"``), or a ladder by distance from the
            current token (``"fp16:512,K8V4:8192,K4V4"``). ``"fp16"`` pages without quantizing.
        layer_kv: layers with another precision or ladder: ``"auto"`` gives twice the bits of `kv`
            (8 at most) to one layer in four of a wrapped model, those that look things up when it
            reads random tokens twice; ``"same"`` to none. Or layers by number,
            ``"K8V8@7,17-20"``, with ``;`` between several ladders.
        warm: memory for pages, all layers together.
        cold: disk for pages, all layers together; 0 for none.
        cold_dir: where to keep the cold files, so that what `PagedCache.flush` wrote can be
            resumed; a private temporary directory if None. Choose an internal NVMe disk. A
            relative path is made absolute here, and ``~`` is the home directory.
        durability: what a flushed sequence survives: ``"process"``, that the process is killed;
            ``"power"``, that the machine stops.
        write_limit: bytes written to disk per day (UTC), at most; None for no limit. All caches
            with the same `cold_dir` count together, over restarts; those without one in a process.
        max_kv_size: tokens that a layer without a window of its own holds and its queries see: the
            first 4 and the newest; None for all. The newest `hot_tokens` of them are in 16 bit, so
            pages need a size well above that. There are no `sink_tokens` then.
        page_tokens: 256, 512 or 1024 tokens per page; None picks the size with little padding.
        hot_dtype: None keeps 16-bit models' own type and float16 for float32 models; ``"model"``
            keeps float32 as well; or ``"float16"`` / ``"bfloat16"``.
        staging: memory for pages on their way in from disk: at least one batch of pages, at most
            8 MiB each; room for three keeps the disk busy.
        write_buffer: memory for pages on their way out to disk: at least one page.
        scratch: memory for one layer's dequantized pages in prefill; longer contexts are
            attended in tiles of this size.
        skip_below: the share of attention, at most, that any query head of a decode step may miss
            because cold pages that provably cannot weigh more are not read; 0 reads them all.
        cold_pages: cold pages that a decode step reads per layer, at most: those that could weigh
            most; None for no limit. They stay in memory for the next step, in addition to the
            warm budget. `CacheStats.skipped` bounds what is left out.
        bounds: memory for what is known of cold pages' keys, with one of those two; pages beyond
            it are always read. It takes an eighteenth of 4-bit pages.
        keep_free: memory that the machine should have left: with less, or when macOS says that
            memory is short, warm pages go to disk before the warm budget is used up, and what they
            took is given back. 0 never looks.
        prefix_salt: mixed into what prefixes are found by: sequences with different salts share
            nothing.
        treatment: what is done to keys and values before they are quantized to less than 8 bits,
            and undone around attention: ``"auto"`` is what wins a race on text that the model
            writes itself, once per model, head by head; nothing where queries cannot be seen, such
            as in a standalone cache;
            ``"hadamard"``, ``"fourier"`` and ``"householder"`` (which hardly mixes) rotate all
            without scaling, ``"none"`` leaves them; or the path of a file ``NAME.json`` that
            `Calibration.save` wrote, which is read when a model is wrapped (a path as `cold_dir`).
        backend: ``"auto"``, ``"kernel"``, ``"quantized"`` or ``"dequantize"``.

    Raises:
        ConfigError: naming the option, what was given, and what would do.
    """

    hot_tokens: int = 512
    sink_tokens: int = 64
    kv: str = "K4V4"
    layer_kv: str = AUTO
    warm: int | str = "2GB"
    cold: int | str = "64GB"
    cold_dir: str | None = None
    durability: str = "process"
    write_limit: int | str | None = None
    max_kv_size: int | None = None
    page_tokens: int | None = None
    hot_dtype: str | None = None
    staging: int | str = "32MiB"
    write_buffer: int | str = "16MiB"
    scratch: int | str = "256MiB"
    skip_below: float = 0.0
    cold_pages: int | None = None
    bounds: int | str = "256MiB"
    keep_free: int | str = "512MB"
    prefix_salt: str = ""
    treatment: str = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("hot_tokens", 1), ("sink_tokens", 0)):
            value = getattr(self, name)
            if not _whole(value) or not least <= value <= MOST:
                raise ConfigError(
                    f"{name} is a number of tokens from {least} up, got {shown(value)}"
                )
        size = self.max_kv_size
        if size is not None and not (_whole(size) and LEAST_KV_SIZE <= size <= MOST):
            raise ConfigError(
                f"max_kv_size is a number of tokens from {LEAST_KV_SIZE} up, or None for all of "
                f"them; got {shown(size)}"
            )
        _require_selection(self.skip_below, self.cold_pages)
        size = self.page_tokens
        if size is not None and not (_whole(size) and size in PAGE_TOKENS):
            raise ConfigError(
                f"page_tokens is one of {PAGE_TOKENS} or None, got {shown(self.page_tokens)}"
            )
        if self.hot_dtype is not None and not _named(self.hot_dtype, HOT_DTYPES):
            raise ConfigError(
                f"hot_dtype is None, 'model', 'float16' or 'bfloat16', got {shown(self.hot_dtype)}"
            )
        if not (_named(self.treatment, TREATMENTS) or names_file(self.treatment)):
            raise ConfigError(
                f"treatment is one of {', '.join(TREATMENTS)}, or a file NAME.json of `pagedkv "
                f"calibrate`; got {shown(self.treatment)}"
            )
        if not _named(self.backend, BACKENDS):
            raise ConfigError(f"backend is one of {', '.join(BACKENDS)}, got {shown(self.backend)}")
        require_durability(self.durability)
        if not isinstance(self.kv, str):
            raise ConfigError(
                f"kv is text such as 'K4V4' or 'K8V4:8192,K4V4', got {shown(self.kv)}"
            )
        known = _named(self.layer_kv, (AUTO, ALIKE))
        if not known and not (isinstance(self.layer_kv, str) and "@" in self.layer_kv):
            raise ConfigError(
                f"layer_kv is {AUTO!r}, {ALIKE!r}, or a ladder and the layers that have it, as in "
                f"'K8V8@7,17-20', with ';' between several; got "
                f"{shown(self.layer_kv)}"
            )
        if not isinstance(self.prefix_salt, str):
            raise ConfigError(f"prefix_salt is text, got {shown(self.prefix_salt)}")
        if self.cold_dir is not None:
            object.__setattr__(self, "cold_dir", absolute_path(self.cold_dir, "cold_dir"))
        if names_file(self.treatment):
            object.__setattr__(self, "treatment", absolute_path(self.treatment, "treatment"))
        self.budget()

    @cached_property
    def ladder(self) -> Ladder:
        """The parsed `kv`."""
        return Ladder.parse(self.kv)

    @cached_property
    def ladders(self) -> LayerLadders:
        """The parsed `kv` and `layer_kv`; all alike with ``"auto"``, before layers are known."""
        named = self.layer_kv not in (AUTO, ALIKE)
        return LayerLadders.parse(self.kv, self.layer_kv if named else "")

    @property
    def lookup_ladder(self) -> Ladder | None:
        """With ``"auto"``, what layers have that look things up; None if no layer has another."""
        doubled = self.ladder.doubled
        return doubled if self.layer_kv == AUTO and doubled != self.ladder else None

    def require_layers(self, layers: Collection[int]) -> None:
        """Check that the layers that `layer_kv` names are there.

        Args:
            layers: numbers of those that can be paged.

        Raises:
            ConfigError: naming those that cannot.
        """
        if unknown := [n for n, _ in self.ladders.others if n not in layers]:
            raise ConfigError(
                f"layer_kv names layers {unknown}, but this cache has {len(layers)} that can be "
                f"paged: {sorted(layers)}"
            )

    @property
    def without_model(self) -> TierConfig:
        """The same where nobody finds out which layers look things up: then all are alike."""
        return replace(self, layer_kv=ALIKE) if self.layer_kv == AUTO else self

    @property
    def selective(self) -> bool:
        """Whether decode steps may leave cold pages out."""
        return self.skip_below > 0 or self.cold_pages is not None

    def budget(self) -> TierBudget:
        """The same in bytes and tokens, as the tiers want it."""
        bounds = parse_size(self.bounds, "bounds")
        return TierBudget(
            warm_bytes=parse_size(self.warm, "warm"),
            cold_bytes=parse_size(self.cold, "cold"),
            cold_dir=self.cold_dir,
            ladders=self.ladders,
            hot_tokens=self.hot_tokens,
            sink_tokens=self.sink_tokens,
            page_tokens=self.page_tokens,
            staging_bytes=parse_size(self.staging, "staging"),
            write_buffer_bytes=parse_size(self.write_buffer, "write_buffer"),
            scratch_bytes=parse_size(self.scratch, "scratch"),
            write_limit=(
                None if self.write_limit is None else parse_size(self.write_limit, "write_limit")
            ),
            bounds_bytes=bounds if self.selective else 0,
            kept_pages=self.cold_pages or 0,
            keep_free=parse_size(self.keep_free, "keep_free"),
        )

    def store_identity(
        self, model: str, layers: int, treatments: str = "", *, found: bool = False
    ) -> StoreIdentity | None:
        """What names the store of flushed sequences; None if nothing is to last.

        Args:
            model: the model's fingerprint or name; empty for none.
            layers: layers that are paged.
            treatments: names what is done to keys and values; empty for nothing.
            found: whether layers that look things up are found out: the store says which.
        """
        if self.cold_dir is None or not model or not parse_size(self.cold, "cold"):
            return None
        if self.max_kv_size is not None:  # other tokens are in such pages
            model = f"{model} max_kv_size={self.max_kv_size}"
        if treatments:
            model = f"{model} treatment={treatments}"
        kv = f"{self.ladder};{self.lookup_ladder}@{AUTO}" if found else str(self.ladders)
        return StoreIdentity(model, layers, kv, self.sink_tokens, self.page_tokens, self.hot_dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; ``TierConfig(**config.to_dict())`` is the same again."""
        return asdict(self)


def lookup_count(layers: int) -> int:
    """How many of so many layers are taken for those that look things up, at most."""
    return layers // LOOKUP_PART


def names_file(treatment: object) -> bool:
    """Whether a treatment is a file of `pagedkv.calibrate`; it is not looked for."""
    return isinstance(treatment, str) and treatment.endswith(".json")


def absolute_path(path: object, name: str) -> str:
    """A path as it is meant now, whatever directory the process changes to.

    Args:
        path: text; a leading ``~`` or ``~user`` is a home directory.
        name: of the setting, for errors.

    Raises:
        ConfigError: if it is no text, empty, or cannot name a file.
    """
    if not isinstance(path, str):
        raise ConfigError(f"{name} is a path as text, or None, got {shown(path)}")
    try:
        possible = bool(path) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ConfigError(
            f"{name}={shown(path)} cannot name a file: write a path, or leave {name} out"
        )
    expanded = os.path.expanduser(path)  # noqa: PTH111  # Path's raises where there is no home
    if path[0] == "~" and expanded == path:
        raise ConfigError(
            f"{name}={shown(path)}: there is no such home directory; write ./{path} for a "
            f"directory of that name"
        )
    try:
        return str(Path(expanded).absolute())
    except OSError as e:
        raise ConfigError(
            f"{name}={shown(path)} is relative, and the working directory is gone ({e}): give an "
            f"absolute path"
        ) from e


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _named(value: object, names: Collection[str]) -> bool:
    """Whether a value is one of these words; arrays and types do not compare with words."""
    return isinstance(value, str) and value in names


def require_config(config: object) -> TierConfig:
    """The settings that a function was given; the defaults if None.

    Raises:
        ConfigError: if it is something else.
    """
    if config is None:
        return TierConfig()
    if not isinstance(config, TierConfig):
        raise ConfigError(
            f"config is a TierConfig, such as TierConfig(warm='2GB'), or None; got {shown(config)}"
        )
    return config


def _require_selection(skip_below: object, cold_pages: object) -> None:
    is_number = isinstance(skip_below, (int, float)) and not isinstance(skip_below, bool)
    if not is_number or not 0 <= skip_below < 1:  # type: ignore[operator]
        raise ConfigError(
            f"skip_below is the share of attention that may be missed, from 0 (none) to below 1, "
            f"such as 1e-4; got {shown(skip_below)}"
        )
    if cold_pages is not None and not (_whole(cold_pages) and 0 <= cold_pages <= MOST):
        raise ConfigError(
            f"cold_pages is a number of pages from 0 up, or None; got {shown(cold_pages)}"
        )


def require_durability(durability: object) -> None:
    """Check the name of a durability.

    Raises:
        ConfigError: if it is none.
    """
    if not _named(durability, DURABILITIES):
        raise ConfigError(
            f"durability is one of {', '.join(DURABILITIES)}, got {shown(durability)}"
        )

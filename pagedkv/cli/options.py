"""Options that several commands share: the tiers, token counts, rates, and mlx-lm's names."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pagedkv.config.sizes import MOST, parse_size, shown
from pagedkv.config.tier_config import BACKENDS, DURABILITIES, TREATMENTS, TierConfig
from pagedkv.errors import ConfigError

_TOKENS = re.compile(r"(\d+(?:\.\d+)?)([KM]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 1024, "M": 1024**2}
_DIGITS = 40
"""More are no number that can be meant, and beyond a few thousand Python does not read them."""
_MOST_SEED = 2**64 - 1
KV_GROUP_SIZE = 64

# option name, TierConfig field, metavar, help
_TIER_OPTIONS = (
    ("--hot-tokens", "N", "newest tokens kept in 16 bit"),
    ("--sink-tokens", "N", "first tokens kept in 16 bit for ever"),
    (
        "--kv",
        "LADDER",
        "precision of older tokens: K4V4, K8V4, fp16, or K8V4:8192,K4V4 by distance",
    ),
    (
        "--layer-kv",
        "LAYERS",
        "layers with another precision: auto (twice the bits where things are looked up), same "
        "(none), or K8V8@7,17-20",
    ),
    ("--warm", "SIZE", "memory for pages, all layers together"),
    ("--cold", "SIZE", "disk for pages, all layers together; 0 for none"),
    ("--cold-dir", "DIR", "directory to keep the cold files in, on an internal NVMe disk"),
    ("--durability", "NAME", f"what flushed tokens survive: {' or '.join(DURABILITIES)} failure"),
    ("--write-limit", "SIZE", "bytes written to disk per day, at most"),
    (
        "--max-kv-size",
        "N",
        "tokens a layer without a window of its own holds: the first 4 and the newest",
    ),
    ("--page-tokens", "N", "tokens per page: 256, 512 or 1024"),
    ("--hot-dtype", "TYPE", "type of the hot tokens: model, float16 or bfloat16"),
    ("--staging", "SIZE", "memory for pages on their way in from disk"),
    ("--write-buffer", "SIZE", "memory for pages on their way out to disk"),
    ("--scratch", "SIZE", "memory for one layer's dequantized pages in prefill"),
    ("--skip-below", "SHARE", "leave out cold pages that provably weigh less, such as 1e-4"),
    ("--cold-pages", "N", "cold pages read per layer and decode step, at most"),
    ("--bounds", "SIZE", "memory for what is known of cold pages' keys, with one of those two"),
    (
        "--keep-free",
        "SIZE",
        "memory the machine should have left: with less, pages go to disk early; 0 never looks",
    ),
    ("--prefix-salt", "TEXT", "prompts under different salts share no pages"),
    (
        "--treatment",
        "NAME",
        f"what is done to keys and values before they are quantized: {', '.join(TREATMENTS)}, or "
        f"a file of `pagedkv calibrate`",
    ),
    ("--backend", "NAME", f"how pages are attended: {', '.join(BACKENDS)}"),
)
_SHOWN = {
    "cold_dir": "a temporary one",
    "prefix_salt": "none",
    "write_limit": "none",
    "cold_pages": "all",
    "max_kv_size": "all",
}
_COUNTS = ("hot_tokens", "sink_tokens", "max_kv_size", "page_tokens", "cold_pages")


def add_tier_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `TierConfig`."""
    group = parser.add_argument_group(
        "tiers", "SIZE is bytes, or 64MB (powers of 1000), or 64MiB (powers of 1024)."
    )
    defaults = TierConfig()
    for flag, metavar, text in _TIER_OPTIONS:
        default = getattr(defaults, _field(flag))
        shown = _SHOWN.get(_field(flag), "automatic") if default in (None, "") else default
        group.add_argument(flag, metavar=metavar, help=f"{text} (default: {shown})")
    group.add_argument("--no-disk", action="store_true", help="the same as --cold 0")


def add_mlx_lm_options(parser: argparse.ArgumentParser) -> None:
    """Add mlx-lm's cache options under their own names."""
    group = parser.add_argument_group("mlx-lm's names for cache options")
    group.add_argument(
        "--kv-bits", metavar="BITS", help="bits of keys and values: 4 is --kv K4V4, 8,4 is K8V4"
    )
    group.add_argument(
        "--kv-group-size", metavar="N", help=f"only {KV_GROUP_SIZE}, the page codec's group"
    )


def tier_config(args: argparse.Namespace, base: TierConfig | None = None) -> TierConfig:
    """The tiers that the options describe.

    Args:
        args: parsed options; those not given keep the value of `base`.
        base: `TierConfig`'s defaults if None.

    Raises:
        ConfigError: naming the option and what would do.
    """
    given: dict[str, Any] = {}
    for flag, _, _ in _TIER_OPTIONS:
        value = getattr(args, _field(flag), None)
        if value is not None:
            name = _field(flag)
            given[name] = _PARSERS.get(name, _as_it_is)(value, name)
    if getattr(args, "no_disk", False):
        if given.get("cold_dir") or given.get("cold", "0") != "0":
            raise ConfigError(
                "--no-disk keeps every page in memory: leave --cold and --cold-dir out"
            )
        given["cold"] = 0
    kv = _kv_from_mlx_lm(args)
    if kv and "kv" in given:
        raise ConfigError(
            f"--kv {shown(given['kv'])} and --kv-bits {args.kv_bits} both set the precision"
        )
    if kv:
        given["kv"] = kv
    return TierConfig(**{**(base or TierConfig()).to_dict(), **given})


def _field(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _kv_from_mlx_lm(args: argparse.Namespace) -> str | None:
    """The precision that mlx-lm's options ask for, or None."""
    group = getattr(args, "kv_group_size", None)
    sizes = [] if group is None else [part.strip() for part in group.split(",")]
    if len(sizes) > 2 or any(size != str(KV_GROUP_SIZE) for size in sizes):
        raise ConfigError(
            f"--kv-group-size {shown(group)}: the page codec uses groups of {KV_GROUP_SIZE}; "
            f"leave the option out"
        )
    bits = getattr(args, "kv_bits", None)
    if bits is None:
        return None
    parts = str(bits).split(",")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(
            f"--kv-bits {shown(bits)}: give one number, or two as in 8,4 (keys, values)"
        )
    return f"K{parts[0].strip()}V{parts[-1].strip()}"


def parse_tokens(text: str | int, name: str) -> int:
    """A number of tokens: ``"131072"``, ``"128K"`` (131,072) or ``"1M"`` (1,048,576).

    Raises:
        ConfigError: if it is none, or more than there can be.
    """
    match = _TOKENS.fullmatch(str(text).strip().replace(",", "").replace("_", ""))
    if match is None:
        raise ConfigError(
            f"{name}={shown(text)} is not a number of tokens: write 131072, or 128K (K is 1,024, "
            f"M is 1,048,576)"
        )
    digits, unit = match[1], _UNITS[match[2].upper()]
    tokens = MOST + 1
    if len(digits) <= _DIGITS:
        tokens = int(float(digits) * unit) if "." in digits else int(digits) * unit
    if tokens > MOST:
        raise ConfigError(f"{name}={shown(text)} is more than there can be")
    return tokens


def parse_numbers(text: str, name: str, hint: str) -> list[int]:
    """Whole numbers with commas between them, such as ``"8,4"``.

    Args:
        text: as it was given.
        name: of the option.
        hint: what would do, for the error.

    Raises:
        ConfigError: if one is none.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= _DIGITS for part in parts):
        raise ConfigError(f"{name} {shown(text)}: {hint}")
    return [int(part) for part in parts]


def parse_share(text: str, name: str) -> float:
    """A share from 0 to 1, such as ``"1e-4"``.

    Raises:
        ConfigError: if it is no number.
    """
    try:
        return finite(text)
    except argparse.ArgumentTypeError:
        raise ConfigError(f"{name}={shown(text)} is no number: write 1e-4") from None


def parse_rate(text: str, name: str) -> int:
    """Bytes per second: ``"3GB/s"`` or ``"3GB"``.

    Raises:
        ConfigError: if it is none, or zero.
    """
    value = parse_size(text.strip().removesuffix("/s"), name)
    if value < 1:
        raise ConfigError(f"{name}={shown(text)} is no rate: write 3GB/s")
    return value


def parse_text(text: str, name: str) -> str:
    """Text that can be hashed, tokenized and written: arguments may hold any bytes.

    Raises:
        ConfigError: if it is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ConfigError(f"{name} is not text: character {e.start:,} is not UTF-8") from e
    return text


def finite(text: str) -> float:
    """A number, as the ``type`` of an option; ``nan`` and ``inf`` are none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no number: write one such as 0.7")
    return value


def duration(text: str) -> float:
    """Seconds, from 0 up, as the ``type`` of an option."""
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no time: write seconds, from 0 up")
    return value


def seed(text: str) -> int:
    """A seed of whatever is random, as the ``type`` of an option: 64 bits."""
    if not text.isdecimal() or len(text) > _DIGITS or int(text) > _MOST_SEED:
        raise argparse.ArgumentTypeError(
            f"a seed is a whole number from 0 to {_MOST_SEED}, got {shown(text)}"
        )
    return int(text)


def user_path(text: str) -> Path:
    """A path as people write it: ``~`` and ``~user`` are home directories, if there are such."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  # Path's raises where there is no home


def positive(value: int, flag: str, most: int = MOST) -> int:
    """The value of an option that counts something.

    Raises:
        ConfigError: if it is less than one, or more than `most`.
    """
    if value < 1:
        raise ConfigError(f"{flag} is a number from 1 up, got {shown(value)}")
    if value > most:
        raise ConfigError(f"{flag} is {most:,} at most, got {shown(value)}")
    return value


def _as_it_is(text: str, name: str) -> str:
    return text


_PARSERS: dict[str, Callable[[str, str], object]] = {
    **dict.fromkeys(_COUNTS, parse_tokens),
    "skip_below": parse_share,
    "prefix_salt": parse_text,
}

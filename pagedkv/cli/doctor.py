"""``pagedkv doctor``: what this machine has, and whether everything here works on it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from pagedkv.cli.doctor_checks import (
    FAIL,
    OK,
    WARN,
    Row,
    check_backends,
    check_codecs,
    check_device,
    check_disk,
    check_memory,
    check_versions,
)
from pagedkv.cli.loading import add_model_options, load_model, wrapped
from pagedkv.cli.options import add_tier_options, tier_config
from pagedkv.cli.output import Notes, Table, add_output_options, choose_format, emit
from pagedkv.config.tier_config import TierConfig

_EPILOG = """\
Writes and reads back a quarter of a gigabyte in the cold directory, and deletes it again.

examples:
  pagedkv doctor
  pagedkv doctor --cold-dir /mnt/nvme --warm 8GB --cold 200GB
  pagedkv doctor --model ./my-model
  pagedkv doctor --format json

The exit code is 1 if anything failed; a warning is no failure.
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="what this machine has, and whether everything works on it",
        description="Look at versions, device, memory and disk, and check codecs and attention.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(parser, required=False)
    add_tier_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    config = tier_config(args)
    rows = list(_rows(args, config))
    counts = {status: sum(row.status == status for row in rows) for status in (OK, WARN, FAIL)}
    table = Table(("check", "status", "found"), list(_cells(rows)), frozenset({0, 1, 2}))
    plain = [asdict(row) for row in rows]
    document = {"ok": not counts[FAIL], "counts": counts, "checks": plain}
    emit(choose_format(args.format), document, [table], plain)
    return 1 if counts[FAIL] else 0


def _cells(rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        yield [row.name, row.status, row.value]
        if row.hint:
            yield ["", "", f"-> {row.hint}"]


def _rows(args: argparse.Namespace, config: TierConfig) -> Iterator[Row]:
    yield from check_versions()
    yield from check_device(config)
    yield from check_memory(config)
    yield from check_disk(config)
    yield from check_codecs()
    yield from check_backends(config)
    if args.model:
        yield from _check_model(args, config)


def _check_model(args: argparse.Namespace, config: TierConfig) -> Iterator[Row]:
    """How each layer of a model would be cached.

    It reads some tokens, by which layers are found that look things up (`TierConfig.layer_kv`).
    """
    model, _ = load_model(args.model, args.dtype, Notes(args.quiet), lazy=True)
    with wrapped(model, config) as cache:
        stats = cache.stats()
    kinds = stats.layers
    for kind in dict.fromkeys(kinds):
        layers = [i for i, other in enumerate(kinds) if other == kind]
        value = f"{len(layers)} of {len(kinds)} layers: {_ranges(layers)}"
        yield Row(kind, *_verdict(kind, value))
    for ladder in dict.fromkeys(stats.ladders):
        which = [i for i, other in enumerate(stats.ladders) if other == ladder]
        found = config.lookup_ladder is not None and ladder == str(config.lookup_ladder)
        why = "they look things up" if found else ""
        yield Row("precision", OK, f"{ladder}: layers {_ranges(which)}", why)
    for treatment in dict.fromkeys(text.partition(":")[0] for text in stats.treatments):
        which = [i for i, text in enumerate(stats.treatments) if text.startswith(treatment)]
        reasons = [stats.treatments[i].partition(": ")[2] for i in which]
        yield Row(
            "treatment", OK, f"{treatment}: layers {_ranges(which)}", max(reasons, key=_times)
        )


def _times(reason: str) -> float:
    """The number in a reason such as ``"largest key channel 31.0 times the median"``."""
    found = re.search(r"([\d.]+) times", reason)
    return float(found[1]) if found else 0.0


def _verdict(kind: str, value: str) -> tuple[str, str, str]:
    """Status, value and hint of a kind of layer; a kind is as in `CacheStats.layers`."""
    if "(dense)" in kind:
        return WARN, value, "this model computes attention by itself here: right, but slower"
    inner = re.sub(r"CacheList\(|\)$", "", kind).split(", ")
    ours = [part.startswith(("paged", "16-bit")) for part in inner]
    if all(ours) and any(part.startswith("16-bit") for part in inner):
        return OK, value, "fewer tokens than hot_tokens and a page: nothing to quantize"
    if all(ours):
        return OK, value, ""
    if any(ours):
        return WARN, value, "partly paged: the layer keeps the rest in memory"
    return WARN, value, "not paged: the layer keeps its own cache in memory"


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``"0-2, 5"``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, part)) for part in parts)

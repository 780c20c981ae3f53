"""``pagedkv bench``: attention, decode and prefill by depth, beside MLX's and mlx-lm's own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from pagedkv.cli.loading import add_model_options, has_gpu, load_model
from pagedkv.cli.options import (
    duration,
    parse_tokens,
    positive,
    tier_config,
    user_path,
)
from pagedkv.cli.output import Notes, Table, add_output_options, choose_format, emit
from pagedkv.cli.shapes import MOST_EACH, ModelShape, shape_of
from pagedkv.config.tier_config import BACKENDS
from pagedkv.errors import ConfigError
from pagedkv.tools.bench import (
    DEPTHS,
    PARTS,
    STREAMING,
    WIDTHS,
    AttentionShape,
    BenchSettings,
    Campaign,
    Deadline,
    LlamaShape,
    Result,
    plan_tasks,
    random_llama,
)
from pagedkv.tools.bench.plots import HINT, available, draw
from pagedkv.tools.bench.report import COLUMNS, TITLES, cells, yardstick_line
from pagedkv.tools.bench.result import OK, Row
from pagedkv.tools.bench.settings import MIB, short_dtype

_PREFIX = "synthetic:"
_TINY = ModelShape(layers=2, query_heads=4, kv_heads=2, head_dim=64)

_EPILOG = f"""\
Every row stands beside its roofline, the bytes that it must read over the copy bandwidth measured
in the same run; "speed" is the fp16 row's time over its own; "limit" says what bounds it. What is
compared takes turns: round by round, in decode every four steps. Caches are filled with random
tokens.

"streaming" reads what the cold tier wrote, beside plain reads of the same file; attends while it
reads; and times decode steps while pages are written. Rounds in which other programs took more than
15 % of the processors are left out, if enough others are left.

--model synthetic:NAME has random 4-bit weights, and nothing is downloaded. NAME is one of
{", ".join(WIDTHS)}.

examples:
  pagedkv bench all --quick
  pagedkv bench attention --shape 32/8x128 --shape 12/2x128 --kv K8V4 K4V4 --depths 512,8K,128K
  pagedkv bench decode --model synthetic:llama3-8b --depths 1K,32K --kv K8V4 K4V4 --out results
  pagedkv bench prefill --model demo --depths 2K
  pagedkv bench streaming --cold-dir /mnt/nvme --shape 8/8x128 --kv K8V8
"""

# What a CPU manages in minutes, and --quick in one.
_CPU_DEPTHS = (512, 1024, 4096)
_QUICK = {"rounds": 5, "steps": 8, "repeats": 1, "working_set": 8 * MIB, "copy_bytes": 64 * MIB}
_QUICK_DEPTHS = (512, 3072)
_CPU = {"working_set": 64 * MIB, "copy_bytes": 64 * MIB}


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "bench",
        help="attention, decode and prefill by depth, beside MLX's and mlx-lm's own",
        description="Measure speed and memory by depth, ours and theirs in turns in one run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "part",
        choices=(*PARTS, "all", STREAMING),
        metavar="PART",
        help=f"{', '.join(PARTS)}, all of these, or {STREAMING} (reads and writes the disk)",
    )
    add_model_options(parser, required=False)
    _add_what(parser)
    _add_how(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    group.add_argument("--layers", type=int, metavar="N", help="cut a synthetic model to N layers")
    group.add_argument(
        "--shape",
        action="append",
        metavar="SHAPE",
        help="attention: query heads / KV heads x channels; may be repeated (default: 32/8x128)",
    )
    group.add_argument(
        "--depths", metavar="TOKENS,...", help="such as 512,8K,128K (default: by device)"
    )
    group.add_argument(
        "--kv", nargs="+", metavar="LADDER", help="precisions of our cache (default: K4V4)"
    )
    group.add_argument("--queries", type=int, metavar="N", help="attention: query tokens")
    group.add_argument(
        "--no-shuffle", action="store_true", help="attention: no rows for pages in random order"
    )
    group.add_argument(
        "--cold-rows", action="store_true", help="attention: also rows for pages on disk"
    )
    for flag, text in (
        ("--hot-tokens", "newest tokens kept in 16 bit"),
        ("--sink-tokens", "first tokens kept in 16 bit for ever"),
        ("--page-tokens", "tokens per page: 256, 512 or 1024"),
    ):
        group.add_argument(flag, metavar="N", help=text)
    group.add_argument("--backend", metavar="NAME", help=f"one of {', '.join(BACKENDS)}")
    group.add_argument("--cold-dir", metavar="DIR", help="for streaming and --cold-rows")


def _add_how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument(
        "--quick", action="store_true", help="small depths and few rounds: a minute on a CPU"
    )
    group.add_argument("--rounds", type=int, metavar="N", help="attention: rounds (default: 20)")
    group.add_argument("--steps", type=int, metavar="N", help="decode: steps per run (default: 64)")
    group.add_argument(
        "--repeats", type=int, metavar="N", help="decode, prefill: runs (default: 2)"
    )
    group.add_argument("--chunk", metavar="TOKENS", help="tokens per prompt chunk (default: 2048)")
    group.add_argument(
        "--max-seconds", type=duration, metavar="S", help="begin nothing new after this long"
    )
    group.add_argument("--out", metavar="DIR", help="write result.json and the plots there")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 1 if nothing could be measured."""
    say = Notes(args.quiet)
    parts = PARTS if args.part == "all" else (args.part,)
    settings, depths = _settings(args), _depths(args)
    shapes = [AttentionShape.parse(text) for text in args.shape or [_default_shape(args)]]
    model, opener = _model(args, say)
    dtype = _dtype(args)
    folder = user_path(args.out) if args.out else None
    record = {
        **settings.to_dict(),
        "parts": list(parts),
        "shapes": [str(shape) for shape in shapes],
        "depths": list(depths),
        "model": model,
        "dtype": short_dtype(dtype),
    }
    result = Result(record, folder / "result.json" if folder else None)
    Campaign(settings, dtype, model, opener, result, Deadline(args.max_seconds), say).run(
        plan_tasks(parts, shapes, depths, settings)
    )
    if folder:
        _plot(result.rows, folder, say)
    emit(choose_format(args.format), result.document(), _tables(result.rows), result.rows)
    return 0 if any(row["status"] == OK for row in result.rows) else 1


def _settings(args: argparse.Namespace) -> BenchSettings:
    given: dict[str, Any] = {} if has_gpu() else dict(_CPU)
    if args.quick:
        given |= _QUICK
    for name in ("queries", "rounds", "steps", "repeats"):
        if getattr(args, name) is not None:
            given[name] = positive(getattr(args, name), f"--{name}")
    if args.chunk:
        given["chunk"] = positive(parse_tokens(args.chunk, "chunk"), "--chunk")
    elif args.quick:
        given["chunk"] = 512
    if args.kv:
        given["kv"] = tuple(args.kv)
    names = ("hot_tokens", "sink_tokens", "page_tokens", "backend", "cold_dir")
    tiers = tier_config(argparse.Namespace(**{name: getattr(args, name) for name in names}))
    return BenchSettings(**given, shuffled=not args.no_shuffle, cold=args.cold_rows, tiers=tiers)


def _depths(args: argparse.Namespace) -> tuple[int, ...]:
    if args.depths:
        parsed = [parse_tokens(text, "depths") for text in args.depths.split(",")]
        return tuple(positive(depth, "--depths") for depth in parsed)
    if args.quick:
        return _QUICK_DEPTHS
    return DEPTHS if has_gpu() else _CPU_DEPTHS


def _default_shape(args: argparse.Namespace) -> str:
    return "8/2x128" if args.quick else "32/8x128"


def _dtype(args: argparse.Namespace) -> mx.Dtype:
    """Type to compute in: 16-bit products are slow on MLX's CPU."""
    if args.dtype != "auto":
        dtype: mx.Dtype = getattr(mx, args.dtype)
        return dtype
    return mx.float16 if has_gpu() else mx.float32


def _model(args: argparse.Namespace, say: Notes) -> tuple[str, Callable[[], Any]]:
    """The model's name in rows, and what makes it."""
    small = args.quick or not has_gpu()
    name: str = args.model or f"{_PREFIX}{'tiny' if small else 'llama3-8b'}"
    if not name.startswith(_PREFIX):
        if args.layers is not None:
            raise ConfigError("--layers is for synthetic models: a real one is run whole")
        return name, lambda: load_model(name, args.dtype, say)[0]
    shape = synthetic_shape(name.removeprefix(_PREFIX), args.layers)
    if args.layers is not None:
        name = f"{name}, layers={shape.layers}"
    return name, lambda: random_llama(shape, _dtype(args))


def synthetic_shape(name: str, layers: int | None = None) -> LlamaShape:
    """The sizes of a well-known model.

    Args:
        name: a key of `WIDTHS`.
        layers: instead of the model's own number.

    Raises:
        ConfigError: if there is no such model.
    """
    if name not in WIDTHS:
        raise ConfigError(f"no synthetic model {name!r}: give one of {', '.join(WIDTHS)}")
    shape = _TINY if name == "tiny" else shape_of(name)
    if layers is not None:
        shape = replace(shape, layers=positive(layers, "--layers", MOST_EACH))
    heads = (shape.query_heads, shape.kv_heads, shape.head_dim)
    return LlamaShape(shape.layers, *heads, *WIDTHS[name])


def _plot(rows: list[Row], folder: Path, say: Notes) -> None:
    if not available():
        say(HINT)
        return
    files = draw(rows, folder)
    say(f"{len(files)} plots in {folder}")


def _tables(rows: list[Row]) -> list[Table]:
    tables = []
    for part in COLUMNS:
        columns, lines = cells(part, rows)
        if not lines:
            continue
        left = frozenset(i for i, column in enumerate(columns) if column.left)
        mine = [row for row in rows if row["part"] == part]
        title = f"{TITLES[part]}: {yardstick_line(mine)}"
        tables.append(Table([column.heading for column in columns], lines, left, title))
    return tables

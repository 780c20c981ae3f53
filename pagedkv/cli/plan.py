"""``pagedkv plan``: will it fit, and how fast can the disk feed it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from pagedkv.allocator import KVShape
from pagedkv.cli.options import add_tier_options, parse_rate, parse_tokens, positive, tier_config
from pagedkv.cli.output import (
    Notes,
    Table,
    add_output_options,
    choose_format,
    emit,
    facts,
    number,
    rate,
)
from pagedkv.cli.shapes import KNOWN, MOST_EACH, ModelShape, shape_of
from pagedkv.config.planner import Plan, plan
from pagedkv.config.sizes import format_size
from pagedkv.config.tier_config import LOOKUP_PART, TierConfig
from pagedkv.errors import ConfigError

_EPILOG = f"""\
Tokens are written 131072, 128K (K is 1,024) or 1M. Nothing is loaded or run.
Known models: {", ".join(KNOWN)}.

examples:
  pagedkv plan --model llama3-8b --context 128K --warm 2GB --cold 16GB
  pagedkv plan --model ./my-model --context 32K --kv K8V4:8192,K4V4 --disk-rate 3GB/s
  pagedkv plan --layers 48 --kv-heads 4 --head-dim 128 --context 1M --cold 100GB --measure-disk

The exit code is 1 if the context does not fit.
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "plan",
        help="will it fit: bytes and tokens per tier, and the token rate the disk allows",
        description="Work out where the tokens of a context would lie, beside an fp16 cache.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("model and context")
    group.add_argument("--model", metavar="MODEL", help="a known model, or a model folder")
    group.add_argument("--layers", type=int, metavar="N", help="layers with a KV cache")
    group.add_argument("--kv-heads", type=int, metavar="N", help="key/value heads")
    group.add_argument("--head-dim", type=int, metavar="N", help="channels per head")
    group.add_argument("--context", required=True, metavar="TOKENS", help="such as 128K")
    disk = group.add_mutually_exclusive_group()
    disk.add_argument(
        "--disk-rate",
        "--read-rate",
        metavar="RATE",
        help="read rate of the disk, such as 3GB/s",
    )
    disk.add_argument(
        "--measure-disk", action="store_true", help="measure it in --cold-dir (a few seconds)"
    )
    add_tier_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    say = Notes(args.quiet)
    config = tier_config(args)
    context = positive(parse_tokens(args.context, "context"), "--context")
    shape = _shape(args)
    disk = _disk_rate(args, config, say)
    kv = KVShape(shape.kv_heads, shape.head_dim, shape.head_dim)
    windows = shape.windows

    def planned(tokens: int) -> Plan:
        return plan(kv, shape.layers, tokens, config, disk, windows=windows)

    result, contexts = planned(context), [planned(c) for c in _contexts(context)]
    if shape.max_tokens and context > shape.max_tokens:
        say(
            f"pagedkv: warning: {context:,} tokens are more than the model's limit of "
            f"{shape.max_tokens:,}"
        )
    if shape.note:
        say(f"pagedkv: note: {shape.note}")
    document = {
        "model": args.model,
        "layers": shape.layers,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "windows": list(windows),
        "disk_bytes_per_second": disk,
        **result.to_dict(),
        "contexts": [_ceiling(each) for each in contexts],
        "config": config.to_dict(),
    }
    tables = _tables(result, shape, config, disk)
    if disk and result.cold_bytes_per_token:
        tables.insert(1, _ceilings(contexts, disk))
    emit(choose_format(args.format), document, tables)
    return 0 if result.fits else 1


def _contexts(longest: int) -> list[int]:
    """Lengths on the way to the longest: powers of two, and itself."""
    return [*(2**i for i in range(12, 40) if 2**i < longest), longest]


def _ceiling(result: Plan) -> dict[str, Any]:
    return {
        "context": result.context,
        "cold_bytes_per_token": result.cold_bytes_per_token,
        "tokens_per_second": result.tokens_per_second,
    }


def _ceilings(contexts: list[Plan], disk: float) -> Table:
    """The most tokens a second that the disk allows, by length, every cold byte read once."""
    rows = [
        [
            number(each.context),
            format_size(each.cold_bytes_per_token) if each.cold_bytes_per_token else "-",
            f"{each.tokens_per_second:,.3g}" if each.tokens_per_second else "not bound",
        ]
        for each in contexts
    ]
    headings = ("context", "read per token", "tokens/s at most")
    return Table(headings, rows, title=f"the disk's ceiling, reading {rate(disk, 1)}")


def _shape(args: argparse.Namespace) -> ModelShape:
    """The model's shape, with whatever the options say instead."""
    given: dict[str, Any] = {
        name: positive(getattr(args, name), f"--{name.replace('_', '-')}", MOST_EACH)
        for name in ("layers", "kv_heads", "head_dim")
        if getattr(args, name) is not None
    }
    if args.model is None:
        if len(given) < 3:
            raise ConfigError("name the model (--model), or give --layers, --kv-heads, --head-dim")
        return ModelShape(given["layers"], given["kv_heads"], given["kv_heads"], given["head_dim"])
    known = shape_of(args.model)
    if "layers" in given:  # which of them have windows is not known
        given["windows"] = known.windows if given["layers"] == known.layers else ()
    return replace(known, **given)


def _disk_rate(args: argparse.Namespace, config: TierConfig, say: Notes) -> float | None:
    if args.disk_rate is not None:
        return parse_rate(args.disk_rate, "disk-rate")
    if not args.measure_disk:
        return None
    from pagedkv.cli.disk import measure_disk

    say("measuring the disk")
    return measure_disk(config.cold_dir).read_rate


def _tables(result: Plan, shape: ModelShape, config: TierConfig, disk: float | None) -> list[Table]:
    budget = config.budget()
    tiers = [
        ("hot", result.hot_tokens, result.hot_bytes, "-"),
        ("warm", result.warm_tokens, result.warm_bytes, format_size(budget.warm_bytes)),
        ("cold", result.cold_tokens, result.cold_bytes, format_size(budget.cold_bytes)),
    ]
    rows = [[name, number(n), format_size(size), limit] for name, n, size, limit in tiers]
    rows.append(["fp16 cache", number(result.context), format_size(result.fp16_bytes), "-"])
    return [
        Table(("tier", "tokens", "bytes", "budget"), rows),
        facts(_facts(result, shape, config, disk)),
    ]


def _others(config: TierConfig) -> str:
    """Which layers have another ladder."""
    if config.lookup_ladder is not None:
        return f"; {config.lookup_ladder} in one layer of {LOOKUP_PART}"
    return f"; {config.layer_kv}" if config.ladders.others else ""


def _facts(
    result: Plan, shape: ModelShape, config: TierConfig, disk: float | None
) -> list[tuple[str, str]]:
    if result.cold_bytes_per_token:
        nvme = format_size(result.cold_bytes_per_token)
        speed = "give --disk-rate or --measure-disk"
        if result.tokens_per_second and disk:
            speed = f"at most {result.tokens_per_second:.3g}/s, reading {rate(disk, 1)}"
    else:
        nvme, speed = "none: nothing is cold", "not bound by the disk"
    staging, scratch, treatments = map(
        format_size, (result.staging_bytes, result.scratch_bytes, result.treatment_bytes)
    )
    memory = (
        f"{format_size(result.memory_bytes)} (hot, warm, staging {staging}, scratch {scratch}, "
        f"treatments {treatments})"
    )
    return [
        ("model", f"{shape.layers} layers, {shape.kv_heads} KV heads of {shape.head_dim}"),
        ("pages", f"{result.page_tokens} tokens, {config.kv}{_others(config)}"),
        ("fits", "yes" if result.fits else f"NO: {result.context:,} tokens do not fit"),
        ("largest context that fits", f"{result.max_context:,} tokens"),
        ("memory", memory),
        ("read from disk per token", nvme),
        ("tokens per second", speed),
    ]

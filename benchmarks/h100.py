"""The campaign behind docs/performance.md, in pieces that fit a few minutes each.

    python benchmarks/h100.py --part attention --out benchmarks/results/h100 --seconds 540
    python benchmarks/h100.py --part decode    --out benchmarks/results/h100 --seconds 540
    python benchmarks/h100.py --part prefill   --out benchmarks/results/h100 --seconds 540
    python benchmarks/h100.py --part page      --out benchmarks/results/h100

A part writes DIR/PART.json, whole again after every group of rows, and draws its plots. Started
again, it goes on where the time was up; what was measured is not measured again. What cannot run
is a row that says why. `page` fills docs/performance.md from all parts, and needs no GPU.
"""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from pagedkv.bench import (
    AttentionShape,
    BenchSettings,
    Campaign,
    Deadline,
    Result,
    Task,
    random_llama,
)
from pagedkv.bench.page import fill_page
from pagedkv.bench.plots import HINT, available, draw
from pagedkv.bench.report import COLUMNS, markdown, yardstick_line
from pagedkv.bench.seal import seal_tokens
from pagedkv.cli.bench import synthetic_shape
from pagedkv.errors import PagedKVError

K = 1024
KV = ("K8V4", "K4V4", "K4V2", "K2V2")
# The depths that matter most come first: the time may be up before the last.
LONG = (*(K * n for n in (128, 256, 32, 4, 8, 16, 64, 1)), 512)
SHORT = (256, 512, K, 2 * K, 4 * K)
ATTENTION = {
    "32/8x128": LONG,
    "32/4x128": LONG,
    "12/2x128": (128 * K, *SHORT),
    "4/1x256": SHORT,
}
EVERY_PRECISION = (32 * K, 128 * K)
"""Depths at which attention is measured at all precisions, for the first shape."""
PAGED = {"12/2x128": SHORT, "4/1x256": SHORT}
"""Short contexts with all but one token in pages: by default they would be in the hot window."""
PAGED_TIERS = {"hot_tokens": 1, "sink_tokens": 0, "page_tokens": 256}
DECODE = {K: 2, 8 * K: 2, 32 * K: 2, 128 * K: 2, 100 * K: 1}
"""Depths and repeats; at all precisions but for the deepest."""
PREFILL = (64 * K,)
MODEL = "llama3-8b"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"


def tasks(part: str) -> list[Task]:
    if part in ("attention", "paged"):
        extra = part == "paged"
        return [
            Task("attention", depth + extra, AttentionShape.parse(shape))
            for shape, depths in (PAGED if extra else ATTENTION).items()
            for depth in depths
        ]
    return [Task(part, depth) for depth in (DECODE if part == "decode" else PREFILL)]


def campaign(args: argparse.Namespace) -> Result:
    dtype = mx.float16 if mx.default_device() == mx.gpu else mx.float32
    settings = BenchSettings(kv=KV, rounds=args.rounds, steps=args.steps, repeats=args.repeats)
    name = f"synthetic:{args.model}" + (f", layers={args.layers}" if args.layers else "")
    result = Result({**settings.to_dict(), "model": name}, args.out / f"{args.part}.json")
    if before := result.resume():
        say(f"going on after {before} rows")

    @functools.cache
    def model() -> Any:
        return random_llama(synthetic_shape(args.model, args.layers), dtype)

    deadline = Deadline(args.seconds)
    todo = [task for task in tasks(args.part) if args.most is None or task.depth <= args.most]
    tiers = replace(settings.tiers, **PAGED_TIERS) if args.part == "paged" else settings.tiers
    for task in todo:
        every = str(task.shape) == next(iter(ATTENTION)) and task.depth in EVERY_PRECISION
        every = every or (args.part == "decode" and task.depth < max(DECODE))
        here = replace(
            settings,
            kv=KV if every else ("K4V4",),
            tiers=tiers,
            repeats=DECODE.get(task.depth, 1) if args.part == "decode" else args.repeats,
        )
        Campaign(here, dtype, name, model, result, deadline, say).run([task])
    if args.part == "prefill":
        seal = Task("seal", seal_tokens(settings))
        Campaign(settings, dtype, name, model, result, deadline, say).run([seal])
    return result


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def report(args: argparse.Namespace, result: Result) -> None:
    for part in COLUMNS:
        if table := markdown(part, result.rows):
            mine = [row for row in result.rows if row["part"] == part]
            print(f"\n{part}: {yardstick_line(mine)}\n\n{table}")
    if available():
        draw(result.rows, args.out)
    else:
        say(HINT)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = ("attention", "paged", "decode", "prefill", "page")
    parser.add_argument("--part", required=True, choices=parts)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--seconds", type=float, help="begin nothing new after this long")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1, help="of prefill")
    parser.add_argument("--model", default=MODEL, help="synthetic model (default: llama3-8b)")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="what page fills")
    parser.add_argument("--layers", type=int, help="cut the model, for a trial")
    parser.add_argument("--most", type=int, metavar="TOKENS", help="no deeper, for a trial")
    args = parser.parse_args()
    try:
        if args.part == "page":
            filled = fill_page(args.page, sorted(args.out.glob("*.json")))
            print(f"{args.page}: {', '.join(filled) or 'nothing to fill'}")
        else:
            report(args, campaign(args))
    except (PagedKVError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The campaign behind docs/performance.md, in pieces that fit a few minutes each.

    python benchmarks/h100.py --part all --out DIR --seconds 500
    python benchmarks/h100.py --part all --out DIR2 --resume DIR --seconds 500
    python benchmarks/h100.py --part page --out benchmarks/results/h100

A part writes DIR/PART.json, whole again after every group of rows; sealing is in prefill.json.
Several parts run the most important first: decode, prefill, paged, attention, and within a part the
most important depths. --seconds is for all of them together. Started again, with the same --out or
with --resume, it goes on where the time was up; what was measured is not measured again. What
cannot run is a row that says why. `page` needs no GPU and nothing but the JSON files: it fills
docs/performance.md and draws the plots beside them.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from pagedkv.cli.bench import synthetic_shape
from pagedkv.errors import PagedKVError
from pagedkv.tools.bench import (
    AttentionShape,
    BenchSettings,
    Campaign,
    Deadline,
    Result,
    Task,
    random_llama,
)
from pagedkv.tools.bench.page import fill_page
from pagedkv.tools.bench.plots import HINT, available
from pagedkv.tools.bench.report import COLUMNS, markdown, yardstick_line
from pagedkv.tools.bench.seal import seal_tokens

K = 1024
KV = ("K8V4", "K4V4", "K4V2", "K2V2")
# The depths that matter most come first: the time may be up before the last.
LONG = (*(K * n for n in (128, 256, 32, 4, 8, 16, 64, 1)), 512)
SHORT = (256, 512, K, 2 * K, 4 * K)
ATTENTION = {
    "32/8x128": LONG,
    "12/2x128": (128 * K, *SHORT),
    "4/1x256": SHORT,
    "32/4x128": (128 * K, 32 * K, 4 * K, 256 * K, 8 * K, 16 * K, 64 * K, K, 512),
}
EVERY_PRECISION = (32 * K, 128 * K)
"""Depths at which attention is measured at all precisions, for the first shape."""
PAGED = {"12/2x128": SHORT, "4/1x256": SHORT}
"""Short contexts with all but one token in pages: by default they would be in the hot window."""
PAGED_TIERS = {"hot_tokens": 1, "sink_tokens": 0, "page_tokens": 256}
DECODE = {32 * K: 1, 8 * K: 1, 128 * K: 1, K: 1, 100 * K: 1, 256 * K: 1}
"""Depths and repeats; at all precisions but for the deepest two."""
PREFILL = (64 * K,)
MODEL = "llama3-8b"
PARTS = ("decode", "prefill", "paged", "attention")
"""The most important first, and what takes longest last."""
PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"


def tasks(part: str, settings: BenchSettings) -> list[Task]:
    if part == "decode":
        return [Task(part, depth) for depth in DECODE]
    if part == "prefill":
        return [*(Task(part, depth) for depth in PREFILL), Task("seal", seal_tokens(settings))]
    shapes, extra = (PAGED, 1) if part == "paged" else (ATTENTION, 0)
    return [
        Task(part, depth + extra, AttentionShape.parse(shape))
        for shape, depths in shapes.items()
        for depth in depths
    ]


def ladders(task: Task) -> tuple[str, ...]:
    """Precisions at which a task is measured: all of them where that is worth the time."""
    if task.part == "attention":
        every = str(task.shape) == next(iter(ATTENTION)) and task.depth in EVERY_PRECISION
    else:
        every = task.part == "seal" or (task.part == "decode" and task.depth <= 100 * K)
    return KV if every else ("K4V4",)


def dtype() -> mx.Dtype:
    return mx.float16 if mx.default_device() == mx.gpu else mx.float32


def campaign(
    part: str, args: argparse.Namespace, model: Callable[[], Any], deadline: Deadline
) -> Result:
    settings = BenchSettings(kv=KV, rounds=args.rounds, steps=args.steps, repeats=args.repeats)
    if part == "paged":
        settings = replace(settings, tiers=replace(settings.tiers, **PAGED_TIERS))
    name = f"synthetic:{args.model}" + (f", layers={args.layers}" if args.layers else "")
    path = args.out / f"{part}.json"
    result = Result({**settings.to_dict(), "model": name}, path)
    earlier = args.resume / path.name if args.resume and not path.exists() else None
    if before := result.resume(earlier):
        say(f"{part}: going on after {before} rows")
        result.add([])
    for task in tasks(part, settings):
        if args.most is not None and task.part != "seal" and task.depth > args.most:
            continue
        repeats = DECODE[task.depth] if part == "decode" else args.repeats
        here = replace(settings, kv=ladders(task), repeats=repeats)
        Campaign(here, dtype(), name, model, result, deadline, say).run([task])
    return result


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def report(result: Result) -> None:
    for part in COLUMNS:
        if table := markdown(part, result.rows):
            mine = [row for row in result.rows if row["part"] == part]
            print(f"\n{part}: {yardstick_line(mine)}\n\n{table}", flush=True)


def fill(args: argparse.Namespace) -> None:
    filled = fill_page(args.page, sorted(args.out.glob("*.json")))
    print(f"{args.page}: {', '.join(filled) or 'nothing to fill'}")
    if not available():
        say(HINT)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = (*PARTS, "all", "page")
    parser.add_argument("--part", required=True, nargs="+", choices=parts)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="of an earlier run, to go on")
    parser.add_argument("--seconds", type=float, help="begin nothing new after this long")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=1, help="of prefill")
    parser.add_argument("--model", default=MODEL, help="synthetic model (default: llama3-8b)")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="what page fills")
    parser.add_argument("--layers", type=int, help="cut the model, for a trial")
    parser.add_argument("--most", type=int, metavar="TOKENS", help="no deeper, for a trial")
    args = parser.parse_args(argv)

    @functools.cache
    def model() -> Any:
        return random_llama(synthetic_shape(args.model, args.layers), dtype())

    deadline = Deadline(args.seconds)
    chosen = [part for part in PARTS if part in args.part or "all" in args.part]
    work: list[Callable[[], None]] = [
        lambda part=part: report(campaign(part, args, model, deadline)) for part in chosen
    ]
    if "page" in args.part:
        work.append(lambda: fill(args))
    code = 0
    for piece in work:
        try:
            piece()
        except (PagedKVError, OSError) as e:  # one part's; the others go on
            print(f"error: {e}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())

"""``pagedkv stress``: a long context under fixed budgets, checked while it runs and at its end."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from pagedkv.cli.loading import add_model_options, has_gpu, load_model
from pagedkv.cli.options import (
    add_tier_options,
    finite,
    parse_tokens,
    positive,
    seed,
    tier_config,
)
from pagedkv.cli.output import Notes, add_output_options, choose_format, emit
from pagedkv.cli.shapes import KNOWN, MOST_EACH, ModelShape, shape_of
from pagedkv.cli.stress_progress import StressProgress
from pagedkv.cli.stress_report import require_report, tables, write_report
from pagedkv.config.tier_config import TierConfig
from pagedkv.errors import ConfigError
from pagedkv.tools.stress import (
    OPERATIONS,
    ModelStress,
    StressOptions,
    StressReport,
    SyntheticModel,
    SyntheticStress,
    Watch,
    parse_ops,
)

_PREFIX = "synthetic:"
_TINY = ModelShape(layers=2, query_heads=4, kv_heads=2, head_dim=64)

_EPILOG = f"""\
--model synthetic:NAME drives the cache alone with random keys and values, and no weights. Needles
are planted at random depths; every answer on the way is compared with a softmax in float64 over the
original tokens, and at the end every stored token is read back. NAME is tiny, a model folder, or
one of {", ".join(KNOWN)}; --layers and --heads cut a slice of it.

A real model reads a long text; then the logits must equal, bit for bit, those of a second run that
keeps every page in memory (if there is enough of it) and is neither saved nor killed.

--ops lists what is done between prefill chunks, each perhaps with how often, at random lengths:
  decode  a few single tokens, asking for needles
  trim    forget some tokens, and write others in their place
  fork    let a second sequence go its own way, check both, drop it
  save    save to a file, close, load it, compare every byte, go on with what was loaded
  kill    flush, let another process go on and kill it (SIGKILL) in the middle, resume
          (a real model: lose the disk in the middle, in this process)
The default is {",".join(f"{n}={c}" if c else n for n, c in OPERATIONS.items())}.

--faults lets the disk fail and lie by a schedule that --seed decides: calls that fail are made
again, damaged pages are made again from their tokens, and no result may change.

Memory of the process is sampled and held against the budgets plus a constant, which the report
states part by part. The exit code is 1 if anything was wrong, and the report says what.

examples:
  pagedkv stress --model synthetic:tiny --tokens 16K --warm 1MB --cold 64MB
  pagedkv stress --model synthetic:llama3-8b --layers 2 --tokens 128K --warm 64MB --cold 1GB
  pagedkv stress --model synthetic:llama3-8b --tokens 1M --warm 2GB --cold 128GB --report out/
  pagedkv stress --model synthetic:tiny --tokens 32K --warm 1MB --faults --seed 7
  pagedkv stress --model demo --tokens 6000 --warm 16MB --cold 1GB --report report.json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "stress",
        help="a long context under fixed budgets, with known answers",
        description="Fill a cache far beyond its memory, and check everything that can be checked.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--tokens", required=True, metavar="TOKENS", help="length, such as 64K")
    group.add_argument(
        "--ops", metavar="LIST", help="what is done, such as prefill,decode,trim=20 (see below)"
    )
    group.add_argument("--faults", action="store_true", help="let the disk fail, by the seed")
    group.add_argument("--layers", type=int, metavar="N", help="cut a synthetic model to N layers")
    group.add_argument(
        "--heads", type=int, metavar="N", help="cut a synthetic model to N KV heads, queries too"
    )
    group.add_argument(
        "--needles",
        type=int,
        default=8,
        metavar="N",
        help="needles, and decode steps at the end (default: 8)",
    )
    group.add_argument("--seed", type=seed, default=0, help="of everything random (default: 0)")
    group.add_argument(
        "--chunk",
        metavar="TOKENS",
        help="tokens per prefill chunk (default: 2048; 512 for a real model on a CPU)",
    )
    group.add_argument(
        "--attend-every",
        type=int,
        metavar="N",
        help="synthetic: attend in every Nth prefill chunk (default: so that some 32 do)",
    )
    group.add_argument(
        "--sample",
        type=finite,
        default=0.25,
        metavar="SECONDS",
        help="pace at which memory is looked at (default: 0.25)",
    )
    group.add_argument(
        "--report",
        metavar="FILE.json|DIR",
        help="also write the report as JSON; into a directory, with the table and plots",
    )
    add_tier_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    config, say = tier_config(args), Notes(args.quiet)
    if config.selective:
        raise ConfigError(
            "a stress run holds answers against attention over every token: leave out --skip-below "
            "and --cold-pages"
        )
    options = _options(args, config)
    if args.report:
        require_report(args.report)  # not when everything is done
    with StressProgress(args.quiet) as watch:
        if args.model.startswith(_PREFIX):
            report = _synthetic(args, options, config, watch)
        else:
            report = _real(args, options, config, watch)
    asked = {**asdict(options), "attend_every": options.attends_every}
    document = {**report.to_dict(), "options": asked, "config": config.to_dict()}
    if args.report:
        text = "\n\n".join(table.render() for table in tables(report))
        write_report(args.report, document, text, say)
    emit(choose_format(args.format), document, tables(report))
    return 0 if report.ok else 1


def _options(args: argparse.Namespace, config: TierConfig) -> StressOptions:
    real = not args.model.startswith(_PREFIX)
    slices = (args.layers, args.heads, args.attend_every)
    if real and any(value is not None for value in slices):
        raise ConfigError(
            "--layers, --heads and --attend-every are for synthetic models: a real one is run whole"
        )
    chunk = parse_tokens(args.chunk, "chunk") if args.chunk else 2048
    if real and not args.chunk and not has_gpu():
        chunk = 512
    ops = parse_ops(args.ops) if args.ops else dict(OPERATIONS)
    if not args.ops and not config.budget().cold_bytes:
        ops["kill"] = 0  # there is no disk to resume from
    return StressOptions(
        tokens=parse_tokens(args.tokens, "tokens"),
        needles=args.needles,
        seed=args.seed,
        chunk=chunk,
        attend_every=args.attend_every,
        ops=ops,
        faults=args.faults,
        sample_seconds=args.sample,
    )


def _synthetic(
    args: argparse.Namespace, options: StressOptions, config: TierConfig, watch: Watch
) -> StressReport:
    name = args.model.removeprefix(_PREFIX)
    shape = _TINY if name == "tiny" else shape_of(name)
    layers = shape.layers if args.layers is None else positive(args.layers, "--layers", MOST_EACH)
    heads = shape.kv_heads if args.heads is None else positive(args.heads, "--heads")
    if heads > shape.kv_heads:
        raise ConfigError(f"--heads {heads}: {name} has {shape.kv_heads} KV heads")
    queries = shape.query_heads // shape.kv_heads * heads
    whole = (shape.layers, shape.kv_heads)
    model = SyntheticModel(layers, queries, heads, shape.head_dim, whole)
    return SyntheticStress(model, options, config, watch, args.model).run()


def _real(
    args: argparse.Namespace, options: StressOptions, config: TierConfig, watch: Watch
) -> StressReport:
    model, tokenizer = load_model(args.model, args.dtype, Notes(args.quiet))
    return ModelStress(args.model, model, tokenizer, options, config, watch).run()

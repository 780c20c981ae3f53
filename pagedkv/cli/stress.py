"""``pagedkv stress``: a long context under fixed budgets, checked while it runs and at its end."""

from __future__ import annotations

import argparse
from typing import Any

from pagedkv.cli.loading import add_model_options, has_gpu, load_model
from pagedkv.cli.options import add_tier_options, parse_tokens, positive, tier_config
from pagedkv.cli.output import (
    Notes,
    Progress,
    add_output_options,
    choose_format,
    emit,
    write_json,
)
from pagedkv.cli.shapes import KNOWN, ModelShape, shape_of
from pagedkv.cli.stress_checks import StressReport, Watch
from pagedkv.cli.stress_model import ModelStress
from pagedkv.cli.stress_synthetic import SyntheticStress
from pagedkv.config import TierConfig
from pagedkv.errors import ConfigError
from pagedkv.stress import StressOptions, SyntheticModel

_PREFIX = "synthetic:"
_TINY = ModelShape(layers=2, query_heads=4, kv_heads=2, head_dim=64)

_EPILOG = f"""\
--model synthetic:NAME drives the cache alone with random keys and values, and no weights. Needles
are planted at random depths; at the end every layer's answers are compared with a softmax in
float64 over the original tokens, and every stored token is read back. NAME is tiny, a model folder,
or one of {", ".join(KNOWN)}.

A real model reads a long text; then the logits must equal, bit for bit, those of a second run that
keeps every page in memory (if there is enough of it).

In both, budgets and page accounts are checked after every chunk. The exit code is 1 if anything
was wrong.

examples:
  pagedkv stress --model synthetic:tiny --tokens 16K --warm 1MB --cold 64MB
  pagedkv stress --model synthetic:llama3-8b --layers 2 --tokens 128K --warm 64MB --cold 1GB
  pagedkv stress --model synthetic:llama3-8b --tokens 1M --attend-every 16 --cold 128GB
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
    group.add_argument("--layers", type=int, metavar="N", help="cut a synthetic model to N layers")
    group.add_argument(
        "--needles",
        type=int,
        default=8,
        metavar="N",
        help="needles, and decode steps after the prompt (default: 8)",
    )
    group.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    group.add_argument(
        "--chunk",
        metavar="TOKENS",
        help="tokens per prefill chunk (default: 2048; 512 for a real model on a CPU)",
    )
    group.add_argument(
        "--attend-every",
        type=int,
        metavar="N",
        help="synthetic: attend in every Nth prefill chunk only (default: 1)",
    )
    group.add_argument("--report", metavar="FILE", help="also write the report as JSON")
    add_tier_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    config = tier_config(args)
    options = _options(args)
    with _Watcher(args.quiet) as watch:
        if args.model.startswith(_PREFIX):
            report = _synthetic(args, options, config, watch)
        else:
            report = _real(args, options, config, watch)
    document = {**report.to_dict(), "config": config.to_dict()}
    if args.report:
        write_json(args.report, document)
    emit(choose_format(args.format), document, report.tables())
    return 0 if report.ok else 1


def _options(args: argparse.Namespace) -> StressOptions:
    real = not args.model.startswith(_PREFIX)
    if real and (args.layers is not None or args.attend_every is not None):
        raise ConfigError(
            "--layers and --attend-every are for synthetic models: a real one is run whole"
        )
    chunk = parse_tokens(args.chunk, "chunk") if args.chunk else 2048
    if real and not args.chunk and not has_gpu():
        chunk = 512
    return StressOptions(
        tokens=parse_tokens(args.tokens, "tokens"),
        needles=args.needles,
        seed=args.seed,
        chunk=chunk,
        attend_every=1 if args.attend_every is None else args.attend_every,
    )


def _synthetic(
    args: argparse.Namespace, options: StressOptions, config: TierConfig, watch: Watch
) -> StressReport:
    name = args.model.removeprefix(_PREFIX)
    shape = _TINY if name == "tiny" else shape_of(name)
    layers = shape.layers if args.layers is None else positive(args.layers, "--layers")
    model = SyntheticModel(layers, shape.query_heads, shape.kv_heads, shape.head_dim)
    return SyntheticStress(model, options, config, watch, args.model).run()


def _real(
    args: argparse.Namespace, options: StressOptions, config: TierConfig, watch: Watch
) -> StressReport:
    model, tokenizer = load_model(args.model, args.dtype, Notes(args.quiet))
    return ModelStress(args.model, model, tokenizer, options, config, watch).run()


class _Watcher:
    """A progress line per phase."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._phase, self._progress = "", Progress("", 1, quiet=True)

    def __call__(self, phase: str, done: int, total: int, note: str) -> None:
        if phase != self._phase:
            self._progress.close()
            unit = "tokens" if phase.startswith("prefill") else "steps"
            self._progress = Progress(phase, total, unit, self._quiet)
            self._phase = phase
        self._progress.update(done, note)

    def __enter__(self) -> _Watcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.close()

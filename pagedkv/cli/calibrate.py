"""``pagedkv calibrate``: measures on text how keys and values are to be mixed."""

from __future__ import annotations

import argparse
import time
from typing import Any

from pagedkv.calibration.file import require_name
from pagedkv.cli.eval import add_text_option, text_sources
from pagedkv.cli.loading import DTYPES, MODELS_OWN, add_model_options, load_model
from pagedkv.cli.options import parse_tokens
from pagedkv.cli.output import (
    Notes,
    Progress,
    add_output_options,
    choose_format,
    emit,
    facts,
    number,
    seconds,
)
from pagedkv.errors import ConfigError
from pagedkv.integrations.mlx_lm.calibrate import LEAST, calibrate
from pagedkv.tools.evaluation import BUILT_IN, Text

TOKENS = 2048

_EPILOG = f"""\
The model reads the beginning of each text with its own 16-bit cache. What was measured goes into a
file, for this model and --dtype alone, which every command takes as --treatment FILE.json, and
TierConfig(treatment="FILE.json") in Python. Give texts like those that the model will read; texts
have {LEAST} tokens at least.

Whether it pays, on texts that were not read for it:
  pagedkv eval --model MODEL --text other.txt --kv K4V4,K3V3 --treatment auto,FILE.json

examples:
  pagedkv calibrate --model demo --out demo.json
  pagedkv calibrate --model owner/name --text book.txt --text code.py --tokens 4K --out name.json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "calibrate",
        help="fix by text of your own how keys and values are mixed before they are quantized",
        description="Measure on text how keys and values are mixed before they are quantized.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(parser, dtypes=(*DTYPES, MODELS_OWN))
    group = parser.add_argument_group("what")
    add_text_option(group)
    group.add_argument(
        "--tokens", default=str(TOKENS), metavar="N", help=f"of each text (default: {TOKENS})"
    )
    group.add_argument(
        "--out", required=True, metavar="FILE.json", help="where to write what was found"
    )
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    say, wanted = Notes(args.quiet), parse_tokens(args.tokens, "tokens")
    target = require_name(args.out)
    if not target.parent.is_dir():  # not after the model has read everything
        raise ConfigError(f"cannot write {args.out!r}: there is no folder {str(target.parent)!r}")
    sources = text_sources(args.text or BUILT_IN)
    model, tokenizer = load_model(args.model, args.dtype, say)
    ids = [_ids(Text.of(name, text, tokenizer), wanted) for name, text in sources]
    began = time.perf_counter()
    progress = Progress("calibrating", wanted * len(ids), quiet=args.quiet)
    try:
        found = calibrate(model, ids, watch=lambda done, total: progress.update(done))
    finally:
        progress.close()
    found.save(target)
    took, layers = time.perf_counter() - began, len(model.layers)
    document = {
        "file": args.out,
        "model": found.model,
        "texts": [name for name, _ in sources],
        "tokens": found.tokens,
        "calibrated": sorted(found),
        "layers": layers,
        "seconds": took,
    }
    shown = facts(
        [
            ("calibrated", f"{len(found)} of {layers} layers of {found.model}"),
            ("read", f"{number(found.tokens)} tokens in {seconds(took)}"),
            ("use it with", f"--treatment {args.out}"),
        ]
    )
    emit(choose_format(args.format), document, [shown])
    return 0


def _ids(text: Text, wanted: int) -> list[int]:
    """The first tokens of a text.

    Raises:
        ConfigError: if it has fewer.
    """
    ids = [*text.start, *text.tokens][:wanted]
    if len(ids) < wanted:
        raise ConfigError(
            f"the text {text.name!r} has {len(ids):,} tokens and --tokens is {wanted:,}: give a "
            f"longer text, or --tokens {len(ids)}"
        )
    return ids

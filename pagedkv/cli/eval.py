"""``pagedkv eval``: what quantized pages do to a model's answers, beside its own 16-bit cache."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagedkv.cli.eval_retrieval import (
    add_retrieval_arguments,
    retrieval_grid,
    retrieval_table,
)
from pagedkv.cli.loading import DTYPES, MODELS_OWN, add_model_options, load_model, read_text
from pagedkv.cli.options import (
    duration,
    parse_numbers,
    parse_tokens,
    tier_config,
    user_path,
)
from pagedkv.cli.output import Notes, Progress, Table, add_output_options, choose_format, emit
from pagedkv.config.tier_config import BACKENDS, TREATMENTS, TierConfig
from pagedkv.errors import ConfigError
from pagedkv.tools.bench.result import OK, Row
from pagedkv.tools.bench.timing import Deadline
from pagedkv.tools.evaluation import (
    BUILT_IN,
    LEGS,
    EvalSettings,
    Evaluation,
    Result,
    Text,
    Variant,
    again_variants,
    built_in_text,
    heat_map,
    mlx_lm_variants,
    paged_variants,
)
from pagedkv.tools.evaluation.plots import HINT, available, draw
from pagedkv.tools.evaluation.report import cells, page, retrieval_title, title
from pagedkv.tools.evaluation.result import RETRIEVAL
from pagedkv.tools.evaluation.retrieval_result import Grid
from pagedkv.tools.evaluation.retrieval_rows import Retrieval, comparison_rows
from pagedkv.tools.evaluation.variants import PRECISIONS, REFERENCE, TYPES, require_shorter, shorter

NONE = "none"
MLX_LM = "8,4"
REPORT_FILE = "report.md"

_EPILOG = """\
The model reads a text twice, side by side: with mlx-lm's own 16-bit cache, and with a paged one.
KL is KL(own || paged) in nats per position, top-1 the share of positions at which both expect the
same token, flips the others. "prefill" reads the text in chunks; "decode" reads its first part so
and the rest token by token, and fits a line to KL by position. Figures are over the positions whose
context reaches beyond the hot window and the sinks; those over all positions (..._all) are in JSON
and CSV. "bits" counts scales, padding and 16-bit tokens, at the end of the text.

Without --text two built-in texts are read: english (the help topics of Python's manual) and python
(source code of the standard library).

With --tasks, facts are hidden in a text and asked for, and answers are compared; without --legs
beside them, only the tasks are run.

--kv takes precisions with commas between them, a row each, or one ladder; repeat it for more.

examples:
  pagedkv eval --model demo --tokens 2048 --decode-tokens 512
  pagedkv eval --model owner/name --text book.txt --kv K8V4,K4V4 --kv fp16:1024,K8V4:4096,K4V4
  pagedkv eval --model owner/name --tokens 8K --segments 4 --output results --format table
  pagedkv eval --model owner/name --tasks all --lengths 4K,16K --examples 4 --kv K8V4,K4V4
"""
_OF_LEGS = ("text", "tokens", "decode_tokens", "decode_step", "segments", "offset", "seed")
_COUNTS = ("tokens", "chunk", "decode_tokens", "decode_step", "segments", "offset", "seed")


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "eval",
        help="perplexity, KL and top-1 agreement of precisions, beside the model's own cache",
        description="Measure what quantized pages do to a model's answers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(parser, dtypes=(*DTYPES, MODELS_OWN))
    _add_what(parser)
    _add_how(parser)
    add_retrieval_arguments(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def add_text_option(group: argparse._ArgumentGroup) -> None:
    """Add ``--text``; `text_sources` reads what it names."""
    group.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help=f"text to read, or one of {', '.join(BUILT_IN)}; may be repeated (default: both)",
    )


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    add_text_option(group)
    group.add_argument(
        "--kv",
        action="append",
        metavar="KV",
        help=f"precisions with commas between them, or one ladder; may be repeated "
        f"(default: {','.join(PRECISIONS)})",
    )
    group.add_argument(
        "--mlx-lm",
        metavar="BITS,...",
        help=f"rows for mlx-lm's own quantized cache, group 64; none for none (default: {MLX_LM} "
        f"beside legs; with tasks, those that are given)",
    )
    group.add_argument(
        "--again",
        metavar="N,TYPE,...",
        help=f"mlx-lm's own cache once more, with prompts read in calls of so many tokens, or the "
        f"model computing in {', '.join(TYPES)}, a row each: how much is chance",
    )
    group.add_argument(
        "--treatment",
        metavar="NAME,...",
        help=f"what is done to keys and values before they are quantized, a row each: "
        f"{', '.join(TREATMENTS)}, or files of `pagedkv calibrate` "
        f"(default: {TierConfig().treatment})",
    )
    group.add_argument(
        "--layer-kv",
        action="append",
        metavar="LAYERS",
        help=f"layers with another precision, a row each: auto, same (none), or K8V8@7,17-20; may "
        f"be repeated (default: {TierConfig().layer_kv})",
    )
    for flag, text in (
        ("--hot-tokens", "newest tokens kept in 16 bit"),
        ("--sink-tokens", "first tokens kept in 16 bit for ever"),
        ("--page-tokens", "tokens per page: 256, 512 or 1024"),
    ):
        group.add_argument(flag, metavar="N", help=text)
    group.add_argument(
        "--hot-dtype", metavar="TYPE", help="of the hot tokens: model, float16 or bfloat16"
    )
    group.add_argument("--backend", metavar="NAME", help=f"one of {', '.join(BACKENDS)}")


def _add_how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    defaults = EvalSettings()
    group.add_argument(
        "--legs",
        metavar="LEG,...",
        help=f"{' and '.join(LEGS)} (default: {','.join(LEGS)}; none with --tasks)",
    )
    for flag, metavar, text in (
        ("--tokens", "N", "of each text, or of each segment of it"),
        ("--decode-tokens", "N", "of these, the last so many are read one by one in decode"),
        ("--decode-step", "N", "tokens per call of decode, 1 to 8"),
        ("--segments", "N", "disjoint pieces of each text, for the spread"),
        ("--offset", "N", "tokens of a text to leave out before the first of them"),
        ("--seed", "N", "of the bootstrap behind the slope's interval"),
    ):
        default = getattr(defaults, flag.removeprefix("--").replace("-", "_"))
        group.add_argument(flag, metavar=metavar, help=f"{text} (default: {default})")
    group.add_argument(
        "--chunk",
        metavar="N",
        help=f"tokens per call of a prompt (default: {defaults.chunk}, in tasks {Grid().chunk} "
        f"as mlx-lm has it)",
    )
    group.add_argument(
        "--max-seconds",
        type=duration,
        metavar="S",
        help="stop where it is after this long, legs and tasks together",
    )
    group.add_argument(
        "--output",
        metavar="DIR",
        help="write result.json, result-positions.npz, report.md and the plots there",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 1 if nothing could be measured."""
    say = Notes(args.quiet)
    settings, grid = _settings(args), _grid(args)
    variants, of_tasks = _variants(args, MLX_LM if settings else NONE), _variants(args, NONE)
    require_shorter(variants, max(each.chunk for each in (settings, grid) if each))
    if settings and grid:  # what only one of them reads in shorter calls is a row of that one
        variants, of_tasks = shorter(variants, settings.chunk), shorter(of_tasks, grid.chunk)
    sources = text_sources(args.text or BUILT_IN) if settings else []
    folder = user_path(args.output) if args.output else None
    model, tokenizer = load_model(args.model, args.dtype, say)
    texts = [Text.of(name, text, tokenizer) for name, text in sources]
    name = short_name(args.model)
    command = shlex.join(["pagedkv", *args.argv])
    result = Result(record(name, model, settings, variants, texts, command, grid), folder)
    deadline = Deadline(args.max_seconds)
    with _Watch(args.quiet) as watch:
        tasks = grid and Retrieval(
            model, tokenizer, of_tasks, grid, result, deadline, say, watch.update
        )
        if tasks:
            tasks.require()  # not after an hour of legs
        if settings:
            Evaluation(
                name, model, texts, variants, settings, result, deadline, say, watch.update
            ).run()
        if tasks:
            tasks.run()
    if folder:
        write_figures(result, folder, say)
    emit(choose_format(args.format), result.document(), _tables(result, name), _flat(result, name))
    return 0 if measured(result) else 1


def _settings(args: argparse.Namespace) -> EvalSettings | None:
    """How legs are run; None if only tasks are."""
    if args.tasks is not None and args.legs is None:
        if given := [name for name in _OF_LEGS if getattr(args, name) is not None]:
            raise ConfigError(
                f"--{given[0].replace('_', '-')} is about legs, and with --tasks alone none are "
                f"run: give --legs {','.join(LEGS)} too"
            )
        return None
    given_counts: dict[str, Any] = {}
    for name in _COUNTS:
        if (value := getattr(args, name)) is not None:
            given_counts[name] = parse_tokens(value, name)
    if args.legs is not None:
        given_counts["legs"] = tuple(leg.strip() for leg in args.legs.split(","))
    return EvalSettings(**given_counts)


def _grid(args: argparse.Namespace) -> Grid | None:
    """The cells of tasks; None if none are run."""
    grid = retrieval_grid(args)
    if grid is None or args.chunk is None:
        return grid
    return replace(grid, chunk=parse_tokens(args.chunk, "chunk"))


def _variants(args: argparse.Namespace, stock: str) -> list[Variant]:
    """The rows; `stock` are the bits of mlx-lm's cache if none are given."""
    names = ("hot_tokens", "sink_tokens", "page_tokens", "hot_dtype", "backend")
    base = tier_config(argparse.Namespace(**{name: getattr(args, name) for name in names}))
    treatments = [name.strip() for name in (args.treatment or "").split(",") if name.strip()]
    ours = paged_variants(args.kv or [",".join(PRECISIONS)], base, treatments, args.layer_kv or ())
    parts = [part.strip() for part in (args.again or "").split(",") if part.strip()]
    again = again_variants([p if p[0].isalpha() else parse_tokens(p, "--again") for p in parts])
    quantized = mlx_lm_variants(_bits(stock if args.mlx_lm is None else args.mlx_lm))
    return [*again, *ours, *quantized]


def _bits(text: str) -> list[int]:
    if text.strip() == NONE:
        return []
    return parse_numbers(text, "--mlx-lm", f"give bits such as 8,4, or {NONE}")


def text_sources(given: Sequence[str]) -> list[tuple[str, str]]:
    """Name and contents of each text: of the built-in ones, or in files.

    Raises:
        ConfigError: if one is given twice, or cannot be read.
    """
    names = [text if text in BUILT_IN else short_name(text) for text in given]
    if len(set(names)) < len(names):
        names = list(given)
    if len(set(names)) < len(names):
        raise ConfigError(f"--text {' --text '.join(given)}: a text is given twice")
    contents = [
        built_in_text(text) if text in BUILT_IN else read_text(text, "text") for text in given
    ]
    return list(zip(names, contents, strict=True))


def short_name(given: str) -> str:
    """What a folder or a file is called in rows: its last part; anything else is as it is."""
    path = user_path(given)
    return path.resolve().name if path.exists() else given


def record(
    name: str,
    model: Any,
    settings: EvalSettings | None,
    variants: Sequence[Variant],
    texts: Sequence[Text],
    command: str,
    grid: Grid | None = None,
) -> dict[str, Any]:
    """What a result says of how it was made.

    Args:
        name: of the model.
        model: of mlx-lm.
        settings: of the legs; None if there are none.
        variants: that were compared.
        texts: that were read.
        command: that did it.
        grid: of retrieval tasks; None if there are none.
    """
    return {
        "command": command,
        "model": name,
        "model_type": getattr(getattr(model, "args", None), "model_type", type(model).__name__),
        "layers": len(model.layers),
        **(settings.to_dict() if settings else {}),
        **({RETRIEVAL: grid.to_dict()} if grid else {}),
        "texts": [
            {"name": text.name, "tokens": len(text.tokens), "sha256": text.digest} for text in texts
        ],
        "variants": [
            {
                "what": variant.label,
                "kind": variant.kind,
                "config": variant.config.to_dict() if variant.config else None,
            }
            for variant in variants
        ],
    }


def write_figures(result: Result, folder: Path, say: Notes) -> None:
    """Write the tables in Markdown, and the plots where they can be drawn."""
    text = page(result.document())
    # Names of files may hold bytes that are no text.
    (folder / REPORT_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")
    if not available():
        say(HINT)
        return
    files = draw(result.rows, folder)
    if result.retrieval is not None:
        files += heat_map.draw(result.retrieval, folder)
    say(f"{len(files)} plots in {folder}")


def _flat(result: Result, model: str) -> list[Row]:
    """Rows for CSV."""
    rows = [{k: v for k, v in row.items() if k != "kl_binned"} for row in result.rows]
    return rows + (comparison_rows(result.retrieval, model) if result.retrieval else [])


def _tables(result: Result, model: str) -> list[Table]:
    tables, rows = [], result.rows
    for leg in LEGS:
        columns, lines = cells(leg, rows)
        if lines:
            left = frozenset(i for i, column in enumerate(columns) if column.left)
            heads = [column.heading for column in columns]
            tables.append(Table(heads, lines, left, title(leg, rows)))
    if result.retrieval is not None:
        words = retrieval_title(model, result.retrieval)
        tables.append(retrieval_table(result.retrieval, words))
    return tables


def measured(result: Result) -> bool:
    """Whether anything was compared with the model's own cache."""
    rows = any(row["status"] == OK and row["kind"] != REFERENCE for row in result.rows)
    return rows or (result.retrieval is not None and any(result.retrieval.scored))


class _Watch:
    """A progress line that begins anew with every leg, and with the tasks."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._label, self._done = quiet, "", 0
        self._line: Progress | None = None

    def update(self, label: str, done: int, total: int, unit: str = "tokens") -> None:
        """Show how far it is."""
        if self._line is None or label != self._label or done <= self._done:
            self.close()
            self._label, self._line = label, Progress(label, total, unit, self._quiet)
        self._done = done
        self._line.update(done)

    def close(self) -> None:
        """Wipe the line away."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

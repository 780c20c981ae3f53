"""Retrieval tasks of ``pagedkv eval``: their options and their table."""

from __future__ import annotations

import argparse

from pagedkv.cli.options import parse_numbers, parse_tokens
from pagedkv.cli.output import Table
from pagedkv.errors import ConfigError
from pagedkv.tools.evaluation.retrieval_report import comparison_rows
from pagedkv.tools.evaluation.retrieval_result import Grid, RetrievalResult
from pagedkv.tools.evaluation.run import TIME_IS_UP
from pagedkv.tools.evaluation.tasks import TASKS

_DEFAULT = Grid()
_CELLS = ("--lengths", "--depths", "--examples", "--task-seed", "--chat")


def add_retrieval_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--tasks`` and what decides their cells."""
    group = parser.add_argument_group(
        "retrieval",
        "Facts are hidden in a text and asked for. The same prompt goes to every cache; what the "
        "model's own cache answers better is lost.",
    )
    group.add_argument(
        "--tasks",
        metavar="NAME,...",
        help=f"of {', '.join(TASKS)}, or all; without --legs, only these are run",
    )
    group.add_argument(
        "--lengths",
        metavar="TOKENS,...",
        help=f"of prompt and answer, such as 1K,8K (default: {_listed(_DEFAULT.lengths)})",
    )
    group.add_argument(
        "--depths",
        metavar="PERCENT,...",
        help=f"how deep in the text the fact is (default: {_listed(_DEFAULT.depths)})",
    )
    group.add_argument(
        "--examples",
        metavar="N",
        type=int,
        help=f"prompts for each task, length and depth (default: {_DEFAULT.examples})",
    )
    group.add_argument(
        "--task-seed", metavar="N", type=int, help=f"of the prompts (default: {_DEFAULT.seed})"
    )
    group.add_argument(
        "--chat", action="store_true", help="ask in the model's chat template, if it has one"
    )


def retrieval_grid(args: argparse.Namespace) -> Grid | None:
    """The cells that the options ask for; None if they ask for no tasks.

    Raises:
        ConfigError: naming the option and what would do.
    """
    values = {flag: getattr(args, flag[2:].replace("-", "_")) for flag in _CELLS}
    given = [flag for flag, value in values.items() if value is not None and value is not False]
    if args.tasks is None:
        if given:
            raise ConfigError(f"{given[0]} is about tasks: give --tasks {','.join(TASKS)}, or all")
        return None
    names = tuple(TASKS) if args.tasks.strip() == "all" else _split(args.tasks)
    return Grid(
        tasks=names,
        lengths=_lengths(args.lengths),
        depths=_DEFAULT.depths if args.depths is None else _depths(args.depths),
        examples=_DEFAULT.examples if args.examples is None else args.examples,
        seed=_DEFAULT.seed if args.task_seed is None else args.task_seed,
        chat=args.chat,
    )


def retrieval_table(result: RetrievalResult, title: str) -> Table:
    """What every cache lost, for a terminal.

    Args:
        result: of a run.
        title: of the table.
    """
    headings, lines = comparison_rows(result)
    run, cells = len({outcome.cell for outcome in result.outcomes}), len(result.grid.cells())
    if not result.complete:
        title += f"; {TIME_IS_UP} after {run} of {cells} cells"
    return Table(headings, lines, frozenset({0, 1}), title)


def _lengths(text: str | None) -> tuple[int, ...]:
    if text is None:
        return _DEFAULT.lengths
    return tuple(parse_tokens(part, "--lengths") for part in _split(text))


def _depths(text: str) -> tuple[int, ...]:
    parts = ",".join(part.removesuffix("%") for part in _split(text))
    return tuple(parse_numbers(parts, "--depths", "write percentages, such as 0,25,50,75,100"))


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _listed(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))

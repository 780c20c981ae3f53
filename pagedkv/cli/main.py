"""The entry point: finds the command, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TextIO

import pagedkv
from pagedkv.cli import bench, calibrate, doctor, eval, generate, plan, serve, stress
from pagedkv.cli.streams import abandon_stdout, standard_streams
from pagedkv.errors import ConfigError, PagedKVError
from pagedkv.integrations import blas

_EPILOG = """\
examples:
  pagedkv generate --model demo --prompt "What is a page table?"
  pagedkv serve --model demo --warm 2GB --port 8080
  pagedkv plan --model llama3-8b --context 128K --warm 2GB
  pagedkv doctor
  pagedkv stress --model synthetic:llama3-8b --layers 2 --tokens 64K --warm 32MB
  pagedkv bench all --quick
  pagedkv eval --model demo --tokens 2048 --decode-tokens 512
  pagedkv calibrate --model demo --out demo.json

`pagedkv COMMAND --help` shows every option. Exit codes: 0 well, 1 an error or a failed check,
2 a command line that cannot be read.
"""

_LONGEST = 2000
"""Characters of an error: some quote a value, however long."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"{self.prog}: error: {_short(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="pagedkv",
        description="A paged, tiered KV cache for MLX: contexts larger than memory.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pagedkv {pagedkv.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (generate, serve, plan, doctor, stress, bench, eval, calibrate):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; the process's own if None.

    Returns:
        The exit code.
    """
    with standard_streams() as has_stdout:
        return _run(argv, has_stdout)


def _run(argv: Sequence[str] | None, has_stdout: bool) -> int:
    try:
        parser = build_parser()
        args, more = parser.parse_known_args(argv)
        if hasattr(args, "passed_on"):
            args.passed_on = more  # another program's options
        elif more:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
    except SystemExit as e:  # --help, --version, or a usage error that was already printed
        return e.code if isinstance(e.code, int) else 0
    with _one_line_warnings(), _terminable(), _open_files_kept():
        try:
            if not has_stdout and hasattr(args, "format"):
                raise ConfigError("standard output is closed: there is no place for results")
            args.argv = list(sys.argv[1:] if argv is None else argv)  # for the record
            _say_blas()
            return int(args.run(args))
        except KeyboardInterrupt:
            print("pagedkv: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            abandon_stdout()  # the reader has gone
            return 141
        except (PagedKVError, OSError) as e:
            print(f"pagedkv: error: {_one_line(e)}", file=sys.stderr)
            abandon_stdout()  # it may be what failed, and would again
            return 1


def _say_blas() -> None:
    """Say once that OpenBLAS was made, and each time that there is none."""
    if blas.made:
        print(f"made an OpenBLAS for MLX, once: {blas.path}", file=sys.stderr)
    if blas.problem:
        warnings.warn(
            f"no OpenBLAS for MLX, whose own BLAS is many times slower: {blas.problem}",
            stacklevel=2,
        )


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, PagedKVError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return _short(f"{where}{error.strerror}")
    return _short(str(error))


def _short(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show warnings as people want them: one line, without the place in the source."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"pagedkv: warning: {' '.join(str(message).split())}", file=file or sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM unwind like any exit, so that cold files are deleted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _open_files_kept() -> Iterator[None]:
    """Keep mlx-lm from lowering the limit of open files.

    When it is imported it asks for 2,048 of at most 4,096. That is an error where the hard limit is
    lower, as in many containers, and cannot be undone where it is higher.
    """
    ask, unlimited = resource.setrlimit, resource.RLIM_INFINITY

    def raise_only(which: int, limits: tuple[int, int]) -> None:
        if which == resource.RLIMIT_NOFILE:
            soft, hard = resource.getrlimit(which)
            wanted = limits[0] if hard == unlimited else min(limits[0], hard)
            limits = (soft if soft == unlimited else max(soft, wanted), hard)
        ask(which, limits)

    resource.setrlimit = raise_only
    try:
        yield
    finally:
        resource.setrlimit = ask

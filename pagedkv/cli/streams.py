"""Standard streams as a command may find them: closed, full, or of another encoding than UTF-8."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import TextIO

_ESCAPE = "pagedkv.escape"


@contextlib.contextmanager
def standard_streams() -> Iterator[bool]:
    r"""Make the standard streams fit to be used.

    A closed one is replaced, and so is its descriptor: the next file that is opened would have its
    number, and get what is printed. Characters that standard output's encoding lacks are written
    as ``\xe9``, and a line on stderr says so at the end.

    Yields:
        Whether there is a standard output.
    """
    escaped = 0

    def escape(error: UnicodeError) -> tuple[str | bytes, int]:
        nonlocal escaped
        escaped += 1
        return codecs.backslashreplace_errors(error)

    codecs.register_error(_ESCAPE, escape)
    _occupy_descriptors()
    has_stdout = sys.stdout is not None
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                setattr(sys, name, stack.enter_context(open(os.devnull, "w", encoding="utf-8")))  # noqa: PTH123
                stack.callback(setattr, sys, name, None)
        stack.enter_context(_lenient(sys.stderr, "backslashreplace"))
        with _lenient(sys.stdout, _ESCAPE):
            yield has_stdout
        if escaped:
            print(
                f"pagedkv: warning: standard output is {sys.stdout.encoding}, which lacks some "
                f"characters: they were written as escapes (PYTHONIOENCODING=utf-8 helps)",
                file=sys.stderr,
            )


@contextlib.contextmanager
def _lenient(stream: TextIO, errors: str) -> Iterator[None]:
    """Have a stream take characters that its encoding lacks, if it refuses them."""
    if not isinstance(stream, TextIOWrapper) or stream.errors != "strict":
        yield
        return
    with contextlib.suppress(OSError):  # it is flushed, which whoever writes next is told
        stream.reconfigure(errors=errors)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            stream.reconfigure(errors="strict")


def abandon_stdout() -> None:
    """Let what cannot be written go, or the interpreter complains about it when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _occupy_descriptors() -> None:
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)

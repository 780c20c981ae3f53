"""What models read: two texts that every Python has, or the user's own, cut into segments."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedkv.errors import ConfigError

ENGLISH, PYTHON = "english", "python"
BUILT_IN = (ENGLISH, PYTHON)
SOURCES = (
    *("argparse", "ast", "inspect", "typing", "dataclasses", "functools", "enum", "fractions"),
    *("statistics", "random", "shutil", "tempfile", "tarfile", "subprocess", "threading", "socket"),
    *("http.client", "logging", "unittest.mock", "doctest", "pdb", "dis", "pickle"),
)
"""Modules of the standard library, in Python 3.10 to 3.13, in the order in which they are joined.
Their text is not the same in all of them: a result names the Python and the text's digest."""


@dataclass(frozen=True)
class Text:
    """A text as a model reads it.

    Attributes:
        name: in rows.
        start: tokens that every sequence of this model begins with, or none.
        tokens: of the text itself.
        digest: of its characters.
    """

    name: str
    start: tuple[int, ...]
    tokens: tuple[int, ...]
    digest: str

    @classmethod
    def of(cls, name: str, text: str, tokenizer: Any) -> Text:
        """Tokenize a text."""
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        plain = tuple(tokenizer.encode(text, add_special_tokens=False))
        return cls(name, _start(tokenizer), plain, digest)


@dataclass(frozen=True)
class Segment:
    """A piece of a text that is read from an empty cache.

    Attributes:
        text: its name.
        number: from 0 on.
        tokens: one more than are fed: the last is only predicted.
    """

    text: str
    number: int
    tokens: tuple[int, ...]


def built_in_text(name: str) -> str:
    """A text that needs no network.

    Args:
        name: ``"english"``, the help topics of Python's manual, or ``"python"``, source code of
            its standard library.

    Raises:
        ConfigError: if there is no such text.
    """
    if name == ENGLISH:
        from pydoc_data.topics import topics  # half a megabyte: only for those who ask

        return "\n\n".join(topics[key] for key in sorted(topics))
    if name == PYTHON:
        return "\n\n".join(map(_source, SOURCES))
    raise ConfigError(f"there is no text {name!r}: {' or '.join(BUILT_IN)}, or give a file")


def cut(text: Text, tokens: int, segments: int, offset: int = 0) -> list[Segment]:
    """Disjoint segments of a text, one after the other.

    Args:
        text: to be cut.
        tokens: to be fed of each, with those that every sequence begins with.
        segments: how many.
        offset: tokens of the text that are left out before the first.

    Raises:
        ConfigError: if the text is too short.
    """
    own = tokens + 1 - len(text.start)
    if own < 2:
        raise ConfigError(f"{tokens} tokens leave nothing of the text: give more")
    needed = offset + segments * own
    there = len(text.tokens)
    if needed > there:
        fits = (there - offset) // segments - 1 + len(text.start)
        less = f"at most {fits:,} tokens" if fits > 1 else "fewer segments or a smaller offset"
        raise ConfigError(
            f"the text {text.name!r} is too short: it has {there:,} tokens, and {segments} x "
            f"{tokens:,} after the first {offset:,} need {needed:,}: give a longer text, or {less}"
        )
    starts = range(offset, offset + segments * own, own)
    return [
        Segment(text.name, i, text.start + text.tokens[at : at + own])
        for i, at in enumerate(starts)
    ]


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"this Python has no source of its module {module}: give a text of your own"
        )
    try:
        return Path(spec.origin).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read {spec.origin!r}: give a text of your own") from e


def _start(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text: the token for its beginning, or nothing."""
    first = getattr(tokenizer, "bos_token_id", None)
    whole: Sequence[int] = tokenizer.encode("a")
    bare: Sequence[int] = tokenizer.encode("a", add_special_tokens=False)
    starts = first is not None and list(whole[:1]) == [first] and list(bare[:1]) != [first]
    return (int(first),) if starts and first is not None else ()

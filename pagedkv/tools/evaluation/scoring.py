"""Whether an answer is right: exact containment, as RULER and NIAH do it, or a share of records."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_END = re.compile(r"[.\n]")
_JSON = json.JSONDecoder()


class Judge(Protocol):
    """Scores the text that a model wrote after the prompt."""

    def score(self, text: str) -> float:
        """From 0 (wrong) to 1 (right)."""
        ...

    def finished(self, text: str) -> bool:
        """Whether nothing that may follow changes the score: decoding can stop."""
        ...


@dataclass(frozen=True)
class Contains:
    """The share of answers in the first sentence, as whole words or numbers, in whatever case.

    What follows is not looked at: small models go on, and name everything sooner or later.

    Attributes:
        answers: words or numbers.
    """

    answers: tuple[str, ...]

    def score(self, text: str) -> float:
        """1 if all are there, 0 if none is. ``"481"`` is not in ``"4813"``."""
        sentence = _END.split(text.lstrip(), maxsplit=1)[0]
        return mean([float(_has(sentence, answer)) for answer in self.answers])

    def finished(self, text: str) -> bool:
        """After the first sentence, or a line without an end."""
        return _END.search(text.lstrip()) is not None


@dataclass(frozen=True)
class Records:
    """The share of records that are listed as JSON lines with the right value.

    Of each line the record that it begins with counts: small models go on, and not always in a new
    line. Lines that begin with no JSON, and names nobody asked for, count for nothing. Of a name
    that is listed twice the first line counts.

    Attributes:
        expected: names and values.
        fields: what the two are called in JSON.
        lead: the beginning of the first line, which the prompt gives.
    """

    expected: tuple[tuple[str, int], ...]
    fields: tuple[str, str]
    lead: str

    def score(self, text: str) -> float:
        """Right records over all that are expected."""
        listed: dict[str, object] = {}
        for name, value in self._listed(text):
            listed.setdefault(name, value)
        return sum(listed.get(name) == str(value) for name, value in self.expected) / len(
            self.expected
        )

    def finished(self, text: str) -> bool:
        """After as many lines as there are records, or an empty one."""
        lines = text.split("\n")
        return len(lines) > len(self.expected) or "" in (line.strip() for line in lines[1:-1])

    def _listed(self, text: str) -> list[tuple[str, str]]:
        found = []
        for line in (self.lead + text).split("\n")[: len(self.expected)]:
            try:
                record, _ = _JSON.raw_decode(line.strip())
                found.append((str(record[self.fields[0]]), str(record[self.fields[1]])))
            except (ValueError, KeyError, TypeError):
                continue
        return found


def _has(sentence: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", sentence, re.IGNORECASE) is not None


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0

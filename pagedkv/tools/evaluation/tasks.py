"""Retrieval tasks: what is hidden, what is asked, what is right. No tokens, no model here.

Each is made from a seed alone. They are for models from 135 million parameters up: a question
repeats the words of what it asks for, answers are short numbers or words, and the prompt gives the
beginning of the answer, as RULER's do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from pagedkv.tools.evaluation.haystack import ADJECTIVES, NAMES, NOUNS, prose, vocabulary
from pagedkv.tools.evaluation.scoring import Contains, Judge, Records

DISTRACTORS = 4
RECORDS = 6
MOST_HOPS = 3
ROUNDS = (9, 2, 2)
_EXAMPLE = ("lamp", "cat", "train", "ship")  # none of the words that variables are named by
_NUMBERS = range(20_000, 100_000)  # five digits, and not the example's 12345


@dataclass(frozen=True)
class Puzzle:
    """What a prompt is made of.

    Attributes:
        intro: said first.
        facts: sentences, and how deep in the text they are, from 0 to 1.
        filler: what the text is filled with, without end.
        joint: between pieces of the text.
        question: said after the text.
        lead: the beginning of the answer, which the prompt gives.
        answers: what must come, as text, for people.
        judge: of what comes.
        new_tokens: enough for the answer.
    """

    intro: str
    facts: tuple[tuple[float, str], ...]
    filler: Iterator[str]
    joint: str
    question: str
    lead: str
    answers: tuple[str, ...]
    judge: Judge
    new_tokens: int


@dataclass(frozen=True)
class Task:
    """A kind of puzzle.

    Attributes:
        name: on the command line.
        title: for people.
        puzzle: makes one from random numbers and a depth from 0 to 1.
        has_depth: whether the depth means anything; else what is asked for is spread all over.
    """

    name: str
    title: str
    puzzle: Callable[[random.Random, float], Puzzle]
    has_depth: bool = True


def _needle(rng: random.Random, depth: float, distractors: int = 0) -> Puzzle:
    """One sentence with a number, and others like it about other things."""
    keys = _keys(rng, 1 + distractors)
    numbers = _numbers(rng, len(keys))
    places = [depth, *(rng.random() for _ in range(distractors))]
    facts = tuple(
        (place, f"The special magic number for {key} is {number}.")
        for place, key, number in zip(places, keys, numbers, strict=True)
    )
    return Puzzle(
        "A special magic number is hidden in the following text. Remember it.",
        facts,
        prose(rng),
        " ",
        f"What is the special magic number for {keys[0]}?",
        f"The special magic number for {keys[0]} is",
        (str(numbers[0]),),
        Contains((str(numbers[0]),)),
        12,
    )


def _multikey(rng: random.Random, depth: float) -> Puzzle:
    return _needle(rng, depth, DISTRACTORS)


def _key_value(rng: random.Random, depth: float) -> Puzzle:
    """Records fill the whole text; the text is not prose."""
    asked, *keys = rng.sample(vocabulary(), len(vocabulary()))
    number = _number(rng)

    def others() -> Iterator[str]:
        for round_ in count(1):
            for key in keys:
                other = _number(rng)
                name = key if round_ == 1 else f"{key} {round_}"
                yield f"{name}: {other if other != number else other - 1}"

    return Puzzle(
        "Here is a list of keys and their values.",
        ((depth, f"{asked}: {number}"),),
        others(),
        "\n",
        f"What is the value of {asked}?",
        f"{asked}:",
        (str(number),),
        Contains((str(number),)),
        12,
    )


def _variables(rng: random.Random, depth: float) -> Puzzle:
    """A chain of assignments, and another one of the same length that nobody asks for.

    The first assignment is at the depth, the others are between it and the end. The score is the
    share of the steps from the last name back to the number that are right.
    """
    hops = rng.randint(1, MOST_HOPS)
    names = rng.sample(NOUNS, 2 * (hops + 1))
    values = _numbers(rng, 2)
    asked = _chain(names[: hops + 1], values[0])
    other = _chain(names[hops + 1 :], values[1])
    facts = [
        (start + (1 - start) * i / (hops + 1), f"{assignment}.")
        for chain, start in ((asked, depth), (other, rng.random()))
        for i, assignment in enumerate(chain)
    ]
    example = " = ".join(f"VAR {name}" for name in _EXAMPLE[: hops + 1])
    steps = (*reversed(names[:hops]), str(values[0]))
    return Puzzle(
        "Assignments of variables are hidden in the following text. Remember them.",
        tuple(facts),
        prose(rng),
        " ",
        f"Follow the assignments back to the number. For example: {example} = 12345",
        f"VAR {names[hops]} =",
        steps,
        Contains(steps),
        48,
    )


def _chain(names: Sequence[str], value: int) -> list[str]:
    """Assignments: the number to the first name, each name to the next one."""
    links = [f"VAR {new} = VAR {old}" for old, new in pairwise(names)]
    return [f"VAR {names[0]} = {value}", *links]


def _aggregation(rng: random.Random, depth: float) -> Puzzle:
    """Winners are spread over the text; which word comes most often?"""
    words = rng.sample(NOUNS, len(ROUNDS))
    winners = [word for word, count in zip(words, ROUNDS, strict=True) for _ in range(count)]
    rng.shuffle(winners)
    facts = tuple(
        ((i + 0.5) / len(winners), f"The winner of the round is {word}.")
        for i, word in enumerate(winners)
    )
    return Puzzle(
        "The winners of rounds are hidden in the following text. Count them.",
        facts,
        prose(rng),
        " ",
        "Who won most often?",
        "Most often, the winner of the round is",
        (words[0],),
        Contains((words[0],)),
        8,
    )


def _records(rng: random.Random, depth: float) -> Puzzle:
    """Records are spread over the text; all of them are wanted as JSON lines.

    The prompt has the line of the first one, so that the form is plain.
    """
    names = rng.sample(NAMES, RECORDS + 1)
    numbers = _numbers(rng, RECORDS + 1)
    all_pairs = tuple(zip(names, numbers, strict=True))
    facts = tuple(
        ((i + 0.5) / len(all_pairs), f"The secret code of {name} is {number}.")
        for i, (name, number) in enumerate(all_pairs)
    )
    (first, code), *wanted = all_pairs
    lead = '{"name": "'
    return Puzzle(
        "Secret codes of people are hidden in the following text. Remember them all.",
        facts,
        prose(rng),
        " ",
        f"List the secret codes of {', '.join(names[:-1])} and {names[-1]} as JSON lines.",
        f'{lead}{first}", "code": {code}}}\n{lead}',
        tuple(f"{name} {number}" for name, number in wanted),
        Records(tuple(wanted), ("name", "code"), lead),
        24 * RECORDS,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("needle", "one needle", _needle),
        Task("multikey", f"one needle of {1 + DISTRACTORS}", _multikey),
        Task("kv", "key and value", _key_value),
        Task("variables", "chains of variables", _variables),
        Task("aggregation", "most frequent word", _aggregation, has_depth=False),
        Task("records", f"{RECORDS} records to JSON", _records, has_depth=False),
    )
}


def _number(rng: random.Random) -> int:
    return rng.choice(_NUMBERS)


def _numbers(rng: random.Random, count: int) -> list[int]:
    return rng.sample(_NUMBERS, count)


def _keys(rng: random.Random, count: int) -> list[str]:
    """Different pairs of an adjective and a noun."""
    picked = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[i // len(NOUNS)]} {NOUNS[i % len(NOUNS)]}" for i in picked]

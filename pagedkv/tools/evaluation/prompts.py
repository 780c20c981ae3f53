"""Puzzles as tokens: a prompt of the length asked for, for a tokenizer, with or without chat."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.tools.evaluation.haystack import prose
from pagedkv.tools.evaluation.scoring import Judge
from pagedkv.tools.evaluation.tasks import TASKS, Puzzle

_MARK = "\u241e"  # stands for the user's words when a chat template is taken apart


@dataclass(frozen=True)
class Example:
    """A prompt and what is right.

    Attributes:
        task: its name.
        tokens: of the prompt.
        question_at: where the question begins among them.
        answers: what must come, for people.
        judge: of what comes.
        max_new_tokens: enough for the answer.
    """

    task: str
    tokens: tuple[int, ...]
    question_at: int
    answers: tuple[str, ...]
    judge: Judge
    max_new_tokens: int


def build(
    task: str, tokenizer: Any, tokens: int, depth: float, seed: int, chat: bool = False
) -> Example:
    """Make an example; the same one for the same arguments and Python version.

    Args:
        task: a key of `tasks.TASKS`.
        tokenizer: of the model.
        tokens: of the prompt and the longest answer; the prompt may have up to `SLACK` fewer.
        depth: of what is asked for, in percent of the text.
        seed: of everything that is random.
        chat: use the tokenizer's chat template, if it has one.

    Raises:
        ConfigError: if `tokens` are too few for the task.
    """
    rng = random.Random(f"{task} {tokens} {depth} {seed}")
    puzzle = TASKS[task].puzzle(rng, depth / 100)
    prompt = _Prompt(puzzle, tokenizer, _frame(tokenizer) if chat else None)
    text, question_at = prompt.fitted(tokens - puzzle.new_tokens)
    ids = prompt.encode(text)
    return Example(
        task,
        tuple(ids),
        _common(ids, prompt.encode(text[:question_at])),
        puzzle.answers,
        puzzle.judge,
        puzzle.new_tokens,
    )


SLACK = 8
"""Tokens that a prompt may be shorter than asked for; never longer."""
_PADDING = 3
"""Sentences of which the first letters fill what is left."""


class _Prompt:
    """The text of a puzzle for any number of pieces of filler."""

    def __init__(self, puzzle: Puzzle, tokenizer: Any, frame: tuple[str, str] | None) -> None:
        self._puzzle, self._tokenizer = puzzle, tokenizer
        self._before, self._after = frame or ("", "\n")
        self._special = frame is None
        self._pieces: list[str] = []
        sentences = islice(prose(random.Random(len(puzzle.question))), _PADDING)
        self._padding = " ".join(sentences).replace(".", "")

    def encode(self, text: str) -> list[int]:
        """Tokens, with those that the tokenizer begins a text with unless the template has them."""
        return list(self._tokenizer.encode(text, add_special_tokens=self._special))

    def fitted(self, tokens: int) -> tuple[str, int]:
        """The longest text of at most `tokens` tokens, and where its question begins.

        Raises:
            ConfigError: if not even the question fits.
        """
        least = self._length(0, 0)
        if least > tokens:
            answer = self._puzzle.new_tokens
            raise ConfigError(
                f"{tokens + answer} tokens are too few: the question takes {least} and the answer "
                f"{answer}"
            )
        count = self._pieces_of(tokens - least)
        while count and self._length(count, 0) > tokens:  # joined, they may need more tokens
            count -= 1
        letters = self._letters_of(tokens - self._length(count, 0))
        while letters and self._length(count, letters) > tokens:
            letters -= 1
        return self._text(count, letters)

    def _pieces_of(self, tokens: int) -> int:
        """How many pieces of filler have about so many tokens; they are made as they are wanted."""
        while tokens > 0:
            piece = next(self._puzzle.filler)
            self._pieces.append(piece)
            joined = self._puzzle.joint + piece
            tokens -= len(self._tokenizer.encode(joined, add_special_tokens=False))
        return len(self._pieces)

    def _letters_of(self, tokens: int) -> int:
        """How many letters of padding have about so many tokens."""
        low, high = 0, len(self._padding)
        while low < high:
            middle = (low + high + 1) // 2
            piece = self._padding[:middle] + "." + self._puzzle.joint
            fits = len(self._tokenizer.encode(piece, add_special_tokens=False)) <= tokens
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _length(self, pieces: int, letters: int) -> int:
        return len(self.encode(self._text(pieces, letters)[0]))

    def _text(self, pieces: int, letters: int) -> tuple[str, int]:
        """The prompt, and where its question begins.

        Args:
            pieces: of filler.
            letters: of padding.
        """
        puzzle = self._puzzle
        padding = [self._padding[:letters] + "."] if letters else []
        body = puzzle.joint.join(_placed([*padding, *self._pieces[:pieces]], puzzle.facts))
        context = f"{self._before}{puzzle.intro}\n\n{body}\n\n"
        return f"{context}{puzzle.question}{self._after}{puzzle.lead}", len(context)


def _placed(pieces: Sequence[str], facts: Sequence[tuple[float, str]]) -> list[str]:
    """The pieces with the facts between them, each as deep as it wants; those alike in order."""
    placed = list(pieces)
    for place, fact in sorted(facts, key=lambda each: each[0], reverse=True):
        placed.insert(round(place * len(pieces)), fact)
    return placed


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that two texts begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _frame(tokenizer: Any) -> tuple[str, str] | None:
    """What the chat template puts before and after the user's words; None without a template.

    Raises:
        ConfigError: if the template fails, or does not repeat what the user says.
    """
    if not getattr(tokenizer, "has_chat_template", False):
        return None
    message = [{"role": "user", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except Exception as e:  # templates are programs of the model's makers, and raise what they like
        raise ConfigError(f"the model's chat template fails ({' '.join(str(e).split())})") from e
    before, mark, after = str(text).partition(_MARK)
    if not mark:
        raise ConfigError("the model's chat template leaves out what the user says")
    return before, after

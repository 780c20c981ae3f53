"""Retrieval tasks: the same seed gives the same prompt, and the answer is where it should be."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pagedkv.errors import ConfigError
from pagedkv.tools.evaluation import prompts
from pagedkv.tools.evaluation.haystack import ADJECTIVES, NAMES, NOUNS, prose, sentences, vocabulary
from pagedkv.tools.evaluation.prompts import SLACK, Example, build
from pagedkv.tools.evaluation.scoring import Contains, Records, mean
from pagedkv.tools.evaluation.tasks import DISTRACTORS, MOST_HOPS, RECORDS, ROUNDS, TASKS
from tests.retrieval_stand_ins import Characters, Uneven, Words

CASES = [(kind, tokens) for kind in (Characters, Uneven, Words) for tokens in (2048, 5000)]


def text_of(tokenizer: Any, example: Example) -> str:
    return str(tokenizer.decode(example.tokens))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("kind", "tokens"), CASES)
def test_a_prompt_has_the_length_asked_for(task: str, kind: type, tokens: int) -> None:
    tokenizer = kind()
    for depth in (0, 37, 100):
        example = build(task, tokenizer, tokens, depth, seed=depth)
        total = len(example.tokens) + example.max_new_tokens
        assert tokens - SLACK <= total <= tokens


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(task: str) -> None:
    tokenizer = Characters()
    first, again = (build(task, tokenizer, 2048, 50, seed=3) for _ in range(2))
    other = build(task, tokenizer, 2048, 50, seed=4)
    assert first == again
    assert first.tokens != other.tokens and first.answers != other.answers


def test_global_randomness_does_not_matter() -> None:
    random.seed(1)
    first = build("records", Characters(), 2048, 0, seed=0)
    random.seed(2)
    assert build("records", Characters(), 2048, 0, seed=0) == first


@pytest.mark.parametrize("task", ["needle", "multikey", "kv"])
@pytest.mark.parametrize("seed", range(5))
def test_the_answer_is_in_the_text_once(task: str, seed: int) -> None:
    tokenizer = Characters()
    example = build(task, tokenizer, 3000, 50, seed)
    text = text_of(tokenizer, example)
    (answer,) = example.answers
    assert text.count(answer) == 1
    assert answer in tokenizer.decode(example.tokens[: example.question_at])


@pytest.mark.parametrize("seed", range(5))
def test_every_record_is_in_the_text_once_and_the_first_is_shown(seed: int) -> None:
    tokenizer = Characters()
    example = build("records", tokenizer, 3000, 0, seed)
    text = text_of(tokenizer, example)
    assert len(example.answers) == RECORDS
    for answer in example.answers:
        name, code = answer.split()
        assert text.count(code) == 1
        assert f"The secret code of {name} is {code}." in text
    assert text.count("The secret code of") == RECORDS + 1
    assert text.endswith('}\n{"name": "')


def test_the_answer_won_most_rounds() -> None:
    tokenizer = Characters()
    example = build("aggregation", tokenizer, 3000, 0, seed=1)
    text = text_of(tokenizer, example)
    winners = [part.split(".")[0] for part in text.split("The winner of the round is ")[1:]]
    counts = sorted((winners.count(word) for word in set(winners)), reverse=True)
    assert tuple(counts) == ROUNDS
    assert winners.count(example.answers[0]) == ROUNDS[0]


@pytest.mark.parametrize("task", ["needle", "multikey", "kv"])
def test_depth_says_where_the_answer_is(task: str) -> None:
    tokenizer = Characters()
    places = []
    for depth in (0, 25, 50, 75, 100):
        example = build(task, tokenizer, 6000, depth, seed=2)
        text = text_of(tokenizer, example)
        places.append(text.index(example.answers[0]) / len(text))
    assert places == pytest.approx([0.01, 0.25, 0.5, 0.75, 0.97], abs=0.04)


def test_distractors_are_like_the_needle_with_other_numbers() -> None:
    tokenizer = Characters()
    text = text_of(tokenizer, build("multikey", tokenizer, 3000, 50, seed=2))
    told = [part[:40] for part in text.split("The special magic number for ")[1:-1]]
    assert len({line.split(" is ")[0] for line in told}) == len(told) == 1 + DISTRACTORS
    assert len({line.split(" is ")[1][:5] for line in told}) == 1 + DISTRACTORS


@pytest.mark.parametrize("seed", range(8))
def test_a_chain_leads_to_its_number_in_the_order_of_the_text(seed: int) -> None:
    tokenizer = Characters()
    example = build("variables", tokenizer, 3000, 25, seed)
    text = tokenizer.decode(example.tokens[: example.question_at])
    asked = text_of(tokenizer, example).rpartition("VAR ")[2].removesuffix(" =")
    places, steps = [], list[str]()
    while not asked.isdecimal():
        line = f"VAR {asked} = "
        assert text.count(line) == 1
        places.append(text.index(line))
        asked = text[places[-1] + len(line) :].partition(".")[0].removeprefix("VAR ")
        steps.append(asked)
    assert tuple(steps) == example.answers
    assert 2 <= len(steps) <= 1 + MOST_HOPS
    assert text_of(tokenizer, example).count(steps[-1]) == 1
    assert places == sorted(places, reverse=True)


def test_chains_of_all_lengths_come_up() -> None:
    tokenizer = Characters()
    shown = {len(build("variables", tokenizer, 3000, 25, seed).answers) - 1 for seed in range(12)}
    assert shown == set(range(1, 1 + MOST_HOPS))


@pytest.mark.parametrize("task", TASKS)
def test_the_question_begins_where_it_says(task: str) -> None:
    tokenizer = Characters()
    for chat in (False, True):
        example = build(task, tokenizer, 2048, 50, seed=0, chat=chat)
        puzzle = TASKS[task].puzzle(random.Random(f"{task} 2048 50 0"), 0.5)
        question = tokenizer.decode(example.tokens[example.question_at :])
        assert question.startswith(puzzle.question)
        assert question.endswith(puzzle.lead)


def test_chat_puts_the_text_into_the_template() -> None:
    tokenizer = Characters()
    text = text_of(tokenizer, build("needle", tokenizer, 2048, 50, 0, chat=True))
    assert text.startswith("<user>A special magic number is hidden")
    assert "?</user><assistant>The special magic number for " in text
    assert "<user>" not in text_of(tokenizer, build("needle", tokenizer, 2048, 50, 0))


def test_a_first_token_comes_once_and_not_with_a_template() -> None:
    words = Words()
    example = build("needle", words, 2048, 50, 0)
    assert example.tokens[0] == 0 and 0 not in example.tokens[1:]


def test_a_template_that_loses_the_words_is_refused() -> None:
    class Deaf(Characters):
        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            return "<user></user>"

    class Failing(Characters):
        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            raise TypeError("no roles")

    with pytest.raises(ConfigError, match="leaves out"):
        build("needle", Deaf(), 2048, 50, 0, chat=True)
    with pytest.raises(ConfigError, match="no roles"):
        build("needle", Failing(), 2048, 50, 0, chat=True)


def test_too_few_tokens_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"100 tokens are too few: the question takes \d+"):
        build("records", Characters(), 100, 50, 0)


def test_keys_do_not_run_out() -> None:
    text = prompts._Prompt(TASKS["kv"].puzzle(random.Random(0), 0.5), Characters(), None)
    pieces = text._pieces_of(60_000)
    keys = [line.partition(":")[0] for line in text._pieces]
    assert pieces > len(vocabulary())
    assert len(set(keys)) == len(keys)


# The text


def test_sentences_are_plain_and_come_once() -> None:
    found = sentences()
    assert len(found) > 200 and len(set(found)) == len(found)
    assert all(c.isalpha() or c in " ,;'-." for sentence in found for c in sentence)
    assert not any(c.isdigit() for sentence in found for c in sentence)


def test_prose_goes_through_all_sentences_before_it_repeats_one() -> None:
    stream, size = prose(random.Random(0)), len(sentences())
    first = [next(stream) for _ in range(size)]
    second = [next(stream) for _ in range(size)]
    assert first != second and set(first) == set(second) == set(sentences())


def test_word_lists_have_no_word_twice() -> None:
    for words in (NAMES, ADJECTIVES, NOUNS, vocabulary()):
        assert len(set(words)) == len(words) > RECORDS


# Scores


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (" 48213.", 1),
        ("48213", 1),
        ("\n\n the number is 48213\nor 1", 1),
        (" 4821.", 0),
        (" 482133", 0),
        (" 148213", 0),
        (" 48,213", 0),
        (" 48231", 0),
        (" 10000\n48213", 0),
        (" 10000. 48213", 0),
        ("", 0),
    ],
)
def test_a_number_is_right_if_it_is_there_as_a_whole_in_the_first_sentence(
    text: str, score: float
) -> None:
    assert Contains(("48213",)).score(text) == score


def test_words_are_right_as_whole_words_in_whatever_case() -> None:
    judge = Contains(("apple",))
    assert judge.score(" Apple, I think") == 1
    assert judge.score(" pineapple") == judge.score(" apples") == 0


def test_of_several_answers_the_share_counts() -> None:
    judge = Contains(("otter", "48213"))
    assert judge.score(" VAR otter, VAR otter = 48213.") == 1
    assert judge.score(" VAR otter, VAR otter = 48214.") == judge.score(" 48213") == 0.5
    assert judge.score(" VAR kettle = 1") == 0


def test_an_answer_is_finished_with_its_sentence() -> None:
    judge = Contains(("apple",))
    assert not judge.finished("\n apple")
    assert judge.finished("\n apple\n") and judge.finished(" apple.")


RECORD = Records((("Ann", 11111), ("Bob", 22222), ("Cid", 33333)), ("name", "code"), '{"name": "')


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('Ann", "code": 11111}\n{"name": "Bob", "code": 22222}\n{"name": "Cid", "code": 33333}', 3),
        ('Cid", "code": 33333}\n{"name": "Ann", "code": "11111"}', 2),
        ('Ann", "code": 11111},\n{"name": "Bob", "code": 22223}', 1),
        ('Ann", "code": 11112}\n{"name": "Ann", "code": 11111}', 0),
        ('Ann", "code": 11111}\n{"name": "Ann", "code": 11111}', 1),
        ('Dan", "code": 11111}\nBob 22222', 0),
        ('Ann", "code": 11111\n{"name": "Bob"}\n["Cid", 33333]', 0),
        ('Eve", "code": 1}\n{}\n\n{"name": "Ann", "code": 11111}', 0),
        ('Ann", "code": null}', 0),
        (
            'Ann", "code": 11111} {"name": "Bob", "code": 22222}\n{"name": "Cid", "code": 33333} {',
            2,
        ),
        ("", 0),
    ],
)
def test_records_are_scored_by_the_share_that_is_right(text: str, right: int) -> None:
    assert RECORD.score(text) == pytest.approx(right / 3)


def test_records_are_finished_after_as_many_lines_or_an_empty_one() -> None:
    line = 'Ann", "code": 11111}\n'
    assert not RECORD.finished(line)
    assert not RECORD.finished(2 * line + '{"name"')
    assert RECORD.finished(3 * line)
    assert RECORD.finished(line + "\n{")


def test_what_follows_the_end_does_not_change_a_score() -> None:
    text = 'Ann", "code": 11111}\n{"name": "Bob", "code": 1}\n{}\n'
    assert RECORD.finished(text)
    assert RECORD.score(text) == RECORD.score(text + '{"name": "Cid", "code": 33333}') > 0


def test_the_mean_of_nothing_is_nothing() -> None:
    assert mean([]) == 0 and mean([1, 0.5]) == 0.75

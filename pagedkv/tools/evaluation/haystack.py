"""Text that retrieval tasks hide things in: plain sentences of Python's manual, and word lists.

The manual is the built-in text `texts.ENGLISH`. It differs between Python versions, so the same
seed gives the same text on the same version only.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from functools import lru_cache

from pagedkv.tools.evaluation.texts import ENGLISH, built_in_text

_SENTENCE = re.compile(r"[A-Z][A-Za-z ,;'-]+[a-z]\.")
_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_MARKUP = (" " * 4, "*", "+", "|", "[", ".")
_SHORTEST, _LONGEST = 8, 40  # words


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Alice Bruno Clara David Elena Felix Grace Henry Irene Jacob Karen Louis Maria Nancy Oscar"
    " Paula Quinn Roger Sarah Tomas Ursula Victor Wendy Xavier Yvonne Zoe"
)
ADJECTIVES = _words(
    "amber blue brave bright calm clever cold dark deep dry early fast fresh gentle golden grand"
    " green happy heavy hollow honest huge kind large late light little lively loud lucky mild"
    " narrow noble old pale plain proud quick quiet rapid red rich royal sharp short silent silver"
    " simple slow small smooth soft solid steep strong sweet tall tiny warm white wide wild wise"
)
NOUNS = _words(
    "anchor apple arrow basket beacon bell bottle branch bridge button candle canyon castle cloud"
    " comet copper desert engine falcon feather forest garden glacier hammer harbor island jacket"
    " kettle ladder lantern lemon marble meadow mirror mountain needle ocean orchard otter paper"
    " pebble pencil pepper piano pillow planet pocket rabbit ribbon river rocket saddle shadow"
    " spider station sugar tiger tunnel valley violin wagon walnut window winter wolf"
)


@lru_cache(maxsize=1)
def sentences() -> tuple[str, ...]:
    """Every plain English sentence of the manual, once each, in order: letters and commas only."""
    found: dict[str, None] = {}
    for paragraph in built_in_text(ENGLISH).split("\n\n"):
        if paragraph.lstrip("\n").startswith(_MARKUP):
            continue
        text = " ".join(paragraph.replace("\u2019", "'").split())
        for sentence in _END.split(text):
            words = len(sentence.split())
            if _SENTENCE.fullmatch(sentence) and _SHORTEST <= words <= _LONGEST:
                found[sentence] = None
    return tuple(found)


def digest() -> str:
    """Names the text that this Python has, as 16 hex digits: results of another are of others."""
    return hashlib.sha256("\n".join(sentences()).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """The words of those sentences: small letters, four to nine of them, once each, sorted."""
    words = {word for sentence in sentences() for word in re.findall(r"\b[a-z]{4,9}\b", sentence)}
    return tuple(sorted(words))


def prose(rng: random.Random) -> Iterator[str]:
    """Sentences in an order that `rng` decides, without end; none comes twice in a round."""
    order = list(sentences())
    while True:
        rng.shuffle(order)
        yield from order

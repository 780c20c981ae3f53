"""The demo's long document, from Python's own manual, and the question about it.

The document is taken from ``pydoc_data.topics``, which every CPython carries, so the demo needs
no other download. A model of 135 million parameters does not answer questions about a reference
manual of 6,000 tokens reliably, but it finds a sentence that the question repeats. So a note that
has nothing to do with the manual is put into its first third, and the question asks for that.
"""

import itertools
from collections.abc import Callable, Iterator

DEMO_ANSWER = "bluebird"
DEMO_NOTE = f'Note: the password of the printer in the library is "{DEMO_ANSWER}".'
DEMO_QUESTION = "Question: What is the password of the printer in the library?"

# First the topics whose text is the same in Python 3.10 to 3.13: some 9,000 tokens.
_STABLE_TOPICS = (
    "integers global assert with comparisons import booleans break in exceptions context-managers"
    " slicings id-classes lambda return unary del while continue typesmodules yield"
)


def demo_document(tokens_at_least: int, count: Callable[[str], int]) -> str:
    """Assemble the document: whole paragraphs of the manual, the note after a quarter of them.

    Args:
        tokens_at_least: The document has this many tokens and the rest of a paragraph. The chat
            template and the question come on top (some 50 tokens).
        count: Returns the number of tokens of a text.

    Returns:
        The same text for the same arguments and the same Python version.
    """
    parts: list[str] = []
    place = total = 0
    manual = _paragraphs()
    while total < tokens_at_least:
        if total < tokens_at_least / 4:
            place = len(parts) + 1
        parts.append(next(manual))
        total += count(parts[-1] + "\n\n")
    parts.insert(place, DEMO_NOTE)
    while count("\n\n".join(parts)) < tokens_at_least:  # joined, they may need fewer tokens
        parts.append(next(manual))
    return "\n\n".join(parts)


def _paragraphs() -> Iterator[str]:
    """Yield the paragraphs of the manual, the stable topics first, without end."""
    from pydoc_data.topics import topics  # half a megabyte: only for the demo

    names = [name for name in _STABLE_TOPICS.split() if name in topics]
    names += sorted(topics.keys() - set(names))
    return itertools.cycle("\n\n".join(topics[name].strip("\n") for name in names).split("\n\n"))

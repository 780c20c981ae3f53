"""Tokenizers and a model for tests of retrieval that need no weights."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

TEMPLATE = "<user>{}</user><assistant>"


class Characters:
    """A token per character: printable ASCII and the line feed, 96 in all; and one that ends."""

    eos_token_ids = frozenset({96})
    has_chat_template = True

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [95 if c == "\n" else ord(c) - 32 for c in text]

    def decode(self, ids: Any) -> str:
        return "".join("\n" if i == 95 else chr(i + 32) for i in map(int, ids))

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return TEMPLATE.format(messages[0]["content"])


class Uneven(Characters):
    """Every hundredth character is two tokens: a text has more than its pieces one by one."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = super().encode(text, add_special_tokens)
        return [
            i for at, one in enumerate(ids, 1) for i in ([one, one] if at % 100 == 0 else [one])
        ]


class Words:
    """A token per word and mark, with the blank before it; two line feeds are one; and a first."""

    eos_token_id = 0

    def __init__(self) -> None:
        self.known: list[str] = ["<s>"]
        self._ids: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [0] if add_special_tokens else []
        for part in re.findall(r" ?\w+|\n+|[^\w\n]", text):
            if part not in self._ids:
                self._ids[part] = len(self.known)
                self.known.append(part)
            ids.append(self._ids[part])
        return ids

    def decode(self, ids: Any) -> str:
        return "".join(self.known[int(i)] for i in ids)


class Looker(nn.Module):
    """Answers the needle task if, and only if, its cache gives the needle back.

    A token is one number in its key, so what the cache drops or rounds is gone. It speaks
    `Characters`.
    """

    asked = re.compile(r"The special magic number for ([a-z]+ [a-z]+) is(?: (\d*))?$")

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(1, 1)]
        self.tokenizer = Characters()
        self.calls: list[int] = []

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        self.calls.append(tokens.shape[1])
        keys = mx.zeros((1, 1, tokens.shape[1], 64), mx.float32)
        keys[0, 0, :, 0] = tokens[0].astype(mx.float32)
        seen, _ = cache[0].update_and_fetch(keys, keys)
        ids = np.rint(np.array(seen[0, 0, :, 0].astype(mx.float32))).clip(0, 95)
        logits = np.zeros((1, tokens.shape[1], 97), np.float32)
        logits[0, -1, self._next(self.tokenizer.decode(ids))] = 1
        return mx.array(logits)

    def _next(self, text: str) -> int:
        question = self.asked.search(text)
        if question is None:
            return 95
        name, written = question[1], question[2]
        needle = re.search(rf"number for {name} is (\d{{5}})\.", text[: question.start()])
        answer = f" {needle[1] if needle else '00000'}\n"
        return self.tokenizer.encode(answer)[0 if written is None else 1 + len(written)]

"""Text that a model writes itself: what its attention is like, without a tokenizer and a user.

A decision that is taken once for all prompts must not hang on the one that happens to come first.
Tokens that the model draws from its own predictions are as likely to it as a text can be, and every
process that asks gets the same.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from pagedkv.integrations.mlx_lm.model_info import (
    context_limit,
    logits_of,
    sharing_group,
    stock_maker,
)
from pagedkv.integrations.mlx_lm.probe import vocabulary_of
from pagedkv.integrations.mlx_lm.recording import require_readable

ROWS, LENGTH = 32, 48
"""Texts that are written at the same time, and tokens of each. On SmolLM2-135M longer texts are no
better, and fewer tokens a little worse."""

SHOWN = 20
"""Of the texts, those that treatments are made from; the others show how well they do."""


def own_texts(model: Any) -> tuple[list[list[int]], list[int]]:
    """What a model writes after random tokens, drawn from its predictions as they are.

    Of one that takes no batches, random tokens: they do nearly as well.

    Args:
        model: of mlx-lm; its global random state is not touched.

    Returns:
        Ids to make treatments from, in pieces that the model can read, and one piece of others to
        judge them by. The same every time, as far as the device computes the same.

    Raises:
        ConfigError: if other processes have some of its layers.
    """
    require_readable(model)
    vocabulary = vocabulary_of(model)
    try:
        tokens = mx.concatenate(_written(model, vocabulary), axis=1)
    except Exception:  # whatever models raise that take no batches: random text is better than none
        tokens = mx.random.randint(0, vocabulary, (ROWS, LENGTH), key=mx.random.key(1))
    if (group := sharing_group(model)) is not None:  # all read what the first one wrote
        tokens = mx.distributed.all_sum(tokens * int(group.rank() == 0), group=group)
    rows = np.asarray(tokens)
    shown, held = rows[:SHOWN].reshape(-1).tolist(), rows[SHOWN:].reshape(-1).tolist()
    most = context_limit(model) or rows.size
    return [shown[at : at + most] for at in range(0, len(shown), most)], held[:most]


def _written(model: Any, vocabulary: int) -> list[mx.array]:
    """Columns of ids ``[rows, 1]``, one per token."""
    caches, key = stock_maker(model)(), mx.random.key(0)
    columns = [mx.random.randint(0, vocabulary, (ROWS, 1), key=mx.random.key(1))]
    for _ in range(LENGTH - 1):
        logits = logits_of(model(columns[-1], cache=caches))[:, -1].astype(mx.float32)
        key, now = mx.random.split(key)
        columns.append(mx.random.categorical(logits, key=now)[:, None].astype(mx.int32))
        mx.async_eval(columns[-1])  # type: ignore[no-untyped-call]
    mx.eval(columns)
    return columns

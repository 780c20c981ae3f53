"""Which layers of a model look things up: rounding matters most there, so they get more bits.

What a long context is asked for is found by a few attention heads, and an answer that pages change
is changed in their layers (`docs/design.md`, "What a fact hangs on"). They show when a model reads
the same tokens twice: in the second reading they attend to the first. RazorAttention
(arXiv:2407.15891) finds heads that retrieve by such echoes; induction heads are those of Olsson et
al. (arXiv:2209.11895). Random tokens do, so no text and no tokenizer is needed; what a layer
attends to when it reads other tokens instead is taken off.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from pagedkv.config.tier_config import lookup_count
from pagedkv.integrations.mlx_lm.model_info import sharing_group
from pagedkv.integrations.mlx_lm.model_notes import keep_note, note_path, read_note
from pagedkv.integrations.mlx_lm.probe import vocabulary_of
from pagedkv.integrations.mlx_lm.recording import CHUNK, Stream, measure

LEAST_ECHO = 0.01
"""Sum of p² that a query head spends on the first reading, on average, in a layer that counts: the
seventh layer of SmolLM2 has 0.011, the sixth of Qwen2.5-Coder-0.5B 0.06, most next to nothing."""

RULES = 1
"""Counted up when the same model would be heard otherwise."""

_ECHOES = "_pagedkv_echoes"


def lookup_layers(model: Any, candidates: Collection[int], fingerprint: str) -> tuple[int, ...]:
    """The layers that look most up, one in four (`lookup_count`), none that does not.

    The model reads 1,024 tokens the first time that it is asked for on this machine.

    Args:
        model: of mlx-lm.
        candidates: numbers of layers that see the whole context.
        fingerprint: of the model.

    Returns:
        Their numbers, in order; none if the model cannot be looked at.
    """
    if not (count := lookup_count(len(candidates))):
        return ()
    known = getattr(model, "__dict__", {}).get(_ECHOES)
    path = note_path(fingerprint, f"echoes-{RULES}.json")
    found = _kept(path) if known is None or known[0] != fingerprint else known[1]
    if must_look(model, found is None):
        try:
            found = echoes(model)
        except Exception as e:  # whatever an unknown model raises that takes other inputs
            warnings.warn(
                f"{type(model).__name__} did not read random tokens ({type(e).__name__}: {e}): all "
                f"its layers have the same precision, as with layer_kv='same'",
                stacklevel=4,
            )
            return ()
        finally:
            mx.clear_cache()
        keep_note(path, json.dumps(found).encode())
    assert found is not None
    object.__setattr__(model, _ECHOES, (fingerprint, found))
    heard = {n: echo for n, echo in found.items() if n in candidates and echo >= LEAST_ECHO}
    return tuple(sorted(sorted(heard, key=lambda n: (-heard[n], n))[:count]))


def _kept(path: Path | None) -> dict[int, float] | None:
    """What an earlier process heard; None if there was none, or the file is damaged."""
    try:
        told = json.loads(read_note(path) or b"null")
        return None if told is None else {int(n): float(echo) for n, echo in told.items()}
    except (ValueError, AttributeError, TypeError, RecursionError):
        return None


def must_look(model: Any, unknown: bool) -> bool:
    """Whether the model has to read tokens for `lookup_layers`.

    Processes that share its layers can only read together, so all do if one has to.

    Args:
        model: of mlx-lm.
        unknown: whether this process does not know the layers yet.
    """
    if (group := sharing_group(model)) is None:
        return unknown
    return bool(mx.distributed.all_sum(mx.array(int(unknown)), group=group).item())


def echoes(model: Any) -> dict[int, float]:
    """What layers look up in tokens that they read before, beyond what they do in other tokens.

    Args:
        model: of mlx-lm, wrapped or not.

    Returns:
        By layer number, the mean over query heads and queries of the sum of p² over tokens, that
        is what an error of a token counts (`Covariances.add_queries`): where the same random tokens
        come twice, less where other ones come after them.

    Raises:
        ConfigError: if no layer's queries can be seen.
    """
    random = np.random.default_rng(0)
    ids, others = random.integers(0, vocabulary_of(model), (2, CHUNK)).tolist()
    same, other = (_second_half(model, ids + second) for second in (ids, others))
    found = {number: same[number] - other[number] for number in same}
    if (group := sharing_group(model)) is not None:  # each has seen its own heads
        total: Any = mx.distributed.all_sum(mx.array(list(found.values())), group=group).tolist()
        found = {n: echo / group.size() for n, echo in zip(found, total, strict=True)}
    return found


def _second_half(model: Any, ids: list[int]) -> dict[int, float]:
    """What layers look up while they read the second half of two chunks."""
    streams: dict[int, Stream] = {}
    before: dict[int, float] = {}

    def note(done: int, _: int) -> None:
        if done == CHUNK:
            before.update({number: _looked_up(stream) for number, stream in streams.items()})

    found = measure(model, [ids], note, streams, CHUNK)
    return {number: _looked_up(stream) - before[number] for number, stream in found.items()}


def _looked_up(stream: Stream) -> float:
    return 0.0 if stream.shape is None else float(stream.seen.attention.mean()) / CHUNK

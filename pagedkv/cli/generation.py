"""Runs mlx-lm's generator on a paged cache, and notes what happened when."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from pagedkv.cache.paged_cache import PagedCache
from pagedkv.cache.stats import CacheStats
from pagedkv.cli.loading import has_gpu
from pagedkv.cli.output import Progress
from pagedkv.config.tier_config import TierConfig


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: at most.
        temp: temperature; 0 is greedy.
        top_p: nucleus; 1 is off.
        seed: of the sampler.
        prefill_step_size: tokens per prefill chunk; None takes what suits the device.
    """

    max_tokens: int
    temp: float
    top_p: float
    seed: int
    prefill_step_size: int | None


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: of the answer.
        token_ids: of the answer.
        prompt_tokens: tokens read.
        cached_tokens: tokens that the cache already held.
        tokens: tokens generated, the one that ends the answer included.
        finish_reason: ``"stop"`` or ``"length"``.
        prefill_seconds: for all of the prompt but its last token.
        decode_seconds: for everything after that.
        before: the cache when the prompt was read.
        after: the cache at the end.
        config: its tiers.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    finish_reason: str
    prefill_seconds: float
    decode_seconds: float
    before: CacheStats
    after: CacheStats
    config: TierConfig

    @property
    def decode_steps(self) -> int:
        """Single-token steps: one more than the tokens that came of them."""
        return max(1, self.after.tokens - self.before.tokens)

    @property
    def decode_bytes(self) -> int:
        """Bytes read from disk in those steps."""
        return self.after.nvme_bytes_read - self.before.nvme_bytes_read


class _Clock:
    """Notes the moment, and the cache's numbers, when the prompt but its last token is read.

    What follows are single-token steps: the prompt's last token gives the first new one.
    """

    def __init__(self, cache: PagedCache, quiet: bool) -> None:
        self._cache, self._quiet = cache, quiet
        self._progress: Progress | None = None
        self.started = self.read = time.perf_counter()
        self.before: CacheStats | None = None

    def __call__(self, done: int, total: int) -> None:
        """mlx-lm's ``prompt_progress_callback``; it is called once more when text comes."""
        if self.before is not None:
            return
        if self._progress is None:
            self._progress = Progress("reading the prompt", total, quiet=self._quiet)
        self._progress.update(done)
        if done >= total - 1:
            self.close()
            self.read, self.before = time.perf_counter(), self._cache.stats()

    def close(self) -> None:
        """Wipe the progress line away."""
        if self._progress is not None:
            self._progress.close()


def generate(
    model: Any,
    tokenizer: Any,
    cache: PagedCache,
    prompt: list[int],
    sampling: Sampling,
    stream: bool,
    quiet: bool,
) -> Generation:
    """Generate an answer.

    Args:
        model: of mlx-lm.
        tokenizer: of the model.
        cache: of the model, holding what came before.
        prompt: tokens; at least one.
        sampling: how to choose.
        stream: print the text as it comes.
        quiet: show no progress.
    """
    held, clock, parts, ids = cache.offset, _Clock(cache, quiet), [], []
    response: Any = None
    try:
        for response in _responses(model, tokenizer, cache, prompt, sampling, clock):
            parts.append(response.text)
            ids.append(int(response.token))
            if stream:
                print(response.text, end="", flush=True)
    finally:
        clock.close()
        if stream and parts:
            print(flush=True)  # whatever comes next, an error too, begins a line
    assert response is not None and clock.before is not None  # max_tokens is at least 1
    return Generation(
        text="".join(parts),
        token_ids=tuple(ids),
        prompt_tokens=len(prompt),
        cached_tokens=held,
        tokens=int(response.generation_tokens),
        finish_reason=str(response.finish_reason),
        prefill_seconds=clock.read - clock.started,
        decode_seconds=time.perf_counter() - clock.read,
        before=clock.before,
        after=cache.stats(),
        config=cache.context.config,
    )


def _responses(
    model: Any,
    tokenizer: Any,
    cache: PagedCache,
    prompt: list[int],
    sampling: Sampling,
    clock: _Clock,
) -> Iterator[Any]:
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(sampling.seed)
    responses: Iterator[Any] = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=sampling.max_tokens,
        sampler=make_sampler(sampling.temp, sampling.top_p),
        prompt_cache=cache,
        prefill_step_size=sampling.prefill_step_size or (2048 if has_gpu() else 512),
        prompt_progress_callback=clock,
    )
    return responses

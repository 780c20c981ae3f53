"""The prompts that a server keeps for reuse: in memory as mlx-lm keeps them, and over restarts."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache

from pagedkv.cache import prefix_reuse as prefixes
from pagedkv.cache.paged_cache import PagedCache
from pagedkv.cache.persistence import store as sequences
from pagedkv.errors import PagedKVError
from pagedkv.integrations.mlx_lm.wrapping import wrapping_of


class Salted(list[Any]):
    """A sequence's caches, and what it is kept apart by.

    Attributes:
        salt: sequences with another one share nothing with it.
    """

    def __init__(self, caches: Iterable[Any], salt: str) -> None:
        """Make a list of the same caches."""
        super().__init__(caches)
        self.salt = salt


class KeptPrompts(LRUPromptCache):  # type: ignore[misc]
    """mlx-lm's prompt caches; with a ``cold_dir`` also what an earlier server left there.

    Everything here happens on the thread that calls MLX.

    Attributes:
        model: gives the model that is loaded now; None if none is.
        salt: of the request under way: what other salts have is not found, nor shared.
    """

    def __init__(self, max_size: int = 10) -> None:
        """Make an empty one.

        Args:
            max_size: sequences, in memory and on disk.
        """
        super().__init__(max_size)
        self.model: Callable[[], Any] = lambda: None
        self.salt = ""

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **options: Any
    ) -> None:
        """Keep a sequence's caches, in a list that nobody else holds.

        See `LRUPromptCache.insert_cache`.
        """
        salt = prompt_cache.salt if isinstance(prompt_cache, Salted) else self.salt
        super().insert_cache((model, salt), tokens, list(prompt_cache), **options)

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """A cache with the longest known beginning of a prompt, and the tokens it lacks.

        At least one is left to be computed, for its logits. Processes that share a model use what
        all of them have, or nothing: what one gave up for room another may still keep.

        See `LRUPromptCache.fetch_nearest_cache`.
        """
        cache, rest = self._nearest(model, tokens)
        group = mx.distributed.init()
        if group.size() > 1:
            lacking: Any = mx.distributed.all_gather(mx.array([len(rest)])).tolist()
            if min(lacking) != max(lacking):
                return None, tokens
        return cache, rest

    def _nearest(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        cache, rest = super().fetch_nearest_cache((model, self.salt), tokens)
        if not rest and cache is not None:  # this very sequence was kept
            if not can_trim_prompt_cache(cache):
                return None, tokens
            trim_prompt_cache(cache, 1)
            rest = tokens[-1:]
        wrapping = wrapping_of(self.model())
        if wrapping is None or wrapping.pager.identity is None:
            return cache, rest
        stored = wrapping.make_cache()
        try:
            reused = stored.reuse(tokens, salt=self.salt)
        except PagedKVError as e:
            logging.warning(f"Prompts kept on disk cannot be used: {e}")
            reused = 0
        if reused > len(tokens) - len(rest):
            return list(stored), tokens[reused:]
        stored.close()
        return cache, rest

    def flush(self, seconds: float = math.inf) -> int:
        """Leave what is kept in ``cold_dir``, the one used last first, as far as there is room.

        It takes the place of what an earlier server left there, but for what fits beside it.

        Args:
            seconds: none is begun after so long.

        Returns:
            How many sequences were written.
        """
        wrapping = wrapping_of(self.model())
        if wrapping is None or wrapping.pager.identity is None:
            return 0
        written: list[PagedCache] = []
        end = time.monotonic() + seconds
        for salt, tokens, layers in self._latest_first():
            if time.monotonic() > end:
                logging.warning("Not all prompts are kept on disk: there was no time for more")
                break
            cache = PagedCache.of(layers)
            try:
                if prefixes.note(cache, tokens, salt):
                    sequences.flush(cache, None, spare=True)
                    written.append(cache)
            except PagedKVError as e:
                logging.warning(f"A prompt of {len(tokens):,} tokens is not kept on disk: {e}")
                break
        if written:
            self._discard_older(written)
        return len(written)

    def _latest_first(self) -> Iterator[tuple[str, list[int], list[Any]]]:
        kinds = [self._lru._lrus[kind] for kind in self._lru._ordering]
        for lru in kinds:  # each has the one used longest ago first
            for model, tokens in reversed(lru):
                yield model[1], tokens, self._trie.get(model, tokens).prompt_cache

    def _discard_older(self, written: list[PagedCache]) -> None:
        """Of those of earlier servers, keep what no other one has, and as many as there may be."""
        store = sequences.store_of(written[0])
        chains = {digest.hex() for cache in written for digest in cache.context.prefix}
        mine = {cache.context.sequence_id for cache in written}
        room = self.max_size - len(mine)
        for stored in store.checkpoints.stored():
            if not stored.spare or stored.sequence in mine:
                continue  # a user's, for `resume`
            if room > 0 and not chains.issuperset(stored.prefix[-1:]):
                room -= 1
            else:
                written[0].discard(stored.sequence)

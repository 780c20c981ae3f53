"""The list of layer caches that a model takes as its prompt cache, and `attention`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from pagedkv.attn.driver import check_queries
from pagedkv.cache import prefix_reuse as prefixes
from pagedkv.cache.batch_cache import BatchPagedLayerCache
from pagedkv.cache.nested import streams
from pagedkv.cache.persistence import snapshot as state
from pagedkv.cache.persistence import store as sequences
from pagedkv.cache.stats import CacheStats, collect, rows_of
from pagedkv.config.sizes import shown, whole_number
from pagedkv.config.tier_config import KEPT_TOKENS, TierConfig, names_file, require_config
from pagedkv.errors import ConfigError
from pagedkv.sequence.layer import PagedLayerCache
from pagedkv.sequence.sequence import SequenceContext
from pagedkv.sequence.window import WindowedLayerCache
from pagedkv.tiers import Pager, StoredSequence
from pagedkv.tiers.codec.transform import ROTATIONS
from pagedkv.tiers.turn import Turn, exclusive


class PagedCache(list[Any]):
    """What `pagedkv.wrap` returns and mlx-lm takes as ``prompt_cache=``: one cache per layer.

    Layers whose kind is not paged hold mlx-lm's own caches, and layers with several caches a
    `CacheList` of mlx-lm's with ours inside. Use it as a context manager, or call
    `close`, to give memory, threads and files back at once.
    """

    def __init__(self, layers: Sequence[Any], context: SequenceContext) -> None:
        super().__init__(layers)
        self.context = context
        context.others = tuple(c for c in streams(self) if not isinstance(c, PagedLayerCache))

    @classmethod
    def standalone(
        cls, layers: int, config: TierConfig | None = None, *, model: str = ""
    ) -> PagedCache:
        """A cache for a hand-written model, used with `pagedkv.attention`.

        Args:
            layers: attention layers in the model.
            config: tiers; the default if None.
            model: a name for the model and its weights, under which sequences are flushed to
                ``cold_dir`` and found again; without one they cannot be.
        """
        config = require_config(config)
        layers = whole_number(layers, "the number of layers")
        if not isinstance(model, str):
            raise ConfigError(f"model is a name as text, got {shown(model)}")
        if names_file(config.treatment):
            raise ConfigError(
                f"treatment={config.treatment!r}: a calibration belongs to a model that is "
                f"wrapped, and this cache is for a hand-written one"
            )
        config.require_layers(range(layers))
        rotation = config.treatment if config.treatment in ROTATIONS else ""
        identity = config.store_identity(model, layers, rotation)
        pager = Pager(config.budget(), layers, identity=identity, rotation=rotation)
        context = SequenceContext(config, pager, fingerprint=model)
        if pager.has_cold:
            pager.cold  # noqa: B018  # a bad directory shows here and not in the middle of a text
        return cls([_bounded_or_not(context, i) for i in range(layers)], context)

    @classmethod
    def of(cls, layers: Sequence[Any]) -> PagedCache:
        """The list around layer caches that mlx-lm keeps in one of its own, for `stats`.

        Args:
            layers: of one sequence, or of a batch, such as a batch generator's.

        Raises:
            ConfigError: if none of them is paged.
        """
        some = next(rows_of(layers), None)
        if some is None:
            raise ConfigError(f"none of these {len(layers)} caches is paged")
        return cls(layers, some._context)

    @property
    def _turn(self) -> Turn:
        return self.context.pager.turn

    @property
    def paged_layers(self) -> list[PagedLayerCache]:
        """The paged streams in order: one per paged layer, or several where layers nest them."""
        return [cache for cache in streams(self) if isinstance(cache, PagedLayerCache)]

    @property
    def is_fully_paged(self) -> bool:
        """Whether every stream of every layer is paged."""
        return all(isinstance(cache, PagedLayerCache) for cache in streams(self))

    @property
    def offset(self) -> int:
        """Tokens held."""
        return max((cache.offset for cache in rows_of(self)), default=0)

    @exclusive
    def trim(self, n: int) -> int:
        """Forget the last n tokens in every layer.

        Returns:
            How many that were: 0 if a layer cannot forget so many. A layer with a window can as
            long as it dropped nothing, or what queries see then is still there: 16 tokens always.

        Raises:
            ConfigError: if n is no number of tokens.
        """
        n = whole_number(n, "the tokens to trim")
        # From a call that was broken off some layers are behind: all go to the same length.
        counts = [max(0, n - self._lag(cache)) for cache in self]
        if not all(_can_trim(cache, count) for cache, count in zip(self, counts, strict=True)):
            return 0
        return max((c.trim(m) for c, m in zip(self, counts, strict=True) if m > 0), default=0)

    def _lag(self, cache: Any) -> int:
        """Tokens that a layer lacks."""
        together = isinstance(cache, PagedLayerCache) and cache.in_step and cache.offset
        return self.offset - cache.offset if together else 0

    @exclusive
    def fork(self) -> PagedCache:
        """A second sequence with the same tokens, sharing every sealed page.

        It uses the same budgets. Close both: threads and files go with the last cache that
        shares them.
        """
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        # Layers may come from several models: mlx-lm appends a draft model's cache to this list.
        contexts = {id(c._context): c._context for c in self.paged_layers}
        contexts[id(self.context)] = self.context
        try:
            for key, context in contexts.items():
                if key not in memo:
                    memo[key] = context.fork()
            layers = [copy.deepcopy(cache, memo) for cache in self]
            return PagedCache(layers, memo[id(self.context)])
        except BaseException:
            for context in (memo[key] for key in contexts if key in memo):
                for cache in context.alive():
                    cache.close()
            raise

    @exclusive
    def stats(self) -> CacheStats:
        """Tokens, pages and bytes per tier, traffic and waiting times, as of now."""
        return collect(self)

    @exclusive
    def save(self, path: str) -> None:
        """Write the cache to a file that `pagedkv.load` and mlx-lm's loader read.

        Pages are copied one at a time, wherever they are, so a cache larger than memory can be
        saved. The file appears under its name only when it is complete.

        Args:
            path: of the ``.safetensors`` file; through a link, of the one that this names.

        Raises:
            OSError: if it cannot be written.
            ConfigError: if the path is that of something else than a file.
            ClosedError: after `close`.
            CacheStateError: if a layer is not paged, a call of the model is under way, or its
                weights were exchanged after it was wrapped.
        """
        state.save(path, self)

    @exclusive
    def flush(self, durability: str | None = None) -> StoredSequence:
        """Put everything as it is now on disk, so that `resume` finds it after a restart.

        Takes the place of this sequence's last flush in one step: whatever happens meanwhile,
        there is the one or the other. What comes later is not on disk until the next flush.
        Pages that were written before are not written again.

        Args:
            durability: ``"process"`` survives that the process is killed, ``"power"`` also that
                the machine stops (slower: it waits for the disk); the config's if None.

        Returns:
            What was put there. Its `sequence` names it.

        Raises:
            ConfigError: if the cache has no ``cold_dir``.
            CacheStateError: if a layer is not paged, a call of the model is under way, or its
                weights were exchanged after it was wrapped.
            OutOfPagesError: if the cold budget does not hold it.
            ColdStoreError: if the disk failed. The last flush is still there.
        """
        return sequences.flush(self, durability)

    @exclusive
    def resume(self, sequence: str | None = None) -> None:
        """Fill this empty cache with what `flush` put on disk; `pagedkv.resume` for models.

        Args:
            sequence: its name; the one that was flushed last if None.

        Raises:
            SequenceNotFoundError: if there is none.
            CacheStateError: if the cache is not empty, or the model's weights were exchanged after
                it was wrapped.
            StoreMismatchError: if it is another model's, or was made with other settings.
            CorruptStoreError, CorruptPageError: if it is damaged.
            StoreLockedError: if another cache holds it.
            ColdStoreError: if the disk failed.
        """
        sequences.resume(self, sequence)

    @exclusive
    def remember(self, tokens: Sequence[int] | mx.array, salt: str = "") -> int:
        """Keep what this cache holds for sequences that begin with the same tokens.

        Its sealed pages are shared with a cache that `reuse`s them, and stay, within the budgets,
        when this one is closed; the ones used longest ago are given up when room is wanted. What
        `flush` writes from now on can be reused by other processes.

        Args:
            tokens: ids of the tokens that the cache holds, from the first one on. They must be
                all that decides what it holds: where images or other inputs do too, use a
                ``salt`` for each or do not call this.
            salt: sequences with another one share nothing with this; beside ``prefix_salt``.

        Returns:
            Tokens that can be reused: the sinks and whole pages; 0 if there is no page, or the
            model has layers that keep something else than pages (`CacheStats.prefix_reuse`).

        Raises:
            ConfigError: if they are no token ids.
        """
        return prefixes.remember(self, tokens, salt)

    @exclusive
    def reuse(self, tokens: Sequence[int] | mx.array, salt: str = "") -> int:
        """Fill this empty cache with the beginning of a prompt, if it is known.

        Looked for are sequences that were remembered while the model is wrapped, and with a
        ``cold_dir`` those that were flushed there, by this process or another, under the same
        model, precisions and ``prefix_salt``. Pages are shared, not copied, and read from disk only
        where that is quicker than computing them, by the rates measured. The last ``hot_tokens`` of
        the prompt are never taken over: they are 16 bit, as if nothing had been reused.

        Args:
            tokens: ids of the whole prompt.
            salt: what they were remembered with.

        Returns:
            How many of them the cache holds now, less than there are: give the model the rest.

        Raises:
            CacheStateError: if the cache is not empty, or the model's weights were exchanged after
                it was wrapped.
            ConfigError: if they are no token ids.
        """
        return prefixes.reuse(self, tokens, salt)

    @exclusive
    def forget_prefixes(self) -> None:
        """Give up what was remembered in memory, of all caches of this model."""
        self.context.prefixes.clear()

    def stored_sequences(self) -> list[StoredSequence]:
        """What `resume` can find for this model and these settings, the newest first."""
        return sequences.store_of(self).checkpoints.stored()

    @exclusive
    def discard(self, sequence: str | None = None) -> None:
        """Remove a flushed sequence from the disk.

        Args:
            sequence: its name; this cache's own if None. Its tokens in this cache stay.

        Raises:
            SequenceNotFoundError: if there is none.
            ColdStoreError: if the disk failed.
        """
        durable = self.context.config.durability == "power"
        name = sequence or self.context.sequence_id
        sequences.store_of(self).checkpoints.discard(name, durable)

    @exclusive
    def close(self) -> None:
        """Release pages and memory; threads and files too if no other cache shares them.

        What was flushed stays in ``cold_dir``, everything else goes. Closing twice is fine.
        """
        for cache in rows_of(self):
            cache.close()

    def __enter__(self) -> PagedCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _bounded_or_not(context: SequenceContext, layer: int) -> PagedLayerCache:
    size = context.config.max_kv_size
    if size is None:
        return PagedLayerCache(context, layer)
    return WindowedLayerCache(context, layer, size, KEPT_TOKENS)


def _can_trim(cache: Any, n: int) -> bool:
    paged = isinstance(cache, PagedLayerCache | BatchPagedLayerCache)
    return bool(cache.can_trim(n) if paged else cache.is_trimmable())


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    cache: PagedLayerCache,
    scale: float,
    mask: mx.array | str | None = "causal",
    sinks: mx.array | None = None,
) -> mx.array:
    """Append keys and values to a layer's cache and attend over everything in it.

    For hand-written models; models of mlx-lm need only `wrap`.

    Args:
        q: ``[1, query_heads, L, key_dim]``, positions encoded: the last L of the new tokens.
        k: ``[1, kv_heads, n, key_dim]`` of n new tokens, n at least L, positions encoded.
        v: ``[1, kv_heads, n, value_dim]``.
        cache: of this layer.
        scale: multiplies the products of queries and keys, usually ``key_dim ** -0.5``.
        mask: ``"causal"`` (within the window, if the cache has one), None, or an array that
            broadcasts to ``[1, query_heads, L, tokens]``: bool (True attends) or added to the
            scores.
        sinks: learned attention sinks, ``[query_heads]``.

    Returns:
        ``[1, query_heads, L, value_dim]`` in q's type.

    Raises:
        OutOfPagesError: if no tier has room; the cache is as before.
        ShapeError: if the arrays do not fit the cache or each other.
        CorruptPageError, ColdStoreError: if a cold page cannot be read.
    """
    if k.ndim == 4:
        check_queries(q, int(k.shape[1]), int(k.shape[3]), int(k.shape[2]), mask, sinks)
        if isinstance(mask, str):
            mask = cache.causal_mask(int(k.shape[2]), int(q.shape[2]))
        cache._context.require_start(cache, k.shape)
    return cache.attend_tagged(cache.append(k, v), q, scale, mask, sinks)

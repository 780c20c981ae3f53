"""What mlx-vlm's batch generator, memory plan and prefix cache ask of a layer's cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagedkv.cache.batch_cache import BatchPagedLayerCache
from pagedkv.config.window_sizes import SLACK
from pagedkv.errors import CacheStateError
from pagedkv.sequence.layer import PagedLayerCache
from pagedkv.sequence.partial_layer import PartialLayerCache
from pagedkv.tiers.hot import STEP
from pagedkv.tiers.turn import exclusive


class VLMProtocol(PagedLayerCache):
    """One sequence's layer, as mlx-vlm uses it."""

    @property
    def _batch(self) -> type[BatchPagedLayerCache]:
        """Of the batches that rows like this one make."""
        return BatchPagedLayerCache

    @exclusive
    def to_batch(self, left_padding: Sequence[int]) -> BatchPagedLayerCache:
        """A batch of copies of this cache.

        Args:
            left_padding: per row, columns before its first token.

        Raises:
            ShapeError: if there are any and this cache holds tokens.
        """
        batch = self._batch.merge([self] * len(left_padding))
        if any(left_padding):
            batch.prepare(left_padding=left_padding)
        return batch

    def memory_profile(self, token_count: int) -> Any:
        """Memory that this layer takes, and how it grows; pages on disk take none.

        The profile is a straight line through what is held now: for a sequence without pages it
        goes on in 16 bit, which a longer one takes less than.

        Args:
            token_count: held in the caller's view; the cache goes by its own.

        Returns:
            mlx-vlm's `CacheMemory`.
        """
        from mlx_vlm.models.cache import CacheMemory

        if self._pager is None or self.empty():
            return CacheMemory()
        pages = [page for page, _ in self.located_pages()]
        sizes = [self.page_bytes(page.precision) for page in pages]
        here = sum(n for n, page in zip(sizes, pages, strict=True) if page.slot is not None)
        source, most = self.hot_bytes + here, self._most_in_memory
        if not pages:
            rate: float = self._pager.shape.token_bytes(self.hot_bits)
            return CacheMemory(source, 0, rate, STEP, window_size=most)
        rate = self.page_bytes(self.ladder.at(self.offset)) / self.page_tokens
        begin = self.hot_bytes + sum(sizes) - (self.offset - self.dropped) * rate
        return CacheMemory(source, round(begin), rate, window_size=most)

    @property
    def _most_in_memory(self) -> int | None:
        """Tokens of one sequence that are ever in memory; None for any number."""
        assert self._pager is not None
        most = None
        if self._context.pager.has_cold:
            most = self._full + self._pager.warm_tokens
        if isinstance(self, PartialLayerCache):
            held = self.reach + SLACK + self.page_tokens if self.seals else self._full
            most = held if most is None else min(held, most)
        return most

    # Its prefix cache

    @exclusive
    def prefix_cache_snapshot(self) -> dict[str, Any]:
        """What this cache holds now, for `prefix_cache_restore`; shares every page."""
        return {"cache": self.fork(self._context.fork_for(self))}

    def prefix_cache_restore(self, snapshot: dict[str, Any]) -> None:
        """Hold what a snapshot holds.

        Raises:
            CacheStateError: if this cache holds tokens, or the snapshot is of another layer, or
                of a model that is wrapped anew.
        """
        held = snapshot.get("cache") if isinstance(snapshot, dict) else None
        if type(held) is not type(self):
            raise CacheStateError(
                f"a {type(self).__name__} was given a snapshot of a {type(held).__name__}: "
                f"restore it into a cache of the same model, wrapped as it was"
            )
        if "layer" not in self.__dict__:  # mlx-vlm makes copies without calling `__init__`
            meta = {"layer": held.layer, "window": held.window_state()}
            with held._turn.lock:
                self.start_from(held._context.fork_for(held), meta)
        here, there = ((c.layer, c._context.pager) for c in (self, held))
        if self.offset or here != there:
            raise CacheStateError(
                f"layer {self.layer} holds {self.offset:,} tokens and was given a snapshot of "
                f"layer {held.layer}: restore it into a new cache of the model, wrapped as it was"
            )
        self.continue_from(held)

    def prefix_cache_reserve(self, min_capacity_tokens: int) -> tuple[()]:
        """Nothing: memory is the tiers'."""
        return ()

    @exclusive
    def prefix_cache_merge(
        self, rows: Sequence[PagedLayerCache], prefix_lens: Sequence[int]
    ) -> BatchPagedLayerCache:
        """A batch of copies of single rows.

        Args:
            rows: of this layer.
            prefix_lens: tokens that each should hold.

        Raises:
            CacheStateError: if a row holds another number of tokens.
            ShapeError: if a row is not paged.
        """
        batch = self._batch.merge(rows)
        held = [row.offset for row in batch.rows]
        if held != list(prefix_lens):
            raise CacheStateError(
                f"layer {self.layer}: the rows hold {held} tokens, and prefixes of "
                f"{list(prefix_lens)} are wanted"
            )
        return batch


class BatchVLMProtocol(BatchPagedLayerCache):
    """One layer of several sequences, likewise."""

    def memory_profile(self, token_count: int) -> Any:
        """See `VLMProtocol.memory_profile`; the sum over the rows, which may share pages."""
        from mlx_vlm.models.cache import CacheMemory

        rows: list[Any] = self.rows
        each = [row.memory_profile(token_count) for row in rows]
        windows = [profile.window_size for profile in each if profile.source_bytes]
        return CacheMemory(
            sum(profile.source_bytes for profile in each),
            sum(profile.fixed_bytes for profile in each),
            sum(profile.bytes_per_token for profile in each),
            max((profile.step for profile in each), default=1),
            None if None in windows else max(windows, default=None),
        )

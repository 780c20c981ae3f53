"""Layers with a sliding window, and with chunks, as pages; see `pagedkv.sequence.partial_layer`."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from pagedkv.config.window_sizes import SLACK
from pagedkv.errors import ConfigError
from pagedkv.sequence.layer import PagedLayerCache
from pagedkv.sequence.partial_layer import PartialLayerCache
from pagedkv.sequence.sequence import SequenceContext


class WindowedLayerCache(PartialLayerCache):
    """A layer with a sliding window, in quantized pages as far as whole ones fit.

    What a query sees is what it sees with mlx-lm's `RotatingKVCache`: the first `keep` tokens and
    the newest, `max_size` in all. Arrays are in token order. The newest `hot_tokens` stay in 16
    bit; a window that is not larger than these and a page stays in 16 bit as a whole.
    """

    def __init__(self, context: SequenceContext, layer: int, max_size: int, keep: int = 0) -> None:
        """Make an empty cache.

        Args:
            context: shared with the other layers.
            layer: index among the model's layers.
            max_size: tokens that a query sees, itself included.
            keep: of them, how many are the sequence's first.

        Raises:
            ConfigError: if there is no room for newer tokens.
        """
        if not 0 <= keep < max_size:
            raise ConfigError(
                f"a window of {max_size} tokens cannot keep the first {keep}: it has to be larger"
            )
        super().__init__(context, layer, keep)
        self.max_size = max_size

    @property
    def reach(self) -> int:
        """Tokens that a query sees, at most."""
        return self.max_size

    @property
    def carried(self) -> int:
        """Tokens that the next call shows beside its own, the first of which sees itself too."""
        return min(self.offset, self.max_size - 1)

    def needed(self, offset: int) -> int:
        """See `PartialLayerCache.needed`."""
        return max(self.keep, offset - (self.max_size - 1 - self.keep))

    def make_mask(  # type: ignore[override]  # in the order of mlx-lm's RotatingKVCache
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """The mask for N new tokens, over what `view` shows once they are appended.

        Args:
            N: new tokens.
            window_size: tokens that a query sees, itself included; `max_size` if None.
            return_array: an array also where ``"causal"`` would do.
        """
        if N > 1:
            window, before = window_size or self.max_size, min(self.max_size - 1, self.offset)
            if before + N <= window and not return_array:
                return "causal"
            rows = mx.arange(before, before + N)[:, None]
            columns = mx.arange(before + N)[None]
            return (rows >= columns) & (rows < columns + window)
        if window_size is None or self.max_size <= window_size or self.offset < window_size:
            return None
        seen = min(self.offset + 1, self.max_size)
        return mx.arange(seen) >= seen - window_size

    def causal_mask(self, new: int, queries: int) -> mx.array | str | None:
        """The mask for the last `queries` of `new` tokens that come next."""
        mask = self.make_mask(new)
        return mask[new - queries :] if isinstance(mask, mx.array) else "causal"

    def window_state(self) -> dict[str, int]:
        """What a state says of the window."""
        return {"max_size": self.max_size, "keep": self.keep, "dropped": self.dropped}

    def start_from(self, context: SequenceContext, meta: dict[str, Any]) -> None:
        """See `PagedLayerCache.start_from`."""
        window = meta["window"]
        WindowedLayerCache.__init__(
            self, context, meta["layer"], window["max_size"], window["keep"]
        )

    def accept_window(self, window: dict[str, int], offset: int) -> None:
        """See `PagedLayerCache.accept_window`."""
        self._require_same(window, {"max_size": self.max_size, "keep": self.keep})
        self.accept_dropped(window["dropped"], offset)

    def _blank(self, context: SequenceContext) -> PagedLayerCache:
        return type(self)(context, self.layer, self.max_size, self.keep)


class ChunkedLayerCache(PartialLayerCache):
    """A layer that attends within chunks of the sequence, as mlx-lm's `ChunkedKVCache` (llama4).

    The model says when to move on (`maybe_trim_front`), and makes its own mask.
    """

    def __init__(self, context: SequenceContext, layer: int, chunk_size: int) -> None:
        """Make an empty cache.

        Args:
            context: shared with the other layers.
            layer: index among the model's layers.
            chunk_size: tokens of a chunk.
        """
        super().__init__(context, layer)
        self.chunk_size = chunk_size
        self.start_position = 0

    @property
    def reach(self) -> int:
        """Tokens that a query sees, at most."""
        return self.chunk_size

    @property
    def carried(self) -> int:
        """Tokens that the next call shows beside its own."""
        return self.offset - self.start_position

    @property
    def _window_name(self) -> str:
        return f"chunks of {self.chunk_size}"

    def needed(self, offset: int) -> int:
        """The beginning of the chunk: what a query sees once the model has moved on."""
        return offset // self.chunk_size * self.chunk_size

    def _first_visible(self) -> int:
        return self.start_position

    def _behind(self, offset: int) -> int:
        # Of `SLACK` tokens taken back the last one's chunk begins so much earlier.
        return max(0, self.start_position - SLACK + 1)

    def maybe_trim_front(self) -> None:
        """Leave everything behind but the last `chunk_size` tokens; models call it before a step.

        What is left behind is given back when the next tokens come.
        """
        self.start_position = max(self.start_position, self.offset - self.chunk_size)

    def _trim(self, n: int) -> int:
        trimmed = super()._trim(n)
        self._move_start()
        return trimmed

    def _move_start(self) -> None:
        # Masks are made by where the first layer's view begins: the same in all layers.
        self.start_position = min(self.start_position, self.needed(self.offset))

    def recover(self) -> None:
        """See `PartialLayerCache.recover`."""
        super().recover()
        self._move_start()

    def window_state(self) -> dict[str, int]:
        """What a state says of the window."""
        return {
            "chunk_size": self.chunk_size,
            "start_position": self.start_position,
            "dropped": self.dropped,
        }

    def start_from(self, context: SequenceContext, meta: dict[str, Any]) -> None:
        """See `PagedLayerCache.start_from`."""
        ChunkedLayerCache.__init__(self, context, meta["layer"], meta["window"]["chunk_size"])

    def accept_window(self, window: dict[str, int], offset: int) -> None:
        """See `PagedLayerCache.accept_window`."""
        saved = {name: n for name, n in window.items() if name != "start_position"}
        self._require_same(saved, {"chunk_size": self.chunk_size})
        self.accept_dropped(window["dropped"], offset)
        self.start_position = max(self.start_position, int(window["start_position"]))

    def accept_dropped(self, dropped: int, offset: int) -> None:
        """See `PartialLayerCache.accept_dropped`."""
        super().accept_dropped(dropped, offset)
        self.start_position = max(dropped, offset - self.chunk_size)

    def continue_from(self, other: PagedLayerCache) -> None:
        """See `PagedLayerCache.continue_from`."""
        assert isinstance(other, ChunkedLayerCache)
        super().continue_from(other)
        self.start_position = other.start_position

    def _blank(self, context: SequenceContext) -> PagedLayerCache:
        return type(self)(context, self.layer, self.chunk_size)

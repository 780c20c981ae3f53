"""The cache of one layer as a model sees it: mlx-lm's protocol, and attention over what is held."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from pagedkv.allocator import KVShape
from pagedkv.attn.backends import KernelBackend
from pagedkv.attn.driver import DECODE_TOKENS, KVView, attend, check_view
from pagedkv.attn.selection import ColdSelection, SkipCounters
from pagedkv.attn.stand_in import stand_ins
from pagedkv.cache import sdpa_hook as hook
from pagedkv.cache.persistence import snapshot as state
from pagedkv.config.tier_config import TierConfig
from pagedkv.errors import CacheStateError, PagedKVError, ShapeError
from pagedkv.sequence.interruption import interruptible, interruptible_append, interruptible_call
from pagedkv.sequence.layer_kv import LayerPages
from pagedkv.sequence.sequence import SequenceContext
from pagedkv.tiers import HotBuffer
from pagedkv.tiers.codec.rounding import to_16_bit
from pagedkv.tiers.cold.prefetch import Batch
from pagedkv.tiers.turn import exclusive


class PagedLayerCache(LayerPages):
    """One layer's keys and values: hot tokens here, sealed pages in the pager.

    Speaks mlx-lm's cache protocol. Holds one sequence (batch size 1). New tokens are appended in
    16 bit; pages that left the hot window are sealed after the attention of a prefill chunk, or
    before the next token is appended, so that a query never sees its own neighbourhood rounded.

    In a prefill chunk a layer waits for the attention of the layer behind it, not for its own,
    and seals that layer's pages, when its own queries are under way: memory is that of one layer,
    and the device has work all the time.
    """

    def __init__(self, context: SequenceContext, layer: int) -> None:
        """Make an empty cache.

        Args:
            context: shared with the other layers.
            layer: index among the model's layers.
        """
        super().__init__(context, layer)
        # Whether both tags reach attention, for one query token and for many; None is unknown.
        self.reaches_hook: dict[bool, bool | None] = {False: None, True: None}
        self.readers = 1  # how many times per call a view is attended
        self._unread = 0
        self._spent: weakref.ref[KVView] | None = None  # weak: it holds a chunk's 16-bit tokens
        self._appended = 0
        self._accepted: tuple[tuple[int, ...], ...] = ()  # shapes that were checked
        self._rows = 0  # query rows per KV head of the last decode step, for reading ahead
        self._selection = _selection(context.config)
        self._leads = not context.layers  # the first layer counts the steps for all
        self.batch: weakref.ref[Any] | None = None  # of the batch that this is a row of
        context.pager.users.add(self)
        context.layers.append(weakref.ref(self))

    # Appending

    @interruptible_append
    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append tokens; the protocol's main call.

        While everything is hot the arrays returned are plain and complete. Otherwise they are
        tagged for the dispatcher (see `pagedkv.hook`).

        Args:
            keys: ``[1, kv_heads, n, key_dim]``, positions already encoded.
            values: ``[1, kv_heads, n, value_dim]``.

        Returns:
            Keys and values of all tokens, as arrays or stand-ins for them.

        Raises:
            OutOfPagesError: if no tier has room for the pages that these tokens push out of the
                hot window; nothing has changed then.
            ShapeError: if they do not fit the cache.
            CacheStateError: if an earlier call was broken off; see `SequenceContext.begin`.
            ClosedError: after `close`.
        """
        self._context.require_start(self, keys.shape)
        return self._handed_out(self.append(keys, values))

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What `update_and_fetch` returned last; for layers that share keys (gemma3n, afm7).

        Raises:
            ClosedError: after `close`.
        """
        self.require_open()
        return self._handed_out(self.view())

    def _handed_out(self, view: KVView) -> tuple[mx.array, mx.array]:
        """A view as the model gets it: plain arrays while all is hot, else tagged ones."""
        known = self.reaches_hook[self._appended == 1]
        if not view.entries:
            # Nothing to learn and nothing to seal afterwards: the stock path.
            if known is not None and not self._overflowing():
                return view.keys, view.values
        elif known and hook.installed():
            return self._stand_ins(view)
        dense = self._dense(view)
        return hook.tag_pair(self, view, *dense) if hook.installed() else dense

    @exclusive
    @interruptible_call
    def _dense(self, view: KVView) -> tuple[mx.array, mx.array]:
        """All keys and values of a view: the hot arrays themselves if there are no pages."""
        with self._taken_back_to(self.offset - self._appended):
            return view.dense(view.hot.keys.dtype)

    def _stand_ins(self, view: KVView) -> tuple[mx.array, mx.array]:
        """What the model gets where it is known to do nothing but attend."""
        assert self._pager is not None
        shape = self._pager.shape
        dims = (shape.key_dim, shape.value_dim)
        form = (1, shape.kv_heads, view.tokens, dims, self._dtype)
        return stand_ins(self, self.layer, view, *form, lambda: self._dense(view))

    @exclusive
    @interruptible_append
    def append(self, keys: mx.array, values: mx.array) -> KVView:
        """Append tokens and return what attention over everything needs.

        See `update_and_fetch` for arguments and errors; most callers want
        `pagedkv.attention`.
        """
        shapes = (keys.shape, values.shape)
        if shapes != self._accepted:
            self._accept(keys, values)
            self._accepted = shapes
        context, count = self._context, shapes[0][2]
        if context.torn:
            raise CacheStateError(
                "a call of the model was broken off, and not all of its layers can give back the "
                "tokens of that call: go on from a copy made before, or from a saved cache"
            )
        context.pager.use(context.lineage)
        context.begin(self, count)
        self._start_call(count)
        if self._leads:
            context.pace.step() if count <= DECODE_TOKENS else context.pace.prompt(count)
        self._appended = count
        if self._may_promote or self._hot.used + count >= self._full:
            with self._taken_back_to(self.offset):
                self._settle()
                self._admit(count)
        elif self.offset + count > context.admitted:
            with self._taken_back_to(self.offset):
                self._admit(count)
        if keys.dtype != self._dtype:
            keys, values = to_16_bit(keys, self._dtype), to_16_bit(values, self._dtype)
        self._hot.append(keys, values, count)
        self.offset += count
        self._unread, self._spent = self.readers, None
        if context.max_tokens is not None and self.offset > context.max_tokens:
            self._warn_past_limit(context.max_tokens)
        return self.view()

    def _start_call(self, count: int) -> None:
        """What is to be done before so many tokens come."""

    def view(self) -> KVView:
        """The present contents, for attention.

        Raises:
            ClosedError: after `close`.
        """
        if self._closed:  # not a call: this is done for every token
            self.require_open()
        table, hot = self._table, self._hot.tokens
        assert table is not None
        sinks = min(self.sink_tokens, hot.used)
        return KVView(self._pager, table.entries, hot, sinks, table.tokens, self._following_batches)

    def attend_tagged(
        self,
        view: KVView,
        q: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attention over a view; seals what a prefill chunk pushed out of the window.

        See `pagedkv.attention.attend`. If a cold page cannot be read, the tokens of this call are
        taken back from every layer that has them, so that the call can be made again.
        """
        self.reaches_hook[q.shape[2] == 1] = True
        return self.attend_view(view, q, scale, mask, sinks)

    @exclusive
    @interruptible_call
    def attend_view(
        self,
        view: KVView,
        q: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """What `attend_tagged` does, without learning from it how the model calls."""
        if self._spent and view is self._spent():
            raise PagedKVError(
                f"layer {self.layer}: its keys were attended more often than when the model was "
                f"wrapped ({self.readers} times a call); please report this model"
            )
        _, query_heads, length, _ = q.shape
        few = length <= DECODE_TOKENS
        heads = self._pager.shape.kv_heads if self._pager else view.hot.keys.shape[1]
        self._rows = query_heads * length // heads if few else 0
        if not few:
            self._catch_up(view, q)
        scratch = self._context.pager.budget.scratch_bytes
        if view.entries and self._pager is not None and self._pager.any_cold:
            with self._taken_back_to(self.offset - self._appended):
                chosen, selection = view, self._selection if few else None
                if selection and not isinstance(mask, mx.array):
                    check_view(view, q, mask, sinks)
                    chosen = selection.narrowed(view, q, scale, mask, sinks)
                out = attend(chosen, q, scale, mask, sinks, self._backend, scratch)
                if selection:
                    selection.attended(out)
        else:
            out = attend(view, q, scale, mask, sinks, self._backend, scratch)
        self._unread -= 1
        if not few and (view.entries or self._overflowing()):
            self._fall_behind(view, out)
        return out

    def _catch_up(self, view: KVView, q: mx.array) -> None:
        """Start this layer's queries and tokens, then see to the layer that attended before.

        Waiting for it before this layer's pages are expanded keeps one layer's in memory.
        """
        if view.entries or self._context.behind:
            mx.async_eval(q, view.hot.keys, view.hot.values)  # type: ignore[no-untyped-call]
        behind = self._context.behind and self._context.behind()
        if behind:
            with self._taken_back_to(self.offset - self._appended):
                behind._finish()

    def _fall_behind(self, view: KVView, out: mx.array) -> None:
        """Start this layer's attention, and leave the rest of its work for the next layer."""
        mx.async_eval(out)  # type: ignore[no-untyped-call]
        self._attended = (out,)
        self._context.behind = weakref.ref(self)
        if self._unread > 0:
            return
        if self._overflowing() and self.frees_pages:
            self._spent = weakref.ref(view)  # pages that it names may be lowered and freed
        *_, last = self.siblings()
        if last is self:
            with self._taken_back_to(self.offset - self._appended):
                self._finish()

    def _finish(self) -> None:
        """Wait for this layer's attention, and seal what its chunk pushed out of the window."""
        self._context.behind = None
        # Layers that share this one's keys (gemma3n) attend to the same view: not before the last.
        if self._unread <= 0 and self._overflowing():
            self._settle()
        else:
            self._wait()

    def _accept(self, keys: mx.array, values: mx.array) -> None:
        """Check the arrays; the first ones decide the layer's shape."""
        self.require_open()
        state.require_all_loaded(self._context)
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise ShapeError(
                f"layer {self.layer}: keys {keys.shape} and values {values.shape} are not "
                f"[1, kv_heads, n, dim] with the same heads and n"
            )
        if keys.shape[2] == 0:
            raise ShapeError(f"layer {self.layer}: no token was given")
        if not mx.issubdtype(keys.dtype, mx.floating):
            raise ShapeError(
                f"layer {self.layer}: keys of {keys.dtype} were given; pages hold rounded numbers, "
                f"so only floating-point keys and values can be paged"
            )
        if keys.shape[0] != 1:
            raise ShapeError(
                f"layer {self.layer}: a batch of {keys.shape[0]} was given, a paged cache holds "
                f"one sequence: use one cache per row"
            )
        shape = KVShape(int(keys.shape[1]), int(keys.shape[3]), int(values.shape[3]))
        if self._pager is None:
            self.bind(shape, keys.dtype)
        elif shape != self._pager.shape:
            raise ShapeError(
                f"layer {self.layer}: this cache holds {self._pager.shape.kv_heads} KV heads of "
                f"{self._pager.shape.key_dim}/{self._pager.shape.value_dim} channels and was "
                f"given {shape.kv_heads} of {shape.key_dim}/{shape.value_dim}: "
                f"is it another model's cache?"
            )

    @property
    def kind(self) -> str:
        """How the layer is cached, for `stats`."""
        return "paged"

    @property
    def skipped(self) -> SkipCounters | None:
        """What decode steps left out of the cold pages; None where every page is read."""
        return self._selection.counters if self._selection else None

    def _following_batches(self) -> Sequence[Batch]:
        """What the next paged layer will read from disk, for read-ahead.

        After the last layer comes the first one, of the next token.
        """
        layers = list(self.siblings())
        here = next((i for i, cache in enumerate(layers) if cache is self), -1)
        return layers[(here + 1) % len(layers)]._cold_batches() if here >= 0 else ()

    def _cold_batches(self) -> Sequence[Batch]:
        if self._pager is None or self._table is None or not self._context.pager.open_cold:
            return ()
        entries = self._table.entries
        if self._selection:
            entries = self._selection.expected(entries)
        if isinstance(self._backend, KernelBackend) and self._rows:
            return self._backend.fused.cold_batches(
                self._pager, entries, self._hot.used, self._rows
            )
        return self._pager.cold_batches(entries)

    def _warn_past_limit(self, limit: int) -> None:
        self._context.max_tokens = None  # once per sequence
        warnings.warn(
            f"the context has {self.offset:,} tokens and the model was made for {limit:,}: "
            f"answers may degrade",
            stacklevel=4,
        )

    # The rest of mlx-lm's protocol

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The causal mask for N new tokens, as mlx-lm's KVCache makes it."""
        if window_size is None and N == 1:
            return None
        if window_size is None and not return_array:
            return "causal"
        rows = mx.arange(self.offset, self.offset + N)[:, None]
        columns = mx.arange(self.offset + N)[None]
        mask = rows >= columns
        if window_size is not None:
            mask = mask & (rows < columns + window_size)
        return mask

    @property
    def keys(self) -> mx.array | None:
        """The array behind the hot keys; None before the first token.

        It is no place to read keys from: models only make it depend on other arrays
        (`mx.depends`), so that those are evaluated with it, and set it.
        """
        return self._hot.arrays[0] if self._hot.arrays else None

    @keys.setter
    def keys(self, array: mx.array) -> None:
        self._hot.exchange(array, self.values)

    @property
    def values(self) -> mx.array | None:
        """The array behind the hot values, likewise; a model that needs none sets zeros."""
        return self._hot.arrays[1] if self._hot.arrays else None

    @values.setter
    def values(self, array: mx.array) -> None:
        self._hot.exchange(self.keys, array)

    def causal_mask(self, new: int, queries: int) -> mx.array | str | None:
        """The mask for the last `queries` of `new` tokens that come next."""
        return "causal"

    def empty(self) -> bool:
        """Whether no token is held."""
        return self.offset == 0

    def size(self) -> int:
        """Tokens held."""
        return self.offset

    @property
    def carried(self) -> int:
        """Tokens that the next call shows beside its own."""
        return self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of this sequence's tokens in memory and on disk, at their stored size."""
        pages = sum(self.page_bytes(page.precision) for page, _ in self.located_pages())
        return self._hot.nbytes + pages

    def is_trimmable(self) -> bool:
        """Always: pages keep their bytes, and only their valid length shrinks."""
        return True

    def can_trim(self, n: int) -> bool:
        """Whether `trim` would forget the last n tokens; always."""
        return True

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> PagedLayerCache:
        """Itself: pages have their own precision."""
        return self

    @exclusive
    @interruptible
    def fork(self, context: SequenceContext | None = None) -> PagedLayerCache:
        """A second cache with the same tokens: shares every page, copies page numbers only."""
        self.require_open()
        twin = self._blank(context or self._context.fork())
        twin.continue_from(self)
        return twin

    def continue_from(self, other: PagedLayerCache) -> None:
        """Hold what another cache of this layer holds, and know what it knows of the model."""
        self.reaches_hook, self.readers = dict(other.reaches_hook), other.readers
        self.take_over(other)

    def _blank(self, context: SequenceContext) -> PagedLayerCache:
        """An empty cache of the same kind."""
        return type(self)(context, self.layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedLayerCache:
        # Layers copied together (a plain list of them) stay one sequence.
        if id(self._context) not in memo:
            memo[id(self._context)] = self._context.fork()
        return self.fork(memo[id(self._context)])

    def __copy__(self) -> PagedLayerCache:
        return self.fork()

    @exclusive
    @interruptible
    def close(self) -> None:
        """Release pages and memory. Using it afterwards raises.

        Closing twice is fine, and completes a first time that was interrupted. With the last open
        layer of a pager its threads and files go too.
        """
        pager, prefixes = self._context.pager, self._context.prefixes
        self._closed, self._accepted = True, ()
        self.offset = self.dropped = 0
        pager.reclaim()
        if self._table is not None:
            self._table.clear()
        self._table, self._hot = None, HotBuffer(0)
        self._attended = ()
        pager.users.discard(self)
        if not prefixes.lasting and prefixes.alone(pager):
            prefixes.clear()  # nobody can ask for them any more
        if not pager.users:
            pager.close()

    # State, for mlx-lm's save and load

    def window_state(self) -> dict[str, int]:
        """What a state must say of a window beyond the tokens; nothing without one."""
        return {}

    def start_from(self, context: SequenceContext, meta: dict[str, Any]) -> None:
        """Become an empty cache like the one that a saved state describes."""
        PagedLayerCache.__init__(self, context, meta["layer"])

    def accept_window(self, window: dict[str, int], offset: int) -> None:
        """Take over `window_state` of a saved cache that holds `offset` tokens.

        Raises:
            CacheStateError: if it is of another kind, or damaged.
        """
        if window:
            raise CacheStateError(
                f"layer {self.layer}: the saved cache has a window of "
                f"{window.get('max_size', window.get('chunk_size'))} tokens and this one has none: "
                f"load it with the same model and max_kv_size"
            )

    def accept_dropped(self, dropped: int, offset: int) -> None:
        """Take over how many of a stored sequence's `offset` tokens a window left behind.

        Raises:
            CacheStateError: if it cannot have been so many here.
        """
        if dropped:
            raise CacheStateError(
                f"layer {self.layer}: {dropped} of {offset} tokens are gone, and this cache has no "
                f"window that may leave tokens behind"
            )
        self.dropped = 0

    @property
    def state(self) -> Any:
        """Everything, for `save_prompt_cache`; evaluating it touches the hot arrays only."""
        return state.CacheState(self)

    @state.setter
    def state(self, value: Any) -> None:
        state.restore_into(self, value)

    @property
    def meta_state(self) -> str:
        """For mlx-lm before 0.32; everything is in `state`."""
        return ""

    @meta_state.setter
    def meta_state(self, value: str) -> None:
        pass

    @classmethod
    def from_state(cls, value: Any, meta_state: str = "") -> PagedLayerCache:
        """A cache with its own tiers from a saved state.

        Raises:
            CacheStateError: if the state is damaged or not ours.
        """
        cache = cls.__new__(cls)
        state.restore_into(cache, value)
        return cache


def _selection(config: TierConfig) -> ColdSelection | None:
    if not config.selective:
        return None
    return ColdSelection(config.skip_below, config.cold_pages)

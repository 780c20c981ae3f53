"""The cache of one layer: hot tokens here, sealed pages in the pager, mlx-lm's protocol around."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from pagedkv import hook, state
from pagedkv.allocator import KVShape, PageTable, Precision, TableEntry
from pagedkv.attention import DECODE_TOKENS, KVView, attend, check_view
from pagedkv.backends import KernelBackend, choose_backend
from pagedkv.config import TierConfig
from pagedkv.errors import (
    CacheStateError,
    ClosedError,
    ColdStoreError,
    OutOfPagesError,
    PagedKVError,
    ShapeError,
)
from pagedkv.pace import Pace
from pagedkv.prefixes import Prefixes
from pagedkv.selection import ColdSelection, SkipCounters
from pagedkv.tiers import HotBuffer, LayerPager, Lineage, Page, Pager
from pagedkv.tiers.codec import to_16_bit
from pagedkv.tiers.reader import Batch

MOST_PARTIAL_FORKS = 1024
"""Forks that wait for their other layers; who forks one layer alone never brings them."""


@dataclass
class SequenceContext:
    """What the layers of one `PagedCache` share.

    Attributes:
        config: the user's settings.
        pager: tiers below the hot one; shared with every cache of the same wrapped model.
        lineage: this sequence and its forks.
        layers: the paged layers, in model order (weak: the cache list owns them).
        fingerprint: of the model, kept in saved files; empty if unknown.
        max_tokens: the model's context limit, if it states one.
        sequence_id: tells the layers of one saved file from another's.
        admitted: length up to which no layer has to seal a page.
        behind: the layer that attended last in a prefill chunk, if that is not known to be done.
        pace: of prompts and decode steps.
        prefixes: what is remembered of sequences of this model; shared with all its caches.
        prefix: digests of the tokens in this sequence's pages, as far as they are known.
        others: streams of the same model that are not paged.
        torn: whether some of those have taken tokens of a call that failed, and cannot give
            them back.
        forks: those that still lack layers, see `fork_for`.
    """

    config: TierConfig
    pager: Pager
    lineage: Lineage = field(default_factory=Lineage)
    layers: list[weakref.ref[PagedLayerCache]] = field(default_factory=list)
    fingerprint: str = ""
    max_tokens: int | None = None
    sequence_id: str = field(default_factory=state.new_sequence_id)
    admitted: int = 0
    behind: weakref.ref[PagedLayerCache] | None = None
    pace: Pace = field(default_factory=Pace)
    prefixes: Prefixes = field(default_factory=Prefixes)
    prefix: list[bytes] = field(default_factory=list)
    others: tuple[Any, ...] = ()
    torn: bool = False
    forks: list[_PartialFork] = field(default_factory=list)

    def fork(self) -> SequenceContext:
        """The context of a forked sequence: same tiers and lineage, its own layers."""
        return SequenceContext(
            self.config,
            self.pager,
            self.lineage,
            fingerprint=self.fingerprint,
            max_tokens=self.max_tokens,
            prefixes=self.prefixes,
            prefix=list(self.prefix),
            torn=self.torn,
        )

    def forget_prefix_beyond(self, tokens: int) -> None:
        """Tokens from there on are about to be others than those that digests are known of."""
        if self.prefix:
            unit = max(cache.page_tokens for cache in self.alive())
            del self.prefix[max(0, tokens - self.config.sink_tokens) // unit :]

    def take_back_to(self, length: int) -> None:
        """Forget what came after the first `length` tokens, everywhere, after a call that failed.

        A recurrent state cannot forget: a sequence with one cannot go on.
        """
        for cache in self.alive():
            cache.trim(max(0, cache.offset - length))
        for other in self.others:
            beyond = getattr(other, "offset", length) - length
            if beyond > 0 and other.is_trimmable():
                other.trim(beyond)
            elif beyond > 0 or not (hasattr(other, "offset") or other.empty()):
                self.torn = True

    def fork_for(self, layer: PagedLayerCache) -> SequenceContext:
        """The context for a fork of one layer, where nobody says which layers belong together.

        Batches are made layer by layer: the n-th fork of each layer goes with the n-th of others.
        """
        wants = (f for f in self.forks if layer.layer not in f.layers and f.offset == layer.offset)
        fork = next(wants, None)
        if fork is None:
            fork = _PartialFork(self.fork(), layer.offset)
            self.forks.append(fork)
        fork.layers.add(layer.layer)
        incomplete = [f for f in self.forks if len(f.layers) < self.pager.layers]
        self.forks = incomplete[-MOST_PARTIAL_FORKS:]
        return fork.context

    def alive(self) -> Iterator[PagedLayerCache]:
        """The paged layers that still exist, in model order."""
        return (cache for ref in self.layers if (cache := ref()) is not None)


@dataclass(eq=False)
class _PartialFork:
    """A fork that is made layer by layer: at what length, and which layers it has."""

    context: SequenceContext
    offset: int
    layers: set[int] = field(default_factory=set)


class PagedLayerCache:
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
        self.layer = layer
        self.offset = 0
        self.sink_tokens = context.config.sink_tokens
        self.dropped = 0  # tokens between the sinks and the first page that a window left behind
        self._context = context
        self._pager: LayerPager | None = None
        self._table: PageTable | None = None
        self._hot = HotBuffer(0)
        self._may_promote = False
        self._closed = False
        # Whether both tags reach attention, for one query token and for many; None is unknown.
        self.reaches_hook: dict[bool, bool | None] = {False: None, True: None}
        self.readers = 1  # how many times per call a view is attended
        self._unread = 0
        self._spent: weakref.ref[KVView] | None = None  # weak: it holds a chunk's 16-bit tokens
        self._attended: tuple[mx.array, ...] = ()  # what may still be reading the slabs
        self._appended = 0
        self._backend = choose_backend(context.config.backend)
        self._accepted: tuple[tuple[int, ...], ...] = ()  # shapes that were checked
        self._full = 0  # hot tokens that make a page due
        self._rows = 0  # query rows per KV head of the last decode step, for reading ahead
        self._selection = _selection(context.config)
        self._leads = not context.layers  # the first layer counts the steps for all
        self.batch: weakref.ref[Any] | None = None  # of the batch that this is a row of
        context.pager.users.add(self)
        context.layers.append(weakref.ref(self))

    # Appending

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
            CacheStateError: if an earlier call failed and its recurrent layers are ahead now.
            ClosedError: after `close`.
        """
        return self._handed_out(self.append(keys, values))

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What `update_and_fetch` returned last; for layers that share keys (gemma3n, afm7)."""
        return self._handed_out(self.view())

    def _handed_out(self, view: KVView) -> tuple[mx.array, mx.array]:
        """A view as the model gets it: plain arrays while all is hot, else tagged ones."""
        known = self.reaches_hook[self._appended == 1]
        if not view.entries:
            # Nothing to learn and nothing to seal afterwards: the stock path.
            if known is not None and not self._overflowing():
                return view.keys, view.values
        elif known and hook.installed():
            return hook.tag_pair(self, view, *hook.placeholders(view), placeholder=True)
        with self._taken_back_to(self.offset - self._appended):
            # The hot arrays themselves if there are no pages.
            dense = view.dense(view.hot.keys.dtype)
        if not hook.installed():
            return dense
        return hook.tag_pair(self, view, *dense, placeholder=False)

    def append(self, keys: mx.array, values: mx.array) -> KVView:
        """Append tokens and return what attention over everything needs.

        See `update_and_fetch` for arguments and errors; most callers want
        `pagedkv.attention`.
        """
        shapes = (keys.shape, values.shape)
        if shapes != self._accepted:
            self._accept(keys, values)
            self._accepted = shapes
        context, hot, count = self._context, self._hot, shapes[0][2]
        if context.torn:
            raise CacheStateError(
                "a call of the model failed, and its layers that are not paged cannot give back "
                "the tokens of that call: go on from a copy made before, or from a saved cache"
            )
        context.pager.use(context.lineage)
        if self._leads:
            context.pace.step() if count <= DECODE_TOKENS else context.pace.prompt(count)
        self._appended = count
        if self._may_promote or hot.used + count >= self._full:
            with self._taken_back_to(self.offset):
                self._settle()
                self._admit(count)
        elif self.offset + count > context.admitted:
            with self._taken_back_to(self.offset):
                self._admit(count)
        if keys.dtype != self._dtype:
            keys, values = to_16_bit(keys, self._dtype), to_16_bit(values, self._dtype)
        hot.append(keys, values, count)
        self.offset += count
        self._unread, self._spent = self.readers, None
        if context.max_tokens is not None and self.offset > context.max_tokens:
            self._warn_past_limit(context.max_tokens)
        return self.view()

    def view(self) -> KVView:
        """The present contents, for attention."""
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
                if few and self._selection and not isinstance(mask, mx.array):
                    check_view(view, q, mask, sinks)
                    chosen = self._selection.narrowed(view, q, scale, mask, sinks)
                    out = attend(chosen, q, scale, mask, sinks, self._backend, scratch)
                    self._selection.attended(out)
                else:
                    out = attend(view, q, scale, mask, sinks, self._backend, scratch)
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

    def _wait(self) -> None:
        """Until nothing reads the slabs, that pages be written in place: else MLX copies them."""
        mx.eval(*self._attended, *self._hot.arrays)
        self._attended = ()

    @contextmanager
    def _taken_back_to(self, length: int) -> Iterator[None]:
        """If the disk fails inside, take back what came after `length`, in other layers too."""
        try:
            yield
        except (ColdStoreError, OutOfPagesError):  # the second from a disk that failed just now
            self._context.take_back_to(length)
            raise

    def _accept(self, keys: mx.array, values: mx.array) -> None:
        """Check the arrays; the first ones decide the layer's shape."""
        if self._closed:
            raise ClosedError(f"layer {self.layer}: the cache is closed; make a new one")
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise ShapeError(
                f"layer {self.layer}: keys {keys.shape} and values {values.shape} are not "
                f"[1, kv_heads, n, dim] with the same heads and n"
            )
        if keys.shape[2] == 0:
            raise ShapeError(f"layer {self.layer}: no token was given")
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

    def bind(self, shape: KVShape, dtype: mx.Dtype) -> None:
        """Fix heads, channels and types; done by the first tokens, or when a model is wrapped.

        Args:
            shape: what the layer caches per token.
            dtype: the model's type; see `TierConfig.hot_dtype` for what is kept.

        Raises:
            ConfigError: if the warm budget is smaller than one page.
        """
        config = self._context.config
        self._dtype = _hot_dtype(config.hot_dtype, dtype)
        self._pager = self._context.pager.layer(self.layer, shape, self._dtype, self._span)
        if self._pager.shape != shape:
            raise ShapeError(
                f"layer {self.layer}: keys of {shape} do not fit this model's {self._pager.shape}"
            )
        self._table = self._pager.table()
        # The pages outlive this object in their table: let go of them when it dies.
        self._finalizer = weakref.finalize(self, self._pager.abandon, self._table)
        self._full = self._hot_room(self._pager.page_tokens)
        self._hot = HotBuffer(self._full + DECODE_TOKENS)

    # Sealing

    @property
    def _span(self) -> int | None:
        """Tokens of a sequence that are ever in pages; None for any number."""
        return None

    def _hot_room(self, page_tokens: int) -> int:
        """Hot tokens with which there is something to do: a page to be sealed."""
        return self.sink_tokens + self._context.config.hot_tokens + page_tokens

    def _pages_due(self, extra: int = 0) -> int:
        """Pages of hot tokens that are out of the window, once `extra` more are appended."""
        if self._pager is None:
            return 0
        beyond = self._hot.used + extra - self.sink_tokens - self._context.config.hot_tokens
        return max(0, beyond // self._pager.page_tokens)

    def _overflowing(self) -> bool:
        return self._pages_due() > 0

    def _page_precisions(self, count: int, offset: int) -> list[Precision]:
        """Precision of the next `count` pages to be sealed, the current token being `offset`."""
        assert self._pager is not None and self._table is not None
        ends = self._first_unsealed(offset) + self._pager.page_tokens
        ladder = self._context.config.ladder
        return [ladder.at(offset - ends - i * self._pager.page_tokens) for i in range(count)]

    def _first_unsealed(self, offset: int) -> int:
        """Where the next page begins, the current token being `offset`."""
        return self._sealed_end()

    def _sealed_end(self) -> int:
        """Where the pages end."""
        assert self._table is not None
        return self.sink_tokens + self.dropped + self._table.tokens

    def _admit(self, count: int) -> None:
        """Refuse tokens whose pages would not fit, before any layer has taken them."""
        first = next(self._context.alive(), self)
        layers: Sequence[PagedLayerCache] = [self] if first is not self else [*first.siblings()]
        if first is self:
            bound = [c for c in layers if c._pager is not None]
            room = (c._full - c._hot.used + max(self.offset, c.offset) for c in bound)
            self._context.admitted = min(room, default=self.offset) - 1
        for cache in layers:
            # A layer's second stream may be called before its first, and have the tokens already.
            coming = max(0, count - max(0, cache.offset - self.offset))
            if cache._pager is None or not cache._pages_due(coming):
                continue
            problem = cache._pager.shortage(cache._pages_to_come(coming))
            while problem and self._context.pager.relieve():
                # Counted again: a page that was shared frees its slot now when it is lowered.
                problem = cache._pager.shortage(cache._pages_to_come(coming))
            if problem is None and cache is self and self._overflowing():
                problem = "the disk failed while pages were being stored"
            if problem:
                raise OutOfPagesError(
                    f"out of pages at {self.offset:,} tokens (+{count:,}): {problem}; "
                    f"raise the warm or cold budget, lower the precision, or trim"
                )

    def _pages_to_come(self, count: int) -> dict[Precision, int]:
        """By precision, pages sealed or lowered into it less pages that leave it, `count` on."""
        assert self._pager is not None
        offset = self.offset + count
        more = Counter(self._page_precisions(self._pages_due(count), offset))
        for _, entry, present, wanted in self._to_lower(offset):
            more[wanted] += 1
            more[present] -= self._pager.allocator.references(entry.page) == 1
        return dict(more)

    def located_pages(self) -> Iterator[tuple[Page, int]]:
        """This sequence's pages in order, each with its valid tokens."""
        if self._pager is not None and self._table is not None:
            for entry in self._table:
                yield self._pager.pages[entry.page], entry.tokens

    def page_bytes(self, precision: Precision) -> int:
        """Bytes of a page of this layer."""
        assert self._pager is not None
        return self._pager.codecs[precision].geometry.page_bytes

    @property
    def keeps_all(self) -> bool:
        """Whether no token is ever forgotten unasked."""
        return True

    @property
    def page_tokens(self) -> int:
        """Tokens of a page; 0 before the first tokens."""
        return self._pager.page_tokens if self._pager else 0

    @property
    def shape(self) -> KVShape | None:
        """Heads and channels; None before the first tokens."""
        return self._pager.shape if self._pager else None

    @property
    def hot_bits(self) -> int:
        """Bits of a hot number."""
        return 8 * self._dtype.size if self._pager else 16

    @property
    def hot_bytes(self) -> int:
        """Bytes allocated for hot tokens."""
        return self._hot.nbytes

    @property
    def hot_held(self) -> int:
        """Hot tokens held, those that a window has just left behind included."""
        return self._hot.used

    @property
    def frees_pages(self) -> bool:
        """Whether sealing may free pages: those that are lowered."""
        return len(self._context.config.ladder.steps) > 1

    @property
    def kind(self) -> str:
        """How the layer is cached, for `stats`."""
        return "paged"

    @property
    def skipped(self) -> SkipCounters | None:
        """What decode steps left out of the cold pages; None where every page is read."""
        return self._selection.counters if self._selection else None

    def siblings(self) -> Iterator[PagedLayerCache]:
        """The paged layers of the same sequence, this one included."""
        return self._context.alive()

    def _settle(self) -> None:
        """Seal pages that left the hot window, and lower those that crossed a step."""
        if self._pager is None or self._table is None:
            return
        if self._may_promote:
            self._may_promote = False
            self._pager.promote(self._table.entries)
        due = self._pages_due()
        if not due:
            return
        self._wait()
        self._lower()  # first: it makes room where the new pages go
        sealed = 0
        precisions = self._page_precisions(due, self.offset)
        for precision, group in itertools.groupby(precisions):
            wanted = len(list(group))
            done = self._seal(sealed, wanted, precision)
            sealed += done
            if done < wanted:
                break  # no room (a disk error came late): the tokens simply stay hot
        if sealed:
            self._hot.remove(self.sink_tokens, sealed * self._pager.page_tokens)
            # Started and not waited for: what uses them comes later in the same stream.
            mx.async_eval(*self._hot.arrays, *self._pager.slabs)  # type: ignore[no-untyped-call]

    def _seal(self, first: int, count: int, precision: Precision) -> int:
        """Seal `count` pages from the `first` unsealed one on; returns how many it did."""
        assert self._pager is not None and self._table is not None
        tokens, sinks = self._pager.page_tokens, self.sink_tokens
        done = 0
        per_call = max(1, self._pager.run_tokens // tokens)  # bounds the memory of encoding
        while done < count:
            now = min(per_call, count - done)
            start = sinks + (first + done) * tokens
            records = self._encode(start, now, precision)
            positions = [self._sealed_end() + i * tokens for i in range(now)]
            lineage = self._context.lineage
            pages = self._pager.seal(records, precision, positions, lineage)
            for page in pages:
                self._table.append(page)
            done += len(pages)
            if len(pages) < now:
                break
            if done < count:
                mx.eval(*self._pager.slabs)
        return done

    def _encode(self, start: int, pages: int, precision: Precision) -> mx.array:
        """Records of the pages that begin at hot token `start`, lazily."""
        assert self._pager is not None
        if isinstance(self._backend, KernelBackend):
            fused, hot = self._backend.fused, self._hot.tokens
            records = fused.seal(self._pager, hot, start, pages, precision)
            if records is not None:
                return records
        keys, values = self._hot.view(start, start + pages * self._pager.page_tokens)
        return self._pager.codecs[precision].encode(keys[0], values[0])

    def _lower(self) -> None:
        """Re-encode pages that are now farther away than their precision's step."""
        assert self._pager is not None and self._table is not None
        due = list(self._to_lower(self.offset))
        if not due:
            return
        at_once = self._pager.pages_per_run  # bounds the memory of encoding
        try:
            for n, (i, entry, _, wanted) in enumerate(due, 1):
                self._table.replace(i, self._pager.lower(entry.page, wanted))
                if n % at_once == 0:
                    mx.eval(*self._pager.slabs)
        except OutOfPagesError:
            return  # keep the better precision until there is room
        finally:
            # Slots that became free are written to next: nothing may be reading them.
            mx.eval(*self._pager.slabs)

    def _to_lower(self, offset: int) -> Iterator[tuple[int, TableEntry, Precision, Precision]]:
        """Entries beyond their precision's step: index, entry, present and wanted precision."""
        if self._pager is None or self._table is None or len(self._pager.precisions) == 1:
            return
        ladder = self._context.config.ladder
        end = self.sink_tokens + self.dropped
        for i, entry in enumerate(self._table.entries):
            end += entry.tokens
            present = self._pager.pages[entry.page].precision
            if present == ladder.steps[-1]:
                continue  # as most pages are
            wanted = ladder.at(offset - end)
            if ladder.rank(wanted) > ladder.rank(present):
                yield i, entry, present, wanted

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

    def trim(self, n: int) -> int:
        """Forget the last n tokens.

        Args:
            n: tokens; more than there are means all.

        Returns:
            The tokens forgotten.
        """
        n = min(max(int(n), 0), self.offset)
        if self._table is None or n == 0:
            return n
        self._context.admitted = 0
        left = self.offset - n
        sealed_end = self._sealed_end()
        if not len(self._table):
            self._hot.truncate(left - self.dropped)
        elif left >= sealed_end:
            self._hot.truncate(left - self._table.tokens - self.dropped)
        else:
            sinks = self.sink_tokens
            self._table.trim(sealed_end - max(left, sinks))
            self._hot.truncate(min(left, sinks))
            self._may_promote = True
            self._context.forget_prefix_beyond(left)
        self.offset = left
        return n

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> PagedLayerCache:
        """Itself: pages have their own precision."""
        return self

    def fork(self, context: SequenceContext | None = None) -> PagedLayerCache:
        """A second cache with the same tokens: shares every page, copies page numbers only."""
        if self._closed:
            raise ClosedError(f"layer {self.layer}: a closed cache cannot be forked")
        twin = self._blank(context or self._context.fork())
        twin.reaches_hook, twin.readers = dict(self.reaches_hook), self.readers
        twin.take_over(self)
        return twin

    def take_over(self, other: PagedLayerCache) -> None:
        """Hold the tokens of another cache of this layer, and none else; it keeps them too."""
        if other._pager is not None and other._table is not None:
            if self._pager is None:
                self.bind(other._pager.shape, other._dtype)
            self._adopt(other._table.fork(), other._hot.share())
        self.offset, self.dropped = other.offset, other.dropped

    def compact(self) -> None:
        """Give back the memory of hot tokens that are not held any more."""
        if self._hot.used < self._hot.capacity:
            held = [mx.contiguous(array) for array in self._hot.view()]
            mx.eval(*held)
            self._hot.load(*held)

    def _blank(self, context: SequenceContext) -> PagedLayerCache:
        """An empty cache of the same kind."""
        return type(self)(context, self.layer)

    def _adopt(self, table: PageTable, hot: HotBuffer) -> None:
        assert self._pager is not None
        self._finalizer.detach()
        self._table, self._hot = table, hot
        self._finalizer = weakref.finalize(self, self._pager.abandon, table)

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedLayerCache:
        # Layers copied together (a plain list of them) stay one sequence.
        if id(self._context) not in memo:
            memo[id(self._context)] = self._context.fork()
        return self.fork(memo[id(self._context)])

    def __copy__(self) -> PagedLayerCache:
        return self.fork()

    def close(self) -> None:
        """Release pages and memory. Closing twice is fine; using it afterwards raises.

        With the last open layer of a pager its threads and files go too.
        """
        if self._table is not None:
            self._finalizer.detach()
            self._table.clear()
        self._hot = HotBuffer(0)
        self._attended = ()
        self.offset = self.dropped = 0
        self._closed = True
        self._accepted = ()
        pager, prefixes = self._context.pager, self._context.prefixes
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


def _hot_dtype(wanted: str | None, model: mx.Dtype) -> mx.Dtype:
    if wanted is None:
        return mx.bfloat16 if model == mx.bfloat16 else mx.float16
    if wanted == "model":
        return model
    return mx.float16 if wanted == "float16" else mx.bfloat16


def _selection(config: TierConfig) -> ColdSelection | None:
    if not config.selective:
        return None
    return ColdSelection(config.skip_below, config.cold_pages)

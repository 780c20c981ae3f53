"""The fused path: attention, expanding and sealing of one layer as one or two kernel launches.

Warm pages, hot tokens and pages staged from disk are attended by the same kernel, split by split.
Where splits begin depends on numbers of tokens alone, and each split is computed on its own, so
the bits of the result do not depend on where pages are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import Precision, TableEntry
from pagedkv.attn.fused.self_check import (
    COMPENSATE_TOLERANCE,
    SEAL_TOLERANCE,
    TOLERANCE,
    attend_difference,
    compensate_difference,
    expand_difference,
    seal_difference,
    works,
)
from pagedkv.attn.kernels.compensate import CompensateSpec, compensate
from pagedkv.attn.kernels.decode import (
    PRECISION_SHIFT,
    STAGED,
    SplitPlan,
    attend_and_merge,
    attend_splits,
    can_merge,
    merge_splits,
    new_turns,
    scratch_words,
)
from pagedkv.attn.kernels.expand import ExpandSpec, expand_pages
from pagedkv.attn.kernels.launch import Launcher
from pagedkv.attn.kernels.seal import SealSpec, seal_pages
from pagedkv.attn.kernels.source import MAX_PRECISIONS, AttentionSpec, group_count, supported
from pagedkv.tiers import HotTokens, LayerPager, Treatment
from pagedkv.tiers.codec.affine import AffineCodec, Sixteen
from pagedkv.tiers.codec.rounding import to_16_bit
from pagedkv.tiers.cold.prefetch import Batch

SIXTEEN = (mx.float16, mx.bfloat16)

TABLE_STEP = 512
"""Words by which a table on the device grows: 256 pages."""


@dataclass(frozen=True)
class _Stretch:
    """Consecutive splits that are launched together.

    Attributes:
        first: number of the first split.
        splits: how many.
        cold: records to stage for them, in page order; none if all pages are warm.
        kinds: for each record, the number of its precision.
    """

    first: int
    splits: int
    cold: Batch = ()
    kinds: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Words:
    """A page table in words.

    Attributes:
        entries: the pages it was made of.
        moves: the pager's count of moves then.
        words: two per page, see `_words`; not to be changed.
    """

    entries: tuple[TableEntry, ...]
    moves: int
    words: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class _Table:
    """A page table on the device, and how it is launched.

    Attributes:
        entries: the pages it was made of.
        moves: the pager's count of moves then.
        plan: the division that the stretches follow.
        array: two words per page.
        stretches: how it is launched; none if all pages are warm.
    """

    entries: tuple[TableEntry, ...]
    moves: int
    plan: SplitPlan
    array: mx.array
    stretches: tuple[_Stretch, ...]


_Launch = Callable[..., tuple[mx.array, mx.array | None]]
"""All splits and their merge: the output, and the counters for the next launch if it counts."""

_Change = Callable[[mx.array], mx.array] | None
"""What is done to page keys or values before they are rounded; None for nothing."""


@dataclass(eq=False)
class _Kind:
    """Calls that differ in nothing but the sequence's length.

    Attributes:
        rows: query rows per KV head; 0 if the kernels are not made for such calls.
        scale: multiplies the products of queries and keys.
        causal: whether a query token sees only what is before it.
        has_sinks: whether the model has attention sinks.
        windowed: whether the first tokens of the pages are behind a window.
        treated: whether pages hold transformed keys and values.
        launches: by numbers of splits and of SIMD groups.
        specs: by whether there is one split, whether one launch does all, and the SIMD groups;
            making one reads its text.
        turns: counters for the next launch that merges what it attended.
        scratch: where all launches of that chain keep partial softmaxes.
    """

    rows: int
    scale: float
    causal: bool
    has_sinks: bool
    windowed: bool
    treated: bool
    launches: dict[tuple[int, int], _Launch] = field(default_factory=dict)
    specs: dict[tuple[bool, bool, int], AttentionSpec] = field(default_factory=dict)
    turns: mx.array | None = None
    scratch: mx.array | None = None


class FusedLayer:
    """What the kernels do for one layer's cache: decode attention, expanding, sealing.

    Keeps the page table, in words and on the device, and the traced calls.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._known = _Words((), 0, np.zeros((0, 2), np.uint32))
        self._table: _Table | None = None
        self._kinds: dict[tuple[object, ...], _Kind] = {}

    def attend(
        self,
        pager: LayerPager,
        entries: tuple[TableEntry, ...],
        hot: HotTokens,
        q: mx.array,
        scale: float,
        causal: bool,
        sinks: mx.array | None,
        check: Callable[[], None],
        following: Callable[[], Sequence[Batch]],
        hidden: int = 0,
    ) -> mx.array | None:
        """Softmax attention over hot tokens and pages.

        Args:
            pager: the layer's pages.
            entries: the sequence's pages, oldest first.
            hot: the hot tokens.
            q: ``[1, query_heads, L, key_dim]``.
            scale: multiplies the products of queries and keys.
            causal: whether a query token sees only what is before it.
            sinks: the model's attention sinks, ``[query_heads]``.
            check: raises if the arguments do not fit; called for each new kind of call.
            following: the cold batches that the next layer will want.
            hidden: the first tokens of the pages that no query sees, fewer than those have.

        Returns:
            ``[1, query_heads, L, value_dim]`` in q's type, or None if the kernels are not made
            for such a call.

        Raises:
            CorruptPageError, ColdStoreError: if a cold page cannot be read.
        """
        # Every microsecond here is one per layer and token, and below 64K tokens the GPU waits for
        # it: what can be is kept, or shared by the layers of a step.
        treated = pager.treatment is not None
        key = (q.shape, q.dtype, scale, causal, sinks is not None, hidden > 0, treated)
        kind = self._kinds.get(key)
        if kind is None:
            check()
            rows = q.shape[1] * q.shape[2] // pager.shape.kv_heads
            rows = rows if takes(pager, hot, q, scale) else 0
            kind = self._kinds[key] = _Kind(rows, *key[2:])
        if not kind.rows:
            return None
        first = _first_place(entries, hidden, pager.page_tokens) if hidden else 0
        plan, params = _planned(
            len(entries),
            hot.used,
            hot.capacity,
            pager.shape.kv_heads,
            kind.rows,
            pager.page_tokens,
            pager.pages_per_run,
            treated,
            first,
        )
        table = self._table
        if (
            table is None
            or table.entries is not entries
            or table.moves != pager.moves
            or (table.stretches and table.plan is not plan)
        ):
            table = self._prepare(pager, entries, plan)
        if table.stretches:
            if not self._attend_works(pager, self._spec(pager, q, kind, plan, False)):
                return None
            return self._streamed(pager, table, hot, q, kind, sinks, following(), first)
        launch = kind.launches.get((plan.splits, plan.warps))
        if launch is None:
            spec = self._spec(pager, q, kind, plan, self._launcher.together and can_merge(plan))
            if not self._attend_works(pager, spec):
                return None
            launch = self._whole(spec, plan)
            kind.launches[plan.splits, plan.warps] = launch
            if kind.turns is None:
                kind.turns = new_turns(spec)
            kind.scratch = _scratch(kind.scratch, scratch_words(spec, plan))
        logits = _logits(sinks)
        more = [*_slabs(pager), *_matrices(pager), *([] if logits is None else [logits])]
        counting = (kind.turns, kind.scratch)
        out, turns = launch(q, params, table.array, hot.keys, hot.values, *counting, *more)
        # Of two launches that nothing else orders, each now has counters of its own.
        kind.turns = turns if turns is not None else kind.turns
        return out

    def _attend_works(self, pager: LayerPager, spec: AttentionSpec) -> bool:
        """Whether the decode kernels pass their self-check."""
        return self._works(
            spec.attend.name,
            lambda: attend_difference(self._launcher, spec, list(pager.codecs.values())),
            TOLERANCE[mx.bfloat16 if spec.query_bfloat else mx.float16],
        )

    def _works(self, name: str, check: Callable[[], float], tolerance: float) -> bool:
        """Whether a kernel passes its self-check; checked once in a process."""
        return self._launcher.trusted or works(name, check, tolerance)

    def _whole(self, spec: AttentionSpec, plan: SplitPlan) -> _Launch:
        """All splits and their merge as one function.

        It is traced by `mx.compile`, not to be optimized, but because a kernel that is called
        anew builds its whole text again, which takes longer than everything else here.
        """
        launcher = self._launcher

        def run(
            q: mx.array,
            params: mx.array,
            table: mx.array,
            keys: mx.array,
            values: mx.array,
            turns: mx.array,
            scratch: mx.array,
            *more: mx.array,
        ) -> tuple[mx.array, mx.array | None]:
            more, logits = (more[:-1], more[-1]) if spec.has_sinks else (more, None)
            slabs, matrices = (more[:-1], more[-1]) if spec.treated else (more, None)
            given = (launcher, spec, plan, q, params, table, (keys, values))
            if spec.together:
                return attend_and_merge(*given, slabs, logits, turns, scratch, matrices)
            sources = [array for slab in slabs for array in (slab, slab)]
            out, stats = attend_splits(*given, sources, plan.splits, matrices)
            if not spec.final:
                out = merge_splits(launcher, spec, q, out, stats, params, logits)
            return out, None

        return mx.compile(run) if launcher.traceable else run

    def _streamed(
        self,
        pager: LayerPager,
        table: _Table,
        hot: HotTokens,
        q: mx.array,
        kind: _Kind,
        sinks: mx.array | None,
        following: Sequence[Batch],
        visible: int,
    ) -> mx.array:
        """Stretch by stretch, while the next one's cold pages are read."""
        plan = table.plan
        spec = self._spec(pager, q, kind, plan, False)
        pages, capacity = len(table.entries), hot.capacity
        arrays, matrices = (hot.keys, hot.values), next(iter(_matrices(pager)), None)
        given = (self._launcher, spec, plan, q)
        pieces: list[list[mx.array]] = []
        for stretch, sources in _sources(pager, table, following):
            params = _params(plan, pages, hot.used, capacity, stretch.first, visible)
            piece = attend_splits(
                *given, params, table.array, arrays, sources, stretch.splits, matrices
            )
            if spec.final:
                return piece[0]
            if stretch.cold:
                mx.async_eval(*piece)  # type: ignore[no-untyped-call]
                if pieces:  # at most two stretches' pages are in memory
                    mx.eval(*pieces[-1])
            pieces.append(piece)
        partial, stats = (mx.concatenate(list(parts)) for parts in zip(*pieces, strict=True))
        params = _params(plan, pages, hot.used, capacity, 0, visible)
        return merge_splits(self._launcher, spec, q, partial, stats, params, _logits(sinks))

    def seal(
        self, pager: LayerPager, hot: HotTokens, first: int, pages: int, precision: Precision
    ) -> mx.array | None:
        """Page records of hot tokens, lazily.

        Args:
            pager: of the layer.
            hot: the hot tokens.
            first: the hot token with which the first page begins.
            pages: how many follow each other from there.
            precision: of the pages.

        Returns:
            uint32 ``[pages, page_bytes / 4]``, or None if the kernel is not made for this layer.
        """
        if hot.keys.dtype not in SIXTEEN or not supported(*_dims(pager)):
            return None
        codec, arrays = pager.codecs[precision], (hot.keys, hot.values)
        if pager.treatment is not None:
            dtype = mx.float16 if precision.quantized else hot.keys.dtype
            changes = self._compensation(codec, False), self._compensation(codec, True)
            arrays = _sealed_from(
                pager.treatment, pager.page_tokens, hot, first, pages, dtype, changes
            )
            codec, first = codec.untreated, 0
        spec = _seal_spec(codec.geometry, arrays[0].dtype == mx.bfloat16)
        if not self._works(
            spec.text.name, lambda: seal_difference(self._launcher, spec, codec), SEAL_TOLERANCE
        ):
            return None
        return seal_pages(self._launcher, spec, arrays, first, pages)

    def _compensation(self, codec: AffineCodec | Sixteen, values: bool) -> _Change:
        """What makes up for errors of page keys, or values, before they are rounded."""
        if not isinstance(codec, AffineCodec):
            return None
        feedback = codec.value_feedback if values else codec.feedback
        if feedback is None:
            return None
        spec = _compensate_spec(codec.geometry, values)
        if spec.fits and self._works(
            spec.text.name,
            lambda: compensate_difference(self._launcher, spec),
            COMPENSATE_TOLERANCE,
        ):
            return lambda numbers: compensate(self._launcher, spec, numbers, feedback)
        if values:
            return codec.compensated_values
        return lambda keys: codec.compensated(keys.swapaxes(2, 3)).swapaxes(2, 3)

    def expand(
        self,
        pager: LayerPager,
        entries: tuple[TableEntry, ...],
        hot: HotTokens,
        sinks: int,
        dtype: mx.Dtype,
    ) -> tuple[mx.array, mx.array] | None:
        """All keys and values in token order, dequantized, lazily; as in pages if they are treated.

        Args:
            pager: of the layer.
            entries: the sequence's pages, oldest first.
            hot: the hot tokens.
            sinks: how many of them come before the pages.
            dtype: of the result.

        Returns:
            ``[1, kv_heads, tokens, key_dim]`` and ``[1, kv_heads, tokens, value_dim]``, or None
            if the kernel is not made for this: another type, or cold pages.
        """
        made_for = dtype in SIXTEEN and hot.keys.dtype in SIXTEEN and supported(*_dims(pager))
        if not made_for:
            return None
        pages = self._words(pager, entries)
        if (pages[:, 0] & STAGED).any():
            return None
        spec = _expand_spec(
            tuple(codec.geometry for codec in pager.codecs.values()),
            pager.shape,
            pager.page_tokens,
            dtype == mx.bfloat16,
            hot.keys.dtype == mx.bfloat16,
        )
        codecs = list(pager.codecs.values())
        if not self._works(
            spec.text.name,
            lambda: expand_difference(self._launcher, spec, codecs),
            TOLERANCE[dtype],
        ):
            return None
        sources = [array for slab in _slabs(pager) for array in (slab, slab)]
        arrays = (hot.keys, hot.values)
        if pager.treatment is not None:
            arrays = _sealed_from(pager.treatment, hot.used, hot, 0, 1, hot.keys.dtype)
        return expand_pages(self._launcher, spec, pages, arrays, hot.used, sinks, sources)

    def cold_batches(
        self, pager: LayerPager, entries: tuple[TableEntry, ...], hot: int, rows: int
    ) -> list[Batch]:
        """What `attend` will read from disk, in order.

        Args:
            pager: the layer's pages.
            entries: the sequence's pages.
            hot: hot tokens.
            rows: query rows per KV head.
        """
        heads, treated = pager.shape.kv_heads, pager.treatment is not None
        sizes = (len(entries), hot, heads, rows, pager.page_tokens, pager.pages_per_run)
        plan = _plan(*sizes, treated)
        return [s.cold for s in self._prepare(pager, entries, plan).stretches if s.cold]

    def _spec(
        self, pager: LayerPager, q: mx.array, kind: _Kind, plan: SplitPlan, together: bool
    ) -> AttentionSpec:
        """The kernels of a kind of call; made once."""
        final = plan.splits == 1 and not kind.has_sinks and not kind.treated
        key = (final, together and not final, plan.warps)
        spec = kind.specs.get(key)
        if spec is None:
            spec = kind.specs[key] = AttentionSpec(
                geometries=tuple(codec.geometry for codec in pager.codecs.values()),
                heads=pager.shape.kv_heads,
                key_dim=pager.shape.key_dim,
                value_dim=pager.shape.value_dim,
                page_tokens=pager.page_tokens,
                rows=kind.rows,
                query_tokens=int(q.shape[2]),
                sequences=1,
                scale=kind.scale,
                query_bfloat=q.dtype == mx.bfloat16,
                hot_bfloat=pager.hot_dtype == mx.bfloat16,
                causal=kind.causal,
                final=final,
                together=together and not final,
                has_sinks=kind.has_sinks,
                warps=plan.warps,
                fetch_ahead=self._launcher.fetch_ahead,
                windowed=kind.windowed,
                treated=kind.treated,
            )
        return spec

    def _prepare(
        self, pager: LayerPager, entries: tuple[TableEntry, ...], plan: SplitPlan
    ) -> _Table:
        """The table on the device, for one division of it."""
        words = self._words(pager, entries).copy()
        stretches = tuple(_stretches(pager, entries, plan, words))
        # Sizes in steps, for a traced call is traced again for each new shape.
        flat = np.zeros(-(-max(1, words.size) // TABLE_STEP) * TABLE_STEP, np.uint32)
        flat[: words.size] = words.reshape(-1)
        self._table = _Table(entries, pager.moves, plan, mx.array(flat), stretches)
        return self._table

    def _words(self, pager: LayerPager, entries: tuple[TableEntry, ...]) -> npt.NDArray[np.uint32]:
        """The table in words: what is known of it is kept while nothing moves."""
        known = self._known
        same = _in_common(entries, known.entries) if known.moves == pager.moves else 0
        if same < len(entries) or same < len(known.entries):
            words = np.concatenate([known.words[:same], _words(pager, entries[same:])])
            self._known = known = _Words(entries, pager.moves, words)
        return known.words


def _slabs(pager: LayerPager) -> list[mx.array]:
    """The page arrays; another stands in for one without slots, for Metal takes no empty ones."""
    slabs = pager.slabs
    if pager.all_slabs_have_slots:
        return slabs
    stand_in = next((slab for slab in slabs if slab.size), _zeros())
    return [slab if slab.size else stand_in for slab in slabs]


def _matrices(pager: LayerPager) -> list[mx.array]:
    """What the kernels read of a treatment, if there is one."""
    return [] if pager.treatment is None else [pager.treatment.words]


def _sealed_from(
    treatment: Treatment,
    tokens: int,
    hot: HotTokens,
    first: int,
    pages: int,
    dtype: mx.Dtype,
    changes: tuple[_Change, _Change] = (None, None),
) -> tuple[mx.array, mx.array]:
    """Hot keys and values as a treated layer's pages have them.

    Args:
        treatment: of the layer.
        tokens: of a page; each is multiplied by itself, as the codec does it.
        hot: the hot tokens.
        first: where the first page begins.
        pages: how many.
        dtype: of the result, 16 bit.
        changes: what else is done to page keys and values, ``[pages, kv_heads, tokens, dim]``.

    Returns:
        ``[1, kv_heads, pages * tokens, dim]``, twice.
    """

    def split(x: mx.array) -> mx.array:
        x = x[0, :, first : first + pages * tokens]
        return x.reshape(x.shape[0], pages, tokens, x.shape[2]).swapaxes(0, 1)

    def joined(x: mx.array) -> mx.array:
        return x.swapaxes(0, 1).reshape(1, x.shape[1], pages * tokens, x.shape[3])

    keys = to_16_bit(treatment.page_keys(split(hot.keys)), dtype)
    values = to_16_bit(treatment.page_values(split(hot.values)), dtype)
    change_keys, change_values = changes
    keys = change_keys(keys) if change_keys else keys
    values = change_values(values) if change_values else values
    return joined(keys), joined(values)


def _in_common(entries: tuple[TableEntry, ...], old: tuple[TableEntry, ...]) -> int:
    """How many of the very same entries come first in both: a number may be a new page's."""
    same = list(map(operator.is_, entries, old))
    return same.index(False) if False in same else len(same)


# Making a text reads and hashes it: not for each layer of each chunk.
_seal_spec = lru_cache(maxsize=64)(SealSpec)
_compensate_spec = lru_cache(maxsize=64)(CompensateSpec)
_expand_spec = lru_cache(maxsize=64)(ExpandSpec)


def takes(pager: LayerPager, hot: HotTokens, q: mx.array, scale: float) -> bool:
    """Whether the kernels are made for this call; other calls take the composed path."""
    return (
        q.dtype in SIXTEEN
        and hot.keys.dtype in SIXTEEN
        and scale > 0
        and len(pager.codecs) <= MAX_PRECISIONS
        and supported(*_dims(pager))
    )


def _dims(pager: LayerPager) -> tuple[int, int]:
    return pager.shape.key_dim, pager.shape.value_dim


@lru_cache(maxsize=64)
def _planned(
    pages: int,
    hot: int,
    capacity: int,
    heads: int,
    rows: int,
    page_tokens: int,
    pages_per_run: int,
    treated: bool,
    visible: int,
) -> tuple[SplitPlan, mx.array]:
    """How to divide a sequence, and what the kernels read of that: the same for all layers."""
    plan = _plan(pages, hot, heads, rows, page_tokens, pages_per_run, treated)
    return plan, _params(plan, pages, hot, capacity, 0, visible)


def _first_place(entries: Sequence[TableEntry], hidden: int, page_tokens: int) -> int:
    """Where the first visible token is, a page having so many places whether full or not."""
    page = 0
    while hidden >= entries[page].tokens:
        hidden -= entries[page].tokens
        page += 1
    return page * page_tokens + hidden


def _plan(
    pages: int,
    hot: int,
    heads: int,
    rows: int,
    page_tokens: int,
    pages_per_run: int,
    treated: bool,
) -> SplitPlan:
    # In steps, so that a plan lasts.
    parallel = heads * group_count(rows)
    return _choose(pages, -(-hot // 64) * 64, parallel, page_tokens, pages_per_run, treated)


_choose = lru_cache(maxsize=64)(SplitPlan.choose)


@lru_cache(maxsize=64)
def _params(
    plan: SplitPlan, pages: int, hot: int, capacity: int, first: int, visible: int
) -> mx.array:
    """Sizes, on the device."""
    return mx.array(plan.params(pages, hot, capacity, pages, first, visible), mx.uint32)


def _logits(sinks: mx.array | None) -> mx.array | None:
    """Attention sinks in float32, at least eight."""
    if sinks is None:
        return None
    logits = sinks.astype(mx.float32).reshape(-1)
    return logits if logits.size >= 8 else mx.pad(logits, (0, 8 - logits.size))


def _scratch(present: mx.array | None, words: int) -> mx.array:
    """Scratch of at least so many words, in powers of two: a call is traced for each size."""
    if present is not None and present.size >= words:
        return present
    scratch = mx.zeros(1 << max(3, (words - 1).bit_length()), mx.uint32)
    mx.eval(scratch)
    return scratch


@lru_cache(maxsize=1)
def _zeros() -> mx.array:
    zeros = mx.zeros(8, mx.uint32)
    mx.eval(zeros)
    return zeros


def _words(pager: LayerPager, entries: Sequence[TableEntry]) -> npt.NDArray[np.uint32]:
    """Two words per page: where it is, valid tokens. `_stretches` tells a cold page's slot."""
    kinds = {precision: i << PRECISION_SHIFT for i, precision in enumerate(pager.codecs)}
    words = []
    for entry in entries:
        page = pager.pages[entry.page]
        slot = STAGED if page.slot is None else page.slot
        words.append((kinds[page.precision] | slot, entry.tokens))
    return np.array(words, np.uint32).reshape(-1, 2)


def _stretches(
    pager: LayerPager,
    entries: Sequence[TableEntry],
    plan: SplitPlan,
    words: npt.NDArray[np.uint32],
) -> Iterator[_Stretch]:
    """Cut the splits where staging ends; cold pages get their place in staging in `words`."""
    cold_pages = np.flatnonzero(words[:, 0] & STAGED)
    if not len(cold_pages):
        return
    groups = pager.page_tokens // 64
    pages_of_split = max(1, plan.tiles_per_split // groups)
    step = max(1, pager.pages_per_run // pages_of_split) * pages_of_split
    begin = 0  # the first split that has not been launched
    for start in range(0, len(entries), step):
        stop = min(start + step, len(entries))
        stop_split = -(-stop * groups // plan.tiles_per_split)
        cold = cold_pages[(cold_pages >= start) & (cold_pages < stop)]
        if not len(cold):
            continue
        first = start * groups // plan.tiles_per_split
        if first > begin:
            yield _Stretch(begin, first - begin)
        taken = [0] * MAX_PRECISIONS
        kinds, records = [], []
        for i in cold:
            record = pager.pages[entries[i].page].record
            assert record is not None
            kind = int(words[i, 0] >> PRECISION_SHIFT) & (MAX_PRECISIONS - 1)
            words[i, 0] = STAGED | kind << PRECISION_SHIFT | taken[kind]
            taken[kind] += 1
            kinds.append(kind)
            records.append(record)
        yield _Stretch(first, stop_split - first, tuple(records), tuple(kinds))
        begin = stop_split
    if begin < plan.splits:
        yield _Stretch(begin, plan.splits - begin)


def _sources(
    pager: LayerPager, table: _Table, following: Sequence[Batch]
) -> Iterator[tuple[_Stretch, list[mx.array]]]:
    """Each stretch with the page arrays to read: slab and staging of every precision."""
    slabs = _slabs(pager)
    staged = pager.stream([s.cold for s in table.stretches if s.cold], following)
    for stretch in table.stretches:
        sources = [array for slab in slabs for array in (slab, slab)]
        if stretch.cold:
            rows = next(staged)
            sizes = [record.nbytes for record in stretch.cold]
            starts = np.cumsum([0, *sizes])
            for kind in set(stretch.kinds):
                mine = [
                    rows[a : a + n]
                    for a, n, k in zip(starts, sizes, stretch.kinds, strict=False)
                    if k == kind
                ]
                pages = np.stack(mine) if len(set(stretch.kinds)) > 1 else rows
                words = stretch.cold[stretch.kinds.index(kind)].nbytes // 4
                # Copies out of staging.
                sources[2 * kind + 1] = mx.array(pages.view(np.uint32).reshape(-1, words))
        yield stretch, sources

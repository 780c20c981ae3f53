"""Giving an mlx-lm model a paged cache, and taking it away again."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx

from pagedkv import hook, sequences, state
from pagedkv.allocator import KVShape, Ladder, LayerLadders
from pagedkv.attention import KVView
from pagedkv.cache import PagedCache
from pagedkv.config import TierConfig, lookup_count, names_file
from pagedkv.context import SequenceContext
from pagedkv.errors import CacheStateError, ConfigError
from pagedkv.layer import PagedLayerCache
from pagedkv.layer_weights import Spreads
from pagedkv.lookup_layers import lookup_layers
from pagedkv.model_facts import (
    context_limit,
    fingerprint,
    require_model,
    stock_maker,
    weights_of,
)
from pagedkv.prefixes import Prefixes
from pagedkv.streams import inner_caches, replaced, streams
from pagedkv.tiers import HotTokens, Pager
from pagedkv.treatments import FirstTokens, choose_treatments, choosers_for, name_of

_WRAPPED = "_pagedkv_wrapping"


@dataclass(frozen=True)
class LayerProbe:
    """What a layer was seen to cache when the model's graph was built once, without running it.

    Attributes:
        shape: heads and channels per token.
        dtype: of the keys.
        reaches_hook: whether both tags arrived at attention, for one query token (True) and for
            several (False).
        readers: how many times they did per call; more than one where layers share keys.
    """

    shape: KVShape
    dtype: mx.Dtype
    reaches_hook: dict[bool, bool]
    readers: int


@dataclass
class Wrapping:
    """What `wrap` knows of a model.

    Attributes:
        config: the user's settings.
        pager: tiers that all caches of this model share.
        stock: makes the caches the model would have had.
        fingerprint: of the model.
        max_tokens: the model's context limit, if it states one.
        probes: per stream's number, for the streams that were seen to cache keys and values.
        prefixes: what its caches remember.
    """

    config: TierConfig
    pager: Pager
    stock: Callable[[], list[Any]]
    fingerprint: str
    max_tokens: int | None
    probes: dict[int, LayerProbe] = field(default_factory=dict)
    prefixes: Prefixes = field(default_factory=Prefixes)

    def make_cache(self) -> PagedCache:
        """A new, empty cache; what `model.make_cache` returns while the model is wrapped."""
        from pagedkv.mlx_lm_cache import paged_kind

        context = SequenceContext(
            self.config,
            self.pager,
            fingerprint=self.fingerprint,
            max_tokens=self.max_tokens,
            prefixes=self.prefixes,
        )

        def paged(number: int, stock: Any) -> Any:
            kind = paged_kind(stock)
            if kind is None:
                return stock
            cache = kind(context, number)
            if probe := self.probes.get(number):
                cache.bind(probe.shape, probe.dtype)
                cache.reaches_hook.update(probe.reaches_hook)
                cache.readers = probe.readers
            return cache

        return PagedCache(replaced(self.stock(), paged), context)


def wrap(model: Any, config: TierConfig | None = None) -> PagedCache:
    """Give a model a paged cache.

    From now on `mlx_lm.generate`, `stream_generate` and everything else that asks the model for
    a cache gets a paged one; pass the returned cache as ``prompt_cache=`` to keep it in hand.
    Layers with a sliding window hold what that needs. Those whose cache is of a kind that cannot be
    paged (docs/models.md) keep it, as ``stats().layers`` says.
    Wrapping again replaces the settings for caches made from then on.

    Args:
        model: an mlx-lm model (`mlx.nn.Module` with ``layers``).
        config: tiers; the default if None.

    Returns:
        An empty cache, one entry per layer.

    Raises:
        ConfigError: if this is no such model, none of its layers can be paged, or a budget is
            smaller than one page.
    """
    config = config or TierConfig()
    require_model(model)
    if (earlier := wrapping_of(model)) and (cache := _wrapped_already(earlier, model, config)):
        return cache
    stock = stock_maker(model)
    from pagedkv.mlx_lm_cache import paged_kind, register

    register()
    kinds = stock()
    pageable = {i for i, cache in enumerate(streams(kinds)) if paged_kind(cache)}
    if not pageable:
        names = ", ".join(sorted({type(c).__name__ for c in streams(kinds)}))
        raise ConfigError(
            f"none of the {len(kinds)} layers of {type(model).__name__} caches keys and values in "
            f"a way that can be paged (they use {names}): there is nothing to page"
        )
    config.require_layers(pageable)
    name = fingerprint(model)
    wrapping = Wrapping(
        config,
        Pager(config.budget(), len(pageable)),
        stock,
        name,
        context_limit(model),
        prefixes=Prefixes(weights_of(model), lasting=True),
    )
    hook.install()
    try:
        wrapping.probes = _probe(model, kinds, pageable)
        _settle(wrapping, model, kinds)
        cache = wrapping.make_cache()
    except BaseException:
        wrapping.pager.close()
        hook.uninstall()
        raise
    unwrap(model)  # only now: a call that fails leaves an earlier wrapping as it was
    object.__setattr__(model, _WRAPPED, wrapping)
    object.__setattr__(model, "make_cache", wrapping.make_cache)
    return cache


def _settle(wrapping: Wrapping, model: Any, kinds: list[Any]) -> None:
    """Settle what layers' pages are like: their precision, and what is done before it.

    What a store holds decides, for there may be pages in it.

    Args:
        wrapping: of the model, its tiers not open yet.
        model: of mlx-lm.
        kinds: its stock caches.
    """
    from pagedkv.mlx_lm_cache import keeps_all

    pager, name, config = wrapping.pager, wrapping.fingerprint, wrapping.config
    shapes = _plain_layers(kinds, wrapping.probes)
    spreads = Spreads(model, shapes)

    def treat(some: Mapping[int, KVShape]) -> dict[int, FirstTokens]:
        ladders = pager.budget.ladders
        chosen = choose_treatments(model, config, some, name, spreads, ladders)
        choosers = choosers_for(model, config, some, chosen, spreads, ladders)
        pager.treatments |= chosen
        pager.choosers |= choosers
        return choosers

    choosers = treat(shapes)
    told = name_of(config, pager.treatments, any(c.keys for c in choosers.values()))
    # Those that see the whole context, and whose queries can be seen.
    hooked = {n for n, probe in wrapping.probes.items() if probe.reaches_hook.get(False)}
    candidates = hooked & {n for n, cache in enumerate(streams(kinds)) if keeps_all(cache)}
    open_layers = config.lookup_ladder is not None and lookup_count(len(candidates)) > 0
    pager.identity = config.store_identity(name, pager.layers, told, found=open_layers)
    if open_layers:
        found = sequences.kept_layers(pager, candidates)
        if found is None:
            found = lookup_layers(model, candidates, name)
        ladder = cast(Ladder, config.lookup_ladder)
        pager.set_ladders(LayerLadders.of_layers(config.ladder, dict.fromkeys(found, ladder)))
        for number in found:
            pager.settle(number, None)
        treat({number: shapes[number] for number in found if number in shapes})
    if pager.has_cold:  # opened now: a bad directory shows here, not in mid-text
        sequences.settle_treatments(pager, name, shapes)


def _plain_layers(kinds: list[Any], probes: dict[int, LayerProbe]) -> dict[int, KVShape]:
    """What layers with one cache each keep, by number: streams and layers have the same then."""
    if any(inner_caches(cache) is not None for cache in kinds):
        return {}
    return {number: probe.shape for number, probe in probes.items()}


def _wrapped_already(earlier: Wrapping, model: Any, config: TierConfig) -> PagedCache | None:
    """A cache of the earlier wrapping, if it holds the store that this one would open."""
    if earlier.pager.identity is None:
        return None
    if not earlier.pager.users:  # its caches were dropped, not closed
        earlier.pager.close()
    elif earlier.config == config and not _calibrated_since(earlier, model):
        return earlier.make_cache()
    elif earlier.prefixes.alone(earlier.pager):
        earlier.prefixes.clear()  # the last of them closes the store
    return None


def _calibrated_since(earlier: Wrapping, model: Any) -> bool:
    """Whether the calibration file that the earlier wrapping read is another one now."""
    if not names_file(earlier.config.treatment):
        return False
    ladders = earlier.pager.budget.ladders
    now = choose_treatments(model, earlier.config, {}, earlier.fingerprint, ladders=ladders)
    return now != earlier.pager.treatments


def unwrap(model: Any) -> None:
    """Give the model its own caches back; caches made while it was wrapped stay usable.

    What they remember of sequences is given up. Nothing happens to a model that is not wrapped.
    """
    wrapping = wrapping_of(model)
    if wrapping is None:
        return
    wrapping.prefixes.lasting = False
    wrapping.prefixes.clear()
    object.__delattr__(model, "make_cache")
    object.__delattr__(model, _WRAPPED)
    hook.uninstall()


def wrapping_of(model: Any) -> Wrapping | None:
    """What `wrap` made of the model; None if it is not wrapped."""
    return cast("Wrapping | None", getattr(model, "__dict__", {}).get(_WRAPPED))


def load(path: str | os.PathLike[str], model: Any, config: TierConfig | None = None) -> PagedCache:
    """Load a cache that `PagedCache.save` wrote.

    Args:
        path: of the file.
        model: the model that it was made with; wrapped here if it is not yet.
        config: tiers to use if the model is not wrapped; the saved ones if None.

    Returns:
        The cache, ready to be passed as ``prompt_cache=``.

    Raises:
        CacheStateError: if the file is damaged, or was made with another model.
        OutOfPagesError: if the budgets do not hold it.
    """
    states = state.load_states(path)
    metas = [state.parse_meta(s) for s in states]
    require_model(model)
    mine = fingerprint(model)
    if not metas or metas[0]["fingerprint"] != mine:
        theirs = metas[0]["fingerprint"] if metas else "nothing"
        raise CacheStateError(
            f"{str(path)!r} was made with another model: it belongs to {theirs}, this one is {mine}"
        )
    wrapping = wrapping_of(model)
    if wrapping is None:
        cache = wrap(model, config or state.saved_config(metas[0]))
    else:
        cache = wrapping.make_cache()
    try:
        for layer, meta, saved in zip(cache.paged_layers, metas, states, strict=True):
            state.restore(layer, meta, saved)
    except BaseException:
        cache.close()
        if wrapping is None:
            unwrap(model)
        raise
    return cache


def resume(
    model: Any, config: TierConfig | None = None, *, sequence: str | None = None
) -> PagedCache:
    """Go on with a sequence that `PagedCache.flush` put into ``cold_dir``, bit for bit.

    Args:
        model: the model that it was made with; wrapped here if it is not yet.
        config: tiers, as for `wrap`: the ``cold_dir`` of that time, and the same settings but for
            budgets; those of a model that is wrapped already if None.
        sequence: its name, if there are several; the one that was flushed last if None.

    Returns:
        The cache, with the tokens of the last flush, ready to be passed as ``prompt_cache=``.

    Raises:
        ConfigError: if there is no ``cold_dir``.
        SequenceNotFoundError, StoreMismatchError, CorruptStoreError, CorruptPageError,
        StoreLockedError, UnsafeStoreError, ColdStoreError: see `PagedCache.resume`.
    """
    require_model(model)
    wrapping = wrapping_of(model)
    cache = wrapping.make_cache() if wrapping and config is None else wrap(model, config)
    try:
        cache.resume(sequence)
    except BaseException:
        cache.close()
        if wrapping is None:
            unwrap(model)
        raise
    return cache


# Looking at a model


class _ProbeCache(PagedLayerCache):
    """Stands in for a layer's cache while the graph is built; remembers what it is given."""

    def __init__(self, inner: Any) -> None:  # no tiers: nothing is ever stored
        self._inner = inner
        self.offset = 0
        self.seen: tuple[KVShape, mx.Dtype] | None = None
        self.reached = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.seen = (
            KVShape(int(keys.shape[1]), int(keys.shape[3]), max(1, int(values.shape[3]))),
            keys.dtype,
        )
        self._fetched = keys, values
        return self.keys_and_values()

    @property
    def keys(self) -> mx.array | None:
        return self._fetched[0]

    @keys.setter
    def keys(self, array: mx.array) -> None: ...

    @property
    def values(self) -> mx.array | None:
        return self._fetched[1]

    @values.setter
    def values(self, array: mx.array) -> None: ...

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        keys, values = self._fetched
        view = KVView(None, (), HotTokens(keys, values, int(keys.shape[2]), int(keys.shape[2])), 0)
        return hook.tag_pair(self, view, keys, values)

    def attend_tagged(
        self,
        view: KVView,
        q: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array:
        self.reached += 1
        return mx.zeros((*q.shape[:3], view.values.shape[3]), q.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


PROBE_TOKENS = (1, 2, 64)
"""Prompt lengths at which a model's graph is looked at; models may treat short ones apart."""


def _probe(model: Any, kinds: list[Any], pageable: set[int]) -> dict[int, LayerProbe]:
    """Build the model's graph for a few prompt lengths and note what each layer does.

    MLX is lazy: nothing is computed. A model that cannot be called this way is not an error; its
    layers are learned when they are first used.
    """
    probes: dict[int, LayerProbe] = {}
    for tokens in PROBE_TOKENS:
        caches = replaced(copy.deepcopy(kinds), lambda i, c: _ProbeCache(c) if i in pageable else c)
        try:
            model(mx.zeros((1, tokens), mx.int32), cache=caches)
        except Exception:
            return {}
        probed = list(streams(caches))
        for i in pageable:
            seen = probed[i].seen
            if seen is None:
                continue
            shape, dtype = seen
            known = probes.get(i) or LayerProbe(shape, dtype, {}, 1)
            single, reached = tokens == 1, probed[i].reached
            known.reaches_hook[single] = known.reaches_hook.get(single, True) and reached > 0
            probes[i] = LayerProbe(shape, dtype, known.reaches_hook, max(known.readers, reached))
    return probes

"""Giving an mlx-lm model a paged cache, and taking it away again."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import mlx.core as mx

from pagedkv.allocator import KVShape, Ladder, LayerLadders
from pagedkv.cache import sdpa_hook as hook
from pagedkv.cache.nested import inner_caches, replaced, streams
from pagedkv.cache.paged_cache import PagedCache
from pagedkv.cache.persistence import snapshot as state
from pagedkv.cache.persistence import store as sequences
from pagedkv.config.tier_config import AUTO, TierConfig, lookup_count, names_file, require_config
from pagedkv.errors import CacheStateError, ConfigError
from pagedkv.integrations.mlx_lm.model_info import (
    asked_kv_size,
    context_limit,
    fingerprint,
    require_model,
    stock_maker,
    weights_of,
)
from pagedkv.integrations.mlx_lm.probe import LayerProbe, left_as_it_was, probe
from pagedkv.integrations.mlx_lm.retrieval_layers import lookup_layers, must_look
from pagedkv.integrations.mlx_lm.treatments import choose_treatments, name_of
from pagedkv.integrations.mlx_nn import hooked
from pagedkv.sequence.prefix_cache import Prefixes
from pagedkv.sequence.sequence import SequenceContext
from pagedkv.tiers import Pager
from pagedkv.tiers.turn import Turn, exclusive

_WRAPPED = "_pagedkv_wrapping"

_SET = (_WRAPPED, "make_cache", "__reduce_ex__")
"""What a wrapped model has that is not its own."""


@dataclass
class Wrapping:
    """What `wrap` knows of a model.

    Attributes:
        config: the user's settings.
        pager: tiers that all caches of this model share.
        stock: makes the caches the model would have had.
        fingerprint: of the model.
        max_tokens: the model's context limit, if it states one.
        own_caches: whether the model's class makes its caches, so that mlx-lm bounds none.
        probes: per stream's number, for the streams that were seen to cache keys and values.
        left: numbers of the streams that keep their stock cache, for they hold no numbers to round.
        prefixes: what its caches remember.
    """

    config: TierConfig
    pager: Pager
    stock: Callable[[], list[Any]]
    fingerprint: str
    max_tokens: int | None
    own_caches: bool
    probes: dict[int, LayerProbe] = field(default_factory=dict)
    left: frozenset[int] = frozenset()
    prefixes: Prefixes[Any] = field(default_factory=Prefixes)

    @property
    def _turn(self) -> Turn:
        return self.pager.turn

    def make_cache(self) -> PagedCache:
        """A new, empty cache; what `model.make_cache` returns while the model is wrapped.

        Raises:
            ConfigError: if mlx-lm was asked for a bounded one, which the store cannot hold.
        """
        return self._make_cache(self._bounded(asked_kv_size(sys._getframe(1))))

    @exclusive
    def _make_cache(self, config: TierConfig) -> PagedCache:
        from pagedkv.integrations.mlx_lm.caches import paged_kind

        context = SequenceContext(
            config,
            self.pager,
            fingerprint=self.fingerprint,
            max_tokens=self.max_tokens,
            prefixes=self.prefixes,
        )

        def paged(number: int, stock: Any) -> Any:
            kind = paged_kind(stock)
            if kind is None or number in self.left:
                return stock
            cache = kind(context, number)
            if probe := self.probes.get(number):
                cache.bind(probe.shape, probe.dtype)
                cache.reaches_hook.update(probe.reaches_hook)
                cache.readers = probe.readers
                cache.in_step, cache.splits = probe.in_step, probe.splits
            return cache

        return PagedCache(replaced(self.stock(), paged), context)

    def _bounded(self, size: int | None) -> TierConfig:
        """The settings of a cache that the caller wants bounded, as mlx-lm's own would be."""
        if size in (None, self.config.max_kv_size) or self.own_caches:
            return self.config
        if self.pager.identity is not None:
            raise ConfigError(
                f"max_kv_size={size} was asked of mlx-lm, and what cold_dir keeps has "
                f"max_kv_size={self.config.max_kv_size}: wrap the model with "
                f"TierConfig(max_kv_size={size})"
            )
        return replace(self.config, max_kv_size=size)


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
    config = require_config(config)
    require_model(model)
    if (earlier := wrapping_of(model)) and (cache := _wrapped_already(earlier, model, config)):
        return cache
    stock = stock_maker(model)
    from pagedkv.integrations.mlx_lm.caches import paged_kind, register

    register()
    kinds = stock()
    pageable = {i for i, cache in enumerate(streams(kinds)) if paged_kind(cache)}
    _require_some(pageable, model, kinds)
    with hooked(), left_as_it_was(model):
        probes = probe(model, kinds, pageable)
    # Flags of tokens (glm5_next of mlx-vlm) are no keys.
    left = {i for i, seen in probes.items() if not mx.issubdtype(seen.dtype, mx.floating)}
    pageable -= left
    _require_some(pageable, model, kinds)
    config.require_layers(pageable)
    name = fingerprint(model)
    wrapping = Wrapping(
        config,
        Pager(config.budget(), len(pageable)),
        stock,
        name,
        context_limit(model),
        hasattr(type(model), "make_cache"),
        {number: seen for number, seen in probes.items() if number not in left},
        frozenset(left),
        prefixes=Prefixes(weights_of(model), lasting=True),
    )
    hook.install()
    try:
        with left_as_it_was(model):
            _settle(wrapping, model, kinds)
        cache = wrapping.make_cache()
    except BaseException:
        wrapping.pager.close()
        hook.uninstall()
        raise
    unwrap(model)  # only now: a call that fails leaves an earlier wrapping as it was
    object.__setattr__(model, _WRAPPED, wrapping)
    object.__setattr__(model, "make_cache", wrapping.make_cache)
    object.__setattr__(model, "__reduce_ex__", _plain_copy(model))
    return cache


def _require_some(pageable: Collection[int], model: Any, kinds: Sequence[Any]) -> None:
    """See that there is something to page.

    Raises:
        ConfigError: if not.
    """
    if not pageable:
        names = ", ".join(sorted({type(c).__name__ for c in streams(kinds)}))
        raise ConfigError(
            f"none of the {len(kinds)} layers of {type(model).__name__} caches keys and values in "
            f"a way that can be paged (they use {names}): there is nothing to page"
        )


def _settle(wrapping: Wrapping, model: Any, kinds: list[Any]) -> None:
    """Settle what layers' pages are like: their precision, and what is done before it.

    What a store holds decides, for there may be pages in it.

    Args:
        wrapping: of the model, its tiers not open yet.
        model: of mlx-lm.
        kinds: its stock caches.
    """
    from pagedkv.integrations.mlx_lm.caches import keeps_all

    pager, name, config = wrapping.pager, wrapping.fingerprint, wrapping.config
    # Those whose queries can be seen.
    reaching = {n for n, probe in wrapping.probes.items() if probe.reaches_hook.get(False)}
    shapes, ladders = _plain_layers(kinds, wrapping.probes), pager.budget.ladders
    if config.treatment == AUTO:
        shapes = {number: shape for number, shape in shapes.items() if number in reaching}
    mine = choose_treatments(model, config, shapes, name) if names_file(config.treatment) else {}
    told = name_of(config, shapes, mine, ladders)
    # Those of them that see the whole context.
    candidates = reaching & {n for n, cache in enumerate(streams(kinds)) if keeps_all(cache)}
    open_layers = config.lookup_ladder is not None and lookup_count(len(candidates)) > 0
    pager.identity = config.store_identity(name, pager.layers, told, found=open_layers)
    if open_layers:
        found = sequences.kept_layers(pager, candidates)
        if must_look(model, found is None):
            seen = lookup_layers(model, candidates, name)
            found = seen if found is None else found
        assert found is not None
        ladder = cast(Ladder, config.lookup_ladder)
        ladders = LayerLadders.of_layers(config.ladder, dict.fromkeys(found, ladder))
        pager.set_ladders(ladders)
    # A bad directory shows here, not in mid-text.
    kept = sequences.kept_treatments(pager, name, shapes) if pager.has_cold else None
    if open_layers or not mine:  # a file is not read twice for the same ladders
        mine = choose_treatments(model, config, shapes, name, ladders, unknown=kept is None)
    pager.treatments |= mine if kept is None else kept


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
    elif (
        earlier.config == config
        and earlier.fingerprint == fingerprint(model)
        and not _calibrated_since(earlier, model)
    ):
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
    for name in _SET:
        object.__delattr__(model, name)
    hook.uninstall()


def _plain_copy(model: Any) -> Callable[[Any], tuple[Any, ...]]:
    """What `copy.deepcopy` and pickle take apart: the model as if it were not wrapped."""
    reference = weakref.ref(model)  # as in `stock_maker`

    def reduce(protocol: Any) -> tuple[Any, ...]:
        mine: Any = reference()
        function, args, state, *rest = cast(Any, type(mine)).__reduce_ex__(mine, protocol)
        return function, args, {n: v for n, v in state.items() if n not in _SET}, *rest

    return reduce


def wrapping_of(model: Any) -> Wrapping | None:
    """What `wrap` made of the model; None if it is not wrapped."""
    return cast("Wrapping | None", getattr(model, "__dict__", {}).get(_WRAPPED))


def load(path: str | os.PathLike[str], model: Any, config: TierConfig | None = None) -> PagedCache:
    """Load a cache that `PagedCache.save` wrote.

    Args:
        path: of the file.
        model: the model that it was made with; wrapped here if it is not yet.
        config: tiers to use if the model is not wrapped; if None the saved ones, but with
            budgets that are not above the defaults, and no path.

    Returns:
        The cache, ready to be passed as ``prompt_cache=``.

    Raises:
        CacheStateError: if the file is damaged, or was made with another model, an adapter or
            weights of another type included.
        ConfigError: if the settings do not fit the model.
        OutOfPagesError: if the budgets do not hold it.
    """
    states = state.load_states(path)
    metas = [state.parse_meta(s) for s in states]
    require_model(model)
    mine = fingerprint(model)
    if (theirs := metas[0]["fingerprint"]) != mine:
        raise CacheStateError(
            f"{str(path)!r} was made with another model: it belongs to {theirs}, this one is "
            f"{mine} (an adapter, other bits or another type of weights make another model)"
        )
    wrapping = wrapping_of(model)
    if wrapping is None:
        cache = wrap(model, config or state.saved_config(metas[0]))
    else:
        cache = wrapping.make_cache()
    try:
        cache.context.require_same_weights()
        layers, saved_layers = [[c.layer for c in cache.paged_layers], [m["layer"] for m in metas]]
        if layers != saved_layers or not cache.is_fully_paged:
            raise CacheStateError(
                f"{str(path)!r} has layers {saved_layers}, and the model's that are paged are "
                f"{layers}"
            )
        for layer, meta, saved in zip(cache.paged_layers, metas, states, strict=True):
            state.restore(layer, meta, saved, adopt=wrapping is None)
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
        CacheStateError: if the weights of a model that is wrapped were exchanged meanwhile.
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

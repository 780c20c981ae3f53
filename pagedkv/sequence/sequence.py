"""What the layers of one sequence share."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pagedkv.config.tier_config import ALIKE, TierConfig
from pagedkv.errors import CacheStateError
from pagedkv.sequence.prefix_cache import Prefixes
from pagedkv.sequence.throughput import Pace
from pagedkv.tiers import Lineage, Pager

if TYPE_CHECKING:
    from pagedkv.sequence.layer import PagedLayerCache

MOST_PARTIAL_FORKS = 1024
"""Forks that wait for their other layers; who forks one layer alone never brings them."""


def new_sequence_id() -> str:
    """A name for a sequence that no other has."""
    return secrets.token_hex(8)


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
        torn: whether some layer has taken tokens of a call that failed, and cannot give them back.
        forks: those that still lack layers, see `fork_for`.
        loaded: what a saved cache says of this sequence, until all its layers are there.
        taken: the layers that have the tokens of the model's call under way, or of its last one,
            each with its length before.
        count: tokens that the call gave the first of them.
        latest: the one that came last, and the tokens that it was given.
        uneven: layers that it gave other numbers of tokens.
        early: likewise, when it had reached all others: they may be the first ones of the next.
    """

    config: TierConfig
    pager: Pager
    lineage: Lineage = field(default_factory=Lineage)
    layers: list[weakref.ref[PagedLayerCache]] = field(default_factory=list)
    fingerprint: str = ""
    max_tokens: int | None = None
    sequence_id: str = field(default_factory=new_sequence_id)
    admitted: int = 0
    behind: weakref.ref[PagedLayerCache] | None = None
    pace: Pace = field(default_factory=Pace)
    prefixes: Prefixes[Any] = field(default_factory=Prefixes)
    prefix: list[bytes] = field(default_factory=list)
    others: tuple[Any, ...] = ()
    torn: bool = False
    forks: list[_PartialFork] = field(default_factory=list)
    loaded: dict[str, Any] | None = None
    taken: dict[int, int] = field(default_factory=dict)
    count: int = 0
    latest: tuple[int, int] = (-1, 0)
    uneven: set[int] = field(default_factory=set)
    early: set[int] = field(default_factory=set)

    @property
    def settled(self) -> TierConfig:
        """The settings, with the layers named that `TierConfig.layer_kv` leaves open."""
        return replace(self.config, layer_kv=self.pager.budget.ladders.others_text or ALIKE)

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

    def require_same_weights(self) -> None:
        """Check that the model's weights are those that it was wrapped with.

        Raises:
            CacheStateError: if they are others: what its caches hold may be of either.
        """
        now = self.prefixes.weights()
        if now not in ("", self.fingerprint):
            raise CacheStateError(
                f"the model's weights were exchanged after it was wrapped: it was "
                f"{self.fingerprint} then and is {now} now, and nothing tells of which its caches "
                f"are; wrap() it again, and go on with a new cache"
            )

    def forget_prefix_beyond(self, tokens: int) -> None:
        """Tokens from there on are about to be others than those that digests are known of."""
        if self.prefix:
            unit = max(cache.page_tokens for cache in self.alive())
            del self.prefix[max(0, tokens - self.config.sink_tokens) // unit :]

    def begin(self, layer: PagedLayerCache, count: int) -> None:
        """Note that a layer is about to take tokens, and see that no other one lags behind.

        No code of ours runs when a call of the model is broken off between two layers: the next
        call finds it, which begins where a layer comes again. Then all layers must have come that
        are given tokens in each call, or be as long as this one all the same (some trim layers one
        by one). Where a model splits its tokens, a layer comes several times on end, and a call
        that was broken off in the first layer shows by too few tokens of the second. Layers that
        are given other numbers of tokens than the model (cross-attention, summaries of several
        tokens) do not take part in this; `LayerProbe.in_step` tells them.

        Raises:
            CacheStateError: if a call was broken off. Its tokens are taken back.
        """
        if not layer.in_step:
            (self.early if self._whole() else self.uneven).add(layer.layer)
            return
        number, given = self.latest
        if self._goes_on(layer):
            self.latest = number, given + count
            if len(self.taken) == 1:
                self.count = given + count
            return
        lacks = {self._start} if layer.splits and self.taken and given != self.count else set()
        if layer.layer in self.taken or lacks:
            if lacks := lacks | self._behind(layer.offset):
                self._refuse({layer.offset, *lacks})
            self.taken, self.uneven, self.early = {}, self.early, set()
        if not self.taken:
            self.count = count
        elif count != self.count and not layer.splits:
            layer.in_step = False
            self.uneven.add(layer.layer)
            return
        self.taken[layer.layer], self.latest = layer.offset, (layer.layer, count)

    def _behind(self, length: int) -> set[int]:
        """Lengths of layers that the call under way has not reached, if they are shorter."""
        return {
            cache.offset
            for cache in self.alive()
            if cache.in_step and cache.layer not in self.taken and 0 < cache.offset < length
        }

    def require_start(self, layer: PagedLayerCache, shape: Sequence[int]) -> None:
        """See that a layer without tokens is not about to follow layers that had some.

        Not a part of `begin`: tokens may also be appended to one layer after the other by hand.

        Args:
            layer: which.
            shape: of the keys that it is given in a call of the model.

        Raises:
            CacheStateError: if a first call was broken off. Its tokens are taken back.
        """
        joins = bool(self.taken) and layer.layer not in self.taken and layer.in_step
        if joins and not layer.offset and self._start and tuple(shape[2:3]) == (self.count,):
            self._refuse({layer.offset, self._start})

    @property
    def _start(self) -> int:
        """The length at which the call under way began."""
        return next(iter(self.taken.values()))

    def _refuse(self, lengths: set[int]) -> None:
        length = min(lengths)
        self.take_back_to(length)
        raise CacheStateError(
            f"the last call of the model was broken off and left layers of {length:,} to "
            f"{max(lengths):,} tokens, so what this one was about to compute would be wrong: "
            f"every layer holds {length:,} tokens now, go on with those that come after them"
        )

    def unbegun(self, layer: PagedLayerCache) -> dict[int, int] | None:
        """What the call before has taken, if the next tokens of a layer begin another call.

        None if they belong to the call under way. What is returned once that call has begun is
        another dictionary.
        """
        if layer.in_step:
            again = layer.layer in self.taken
            return self.taken if again and not self._goes_on(layer) else None
        return self.taken if layer.layer not in self.early and self._whole() else None

    def _goes_on(self, layer: PagedLayerCache) -> bool:
        """Whether the call under way gives a layer its tokens in parts, and this one now."""
        return layer.splits and layer.layer == self.latest[0]

    def _whole(self) -> bool:
        """Whether all layers have come that are to come in each call."""
        return bool(self.taken) and not self._behind(self._start + self.count)

    def break_off(self) -> None:
        """Take back the tokens of a call in which something was raised that is not ours."""
        with self.pager.turn.lock:
            self.recover()
            if self.taken:
                # Where the only layer is given tokens in parts, nothing tells where a call began.
                in_step = [cache for cache in self.alive() if cache.in_step]
                self.torn |= len(in_step) == 1 and in_step[0].splits
                self.take_back_to(self._start)
            else:
                self.torn |= bool(self.uneven or self.early)

    def recover(self) -> None:
        """Put right what an operation that was broken off may have left half done."""
        with self.pager.turn.lock:
            self.pager.inconsistent = True
            self.pager.reclaim()

    def take_back_to(self, length: int) -> None:
        """Forget what came after the first `length` tokens, everywhere, after a call that failed.

        A recurrent state cannot forget: a sequence with one cannot go on. Nor can one with a window
        that has left behind what would be seen then, or with a layer that was given another number
        of tokens.
        """
        self.behind = None
        unknown = self.uneven | self.early
        self.taken, self.uneven, self.early, self.latest = {}, set(), set(), (-1, 0)
        for cache in self.alive():
            if cache.in_step:
                self.torn |= not cache.take_back_to(length)
            else:  # nothing tells how many of its tokens are of this call
                self.torn |= cache.layer in unknown
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

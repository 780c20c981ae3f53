"""Will it fit: where the tokens of a context would lie, without running a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pagedkv.allocator import KVShape, Ladder, LayerLadders, PageGeometry, Precision
from pagedkv.config.tier_config import KEPT_TOKENS, TierConfig, lookup_count, require_config
from pagedkv.config.window_sizes import WindowSizes
from pagedkv.errors import ConfigError
from pagedkv.tiers.budget import TierBudget
from pagedkv.tiers.codec.transform import ROTATIONS, treated_parts, treatment_bytes
from pagedkv.tiers.pages.layer_pager import choose_page_tokens


@dataclass(frozen=True)
class Plan:
    """Tokens and bytes per tier, all layers together, for one sequence of a given length.

    Attributes:
        context: tokens planned for.
        page_tokens: tokens per page.
        hot_tokens, warm_tokens, cold_tokens: tokens per tier, of the layer that holds the most; of
            a layer without a window they add up to `context` if it fits.
        hot_bytes, warm_bytes, cold_bytes: bytes per tier.
        staging_bytes: memory for pages on their way to and from disk, at most.
        scratch_bytes: memory for one layer's dequantized keys and values in prefill, at most.
        treatment_bytes: memory for the matrices of treatments, at most: layers whose weights do not
            say which treatment they need have none.
        fp16_bytes: what a 16-bit cache takes, with the same windows.
        fits: whether the budgets hold the context.
        max_context: tokens that the budgets hold.
        cold_bytes_per_token: bytes read from disk for every generated token.
        tokens_per_second: the most that the disk allows; None without cold tokens or a rate.
    """

    context: int
    page_tokens: int
    hot_tokens: int
    warm_tokens: int
    cold_tokens: int
    hot_bytes: int
    warm_bytes: int
    cold_bytes: int
    staging_bytes: int
    scratch_bytes: int
    treatment_bytes: int
    fp16_bytes: int
    fits: bool
    max_context: int
    cold_bytes_per_token: int
    tokens_per_second: float | None

    @property
    def memory_bytes(self) -> int:
        """Memory in all: hot, warm, staging, scratch and treatments."""
        buffers = self.staging_bytes + self.scratch_bytes + self.treatment_bytes
        return self.hot_bytes + self.warm_bytes + buffers

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "memory_bytes": self.memory_bytes}


def plan(
    shape: KVShape,
    layers: int,
    context: int,
    config: TierConfig | None = None,
    disk_bytes_per_second: float | None = None,
    *,
    windows: Sequence[int] = (),
) -> Plan:
    """Work out where the tokens of a context would lie.

    Args:
        shape: heads and channels of one layer; all layers are taken to be alike.
        layers: layers with a KV cache.
        context: tokens.
        config: tiers; the default if None.
        disk_bytes_per_second: read rate of the cold directory's disk, for the token rate.
        windows: sizes of the sliding windows of those layers that have one.

    Raises:
        ConfigError: if the context or the warm budget is too small to mean anything.
    """
    config = require_config(config)
    if context < 1 or layers < 1:
        raise ConfigError(f"a plan needs at least one token and one layer, got {context}, {layers}")
    if len(windows) > layers or any(window < 1 for window in windows):
        raise ConfigError(f"{len(windows)} windows of {layers} layers: {list(windows)[:8]}")
    kinds = _kinds(shape, layers, config, windows)
    placed = [(kind, *kind.place(context)) for kind in kinds]
    budget = config.budget()
    cold_bytes = sum(
        kind.bytes({p: pages[p] - warm[p] for p in pages}) for kind, pages, warm in placed
    )
    # The layer that holds the most: one without a window if there is one, and as most of them are.
    most, pages, warm = max(placed, key=lambda item: (item[0].reach or math.inf, item[0].layers))
    tokens = most.page_tokens
    cold = sum(pages.values()) - sum(warm.values())
    paged = any(any(pages.values()) for _, pages, _ in placed)
    scratch = min(budget.scratch_bytes, most.held(context) * shape.token_bytes())
    return Plan(
        context=context,
        page_tokens=tokens,
        hot_tokens=most.hot(context),
        warm_tokens=sum(warm.values()) * tokens,
        cold_tokens=cold * tokens,
        hot_bytes=sum(k.layers * k.hot_capacity(context) for k in kinds) * shape.token_bytes(),
        warm_bytes=sum(kind.bytes(warm) for kind, _, warm in placed),
        cold_bytes=cold_bytes,
        staging_bytes=budget.staging_bytes + budget.write_buffer_bytes if cold_bytes else 0,
        scratch_bytes=scratch if paged else 0,
        treatment_bytes=sum(kind.treatment_bytes for kind in kinds),
        fp16_bytes=sum(k.layers * k.held(context) for k in kinds) * shape.token_bytes(),
        fits=_fits(kinds, context),
        max_context=_longest(kinds),
        cold_bytes_per_token=cold_bytes,
        tokens_per_second=disk_bytes_per_second / cold_bytes
        if disk_bytes_per_second and cold_bytes
        else None,
    )


def _kinds(
    shape: KVShape, layers: int, config: TierConfig, windows: Sequence[int]
) -> list[_Counter]:
    """Layers that are alike: of one ladder without a window, or with windows of one size."""
    plain = layers - len(windows)
    own = [ladder for _, ladder in config.ladders.others]
    if config.lookup_ladder is not None:
        own = [config.lookup_ladder] * lookup_count(plain)
    # Which layers those are makes no difference: here they are the first ones.
    ladders = LayerLadders.of_layers(config.ladder, dict(enumerate(own[:plain])))
    keep = config.sink_tokens if config.max_kv_size is None else KEPT_TOKENS
    alike: dict[tuple[int | None, int, Ladder], list[int]] = {}
    for number in range(plain):
        alike.setdefault((config.max_kv_size, keep, ladders.of(number)), []).append(number)
    for number, window in enumerate(windows, plain):
        alike.setdefault((window, 0, config.ladder), []).append(number)
    budget = replace(config.budget(), ladders=ladders)
    return [
        _Counter(shape, layers, config, budget, numbers, reach, keep)
        for (reach, keep, _), numbers in alike.items()
    ]


def _fits(kinds: Sequence[_Counter], context: int) -> bool:
    return all(kind.fits(context) for kind in kinds)


def _longest(kinds: Sequence[_Counter]) -> int:
    """The longest context that fits, by bisection (more tokens never need fewer pages)."""
    low, high = 1, 2
    while _fits(kinds, high) and high < 2**32:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(kinds, middle) else (low, middle)
    return low


class _Counter:
    """Pages per precision and tier of layers that are alike; the same arithmetic as the pager's.

    Attributes:
        layers: how many layers those are.
        reach: tokens that a query sees, at most; None for all.
        page_tokens: tokens per page.
    """

    def __init__(
        self,
        shape: KVShape,
        all_layers: int,
        config: TierConfig,
        budget: TierBudget,
        numbers: Sequence[int],
        reach: int | None,
        keep: int,
    ) -> None:
        self._config, self._shape = config, shape
        self.layers, self.reach, self._keep = len(numbers), reach, keep
        self._ladder = budget.ladders.of(numbers[0])
        precisions = self._ladder.beyond(config.hot_tokens)
        span = None if reach is None else reach - keep
        self.page_tokens = config.page_tokens or choose_page_tokens(shape, precisions, span)
        self._sizes = {p: PageGeometry(shape, self.page_tokens, p).page_bytes for p in precisions}
        self._slots = budget.warm_slots(all_layers, numbers[0], self.page_tokens, self._sizes)
        self._cold_share = budget.cold_share(all_layers, numbers[0])

    def held(self, context: int) -> int:
        """Tokens of a context that a 16-bit cache holds."""
        return context if self.reach is None else min(context, self.reach)

    @property
    def _window(self) -> WindowSizes | None:
        if self.reach is None:
            return None
        return WindowSizes(self.reach, self._keep, self._config.hot_tokens, self.page_tokens)

    def hot(self, context: int) -> int:
        """Hot tokens of one layer, if the context came token by token."""
        if self._window and not self._window.seals:
            return min(context, self._window.hot_room)
        return context - self._count(context) * self.page_tokens

    def hot_capacity(self, context: int) -> int:
        """The same, at most: the hot buffer is allocated for its largest extent."""
        config = self._config
        # A page turn's worth of room.
        room = self._keep + config.hot_tokens + self.page_tokens
        return min(context, self._window.hot_room if self._window else room)

    def _count(self, context: int) -> int:
        """Pages of one layer that were ever sealed."""
        return max(0, context - self._keep - self._config.hot_tokens) // self.page_tokens

    def pages(self, context: int) -> dict[Precision, int]:
        """Sealed pages of one layer by precision; of a window as many as there may be."""
        reach = self._ladder.reach
        first_end = self._keep + self.page_tokens
        count = self._count(context)
        most = self._window.most_pages if self._window else count
        pages = dict.fromkeys(self._sizes, 0)
        nearer = 0
        for precision, end in zip(self._ladder.steps, (*reach, None), strict=True):
            # Page i ends at first_end + i * page_tokens: those within `end` of the last token.
            within = count
            if end is not None:
                within -= min(count, max(0, (context - first_end - end) // self.page_tokens + 1))
            within = min(within, most)
            if within > nearer:
                pages[precision] += within - nearer
                nearer = within
        return pages

    def place(self, context: int) -> tuple[dict[Precision, int], dict[Precision, int]]:
        """Sealed pages of one layer by precision, and how many of them are warm."""
        pages = self.pages(context)
        return pages, {p: min(pages[p], self._slots[p]) for p in pages}

    def bytes(self, pages: dict[Precision, int]) -> int:
        """Bytes of these pages, all layers of this kind together."""
        return self.layers * sum(n * self._sizes[p] for p, n in pages.items())

    def fits(self, context: int) -> bool:
        """Whether warm and cold hold all sealed pages of the context."""
        pages, warm = self.place(context)
        cold = {p: pages[p] - warm[p] for p in pages}
        return self.bytes(cold) // self.layers <= self._cold_share

    @property
    def treatment_bytes(self) -> int:
        """Bytes of the matrices of treatments, all layers of this kind together, at most."""
        precisions = self._ladder.beyond(self._config.hot_tokens)
        parts = treated_parts(precisions, self._config.treatment)
        rotated = self._config.treatment in ROTATIONS
        feedback = (parts[0] and not rotated, parts[1] and not rotated)
        return self.layers * treatment_bytes(self._shape, feedback) if any(parts) else 0


def require_room(
    shape: KVShape, layers: int, tokens: int, config: TierConfig, windows: Sequence[int] = ()
) -> None:
    """Refuse what must end in `OutOfPagesError`, before time is spent on it.

    Raises:
        ConfigError: with the largest context that fits.
    """
    result = plan(shape, layers, tokens, config, windows=windows)
    if not result.fits:
        raise ConfigError(
            f"{tokens:,} tokens in {layers} layers do not fit warm={config.warm} and "
            f"cold={config.cold}, which hold {result.max_context:,}: raise them, or give fewer "
            f"tokens"
        )

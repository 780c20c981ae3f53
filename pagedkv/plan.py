"""Will it fit: where the tokens of a context would lie, without running a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pagedkv.allocator import KVShape, PageGeometry, Precision
from pagedkv.config import TierConfig
from pagedkv.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """Tokens and bytes per tier, all layers together, for one sequence of a given length.

    Attributes:
        context: tokens planned for.
        page_tokens: tokens per page.
        hot_tokens, warm_tokens, cold_tokens: tokens per tier; they add up to `context` if it fits.
        hot_bytes, warm_bytes, cold_bytes: bytes per tier.
        staging_bytes: memory for pages on their way to and from disk, at most.
        scratch_bytes: memory for one layer's dequantized keys and values in prefill, at most.
        fp16_bytes: what a 16-bit cache takes.
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
    fp16_bytes: int
    fits: bool
    max_context: int
    cold_bytes_per_token: int
    tokens_per_second: float | None

    @property
    def memory_bytes(self) -> int:
        """Memory in all: hot, warm, staging and scratch."""
        return self.hot_bytes + self.warm_bytes + self.staging_bytes + self.scratch_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "memory_bytes": self.memory_bytes}


def plan(
    shape: KVShape,
    layers: int,
    context: int,
    config: TierConfig | None = None,
    disk_bytes_per_second: float | None = None,
) -> Plan:
    """Work out where the tokens of a context would lie.

    Args:
        shape: heads and channels of one layer; all layers are taken to be alike.
        layers: layers with a KV cache.
        context: tokens.
        config: tiers; the default if None.
        disk_bytes_per_second: read rate of the cold directory's disk, for the token rate.

    Raises:
        ConfigError: if the context or the warm budget is too small to mean anything.
    """
    config = config or TierConfig()
    if context < 1 or layers < 1:
        raise ConfigError(f"a plan needs at least one token and one layer, got {context}, {layers}")
    counter = _Counter(shape, layers, config)
    pages, warm = counter.place(context)
    budget = config.budget()
    tokens = counter.page_tokens
    hot = context - sum(pages.values()) * tokens
    cold = {p: pages[p] - warm[p] for p in pages}
    cold_bytes = counter.bytes(cold)
    # A page turn's worth of room: the hot buffer is allocated for its largest extent.
    hot_capacity = config.sink_tokens + config.hot_tokens + tokens
    scratch = min(budget.scratch_bytes, context * shape.token_bytes())
    return Plan(
        context=context,
        page_tokens=tokens,
        hot_tokens=hot,
        warm_tokens=sum(warm.values()) * tokens,
        cold_tokens=sum(cold.values()) * tokens,
        hot_bytes=min(hot_capacity, context) * shape.token_bytes() * layers,
        warm_bytes=counter.bytes(warm),
        cold_bytes=cold_bytes,
        staging_bytes=budget.staging_bytes + budget.write_buffer_bytes if cold_bytes else 0,
        scratch_bytes=scratch if pages else 0,
        fp16_bytes=context * shape.token_bytes() * layers,
        fits=counter.fits(context),
        max_context=counter.longest(),
        cold_bytes_per_token=cold_bytes,
        tokens_per_second=disk_bytes_per_second / cold_bytes
        if disk_bytes_per_second and cold_bytes
        else None,
    )


class _Counter:
    """Pages per precision and tier; the same arithmetic as the pager's, per layer."""

    def __init__(self, shape: KVShape, layers: int, config: TierConfig) -> None:
        self._config, self._layers = config, layers
        self._budget = config.budget()
        self._ladder = config.ladder
        precisions = self._ladder.beyond(config.hot_tokens)
        self.page_tokens = config.page_tokens or PageGeometry.choose_tokens(shape, precisions)
        self._sizes = {p: PageGeometry(shape, self.page_tokens, p).page_bytes for p in precisions}
        self._slots = self._budget.warm_slots(layers, self.page_tokens, self._sizes)

    def pages(self, context: int) -> dict[Precision, int]:
        """Sealed pages of one layer by precision."""
        config, reach = self._config, self._ladder.reach
        first_end = config.sink_tokens + self.page_tokens
        count = max(0, context - config.sink_tokens - config.hot_tokens) // self.page_tokens
        pages = dict.fromkeys(self._sizes, 0)
        nearer = 0
        for precision, end in zip(self._ladder.steps, (*reach, None), strict=True):
            # Page i ends at first_end + i * page_tokens: those within `end` of the last token.
            within = count
            if end is not None:
                within -= min(count, max(0, (context - first_end - end) // self.page_tokens + 1))
            if within > nearer:
                pages[precision] += within - nearer
                nearer = within
        return pages

    def place(self, context: int) -> tuple[dict[Precision, int], dict[Precision, int]]:
        """Sealed pages of one layer by precision, and how many of them are warm."""
        pages = self.pages(context)
        return pages, {p: min(pages[p], self._slots[p]) for p in pages}

    def bytes(self, pages: dict[Precision, int]) -> int:
        """Bytes of these pages, all layers together."""
        return self._layers * sum(n * self._sizes[p] for p, n in pages.items())

    def fits(self, context: int) -> bool:
        """Whether warm and cold hold all sealed pages of the context."""
        pages, warm = self.place(context)
        cold = {p: pages[p] - warm[p] for p in pages}
        return self.bytes(cold) // self._layers <= self._budget.cold_bytes // self._layers

    def longest(self) -> int:
        """The longest context that fits, by bisection (more tokens never need fewer pages)."""
        low, high = 1, 2
        while self.fits(high) and high < 2**32:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return low


def require_room(shape: KVShape, layers: int, tokens: int, config: TierConfig) -> None:
    """Refuse what must end in `OutOfPagesError`, before time is spent on it.

    Raises:
        ConfigError: with the largest context that fits.
    """
    result = plan(shape, layers, tokens, config)
    if not result.fits:
        raise ConfigError(
            f"{tokens:,} tokens in {layers} layers do not fit warm={config.warm} and "
            f"cold={config.cold}, which hold {result.max_context:,}: raise them, or give fewer "
            f"tokens"
        )

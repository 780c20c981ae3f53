"""Whether the pages of several sequences fit together, before any of them takes its tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from pagedkv.allocator import Precision
from pagedkv.sequence.layer import PagedLayerCache
from pagedkv.tiers import LayerPager, Pager


@dataclass(frozen=True, eq=False)
class Wish:
    """A sequence that wants to grow.

    Attributes:
        layer: any of its layers.
        tokens: by how many tokens.
    """

    layer: PagedLayerCache
    tokens: int

    @property
    def due(self) -> bool:
        """Whether any layer may have to seal a page; if not, there is nothing to ask."""
        context = self.layer._context
        return self.tokens > 0 and self.layer.offset + self.tokens > context.admitted

    @property
    def pager(self) -> Pager:
        """Whose budgets it is for."""
        return self.layer._context.pager


@dataclass
class _Needs:
    """Pages to come by layer and precision."""

    pages: dict[LayerPager, Counter[Precision]] = field(default_factory=dict)

    def with_more(self, wish: Wish) -> _Needs:
        more = _Needs({pager: Counter(need) for pager, need in self.pages.items()})
        for cache in wish.layer.siblings():
            if cache._pager is not None and cache._pages_due(wish.tokens):
                need = more.pages.setdefault(cache._pager, Counter())
                need.update(cache._pages_to_come(wish.tokens))
        return more

    def shortage(self) -> str | None:
        problems = (pager.shortage(need) for pager, need in self.pages.items())
        return next((problem for problem in problems if problem), None)


def refused(wishes: Iterable[Wish]) -> dict[int, str]:
    """Which wishes cannot be met beside those that come before them.

    Where room is short, sequences that are kept for later are given up first; see `Pager.relief`.

    Args:
        wishes: the one that matters most first.

    Returns:
        By position among the wishes, why not; empty if all of them fit together.
    """
    needs, out = _Needs(), dict[int, str]()
    for i, wish in enumerate(wishes):
        if not wish.due:
            continue
        more = needs.with_more(wish)
        problem = more.shortage()
        while problem and wish.pager.relieve():
            more = needs.with_more(wish)  # pages that were shared count once more
            problem = more.shortage()
        if problem:
            out[i] = problem
        else:
            needs = more
    return out

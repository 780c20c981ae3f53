"""The page that goes to disk next is the one that looking at all of them finds."""

from __future__ import annotations

from random import Random

import pytest

from pagedkv import Precision
from pagedkv.tiers import Lineage, Page
from pagedkv.tiers.pages.demotion import DemotionOrder

K4 = Precision.parse("K4V4")


@pytest.mark.parametrize("seed", range(5))
def test_the_farthest_is_found_whatever_came_and_went(seed: int) -> None:
    random, order = Random(seed), DemotionOrder()
    lineages = [Lineage(tick) for tick in range(3)]
    warm: list[Page] = []
    away: list[Page] = []
    for number in range(3000):
        what = random.random()
        if what < 0.5:
            page = Page(number, K4, random.randrange(500) * 256, random.choice(lineages), slot=1)
            warm.append(page)
            order.add(page, len(warm))
        elif what < 0.6 and away:  # promoted
            page = away.pop(random.randrange(len(away)))
            page.slot = 1
            warm.append(page)
            order.add(page, len(warm))
        elif what < 0.75 and warm:  # freed, or demoted as one that is clean already
            page = warm.pop(random.randrange(len(warm)))
            page.slot = None
            away.append(page)
        elif warm:
            page = order.farthest()
            assert page.slot is not None
            assert (page.lineage.tick, page.position) == min(
                (p.lineage.tick, p.position) for p in warm
            )
            warm.remove(page)
            page.slot = None
            away.append(page)
        if what > 0.95:
            random.choice(lineages).tick = number
        assert order._kept <= 2 * len(warm) + 70 or order._kept < 200


def test_pages_that_are_gone_are_not_kept() -> None:
    order = DemotionOrder()
    for number in range(10_000):
        page = Page(number, K4, number, Lineage(), slot=1)
        order.add(page, 1)
        page.slot = None
    assert order._kept < 100
    assert len(order._heaps) < 100
    with pytest.raises(LookupError):
        order.farthest()

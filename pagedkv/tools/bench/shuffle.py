"""Pages in random order: the same contents, through a page table that jumps about.

This module reaches into `LayerPager` and its slabs, which nothing else here does: outside a
benchmark pages land in the lowest free slots, so a cache that is filled once is always in order.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from pagedkv.sequence.layer import PagedLayerCache

LEAST_PAGES = 3
"""With fewer there is no order to speak of."""


def shuffle_pages(layer: PagedLayerCache, seed: int = 0) -> int:
    """Move the warm pages of a layer to other slots, at random; every page keeps its contents.

    To be called before the layer is attended for the first time, so that no table of its slots
    has been kept anywhere.

    Args:
        layer: whose pages are moved.
        seed: of the order.

    Returns:
        How many pages have another slot now.
    """
    pager = layer.view().pager
    assert pager is not None
    rng = np.random.default_rng(seed)
    moved = 0
    for precision, slab in pager._slabs.items():
        pages = [p for p in pager.pages.values() if p.precision == precision]
        taken = [p.slot for p in pages if p.slot is not None]
        target = dict(zip(taken, rng.permutation(taken).tolist(), strict=True))
        source = np.arange(slab.array.shape[0], dtype=np.uint32)
        for old, new in target.items():
            source[new] = old
        slab._array = mx.take(slab.array, mx.array(source), axis=0)
        mx.eval(slab._array)
        for page in pages:
            if page.slot is not None:
                moved += page.slot != target[page.slot]
                page.slot = target[page.slot]
    return moved

"""The ground floor: pages, slots, page tables and geometry, as ints and bytes.

Nothing here imports mlx or numpy, and nothing does I/O.
"""

from pagedkv.allocator.errors import (
    CacheStateError,
    ClosedError,
    ColdStoreError,
    ConfigError,
    CorruptPageError,
    CorruptStoreError,
    OutOfPagesError,
    PagedKVError,
    SequenceNotFoundError,
    ShapeError,
    StoreLockedError,
    StoreMismatchError,
    UnsafeStoreError,
)
from pagedkv.allocator.geometry import PAGE_ALIGNMENT, KVShape, PageGeometry, PagePart
from pagedkv.allocator.layer_ladders import LayerLadders
from pagedkv.allocator.precision import Ladder, Precision
from pagedkv.allocator.prefix_index import PrefixIndex, prefix_digests, prefix_key
from pagedkv.allocator.slots import PageAllocator, SlotPool
from pagedkv.allocator.table import PageTable, TableEntry

__all__ = [
    "PAGE_ALIGNMENT",
    "CacheStateError",
    "ClosedError",
    "ColdStoreError",
    "ConfigError",
    "CorruptPageError",
    "CorruptStoreError",
    "KVShape",
    "Ladder",
    "LayerLadders",
    "OutOfPagesError",
    "PageAllocator",
    "PageGeometry",
    "PagePart",
    "PageTable",
    "PagedKVError",
    "Precision",
    "PrefixIndex",
    "SequenceNotFoundError",
    "ShapeError",
    "SlotPool",
    "StoreLockedError",
    "StoreMismatchError",
    "TableEntry",
    "UnsafeStoreError",
    "prefix_digests",
    "prefix_key",
]

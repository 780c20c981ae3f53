"""The exception tree, as users import it; see `pagedkv.allocator.errors` for the picture."""

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

__all__ = [
    "CacheStateError",
    "ClosedError",
    "ColdStoreError",
    "ConfigError",
    "CorruptPageError",
    "CorruptStoreError",
    "OutOfPagesError",
    "PagedKVError",
    "SequenceNotFoundError",
    "ShapeError",
    "StoreLockedError",
    "StoreMismatchError",
    "UnsafeStoreError",
]

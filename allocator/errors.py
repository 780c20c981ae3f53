"""What can go wrong, as one tree.

    PagedKVError
    ├── ConfigError        (ValueError)    an option that cannot be meant, with what would do
    ├── ShapeError         (ValueError)    arrays that do not fit this cache
    ├── CacheStateError    (ValueError)    a saved state that is not ours, or another model's
    │   └── StoreMismatchError             a store of another model, or of other settings
    ├── SequenceNotFoundError (LookupError) no flushed sequence of that name, or none at all
    ├── ClosedError        (RuntimeError)  use after close()
    ├── OutOfPagesError    (MemoryError)   every tier is full; nothing was lost
    └── ColdStoreError     (OSError)       the NVMe tier failed to read or write
        ├── CorruptPageError               a page came back different from what was stored
        ├── CorruptStoreError              a checkpoint is damaged, or of a newer version
        ├── StoreLockedError (BlockingIOError) another process holds the store
        └── UnsafeStoreError (PermissionError) a link, a foreign owner, or a mode too wide

Each is also the built-in that fits, so code that knows nothing of pagedkv still catches it.
"""


class PagedKVError(Exception):
    """Base of everything that pagedkv raises on purpose.

    Attributes:
        rows: where several sequences are served together, the numbers of those it concerns.
    """

    rows: tuple[int, ...] = ()


class ConfigError(PagedKVError, ValueError):
    """An option that cannot be meant: says what was asked, what is there, and what to do."""


class ShapeError(PagedKVError, ValueError):
    """Keys, values, queries or a mask that do not fit the cache they are given to."""


class CacheStateError(PagedKVError, ValueError):
    """A saved cache that is damaged, of another format, or made by another model."""


class StoreMismatchError(CacheStateError):
    """A flushed sequence was made by another model, or with settings that decide other bytes."""


class SequenceNotFoundError(PagedKVError, LookupError):
    """The cold directory holds no flushed sequence, or none of that name."""


class ClosedError(PagedKVError, RuntimeError):
    """A cache was used after `close()`."""


class OutOfPagesError(PagedKVError, MemoryError):
    """No tier has room for the next page. Raised before anything is changed or lost."""


class ColdStoreError(PagedKVError, OSError):
    """The cold tier could not read or write a page. `errno` says what the system said."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class CorruptPageError(ColdStoreError):
    """A cold page does not match the checksum bound to its identity."""


class CorruptStoreError(ColdStoreError):
    """A checkpoint is damaged, cut short, or of a version that this one cannot read."""


class StoreLockedError(ColdStoreError, BlockingIOError):
    """Another process, or another cache of this one, holds the store."""


class UnsafeStoreError(ColdStoreError, PermissionError):
    """A file or directory of the store is a link, somebody else's, or open to others."""

"""What can go wrong, as one tree.

    PagedKVError
    ├── ConfigError        (ValueError)    an option that cannot be meant, with what would do
    ├── ShapeError         (ValueError)    arrays that do not fit this cache
    ├── CacheStateError    (ValueError)    a saved state that is not ours, or another model's
    ├── ClosedError        (RuntimeError)  use after close()
    ├── OutOfPagesError    (MemoryError)   every tier is full; nothing was lost
    ├── ColdStoreError     (OSError)       the NVMe tier failed to read or write
    └── CorruptPageError   (ColdStoreError) a page came back different from what was stored

Each is also the built-in that fits, so code that knows nothing of pagedkv still catches it.
"""


class PagedKVError(Exception):
    """Base of everything that pagedkv raises on purpose."""


class ConfigError(PagedKVError, ValueError):
    """An option that cannot be meant: says what was asked, what is there, and what to do."""


class ShapeError(PagedKVError, ValueError):
    """Keys, values, queries or a mask that do not fit the cache they are given to."""


class CacheStateError(PagedKVError, ValueError):
    """A saved cache that is damaged, of another format, or made by another model."""


class ClosedError(PagedKVError, RuntimeError):
    """A cache was used after `close()`."""


class OutOfPagesError(PagedKVError, MemoryError):
    """No tier has room for the next page. Raised before anything is changed or lost."""


class ColdStoreError(PagedKVError, OSError):
    """The cold tier could not read or write a page."""


class CorruptPageError(ColdStoreError):
    """A cold page does not match the checksum bound to its identity."""

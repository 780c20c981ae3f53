"""A paged, tiered KV cache for MLX: contexts larger than memory, attended exactly.

cache = pagedkv.wrap(model, pagedkv.TierConfig(warm="2GB", cold="64GB"))
mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)
"""

from pagedkv import blas

blas.load()  # before anything imports MLX

# ruff: noqa: E402
from pagedkv.allocator import KVShape, Ladder, PageGeometry, Precision
from pagedkv.cache import PagedCache, attention
from pagedkv.calibration import calibrate
from pagedkv.calibration_file import Calibration
from pagedkv.config import TierConfig
from pagedkv.errors import (
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
from pagedkv.layer import PagedLayerCache
from pagedkv.models import load, resume, unwrap, wrap
from pagedkv.modules import PagedMultiHeadAttention, hooked, page_attention
from pagedkv.plan import Plan, plan
from pagedkv.sizes import format_size, parse_size
from pagedkv.stats import CacheStats, TierStats
from pagedkv.tiers import StoredSequence

__version__ = "0.1.0"

__all__ = [
    "CacheStateError",
    "CacheStats",
    "Calibration",
    "ClosedError",
    "ColdStoreError",
    "ConfigError",
    "CorruptPageError",
    "CorruptStoreError",
    "KVShape",
    "Ladder",
    "OutOfPagesError",
    "PageGeometry",
    "PagedCache",
    "PagedKVError",
    "PagedLayerCache",
    "PagedMultiHeadAttention",
    "Plan",
    "Precision",
    "SequenceNotFoundError",
    "ShapeError",
    "StoreLockedError",
    "StoreMismatchError",
    "StoredSequence",
    "TierConfig",
    "TierStats",
    "UnsafeStoreError",
    "__version__",
    "attention",
    "calibrate",
    "format_size",
    "hooked",
    "load",
    "page_attention",
    "parse_size",
    "plan",
    "resume",
    "unwrap",
    "wrap",
]

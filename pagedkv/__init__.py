"""A paged, tiered KV cache for MLX: contexts larger than memory, attended exactly.

cache = pagedkv.wrap(model, pagedkv.TierConfig(warm="2GB", cold="64GB"))
mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)
"""

from pagedkv.integrations import blas

blas.load()  # before anything imports MLX

# ruff: noqa: E402
from pagedkv.allocator import KVShape, Ladder, PageGeometry, Precision
from pagedkv.cache.paged_cache import PagedCache, attention
from pagedkv.cache.stats import CacheStats, TierStats
from pagedkv.calibration.file import Calibration
from pagedkv.config.planner import Plan, plan
from pagedkv.config.sizes import format_size, parse_size
from pagedkv.config.tier_config import TierConfig
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
from pagedkv.integrations.mlx_lm.calibrate import calibrate
from pagedkv.integrations.mlx_lm.wrapping import load, resume, unwrap, wrap
from pagedkv.integrations.mlx_nn import PagedMultiHeadAttention, hooked, page_attention
from pagedkv.sequence.layer import PagedLayerCache
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

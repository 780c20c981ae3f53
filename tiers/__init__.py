"""The middle floor: hot, warm and cold storage of pages, the page codecs, and the pager.

Everything that calls mlx here runs on the generation thread; worker threads move bytes between
numpy memory and files.
"""

from pagedkv.tiers.budget import TierBudget
from pagedkv.tiers.checkpoints.index import StoredSequence
from pagedkv.tiers.checkpoints.manifest import LayerState, SequenceState, StoreIdentity
from pagedkv.tiers.codec.affine import AffineCodec, PageCodec, QuantizedTriple, Sixteen, codec_for
from pagedkv.tiers.codec.transform import Treatment
from pagedkv.tiers.cold.prefetch import ColdReader
from pagedkv.tiers.cold.record import ColdRecord, PageIdentity
from pagedkv.tiers.disk.disk import Disk, RealDisk
from pagedkv.tiers.hot import HotBuffer, HotTokens
from pagedkv.tiers.pager import Pager
from pagedkv.tiers.pages.layer_pager import LayerPager
from pagedkv.tiers.pages.page import Lineage, Page, Run
from pagedkv.tiers.pages.warm_slab import WarmSlab
from pagedkv.tiers.store import ColdStore, FileColdStore

__all__ = [
    "AffineCodec",
    "ColdReader",
    "ColdRecord",
    "ColdStore",
    "Disk",
    "FileColdStore",
    "HotBuffer",
    "HotTokens",
    "LayerPager",
    "LayerState",
    "Lineage",
    "Page",
    "PageCodec",
    "PageIdentity",
    "Pager",
    "QuantizedTriple",
    "RealDisk",
    "Run",
    "SequenceState",
    "Sixteen",
    "StoreIdentity",
    "StoredSequence",
    "TierBudget",
    "Treatment",
    "WarmSlab",
    "codec_for",
]

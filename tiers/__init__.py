"""The middle floor: hot, warm and cold storage of pages, the page codecs, and the pager.

Everything that calls mlx here runs on the generation thread; worker threads move bytes between
numpy memory and files.
"""

from pagedkv.tiers.budget import TierBudget
from pagedkv.tiers.checkpoints import StoredSequence
from pagedkv.tiers.codec import AffineCodec, PageCodec, QuantizedTriple, Sixteen, codec_for
from pagedkv.tiers.cold import ColdStore, FileColdStore
from pagedkv.tiers.disk import Disk, RealDisk
from pagedkv.tiers.hot import HotBuffer, HotTokens
from pagedkv.tiers.layer_pager import LayerPager, Lineage, Page, Run
from pagedkv.tiers.pager import Pager
from pagedkv.tiers.reader import ColdReader
from pagedkv.tiers.records import ColdRecord, PageIdentity
from pagedkv.tiers.sequence import LayerState, SequenceState, StoreIdentity
from pagedkv.tiers.treatment import Treatment
from pagedkv.tiers.warm import WarmSlab

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

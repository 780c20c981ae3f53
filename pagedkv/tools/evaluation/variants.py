"""What is compared with the model's own cache: a label, and the settings behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from pagedkv.config.tier_config import ALIKE, AUTO, TierConfig, names_file
from pagedkv.errors import ConfigError
from pagedkv.tiers.codec.transform import ROTATIONS, treated_parts
from pagedkv.tools.bench.contenders import QUANTIZED_GROUP
from pagedkv.tools.bench.settings import short_dtype

UNIFORM, LAYERS, LADDER, MLX_LM = "uniform", "layers", "ladder", "mlx-lm"
REFERENCE, AGAIN = "reference", "again"
TYPES = ("float32", "float16", "bfloat16")
PRECISIONS = ("fp16", "K8V8", "K8V4", "K4V8", "K4V4", "K4V2", "K3V3", "K2V2")
MLX_LM_BITS = (2, 3, 4, 5, 6, 8)
MEMORY = "1TB"
"""Budget of pages: as many as there are. It is taken as needed; on disk no bit would change."""


@dataclass(frozen=True)
class Variant:
    """A row to be: one way to keep keys and values.

    Attributes:
        label: of its rows; unlike all others'.
        config: of a paged cache of ours; None for a cache of mlx-lm's.
        bits: of mlx-lm's quantized cache; None for its 16-bit one.
        dequantized: attend what that cache stores in plain numbers, where MLX has no quantized
            product.
        calls: tokens per call in which prompts are read; None for as many as the others take.
        dtype: one of `TYPES`, in which the model computes; None for its own.
        note: for its rows.
    """

    label: str
    config: TierConfig | None = None
    bits: int | None = None
    dequantized: bool = False
    calls: int | None = None
    dtype: str | None = None
    note: str = ""

    @property
    def kind(self) -> str:
        """What kind of row it is.

        ``"uniform"`` (one precision), ``"layers"`` (more bits in some layers) or ``"ladder"`` (by
        distance, whatever layers have) if it is ours; of mlx-lm's ``"reference"``, ``"again"`` for
        the same in other calls or another type, or ``"mlx-lm"`` if it is quantized.
        """
        if self.config is None and self.bits is None:
            return REFERENCE if self.calls is None and self.dtype is None else AGAIN
        if self.config is None:
            return MLX_LM
        if len(self.config.ladder.steps) > 1:
            return LADDER
        return LAYERS if self.config.lookup_ladder or self.config.ladders.others else UNIFORM

    @property
    def precise_tokens(self) -> int:
        """Tokens at both ends that are in 16 bit whatever the text is."""
        config = self.config
        return 0 if config is None else config.hot_tokens + config.sink_tokens


def paged_variants(
    texts: Sequence[str],
    base: TierConfig,
    treatments: Sequence[str] = (),
    layer_kvs: Sequence[str] = (),
) -> list[Variant]:
    """Rows of ours.

    Args:
        texts: each one ladder (``"fp16:1024,K8V4:4096,K4V4"``), or precisions with commas between
            them (``"K8V4,K4V4"``), a row each.
        base: all else; its budgets are replaced by ones that hold everything in memory.
        treatments: values of `TierConfig.treatment`, a row each (``"K4V4 none"``; files by their
            names); that of `base` if there are none. What is kept in 8 bits and more is never
            treated: one row.
        layer_kvs: values of `TierConfig.layer_kv`, a row each (``"K4V4 same"``); that of `base` if
            there are none. Where layers that look things up would have no more bits, ``"auto"``
            and ``"same"`` are one row.

    Raises:
        ConfigError: if one is no precision and no ladder, no treatment or no layers, or comes
            twice.
    """
    labels = [label.strip() for text in texts for label in _split(text)]
    found = []
    for label in labels:
        if not label:
            raise ConfigError(f"{','.join(texts)!r} has an empty precision: write K8V4,K4V4")
        config = replace(base, kv=label, warm=MEMORY, cold=0, cold_dir=None, keep_free=0)
        rows = [(str(config.ladder), config)]
        if treatments and _treatable(config):
            names = zip(_names(treatments), treatments, strict=True)
            rows = [(f"{config.ladder} {n}", replace(config, treatment=t)) for n, t in names]
        named = [kv for kv in layer_kvs if kv not in (AUTO, ALIKE)]
        offered = layer_kvs if config.ladder.doubled != config.ladder else named
        if offered:
            rows = [(f"{n} {kv}", replace(c, layer_kv=kv)) for kv in offered for n, c in rows]
        found += [Variant(*row) for row in rows]
    require_different(found)
    return found


def _names(treatments: Sequence[str]) -> list[str]:
    """What treatments are called in labels: files by their names, if those are different."""
    names = [Path(t).name if names_file(t) else t for t in treatments]
    return names if len(set(names)) == len(names) else list(treatments)


def _treatable(config: TierConfig) -> bool:
    """Whether some keys or values are kept in so few bits that they are treated."""
    ladders = config.ladder, *(ladder for _, ladder in config.ladders.others)
    return any(any(treated_parts(ladder.steps, ROTATIONS[0])) for ladder in ladders)


def _split(text: str) -> list[str]:
    return [text] if ":" in text else text.split(",")


def mlx_lm_variants(bits: Sequence[int]) -> list[Variant]:
    """Rows of mlx-lm's own quantized cache, in groups of 64.

    Args:
        bits: of each.

    Raises:
        ConfigError: if MLX has no such bits.
    """
    for each in bits:
        if each not in MLX_LM_BITS:
            offered = ", ".join(map(str, MLX_LM_BITS))
            raise ConfigError(f"mlx-lm's cache has {offered} bits, got {each}")
    found = [Variant(f"mlx-lm {each} bit g{QUANTIZED_GROUP}", bits=each) for each in bits]
    require_different(found)
    return found


def again_variants(each: Sequence[int | str]) -> list[Variant]:
    """Rows of mlx-lm's own cache once more: how much is chance.

    In other calls nothing is rounded that is not rounded in the reference, too; sums are only
    added up in another order. In another type all is rounded otherwise, and in float32 next to
    nothing: what the reference's own rounding does.

    Args:
        each: tokens per call in which prompts are read, or one of `TYPES`; a row each, calls first.

    Raises:
        ConfigError: if one is no number of tokens or no type, or comes twice.
    """
    calls = [one for one in each if isinstance(one, int)]
    dtypes = [one for one in each if isinstance(one, str)]
    if few := [tokens for tokens in calls if tokens < 1]:
        raise ConfigError(f"a call has 1 token or more, got {few[0]}")
    if unknown := [dtype for dtype in dtypes if dtype not in TYPES]:
        raise ConfigError(f"unknown types {unknown}: there are {', '.join(TYPES)}")
    found = [Variant(f"mlx-lm in calls of {n}", calls=n) for n in calls]
    found += [Variant(f"mlx-lm {short_dtype(getattr(mx, d))}", dtype=d) for d in dtypes]
    require_different(found)
    return found


def shorter(variants: Sequence[Variant], chunk: int) -> list[Variant]:
    """The rows without those of the reference that would be the reference itself.

    Args:
        variants: of a comparison.
        chunk: tokens per call of the others.
    """
    return [v for v in variants if v.calls is None or v.calls < chunk]


def require_shorter(variants: Sequence[Variant], chunk: int) -> None:
    """Check that rows of the reference in other calls are not the reference itself.

    Args:
        variants: of a comparison.
        chunk: tokens per call of the others.

    Raises:
        ConfigError: naming the row.
    """
    for variant in variants:
        if variant.calls is not None and variant.calls >= chunk:
            raise ConfigError(
                f"{variant.label}: prompts are read in calls of {chunk:,} anyway: give fewer tokens"
            )


def require_other_types(variants: Sequence[Variant], reference: str) -> None:
    """Check that rows of the reference in other types are not the reference itself.

    Args:
        variants: of a comparison.
        reference: its label.

    Raises:
        ConfigError: naming the row.
    """
    for variant in variants:
        if variant.dtype is not None and variant.label == reference:
            raise ConfigError(f"{reference}: the model computes in {variant.dtype} anyway")


def require_different(variants: Sequence[Variant]) -> None:
    """Check that no label comes twice.

    Raises:
        ConfigError: naming it.
    """
    labels = [variant.label for variant in variants]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is given twice: once is enough")

"""Which treatment a model's keys and values get: a property of the model.

No prompt has a say in it. The model reads what it wrote itself (`own_text`), all that is
known to help is tried on it (`race`), and what came out is kept in the user's cache
directory under the model's fingerprint. So every process that uses the model has the same.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from pagedkv.allocator import KVShape, LayerLadders, Precision
from pagedkv.calibration.file import Calibration, digest_of
from pagedkv.config.tier_config import TierConfig, names_file
from pagedkv.errors import ConfigError
from pagedkv.integrations.mlx_lm.model_notes import keep_note, note_path, read_note
from pagedkv.integrations.mlx_lm.own_text import own_texts
from pagedkv.integrations.mlx_lm.race import Wanted, raced
from pagedkv.integrations.mlx_lm.retrieval_layers import must_look
from pagedkv.tiers import Treatment
from pagedkv.tiers.codec.transform import treated_parts

RULES = 2
"""Counted up when the same model would get other matrices."""


def choose_treatments(
    model: Any,
    config: TierConfig,
    shapes: Mapping[int, KVShape],
    fingerprint: str = "",
    ladders: LayerLadders | None = None,
    unknown: bool = True,
) -> dict[int, Treatment]:
    """The treatments of a model's layers.

    Args:
        model: of mlx-lm.
        config: says which precisions pages have, and may name a rotation for all, or a file.
        shapes: by layer number, what layers cache, as far as it is known.
        fingerprint: of the model, which a file must have; empty to keep nothing.
        ladders: of its layers; as the configuration says if None.
        unknown: whether they are needed; if not, the model reads only along with other processes
            that need them and share its layers.

    Returns:
        By layer number; layers that are left as they are do not occur.

    Raises:
        ConfigError: if there is no such file, or it is damaged or of another model.
    """
    ladders = ladders or config.ladders
    if names_file(config.treatment):  # read where nothing is treated, too: it may be damaged
        calibration = Calibration.load(config.treatment)
        calibration.require(fingerprint, shapes, config.treatment)
        parts = {number: _parts(config, ladders, number) for number in calibration}
        return {n: t.only(*parts[n]) for n, t in calibration.items() if any(parts[n])}
    wanted = {number: _wanted(config, ladders, number, shape) for number, shape in shapes.items()}
    wanted = {number: want for number, want in wanted.items() if want.keys or want.values}
    if config.treatment == "auto":
        return _automatic(model, wanted, fingerprint, unknown) if wanted else {}
    return {
        number: Treatment.plain(want.shape, config.treatment).only(want.keys, want.values)
        for number, want in wanted.items()
    }


def _parts(config: TierConfig, ladders: LayerLadders, number: int) -> tuple[bool, bool]:
    """Whether a layer's keys are treated, and whether its values are."""
    precisions = ladders.of(number).beyond(config.hot_tokens)
    return treated_parts(precisions, config.treatment)


def _wanted(config: TierConfig, ladders: LayerLadders, number: int, shape: KVShape) -> Wanted:
    precisions = ladders.of(number).beyond(config.hot_tokens)
    bits = (min(p.key_bits for p in precisions), min(p.value_bits for p in precisions))
    return Wanted(shape, Precision(*bits), *_parts(config, ladders, number))


def name_of(
    config: TierConfig,
    shapes: Mapping[int, KVShape],
    treatments: Mapping[int, Treatment],
    ladders: LayerLadders,
) -> str:
    """What a store's identity says of treatments; empty if there are none.

    The matrices themselves are kept in the store: they are not the same on every machine.

    Args:
        config: says which treatment is wanted.
        shapes: by layer number, what layers cache, as far as it is known.
        treatments: of the layers; those of a file name it.
        ladders: of the layers.
    """
    if names_file(config.treatment):
        return digest_of(treatments) if treatments else ""
    return config.treatment if any(any(_parts(config, ladders, n)) for n in shapes) else ""


def _automatic(
    model: Any, wanted: Mapping[int, Wanted], fingerprint: str, unknown: bool
) -> dict[int, Treatment]:
    """The winners of the race, or of an earlier one."""
    what = hashlib.sha256(f"{RULES} {sorted(wanted.items())}".encode()).hexdigest()[:16]
    path = note_path(fingerprint, f"{what}.json")
    known = _kept(path, fingerprint, wanted)
    if not must_look(model, unknown and known is None):
        return dict(known or {})
    try:
        found = raced(model, wanted, *own_texts(model))
    except Exception as e:  # whatever an unknown model raises that takes other inputs
        warnings.warn(
            f"{type(model).__name__} did not read tokens of its own ({type(e).__name__}: {e}): its "
            f"keys and values are quantized as they are, as with treatment='none'; a file of "
            f"`pagedkv calibrate` may do better",
            stacklevel=5,
        )
        return {}
    finally:
        mx.clear_cache()
    keep_note(path, Calibration(fingerprint, 0, found).to_bytes())
    return found if known is None else dict(known)


def _kept(
    path: Path | None, fingerprint: str, wanted: Mapping[int, Wanted]
) -> Mapping[int, Treatment] | None:
    """What an earlier race found; None if there was none, or the file is damaged."""
    if path is None or (content := read_note(path)) is None:
        return None
    try:
        kept = Calibration.from_bytes(content, path)
        kept.require(fingerprint, {n: want.shape for n, want in wanted.items()}, str(path))
    except ConfigError:
        return None
    return kept

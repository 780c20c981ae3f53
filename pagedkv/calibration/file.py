"""What `pagedkv.calibrate` found, and the file that `TierConfig.treatment` may name."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from pagedkv.allocator import KVShape
from pagedkv.config.tier_config import names_file
from pagedkv.errors import ConfigError
from pagedkv.tiers import Treatment
from pagedkv.tiers.disk.whole_file import whole_file

FORMAT = "pagedkv calibration 2"


@dataclass(frozen=True)
class Calibration(Mapping[int, Treatment]):
    """Treatments by layer number (in models that nest caches: by the number of the cache).

    Attributes:
        model: fingerprint of the model that they were measured in; they are for no other.
        tokens: how many were read; 0 for what was not made by `calibrate`.
        treatments: by layer; layers whose queries were not seen do not occur, and are left as
            they are.
    """

    model: str
    tokens: int
    treatments: Mapping[int, Treatment]

    def __getitem__(self, layer: int) -> Treatment:
        return self.treatments[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.treatments)

    def __len__(self) -> int:
        return len(self.treatments)

    def to_bytes(self) -> bytes:
        """As a JSON document in UTF-8; matrices in base64, little-endian."""
        layers = [
            {
                "layer": number,
                "shape": _sizes(treatment.shape),
                **treatment.describe(),
                "reason": treatment.reason,
                "matrices": base64.b64encode(_little(treatment.all_words)).decode(),
            }
            for number, treatment in sorted(self.items())
        ]
        document = {"format": FORMAT, "model": self.model, "tokens": self.tokens, "layers": layers}
        return (json.dumps(document) + "\n").encode()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file for `TierConfig.treatment`, complete or not at all.

        Args:
            path: of the file; it ends in ``.json``. A file of that name is replaced.

        Raises:
            ConfigError: if the name ends otherwise, or the file cannot be written.
        """
        target, content = require_name(path), self.to_bytes()
        try:
            with whole_file(target) as file:
                file.write(content)
        except OSError as e:
            raise ConfigError(f"cannot write {str(path)!r}: {e.strerror}") from e

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ConfigError: if there is no such file, or it is damaged or of another format.
        """
        try:
            content = Path(os.path.expanduser(path)).read_bytes()  # noqa: PTH111
        except OSError as e:
            raise ConfigError(
                f"cannot read the calibration {str(path)!r}: {e.strerror}; `pagedkv calibrate` "
                f"makes one"
            ) from e
        return cls.from_bytes(content, path)

    @classmethod
    def from_bytes(cls, content: bytes, path: str | os.PathLike[str]) -> Calibration:
        """Read what `to_bytes` gave.

        Args:
            content: of a file.
            path: where it was, for errors.

        Raises:
            ConfigError: if it is damaged or of another format.
        """
        try:
            saved = json.loads(content.decode())
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"{str(path)!r} is not a calibration: {e}") from e
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            found = saved.get("format") if isinstance(saved, dict) else None
            raise ConfigError(
                f"{str(path)!r} is not a calibration that this version reads: its format is "
                f"{found!r}, not {FORMAT!r}"
            )
        try:
            model, tokens = saved["model"], saved["tokens"]
            if not isinstance(model, str) or not isinstance(tokens, int):
                raise TypeError("model is text and tokens are a number")
            layers = [_layer(entry, tokens) for entry in saved["layers"]]
        except (ConfigError, KeyError, TypeError, ValueError) as e:
            reason = f"there is no {e}" if isinstance(e, KeyError) else e
            raise ConfigError(f"the calibration {str(path)!r} is damaged: {reason}") from e
        if len(dict(layers)) < len(layers):
            raise ConfigError(f"the calibration {str(path)!r} is damaged: a layer comes twice")
        return cls(model, tokens, dict(layers))

    def require(self, model: str, shapes: Mapping[int, KVShape], path: str) -> None:
        """Check that it is of this model.

        Args:
            model: fingerprint.
            shapes: by layer, as far as they are known.
            path: of the file, for errors.

        Raises:
            ConfigError: if it is of another one.
        """
        if model != self.model:
            raise ConfigError(
                f"{path!r} was calibrated with another model: it belongs to {self.model}, this "
                f"one is {model} (weights in other bits or another type are another model)"
            )
        for number, treatment in self.items():
            if shapes.get(number, treatment.shape) != treatment.shape:
                raise ConfigError(
                    f"{path!r} is damaged: layer {number} caches {_sizes(shapes[number])} (heads, "
                    f"key and value channels), and it has {_sizes(treatment.shape)}"
                )


def digest_of(treatments: Mapping[int, Treatment]) -> str:
    """16 hex digits that name the matrices of all layers."""
    text = " ".join(f"{number}:{treatments[number].digest}" for number in sorted(treatments))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def require_name(path: str | os.PathLike[str]) -> Path:
    """The path of a calibration to be written.

    Raises:
        ConfigError: if `TierConfig.treatment` would not take it for one.
    """
    if not names_file(os.fspath(path)):
        raise ConfigError(f"a calibration is a file NAME.json, got {os.fspath(path)!r}")
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path's raises where there is no home


def _sizes(shape: KVShape) -> list[int]:
    return [shape.kv_heads, shape.key_dim, shape.value_dim]


def _layer(entry: dict[str, Any], tokens: int) -> tuple[int, Treatment]:
    number, sizes = entry["layer"], entry["shape"]
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"{number!r} is no layer")
    words = np.frombuffer(base64.b64decode(entry["matrices"], validate=True), "<u4")
    reason = f"calibrated on {tokens:,} tokens" if tokens else str(entry.get("reason", ""))
    return number, Treatment.restore(entry, words.astype(np.uint32), KVShape(*sizes), reason)


def _little(words: mx.array) -> bytes:
    return np.asarray(words).astype("<u4").tobytes()

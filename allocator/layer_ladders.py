"""Which ladder each layer has: the same for all of them but for some."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from pagedkv.allocator.errors import ConfigError
from pagedkv.allocator.precision import Ladder

_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
MOST_LAYERS = 10**6
"""Above every layer number that can be meant."""


@dataclass(frozen=True)
class LayerLadders:
    """Precision by distance, layer by layer.

    Attributes:
        common: of every layer that is not in `others`.
        others: layers with a ladder of their own, by layer number, as sorted pairs.
    """

    common: Ladder
    others: tuple[tuple[int, Ladder], ...] = ()

    @classmethod
    def of_layers(cls, common: Ladder, others: Mapping[int, Ladder]) -> LayerLadders:
        """The ladders of all layers; who is given the common one is like those not mentioned."""
        own = ((n, ladder) for n, ladder in sorted(others.items()) if ladder != common)
        return cls(common, tuple(own))

    @classmethod
    def parse(cls, common: str, others: str = "") -> LayerLadders:
        """Read ladders as text.

        Args:
            common: see `Ladder.parse`.
            others: ladders and the layers that have them, such as ``"K8V8@7,17-20"``; of several,
                ``"K8V8@7,17;K3V3@0-3"``. Empty if all layers are alike.

        Raises:
            ConfigError: on a ladder that is none, a layer that is no number, or one with two.
        """
        found: dict[int, Ladder] = {}
        for part in others.split(";") if others.strip() else ():
            text, at, layers = part.rpartition("@")
            if not at:
                raise ConfigError(
                    f"layers {part.strip()!r}: write a ladder and the layers that have it, as in "
                    f"'K8V8@7,17-20', with ';' between several"
                )
            ladder = Ladder.parse(text)
            for number in _numbers(layers, part):
                if number in found:
                    raise ConfigError(f"layers {others!r}: layer {number} has two ladders")
                found[number] = ladder
        return cls.of_layers(Ladder.parse(common), found)

    @cached_property
    def _by_layer(self) -> dict[int, Ladder]:
        return dict(self.others)

    def of(self, layer: int) -> Ladder:
        """The ladder of a layer, by its number among the model's."""
        return self._by_layer.get(layer, self.common)

    def part(self, layers: int, layer: int, held_back: Fraction | int = 0) -> Fraction:
        """A layer's part of what layers share: in proportion to what a token takes in each.

        Args:
            layers: that share it, those of `others` included.
            layer: number of the layer.
            held_back: so much of the largest part is given to nobody.
        """
        own = [ladder.weight for _, ladder in self.others[:layers]]
        weights = own + [self.common.weight] * (layers - len(own))
        return self.of(layer).weight / (sum(weights) + Fraction(held_back) * max(weights))

    @property
    def others_text(self) -> str:
        """What `parse` takes for `others`."""
        layers: dict[Ladder, list[int]] = {}
        for number, ladder in self.others:
            layers.setdefault(ladder, []).append(number)
        return ";".join(f"{ladder}@{','.join(map(str, n))}" for ladder, n in layers.items())

    def __str__(self) -> str:
        return f"{self.common};{self.others_text}" if self.others else str(self.common)


def _numbers(text: str, whole: str) -> list[int]:
    """Layer numbers, from ``"7,17-20"``."""
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last > MOST_LAYERS:
            raise ConfigError(
                f"layers {whole.strip()!r}: {part.strip()!r} is no layer number and no range of "
                f"them, as in '7,17-20'"
            )
        found += range(first, last + 1)
    return found

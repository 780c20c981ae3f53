"""What became of each fault that was injected."""

from __future__ import annotations

import re
from collections import Counter

from pagedkv.tools.stress.faulty_disk import APPLIES, SILENT, FaultyDisk, Injection
from tests.store_oracle import Want

HARMLESS = ("flip_read", "slow")
"""Kinds that, unseen, changed nothing: what was read was not needed. The others were recovered."""

CHECKPOINT = re.compile(r"sequence-([0-9a-f]{16})\.checkpoint")


class Touched:
    """Where in the files bytes are not what was written there last."""

    def __init__(self) -> None:
        self._pages: dict[str, list[Injection]] = {}
        self._checkpoints: dict[str, list[Injection]] = {}
        self._temporary: dict[str, list[Injection]] = {}
        self.all: list[Injection] = []

    def add(self, fault: Injection) -> None:
        if fault.kind not in SILENT:
            return
        if fault.call != "also":
            self.all.append(fault)
        name = fault.path.name if fault.path else ""
        if match := CHECKPOINT.match(name):
            self._temporary.setdefault(match[1], []).append(fault)
        else:
            self._pages.setdefault(name, []).append(fault)

    def page(self, want: Want, offset: int) -> list[Injection]:
        """Faults that touched a page."""
        name = f"layer-{want.layer:04d}-{want.nbytes // 1024}k.kv"
        stop = offset + want.nbytes
        return [f for f in self._pages.get(name, ()) if f.start < stop and f.stop > offset]

    def checkpoint(self, name: str) -> list[Injection]:
        return self._checkpoints.get(name, [])

    def place_checkpoint(self, name: str, certain: bool) -> None:
        """The temporary file got its name, or may have got it."""
        new = self._temporary.pop(name, [])
        self._checkpoints[name] = new if certain else [*self.checkpoint(name), *new]

    def drop_temporary(self, name: str) -> None:
        self._temporary.pop(name, None)

    def forget_checkpoint(self, name: str) -> list[Injection]:
        return self._checkpoints.pop(name, [])


class Tally:
    """Counts by kind over all rounds."""

    def __init__(self) -> None:
        self.injected: Counter[str] = Counter()
        self.fates: Counter[tuple[str, str]] = Counter()
        self.counts: Counter[str] = Counter()
        self._seen: set[int] = set()

    def fate(self, kind: str, fate: str) -> None:
        self.fates[kind, fate] += 1

    def unseen(self, kind: str) -> str:
        return "harmless" if kind in HARMLESS else "recovered"

    def detected_later(self, faults: list[Injection]) -> None:
        """Silent faults that a read has found."""
        self._seen.update(id(f) for f in faults)

    def finish(self, disk: FaultyDisk, touched: Touched) -> None:
        """The end of a round: silent faults that nobody read were harmless."""
        self.injected.update(disk.injected)
        for fault in touched.all:
            self.fate(fault.kind, "detected" if id(fault) in self._seen else "harmless")
        self._seen.clear()

    def report(self) -> str:
        columns = ("detected", "harmless", "recovered")
        lines = [f"{'fault':12}{'injected':>10}" + "".join(f"{c:>11}" for c in columns)]
        for kind in [*APPLIES]:
            row = "".join(f"{self.fates[kind, c]:>11,}" for c in columns)
            lines.append(f"{kind:12}{self.injected[kind]:>10,}{row}")
        lines += [f"{what}: {count:,}" for what, count in self.counts.items()]
        return "\n".join(lines)

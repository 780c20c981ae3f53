"""Caches of synthetic tokens whose every bit is known, for the tests of the store."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

import pagedkv
from pagedkv.tiers.disk.disk import RealDisk

HEADS, DIM = 1, 64


def settings(cold_dir: Path | str | None, **others: Any) -> pagedkv.TierConfig:
    """A few pages of 32 KiB in memory, behind a window of 64 tokens."""
    given: dict[str, Any] = dict(
        hot_tokens=64,
        sink_tokens=4,
        page_tokens=256,
        warm="215KB",
        cold="4MB",
        write_buffer=8 * 16384,
    )
    given["cold_dir"] = None if cold_dir is None else str(cold_dir)
    return pagedkv.TierConfig(**{**given, **others})


def empty_cache(config: pagedkv.TierConfig, layers: int = 2) -> pagedkv.PagedCache:
    return pagedkv.PagedCache.standalone(layers, config, model="synthetic")


def tokens(layer: int, start: int, stop: int) -> tuple[mx.array, mx.array]:
    """Keys and values that depend on layer and position alone."""
    rng = np.random.default_rng([layer, start])
    shape = (1, HEADS, stop - start, DIM)
    return tuple(mx.array(rng.standard_normal(shape).astype(np.float16)) for _ in range(2))


def extend(cache: pagedkv.PagedCache, *counts: int) -> list[mx.array]:
    """Append chunks of tokens; the last chunk's attention in each layer."""
    out: list[mx.array] = []
    for count in counts:
        start, out = cache.offset, []
        for i, layer in enumerate(cache):
            k, v = tokens(i, start, start + count)
            q = tokens(100 + i, start, start + count)[0]
            out.append(pagedkv.attention(q, k, v, cache=layer, scale=DIM**-0.5))
        mx.eval(out)
    return out


def fill(cache: pagedkv.PagedCache, *counts: int) -> None:
    """Append the same tokens as `extend`, and attend from the last one of each chunk alone.

    The pages are the same; the attention of thousands of tokens in 16 bit takes seconds here.
    """
    for count in counts:
        start, out = cache.offset, []
        for i, layer in enumerate(cache):
            k, v = tokens(i, start, start + count)
            if count > 1:
                layer.append(k[:, :, :-1], v[:, :, :-1])
            q, k, v = tokens(100 + i, start, start + 1)[0], k[:, :, -1:], v[:, :, -1:]
            out.append(pagedkv.attention(q, k, v, cache=layer, scale=DIM**-0.5))
        mx.eval(out)


def filled_with_zeros(cache: pagedkv.PagedCache, tokens: int) -> pagedkv.CacheStats:
    """Put so many tokens into every layer (2 heads of 64), and seal what is due."""
    for done in range(0, tokens, 100):
        zeros = mx.zeros((1, 2, min(100, tokens - done), 64))
        for layer in cache:
            layer.append(zeros, zeros)
    for layer in cache:
        layer._settle()
    return cache.stats()


def same(a: Sequence[mx.array], b: Sequence[mx.array]) -> bool:
    return len(a) == len(b) and all(mx.array_equal(x, y).item() for x, y in zip(a, b, strict=True))


def check(cache: pagedkv.PagedCache) -> None:
    """Every conservation law, for a cache that is alone in its pager."""
    for layer in cache.paged_layers:
        if layer._pager is not None:
            layer._pager.check([layer._table])
    if cold := cache.context.pager.open_cold:
        cold.flush()
        cold.check()


class Recorder(RealDisk):
    """Counts calls, and tells of each one before it is made."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        self.calls.append(name)

    def __getattribute__(self, name: str) -> Any:
        real = super().__getattribute__(name)
        if name.startswith("_") or name not in CALLS:
            return real

        def call(*args: Any) -> Any:
            self.before(name, args)
            return real(*args)

        return call


CALLS = [name for name in vars(RealDisk) if not name.startswith("_")]


class Moment(NamedTuple):
    """A call of a disk: so many after the first, or after the n-th rename.

    How many calls there are between two renames differs from run to run: threads write several
    pages at once, or one by one. Only a rename, and what a flush does next, is always there.
    """

    calls: int
    renames: int = 0


NEVER = Moment(0, 10**9)


class DyingDisk(Recorder):
    """The process dies at one of its calls: that one may be done in part, no later one is."""

    def __init__(self, at: Moment, tear: bool = False) -> None:
        super().__init__()
        self.at, self.tear, self.dead = at, tear, False
        self._renames, self._begin = 0, 0

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "close":
            return  # the system closes what a dead process left open
        super().before(name, args)
        if name == "rename":
            self._renames += 1
            if self._renames == self.at.renames:
                self._begin = len(self.calls) - 1
        come = self._renames >= self.at.renames and len(self.calls) > self._begin + self.at.calls
        if not self.dead and come:
            self.dead = True
            if self.tear and name == "pwrite":
                fd, buffers, offset = args
                RealDisk().pwrite(fd, [buffers[0][: len(buffers[0]) // 2]], offset)
        if self.dead:
            raise OSError(errno.EIO, f"dead at {name}")


class PowerDisk(DyingDisk):
    """The machine stops at one of its calls: what was not synced is lost.

    Args:
        at: the call.
        names_at_once: names survive without a sync, the content of their files does not, as on
            journaling file systems.
    """

    def __init__(self, at: Moment, names_at_once: bool) -> None:
        super().__init__(at)
        self._at_once = names_at_once
        self._open: dict[int, Path] = {}
        self._content: dict[int, bytes] = {}  # by inode
        self._names: dict[Path, dict[str, int | None]] = {}

    def open(self, path: Path, flags: int) -> int:
        new = not path.exists()
        fd = RealDisk.open(self, path, flags)
        self._open[fd] = path
        if new:
            self._content.pop(path.stat().st_ino, None)
            self._note(path.parent)
        return fd

    def sync(self, fd: int) -> None:
        path = self._open[fd]
        if path.is_dir():
            self._note(path, synced=True)
        else:
            self._content[os.fstat(fd).st_ino] = path.read_bytes()

    def rename(self, old: Path, new: Path) -> None:
        RealDisk.rename(self, old, new)
        self._note(new.parent)

    def unlink(self, path: Path) -> None:
        RealDisk.unlink(self, path)
        self._note(path.parent)

    def mkdir(self, path: Path) -> None:
        RealDisk.mkdir(self, path)
        self._note(path.parent)

    def _note(self, directory: Path, synced: bool = False) -> None:
        if synced or self._at_once:
            self._names[directory] = {
                p.name: None if p.is_dir() else p.stat().st_ino for p in directory.iterdir()
            }

    def after_the_failure(self, directory: Path, target: Path) -> None:
        """Put what is left of a directory somewhere else."""
        for name, inode in self._names.get(directory, {}).items():
            if inode is None:
                (target / name).mkdir(mode=0o700)
                self.after_the_failure(directory / name, target / name)
            else:
                (target / name).write_bytes(self._content.get(inode, b""))
                (target / name).chmod(0o600)

"""A safetensors file that is written array by array and read likewise, and digests of arrays."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.errors import CacheStateError, ConfigError
from pagedkv.tiers.disk.checksum import SECTOR_BYTES, sector_sums
from pagedkv.tiers.disk.whole_file import whole_file

Bytes = npt.NDArray[np.uint8]

DTYPES = {
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
    "U32": mx.uint32,
    "I32": mx.int32,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
NO_DIGEST = 32 * "0"
"""In the place of a digest that is not known yet."""

_SUMMED_BYTES = 2**20  # at once, so that the second sum finds them in the processor's cache
_MOST_HEADER = 2**27
_MOST_AXES = 4
_MOST = 2**24


def is_whole(value: Any, least: int = 0, most: int = _MOST) -> bool:
    """Whether what a file says is a whole number that can be; products of a few stay small."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


# Digests


def array_digest(name: str, array: mx.array) -> str:
    """32 hex digits that change with an array's name within its layer, type, shape and bytes.

    SHA-256, cut to 128 bits, over the sums of `tiers.checksums`, which takes a quarter of the
    time that it takes over every byte. It notices accidents, not forgers.

    Args:
        name: such as ``"hot_keys"`` or ``"p3"``.
        array: of any type; evaluated here.
    """
    digest = hashlib.sha256(f"pagedkv array {name} {array.dtype} {list(array.shape)}".encode())
    data = bytes_of(array)
    whole = data.size - data.size % SECTOR_BYTES
    for at in range(0, whole, _SUMMED_BYTES):
        digest.update(sector_sums(data[at : min(at + _SUMMED_BYTES, whole)]).data)
    digest.update(data[whole:].data)
    return digest.hexdigest()[: len(NO_DIGEST)]


def text_digest(*told: Any) -> str:
    """The digest of what is JSON, however that is written."""
    text = json.dumps(["pagedkv text", *told], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[: len(NO_DIGEST)]


def bytes_of(array: mx.array) -> Bytes:
    """An array's bytes, not copied where it is contiguous."""
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array  # unknown to numpy
    mx.eval(plain)
    return np.ascontiguousarray(plain).reshape(-1).view(np.uint8)


# Writing


class Entry(NamedTuple):
    """An array of a file.

    Attributes:
        name: in the file.
        dtype: of its numbers.
        shape: likewise.
        produce: makes it, when its turn has come.
    """

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]
    produce: Callable[[], mx.array]

    @property
    def nbytes(self) -> int:
        """Its length in the file."""
        return math.prod(self.shape) * self.dtype.size


def write_arrays(
    path: str | os.PathLike[str],
    entries: Sequence[Entry],
    metadata: dict[str, str],
    complete: Callable[[dict[str, Any]], None],
) -> None:
    """Write a file, one array in memory at a time, complete or not at all.

    Args:
        path: of the file; through a link, of the one that this names.
        entries: the arrays.
        metadata: what the header says beside them.
        complete: called with the header when all arrays are written; may exchange what the
            metadata say for something as long.

    Raises:
        OSError: if it cannot be written.
        ConfigError: if the path is that of something else than a file.
        CacheStateError: if an array is another than was said.
    """
    target, mode = _target(path)
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    with whole_file(target) as f:
        if mode is not None:
            os.fchmod(f.fileno(), mode)
        _write_header(f, header)
        for entry in entries:
            array = entry.produce()
            if (array.dtype, array.shape) != (entry.dtype, entry.shape):
                raise CacheStateError("the cache was changed while it was saved: save again")
            f.write(bytes_of(array).data)
        complete(header)
        _write_header(f, header)
        f.flush()
        os.fsync(f.fileno())


def _target(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """The file that a path means, through links, and its permissions if it is there.

    Raises:
        ConfigError: if there is something else than a file: that is not replaced.
    """
    try:
        target = Path(os.path.realpath(path))
        found = target.stat()
    except FileNotFoundError:
        return target, None
    except ValueError as e:
        raise ConfigError(f"{str(path)!r} is no path: {e}") from e
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(
            f"{str(path)!r} is {_kind_of(found.st_mode)}, not a file: a cache is saved to a file"
        )
    return target, stat.S_IMODE(found.st_mode)


def _kind_of(mode: int) -> str:
    for known, name in ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe")):
        if known(mode):
            return name
    return "a device or socket"


def _write_header(f: BinaryIO, header: dict[str, Any]) -> None:
    """Write the header to the beginning of a file; its length is always the same."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    f.seek(0)
    f.write(struct.pack("<Q", len(text)))
    f.write(text)


# Reading


@dataclass(frozen=True)
class StoredArray:
    """An array in a file, read from there when it is called.

    Attributes:
        path: of the file.
        offset: bytes before it.
        dtype: of its numbers.
        shape: likewise.
    """

    path: str
    offset: int
    dtype: mx.Dtype
    shape: tuple[int, ...]

    def __call__(self) -> mx.array:
        """Read it.

        Raises:
            CacheStateError: if it cannot be read.
        """
        nbytes = math.prod(self.shape) * self.dtype.size
        try:
            with Path(self.path).open("rb") as f:
                f.seek(self.offset)
                data = f.read(nbytes)
        except OSError as e:
            raise CacheStateError(f"{self.path!r} cannot be read: {e}") from e
        if len(data) != nbytes:
            raise CacheStateError(f"{self.path!r} was cut short while it was loaded")
        words = np.frombuffer(data, f"u{self.dtype.size}")
        return mx.array(words).view(self.dtype).reshape(self.shape)


def read_arrays(path: str) -> tuple[dict[str, Any], dict[str, StoredArray]]:
    """The header of a safetensors file, and its arrays.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: if it is none.
        OSError: if it cannot be read.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError("it is no regular file")
    with Path(path).open("rb") as f:
        length, (size,) = os.fstat(f.fileno()).st_size, struct.unpack("<Q", f.read(8).ljust(8))
        if size > min(length - 8, _MOST_HEADER):
            raise ValueError(f"its header tells of {size:,} bytes, and it has {length:,}")
        header = json.loads(f.read(size))
    stored: dict[str, StoredArray] = {}
    at = 8 + size
    arrays = ((name, told) for name, told in header.items() if name != "__metadata__")
    for name, told in sorted(arrays, key=lambda pair: pair[1]["data_offsets"]):
        begin, end = told["data_offsets"]
        shape = told["shape"]
        possible = len(shape) <= _MOST_AXES and all(map(is_whole, shape))
        if not possible or told["dtype"] not in DTYPES:
            raise ValueError(f"{name!r} is {told['dtype']} {shape}")
        array = StoredArray(path, at, DTYPES[told["dtype"]], tuple(shape))
        nbytes = math.prod(shape) * array.dtype.size
        if [begin, end] != [at - 8 - size, at - 8 - size + nbytes]:
            raise ValueError(f"{name!r} has {nbytes:,} bytes and is at {begin} to {end}")
        stored[name] = array
        at += nbytes
    if at != length:
        raise ValueError(f"its header tells of {at:,} bytes, and it has {length:,}")
    return header, stored

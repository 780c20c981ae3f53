"""What a checkpoint says of a sequence: plain numbers, checked before anybody uses them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pagedkv.allocator import KVShape, PagedKVError
from pagedkv.allocator.geometry import PAGE_TOKENS

SEQUENCE_ID = re.compile(r"[0-9a-f]{16}")
DIGEST = re.compile(r"[0-9a-f]{64}")
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
NOT_INDEXED = ".noindex"
"""Ends the names of directories that macOS's search leaves alone."""

LIMIT = 2**40
"""Above every number of tokens, heads or channels that can be meant."""


@dataclass(frozen=True)
class StoreIdentity:
    """What decides the bytes of pages: stores are apart if they differ in it.

    Attributes:
        model: the model's fingerprint, or a name that the user gave; may be empty.
        layers: layers that are paged.
        kv: the ladder, as text.
        sink_tokens: tokens before the first page.
        page_tokens: as configured; None lets the geometry choose.
        hot_dtype: as configured.
    """

    model: str
    layers: int
    kv: str
    sink_tokens: int
    page_tokens: int | None
    hot_dtype: str | None

    @property
    def digest(self) -> bytes:
        """16 bytes that name it; they are mixed into the checksum of every page."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(f"pagedkv store 1 {text}".encode()).digest()[:16]

    @property
    def directory(self) -> str:
        """Name of the store's directory."""
        return f"store-{self.digest.hex()}{NOT_INDEXED}"

    def __str__(self) -> str:
        parts = [self.model or "a model without a name", f"{self.layers} layers", f"kv={self.kv}"]
        parts += [f"sink_tokens={self.sink_tokens}"]
        parts += [f"page_tokens={self.page_tokens}"] if self.page_tokens else []
        parts += [f"hot_dtype={self.hot_dtype}"] if self.hot_dtype else []
        return ", ".join(parts)


@dataclass(frozen=True)
class LayerState:
    """One layer of a sequence.

    Attributes:
        layer: layer number in the model.
        kv_heads, key_dim, value_dim: see `KVShape`.
        dtype: of the hot tokens.
        page_tokens: tokens in a full page.
        hot_tokens: tokens that are in no page.
        pages: pages.
        dropped: tokens that a window left behind: they are nowhere.
        treatment: `Treatment.digest` of the pages; empty for none, and without pages; None if a
            file does not say it.
    """

    layer: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    page_tokens: int
    hot_tokens: int
    pages: int
    dropped: int = 0
    treatment: str | None = ""

    @property
    def shape(self) -> KVShape:
        """Heads and channels."""
        return KVShape(self.kv_heads, self.key_dim, self.value_dim)

    @property
    def key_bytes(self) -> int:
        """Bytes of the hot keys."""
        return self.kv_heads * self.hot_tokens * self.key_dim * DTYPE_BYTES[self.dtype]

    @property
    def value_bytes(self) -> int:
        """Bytes of the hot values."""
        return self.kv_heads * self.hot_tokens * self.value_dim * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class SequenceState:
    """A sequence at the time of a flush.

    Attributes:
        identity: of the store that it lies in.
        sequence: its name, 16 hex digits.
        tokens: tokens held, hot ones included, the same in every layer.
        flushed_at: nanoseconds since 1970.
        layers: every layer that holds tokens, in order.
        prefix: digests of its tokens, page by page, as 64 hex digits each; none if they were not
            told.
        prompt_rate: prompt tokens per second where it was computed; 0 if that is not known.
        spare: whether it is kept for prompts that begin alike only, and may be discarded.
    """

    identity: StoreIdentity
    sequence: str
    tokens: int
    flushed_at: int
    layers: tuple[LayerState, ...]
    prefix: tuple[str, ...] = ()
    prompt_rate: float = 0.0
    spare: bool = False

    @property
    def pages(self) -> int:
        """Pages of all layers."""
        return sum(layer.pages for layer in self.layers)

    @property
    def hot_bytes(self) -> int:
        """Bytes of the hot tokens of all layers."""
        return sum(layer.key_bytes + layer.value_bytes for layer in self.layers)

    def to_json(self) -> bytes:
        """As text, for the checkpoint file."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()


class MalformedError(PagedKVError, ValueError):
    """A description that cannot be meant; says which entry, and is told on as a damaged file."""


def parse_sequence(text: bytes) -> SequenceState:
    """Read what `SequenceState.to_json` wrote, trusting nothing.

    Raises:
        MalformedError: naming the entry that is missing, of another kind, or out of range.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise MalformedError(f"its description is no JSON ({type(e).__name__})") from e
    take = _Fields(raw, "")
    state = SequenceState(
        identity=_identity(take.mapping("identity")),
        sequence=take.text("sequence", SEQUENCE_ID.fullmatch),
        tokens=take.number("tokens", 0),
        flushed_at=take.number("flushed_at", 0, 2**63),
        layers=tuple(_layer(_Fields(item, "layers")) for item in take.items("layers")),
        # Those before knew none of these.
        prefix=tuple(map(_digest, take.items("prefix"))) if "prefix" in take.raw else (),
        prompt_rate=take.rate("prompt_rate") if "prompt_rate" in take.raw else 0.0,
        spare=take.raw.get("spare") is True,
    )
    numbers = [layer.layer for layer in state.layers]
    if bool(numbers) != bool(state.tokens) or numbers != sorted(set(numbers)):
        raise MalformedError(f"its layers are {numbers[:8]}: not one of each, in order")
    return state


def _identity(take: _Fields) -> StoreIdentity:
    optional = take.raw.get("page_tokens"), take.raw.get("hot_dtype")
    return StoreIdentity(
        model=take.text("model"),
        layers=take.number("layers", 1),
        kv=take.text("kv"),
        sink_tokens=take.number("sink_tokens", 0),
        page_tokens=None if optional[0] is None else take.number("page_tokens", 1),
        hot_dtype=None if optional[1] is None else take.text("hot_dtype"),
    )


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        raise MalformedError("a digest in prefix is not 64 hex digits")
    return value


def _layer(take: _Fields) -> LayerState:
    return LayerState(
        layer=take.number("layer", 0, 10**6),
        kv_heads=take.number("kv_heads", 1),
        key_dim=take.number("key_dim", 1),
        value_dim=take.number("value_dim", 1),
        dtype=take.text("dtype", DTYPE_BYTES.get),
        page_tokens=take.one_of("page_tokens", PAGE_TOKENS),
        hot_tokens=take.number("hot_tokens", 0),
        pages=take.number("pages", 0),
        # Files from before there were windows do not have it.
        dropped=take.number("dropped", 0) if "dropped" in take.raw else 0,
        treatment=take.text("treatment") if "treatment" in take.raw else None,
    )


class _Fields:
    """Entries of a JSON object, each of the kind it must have."""

    def __init__(self, raw: Any, where: str) -> None:
        if not isinstance(raw, dict):
            raise MalformedError(f"{where or 'its description'} is no JSON object")
        self.raw: Mapping[str, Any] = raw
        self._where = where

    def number(self, name: str, least: int, most: int = LIMIT) -> int:
        value = self.raw.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise MalformedError(f"{self._where} {name} is no number from {least} to {most}")
        return value

    def rate(self, name: str) -> float:
        value = self.raw.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise MalformedError(f"{self._where} {name} is no number")
        if not 0 <= value < LIMIT:  # NaN is neither
            raise MalformedError(f"{self._where} {name} is no rate")
        return float(value)

    def one_of(self, name: str, known: Collection[int]) -> int:
        value = self.number(name, min(known), max(known))
        if value not in known:
            raise MalformedError(f"{self._where} {name} is none of {sorted(known)}")
        return value

    def text(self, name: str, known: Callable[[str], Any] | None = None) -> str:
        value = self.raw.get(name)
        if not isinstance(value, str) or (known and not known(value)):
            raise MalformedError(f"{self._where} {name} is not what it can be")
        return value

    def mapping(self, name: str) -> _Fields:
        return _Fields(self.raw.get(name), name)

    def items(self, name: str) -> list[Any]:
        value = self.raw.get(name)
        if not isinstance(value, list):
            raise MalformedError(f"{self._where} {name} is no list")
        return value

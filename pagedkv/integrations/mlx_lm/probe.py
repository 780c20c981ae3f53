"""Looking at a model: what each layer does with its cache, without computing anything."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import mlx.core as mx

from pagedkv.allocator import KVShape
from pagedkv.attn.driver import KVView
from pagedkv.cache import sdpa_hook as hook
from pagedkv.cache.nested import replaced, streams
from pagedkv.integrations.mlx_lm.model_info import logits_of
from pagedkv.sequence.layer import PagedLayerCache
from pagedkv.tiers import HotTokens


@dataclass(frozen=True)
class LayerProbe:
    """What a layer was seen to cache when the model's graph was built once, without running it.

    Attributes:
        shape: heads and channels per token.
        dtype: of the keys.
        reaches_hook: whether both tags arrived at attention, for one query token (True) and for
            several (False).
        readers: how many times they did per call; more than one where layers share keys.
        in_step: whether it was given as many tokens as the model in every call.
        splits: whether it was given them in several parts.
    """

    shape: KVShape
    dtype: mx.Dtype
    reaches_hook: dict[bool, bool]
    readers: int
    in_step: bool = True
    splits: bool = False


class _ProbeCache(PagedLayerCache):
    """Stands in for a layer's cache while the graph is built; remembers what it is given."""

    def __init__(self, inner: Any, offset: int) -> None:  # no tiers: nothing is ever stored
        self._inner = inner
        self._held = offset
        self.offset = offset
        self.seen: tuple[KVShape, mx.Dtype] | None = None
        self.reached = self.updates = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.seen = (
            KVShape(int(keys.shape[1]), int(keys.shape[3]), max(1, int(values.shape[3]))),
            keys.dtype,
        )
        window = getattr(self._inner, "max_size", None) or self._held + 1
        earlier = min(self._held, window - 1)
        self._fetched = _behind(keys, earlier), _behind(values, earlier)
        self.offset += int(keys.shape[2])
        self.updates += 1
        return self.keys_and_values()

    @property
    def keys(self) -> mx.array | None:
        return self._fetched[0]

    @keys.setter
    def keys(self, array: mx.array) -> None: ...

    @property
    def values(self) -> mx.array | None:
        return self._fetched[1]

    @values.setter
    def values(self, array: mx.array) -> None: ...

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        keys, values = self._fetched
        view = KVView(None, (), HotTokens(keys, values, int(keys.shape[2]), int(keys.shape[2])), 0)
        return hook.tag_pair(self, view, keys, values)

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        return self.keys_and_values()

    @state.setter
    def state(self, value: Any) -> None: ...

    def attend_tagged(
        self,
        view: KVView,
        q: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array:
        self.reached += 1
        return mx.zeros((*q.shape[:3], view.values.shape[3]), q.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _behind(x: mx.array, earlier: int) -> mx.array:
    """New keys or values behind those of earlier tokens, as a cache returns them."""
    if not earlier:
        return x
    return mx.concatenate([mx.zeros((*x.shape[:2], earlier, x.shape[3]), x.dtype), x], axis=2)


PROMPTS = (1, 2, 64)
"""Prompt lengths at which a model's graph is looked at; models may treat short ones apart."""

LONG = (700, 5_000)
"""Tokens held at which it is looked at again, beside those past each window that it names."""

WINDOW_NAMES = ("window", "chunk", "topk", "top_k", "sliding", "local", "block")
"""Parts of the names of settings that say from which length on a layer attends otherwise."""

LEAST_WINDOW, MOST_WINDOWS = 16, 8


def probe(model: Any, kinds: list[Any], pageable: set[int]) -> dict[int, LayerProbe]:
    """Build the model's graph at several lengths and note what each layer does.

    MLX is lazy: nothing is computed. A model that cannot be called this way is not an error; its
    layers are learned when they are first used.

    Args:
        model: of mlx-lm, or like one.
        kinds: its stock caches, empty; they stay as they are.
        pageable: numbers of the streams that are looked at.
    """
    probes: dict[int, LayerProbe] = {}
    for tokens in PROMPTS:
        if not _look(model, kinds, pageable, 0, tokens, probes):
            return {}
    for held in sorted({*LONG, *(window + 1 for window in windows_of(model))}):
        for tokens in (1, 64):
            # A model that does not go on from here by itself says nothing of its layers.
            _look(model, kinds, pageable, held, tokens, probes)
    return probes


def _look(
    model: Any,
    kinds: list[Any],
    pageable: set[int],
    held: int,
    tokens: int,
    probes: dict[int, LayerProbe],
) -> bool:
    """Call the model once with so many tokens behind those held; False if it cannot be."""

    def stand_in(number: int, cache: Any) -> Any:
        return _ProbeCache(cache, held) if number in pageable else cache

    caches = replaced(copy.deepcopy(kinds), stand_in)
    try:
        with left_as_it_was(model):  # positions of one call would be taken for those of the next
            model(mx.zeros((1, tokens), mx.int32), cache=caches)
    except Exception:
        return False
    probed = list(streams(caches))
    for i in pageable:
        seen = probed[i].seen
        if seen is None:
            if i in probes:
                probes[i] = replace(probes[i], in_step=False)
            continue
        shape, dtype = seen
        known = probes.get(i) or LayerProbe(shape, dtype, {}, 1)
        single, reached = tokens == 1, probed[i].reached
        known.reaches_hook[single] = known.reaches_hook.get(single, True) and reached > 0
        in_step = known.in_step and probed[i].offset == held + tokens
        splits = known.splits or probed[i].updates > 1
        readers = max(known.readers, reached)
        probes[i] = LayerProbe(shape, dtype, known.reaches_hook, readers, in_step, splits)
    return True


def windows_of(model: Any) -> list[int]:
    """Lengths in a model's own configuration from which on its layers may attend otherwise."""
    found: set[int] = set()

    def collect(name: str, value: Any) -> None:
        if is_dataclass(value) and not isinstance(value, type):
            value = vars(value)
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(str(key), inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                collect(name, inner)
        elif type(value) is int and value >= LEAST_WINDOW and any(n in name for n in WINDOW_NAMES):
            found.add(value)

    for name in ("args", "config"):
        collect("", getattr(model, name, None))
    return sorted(found)[:MOST_WINDOWS]


def vocabulary_of(model: Any) -> int:
    """How many tokens a model knows, by the logits of a call; nothing is computed."""
    with left_as_it_was(model):
        return int(logits_of(model(mx.zeros((1, 1), mx.int32))).shape[-1])


@contextmanager
def left_as_it_was(model: Any) -> Iterator[None]:
    """Undo what calls of a model change in it, such as positions that it remembers.

    Args:
        model: an `mlx.nn.Module`. What pagedkv itself notes in it stays.
    """
    before = [(m, dict(m), dict(vars(m)), _contents(m)) for m in model.modules()]
    try:
        yield
    finally:
        for module, items, attributes, contents in before:
            ours = {n: v for n, v in vars(module).items() if n.startswith(OURS)}
            for now, then in ((module, items), (vars(module), attributes | ours)):
                if now.keys() != then.keys() or any(now[n] is not then[n] for n in then):
                    dict.clear(now)
                    dict.update(now, then)
            for container, content in contents:
                if isinstance(container, list):
                    container[:] = content
                else:
                    container.clear()
                    container.update(content)


OURS = "_pagedkv"
"""How names begin that pagedkv gives a model."""


def _contents(module: Any) -> list[tuple[Any, Any]]:
    """Lists and dicts that a module holds, each with a copy."""
    values = [*module.values(), *vars(module).values()]
    return [(v, copy.copy(v)) for v in values if type(v) in (list, dict)]

"""A token with NaN: who sees it gets NaN, and nobody else, in any backend."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv.attn.backends import Backend, KernelBackend, choose_backend
from pagedkv.attn.driver import attend
from pagedkv.sequence.sequence import SequenceContext
from pagedkv.sequence.window import WindowedLayerCache
from pagedkv.tiers import Pager
from pagedkv.tiers.codec.rounding import set_apart
from tests import reference
from tests.emulator import HostLauncher
from tests.test_attention import config, error, queries

BAD, TOKENS, DIM = 200, 600, 64
BACKENDS = ["dequantize", "quantized", "auto", "kernel"]
# Half a step of the codes of values of 1, and what a softmax makes of the keys' errors.
TOLERANCE = {"fp16": 3e-3, "K8V8": 0.03, "K4V4": 0.35}


def made(backend: str) -> Backend:
    if not backend.startswith("kernel"):
        return choose_backend(backend)
    return KernelBackend(HostLauncher(fetch_ahead=backend == "kernel"))


def clean() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 1, 2, TOKENS, DIM)).astype(np.float16)
    keys[..., 3] += 100  # a neighbour's key is one of the channel's range, zero is not
    return keys, values


def filled(layer: Any, backend: str, where: str, number: float) -> None:
    """Tokens of which one has a number that is none, in the first head's key or value."""
    keys, values = clean()
    (keys if where == "key" else values)[0, 0, BAD, 5] = number
    layer._backend = made(backend)
    layer.append(mx.array(keys), mx.array(values))
    layer._settle()


def output(layer: Any, length: int) -> mx.array:
    q = queries(4, length, DIM, mx.float16)
    out = attend(layer.view(), q, 0.125, "causal", None, layer._backend)
    mx.eval(out)
    return out


def difference(layer: Any, length: int, first: int, stop: int) -> float:
    """From attention over the clean tokens `first` to `stop`, and the first `length` again."""
    tokens = [*range(first, stop), *range(length)]
    keys, values = (x[0, :, tokens].astype(np.float64).swapaxes(0, 1) for x in clean())
    q = np.asarray(queries(4, length, DIM, mx.float16).astype(mx.float32))[0]
    return error(output(layer, length), reference.attention(q, keys, values, 0.125))


def again(layer: Any, length: int) -> None:
    """Append the first tokens once more."""
    layer.append(*(mx.array(x[:, :, :length]) for x in clean()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kv", "where", "number"),
    [
        ("fp16", "key", np.nan),
        ("fp16", "value", np.nan),
        ("fp16", "value", np.inf),
        ("K8V8", "key", np.nan),
        ("K8V8", "value", -np.inf),
        ("K4V4", "key", np.inf),
        ("K4V4", "value", np.nan),
        ("fp16:100,K8V8", "key", np.nan),
    ],
)
def test_who_sees_it_gets_it_and_once_it_is_trimmed_it_never_was(
    backend: str, kv: str, where: str, number: float
) -> None:
    with pagedkv.PagedCache.standalone(1, config(kv=kv, hot_tokens=16)) as cache:
        layer = cache[0]
        filled(layer, backend, where, number)
        for length in (1, 20):
            out = output(layer, length)
            finite = mx.isfinite(out).all(axis=-1)
            assert not finite[0, :2].any().item()
            assert finite[0, 2:].all().item()  # the other head does not see it
        for length in (1, 20):
            cache.trim(cache.offset - 150)
            again(layer, length)
            assert difference(layer, length, 0, 150) < TOLERANCE[kv.rpartition(",")[2]]


@pytest.mark.parametrize("treatment", ["hadamard", "none"])
@pytest.mark.parametrize("backend", ["auto", "kernel", "kernel, nothing ahead"])
def test_treated_pages_and_few_bits(backend: str, treatment: str) -> None:
    settings = config(kv="K2V2", hot_tokens=16, treatment=treatment)
    with (
        pagedkv.PagedCache.standalone(1, settings) as cache,
        pagedkv.PagedCache.standalone(1, settings) as other,
    ):
        filled(cache[0], backend, "key", np.nan)
        filled(other[0], backend, "key", 0.5)
        for layers in (cache, other):
            layers.trim(TOKENS - 150)
        a, b = (output(layers[0], 1).astype(mx.float32) for layers in (cache, other))
        assert mx.abs(a - b).max().item() < 0.2 * mx.abs(b).max().item()


@pytest.mark.parametrize("kv", ["fp16", "K8V8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_gone_when_a_window_has_left_it_behind(backend: str, kv: str) -> None:
    """Though the page that has it is still there, for its other tokens."""
    settings = config(kv=kv, hot_tokens=16)
    context = SequenceContext(settings, Pager(settings.budget(), 1))
    layer = WindowedLayerCache(context, 0, 380)
    layer._backend = made(backend)
    keys, values = clean()
    values[0, 0, BAD, 5] = np.nan
    for start in range(0, TOKENS, 150):  # its pages begin at the first token
        layer.append(*(mx.array(x[:, :, start : start + 150]) for x in (keys, values)))
        layer._settle()
    again(layer, 1)
    view = layer.view()
    first = layer.dropped + view.hidden
    assert 0 < view.hidden < view.entries[0].tokens
    assert first > BAD >= layer.dropped
    assert difference(layer, 1, first, TOKENS) < TOLERANCE[kv]
    layer.close()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_what_is_not_finite_is_found_in_every_type(dtype: mx.Dtype) -> None:
    largest = {mx.float16: 65504.0}.get(dtype, 3.3e38)
    rows = [[largest, -largest, 0.0], [1.0, np.nan, 0.0], [np.inf, 1.0, 1.0], [-np.inf, 0.0, 2.0]]
    value = mx.array([*rows] * 16).astype(dtype)
    _, out = set_apart(mx.zeros((64, 2), dtype), value, 64)
    assert mx.isnan(out).all(axis=1).tolist() == [False, True, True, True] * 16
    assert mx.array_equal(out[0], value[0]).item()


def test_what_is_finite_is_left_as_it_is() -> None:
    rng = np.random.default_rng(1)
    keys, values = rng.standard_normal((2, 3, 128, 8)).astype(np.float32)
    a, b = set_apart(mx.array(keys), mx.array(values), 64)
    assert np.array_equal(np.asarray(a), keys) and np.array_equal(np.asarray(b), values)
    keys[1, 70, 2], values[2, 3, 0] = np.nan, np.inf
    keys[0, 64:] = np.nan  # a group in which there is nothing else
    a, b = (np.asarray(x) for x in set_apart(mx.array(keys), mx.array(values), 64))
    gone = np.zeros((3, 128), bool)
    gone[1, 70] = gone[2, 3] = gone[0, 64:] = True
    assert np.array_equal(a[~gone], keys[~gone]) and np.array_equal(b[~gone], values[~gone])
    assert np.isnan(b[gone]).all() and np.isfinite(a).all()
    assert np.array_equal(a[1, 70], keys[1, 64]) and np.array_equal(a[2, 3], keys[2, 0])

"""What models do with cached keys beside attending: true numbers or an error, nothing else."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache

import pagedkv
from pagedkv.attn.stand_in import StandIn
from pagedkv.integrations.mlx_lm import probe
from pagedkv.integrations.mlx_lm.probe import windows_of
from tests.models import random_tokens, tiny_llama

HEADS, DIM = 2, 16
CONFIG = pagedkv.TierConfig(
    hot_tokens=64,
    sink_tokens=4,
    kv="fp16",
    page_tokens=256,
    warm="64MB",
    cold=0,
    hot_dtype="model",
    layer_kv="same",
)


@pytest.fixture
def pair() -> Iterator[tuple[Any, Any, mx.array, mx.array]]:
    """Stand-ins for the keys and values of 330 tokens, and the true numbers."""
    model = tiny_llama(layers=1)
    with pagedkv.wrap(model, CONFIG) as cache:
        mx.eval(model(random_tokens(329), cache=cache))
        new = mx.random.normal((1, HEADS, 1, DIM))
        keys, values = cache[0].update_and_fetch(new, new + 1)
        assert isinstance(keys, StandIn) and isinstance(values, StandIn)
        assert keys.shape == values.shape == (1, HEADS, 330, DIM)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield keys, values, *cache[0].view().dense(mx.float32)


EFFECTS = (
    "set_",
    "get_",
    "save",
    "load",
    "clear",
    "disable",
    "enable",
    "reset",
    "synchronize",
    "export",
)
"""Names of functions that change something, or are about files."""

UNCHECKED = ("take_along_axis", "put_along_axis")
"""Their indices are not checked: beyond an array they read what happens to be there."""

ARGUMENTS: list[Callable[[Any, mx.array], tuple[Any, ...]]] = [
    lambda x, y: (x,),
    lambda x, y: (x, y),
    lambda x, y: (y, x),
    lambda x, y: (x, 1),
    lambda x, y: (x, (1, HEADS, 330, DIM)),
    lambda x, y: ([x, y],),
    lambda x, y: ([y, x], 2),
    lambda x, y: (x, mx.array([0])),
    lambda x, y: (mx.ones((1, 1, 1, 1)) > 0, x, y),
    lambda x, y: (x, y[:, :, :1]),
    lambda x, y: (y[:, :, :1], x.swapaxes(2, 3)),
    lambda x, y: ("bhld,bhtd->bhlt", y[:, :, :1], x),
    lambda x, y: (y, x, x, mx.zeros(1)),
]


def outcome(call: Callable[[], Any]) -> Any:
    """Result as numpy arrays, or the exception."""
    try:
        result = call()
        parts = result if isinstance(result, (tuple, list)) else [result]
        arrays = [p for p in parts if isinstance(p, (mx.array, np.ndarray, float, int, bool))]
        return [np.array(a) for a in arrays] or None
    except Exception as e:
        return e


def test_every_function_of_mlx_gets_the_numbers_or_refuses(pair: Any) -> None:
    """The guard itself: there is no third way, whatever a model calls."""
    keys, _, true, _ = pair
    other = mx.random.normal(true.shape)
    right = refused = 0
    for name in dir(mx):
        function = getattr(mx, name)
        if isinstance(function, type) or not callable(function):
            continue
        if name.startswith((*EFFECTS, *UNCHECKED)):
            continue
        for make in ARGUMENTS:
            expected = outcome(lambda: function(*make(true, other)))  # noqa: B023
            if expected is None or isinstance(expected, Exception):
                continue
            got = outcome(lambda: function(*make(keys, other)))  # noqa: B023
            if isinstance(got, Exception):
                refused += 1
                continue
            assert got is not None and len(got) == len(expected), name
            for mine, theirs in zip(got, expected, strict=True):
                np.testing.assert_array_equal(mine, theirs, err_msg=name)
            right += 1
    assert right > 50 and refused > 50


def test_every_method_and_operator_gets_the_numbers(pair: Any) -> None:
    keys, values, true_keys, true_values = pair
    other = mx.random.normal(true_keys.shape)
    calls: dict[str, Callable[[Any], Any]] = {
        "slice": lambda x: x[:, :, -200:],
        "item": lambda x: x[0, 1, 3, 2],
        "+": lambda x: x + other,
        "r-": lambda x: 1 - x,
        "*": lambda x: other * x,
        "array op": lambda x: mx.array(other) / x,
        "matmul": lambda x: x @ other.swapaxes(2, 3),
        "-": lambda x: -x,
        "<": lambda x: x < 0,
        "==": lambda x: x == other,
        "T": lambda x: x.T,
        "swapaxes": lambda x: x.swapaxes(1, 2),
        "astype": lambda x: x.astype(mx.float16),
        "reshape": lambda x: x.reshape(1, -1),
        "sum": lambda x: x.sum(),
        "mx.array": mx.array,
        "numpy": np.array,
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "at": lambda x: x.at[0].add(1),
        "tolist": lambda x: mx.array(x.tolist()),
        "float": lambda x: float(x[0, 0, 0, 0]),
    }
    for stand_in, true in ((keys, true_keys), (values, true_values)):
        for name, call in calls.items():
            np.testing.assert_array_equal(
                np.array(call(stand_in)), np.array(call(true)), err_msg=name
            )
        changed = stand_in
        changed += other
        assert mx.array_equal(changed, true + other).item()
    assert keys.dtype == true_keys.dtype and keys.ndim == 4 and keys.nbytes == true_keys.nbytes
    assert isinstance(keys, mx.array) and not hasattr(keys, "bits")


def test_errors_name_the_function_and_the_layer(pair: Any) -> None:
    keys, *_ = pair
    with pytest.raises(TypeError, match=r"(?s)matmul.*cached keys of layer 0"):
        mx.matmul(mx.zeros((1, HEADS, 1, DIM)), keys)
    with pytest.raises(ValueError, match="cached keys of layer 0"):
        mx.compile(lambda x: x + 1)(keys)


def test_writing_into_cached_keys_is_refused(pair: Any) -> None:
    keys, *_ = pair
    with pytest.raises(pagedkv.PagedKVError, match="cached keys of layer 0.* writes"):
        keys[:, :, 0] = 0


def test_half_a_pair_gets_the_numbers(pair: Any) -> None:
    keys, values, true_keys, true_values = pair
    q = mx.random.normal((1, 4, 1, DIM))
    for k, v in ((keys, values + 0), (keys[...], values), (keys, true_values)):
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3)
        stock = mx.fast.scaled_dot_product_attention(q, true_keys, true_values, scale=0.3)
        assert mx.allclose(out, stock, atol=1e-6).item()


class Slicing(nn.Module):
    """A layer that looks at its newest 600 keys, once there are more."""

    LOOK = 600

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 3 * 64), nn.Linear(64, 64)

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        q, k, v = (
            t.reshape(1, -1, 4, 16).swapaxes(1, 2) for t in mx.split(self.qkv(x), 3, axis=-1)
        )
        keys, values = cache.update_and_fetch(k, v)
        mask = "causal" if q.shape[2] > 1 else None
        if mask is None and keys.shape[2] > self.LOOK:
            keys, values = keys[:, :, -self.LOOK :], values[:, :, -self.LOOK :]
        y = mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.25, mask=mask)
        return x + self.out(y.swapaxes(1, 2).reshape(1, -1, 64))


class SlicingModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(100, 64), [Slicing() for _ in range(2)]

    def __call__(self, ids: mx.array, cache: Any) -> mx.array:
        x = self.embed(ids)
        for layer, c in zip(self.layers, cache, strict=True):
            x = layer(x, c)
        return self.embed.as_linear(x)


@pytest.mark.parametrize("seen", [True, False])  # by the probe at wrap, or beyond its reach
def test_a_model_that_slices_its_keys_gets_the_numbers(
    monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    if not seen:
        monkeypatch.setattr(probe, "LONG", ())
    mx.random.seed(1)
    model = SlicingModel()
    ids = random_tokens(900)

    def last(cache: Any) -> mx.array:
        for i in range(0, ids.shape[1] - 3, 500):
            mx.eval(model(ids[:, i : min(i + 500, ids.shape[1] - 3)], cache))
        steps = [model(ids[:, i : i + 1], cache) for i in range(ids.shape[1] - 3, ids.shape[1])]
        mx.eval(steps)
        return steps[-1]

    expected = last([KVCache() for _ in model.layers])
    with pagedkv.wrap(model, CONFIG) as cache:
        assert cache[0].reaches_hook == {True: not seen, False: True}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            got = last(cache)
        assert cache.stats().warm.tokens > 0
    assert seen or any("layer 1" in str(w.message) for w in told)
    assert mx.abs(got - expected).max().item() < 1e-5


def test_windows_are_found_in_a_models_configuration() -> None:
    class Text:
        pass

    model = tiny_llama()
    model.args.text_config = {"sliding_window": 512, "inner": {"attention_chunk_size": 8192}}
    model.args.layer_windows = [256, 1024]
    model.args.num_experts = 128
    assert windows_of(model) == [256, 512, 1024, 8192]
    assert windows_of(Text()) == []


class Remembers(llama.Model):
    """Decides on positions in its first call with an empty cache, and remembers them."""

    def __init__(self, args: llama.ModelArgs) -> None:
        super().__init__(args)
        self._positions: mx.array | None = None
        self.seen: list[int] = []

    def __call__(self, inputs: mx.array, cache: Any = None, **_: Any) -> mx.array:
        at, n = (cache[0].offset if cache else 0), inputs.shape[1]
        self.seen.append(n)
        self.last_length = n
        if at == 0 and self._positions is None:
            self._positions = mx.arange(n)[None]
        positions = self._positions[:, :n] if at == 0 else mx.arange(at, at + n)[None]
        h = self.model.embed_tokens(inputs) * (1 + mx.sin(positions)[..., None])
        return super().__call__(inputs, cache=cache, input_embeddings=h)


def test_wrap_leaves_nothing_in_the_model() -> None:
    model = Remembers(tiny_llama().args)
    mx.eval(model.parameters())
    before = [dict(m) for m in model.modules()]
    with pagedkv.wrap(model, CONFIG):
        assert model._positions is None and model.seen == [] and not hasattr(model, "last_length")
        assert [dict(m) for m in model.modules()] == before


def test_a_copy_of_a_wrapped_model_is_a_plain_one() -> None:
    model, ids = tiny_llama(layers=1), random_tokens(20)
    expected = model(ids)
    pagedkv.wrap(model, CONFIG)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(copy.deepcopy(model)))):
        assert (
            pagedkv.integrations.mlx_lm.wrapping.wrapping_of(twin) is None
            and not {"make_cache", "__reduce_ex__"} & vars(twin).keys()
        )
        assert mx.array_equal(twin(ids), expected).item()
        with pagedkv.wrap(twin, CONFIG) as cache:
            assert mx.array_equal(twin(ids, cache=cache), expected).item()
        pagedkv.unwrap(twin)
    assert type(model.make_cache()) is pagedkv.PagedCache
    pagedkv.unwrap(model)
    assert not {"make_cache", "__reduce_ex__"} & vars(model).keys()


@pytest.fixture
def counted() -> Iterator[list[int]]:
    """Another library's attention, in place before ours; how many tokens it saw in its calls."""
    mlx, calls = mx.fast.scaled_dot_product_attention, list[int]()

    def theirs(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        calls.append(q.shape[2])
        return mlx(q, k, v, **options)

    mx.fast.scaled_dot_product_attention = theirs
    yield calls
    mx.fast.scaled_dot_product_attention = mlx


def test_another_ones_attention_is_called_while_all_is_hot_and_put_back(counted: Any) -> None:
    theirs, model = mx.fast.scaled_dot_product_attention, tiny_llama(layers=1)
    with pagedkv.wrap(model, CONFIG) as cache:
        counted.clear()
        for n in (40, 1):
            mx.eval(model(random_tokens(n), cache=cache))
        assert counted == [40, 1]
        mx.eval(model(random_tokens(700), cache=cache), model(random_tokens(1), cache=cache))
        assert counted[-1] != 1  # pages are ours to attend
    pagedkv.unwrap(model)
    assert mx.fast.scaled_dot_product_attention is theirs


def test_what_was_put_on_top_since_stays_and_does_not_go_round_in_circles() -> None:
    mlx, model = mx.fast.scaled_dot_product_attention, tiny_llama(layers=1)
    try:
        pagedkv.wrap(model, CONFIG)
        ours = mx.fast.scaled_dot_product_attention

        def theirs(*args: Any, **options: Any) -> mx.array:
            return ours(*args, **options)

        mx.fast.scaled_dot_product_attention = theirs
        pagedkv.unwrap(model)
        assert mx.fast.scaled_dot_product_attention is theirs
        x = mx.random.normal((1, 2, 3, 16))
        assert mx.array_equal(theirs(x, x, x, scale=1.0), mlx(x, x, x, scale=1.0)).item()
        with pagedkv.wrap(model, CONFIG) as cache:  # again, above them
            mx.eval(model(random_tokens(700), cache=cache), model(random_tokens(1), cache=cache))
        pagedkv.unwrap(model)
        assert mx.fast.scaled_dot_product_attention is theirs
    finally:
        mx.fast.scaled_dot_product_attention = mlx

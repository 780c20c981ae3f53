"""Saved caches: what is damaged or does not belong together is refused."""

from __future__ import annotations

import json
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as stock

import pagedkv
from pagedkv.allocator import KVShape, PageGeometry, Precision
from pagedkv.cache.persistence import snapshot as state
from pagedkv.cache.persistence.safetensors_file import array_digest
from pagedkv.integrations.mlx_lm.caches import BatchPagedKVCache, PagedKVCache
from tests.model_zoo import build
from tests.models import lively, random_tokens, tiny_llama

CONFIG = pagedkv.TierConfig(
    hot_tokens=64, sink_tokens=4, kv="K4V4", page_tokens=256, warm="64MB", cold=0,
    layer_kv="same", treatment="hadamard",
)  # fmt: skip
STEP = mx.array([[3]])


class File:
    """A safetensors file in parts that can be exchanged."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        self.header: dict[str, Any] = json.loads(raw[8 : 8 + size])
        self.metadata: dict[str, str] = self.header.pop("__metadata__")
        places = {name: told.pop("data_offsets") for name, told in self.header.items()}
        self.data = {n: bytearray(raw[8 + size + a : 8 + size + b]) for n, (a, b) in places.items()}

    def meta(self, layer: int) -> dict[str, Any]:
        """What a layer's text says, without its digest."""
        codes = np.frombuffer(self.data[f"{layer}.meta"], np.int32)
        told = json.loads("".join(map(chr, codes)))
        del told["digest"]
        return dict(told)

    def set_meta(self, layer: int, meta: dict[str, Any], digest: str | None = None) -> None:
        """Let a layer's text say something else, with the right digest, as a forger would."""
        text = json.dumps({**meta, "digest": digest}) if digest else state._signed(meta)
        self.metadata["2.0"] = ""
        self.header[f"{layer}.meta"]["shape"] = [len(text)]
        self.data[f"{layer}.meta"] = bytearray(np.array([*map(ord, text)], np.int32).tobytes())

    def sign(self, layer: int) -> None:
        """Let a layer's digests be those of its arrays."""
        meta = self.meta(layer)
        for name in meta["digests"]:
            leaf = f"{layer}.pages.{name}" if name.startswith("p") else f"{layer}.{name}"
            dtype = {"U32": np.uint32, "F16": np.float16}[self.header[leaf]["dtype"]]
            array = np.frombuffer(self.data[leaf], dtype).reshape(self.header[leaf]["shape"])
            meta["digests"][name] = array_digest(name, mx.array(array))
        self.set_meta(layer, meta)

    def exchange(self, one: str, other: str) -> None:
        """Exchange the arrays of two names, or of two layers."""
        for name in list(self.header):
            if name.startswith(one):
                twin = other + name.removeprefix(one)
                for part in (self.header, self.data):
                    part[name], part[twin] = part[twin], part[name]  # type: ignore[index]

    def write(self, path: Path) -> Path:
        """Write it."""
        header: dict[str, Any] = {"__metadata__": self.metadata}
        at = 0
        for name, told in self.header.items():
            header[name] = {**told, "data_offsets": [at, at + len(self.data[name])]}
            at += len(self.data[name])
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(self.data.values()))
        return path


class Case:
    """A wrapped model, a cache of it in a file, and how it goes on."""

    def __init__(self, folder: Path) -> None:
        self.model = lively(tiny_llama(kv_heads=1, dim=32, layers=2))
        self.good, self.bad = folder / "good.safetensors", folder / "bad.safetensors"
        with pagedkv.wrap(self.model, CONFIG) as cache:
            mx.eval(self.model(random_tokens(900), cache=cache))
            cache.save(str(self.good))
            self.expected = np.array(self.model(STEP, cache=cache))
            self._states = [dict(layer.state.items()) for layer in cache]
        pagedkv.unwrap(self.model)

    @property
    def states(self) -> list[dict[str, Any]]:
        """What mlx-lm's loader gives the layers; pages are taken out of it."""
        return [{**found, "pages": dict(found["pages"])} for found in self._states]

    def file(self) -> File:
        return File(self.good)

    def load(self, path: Path) -> np.ndarray:
        """What the model says after a file, loaded with our function."""
        with pagedkv.load(path, self.model) as cache:
            return np.array(self.model(STEP, cache=cache))

    def load_as_mlx_lm_does(self, path: Path) -> np.ndarray:
        """Likewise, with mlx-lm's."""
        cache = stock.load_prompt_cache(str(path))
        try:
            return np.array(self.model(STEP, cache=cache))
        finally:
            for layer in cache:
                layer.close()

    def same(self, logits: np.ndarray) -> bool:
        return bool((logits == self.expected).all())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def case(made: Case) -> Iterator[Case]:
    """With its model wrapped."""
    pagedkv.wrap(made.model, CONFIG).close()
    yield made
    pagedkv.unwrap(made.model)


def flipped(name: str, at: int, bit: int = 0x10) -> Callable[[File], None]:
    def damage(file: File) -> None:
        file.data[name][at] ^= bit

    return damage


def filled(name: str) -> Callable[[File], None]:
    def damage(file: File) -> None:
        file.data[name][:] = b"\xff" * len(file.data[name])

    return damage


def copied(name: str, source: str) -> Callable[[File], None]:
    def damage(file: File) -> None:
        file.data[name][:] = file.data[source]

    return damage


def told(number: int, **changed: Any) -> Callable[[File], None]:
    """A description that says something else, its digest being right."""

    def damage(file: File) -> None:
        file.set_meta(number, {**file.meta(number), **changed})

    return damage


def signed(layer: int, damage: Callable[[File], None]) -> Callable[[File], None]:
    """Arrays of somebody who knows how digests are made."""

    def both(file: File) -> None:
        damage(file)
        file.sign(layer)

    return both


def reworded(file: File) -> None:
    """Where a page came from, which nothing else tells."""
    meta = file.meta(1)
    meta["pages"][0][1] += 1
    file.set_meta(1, meta, digest=32 * "0")


def reshaped(file: File) -> None:
    """As many numbers and tokens, in heads that the model does not have."""
    _, heads, tokens, dim = file.header["0.hot_keys"]["shape"]
    file.header["0.hot_keys"]["shape"] = [1, dim, tokens, heads]


def nan_scales(file: File) -> None:
    """The scales of a page's keys."""
    heads, key_dim, value_dim = file.meta(0)["shape"]
    shape = KVShape(heads, key_dim, value_dim)
    at = PageGeometry(shape, 256, Precision(4, 4)).parts[1].offset
    file.data["0.pages.p1"][at : at + 4] = b"\x00\x7e" * 2


def without(name: str) -> Callable[[File], None]:
    def damage(file: File) -> None:
        del file.header[name], file.data[name]

    return damage


def without_word(name: str) -> Callable[[File], None]:
    """A description that leaves something out, its digest being right."""

    def damage(file: File) -> None:
        meta = file.meta(0)
        del meta[name]
        file.set_meta(0, meta)

    return damage


DAMAGE: dict[str, Callable[[File], None]] = {
    "a bit of a page": flipped("0.pages.p1", 100),
    "a bit of a page's padding": flipped("1.pages.p2", -1),
    "a bit of the hot keys": flipped("0.hot_keys", 1, 0x40),
    "a bit of the last hot value": flipped("1.hot_values", -1, 1),
    "a bit of the matrices": flipped("0.treatment", 0, 1),
    "a digit of a description": flipped("0.meta", 4 * 60, 1),
    "another word in a description": reworded,
    "a page of NaN": filled("0.pages.p0"),
    "hot keys of NaN": filled("0.hot_keys"),
    "a page twice": copied("0.pages.p1", "0.pages.p0"),
    "two pages exchanged": lambda file: file.exchange("0.pages.p0", "0.pages.p1"),
    "a page of the other layer": copied("0.pages.p0", "1.pages.p0"),
    "keys as values": lambda file: file.exchange("0.hot_keys", "0.hot_values"),
    "layers exchanged": lambda file: file.exchange("0.", "1."),
    "no matrices": without("0.treatment"),
    "a page missing": without("1.pages.p2"),
    "no hot keys": without("0.hot_keys"),
    # Digests are right from here on: what remains is that parts do not fit each other.
    "NaN scales that are signed": signed(0, nan_scales),
    "hot keys of another shape": signed(0, reshaped),
    "no word of the matrices": without_word("treatment"),
    "no tokens in a layer that has some": told(1, offset=0),
    "layers of another length": told(0, offset=899),
    "layers of another sequence": told(1, sequence="0123456789abcdef"),
    "layers of another model": told(1, fingerprint="llama-0"),
    "one layer of three": lambda file: [told(n, siblings=3)(file) for n in (0, 1)] and None,
    "a layer twice": told(1, layer=0),
    "numbers of layers exchanged": lambda file: (
        [told(n, layer=1 - n)(file) for n in (0, 1)] and None
    ),
    "a length that is not that of the tokens": lambda file: (
        [told(n, offset=901)(file) for n in (0, 1)] and None
    ),
}


@pytest.mark.parametrize("how", ["ours", "mlx_lm"])
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused(case: Case, what: str, how: str) -> None:
    file = case.file()
    DAMAGE[what](file)
    path = file.write(case.bad)
    load = case.load if how == "ours" else case.load_as_mlx_lm_does
    with pytest.raises(pagedkv.CacheStateError):
        load(path)
    assert case.same(load(case.good))  # and nothing of it is left


def test_layers_of_two_files_of_one_chat_are_not_one_file(case: Case) -> None:
    """Each is whole, of the same sequence and length: only the digest over the whole tells."""
    with pagedkv.load(case.good, case.model) as cache:
        cache.save(str(case.bad))
        one = File(case.bad)
        cache.trim(40)
        mx.eval(case.model(random_tokens(40, seed=7), cache=cache))
        cache.save(str(case.bad))
        other = File(case.bad)
    for name in other.header:
        if name.startswith("1."):
            one.header[name], one.data[name] = other.header[name], other.data[name]
    with pytest.raises(pagedkv.CacheStateError, match="the digest over the whole"):
        case.load(one.write(case.bad))


def test_what_is_not_damaged_is_loaded(case: Case) -> None:
    path = case.file().write(case.bad)  # the same in another header's spaces
    assert case.same(case.load(path))
    assert case.same(case.load_as_mlx_lm_does(path))
    for layer in (0, 1):  # what the forgeries above begin with
        file = case.file()
        file.sign(layer)
        assert case.same(case.load(file.write(case.bad)))


def noise(rng: random.Random, good: bytes) -> bytes:
    """A file with something flipped, overwritten, cut, doubled, inserted or exchanged."""
    raw = bytearray(good)
    size = int.from_bytes(raw[:8], "little")
    # As often in the header as in the rest, which is longer.
    at = rng.choice([rng.randrange(8 + size), rng.randrange(len(raw))])
    length = rng.choice([1, 4, 16, 4096])
    match rng.randrange(7):
        case 0:
            raw[at] ^= 1 << rng.randrange(8)
        case 1:
            raw[at : at + length] = rng.randbytes(length)
        case 2:
            del raw[at : at + length]
        case 3:
            del raw[at:]
        case 4:
            raw[at:at] = raw[at : at + length]
        case 5:
            to = rng.randrange(len(raw) - length)
            raw[at : at + length], raw[to : to + length] = (
                raw[to : to + length], raw[at : at + length],
            )  # fmt: skip
        case 6:  # entries of the header
            header = json.loads(raw[8 : 8 + size])
            told, names = header["__metadata__"], [n for n in header if n != "__metadata__"]
            one, other = rng.sample(names, 2)
            match rng.randrange(5):
                case 0:
                    header[one], header[other] = header[other], header[one]
                case 1:
                    del header[one]
                case 2:
                    field = rng.choice(["dtype", "shape", "data_offsets"])
                    value = rng.choice([None, -1, 2**63, "F16", [0], [1, 2], [2**40, 1], {}])
                    header[one][field] = rng.choice([header[other][field], value])
                case 3:
                    one, other = rng.sample(list(told), 2)
                    told[one], told[other] = told[other], told[one]
                case 4:
                    told[rng.choice(list(told))] = rng.choice(["", "9", "KVCache"])
            text = json.dumps(header).encode()
            raw[: 8 + size] = len(text).to_bytes(8, "little") + text
    return bytes(raw)


def test_noise_is_refused_or_does_not_matter(case: Case) -> None:
    rng, good = random.Random(0), case.good.read_bytes()
    refused = 0
    for n in range(400):
        case.bad.write_bytes(noise(rng, good))
        try:
            assert case.same(case.load(case.bad)), n
        except pagedkv.CacheStateError:
            refused += 1
    assert 350 < refused < 400


ODD = [None, True, -1, 0, 1, 2**24, 2**31, 2**70, 1.5, float("nan"), "", "K2V2", [], {}, [[]]]


@pytest.mark.filterwarnings("ignore:the context has")
@pytest.mark.parametrize("how", ["ours", "mlx_lm"])
def test_descriptions_that_cannot_be_are_typed_errors(case: Case, how: str) -> None:
    """Of somebody who signs what he writes: no error of Python's, no memory, no other answer."""
    load = case.load if how == "ours" else case.load_as_mlx_lm_does
    rng = random.Random(1)
    refused = 0
    for _ in range(150):
        file = case.file()
        meta = file.meta(0)
        inner = rng.choice([meta, meta, meta["config"], meta["pages"], meta["pages"][0]])
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner[key] = rng.choice(ODD)
        file.set_meta(0, meta)
        if rng.random() < 0.5:
            file.set_meta(1, {**meta, "layer": 1, "digests": file.meta(1)["digests"]})
        try:
            load(file.write(case.bad))
        except (pagedkv.CacheStateError, pagedkv.OutOfPagesError):
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"a":' * 9999, b"9" * 9999, b"\xff", b""])
def test_texts_that_are_none_are_refused(case: Case, raw: bytes) -> None:
    case.bad.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(pagedkv.CacheStateError, match="not a saved cache"):
        case.load(case.bad)
    with pytest.raises(pagedkv.CacheStateError):
        PagedKVCache.from_state({"meta": raw.decode("latin1")})


def test_a_path_that_is_no_file_is_not_read(case: Case, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / "missing", "a\0b"):
        with pytest.raises(pagedkv.CacheStateError, match="is not a saved cache"):
            pagedkv.load(path, case.model)


def test_a_file_that_is_cut_while_it_is_loaded(case: Case) -> None:
    case.bad.write_bytes(case.good.read_bytes())
    states = state.load_states(case.bad)
    os.truncate(case.bad, case.bad.stat().st_size - 20_000)
    with (
        pagedkv.wrap(case.model, CONFIG) as cache,
        pytest.raises(pagedkv.CacheStateError, match="cut short"),
    ):
        for layer, found in zip(cache, states, strict=True):
            state.restore(layer, state.parse_meta(found), found)


def test_a_file_has_the_length_that_its_header_tells(case: Case) -> None:
    good = case.good.read_bytes()
    for raw in (good + b"x", good[:-1], good[:4000], good[:7], b""):
        case.bad.write_bytes(raw)
        with pytest.raises(pagedkv.CacheStateError, match=r"not a saved cache: its header tells"):
            case.load(case.bad)


def test_another_format_is_named(case: Case) -> None:
    file = case.file()
    file.set_meta(0, {**file.meta(0), "format": "pagedkv-2"})
    with pytest.raises(pagedkv.CacheStateError, match="format 'pagedkv-2', this version reads"):
        case.load(file.write(case.bad))


# mlx-lm's own functions


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4_text"])
def test_layers_that_share_keys_go_on_after_mlx_lms_functions(kind: str, tmp_path: Path) -> None:
    """They are attended several times a call, which only the file can tell."""
    path, config = str(tmp_path / "a.safetensors"), replace(CONFIG, hot_tokens=16, kv="fp16")
    model = build(kind)
    first, second = random_tokens(20), random_tokens(600, seed=1)
    with pagedkv.wrap(model, config) as cache:
        assert max(layer.readers for layer in cache.paged_layers) > 1
        mx.eval(model(first, cache=cache))
        stock.save_prompt_cache(path, cache)
        loaded = stock.load_prompt_cache(path)
        assert [c.readers for c in loaded] == [c.readers for c in cache.paged_layers]
        for tokens in (second, STEP, STEP):
            want, got = model(tokens, cache=cache), model(tokens, cache=loaded)
            assert mx.abs(got - want).max().item() < 0.05
        assert loaded[-1]._table is not None and sum(len(c._table) for c in loaded) > 0
    pagedkv.unwrap(model)


def test_layers_of_several_files_are_not_one_cache(case: Case) -> None:
    """Each state is whole: only together they are wrong."""
    with pagedkv.wrap(case.model, CONFIG) as cache:
        mx.eval(case.model(random_tokens(700, seed=2), cache=cache))
        other = [dict(layer.state.items()) for layer in cache]
    mine = case.states
    mixed = [PagedKVCache.from_state(found) for found in (mine[0], other[1])]
    with pytest.raises(pagedkv.CacheStateError, match="1 of the 2 layers"):
        case.model(STEP, cache=mixed)


def test_layers_in_another_order_are_not_one_cache(case: Case) -> None:
    mine = case.states
    keep = PagedKVCache.from_state(mine[1])
    with pytest.raises(pagedkv.CacheStateError, match="exchanged"):
        PagedKVCache.from_state(mine[0])
    keep.close()


def test_a_file_is_loaded_by_two_threads_at_once(case: Case) -> None:
    turn = [threading.Event(), threading.Event()]
    caches: list[list[Any]] = [[], []]
    states = [case.states, case.states]

    def load(number: int) -> None:
        for i in range(2):
            turn[number].wait(10)
            turn[number].clear()
            found = states[number][i]
            caches[number].append(PagedKVCache.from_state(found))
            turn[1 - number].set()

    threads = [threading.Thread(target=load, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    turn[0].set()
    for thread in threads:
        thread.join(20)
    for cache in caches:
        assert cache[0]._context is cache[1]._context
        cache[0].close(), cache[1].close()


@pytest.mark.parametrize("value", [None, 3, [3], [({}, "KVCache")], [({}, "PagedKVCache")]])
def test_a_batch_of_nothing_known_is_refused(value: Any) -> None:
    with pytest.raises(pagedkv.CacheStateError):
        BatchPagedKVCache.from_state(value)


# What a file may choose


def test_a_file_chooses_no_place_and_no_more_than_the_defaults(case: Case, tmp_path: Path) -> None:
    mine, place = pagedkv.TierConfig(), tmp_path / "elsewhere"
    file = case.file()
    for layer in (0, 1):
        meta = file.meta(layer)
        large = dict.fromkeys(
            ("warm", "cold", "staging", "write_buffer", "scratch", "bounds"), "9TB"
        )
        meta["config"] |= {**large, "cold_dir": str(place), "keep_free": 0}
        meta["config"] |= {"treatment": str(place / "matrices.json"), "warm": 10**8}
        file.set_meta(layer, meta)
    path = file.write(case.bad)
    config = state.saved_config(state.parse_meta(state.load_states(path)[0]))
    assert config == replace(
        CONFIG, cold=mine.cold, keep_free=mine.keep_free, treatment="auto", warm=10**8
    )
    pagedkv.unwrap(case.model)
    assert case.same(case.load(path))
    loaded = stock.load_prompt_cache(str(path))
    assert loaded[0]._context.config == config
    assert case.same(np.array(case.model(STEP, cache=loaded)))
    assert not place.exists()


def test_no_path_is_saved(tmp_path: Path) -> None:
    model = tiny_llama()
    pagedkv.calibrate(model, random_tokens(300)[0]).save(tmp_path / "mine.json")
    config = replace(
        CONFIG, cold="64MB", cold_dir=str(tmp_path), treatment=str(tmp_path / "mine.json")
    )
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(random_tokens(600), cache=cache))
        cache.save(str(tmp_path / "a.safetensors"))
        expected = model(STEP, cache=cache)
    pagedkv.unwrap(model)
    file = File(tmp_path / "a.safetensors")
    for layer in (0, 1):
        assert str(tmp_path) not in json.dumps(file.meta(layer))
    with pagedkv.load(tmp_path / "a.safetensors", model, config) as cache:
        assert mx.array_equal(model(STEP, cache=cache), expected).item()
    pagedkv.unwrap(model)


def test_pages_of_one_16_bit_type_are_not_read_as_the_other(tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "a.safetensors"
    config = replace(CONFIG, kv="fp16", hot_dtype="float16")
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(random_tokens(600), cache=cache))
        cache.save(str(path))
    pagedkv.unwrap(model)
    with pytest.raises(pagedkv.CacheStateError, match="hot_dtype that it was saved with"):
        pagedkv.load(path, model, replace(config, hot_dtype="bfloat16"))
    pagedkv.load(path, model, replace(config, hot_dtype="model")).close()  # float32 has such pages
    pagedkv.unwrap(model)


# Where it is saved


def test_a_link_stays_and_its_file_is_written(case: Case, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "a.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(real)
    with pagedkv.load(case.good, case.model) as cache:
        for _ in range(2):  # it is not there, and it is
            cache.save(str(link))
            assert link.is_symlink() and not real.is_symlink()
            assert case.same(case.load(real))
            assert [p.name for p in real.parent.iterdir()] == [real.name]
            real.chmod(0o640)
        assert stat.S_IMODE(real.stat().st_mode) == 0o640
        cache.save(str(link))
        assert stat.S_IMODE(real.stat().st_mode) == 0o640  # who could read it still can


def test_what_is_no_file_is_not_replaced(case: Case, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to a pipe").symlink_to(tmp_path / "pipe")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pagedkv.load(case.good, case.model) as cache:
        for path, kind in (
            (tmp_path / "pipe", "a pipe"),
            (tmp_path / "to a pipe", "a pipe"),
            (tmp_path, "a directory"),
            (Path("/dev/null"), "a device"),
        ):
            with pytest.raises(pagedkv.ConfigError, match=f"{kind}.*, not a file"):
                cache.save(str(path))
        with pytest.raises(OSError, match="symbolic links"):
            cache.save(str(tmp_path / "round"))
        with pytest.raises(pagedkv.ConfigError, match="no path"):
            cache.save("a\0b")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe", "round", "to a pipe"]


# When it is saved


def test_a_closed_cache_is_not_saved_over_a_good_file(case: Case, tmp_path: Path) -> None:
    path, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    with pagedkv.load(case.good, case.model) as cache:
        cache.save(str(path))
        stock.save_prompt_cache(str(theirs), cache)
    with pytest.raises(pagedkv.ClosedError):
        cache.save(str(path))
    with pytest.raises(pagedkv.ClosedError):
        stock.save_prompt_cache(str(theirs), cache)
    assert case.same(case.load(path)) and case.same(case.load(theirs))


def test_a_closed_cache_gives_nothing_for_something(case: Case) -> None:
    """Each call says that it is closed; what only counts says that nothing is there."""
    cache, other = pagedkv.load(case.good, case.model), pagedkv.load(case.good, case.model)
    cache.close()
    layer, x = cache[0], mx.zeros((1, 1, 1, 8))
    calls: list[Callable[[], Any]] = [
        cache.fork, cache.flush, cache.resume, lambda: cache.remember([1]),
        lambda: cache.reuse([1, 2]), cache.stored_sequences, cache.discard,
        lambda: layer.update_and_fetch(x, x), layer.keys_and_values, layer.view, layer.fork,
        lambda: dict(layer.state.items()), lambda: layer.take_over(other[0]),
        lambda: other[0].take_over(layer), lambda: type(layer).merge([layer]),
        lambda: case.model(STEP, cache=cache),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(pagedkv.ClosedError, match="closed"):
            call()
    assert (cache.offset, cache.trim(3), layer.nbytes, layer.size()) == (0, 0, 0, 0)
    assert cache.stats().tokens == 0 and layer.empty()
    other.close()


def test_a_state_of_a_cache_that_went_on_is_not_taken_for_a_copy(case: Case) -> None:
    with pagedkv.load(case.good, case.model) as cache:
        before = [layer.state for layer in cache]
        assert before[0].items() and before[0].items()
        mx.eval(case.model(STEP, cache=cache))
        for again in (lambda: None, lambda: cache.trim(1), lambda: cache.trim(300)):
            again()
            with pytest.raises(pagedkv.CacheStateError, match="a state is no copy"):
                cache[0].state = before[0]
            assert cache[0].offset == cache[1].offset  # as it was


def test_half_a_call_is_not_saved(case: Case, tmp_path: Path) -> None:
    with pagedkv.load(case.good, case.model) as cache:
        x = mx.zeros((1, 1, 1, 8))
        cache[0].update_and_fetch(x, x)
        for save in (cache.save, lambda path: stock.save_prompt_cache(path, cache)):
            with pytest.raises(pagedkv.CacheStateError, match="from 900 to 901 tokens"):
                save(str(tmp_path / "a.safetensors"))
    assert not any(tmp_path.iterdir())

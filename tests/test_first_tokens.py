"""Treatments that the first tokens decide on: when, by what, and who is given them afterwards."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv import treatments
from pagedkv.calibration_file import Calibration
from pagedkv.model_facts import fingerprint
from pagedkv.sequences import TREATMENTS, UNDECIDED
from tests.model_zoo import build
from tests.models import lively, random_tokens, tiny_llama
from tests.test_treatment import SETTINGS, divergence

FIRST_PAGE = 4 + 32 + 256
"""Tokens with which a page is sealed."""


@pytest.fixture(scope="module")
def model() -> Any:
    return lively(tiny_llama(dim=256))


def read(model: Any, cache: Any, count: int, seed: int = 0, chunk: int = 64) -> mx.array:
    """The last logits of a prompt."""
    tokens = random_tokens(count, seed)
    for start in range(0, count, chunk):
        out = model(tokens[:, start : start + chunk], cache=cache)
        mx.eval(out)
    return out[:, -1]


def digests(cache: pagedkv.PagedCache) -> list[str]:
    return [layer.treatment.digest for layer in cache.paged_layers]


def test_the_first_page_decides(model: Any) -> None:
    with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)) as cache:
        first = cache.stats().treatments
        assert all(told.startswith("keys and values scaled and rotated") for told in first)
        before = digests(cache)
        read(model, cache, 256)
        assert digests(cache) == before, "there is no page yet"
        read(model, cache, 128)
        after = digests(cache)
        assert not set(after) & set(before)
        told = cache.stats().treatments
        start = "keys and values balanced and rotated: keys balanced over 256 tokens; large"
        assert all(text.startswith(start) for text in told), told
        pager = cache.context.pager
        assert not pager.choosers
        codecs = [c for p in pager.layer_pagers for c in p.codecs.values()]
        assert all(codec.treatment is not None for codec in codecs)
        assert {codec.treatment.digest for codec in codecs} == set(after)
        read(model, cache, 700, seed=1)
        other = model.make_cache()
        read(model, other, 700, seed=2)
        assert digests(cache) == digests(other) == after, "once and for all"
        other.close()
    with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)) as cache:
        read(model, cache, 384, seed=3)
        assert not set(digests(cache)) & {*before, *after}
    pagedkv.unwrap(model)


@pytest.mark.parametrize("chunk", [1, 64])
def test_looking_on_changes_nothing(model: Any, chunk: int) -> None:
    """Bit for bit what the model's own cache gives, as long as there is no page."""
    from mlx_lm.models.cache import make_prompt_cache

    count = FIRST_PAGE - 2 if chunk > 1 else 40
    want = read(model, make_prompt_cache(model), count, chunk=chunk)
    with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)) as cache:
        assert mx.array_equal(read(model, cache, count, chunk=chunk), want).item()
    pagedkv.unwrap(model)


@pytest.mark.parametrize(("window", "balanced"), [(32, False), (512, True)])
def test_tokens_that_are_generated_count_too(model: Any, window: int, balanced: bool) -> None:
    """The query of one in four, which is too few of a short window."""
    config = pagedkv.TierConfig(**{**SETTINGS, "hot_tokens": window})
    with pagedkv.wrap(model, config) as cache:
        read(model, cache, 4 + window + 256 + 1, chunk=1)
        told = cache.stats().treatments[0]
        assert ("balanced" in told) == balanced, told
        if balanced:
            assert "over 128 tokens" in told  # LEAST: then it looks no more
        assert cache.stats().warm.pages
        assert not cache.context.pager.choosers
    pagedkv.unwrap(model)


@pytest.mark.parametrize("chunk", [5, 8])
def test_steps_of_several_tokens_are_looked_at_like_generated_ones(model: Any, chunk: int) -> None:
    """All of a step's queries, and no more steps than it takes."""
    with pagedkv.wrap(model, pagedkv.TierConfig(**{**SETTINGS, "hot_tokens": 512})) as cache:
        read(model, cache, 800, chunk=chunk)
        told = cache.stats().treatments[0]
        assert "over 13" in told or "over 128 tokens" in told, told
    pagedkv.unwrap(model)


def test_values_are_balanced_after_few_queries(model: Any) -> None:
    """How values spread is seen without them; how queries attend is not told from so few."""
    config = pagedkv.TierConfig(**{**SETTINGS, "kv": "K8V4"})
    with pagedkv.wrap(model, config) as cache:
        read(model, cache, FIRST_PAGE + 1, chunk=1)
        told = cache.stats().treatments
        assert all(t.startswith("values balanced and rotated") for t in told), told
    pagedkv.unwrap(model)


def test_what_steps_attended_to_is_let_go(model: Any) -> None:
    """Sums that nobody computes would keep all tokens of their step."""
    shape = pagedkv.KVShape(2, 64, 64)
    chooser = treatments.FirstTokens(model.layers[0], shape, None, None, True, True)
    queries, size = mx.ones((1, 4, 1, 64)), 2 * 2 * 2**12 * 64 * 4
    mx.eval(queries)
    mx.synchronize()
    before, position = mx.get_active_memory(), 2**12
    while chooser.wants(1, position):
        keys, values = mx.ones((2, 1, 2, 2**12, 64))
        mx.eval(keys, values)
        chooser.see(queries, keys, values, position, 0.1, None)
        position += treatments.EVERY
    assert chooser._seen.query_tokens == treatments.LEAST
    del keys, values
    mx.synchronize()
    assert mx.get_active_memory() - before < size / 4


@pytest.mark.parametrize("problem", ["embedding", "numbers", "queries"])
def test_where_nothing_can_be_learned_the_weights_decide(
    model: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if problem == "embedding":
        monkeypatch.setattr(treatments, "rope_of", lambda layer: lambda rows, offset: rows**2 + 1)
    elif problem == "queries":
        seen = lambda *args: mx.zeros((2, 3)) @ mx.zeros((2, 3))  # noqa: E731
        monkeypatch.setattr(treatments.Covariances, "_add_attention", seen)
    else:
        lost = lambda self: np.full((2, 64, 64), np.nan)  # noqa: E731
        monkeypatch.setattr(treatments.Covariances, "queries", property(lost))
    with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)) as cache:
        before = digests(cache)
        read(model, cache, 512)
        assert digests(cache) == before
        assert not cache.context.pager.choosers
        assert all("scaled and rotated" in told for told in cache.stats().treatments)
    pagedkv.unwrap(model)


@pytest.mark.parametrize("treatment", ["none", "hadamard"])
def test_only_auto_waits(model: Any, treatment: str) -> None:
    config = pagedkv.TierConfig(**SETTINGS, treatment=treatment)
    with pagedkv.wrap(model, config) as cache:
        assert not cache.context.pager.choosers
    for kv, waits in (("K8V8", False), ("K8V4", True), ("K4V8", True), ("K8V8:900,K3V8", True)):
        with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS, kv=kv)) as cache:
            assert bool(cache.context.pager.choosers) == waits
    pagedkv.unwrap(model)


def test_it_pays_where_channels_go_together() -> None:
    """Queries and keys that are about few directions; each channel alone looks like the others."""
    model = lively(tiny_llama(dim=256, rope_theta=1e12))  # which hardly turns most of them
    rng = np.random.default_rng(0)
    for layer in model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj):
            rows = np.array(projection.weight).reshape(-1, 64, 256)
            few, other = (np.linalg.qr(rng.standard_normal((64, 64)))[0] for _ in range(2))
            mixed = few @ np.diag(np.geomspace(4, 0.04, 64)) @ other @ rows
            projection.weight = mx.array(mixed.reshape(-1, 256).astype(np.float32))
    mx.eval(model.parameters())
    tokens = random_tokens(1000)
    for kv, gain in (("K4V8", 0.7), ("K2V8", 0.8)):
        kl = {
            t: divergence(model, tokens, kv=kv, treatment=t) for t in ("auto", "hadamard", "none")
        }
        assert kl["auto"] < gain * min(kl["hadamard"], kl["none"]), (kv, kl)


@pytest.mark.parametrize(
    ("kind", "seen"),
    [("gemma3n", 1), ("gpt_oss", 2), ("qwen3_5", 2), ("phi3", 4), ("gemma2", 0)],
)
def test_other_kinds_of_models(kind: str, seen: int) -> None:
    """Shared keys, windows, partial embeddings, recurrent layers; attention of a model's own."""
    other = build(kind)
    with pagedkv.wrap(other, pagedkv.TierConfig(**SETTINGS)) as cache:
        out = read(other, cache, 640)
        assert mx.isfinite(out).all().item()
        held = [p for p in cache.context.pager.layer_pagers if p.pages]
        assert all(p.chooser is None for p in held)
        found = [p.treatment for p in held if p.treatment]
        assert sum(t.feedback is not None for t in found) == seen, [str(t) for t in found]
    pagedkv.unwrap(other)


def test_values_alone_are_balanced_as_well(model: Any, tmp_path: Path) -> None:
    config = stored(tmp_path, kv="K8V4")
    with pagedkv.wrap(model, config) as cache:
        read(model, cache, 600)
        told = cache.stats().treatments
        assert all(t.startswith("values balanced and rotated: balanced over 2") for t in told), told
        found = [layer.treatment for layer in cache.paged_layers]
        assert all(t.feedback is None and t.value_feedback is not None for t in found)
        mine, want = digests(cache), read(model, cache, 3, seed=2)
        cache.flush()
    pagedkv.unwrap(model)
    with pagedkv.resume(model, config) as cache:
        assert digests(cache) == mine
        cache.trim(3)
        assert mx.array_equal(read(model, cache, 3, seed=2), want).item()
    pagedkv.unwrap(model)


def test_rows_of_a_batch_decide_together(model: Any) -> None:
    with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)) as cache:
        one, two = model.make_cache(), model.make_cache()
        read(model, one, 20, seed=1)
        read(model, two, 12, seed=2)
        batch = [type(a).merge([a, b]) for a, b in zip(one, two, strict=True)]
        for _ in range(6):
            out = model(mx.concatenate([random_tokens(64, 4), random_tokens(64, 5)]), cache=batch)
            mx.eval(out)
        assert not cache.context.pager.choosers
        assert all("balanced" in told for told in cache.stats().treatments)
        assert mx.isfinite(out).all().item()
        one.close()
        two.close()
    pagedkv.unwrap(model)


# Saved caches


def test_a_saved_cache_brings_its_matrices(model: Any, tmp_path: Path) -> None:
    config, path = pagedkv.TierConfig(**SETTINGS), str(tmp_path / "a.safetensors")
    with pagedkv.wrap(model, config) as cache:
        read(model, cache, 600)
        cache.save(path)
        mine = digests(cache)
        want = read(model, cache, 400, seed=1)
    pagedkv.unwrap(model)
    with pagedkv.load(path, model) as cache:
        assert digests(cache) == mine
        assert mx.array_equal(read(model, cache, 400, seed=1), want).item(), "new pages as well"
    # Wrapped already, and nothing read yet.
    pagedkv.wrap(model, config).close()
    with pagedkv.load(path, model) as cache:
        assert digests(cache) == mine
        assert mx.array_equal(read(model, cache, 400, seed=1), want).item()
        with pagedkv.load(path, model) as again:
            assert digests(again) == mine
    # Another text has decided.
    with pagedkv.wrap(model, config) as cache:
        read(model, cache, 400, seed=7)
        with pytest.raises(
            pagedkv.CacheStateError, match="before the wrapped model reads anything"
        ):
            pagedkv.load(path, model)
    pagedkv.unwrap(model)


def test_a_short_saved_cache_leaves_it_open(model: Any, tmp_path: Path) -> None:
    config, path = pagedkv.TierConfig(**SETTINGS), str(tmp_path / "a.safetensors")
    with pagedkv.wrap(model, config) as cache:
        read(model, cache, 100)
        cache.save(path)
    pagedkv.unwrap(model)
    with pagedkv.load(path, model) as cache:
        assert cache.context.pager.choosers
        read(model, cache, 500, seed=1)
        assert all("balanced" in told for told in cache.stats().treatments)
        with pagedkv.load(path, model) as other:  # there is no page in the file
            assert digests(other) == digests(cache)
    pagedkv.unwrap(model)


# Stores


def stored(tmp_path: Path, **more: Any) -> pagedkv.TierConfig:
    settings = {"cold": "64MB", "cold_dir": str(tmp_path), **more}
    return pagedkv.TierConfig(**{**SETTINGS, **settings})


def kept_file(tmp_path: Path) -> Path:
    (path,) = tmp_path.rglob(TREATMENTS)
    return path


def test_a_store_keeps_the_matrices_of_its_pages(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pagedkv.wrap(model, stored(tmp_path)) as cache:
        read(model, cache, 100)
        cache.flush()
        assert not list(tmp_path.rglob(TREATMENTS)), "nothing is decided"
        assert list(tmp_path.rglob(UNDECIDED))
        read(model, cache, 500, seed=1)
        name = cache.flush().sequence
        mine, path = digests(cache), kept_file(tmp_path)
        assert not list(tmp_path.rglob(UNDECIDED)), "all is decided"
        written = path.stat()
        read(model, cache, 400, seed=2)
        with monkeypatch.context() as patch:
            patch.setattr(Calibration, "to_bytes", pytest.fail)  # they are there: not made again
            cache.flush()
        assert (path.stat().st_ino, path.stat().st_size) == (written.st_ino, written.st_size)
        checkpoints = cache.context.pager.cold.budget.checkpoints
        assert checkpoints > path.stat().st_size
    pagedkv.unwrap(model)
    found = Calibration.load(path)
    assert found.model == fingerprint(model)
    assert [t.digest for t in found.values()] == mine
    # Another process, which reads another text first.
    with pagedkv.wrap(model, stored(tmp_path)) as cache:
        assert cache.context.pager.cold.budget.checkpoints == checkpoints
        assert all("kept in the store" in told for told in cache.stats().treatments)
        read(model, cache, 500, seed=9)
        assert digests(cache) == mine
        with pagedkv.resume(model, sequence=name) as again:
            assert again.offset == 1000
            assert mx.isfinite(read(model, again, 1)).all().item()
    pagedkv.unwrap(model)


@pytest.mark.parametrize(("kv", "count"), [("K4V4", 200), ("K4V4", 600), ("K8V4", 200)])
def test_going_on_in_another_process_bit_for_bit(
    model: Any, tmp_path: Path, kv: str, count: int
) -> None:
    """Before anything is decided, too: what was seen goes with the tokens."""
    with pagedkv.wrap(model, stored(tmp_path, kv=kv)) as cache:
        read(model, cache, count, seed=1)
        cache.flush()
        want = read(model, cache, 400, seed=2)
    pagedkv.unwrap(model)
    with pagedkv.resume(model, stored(tmp_path, kv=kv)) as cache:
        assert mx.array_equal(read(model, cache, 400, seed=2), want).item(), "new pages as well"
    pagedkv.unwrap(model)


@pytest.mark.parametrize("content", [b"", b"[3", b"[]", b'{"0": 3, "1": {"queries": "AAAA"}}'])
def test_what_was_seen_may_be_damaged(model: Any, tmp_path: Path, content: bytes) -> None:
    with pagedkv.wrap(model, stored(tmp_path)) as cache:
        read(model, cache, 200)
        cache.flush()
    pagedkv.unwrap(model)
    (path,) = tmp_path.rglob(UNDECIDED)
    path.write_bytes(content)
    with pagedkv.resume(model, stored(tmp_path)) as cache:
        read(model, cache, 400, seed=2)
        assert all("balanced over" in told for told in cache.stats().treatments)
    pagedkv.unwrap(model)


@pytest.mark.parametrize("how", ["missing", "damaged", "cut short", "another"])
def test_without_its_matrices_a_sequence_is_refused(model: Any, tmp_path: Path, how: str) -> None:
    config = stored(tmp_path)
    with pagedkv.wrap(model, config) as cache:
        read(model, cache, 600, seed=1)
        cache.flush()
    pagedkv.unwrap(model)
    path = kept_file(tmp_path)
    text = path.read_text()
    if how == "missing":
        path.unlink()
    elif how == "damaged":
        path.write_text(text.replace('"matrices": "', '"matrices": "AAAA'))
    elif how == "cut short":
        path.write_text(text[:1000])
    else:
        with pagedkv.wrap(model, stored(tmp_path / "other")) as cache:
            read(model, cache, 600, seed=4)
            cache.flush()
        pagedkv.unwrap(model)
        shutil.copyfile(next((tmp_path / "other").rglob(TREATMENTS)), path)
        path.chmod(0o600)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(pagedkv.StoreMismatchError, match="needs the matrices"):
            pagedkv.resume(model, config)
    warned = [str(w.message) for w in told if "cannot be read" in str(w.message)]
    assert len(warned) == (how in ("damaged", "cut short"))
    pagedkv.unwrap(model)


def test_a_file_beside_the_checkpoints(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pagedkv.wrap(model, stored(tmp_path)) as cache:
        cold = cache.context.pager.cold
        files, budget = cold.sequences.checkpoints, cold.budget
        before = budget.checkpoints
        assert files.kept("a.json") is None

        def keep(content: bytes, durable: bool = False) -> None:
            files.keep("a.json", content.decode(), lambda: content, durable)

        keep(b"one")
        assert (files.kept("a.json"), budget.checkpoints) == (b"one", before + 3)
        with pytest.raises(pagedkv.OutOfPagesError, match="no room"):
            keep(bytes(10**9))

        def fails(old: Path, new: Path) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(type(cold._disk), "rename", staticmethod(fails))
            files.keep("a.json", "one", pytest.fail, durable=False)  # it is there: not made again
            for content, durable in ((b"three", False), (b"one", True)):
                with pytest.raises(pagedkv.ColdStoreError, match="No space"):
                    keep(content, durable)
        assert (files.kept("a.json"), budget.checkpoints) == (b"one", before + 3)
        assert [path.name for path in cold.directory.glob("a.json*")] == ["a.json"]
        keep(b"three", durable=True)
        keep(b"three")
        assert (files.kept("a.json"), budget.checkpoints) == (b"three", before + 5)
        for _ in range(2):
            files.drop("a.json")
            assert (files.kept("a.json"), budget.checkpoints) == (None, before)
        keep(b"three")
        (cold.directory / "a.json").chmod(0o644)
        with pytest.raises(pagedkv.UnsafeStoreError):
            files.kept("a.json")
    pagedkv.unwrap(model)


@pytest.mark.parametrize("kind", ["deepseek_v3", "phi3"])
def test_layers_without_known_weights_go_on_too(kind: str, tmp_path: Path) -> None:
    """Latent attention is left as it is, and stays so; of others all is learned."""
    other = build(kind)
    config, path = stored(tmp_path), str(tmp_path / "a.safetensors")
    with pagedkv.wrap(other, config) as cache:
        read(other, cache, 600)
        cache.flush()
        cache.save(path)
        want = read(other, cache, 400, seed=2)
        told = cache.stats().treatments
    pagedkv.unwrap(other)
    for again in (
        lambda: pagedkv.resume(other, config),
        lambda: pagedkv.load(path, other, pagedkv.TierConfig(**SETTINGS)),
    ):
        with again() as cache:
            assert mx.array_equal(read(other, cache, 400, seed=2), want).item()
            assert [t.partition(":")[0] for t in cache.stats().treatments] == [
                t.partition(":")[0] for t in told
            ]
        pagedkv.unwrap(other)


def test_a_file_without_matrices_in_a_model_that_has_not_decided(
    model: Any, tmp_path: Path
) -> None:
    path = str(tmp_path / "a.safetensors")
    with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS, treatment="none")) as cache:
        read(model, cache, 600)
        cache.save(path)
        want = read(model, cache, 400, seed=2)
    pagedkv.unwrap(model)
    pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)).close()
    with pagedkv.load(path, model) as cache:
        assert mx.array_equal(read(model, cache, 400, seed=2), want).item()
        assert set(cache.stats().treatments) == {"none"}
    pagedkv.unwrap(model)


def test_an_empty_cache_is_saved_and_loaded(model: Any, tmp_path: Path) -> None:
    from mlx_lm.models.cache import load_prompt_cache

    path = str(tmp_path / "a.safetensors")
    with pagedkv.wrap(model, pagedkv.TierConfig(**SETTINGS)) as cache:
        cache.save(path)
        assert [layer.offset for layer in load_prompt_cache(path)] == [0, 0]
        with pagedkv.load(path, model) as again:
            assert again.offset == 0
    pagedkv.unwrap(model)


def test_nobody_elses_matrices_are_written_over(model: Any, tmp_path: Path) -> None:
    config = stored(tmp_path)
    pagedkv.wrap(model, config).close()  # the store is free again
    theirs = lively(tiny_llama(dim=256))
    with pagedkv.wrap(theirs, config) as cache:
        read(theirs, cache, 600, seed=1)
        cache.flush()
        want = read(theirs, cache, 400, seed=2)
    pagedkv.unwrap(theirs)
    mine = model.make_cache()
    read(model, mine, 600, seed=3)
    with pytest.raises(pagedkv.StoreMismatchError, match="are not ours"):
        mine.flush()
    mine.close()
    pagedkv.unwrap(model)
    with pagedkv.resume(model, config) as cache:
        assert mx.array_equal(read(model, cache, 400, seed=2), want).item()
    pagedkv.unwrap(model)

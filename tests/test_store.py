"""What was flushed is there, bit for bit, whenever and however the process ends."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import pagedkv
from pagedkv.tiers import RealDisk
from tests.models import random_tokens, tiny_llama
from tests.stores import (
    NEVER,
    DyingDisk,
    Moment,
    PowerDisk,
    Recorder,
    check,
    empty_cache,
    extend,
    fill,
    same,
    settings,
)


def store_of(cold_dir: Path) -> Path:
    (store,) = [p for p in cold_dir.iterdir() if p.name.startswith("store-")]
    return store


# Going on


@pytest.mark.parametrize("kv", ["K4V4", "fp16", "K8V4:700,K4V4"])
@pytest.mark.parametrize("hot_dtype", [None, "bfloat16", "model"])
def test_a_resumed_sequence_goes_on_bit_for_bit(
    tmp_path: Path, kv: str, hot_dtype: str | None
) -> None:
    config = settings(tmp_path, kv=kv, hot_dtype=hot_dtype, warm="500KB")
    with empty_cache(config) as cache:
        fill(cache, 1500, 1, 700)
        flushed = cache.flush()
        assert (flushed.tokens, flushed.pages) == (2201, 16)
        expected = [extend(cache, 1), extend(cache, 300), extend(cache, 1)]
    with empty_cache(config) as cache:
        cache.resume()
        assert cache.offset == 2201
        check(cache)
        assert all(same(a, extend(cache, n)) for a, n in zip(expected, (1, 300, 1), strict=True))
        check(cache)
        again = cache.flush()
        assert (again.sequence, again.tokens) == (flushed.sequence, 2503)
        assert [s.tokens for s in cache.stored_sequences()] == [2503]


def test_a_model_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_llama(kv_heads=1)
    config = settings(tmp_path, cold="8MB", warm="300KB")
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(random_tokens(2000), cache=cache))
        cache.flush()
        expected = model(random_tokens(3, seed=1), cache=cache)
        mx.eval(expected)
    pagedkv.unwrap(model)
    for again in (False, True):  # with and without wrapping before
        if again:
            pagedkv.wrap(model, config)
        with pagedkv.resume(model, config) as cache:
            assert cache.offset == 2000
            actual = model(random_tokens(3, seed=1), cache=cache)
            assert mx.array_equal(actual, expected).item()
        pagedkv.unwrap(model)


def test_several_sequences_share_a_store(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with empty_cache(config) as first:
        fill(first, 1000)
        one = first.flush()
        with first.fork() as second:
            extend(second, 400)
            two = second.flush()
        expected = extend(first, 3)
    with empty_cache(config) as cache:
        assert [s.sequence for s in cache.stored_sequences()] == [two.sequence, one.sequence]
        cache.resume(one.sequence)
        assert same(extend(cache, 3), expected)
        with pytest.raises(
            pagedkv.SequenceNotFoundError, match=r"no sequence f{16}; there are .*1,400"
        ):
            cache.discard("f" * 16)
        cache.discard(two.sequence)
        assert [s.sequence for s in cache.stored_sequences()] == [one.sequence]
        cache.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_trimmed_and_an_empty_sequence_come_back_as_they_are(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with empty_cache(config) as cache:
        fill(cache, 1000)
        cache.trim(333)
        cache.flush()
        expected = extend(cache, 2)
    with empty_cache(config) as cache:
        cache.resume()
        assert same(extend(cache, 2), expected)
        cache.trim(cache.offset)
        cache.flush()
    with empty_cache(config) as cache:
        cache.resume()
        assert cache.offset == 0
        extend(cache, 5)


def test_a_flush_writes_a_page_once(tmp_path: Path) -> None:
    config = settings(tmp_path, warm="1MB")
    with empty_cache(config) as cache:
        fill(cache, 1500)
        cache.flush()
        cold = cache.context.pager.cold
        written = cold.counters.pages_written
        assert written == 10
        extend(cache, 1)
        cache.flush()
        assert cold.counters.pages_written == written
        stats = cache.stats()
        assert stats.warm.pages == 10  # they stayed where they were, and can go down for nothing
        for layer in cache.paged_layers:
            layer._pager._demote_farthest(layer._pager.precisions[0])
        cold.flush()
        assert cold.counters.pages_written == written


def test_the_token_path_neither_syncs_nor_writes_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Recorder()
    monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", lambda: disk)
    with empty_cache(settings(tmp_path)) as cache:
        fill(cache, 3000, 1, 1)
        assert not {"sync", "rename", "fsync"} & set(disk.calls)
        cache.flush()
        assert "sync" not in disk.calls
        cache.flush("power")
        done = disk.calls
        last_write = max(i for i, call in enumerate(done) if call == "rename")
        assert done.count("sync") >= 6  # two page files, the checkpoint, three directories
        assert done[last_write + 1 :].count("sync") == 1  # the directory with the new name


# Ending at any moment


def live(cold_dir: Path) -> dict[int, list[mx.array]]:
    """What a process would have gone on with at each flush: the attention of the next token."""
    expected = {}
    with empty_cache(settings(cold_dir / "expected")) as cache:
        for count in STEPS:
            fill(cache, count)
            with cache.fork() as twin:
                expected[cache.offset] = extend(twin, 1)
    return expected


STEPS = (1100, 900, 300)
STRIDE = int(os.environ.get("STORE_STRIDE", "41"))  # 1 dies at every call


def run_and_die(cold_dir: Path, durability: str) -> int:
    """Flush, go on past the flush, flush; the tokens of the last flush that returned."""
    flushed = 0
    try:
        cache = empty_cache(settings(cold_dir, durability=durability))
        for count in STEPS:
            fill(cache, count)
            flushed = cache.flush().tokens
        cache.trim(1500)
        fill(cache, 2500)  # pages in the slots of what was trimmed, if those were free
    except pagedkv.PagedKVError:
        pass
    return flushed


def moments(calls: list[str], begin: int, stride: int, steps: tuple[int, ...]) -> list[Moment]:
    """When to die: now and then, shortly before each commit, at calls from it on, and never.

    Args:
        calls: what one run did. Another one does the same renames and about as much between them.
        begin: the first call to die at.
        stride: and every so many further ones.
        steps: calls from each rename on; the last one is there when the flush is durable.
    """
    renames = [i for i, call in enumerate(calls) if call == "rename"]
    assert len(renames) == len(STEPS)
    sometimes = {*range(begin, len(calls), stride), *(i - 2 for i in renames)}
    around = [Moment(step, n) for n in range(1, len(renames) + 1) for step in steps]
    return [*(Moment(at) for at in sorted(sometimes)), *around, NEVER]


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("tear", [False, True])
def test_death_at_every_single_call_leaves_the_last_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str, tear: bool
) -> None:
    expected = live(tmp_path)
    disk = Recorder()
    monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", lambda: disk)
    assert run_and_die(tmp_path / "whole", durability) == sum(STEPS)
    calls = [call for call in disk.calls if call != "close"]
    gc.collect()
    seen = set()
    # The end is where flushes are committed; what comes before is mostly pages.
    for i, at in enumerate(moments(calls, tear, STRIDE, (0, 1))):
        cold_dir = tmp_path / f"{i}"
        monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", lambda at=at: DyingDisk(at, tear))
        flushed = run_and_die(cold_dir, durability)
        gc.collect()  # the lock is dropped
        monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", RealDisk)
        with empty_cache(settings(cold_dir)) as cache:
            try:
                cache.resume()
            except pagedkv.SequenceNotFoundError:
                assert flushed == 0, at
                continue
            # The flush that died may have come as far as its last step.
            following = [n for n in expected if n > flushed][:1]
            assert cache.offset in (flushed, *following), at
            seen.add(cache.offset)
            assert same(expected[cache.offset], extend(cache, 1)), at
            check(cache)
    assert seen == set(expected)


@pytest.mark.slow
@pytest.mark.parametrize("names_at_once", [False, True])
def test_a_power_failure_leaves_the_last_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names_at_once: bool
) -> None:
    expected = live(tmp_path)
    whole = PowerDisk(NEVER, names_at_once)
    monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", lambda: whole)
    assert run_and_die(tmp_path / "whole" / "cold", "power") == sum(STEPS)
    calls = [call for call in whole.calls if call != "close"]
    seen = set()
    # A rename, then the directory is opened and synced.
    for i, at in enumerate(moments(calls, 5, 3 * STRIDE, (0, 2, 3))):
        disk, root, left = PowerDisk(at, names_at_once), tmp_path / f"{i}", tmp_path / f"{i}-left"
        monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", lambda disk=disk: disk)
        root.mkdir()
        left.mkdir()
        flushed = run_and_die(root / "cold", "power")
        disk.after_the_failure(root, left)
        monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", RealDisk)
        with empty_cache(settings(left / "cold")) as cache:
            try:
                cache.resume()
            except pagedkv.SequenceNotFoundError:
                assert flushed == 0, at
                continue
            following = [n for n in expected if n > flushed][:1]
            assert cache.offset in (flushed, *following), at
            seen.add(cache.offset)
            assert same(expected[cache.offset], extend(cache, 1)), at
    assert seen == set(expected)


def test_directories_made_for_a_store_outlive_a_power_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, root, left = PowerDisk(NEVER, names_at_once=False), tmp_path / "root", tmp_path / "left"
    monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", lambda: disk)
    root.mkdir()
    left.mkdir()
    flushed = run_and_die(root / "some" / "where" / "cold", "power")
    disk.after_the_failure(root, left)
    monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", RealDisk)
    with empty_cache(settings(left / "some" / "where" / "cold")) as cache:
        cache.resume()
        assert cache.offset == flushed


@pytest.mark.parametrize("below", ["cold", "not/there/cold"])
def test_a_store_below_a_link_is_made_durable(tmp_path: Path, below: str) -> None:
    """As ``/tmp`` is on macOS."""
    link = tmp_path / "link"
    (tmp_path / "real").mkdir()
    link.symlink_to(tmp_path / "real")
    with empty_cache(settings(link / below, durability="power")) as cache:
        fill(cache, 700)
        cache.flush()
    with empty_cache(settings(tmp_path / "real" / below)) as cache:
        cache.resume()
        assert cache.offset == 700


KILLED = """
    import os, signal, sys
    from tests.stores import empty_cache, extend, fill, settings
    cache = empty_cache(settings(sys.argv[1]))
    fill(cache, 1100)
    cache.flush()
    if sys.argv[2] == "writing":
        fill(cache, 1500)
    elif sys.argv[2] == "flushing":
        fill(cache, 900)
        cache.context.pager.disk.rename = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
        cache.flush()
    elif sys.argv[2] == "exiting":
        extend(cache, 5)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def python(code: str, *argv: str) -> subprocess.Popen[str]:
    root = Path(__file__).parent.parent
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *argv],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("moment", ["at once", "writing", "flushing", "exiting"])
def test_a_killed_process_is_gone_on_with_in_another(tmp_path: Path, moment: str) -> None:
    cold_dir = tmp_path / "cold"
    child = python(KILLED, str(cold_dir), moment)
    assert child.wait(60) == (0 if moment == "exiting" else -signal.SIGKILL)
    with empty_cache(settings(tmp_path / "expected")) as cache:
        fill(cache, 1100)
        expected = extend(cache, 1)
    with empty_cache(settings(cold_dir)) as cache:
        cache.resume()
        assert same(extend(cache, 1), expected)
        check(cache)
        assert not list(store_of(cold_dir).glob("*.tmp"))


FORKED = """
    import os, sys, time
    import pagedkv
    from tests.stores import empty_cache, extend, fill, same, settings

    def forked(act):
        child = os.fork()
        if not child:
            try:
                act()
            except SystemExit:
                os._exit(0)
            finally:
                os._exit(1)
        return child

    def refused():
        store = cache.context.pager.cold
        uses = (
            cache.flush, cache.stored_sequences, cache.resume, store.flush,
            lambda: cache.discard("0" * 16), lambda: store.fetch([], None),
            lambda: store.put(0, 0, (4, 4, 256), None), lambda: store.room(0, 32768),
        )
        for use in uses if lasting else uses[3:4] + uses[5:]:
            try:
                use()
            except pagedkv.StoreLockedError as e:
                assert f"belongs to process {os.getppid()}, and this one is a fork" in str(e), e
            else:
                raise AssertionError(use)

    def leave():
        with cache:
            refused()
            cache.trim(1400)  # down to where pages are given up
            raise SystemExit

    def close_and_live():
        cache.close()
        time.sleep(60)

    lasting = sys.argv[2] == "lasting"
    config = settings(sys.argv[1] if lasting else None, write_limit="16MB")
    cache = empty_cache(config)
    fill(cache, 3000)
    assert cache.stats().cold.pages
    if lasting:
        cache.flush()
        fill(cache, 1200)
    fill(cache, 300)
    cache.context.pager.cold.flush()
    directory = cache.context.pager.cold.directory
    before = {path.name: path.stat().st_size for path in directory.iterdir()}
    for act in (leave, leave):
        assert os.waitpid(forked(act), 0)[1] == 0, "the child ended badly"
        assert before == {path.name: path.stat().st_size for path in directory.iterdir()}
    child = forked(close_and_live)
    expected = extend(cache, 1)
    if lasting:
        cache.flush()
    cache.close()
    try:
        with empty_cache(config) as cache:  # though the child still lives
            if lasting:
                cache.resume()
                cache.trim(1)
                assert same(extend(cache, 1), expected)
            else:
                assert not directory.exists()
    finally:
        os.kill(child, 9)
"""


@pytest.mark.parametrize("kind", ["lasting", "temporary"])
def test_a_forked_child_leaves_the_store_to_its_parent(tmp_path: Path, kind: str) -> None:
    child = python(FORKED, str(tmp_path), kind)
    try:
        assert child.wait(60) == 0
    finally:
        child.kill()


def test_a_lock_is_not_held_by_the_children_of_a_killed_process(tmp_path: Path) -> None:
    code = """
        import os, sys, time
        from tests.stores import empty_cache, settings
        cache = empty_cache(settings(sys.argv[1]))
        if not os.fork():
            os.setsid()
            sys.stdin.read()
            os._exit(0)
        os._exit(0)
    """
    parent = python(code, str(tmp_path))
    assert parent.wait(60) == 0
    empty_cache(settings(tmp_path)).close()
    assert parent.stdin is not None
    parent.stdin.close()


HOLDING = """
    import sys
    from tests.stores import empty_cache, settings
    cache = empty_cache(settings(sys.argv[1]))
    print("open", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_share_a_store(tmp_path: Path) -> None:
    child = python(HOLDING, str(tmp_path))
    try:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(pagedkv.StoreLockedError, match=f"process {child.pid}: end that one"):
            empty_cache(settings(tmp_path))
        empty_cache(settings(tmp_path, kv="K8V8")).close()  # another store in the directory
    finally:
        child.kill()
        child.wait()
    empty_cache(settings(tmp_path)).close()


def test_one_process_does_not_open_a_store_twice(tmp_path: Path) -> None:
    config = settings(tmp_path, warm="300KB", cold="8MB")
    first = empty_cache(config)
    fill(first, 500)
    first.flush()
    with pytest.raises(pagedkv.StoreLockedError, match="in this process already"):
        empty_cache(config)
    with pytest.raises(pagedkv.CacheStateError, match="holds 500 tokens"):
        first.resume()
    del first
    second = empty_cache(config)  # a dropped cache is as good as closed
    second.resume()
    second.close()
    model = tiny_llama()
    cache = pagedkv.wrap(model, config)
    mx.eval(model(random_tokens(500), cache=cache))
    name = cache.flush().sequence
    with pytest.raises(pagedkv.StoreLockedError, match=f"sequence {name} is open"):
        pagedkv.resume(model, config)
    twin = pagedkv.wrap(model, config)  # the same settings, the same tiers
    assert twin.context.pager is cache.context.pager
    with pytest.raises(pagedkv.StoreLockedError, match="in this process already"):
        pagedkv.wrap(model, settings(tmp_path, warm="400KB", cold="8MB"))
    cache.close()
    twin.resume(name)
    assert twin.offset == 500
    twin.close()
    pagedkv.unwrap(model)


# What is not as it should be


@pytest.mark.parametrize("what", ["removed", "replaced", "LOCK", "LOCK exchanged", "all"])
def test_a_flush_into_files_that_are_gone_is_refused(tmp_path: Path, what: str) -> None:
    """Cleaners of temporary directories go by age, file by file; descriptors stay good."""
    with empty_cache(settings(tmp_path)) as cache:
        fill(cache, 1500)
        cache.flush()
        store = store_of(tmp_path)
        file, match = store / "layer-0001-32k.kv", "1 of 2 page files were removed .*layer-0001-32k"
        if what == "removed":
            file.unlink()
        elif what == "replaced":
            file.rename(tmp_path / "other")
            file.touch(0o600)
            file.write_bytes((tmp_path / "other").read_bytes())
        else:
            (store / "LOCK").unlink()
            match = "LOCK of the store .* was removed or replaced"
        if what == "LOCK exchanged":
            (store / "LOCK").touch(0o600)
        if what == "all":
            shutil.rmtree(store)
        fill(cache, 300)
        with pytest.raises(pagedkv.ColdStoreError, match=f"{match}.* save.. "):
            cache.flush()
        assert cache.offset == 1800
        extend(cache, 1)  # nothing is lost here
    with empty_cache(settings(tmp_path)) as cache:
        if what in ("LOCK", "LOCK exchanged", "replaced"):
            cache.resume()
            assert cache.offset == 1500
            extend(cache, 1)
        else:  # the last flush is gone with its files
            with pytest.raises((pagedkv.CorruptPageError, pagedkv.SequenceNotFoundError)):
                cache.resume()
                extend(cache, 1)


def test_what_a_flush_needs_beside_pages_is_written_again(tmp_path: Path) -> None:
    config = settings(tmp_path, layer_kv="auto", treatment="hadamard", warm="500KB", cold="16MB")
    model = tiny_llama(layers=4)
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(random_tokens(400), cache=cache))
        cache.flush()
        kept = {p.name: p.read_bytes() for p in store_of(tmp_path).glob("*.json")}
        assert {"treatments.json", "layers.json"} <= set(kept)
        for name in kept:
            (store_of(tmp_path) / name).unlink()
        before = cache.context.pager.cold.budget.checkpoints
        cache.flush()
        assert {p.name: p.read_bytes() for p in store_of(tmp_path).glob("*.json")} == kept
        assert cache.context.pager.cold.budget.checkpoints == before
    pagedkv.unwrap(model)


def flushed(cold_dir: Path, **others: Any) -> Path:
    with empty_cache(settings(cold_dir, **others)) as cache:
        fill(cache, 1500)
        cache.flush()
    return store_of(cold_dir)


def test_another_model_or_other_settings_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        pagedkv.SequenceNotFoundError, match="holds no flushed sequence of synthetic"
    ):
        empty_cache(settings(tmp_path)).resume()
    store = flushed(tmp_path)
    for other in ({"kv": "K8V8"}, {"sink_tokens": 8}, {"hot_dtype": "bfloat16"}):
        with (
            empty_cache(settings(tmp_path, **other)) as cache,
            pytest.raises(pagedkv.StoreMismatchError, match="but of: synthetic, 2 layers, kv=K4V4"),
        ):
            cache.resume()
    model = tiny_llama()
    with pytest.raises(
        pagedkv.StoreMismatchError, match=r"no sequence of llama.*but of: synthetic"
    ):
        pagedkv.resume(model, settings(tmp_path, warm="300KB"))
    assert "make_cache" not in model.__dict__
    moved = empty_cache(settings(tmp_path, kv="K8V8"))
    target = moved.context.pager.cold.directory
    moved.close()
    store.rename(target)
    with (
        pytest.warns(UserWarning, match="was it moved here"),
        empty_cache(settings(tmp_path, kv="K8V8")) as cache,
        pytest.raises(pagedkv.CorruptStoreError, match="was it moved here"),
    ):
        cache.resume()


def test_what_cannot_be_kept_says_why(tmp_path: Path) -> None:
    reasons = {
        "no disk": settings(tmp_path, cold=0),
        "temporary": settings(None),
    }
    for reason, config in reasons.items():
        with empty_cache(config) as cache, pytest.raises(pagedkv.ConfigError, match=reason):
            cache.flush()
    with (
        pagedkv.PagedCache.standalone(1, settings(tmp_path)) as cache,
        pytest.raises(pagedkv.ConfigError, match="name the model"),
    ):
        cache.flush()
    with pytest.raises(pagedkv.ClosedError):
        cache.flush()
    with pytest.raises(pagedkv.ConfigError, match="durability is one of process, power"):
        settings(tmp_path, durability="eternal")
    with empty_cache(settings(tmp_path)) as cache:
        extend(cache, 100)
        cache[0].trim(3)
        with pytest.raises(pagedkv.CacheStateError, match="from 97 to 100 tokens"):
            cache.flush()


def test_a_damaged_page_and_a_missing_one_are_named(tmp_path: Path) -> None:
    store = flushed(tmp_path)
    file = store / "layer-0001-32k.kv"
    good = file.read_bytes()
    file.write_bytes(good[:40000] + bytes([good[40000] ^ 1]) + good[40001:])
    with (
        empty_cache(settings(tmp_path)) as cache,
        pytest.raises(pagedkv.CorruptPageError, match="layer 1 page 1 .*does not match"),
    ):
        cache.resume()
        extend(cache, 1)
    file.write_bytes(good[:70000])
    with (
        empty_cache(settings(tmp_path)) as cache,
        pytest.raises(pagedkv.CorruptPageError, match="layer 1 page 2 .*is missing.*70,000 bytes"),
    ):
        cache.resume()
    file.unlink()
    with empty_cache(settings(tmp_path)) as cache:
        with pytest.raises(pagedkv.CorruptPageError, match="layer 1 page 0 .*is missing"):
            cache.resume()
        assert cache.offset == 0
        check(cache)
        fill(cache, 700)  # as good as new


def test_a_damaged_checkpoint_keeps_its_pages(tmp_path: Path) -> None:
    store = flushed(tmp_path)
    (path,) = store.glob("*.checkpoint")
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.warns(UserWarning, match="is damaged.* no page in there is overwritten"):
        reopened = empty_cache(settings(tmp_path))
    with reopened as cache:
        with pytest.raises(
            pagedkv.CorruptStoreError, match="is damaged: it has .* remove the file"
        ):
            cache.resume()
        fill(cache, 2000)
        other = cache.flush()
        with (
            empty_cache_of(cache) as twin,
            pytest.raises(
                pagedkv.CorruptStoreError, match=f"choose another with sequence=: {other.sequence}"
            ),
        ):
            twin.resume()
    path.write_bytes(good)  # it was a bad cable, say
    with empty_cache(settings(tmp_path)) as cache:
        cache.resume(path.stem.removeprefix("sequence-"))
        assert cache.offset == 1500
        extend(cache, 1)


def empty_cache_of(cache: pagedkv.PagedCache) -> pagedkv.PagedCache:
    """Another empty cache over the same tiers."""
    twin = cache.fork()
    twin.trim(twin.offset)
    return twin


@pytest.mark.parametrize("name", ["checkpoint", "pages", "LOCK", "store"])
@pytest.mark.parametrize("how", ["link", "mode", "fifo", "owner"])
def test_links_modes_and_owners_are_refused(
    tmp_path: Path, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = flushed(tmp_path)
    path = {
        "checkpoint": next(store.glob("*.checkpoint")),
        "pages": store / "layer-0000-32k.kv",
        "LOCK": store / "LOCK",
        "store": store,
    }[name]
    match = {
        "link": "is a symbolic link",
        "mode": "has mode 07?[64]4",
        "fifo": "is no",
        "owner": "belongs",
    }
    if how == "mode":
        path.chmod(0o744 if name == "store" else 0o664)
        match["mode"] = "has mode 0(744|664): others may open it"
    elif how == "owner":
        euid = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: euid + 1)
    else:
        path.rename(tmp_path / "elsewhere")
        if how == "link":
            path.symlink_to(tmp_path / "elsewhere")
        else:
            os.mkfifo(path, 0o600)
    with pytest.raises(pagedkv.UnsafeStoreError, match=match[how]) as refused:
        empty_cache(settings(tmp_path))
    assert isinstance(refused.value, PermissionError)


def test_a_directory_that_anybody_may_write_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "open"
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(pagedkv.UnsafeStoreError, match="anybody may put other files"):
        empty_cache(settings(place))
    place.chmod(0o1777)
    empty_cache(settings(place)).close()


def test_a_store_under_the_names_of_earlier_versions_is_read_on(tmp_path: Path) -> None:
    store = flushed(tmp_path)
    size = sum(p.stat().st_size for p in store.glob("*.kv"))
    for path in store.glob("*.kv"):
        path.rename(path.with_suffix(".pages"))
    (store / "holiday.pages").write_bytes(b"a letter")
    (store / "layer-0000-32k.pages").chmod(0o600)
    earlier = store.rename(store.with_suffix(""))
    holder = os.open(earlier / "LOCK", os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(pagedkv.StoreLockedError):  # an earlier version has it open
        empty_cache(settings(tmp_path))
    os.close(holder)
    for _ in range(2):  # the second time under the names of now
        with empty_cache(settings(tmp_path)) as cache:
            cache.resume()
            assert cache.offset == 1500
            extend(cache, 1)
        assert [p.name for p in tmp_path.iterdir()] == [store.name]
        assert [p.name for p in store.glob("*.pages")] == ["holiday.pages"]
        assert sum(p.stat().st_size for p in store.glob("*.kv")) == size


def test_names_are_those_that_macos_leaves_alone(tmp_path: Path) -> None:
    for config in (settings(tmp_path), settings(None)):
        with empty_cache(config) as cache:
            fill(cache, 3000)
            directory = cache.context.pager.cold.directory
            assert directory.suffix == ".noindex"
            names = {path.suffix for path in directory.iterdir()}
            assert names == {"", ".kv"}


def test_lasting_stores_are_left_out_of_backups_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    excluded: list[Path] = []
    monkeypatch.setattr(RealDisk, "exclude_from_backup", lambda _, path: excluded.append(path))
    places = (tmp_path / "a", tmp_path / "a", tmp_path / "b")
    first, second, third = (flushed(place) for place in places)
    empty_cache(settings(None)).close()
    assert first == second
    assert excluded == [first, third]


class Exfat(RealDisk):
    """Has no modes; macOS shows everybody's."""

    def lstat(self, path: Path) -> os.stat_result:
        return self._shown(super().lstat(path))

    def fstat(self, fd: int) -> os.stat_result:
        return self._shown(super().fstat(fd))

    def _shown(self, status: os.stat_result) -> os.stat_result:
        return os.stat_result((status.st_mode | 0o777 & ~self.masked, *status[1:]))

    masked = 0


@pytest.mark.parametrize("masked", [0, 0o022])
@pytest.mark.parametrize("lasting", [False, True])
def test_a_file_system_without_permissions_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masked: int, lasting: bool
) -> None:
    flushed(tmp_path)  # was copied there, say
    monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", Exfat)
    monkeypatch.setattr(Exfat, "masked", masked)
    before = sorted(tmp_path.rglob("*"))
    for name in (".", "new"):
        for _ in range(2):  # chmod would be no help the second time
            with pytest.raises(pagedkv.UnsafeStoreError, match="keeps no permissions.*as APFS"):
                pagedkv.PagedCache.standalone(
                    2, settings(tmp_path / name), model="synthetic" if lasting else ""
                )
    made = {path.name for path in set(tmp_path.rglob("*")) - set(before)}
    assert not [name for name in made if name.startswith("pagedkv")]


# Slots


def test_slots_of_a_checkpoint_are_not_given_away(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with empty_cache(config) as cache:
        fill(cache, 2000)
        cache.flush()
        store = cache.context.pager.cold.directory
        before = {p.name: p.read_bytes() for p in store.glob("*.kv")}
        cache.trim(1900)
        fill(cache, 3000)
        cache.context.pager.cold.flush()
        for name, data in before.items():
            assert (store / name).read_bytes()[: len(data)] == data
        cache.flush()  # now the old ones are free
        files = cache.context.pager.cold._files
        grown = files.nbytes
        fill(cache, 1000)
        assert files.nbytes == grown
        check(cache)


def test_opening_clears_away_what_nobody_refers_to(tmp_path: Path) -> None:
    config = settings(tmp_path)
    store = flushed(tmp_path)
    sizes = {p.name: p.stat().st_size for p in store.iterdir()}
    for name in ("layer-0000-32k.kv", "layer-0007-16k.kv"):
        with (store / name).open("ab") as f:
            f.write(bytes(100_000))
        (store / name).chmod(0o600)
    (store / "sequence-0123456789abcdef.checkpoint.00000000.tmp").write_bytes(b"half")
    (store / "notes.txt").write_bytes(b"mine")  # not ours to delete
    with empty_cache(config):
        left = {p.name: p.stat().st_size for p in store.iterdir()}
        assert left == {**sizes, "notes.txt": 4, "LOCK": left["LOCK"]}


def test_leftovers_of_killed_processes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead, empty, other = (tmp_path / f"pagedkv-cold-{n}" for n in ("dead", "empty", "other"))
    for path in (dead, empty, other):
        path.mkdir(mode=0o700)
    (dead / "LOCK").touch(0o600)
    (dead / "layer-0000-16k.kv").touch(0o600)
    (other / "somebody.txt").touch()  # no lock: not ours
    (tmp_path / "pagedkv-work").mkdir()
    config = settings(None)
    with empty_cache(config) as cache:
        fill(cache, 3000)
        mine = cache.context.pager.cold.directory
        with empty_cache(config) as second:
            theirs = second.context.pager.cold.directory
            assert {p.name for p in tmp_path.iterdir()} == {
                *(p.name for p in (mine, theirs, other)),
                "pagedkv-work",
            }
    assert {p.name for p in tmp_path.iterdir()} == {other.name, "pagedkv-work"}


# Budgets


def test_the_budget_counts_what_is_there_already(tmp_path: Path) -> None:
    (tmp_path / "film.mkv").write_bytes(bytes(1_000_000))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "file").write_bytes(bytes(500_000))
    flushed(tmp_path, kv="K8V8", cold="3MB")
    config = settings(tmp_path, cold="3MB")
    with empty_cache(config) as cache:
        with pytest.raises(pagedkv.OutOfPagesError, match="other files: 2,1"):
            while True:
                extend(cache, 256)
                total = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
                assert total <= 3_000_000
        with pytest.raises(
            pagedkv.OutOfPagesError, match="cold tier full: layer 0 .* found in the"
        ):
            cache.flush()  # it needs copies of the warm pages too
        cache.trim(256 * 14)
        cache.flush()
        cache.flush("power")
        total = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
        assert 2_000_000 < total <= 3_000_000


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, cold="1MB", warm="2MB")
    with empty_cache(config, layers=1) as cache:
        fill(cache, 600)
        kept = cache.flush()
        cache.context.pager.cold.budget.foreign = 990_000
        with pytest.raises(pagedkv.OutOfPagesError, match="no room for a checkpoint of"):
            cache.flush()
        assert cache.stored_sequences() == [kept]


def test_the_write_limit_acts_like_a_full_disk_and_lasts(tmp_path: Path) -> None:
    config = settings(tmp_path, write_limit="500KB")
    with empty_cache(config) as cache:
        with pytest.raises(pagedkv.OutOfPagesError, match="write_limit of 500,000 bytes a day"):
            while True:
                extend(cache, 256)
        assert 400_000 < cache.stats().nvme_bytes_written <= 500_000
        assert cache[0].offset == cache[1].offset
        with pytest.raises(pagedkv.PagedKVError, match="write_limit"):
            cache.flush()
        cache.trim(300)  # below the page that found no room
        extend(cache, 1)  # everything is still there
    with empty_cache(config) as cache:  # the day goes on after a restart
        with pytest.raises(pagedkv.OutOfPagesError, match="write_limit"):
            for _ in range(20):
                extend(cache, 256)
        assert cache.stats().nvme_bytes_written < 100_000


# A disk that fails


def test_a_failed_flush_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FailingDisk()
    monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", lambda: disk)
    config = settings(tmp_path, durability="power")
    with empty_cache(config) as cache:
        fill(cache, 1100)
        cache.flush()
        expected = extend(cache, 1)
        for call in ("pwrite", "sync", "rename", "open"):
            extend(cache, 300)
            disk.failing = call
            with pytest.raises(pagedkv.ColdStoreError, match="the disk is tired"):
                cache.flush()
            disk.failing = ""
            check(cache)
            cache.trim(1300)
            fill(cache, 1800)  # pages in the slots of what was trimmed, if those were free
            check(cache)
        disk.failing = "all"  # and now the process dies
        cache.close()
    monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", RealDisk)
    with empty_cache(config) as cache:
        cache.resume()
        assert same(extend(cache, 1), expected)


class ReasonDisk(Recorder):
    """From the n-th call of a name on, it gives a reason, with a number or, oddly, without."""

    def __init__(self, name: str, after: int, error: OSError) -> None:
        super().__init__()
        self.name, self.left, self.error = name, after, error

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        super().before(name, args)
        self.left -= name == self.name
        if name == self.name and self.left < 0:
            raise self.error


REASON = "the quota of the laboratory is used up"


@pytest.mark.parametrize("error", [OSError(errno.EDQUOT, REASON), OSError(REASON)])
@pytest.mark.parametrize(
    ("call", "after"),
    [
        *((call, 0) for call in ("lstat", "mkdir", "open", "sync", "fstat", "lock", "list")),
        *(("lstat", 1), ("mkdir", 2), ("open", 3), ("sync", 3), ("fstat", 1), ("pwrite", 0)),
        *(("pwrite", 8), ("pread", 1), ("rename", 2), ("open", 20), ("lstat", 20), ("lock", 3)),
    ],
)
def test_what_the_system_says_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int, error: OSError
) -> None:
    disk = ReasonDisk(call, after, error)
    monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", lambda: disk)
    config = settings(tmp_path / "a" / "b", write_limit="50MB", durability="power", warm="100KB")
    with pytest.raises(pagedkv.PagedKVError, match=REASON):
        for _ in range(2):
            with empty_cache(config, layers=1) as cache:
                if cache.stored_sequences():
                    cache.resume()
                fill(cache, 1100)
                cache.flush()


def test_after_a_failed_sync_pages_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system that could not write forgets that it should have: the next fsync is content."""
    disk = FailingDisk()
    monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", lambda: disk)
    with empty_cache(settings(tmp_path, durability="power")) as cache:
        fill(cache, 1100)
        cache.context.pager.cold.flush()
        disk.failing = "sync"
        with pytest.raises(pagedkv.ColdStoreError, match="durable"):
            cache.flush()
        disk.failing, before = "", disk.calls.count("pwrite")
        cache.flush()
        pages = len(list(cache[0].located_pages()))
        # Of the first layer's file, which failed; the second was not asked. Six are the checkpoint.
        assert disk.calls.count("pwrite") - before == pages + 6
        before = disk.calls.count("pwrite")
        cache.flush()
        assert disk.calls.count("pwrite") - before == 6


class FailingDisk(Recorder):
    failing = ""

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        super().before(name, args)
        if self.failing in (name, "all") and name != "close":
            raise OSError(errno.EIO, "the disk is tired")

"""What a stress run does between its prefill chunks: decode, trim, fork, save, be killed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress

import mlx.core as mx
import numpy as np

from pagedkv.cache.paged_cache import PagedCache
from pagedkv.cache.persistence import snapshot as state
from pagedkv.errors import CacheStateError, PagedKVError
from pagedkv.tiers.arrays import evaluated
from pagedkv.tools.stress.killing import Killed, kill_one
from pagedkv.tools.stress.run import Run
from pagedkv.tools.stress.sequence import Sequence
from pagedkv.tools.stress.verify import page_at

_BURST = 4
_READ_WHOLE = 16384  # tokens up to which a fork is read back whole


def decode(run: Run) -> None:
    """A few tokens one by one, each asking for needles."""
    steps = min(int(run.rng.integers(1, _BURST + 1)), run.options.tokens - run.main.cache.offset)
    for i in range(steps):
        run.step(run.main, run.main.cache.offset + 1, 1, "decode", first=i)


def trim(run: Run) -> None:
    """Forget some tokens, a few or whole pages of them; others are written in their place."""
    length = run.main.cache.offset
    window = run.options.chunk if run.rng.random() < 0.3 else 2 * run.options.chunk + 1024
    count = min(int(run.rng.integers(1, window + 1)), length - 1)
    if count < 1:
        return
    left = length - count
    page = page_at(run.main.cache.paged_layers[0], left)
    run.books.hold(
        run.main.cache.trim(count) == count, f"a trim of {count:,} tokens did another number"
    )
    run.main.truth.cut(left, page.position if page and page.position < left else None)
    run.step(run.main, left + 1, 1, "decode", first=count)


def fork(run: Run) -> None:
    """Let a second sequence go its own way for a while, check both, and drop it."""
    main, rng, chunk = run.main, run.rng, run.options.chunk
    # Its next token is of another branch from here on.
    twin = Sequence(main.cache.fork(), main.truth.fork())
    run.open.append(twin)
    try:
        away = twin.cache.offset + int(rng.integers(1, chunk + 1))
        rows = min(run.options.queries, away - twin.cache.offset)
        run.step(twin, away, rows, "fork")
        room = run.options.tokens - main.cache.offset
        if room:
            ahead = main.cache.offset + min(room, int(rng.integers(1, chunk + 1)))
            run.step(main, ahead, min(run.options.queries, ahead - main.cache.offset), "fork")
        run.step(twin, twin.cache.offset + 1, 1, "decode", first=1)
        run.check_books()
        if twin.cache.offset <= _READ_WHOLE and not run.faults.enabled:
            for cache in twin.cache.paged_layers:
                run.verifier.check_stored(cache, twin.truth)
    finally:
        run.open.remove(twin)
        twin.cache.close()


def save(run: Run) -> None:
    """Save to a file, close, load it into fresh tiers, compare every byte, and go on from there."""
    main, path = run.main, run.folder / "saved.safetensors"
    needed = sum(layer.nbytes for layer in main.cache.paged_layers)
    free = shutil.disk_usage(run.folder).free
    if free < 1.2 * needed + 2**28:
        run.notes.append(f"save left out at {main.cache.offset:,} tokens: the disk is too full")
        return
    length = main.cache.offset

    def write() -> str:
        before = digest(main.cache)
        main.cache.save(str(path))
        return before

    before = run.survive(main, write, length)
    with run.faults.quietly(), suppress(PagedKVError):
        main.cache.discard()  # or the pages of the last flush would be kept beside the new ones
    run.close(main.cache)
    try:
        main.cache = _loaded(run, str(path))
    except CacheStateError as e:
        run.saves.fail(f"the file at {length:,} tokens is not what was saved: {e}")
        raise
    run.memory.cache = main.cache
    made_again = run.faults.repaired
    after = run.survive(main, lambda: digest(main.cache), length)
    if run.faults.repaired == made_again:  # else pages may begin elsewhere, or be better
        same = before == after
        run.saves.hold(same, f"what was loaded at {length:,} tokens is not what was saved")
    path.unlink()


def _loaded(run: Run, path: str) -> PagedCache:
    def load() -> PagedCache:
        fresh = run.reopen()
        try:
            for layer, saved in zip(fresh, state.load_states(path), strict=True):
                state.restore(layer, state.parse_meta(saved), saved)
        except BaseException:
            run.close(fresh)
            raise
        return fresh

    return run.survive(run.main, load)


def digest(cache: PagedCache) -> str:
    """Of everything a cache holds, byte for byte, wherever it is."""
    found = hashlib.blake2b()
    for layer in cache.paged_layers:
        description = state.describe(layer)
        what = [description.get(name) for name in ("offset", "pages", "dtype", "page_tokens")]
        found.update(repr(what).encode())
        for record in state.page_records(layer):
            found.update(np.asarray(evaluated(record)).tobytes())
        for array in layer._hot.view():
            words = mx.contiguous(array).view(mx.uint16)
            found.update(np.asarray(evaluated(words)).tobytes())
    return found.hexdigest()


def kill(run: Run) -> None:
    """Flush, let another process go on and kill it (SIGKILL), and resume what it left."""
    main, options = run.main, run.options
    durability = str(run.rng.choice(["process", "power"]))
    _flush(run, durability)
    length, history = main.cache.offset, main.truth.history
    run.close(main.cache)
    stop = min(options.tokens, length + 3 * options.chunk)
    fate = kill_one(run.tokens, run.config, history, stop, run.rng)
    main.cache = _resumed(run)
    run.memory.cache = main.cache
    _judge(run, fate, length)
    main.truth.read_to(main.cache.offset)
    with run.faults.quietly():
        main.cache.discard()  # its slots are free again as tokens are trimmed
    if main.cache.offset < options.tokens:
        run.step(main, main.cache.offset + 1, 1, "decode", first=length)


def _flush(run: Run, durability: str) -> None:
    """Flush a sequence without a damaged page: what the killed process finds must be sound."""
    main = run.main
    while True:
        run.survive(main, lambda: main.cache.flush(durability), main.cache.offset)
        if not run.faults.enabled or run.faults.damaged(main.cache) is None:
            return
        run.repair(main)


def _resumed(run: Run) -> PagedCache:
    def resume() -> PagedCache:
        fresh = run.reopen()
        try:
            fresh.resume()
        except BaseException:
            run.close(fresh)
            raise
        return fresh

    return run.survive(run.main, resume)


def _judge(run: Run, fate: Killed, flushed: int) -> None:
    """Resumed must be the last flush that returned, or the one that was under way."""
    length = run.main.cache.offset
    run.resumes.hold(not fate.wrong, f"the process to be killed at {flushed:,} said: {fate.wrong}")
    run.resumes.hold(
        length in fate.lengths(flushed),
        f"resumed at {length:,} tokens, flushed were {sorted(fate.lengths(flushed))}",
    )


DO: dict[str, Callable[[Run], None]] = {
    "decode": decode,
    "trim": trim,
    "fork": fork,
    "save": save,
    "kill": kill,
}
"""The operations by name."""

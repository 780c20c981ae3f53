"""Processes killed by the thousand: what was flushed is there, nothing else, and nothing leaks.

    python -m tests.kill_campaign --kills 1000 --seed 1

Each child is forked from a process that imported everything and has one thread. It opens the store
that the child before it left, checks it, goes on, and is killed (SIGKILL) at its nth call of the
disk, in the middle of a write, or after a random time. It writes down each flush before and after,
in a pipe, so that the parent knows what the next child must find.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pagedkv
from pagedkv.tiers import FileColdStore, RealDisk
from tests.store_oracle import (
    NAMES,
    Held,
    Snapshot,
    Violation,
    Want,
    commit,
    fetch,
    held_slots,
    match,
    open_store,
    put,
    snapshot,
)
from tests.stores import Recorder

HANG_SECONDS = 60
Known = dict[str, list[Snapshot | None]]
"""By sequence, what its checkpoint may be."""


class KillDisk(Recorder):
    """Kills this process at one of its calls; a write is made in part before."""

    def __init__(self, at: int, tear: bool) -> None:
        super().__init__()
        self.left, self.tear = at, tear

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        self.left -= 1
        if self.left:
            return
        if self.tear and name == "pwrite":
            fd, buffers, offset = args
            half = len(buffers[0]) // 2
            RealDisk().pwrite(fd, [buffers[0][: half // 4096 * 4096 or half]], offset)
        os.kill(os.getpid(), signal.SIGKILL)


def check_store(store: FileColdStore, disk: Any, known: Known) -> dict[str, Held]:
    """Everything that was flushed, byte for byte, and nothing else.

    Raises:
        Violation: if it is not so.
    """
    if store.sequences.checkpoints.damaged:
        raise Violation(f"damaged: {store.sequences.checkpoints.damaged}")
    found = {s.sequence for s in store.sequences.checkpoints.stored()}
    if found - known.keys() or any(n not in found and None not in known[n] for n in known):
        raise Violation(f"there are {found}, and flushed were {set(known)}")
    everything: dict[str, Held] = {name: Held(name) for name in NAMES}
    for name in found:
        checkpoint = store.sequences.load(name)
        wanted = [w for w in known[name] if w and w[0] == checkpoint.state]
        if not wanted:
            raise Violation(f"{name} is at {checkpoint.state.flushed_at}, known are {known[name]}")
        match(checkpoint, disk, wanted[0])
        known[name] = [wanted[0]]
        records = [record for record, _, _ in store.sequences.records(checkpoint)]
        for want, record in zip(wanted[0][1], records, strict=True):
            everything[name].pages[want.layer].append((want, record))
        for pages in filter(None, everything[name].pages.values()):
            fetch(store, pages)
    for name in known.keys() - found:
        known[name] = [None]
    check_leaks(store)
    return everything


def check_leaks(store: FileColdStore) -> None:
    """Just after everything was resumed: each slot is held twice, and no file is longer."""
    places = list(store.sequences.checkpoints.places())
    if held_slots(store) != 2 * len(places):
        raise Violation(f"{held_slots(store)} slots are held for {len(places)} pages")
    ends: dict[str, int] = {}
    for place in places:
        name = f"layer-{place.layer:04d}-{place.page_bytes // 1024}k.kv"
        ends[name] = max(ends.get(name, 0), (place.slot + 1) * place.page_bytes)
    for path in store.directory.iterdir():
        if path.suffix == ".kv" and path.stat().st_size > ends.get(path.name, -1):
            raise Violation(f"{path.name} has {path.stat().st_size:,} bytes: {ends}")
        if path.suffix not in (".kv", ".checkpoint") and path.name != "LOCK":
            raise Violation(f"{path.name} was left behind")
    store.check()


def work(store: FileColdStore, everything: dict[str, Held], random: Random, tell: Any) -> None:
    """Put, free, flush and discard until killed."""
    moment = time.time_ns() // 1000
    while True:
        moment += 1
        held, way = everything[random.choice(NAMES)], random.random()
        try:
            if way < 0.75:
                for layer, pages in held.pages.items():
                    want = Want(layer, random.choice((4, 4, 16)), moment * 4 + layer)
                    pages.append((want, put(store, want)))
            elif way < 0.95 and any(held.pages.values()):
                tell(("flushing", held.name, snapshot(held, moment)))
                commit(store, held, moment, durable=random.random() < 0.2)
                tell(("flushed", held.name, snapshot(held, moment)))
            elif way > 0.99:
                tell(("flushing", held.name, None))
                with suppress(pagedkv.SequenceNotFoundError):
                    store.sequences.checkpoints.discard(held.name, durable=False)
                tell(("flushed", held.name, None))
        except pagedkv.OutOfPagesError:
            way = 0.0
        if way < 0.08:
            for pages in held.pages.values():
                for _, record in pages[len(pages) // 2 :]:
                    store.free(record)
                del pages[len(pages) // 2 :]


def child(directory: Path, seed: str, known: Known, pipe: int) -> None:
    """Never returns; what it finds wrong goes through the pipe too."""

    def tell(message: Any) -> None:
        data = pickle.dumps(message)
        os.write(pipe, len(data).to_bytes(4, "little") + data)

    try:
        random = Random(seed)
        disk: Any = RealDisk()
        if at := int(seed.split()[-1]):
            disk = KillDisk(at, random.random() < 0.5)
        store = open_store(directory, disk)
        everything = check_store(store, disk, known)
        tell(("opened", "", dict(known)))
        work(store, everything, random, tell)
    except BaseException:
        tell(("wrong", traceback.format_exc(), None))
    os._exit(1)


def read_messages(pipe: int) -> list[Any]:
    """Until the writer is gone; a message that was cut off by its death is left out."""
    with os.fdopen(pipe, "rb") as file:
        data = file.read()
    found, at = [], 0
    while at + 4 <= len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data):
            break
        found.append(pickle.loads(data[at + 4 : end]))
        at = end
    return found


def learn(known: Known, messages: list[Any]) -> str | None:
    """What the next one may find, from what a killed child said; or what it found wrong."""
    for what, name, state in messages:
        if what == "wrong":
            return str(name)
        if what == "opened":
            known.clear()
            known.update(state)
        elif what == "flushing":
            known[name] = [*known.get(name, [None]), state]
        else:
            known[name] = [state]
    return None


def kill_one(directory: Path, seed: str, known: Known, counts: Counter[str]) -> str | None:
    """Fork, kill, and learn; what is wrong, or None."""
    random = Random(seed)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        child(directory, seed, known, writing)
    os.close(writing)
    if seed.endswith(" 0"):
        time.sleep(random.uniform(0, 0.25))
        os.kill(pid, signal.SIGKILL)
    wrong = learn(known, messages := read_messages(reading))
    _, status = os.waitpid(pid, 0)
    counts["while opening"] += not messages
    counts["flushes that returned"] += sum(m[0] == "flushed" for m in messages)
    counts["in a flush"] += bool(messages) and messages[-1][0] == "flushing"
    if not wrong and not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        return f"it ended with status {status}: a hang?"
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most")
    parser.add_argument("--where", type=Path, help="directory; the temporary directory if omitted")
    args = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(dir=args.where))
    random, known, counts = Random(args.seed), {}, Counter()
    started, done = time.monotonic(), 0
    while done < args.kills and time.monotonic() - started < args.seconds:
        at = 0 if random.random() < 0.4 else random.choice((60, 300, 1200))
        at = at and random.randrange(1, at)
        before = {name: list(states) for name, states in known.items()}
        wrong = kill_one(directory, f"{args.seed} {done} {at}", known, counts)
        if wrong:
            print(f"{wrong}\nkill {done} of seed {args.seed}, at call {at}; {before.keys()} were")
            print(f"flushed; what is left is in {directory}")
            return 1
        done += 1
    shutil.rmtree(directory)
    print(", ".join(f"{n:,} {what}" for what, n in counts.items()))
    print(f"{done:,} kills in {time.monotonic() - started:.0f} s, seed {args.seed}: all resumed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Faults by the thousand into the cold store: never wrong, at worst absent.

    python -m tests.fault_campaign --faults 100000 --seed 1

A store is driven at random, its disk fails at random (`faulty_disk`), and a dictionary
knows what every page must contain. A page may come back right or not at all, with an error that
says so; it may be absent only if a fault touched its bytes. Faults that can be recovered from must
not be noticed. A store that is opened again has its last checkpoints. Ends at the first violation,
with what is needed to see it again: rounds are independent, so `--seed 1 --round 37` is enough.
"""

from __future__ import annotations

import argparse
import faulthandler
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import pagedkv
from pagedkv.tiers import FileColdStore, RealDisk
from pagedkv.tiers.cold.record import ColdRecord
from pagedkv.tools.stress.faulty_disk import APPLIES, ERRORS, SILENT, FaultyDisk
from tests.fault_report import Tally, Touched
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

RATE = 0.02
WEIGHTS = {"eio_other": 0.5, "slow": 0.2, "rename": 8, "fsync": 4, "emfile": 3}
HANG_SECONDS = 120
ABSENT = (pagedkv.CorruptPageError, pagedkv.CorruptStoreError)
REFUSED = (pagedkv.ColdStoreError, pagedkv.OutOfPagesError)


class Round:
    """One store's life: some hundred steps, several processes long."""

    def __init__(
        self, directory: Path, seed: str, rates: dict[str, float], tally: Tally, settled: bool
    ) -> None:
        self.random = Random(seed)
        self.settled = settled  # no write is under way during the next step: replays exactly
        self.directory, self.tally = directory, tally
        self.disk = FaultyDisk(RealDisk(), self.random.randrange(2**31), rates)
        self.touched = Touched()
        self.held = {name: Held(name) for name in NAMES}
        self.committed: dict[str, list[Snapshot | None]] = {}
        self.moment = self.steps = 0
        self.keeps_all = False  # a checkpoint could not be read when the store was opened
        self.store: FileColdStore = self.opened()

    # Opening

    def opened(self) -> FileColdStore:
        """Open: with faults, which must end well or with a typed error; then without."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                try:
                    store = open_store(self.directory, self.disk)
                except (pagedkv.ColdStoreError, pagedkv.ConfigError) as e:
                    self.account(e)
                    continue
                damaged = store.sequences.checkpoints.damaged
                self.keeps_all = bool(damaged)
                if not damaged:
                    return store
                store.close()  # damaged, or only read wrongly: look again
                self.account(next(iter(damaged.values())))
            with self.disk.quietly():
                store = open_store(self.directory, self.disk)
            self.keeps_all = bool(store.sequences.checkpoints.damaged)
            return store

    def reopen(self, killed: bool) -> None:
        self.disk.dead = killed
        self.store.close()
        self.disk.dead = False
        self.account()
        for held in self.held.values():
            for pages in held.pages.values():
                pages.clear()
        self.store = self.opened()
        self.account()
        with self.disk.quietly():
            self.check_directory()
            for name in list(self.committed):
                self.resume(name)
            unknown = {s.sequence for s in self.store.sequences.checkpoints.stored()}
            if unknown - self.committed.keys():
                raise Violation(f"sequences nobody flushed: {unknown - self.committed.keys()}")

    def resume(self, name: str) -> None:
        """The last checkpoint, or one of two if the last commit ended with an error."""
        wanted = self.committed[name]
        try:
            checkpoint = self.store.sequences.load(name)
            found = [w for w in wanted if w and w[0] == checkpoint.state]
            if not found:
                raise Violation(f"sequence {name} is none of {len(wanted)} that it can be")
            match(checkpoint, self.disk, found[0])
        except pagedkv.CorruptStoreError as e:
            if not self.touched.checkpoint(name):
                raise Violation(f"no fault touched the checkpoint {name}: {e}") from e
            self.tally.detected_later(self.touched.forget_checkpoint(name))
            self.store.sequences.checkpoints.discard(name, durable=False)
            del self.committed[name]
            return
        except pagedkv.SequenceNotFoundError as e:
            if None not in wanted:
                raise Violation(f"sequence {name} is gone: {e}") from e
            del self.committed[name]
            return
        self.committed[name] = [found[0]]
        wants, records = list(found[0][1]), []
        try:
            for record, _, _ in self.store.sequences.records(checkpoint):
                records.append(record)
        except pagedkv.CorruptPageError as e:
            place = wants[len(records)]
            slot = int(checkpoint.entries["slot"][len(records)])
            self.excuse(place, slot * place.nbytes, e)
            for record in records:
                self.store.free(record)
            return
        for want, record in zip(wants, records, strict=True):
            self.held[name].pages[want.layer].append((want, record))
        for pages in self.held[name].pages.values():
            for page in list(pages):
                self.fetch_pages(name, [page])

    def check_directory(self) -> None:
        for path in self.store.directory.iterdir():
            name = path.name.removeprefix("sequence-").removesuffix(".checkpoint")
            if not (name == "LOCK" or path.suffix == ".kv" or name in self.committed):
                raise Violation(f"{path.name} was left behind")

    # Faults and their fate

    def account(self, error: Exception | None = None, calls: tuple[str, ...] = ()) -> None:
        """Note the fate of the faults since the last time.

        Args:
            error: how the step ended, if not well; it must come from a fault.
            calls: that the step makes itself; what else failed was recovered from.
        """
        log, self.disk.log = self.disk.log, []
        told = [f for f in log if f.kind in ERRORS or f.kind == "flip_read"]
        if isinstance(error, pagedkv.ColdStoreError) and not (told or isinstance(error, ABSENT)):
            kinds = ", ".join(f.kind for f in log) or "nothing"
            raise Violation(f"an error though {kinds} was injected: {error}") from error
        for fault in log:
            self.touched.add(fault)
            if fault.call == "also" or fault.kind in SILENT:
                continue  # its fate shows when it is read
            seen = error and fault in told and (not calls or fault.call in calls)
            self.tally.fate(fault.kind, "detected" if seen else self.tally.unseen(fault.kind))

    def excuse(self, want: Want, offset: int, error: Exception) -> None:
        """A page may be absent only if something happened to its bytes."""
        found = self.touched.page(want, offset)
        if not found:
            raise Violation(f"no fault touched this page: {error}") from error
        self.tally.detected_later(found)

    # Steps

    def step(self) -> None:
        self.steps += 1
        name = self.random.choice(NAMES)
        steps: list[tuple[float, Callable[[str], None]]] = [
            (40, self.add), (30, self.read), (5, self.trim), (4, self.settle), (7, self.flush),
            (1, self.discard), (1, lambda _: self.reopen(False)), (1, lambda _: self.reopen(True)),
            (1, self.calm),
        ]  # fmt: skip
        (chosen,) = self.random.choices([s for _, s in steps], [w for w, _ in steps])
        chosen(name)
        self.account()
        if self.random.random() < 0.3:
            self.store.check()

    def add(self, name: str) -> None:
        added: list[tuple[Want, ColdRecord]] = []
        bits = 16 if self.random.random() < 0.25 else 4
        try:
            for layer in self.held[name].pages:
                self.moment += 1
                want = Want(layer, bits, self.moment)
                added.append((want, put(self.store, want)))
        except pagedkv.OutOfPagesError as e:
            self.account(e)
            for _, record in added:
                self.store.free(record)
            self.trim(name)
        except pagedkv.ColdStoreError as e:
            self.account(e, ("open", "fstat"))
            for _, record in added:
                self.store.free(record)
        else:
            for want, record in added:
                self.held[name].pages[want.layer].append((want, record))
        if self.settled:
            self.store.flush()

    def read(self, name: str) -> None:
        pages = self.held[name].pages[self.random.choice(list(self.held[name].pages))]
        if not pages:
            return
        if self.random.random() < 0.6:
            at = self.random.randrange(len(pages))
            chosen = pages[at : at + self.random.randrange(1, 7)]
        else:
            chosen = self.random.choices(pages, k=self.random.randrange(1, 5))
        self.fetch_pages(name, chosen)

    def fetch_pages(self, name: str, chosen: list[tuple[Want, ColdRecord]]) -> None:
        """With faults; what fails is tried again without, page by page."""
        try:
            fetch(self.store, chosen)
            self.account()
            return
        except pagedkv.ColdStoreError as e:
            self.account(e, ("pread",))
        with self.disk.quietly():
            for want, record in chosen:
                if not record.live:
                    continue  # went with a page before it
                try:
                    fetch(self.store, [(want, record)])
                except pagedkv.CorruptPageError as e:
                    self.account()
                    self.excuse(want, record.offset, e)
                    self.forget(name, record)

    def forget(self, name: str, record: ColdRecord) -> None:
        """A page that is lost takes its sequence's later pages with it, as in a cache."""
        for pages in self.held[name].pages.values():
            at = next((i for i, (_, r) in enumerate(pages) if r is record), None)
            if at is not None:
                for _, gone in pages[at:]:
                    self.store.free(gone)
                del pages[at:]

    def trim(self, name: str) -> None:
        keep = self.random.random()
        for pages in self.held[name].pages.values():
            for _, record in pages[int(len(pages) * keep) :]:
                self.store.free(record)
            del pages[int(len(pages) * keep) :]

    def settle(self, name: str) -> None:
        self.store.flush()

    def flush(self, name: str) -> None:
        self.moment += 1
        durable = self.random.random() < 0.4
        if not any(self.held[name].pages.values()):
            return
        try:
            done = commit(self.store, self.held[name], self.moment, durable)
        except REFUSED as e:
            self.account(e, ("open", "pwrite", "sync", "rename", "pread", "fstat"))
            if str(e).startswith("cannot put the checkpoint"):
                self.committed.setdefault(name, [None]).append(
                    snapshot(self.held[name], self.moment)
                )
                self.touched.place_checkpoint(name, certain=False)
            else:
                self.touched.drop_temporary(name)
        else:
            self.account()
            self.committed[name] = [done]
            self.touched.place_checkpoint(name, certain=True)

    def discard(self, name: str) -> None:
        try:
            self.store.sequences.checkpoints.discard(name, durable=True)
        except pagedkv.SequenceNotFoundError:
            if name in self.committed and None not in self.committed[name]:
                raise
        except pagedkv.ColdStoreError as e:
            self.account(e)
            self.committed[name].append(None)
        else:
            self.committed.pop(name, None)
            self.touched.forget_checkpoint(name)

    def calm(self, name: str) -> None:
        """A disk that works again is used again, and nothing has leaked."""
        with self.disk.quietly():
            with suppress(pagedkv.OutOfPagesError):
                self.add(name)
                self.flush_calmly(name)
            if not self.store._writer.retry() or self.store.last_error:
                raise Violation(f"the disk works, and still: {self.store.last_error}")
            self.check_leaks()

    def flush_calmly(self, name: str) -> None:
        before = self.moment
        try:
            self.flush(name)
        finally:
            newest = self.committed.get(name, [None])[-1]
        if any(self.held[name].pages.values()) and (not newest or newest[0].flushed_at <= before):
            self.tally.counts["calm flush refused"] += 1

    def check_leaks(self) -> None:
        checkpoints = self.store.sequences.checkpoints
        if self.keeps_all:
            return
        live = sum(len(p) for held in self.held.values() for p in held.pages.values())
        if held_slots(self.store) != live + len(list(checkpoints.places())):
            raise Violation(f"{held_slots(self.store)} slots are held for {live} pages")
        self.store.flush()
        buffers = self.store._writer.buffers
        idle = sum(size * len(free) for size, free in buffers._free.items())
        if buffers.nbytes != idle:
            raise Violation(f"{buffers.nbytes - idle} bytes of write buffers are lost")

    def close(self) -> None:
        self.reopen(False)
        with self.disk.quietly():
            self.store.close()
        self.account()
        self.tally.finish(self.disk, self.touched)


def rates_for(random: Random) -> dict[str, float]:
    """Some rounds have every kind of fault, some have few, some none that destroys."""
    scale = RATE * random.choice((0.3, 1, 3))
    kinds = list(APPLIES)
    mode = random.random()
    if mode < 0.25:
        kinds = [k for k in kinds if k not in SILENT]
    elif mode < 0.5:
        kinds = random.sample(kinds, 4)
    return {kind: min(0.2, scale * WEIGHTS.get(kind, 1)) for kind in kinds}


def run_round(seed: int, number: int, steps: int, where: Path, tally: Tally) -> str | None:
    """What went wrong in one round; None if nothing did."""
    label = f"{seed} {number}"
    directory = Path(tempfile.mkdtemp(dir=where))
    life: Round | None = None
    try:
        life = Round(directory, label, rates_for(Random(label)), tally, number % 3 > 0)
        for _ in range(steps):
            life.step()
        life.close()
    except Exception:
        steps_done = life.steps if life else 0
        return f"round {number}, step {steps_done}:\n{traceback.format_exc()}"
    finally:
        if life is not None:
            life.disk.dead = True
            life.store.close()
        shutil.rmtree(directory, ignore_errors=True)
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--round", type=int, help="only this one")
    parser.add_argument("--steps", type=int, default=300, help="of a round")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most")
    parser.add_argument("--where", type=Path, help="directory; the temporary directory if omitted")
    args = parser.parse_args(argv)
    tally, started, number = Tally(), time.monotonic(), args.round or 0
    while tally.injected.total() < args.faults and time.monotonic() - started < args.seconds:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.__stderr__)
        wrong = run_round(args.seed, number, args.steps, args.where, tally)
        if wrong:
            print(wrong)
            print(f"again: python -m tests.fault_campaign --seed {args.seed} --round {number}")
            return 1
        number += 1
        if args.round is not None:
            break
    faulthandler.cancel_dump_traceback_later()
    print(tally.report(), f"seed {args.seed}, {number} rounds", sep="\n")
    print(f"{tally.injected.total():,} faults in {time.monotonic() - started:.0f} s, no violation")
    return 0


if __name__ == "__main__":
    sys.exit(main())

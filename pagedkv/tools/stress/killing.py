"""Kills a process in the middle of its work, and knows what it must have left behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field

import numpy as np

from pagedkv.config.tier_config import TierConfig
from pagedkv.tools.stress.tokens import History, SyntheticTokens

PATIENCE = 600.0
"""Seconds after which a process that has not come to where it is killed counts as hung."""

_PAUSE = 0.03


@dataclass
class Killed:
    """What a process had said when it was killed.

    Attributes:
        said: what it was at and how many tokens it held, in order.
        wrong: what it found wrong; empty if nothing.
    """

    said: list[tuple[str, int]] = field(default_factory=list)
    wrong: str = ""

    def lengths(self, flushed: int) -> set[int]:
        """What may be found: the last flush that returned, and one that was under way.

        Args:
            flushed: tokens that were on disk before.
        """
        found = {flushed}
        for what, length in self.said:
            if what == "flushing":
                found.add(length)
            elif what == "flushed":
                found = {length}
        return found


def kill_one(
    tokens: SyntheticTokens,
    config: TierConfig,
    history: History,
    stop: int,
    rng: np.random.Generator,
) -> Killed:
    """Start a process on a flushed sequence, and kill it at a random moment.

    Args:
        tokens: of the run.
        config: with the ``cold_dir`` of the sequence; no other process has it open.
        history: what the tokens from there on are.
        stop: tokens that it goes on to, at most.
        rng: says when to kill.
    """
    spec = {
        "model": asdict(tokens.model),
        "options": asdict(tokens.options),
        "config": config.to_dict(),
        "cuts": history.cuts,
        "stop": stop,
    }
    wanted, pause = int(rng.integers(2, 9)), float(rng.uniform(0, _PAUSE))
    process = subprocess.Popen(
        [sys.executable, "-m", "pagedkv.tools.stress.victim"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    fate = Killed()
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    try:
        assert process.stdin and process.stdout and process.stderr
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(json.dumps(spec))  # broken if it ended first: what it said tells more
        for line in process.stdout:
            what, _, number = line.partition(" ")
            fate.said.append((what, int(number)))
            if len(fate.said) == wanted:
                time.sleep(pause)
                process.kill()  # and what it said meanwhile is still read
        error = process.stderr.read().strip()
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()
    if len(fate.said) < wanted:
        fate.wrong = " ".join(error.split())[-300:] or "nothing, and it did not go on"
    return fate

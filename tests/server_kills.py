"""`pagedkv serve` told to stop, interrupted or killed at random moments under load.

Each time it ends in time, and the next one finds every prompt that was flushed, and answers right.

python -m tests.server_kills --times 200 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import random
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.models import byte_model
from tests.served import NO_END, TIERS, Served

LIMIT = 10.0
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
PROMPTS = ["".join(chr(97 + (i * i * (k + 3) + k) % 26) for i in range(600 + k)) for k in range(6)]
STATES = ("loading", "idle", "answering", "stopping")


class Campaign:
    """Servers that come after each other over one directory."""

    def __init__(self, folder: str, directory: Path, seed: int) -> None:
        """Make one that has begun nothing.

        Args:
            folder: of the model.
            directory: for the servers' pages.
            seed: of all that is random.
        """
        self._folder, self._rng = folder, random.Random(seed)
        self._options = [*TIERS, "--warm", "4MB", "--cold", "64MB", "--cold-dir", str(directory)]
        self._right: dict[str, str] = {}
        self._lasting: set[str] = set()  # prompts that the next server has to find
        self._flushed: int | None = None  # or how many of them
        self.seen: Counter[str] = Counter()
        self.slowest = 0.0

    def once(self) -> None:
        """One server, from its start to its end."""
        sign = self._rng.choice([*CODES])
        state = self._rng.choice(STATES)
        with Served(self._folder, *self._options, wait=state != "loading") as server:
            if state == "loading":
                time.sleep(self._rng.uniform(0.5, 2.5))
            else:
                self._look(server)
            ended = threading.Event()
            clients = [
                threading.Thread(target=self._client, args=(server, ended, self._rng.random()))
                for _ in range(3 if state in ("answering", "stopping") else 0)
            ]
            for client in clients:
                client.start()
            time.sleep(self._rng.uniform(0, 1.0))
            if state == "stopping" and sign == signal.SIGKILL:
                server.process.send_signal(signal.SIGTERM)
                time.sleep(self._rng.uniform(0, 2.5))
            code, took = server.stop(sign)
            ended.set()
            for client in clients:
                client.join()
            self._judge(server, state, sign, code, took)

    def _look(self, server: Served) -> None:
        """Ask for everything: what was flushed is found, and every answer is the right one."""
        hits = set()
        for prompt in PROMPTS:
            answer = server.ask(prompt, 4)
            text = answer["choices"][0]["text"]
            assert self._right.setdefault(prompt, text) == text, "another answer"
            if answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256:
                hits.add(prompt)
        assert self._lasting <= hits, f"{len(self._lasting - hits)} prompts are lost"
        if self._flushed is not None:
            assert len(hits) >= self._flushed, (len(hits), self._flushed)
        self._lasting, self._flushed = hits, None
        self.seen["found"] += len(hits)

    def _client(self, server: Served, ended: threading.Event, seed: float) -> None:
        rng = random.Random(seed)
        while not ended.is_set():
            prompt = rng.choice(PROMPTS)
            stream = rng.random() < 0.5
            with contextlib.suppress(OSError, http.client.HTTPException):
                body = {"prompt": prompt, "max_tokens": rng.choice([4, 2000]), "stream": stream}
                status, data, _ = server.send({**body, "logit_bias": NO_END})
                self.seen[f"status {status}"] += 1
                self.seen["told to come again"] += b"StoppedError" in data

    def _judge(self, server: Served, state: str, sign: int, code: int, took: float) -> None:
        name = signal.Signals(sign).name
        self.seen[f"{state} {name}"] += 1
        self.slowest = max(self.slowest, took)
        assert took < LIMIT, (state, name, took)
        text = server.text()
        if not (state == "loading" and sign == signal.SIGINT):  # Python's own, while it imports
            assert "Traceback" not in text, text[-3000:]
        gone = state == "stopping" and sign == signal.SIGKILL
        loading = state == "loading" and sign == signal.SIGTERM
        allowed = {CODES[sign], *((143,) if gone else ()), *((-15,) if loading else ())}
        allowed |= {-2} if state == "loading" and sign == signal.SIGINT else set()
        assert code in allowed, (state, name, code, text[-2000:])
        if sign != signal.SIGKILL and state != "loading":
            told = re.search(r"(\d+) prompts stay", text)
            assert told, text[-2000:]
            self._flushed, self._lasting = int(told[1]), set()
            self.seen["flushed"] += self._flushed
        elif gone:
            self._lasting = set()  # some of them may have made room already


def campaign(folder: str, directory: Path, times: int, seed: int) -> Campaign:
    """End so many servers."""
    made = Campaign(folder, directory, seed)
    for _ in range(times):
        made.once()
    return made


def main() -> None:
    """The campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args: Any = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        (model := Path(folder, "model")).mkdir()
        made = campaign(byte_model(model, larger=True), Path(folder, "cold"), args.times, args.seed)
    took = time.monotonic() - start
    print(
        f"{dict(sorted(made.seen.items()))}; slowest end {made.slowest:.1f} s; {took:.0f} s in all"
    )


if __name__ == "__main__":
    main()

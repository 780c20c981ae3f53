"""Requests of several threads to one wrapped model, each with its own cache; what became of them.

`python -m tests.thread_campaign --threads 4 --requests 200 --runs 10` compares every answer with
that of the same request alone. Most pages are cold. It runs in a process of its own, for what goes
wrong between threads ends processes.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

import pagedkv
from tests.models import lively, tiny_llama

CONFIG = pagedkv.TierConfig(
    hot_tokens=16,
    sink_tokens=4,
    kv="K8V4",
    page_tokens=256,
    warm="100KB",  # three pages per layer
    cold="64MB",
    hot_dtype="model",
    layer_kv="same",
    staging="1MB",
    write_buffer="1MB",
)


class Asker:
    """One wrapped model and what it answers to each request alone."""

    def __init__(self, treatment: str, prompts: int, dtype: mx.Dtype) -> None:
        """Ask so many different requests, one after the other."""
        self.model = lively(tiny_llama(layers=2))
        self.model.set_dtype(dtype)
        rng = np.random.default_rng(0)
        lengths = rng.integers(300, 1100, prompts)
        self.prompts = [mx.array(rng.integers(0, 100, n), mx.int32) for n in lengths]
        mx.eval(self.prompts)
        self.pages = Counter[str]()  # of the answers that are complete
        pagedkv.wrap(self.model, replace(CONFIG, treatment=treatment)).close()
        for prompt in self.prompts[:1]:  # what is settled by the first tokens is settled here
            self.answer(prompt)
        self.alone = [self.answer(prompt) for prompt in self.prompts]

    def steps(self, prompt: mx.array) -> Any:
        """The steps of a greedy answer to a prompt, each a token."""
        with self.model.make_cache() as cache:
            steps = generate_step(
                prompt, self.model, max_tokens=8, prefill_step_size=256, prompt_cache=cache
            )
            for token, _ in steps:
                yield int(token)
            stats = cache.stats()
            self.pages += Counter(warm=stats.warm.pages, cold=stats.cold.pages)

    def answer(self, prompt: mx.array) -> list[int]:
        return list(self.steps(prompt))

    def work(self, seed: int, requests: int, seen: Counter[str]) -> None:
        """Ask so many times, in an order of this thread's own, and count what became of it."""
        for i in np.random.default_rng(seed).integers(0, len(self.prompts), requests):
            try:
                same = self.answer(self.prompts[i]) == self.alone[i]
                seen["right" if same else f"another answer to {i}"] += 1
            except BaseException as e:
                seen[f"{type(e).__name__}: {e}"[:100]] += 1

    def together(self, threads: int, requests: int, seed: int) -> Counter[str]:
        """All threads at once."""
        seen = [Counter[str]() for _ in range(threads)]
        workers = [
            threading.Thread(target=self.work, args=(seed * threads + n, requests, seen[n]))
            for n in range(threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(seen, Counter[str]())

    def interleaved(self, at_once: int) -> Counter[str]:
        """Several answers step by step, in one thread."""
        seen = Counter[str]()
        for start in range(0, len(self.prompts), at_once):
            some = range(start, min(start + at_once, len(self.prompts)))
            running = {i: self.steps(self.prompts[i]) for i in some}
            got: dict[int, list[int]] = {i: [] for i in running}
            while running:
                for i in list(running):
                    token = next(running[i], None)
                    if token is None:
                        del running[i]
                    else:
                        got[i].append(token)
            for i, tokens in got.items():
                seen["right" if tokens == self.alone[i] else f"interleaved: another to {i}"] += 1
        return seen

    def passed_on(self, threads: int) -> Counter[str]:
        """Each answer's steps in turn by several threads, as pools of workers do it."""
        seen = Counter[str]()
        pools = [ThreadPoolExecutor(1) for _ in range(threads)]
        for i, prompt in enumerate(self.prompts):
            cache = self.model.make_cache()
            tokens: list[int] = []
            ids = prompt[None]

            def call(ids: mx.array, cache: Any = cache) -> int:
                out = self.model(ids, cache=cache)
                return int(mx.argmax(out[0, -1]).item())

            most = ids.shape[1] - 1  # the last token by itself, as `generate_step` does
            pieces = [ids[:, at : min(at + 256, most)] for at in range(0, most, 256)]
            pieces.append(ids[:, -1:])
            mx.eval(pieces)
            for n, piece in enumerate(pieces):
                last = pools[n % threads].submit(call, piece).result()
            for n in range(8):
                tokens.append(last)
                last = pools[n % threads].submit(call, mx.array([[last]])).result()
            seen["right" if tokens == self.alone[i] else f"passed on: another to {i}"] += 1
            cache.close()
        for pool in pools:
            pool.shutdown()
        return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=24, help="different requests")
    parser.add_argument("--treatment", default="auto")
    parser.add_argument(
        "--dtype", default="float32", help="of the model; a GPU's kernels take 16 bit"
    )
    args = parser.parse_args()
    asker = Asker(args.treatment, args.prompts, getattr(mx, args.dtype))
    seen = Counter[str]()
    for run in range(args.runs):
        now = asker.together(args.threads, args.requests, run)
        now += asker.interleaved(args.threads) + asker.passed_on(2)
        print(f"run {run + 1}: {dict(now)}", flush=True)
        seen += now
    print(f"{sum(seen.values()):,} requests: {dict(seen)}; pages: {asker.pages}")
    sys.stdout.flush()
    # MLX ends a process that had several threads with std::terminate, with or without us.
    os._exit(set(seen) != {"right"} or not asker.pages["cold"])


if __name__ == "__main__":
    main()

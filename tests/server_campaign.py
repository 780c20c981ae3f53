"""Many clients against mlx-lm's real server in this process, its model wrapped.

python -m tests.server_campaign --requests 2000 --seed 1
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_lm

import pagedkv
from pagedkv.integrations.mlx_lm.wrapping import wrapping_of
from pagedkv.integrations.server.access import Access
from pagedkv.integrations.server.prompt_cache import KeptPrompts
from pagedkv.integrations.server.provider import PagedModelProvider
from pagedkv.integrations.server.requests import PagedResponseGenerator
from pagedkv.integrations.server.server import bound, listening, server_options
from pagedkv.tiers import Pager
from tests.models import byte_model

CONFIG = pagedkv.TierConfig(  # 16-bit pages and 16-bit hot tokens: reuse changes no number
    hot_tokens=64, sink_tokens=4, kv="fp16", page_tokens=256, warm="700KB", cold="16MB"
)


@dataclass(frozen=True)
class Request:
    """What is asked, and how the client behaves.

    Attributes:
        prompt: text.
        max_tokens: at most.
        stream: whether the answer comes in events.
        leave: close the connection after so many events; None stays.
        seeded: asks for a seed, which mlx-lm serves by itself, outside of the batch.
    """

    prompt: str
    max_tokens: int
    stream: bool = False
    leave: int | None = None
    seeded: bool = False


@dataclass(frozen=True)
class Answer:
    """What came back: the status, the text, tokens found in the prompt cache, and any error."""

    status: int
    text: str
    cached: int | None
    error: dict[str, Any] | None = None


class Running:
    """A server in this process.

    Attributes:
        generator: its generation thread.
        port: where it listens.
    """

    def __init__(self, generator: PagedResponseGenerator, port: int) -> None:
        self.generator, self.port = generator, port

    @property
    def kept(self) -> KeptPrompts:
        kept: KeptPrompts = self.generator.prompt_cache
        return kept

    @property
    def pager(self) -> Pager:
        wrapping = wrapping_of(self.generator.model_provider.model)
        assert wrapping is not None
        return wrapping.pager

    def ask(self, request: Request, seconds: float = 100) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        body: dict[str, Any] = {
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "stream": request.stream,
        }
        if request.seeded:
            body["seed"] = 1
        if request.stream:
            body["stream_options"] = {"include_usage": True}
        try:
            connection.request("POST", "/v1/completions", json.dumps(body))
            response = connection.getresponse()
            if request.stream:
                return self._events(request, response)
            answer = json.loads(response.read())
        finally:
            connection.close()
        if "error" in answer:
            return Answer(response.status, "", None, answer["error"])
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return Answer(response.status, answer["choices"][0]["text"], cached)

    def _events(self, request: Request, response: http.client.HTTPResponse) -> Answer:
        text, cached, seen = "", None, 0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return Answer(response.status, text, cached, event["error"])
            for choice in event["choices"]:
                text += choice["text"]
            if "usage" in event:
                cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
            seen += 1
            if request.leave is not None and seen >= request.leave:
                break
        return Answer(response.status, text, cached)

    def wait_idle(self, seconds: float = 100) -> None:
        """Until nothing is under way: only what is kept for reuse uses the pager."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if len(self.pager.users) == self.kept_layers():
                return
            time.sleep(0.05)
        raise AssertionError(
            f"{len(self.pager.users)} layer caches are held, the prompt cache has "
            f"{self.kept_layers()}"
        )

    def kept_layers(self) -> int:
        layers = self.pager.layers
        return len(self.kept) * layers

    def check(self) -> None:
        """Conservation, while idle: pages, references, slots and records."""
        self.pager.reclaim()
        for layer in self.pager.layer_pagers:
            layer.check([c._table for c in [*self.pager.users] if c._pager is layer])

    def within_budgets(self) -> bool:
        pager = self.pager
        warm = sum(layer.warm_bytes for layer in pager.layer_pagers)
        cold = pager.open_cold.nbytes if pager.open_cold else 0
        return warm <= pager.budget.warm_bytes and cold <= pager.budget.cold_bytes


@contextmanager
def running(
    folder: str,
    config: pagedkv.TierConfig = CONFIG,
    *options: str,
    access: Access | None = None,
    **provided: Any,
) -> Iterator[Running]:
    """A server, stopped at the end.

    Args:
        folder: of its model.
        config: its tiers.
        options: mlx-lm's.
        access: who may ask.
        provided: for `PagedModelProvider`.
    """
    args = server_options(
        ["--model", folder, "--prefill-step-size", "128", "--log-level", "ERROR", *options],
        argparse.ArgumentParser,
    )
    provider = PagedModelProvider(args, config, **provided)
    generator = PagedResponseGenerator(provider, KeptPrompts(args.prompt_cache_size))
    try:
        generator.wait()
        ready, place = threading.Event(), bound("127.0.0.1", 0)
        web = listening(generator, access or Access(), ready.set)
        thread = threading.Thread(target=web.run, args=([place],))
        thread.start()
        assert ready.wait(60)
        try:
            yield Running(generator, place.getsockname()[1])
        finally:
            web.should_exit = True
            thread.join()
    finally:
        generator.stop_and_join()


def requests(count: int, seed: int) -> list[Request]:
    """Prompts of several lengths, many of which begin alike; clients that stay and that go."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz    "
    bases = ["".join(rng.choices(letters, k=rng.randint(600, 1000))) for _ in range(4)]
    out: list[Request] = []
    for _ in range(count):
        if out and rng.random() < 0.2:
            prompt = rng.choice(out).prompt  # the same again
        else:
            prompt = rng.choice(bases) + "".join(rng.choices(letters, k=rng.randint(1, 200)))
        stream = rng.random() < 0.5
        leave = rng.randint(1, 4) if stream and rng.random() < 0.4 else None
        tokens = 40 if leave else rng.randint(1, 12)
        out.append(Request(prompt, tokens, stream, leave, rng.random() < 0.1))
    return out


def expected(folder: str, wanted: list[Request]) -> dict[tuple[str, int], str]:
    """What each request gets if it is the only one, by prompt and length."""
    model, tokenizer = mlx_lm.load(folder)[:2]
    answers: dict[tuple[str, int], str] = {}
    with pagedkv.wrap(model, CONFIG):
        for request in wanted:
            key = (request.prompt, request.max_tokens)
            if request.leave is None and key not in answers:
                steps = mlx_lm.stream_generate(
                    model, tokenizer, request.prompt, max_tokens=request.max_tokens,
                    prefill_step_size=128,
                )  # fmt: skip
                answers[key] = "".join(step.text for step in steps)
    pagedkv.unwrap(model)
    return answers


def campaign(folder: str, count: int, seed: int, clients: int = 6) -> Counter[str]:
    """Send requests from several clients at once, and check everything that can be checked.

    Returns:
        What happened, counted.
    """
    wanted = requests(count, seed)
    answers = expected(folder, wanted)
    seen: Counter[str] = Counter()
    problems: list[str] = []
    queue = list(enumerate(wanted))[::-1]
    lock = threading.Lock()
    with running(folder, CONFIG, "--prompt-cache-size", "6") as server:

        def client() -> None:
            while True:
                with lock:
                    if not queue or problems:
                        return
                    number, request = queue.pop()
                answer = server.ask(request)
                with lock:
                    _judge(number, request, answer, answers, seen, problems)

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert server.within_budgets()
            time.sleep(0.01)
        assert not problems, problems
        server.wait_idle()
        server.check()
        counters = server.pager.counters
        seen.update(sealed=counters.sealed, demoted=counters.demoted, kept=len(server.kept))
        server.kept.trim_to(n_sequences=0)
        server.check()
        assert not server.pager.users
        assert not any(layer.pages for layer in server.pager.layer_pagers)
        assert server.generator.is_healthy
    return seen


def _judge(
    number: int,
    request: Request,
    answer: Answer,
    answers: dict[tuple[str, int], str],
    seen: Counter[str],
    problems: list[str],
) -> None:
    if answer.status != 200 or answer.error:
        problems.append(f"request {number}: {answer}")
    seen["requests"] += 1
    seen["seeded"] += request.seeded
    if request.leave is not None:
        seen["left"] += 1
        return
    seen["streamed"] += request.stream
    if answer.text != answers[request.prompt, request.max_tokens]:
        problems.append(f"request {number} was answered otherwise than alone: {request} {answer}")
    if not isinstance(answer.cached, int) or answer.cached < 0:
        problems.append(f"request {number} does not say what was cached: {answer}")
    elif answer.cached:
        seen["reused"] += 1


def main(
    run: Callable[[str, int, int], Counter[str]] = campaign,
    description: str | None = __doc__,
    count: int = 2000,
) -> None:
    """A campaign of requests from the command line.

    Args:
        run: given a model's folder, how many requests, and a seed.
        description: of it.
        count: of requests, if nobody says how many.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--requests", type=int, default=count)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seen = run(byte_model(Path(folder), larger=True), args.requests, args.seed)
    print(f"{dict(sorted(seen.items()))} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

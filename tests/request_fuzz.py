"""Requests of every kind against `pagedkv serve`, beside clients whose answers are known.

python -m tests.request_fuzz --requests 20000 --seed 1
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections import Counter
from typing import Any

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from pagedkv.integrations.server.schema import SCHEMAS
from tests.served import TIERS, Served
from tests.server_campaign import main

ODD_TEXT = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["\ud800", "\udfff\ud800", "\x00", "\u202e", "\ufeff", "💥" * 20, "a" * 3000, ""]
    ),
)
NUMBERS = st.one_of(
    st.integers(-5, 300),
    st.sampled_from([0, 1, -1, 2**31, 2**31 - 1, 2**63, -(2**63), 2**64, 2**70, 10**30, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([1e-300, 1e-7, 5e-324, 1.7e308, 0.5, 1.0]),
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, ODD_TEXT),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(ODD_TEXT, inner, max_size=4)
    ),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool", "\x00"])},
        optional={
            "content": st.one_of(
                *[st.text(max_size=60)] * 5, st.none(), st.lists(ANYTHING, max_size=3),
                st.lists(
                    st.fixed_dictionaries({"type": st.just("text"), "text": ODD_TEXT}), max_size=3
                ),
                st.lists(
                    st.fixed_dictionaries(
                        {
                            "type": st.just("image_url"),
                            "image_url": st.sampled_from(
                                ["data:image/png;base64,xx", "http://127.0.0.1:1/", {"url": "file:///"}]
                            ),
                        }
                    ),
                    max_size=2,
                ),
            ),
            "name": ODD_TEXT,
            "tool_calls": st.one_of(st.none(), st.just([]), ANYTHING),
            "tool_call_id": ODD_TEXT,
        },
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.one_of(*[st.text(min_size=1, max_size=80)] * 5, st.lists(ODD_TEXT, max_size=2)),
    "messages": st.one_of(MESSAGES, MESSAGES, MESSAGES, st.just([])),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 400),
    "min_p": st.floats(0, 1),
    "logit_bias": st.dictionaries(st.integers(-2, 300).map(str), st.floats(-100, 100), max_size=3),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 11),
    "seed": st.integers(0, 10),
    "stop": st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), max_size=3)),
    "xtc_probability": st.floats(0, 1),
    "repetition_penalty": st.floats(0.5, 2),
    "tools": st.lists(st.fixed_dictionaries({"type": st.just("function")}), max_size=2),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from(["enable_thinking", "chat_template", "tokenize", "x", "messages"]),
        st.one_of(st.booleans(), st.integers(), ODD_TEXT),
        max_size=2,
    ),
    "role_mapping": st.dictionaries(ODD_TEXT, ODD_TEXT, max_size=3),
    "cache_salt": st.sampled_from(["", "a", "b", "x" * 1001]),
    "model": st.sampled_from([*["default_model"] * 5, "gpt-4", "\x00", "../.."]),
}  # fmt: skip
ONE_IN_TEN = st.sampled_from([False] * 9 + [True])
PATHS = [
    *SCHEMAS,
    "/v1/models",
    "/v1/models/x",
    "/health",
    "/",
    "/v1/embeddings",
    "/v1/completions/",
]


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, Any]:
    """An endpoint that takes a body, and what may be one."""
    path = draw(st.sampled_from(sorted(SCHEMAS)))
    known = sorted(SCHEMAS[path].model_fields)
    body: dict[str, Any] = {}
    if not draw(ONE_IN_TEN):
        needed = "prompt" if "prompt" in known else "messages"
        body[needed] = draw(LIKELY[needed])
    usual = [name for name in known if name in LIKELY and name not in body]
    for name in draw(st.lists(st.sampled_from(usual), max_size=4, unique=True)):
        body[name] = draw(LIKELY[name])
    if draw(ONE_IN_TEN) or draw(ONE_IN_TEN):
        body[draw(st.sampled_from(known))] = draw(ANYTHING)
    if draw(ONE_IN_TEN):
        body[draw(ODD_TEXT)] = draw(ANYTHING)
    return path, draw(ANYTHING) if draw(ONE_IN_TEN) and draw(ONE_IN_TEN) else body


@st.composite
def attacks(draw: st.DrawFn) -> dict[str, Any]:
    """How one request is sent."""
    path, body = draw(bodies())
    raw = json.dumps(body).encode()
    manner = draw(
        st.sampled_from(["whole"] * 12 + ["damaged", "cut", "left", "slow", "other", "raw"])
    )
    if manner == "damaged" and raw:
        data = bytearray(raw)
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        raw = bytes(data)
    if manner == "cut":
        raw = raw[: draw(st.integers(0, len(raw)))]
    other = {
        "method": draw(st.sampled_from(["GET", "PUT", "OPTIONS", "HEAD", "POST", "BREW"])),
        "path": draw(st.sampled_from(PATHS)),
        "headers": draw(
            st.sampled_from(
                [
                    {}, {"Host": "evil.example"}, {"Origin": "https://evil.example"},
                    {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
                    {"Content-Type": "text/plain"}, {"Authorization": "Bearer x"},
                    {"Transfer-Encoding": "gzip"},
                    {"Content-Length": "-5"}, {"Content-Length": "99999999999999999999"},
                ]
            )
        ),
    }  # fmt: skip
    return {
        "manner": manner,
        "path": path,
        "raw": raw,
        "junk": draw(st.binary(max_size=60)),
        **({"other": other} if manner == "other" else {}),
    }


class Attacker:
    """Sends requests, and holds that each gets a status."""

    def __init__(self, port: int, rng: random.Random) -> None:
        self.port, self.rng, self.seen = port, rng, Counter[str]()

    def __call__(self, attack: dict[str, Any]) -> None:
        """Send one."""
        manner = attack["manner"]
        status = getattr(self, f"_{manner}", self._whole)(attack)
        self.seen[f"{manner} {status}"] += 1
        if manner in ("whole", "damaged", "cut", "slow"):
            assert status in (200, 400, 404, 413, 503), (status, attack)
        elif manner == "other":
            assert 200 <= status < 600, (status, attack)

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 60)

    def _head(self, path: str, length: int) -> bytes:
        lines = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n"
        return f"{lines}Connection: close\r\n\r\n".encode()

    def _whole(self, attack: dict[str, Any]) -> int:
        with self._connect() as s:
            s.sendall(self._head(attack["path"], len(attack["raw"])) + attack["raw"])
            return self._status(s)

    def _slow(self, attack: dict[str, Any]) -> int:
        with self._connect() as s:
            s.sendall(self._head(attack["path"], len(attack["raw"])))
            for i in range(0, len(attack["raw"]), max(1, len(attack["raw"]) // 3)):
                s.sendall(attack["raw"][i : i + max(1, len(attack["raw"]) // 3)])
                time.sleep(0.01)
            return self._status(s)

    def _left(self, attack: dict[str, Any]) -> int:
        """The client goes before its body is sent, before it is answered, or in the midst."""
        with self._connect() as s:
            s.sendall(self._head(attack["path"], len(attack["raw"])))
            if self.rng.random() < 0.3:
                return 0
            s.sendall(attack["raw"])
            time.sleep(self.rng.choice([0, 0.005, 0.02]))
            if self.rng.random() < 0.5:
                with contextlib.suppress(OSError):
                    s.recv(10)
            return 0

    def _raw(self, attack: dict[str, Any]) -> int:
        with self._connect() as s, contextlib.suppress(OSError):
            s.sendall(attack["junk"] + b"\r\n\r\n")
            s.shutdown(socket.SHUT_WR)
            while s.recv(65536):
                pass
        return 0

    def _other(self, attack: dict[str, Any]) -> int:
        given = attack["other"]
        headers = {"Host": "127.0.0.1", "Connection": "close", **given["headers"]}
        length = headers.pop("Content-Length", str(len(attack["raw"])))
        lines = [f"{given['method']} {given['path']} HTTP/1.1", f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        with self._connect() as s:
            s.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + attack["raw"])
            return self._status(s)

    def _status(self, s: socket.socket) -> int:
        answer = b""
        while part := s.recv(65536):
            answer += part
        assert answer.startswith(b"HTTP/1.1 "), answer[:200]
        return int(answer.split(b" ", 2)[1])


def campaign(folder: str, count: int, seed_: int, clients: int = 4) -> Counter[str]:
    """Send requests of every kind beside clients with known answers.

    Returns:
        What happened, counted.
    """
    options = [*TIERS, "--warm", "4MB", "--cold", "16MB", "--max-answer-tokens", "6"]
    options += ["--max-tokens", "4", "--log-level", "INFO", "--decode-concurrency", "8"]
    prompts = [
        "".join(chr(97 + (i * i * (k + 3)) % 26) for i in range(60 + 90 * k)) for k in range(4)
    ]
    with Served(folder, *options) as server:
        right = {prompt: server.ask(prompt, 6)["choices"][0]["text"] for prompt in prompts}
        attacker, problems, ended = (
            Attacker(server.port, random.Random(seed_)),
            [],
            threading.Event(),
        )
        answered = Counter[str]()

        def client(number: int) -> None:
            rng = random.Random(number)
            while not ended.is_set():
                prompt = rng.choice(prompts)
                try:
                    if server.ask(prompt, 6)["choices"][0]["text"] != right[prompt]:
                        problems.append(f"another answer to {prompt[:20]!r}")
                except Exception as e:
                    problems.append(f"{type(e).__name__}: {e}")
                answered["known"] += 1
                time.sleep(0.05)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
        for thread in threads:
            thread.start()
        process, memory = psutil.Process(server.process.pid), list[int]()

        @seed(seed_)
        @settings(
            max_examples=count, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(attacks())
        def run(attack: dict[str, Any]) -> None:
            assert not problems, problems
            attacker(attack)
            if sum(attacker.seen.values()) % max(1, count // 40) == 0:
                memory.append(process.memory_info().rss)

        try:
            run()
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        assert not problems, problems
        assert server.send(None, "/health", "GET")[0] == 200
        code, took = server.stop()
        assert code == 143 and took < 10, (code, took)
        text = server.text()
        assert "Traceback" not in text, text[text.index("Traceback") :][:3000]
        half = memory[len(memory) // 2]
        assert memory[-1] < half * 1.1 + (16 << 20), memory
    seen = attacker.seen + answered
    print(f"memory: {[m >> 20 for m in memory]} MB")
    return seen


if __name__ == "__main__":
    main(campaign, __doc__, 20000)

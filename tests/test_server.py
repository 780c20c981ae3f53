"""mlx_lm.server with a paged cache, and `pagedkv serve`."""

from __future__ import annotations

import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import pagedkv
from pagedkv import PagedLayerCache
from pagedkv.cli import main
from tests.models import byte_model
from tests.server_campaign import CONFIG, Answer, Request, Running, campaign, running

ROOT = Path(__file__).parent.parent
SCARCE = pagedkv.TierConfig(**{**CONFIG.to_dict(), "cold": 0})  # four pages a layer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return byte_model(tmp_path_factory.mktemp("model"), larger=True)


def text(n: int, kind: int = 0) -> str:
    """A prompt of so many bytes, and so many tokens."""
    return "".join(chr(97 + (i * i * (kind + 3) + kind) % 26) for i in range(n))


def at_once(server: Running, *requests: Request) -> list[Answer]:
    answers: dict[int, Answer] = {}

    def ask(i: int) -> None:
        answers[i] = server.ask(requests[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[i] for i in range(len(requests))]


def until(come: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def test_many_clients_get_what_each_would_get_alone_and_nothing_is_left(folder: str) -> None:
    seen = campaign(folder, 30, seed=3)
    assert seen["requests"] == 30
    for kind in ("seeded", "streamed", "left", "reused", "sealed", "demoted", "kept"):
        assert seen[kind] > 0, seen


def test_a_prompt_that_begins_like_an_earlier_one_shares_its_pages(folder: str) -> None:
    with running(folder) as server:
        first = server.ask(Request(text(700), 2))
        server.wait_idle()
        pager = server.pager
        counters, pages = pager.counters, [set(layer.pages) for layer in pager.layer_pagers]
        before = (counters.sealed, counters.demoted, counters.promoted)
        assert before[0] > 0
        again = server.ask(Request(text(700), 2))
        longer = server.ask(Request(text(700) + "and more", 1))
        assert (first.cached, again.cached, longer.cached) == (0, 699, 700)
        assert first.text == again.text
        server.wait_idle()
        assert (counters.sealed, counters.demoted, counters.promoted) == before
        assert [set(layer.pages) for layer in pager.layer_pagers] == pages
        assert len(server.kept) >= 2  # several sequences over the same pages
        server.check()


def test_the_next_server_finds_the_prompts_of_the_one_before(folder: str, tmp_path: Path) -> None:
    config = pagedkv.TierConfig(**{**CONFIG.to_dict(), "cold": "8MB", "cold_dir": str(tmp_path)})
    with running(folder, config) as server:
        first = [server.ask(Request(text(n, n), 2)) for n in (700, 1000)]
        assert [answer.cached for answer in first] == [0, 0]
    for _ in range(2):  # a server keeps what those before it left
        with running(folder, config) as server:
            longer = server.ask(Request(text(700, 700) + text(200), 3))
            other = server.ask(Request(text(1000, 1000), 2))
            alone = server.ask(Request(text(300, 5), 2))
            assert longer.cached >= 256 and other.cached >= 512 and alone.cached == 0
            assert other.text == first[1].text
            server.wait_idle()
            server.check()
            store = server.pager.cold.sequences
            assert store is not None and all(s.spare for s in store.checkpoints.stored())
    with running(folder, config, "--prompt-cache-size", "1") as server:
        server.ask(Request(text(400), 1))
    with running(folder, config) as server:
        store = server.pager.cold.sequences
        assert store is not None and len(store.checkpoints.stored()) == 1


def test_a_prompt_without_room_gets_an_error_and_the_others_their_answers(folder: str) -> None:
    with running(folder, SCARCE) as server:
        small = [Request(text(100, i), 5) for i in range(2)]
        alone = [server.ask(request).text for request in small]
        for stream in (False, True):
            large, *others = at_once(server, Request(text(1700), 5, stream), *small)
            assert large.error is not None
            assert large.error["type"] == "OutOfPagesError"
            assert "raise the warm or cold budget" in large.error["message"]
            assert large.status == (200 if stream else 503)  # a stream has begun by then
            assert [answer.text for answer in others] == alone
        # The batch has forgotten it: a request that must wait for the batch's end gets its turn.
        seeded = Request(small[0].prompt, 5, seeded=True)
        assert server.ask(seeded, seconds=20).text == alone[0]
        assert server.generator.is_healthy
        server.wait_idle()
        server.check()


def test_prompts_kept_for_reuse_go_first(folder: str) -> None:
    with running(folder, SCARCE) as server:
        for kind in range(6):  # two pages each, and there are four
            assert server.ask(Request(text(640, kind), 2)).status == 200
        server.wait_idle()
        assert 0 < len(server.kept) < 4
        assert server.within_budgets()
        server.check()


def test_prompts_that_do_not_fit_together_wait_for_each_other(folder: str) -> None:
    with running(folder, SCARCE) as server:
        requests = [Request(text(1100, kind), 3) for kind in range(3)]  # four pages each
        alone = [server.ask(request).text for request in requests]
        answers = at_once(server, *requests)
        assert [answer.status for answer in answers] == [200] * 3
        assert [answer.text for answer in answers] == alone
        server.wait_idle()
        server.check()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_runs_out_of_pages_ends_with_an_error(folder: str, stream: bool) -> None:
    with running(folder, SCARCE) as server:
        patient = Request(text(200), 60)
        alone = server.ask(patient).text
        # Its prompt fits, and what follows does not.
        greedy, other = at_once(server, Request(text(1330, 1), 200, stream), patient)
        assert greedy.error is not None and greedy.error["type"] == "OutOfPagesError"
        assert "out of pages at 1,347 tokens (+1)" in greedy.error["message"]
        assert bool(greedy.text) == stream
        assert other.text == alone
        assert server.ask(patient).text == alone
        server.wait_idle()
        server.check()


def test_a_damaged_page_is_an_error_and_what_held_it_is_dropped(folder: str) -> None:
    with running(folder) as server:
        request = Request(text(2600), 4)
        alone = server.ask(request).text
        store = server.pager.cold
        store.flush()
        server.pager.reader.close()
        for file in store.directory.glob("layer-*"):
            file.write_bytes(bytes(file.stat().st_size))
        answer = server.ask(request)
        assert answer.status == 500
        assert answer.error is not None and answer.error["type"] == "CorruptPageError"
        server.wait_idle()
        assert len(server.kept) == 0
        assert server.ask(request) == Answer(200, alone, 0)


def test_a_page_that_cannot_be_read_for_one_answer_ends_that_one(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = PagedLayerCache.append
    answers: list[Answer] = []
    under_way, unanswered = threading.Event(), []

    def failing(self: PagedLayerCache, keys: mx.array, values: mx.array) -> Any:
        if self.layer == 1 and keys.shape[2] == 1:
            if self.offset == 120:
                under_way.set()
                until(lambda: not server.generator.requests.empty())  # the next one has come
            if self.offset == 705:
                unanswered.append(not answers)
                raise pagedkv.CorruptPageError(errno.EIO, "damaged on purpose")
        return append(self, keys, values)

    with running(folder) as server:
        other = Request(text(100, 1), 300)
        alone = server.ask(other).text
        monkeypatch.setattr(PagedLayerCache, "append", failing)
        thread = threading.Thread(target=lambda: answers.append(server.ask(other)))
        thread.start()
        assert under_way.wait(60)
        answer = server.ask(Request(text(700), 20))
        thread.join()
        assert unanswered == [True]
        assert answer.status == 500 and answer.error is not None
        assert answer.error["message"] == "damaged on purpose"
        assert answers[0].text == alone
        server.wait_idle()
        server.check()


def test_another_model_takes_the_place_of_the_first(folder: str, tmp_path: Path) -> None:
    other = byte_model(tmp_path)
    with running(folder) as server:
        server.ask(Request(text(700), 2))
        first = server.pager
        body = json.dumps({"prompt": text(700), "max_tokens": 2, "model": other})
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/v1/completions", body)
        assert connection.getresponse().status == 200
        connection.close()
        assert server.pager is not first
        assert not first.layer_pagers  # closed
        assert len(server.kept) == 1
        server.wait_idle()
        server.check()


# The command


def lines(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main.main(["serve", *argv])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, (out, err)
    return code, err


def test_command_lines_that_cannot_work(
    capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path
) -> None:
    assert lines(capsys) == (
        2, "pagedkv serve: error: the following arguments are required: --model "
        "(see pagedkv serve --help)\n",
    )  # fmt: skip
    code, err = lines(capsys, "--model", folder, "--prot", "80")
    assert code == 2
    assert err == (
        "pagedkv serve: error: unrecognized arguments: --prot 80 (see pagedkv serve --help)\n"
    )
    code, err = lines(capsys, "--model", folder, "--port", "eighty")
    assert (code, "argument --port: invalid int value: 'eighty'" in err) == (2, True)
    code, err = lines(capsys, "--model", str(tmp_path / "none"))
    assert (code, "there is no model folder" in err) == (1, True)
    code, err = lines(capsys, "--model", folder, "--warm", "1KB")
    assert (code, "give at least" in err) == (1, True)
    (tmp_path / "config.json").write_text("{}")
    code, err = lines(capsys, "--model", str(tmp_path))
    assert (code, "error: cannot load the model" in err) == (1, True)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["serve", "--help"]) == 0
    out = capsys.readouterr().out
    for part in ("--warm", "--kv-bits", "--max-tokens", "/v1/completions"):
        assert part in out


def test_serve_answers_until_it_is_told_to_stop(folder: str) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "pagedkv", "serve", "--model", folder, "--port", str(port)]
    command += ["--hot-tokens", "64", "--kv-bits", "8", "--page-tokens", "256", "--warm", "4MB"]
    command += ["--max-tokens", "7", "--log-level", "WARNING"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if "serving" in line:
                break
        assert f"serving {folder} at http://127.0.0.1:{port}/v1" in said[-1], said
        answers = [_chat(port, folder) for _ in range(2)]
    finally:
        # Ctrl-C does the same, but a shell has its background jobs ignore it.
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=120)
    assert code == 128 + signal.SIGTERM
    for answer in answers:
        usage = answer["usage"]
        assert usage["completion_tokens"] <= 7
        assert answer["choices"][0]["message"]["role"] == "assistant"
    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
    assert cached[0] == 0 and cached[1] == answers[1]["usage"]["prompt_tokens"] - 1


def _chat(port: int, folder: str) -> dict[str, Any]:
    message = {"role": "user", "content": text(400)}
    body = json.dumps({"model": folder, "messages": [message]})
    for _ in range(50):  # it says that it serves just before it listens
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
        try:
            connection.request("POST", "/v1/chat/completions", body)
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer
        except ConnectionRefusedError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise AssertionError("it does not listen")

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
import mlx_lm.models.cache
import mlx_lm.server
import mlx_lm.utils
import pytest
from mlx_lm.generate import BatchGenerator, GenerationBatch

import pagedkv
from pagedkv import PagedLayerCache
from pagedkv.cli import main, serve
from pagedkv.integrations.server.batch_generator import PagedBatchGenerator
from pagedkv.integrations.server.prompt_cache import KeptPrompts
from tests.models import byte_model
from tests.served import send
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
    with running(folder, others=True) as server:
        server.ask(Request(text(700), 2))
        first = server.pager
        assert post(server, {"prompt": text(700), "max_tokens": 2, "model": other})[0] == 200
        assert server.pager is not first
        assert not first.layer_pagers  # closed
        assert len(server.kept) == 1
        server.wait_idle()
        server.check()


def post(server: Running, body: dict[str, Any], path: str = "/v1/completions") -> tuple[int, Any]:
    """Status and JSON of one request, whatever is in it."""
    status, answer, _ = send(server.port, body, path)
    return status, json.loads(answer)


BAD: dict[str, dict[str, Any]] = {
    "no text": {"prompt": ""},
    "two texts": {"prompt": ["one", "two"]},
    "token ids": {"prompt": [5, 6, 7]},
    "no text, alone": {"prompt": "", "seed": 1},
    "ids, alone": {"prompt": [5, 6, 7], "seed": 1},
    "a number to stop at": {"stop": 3},
    "nothing to stop at": {"stop": [None]},
    "an empty text to stop at": {"stop": [""]},
    "more than there are": {"top_k": 100_000},
    "no float": {"temperature": 10**400},
    "no index": {"logit_bias": {str(2**80): 1.0}},
    "no such token": {"logit_bias": {"1000000": 1.0}},
    "below all tokens": {"logit_bias": {"-1": 1.0}},
    "too far back": {"repetition_context_size": 10**30},
    "no name": {"draft_model": ["a"]},
    "two answers": {"n": 2},
    "a form": {"response_format": {"type": "json_object"}},
    "nobody knows it": {"mirostat": 1},
}
"""Each has its field first, which the answer names."""

BAD_CHATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": []},
    "messages[0].role": {"messages": [{"content": "no role"}]},
    "messages[1].content[0].text": {
        "messages": [{"role": "user"}, {"role": "user", "content": [{"type": "text"}]}]
    },
    "messages[0].content[0]": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}],
            }
        ]
    },
    "messages[0].tool_calls": {"messages": [{"role": "assistant", "tool_calls": 5}]},
    "chat_template_kwargs": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    "tool_choice": {"tool_choice": "required"},
    "tools[0]": {"tools": [3]},
}


def test_a_request_that_cannot_be_answered_ends_alone(folder: str) -> None:
    with running(folder) as server:
        usual = Request(text(150), 6)
        alone = server.ask(usual).text
        for name, bad in BAD.items():
            status, answer = post(server, {"prompt": "hello", "max_tokens": 3, **bad})
            assert (status, answer["error"]["type"]) == (400, "RequestError"), (name, answer)
            assert answer["error"]["param"] == next(iter(bad)), (name, answer)
            assert len(answer["error"]["message"]) > 20
        for field, bad in BAD_CHATS.items():
            chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **bad}
            status, answer = post(server, chat, "/v1/chat/completions")
            assert (status, answer["error"]["param"]) == (400, field), answer
        # One beside it, in the same batch, gets its answer.
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(server.ask(Request(text(150), 60))))
        thread.start()
        until(lambda: bool(len(server.pager.users) > server.kept_layers()))
        status, answer = post(server, {"prompt": "", "stream": True})
        assert (status, answer["error"]["type"]) == (400, "RequestError")  # no stream has begun
        assert post(server, {"prompt": "x", **BAD["more than there are"]})[0] == 400
        thread.join()
        assert answers[0].status == 200 and answers[0].text.startswith(alone)
        assert server.ask(usual).text == alone
        server.wait_idle()
        server.check()
        assert server.generator.is_healthy


@pytest.mark.parametrize("where", ["insert", "step", "loop"])
def test_an_error_that_is_not_ours_ends_requests_and_not_the_server(
    folder: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = threading.Event()

    def fail(*args: Any, **options: Any) -> Any:
        if failing.is_set():
            raise ValueError("broken on purpose")
        return before(*args, **options)

    owner, name = {
        "insert": (BatchGenerator, "insert_segments"),
        "step": (GenerationBatch, "next"),
        "loop": (mlx_lm.server, "_format_top_logprobs"),
    }[where]
    before = getattr(owner, name)
    with running(folder) as server:
        usual = Request(text(700), 4)
        alone = server.ask(usual).text
        monkeypatch.setattr(owner, name, fail)
        failing.set()
        answers = at_once(server, usual, Request(text(100, 1), 4))
        for answer in answers:
            assert answer.status == 500 and answer.error is not None
            assert answer.error["type"] == "GenerationError"
            assert "ValueError: broken on purpose" in answer.error["message"]
        failing.clear()
        again = server.ask(usual)
        assert again == Answer(200, alone, 699)  # what was kept is there
        server.wait_idle()
        server.check()


def test_a_prompt_that_is_all_of_a_sequence_that_was_kept(folder: str) -> None:
    with running(folder) as server:
        whole = text(300)
        assert post(server, {"prompt": whole, "max_tokens": 3})[0] == 200
        server.wait_idle()
        tokens = next(server.kept._latest_first())[1]
        cache, rest = server.kept.fetch_nearest_cache(
            server.generator.model_provider.model_key, tokens
        )
        assert rest == tokens[-1:] and cache[0].offset == len(tokens) - 1
        for layer in cache:
            layer.close()


def test_a_request_for_what_is_not_there_disturbs_nobody(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def hub(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name != "some/model":
            raise FileNotFoundError(name)
        return folder

    monkeypatch.setattr(mlx_lm.utils, "snapshot_download", hub)
    (tmp_path / "empty").mkdir()
    with running(folder, others=True) as server:
        server.ask(Request(text(700), 2))
        server.wait_idle()
        model = server.generator.model_provider.model
        names: list[dict[str, Any]] = [
            {"model": "gpt-4"},
            {"model": "owner/none"},
            {"model": str(tmp_path / "empty")},
            {"model": "\0"},
            {"draft_model": "none"},
            {"adapters": str(tmp_path)},
        ]
        for body in names:
            status, answer = post(server, {"prompt": "x", "max_tokens": 1, **body})
            assert (status, answer["error"]["type"]) == (404, "UnknownModelError"), answer
            assert answer["error"]["message"].startswith(f"{next(iter(body))}: there is no ")
        assert asked == [("owner/none", ["config.json"])]
        assert server.generator.model_provider.model is model
        assert server.ask(Request(text(700), 2)).cached == 699
        server.generator.model_provider.require_known(
            mlx_lm.server.ModelDescription("some/model", "default_model", None)
        )


def test_processes_reuse_what_all_of_them_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, others = KeptPrompts(), []
    kept.insert_cache("m", [1, 2, 3], [mlx_lm.models.cache.KVCache()])

    class Group:
        def size(self) -> int:
            return 2

    monkeypatch.setattr(mx.distributed, "init", Group)
    monkeypatch.setattr(
        mx.distributed, "all_gather", lambda mine: mx.concatenate([mine, mx.array(others)])
    )
    for there, found in ((1, True), (4, False)):
        others[:] = [there]
        cache, rest = kept.fetch_nearest_cache("m", [1, 2, 3, 4])
        assert (cache is not None, rest) == (found, [4] if found else [1, 2, 3, 4])


def test_processes_refuse_what_one_of_them_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_the_other(mine: mx.array) -> mx.array:
        return mx.maximum(mine, mx.array([1, 1, 0]))

    monkeypatch.setattr(mx.distributed, "all_max", with_the_other)
    batch = PagedBatchGenerator.__new__(PagedBatchGenerator)
    batch._old_wired_limit = None
    assert batch._short_elsewhere([7, 8, 9], [7]) == [8]
    assert batch._short_elsewhere([7, 8, 9], [7, 8]) == []


# The command


def lines(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "_leave", lambda code: code)  # this process goes on
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

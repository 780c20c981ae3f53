"""Who may ask a server, for what, and what others notice of it."""

from __future__ import annotations

import dataclasses
import http.client
import json
import logging
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import pagedkv
from pagedkv.cli import main, serve
from pagedkv.integrations.server.access import Access, Limits
from pagedkv.integrations.server.errors import BusyError, ForeignError, RequestError
from pagedkv.integrations.server.schema import WITHOUT_EFFECT, read
from tests import served
from tests.models import byte_model
from tests.server_campaign import CONFIG, Request, Running, running

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return byte_model(tmp_path_factory.mktemp("model"), larger=True)


def send(
    server: Running,
    body: Any = None,
    path: str = "/v1/completions",
    method: str = "POST",
    **headers: str,
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON and headers of an answer; underscores in names of headers are dashes."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    status, text, fields = served.send(server.port, body, path, method, given)
    return status, json.loads(text) if text[:1] == b"{" else text, fields


SHORT = {"prompt": "hello", "max_tokens": 1}


def test_pages_of_other_sites_and_other_names_are_refused(folder: str) -> None:
    with running(folder) as server:
        for headers in (
            {"Host": "evil.example"},
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": f"http://localhost:{server.port}"},  # it has no pages of its own
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site"},
        ):
            for path, method in (("/v1/completions", "POST"), ("/v1/models", "GET")):
                body = SHORT if method == "POST" else None
                status, answer, fields = send(server, body, path, method, **headers)
                assert (status, answer["error"]["type"]) == (403, "ForeignError"), headers
                assert not any(name.startswith("access-control") for name in fields)
        for host in ("localhost", f"LOCALHOST:{server.port}", "127.0.0.1", "[::1]:80"):
            assert send(server, SHORT, Host=host)[0] == 200, host
        preflight = send(server, None, method="OPTIONS", Origin="https://evil.example")
        assert preflight[0] == 403


def test_sites_and_names_that_are_allowed(folder: str) -> None:
    site = "http://localhost:3000"
    access = Access(hosts=("Model.example",), origins=(site,))
    with running(folder, access=access) as server:
        status, _, fields = send(server, SHORT, Host="model.example:80", Origin=site)
        assert (status, fields["access-control-allow-origin"]) == (200, site)
        status, _, fields = send(
            server, None, method="OPTIONS", Origin=site, Access_Control_Request_Method="POST",
            Access_Control_Request_Headers="content-type,authorization",
        )  # fmt: skip
        assert status == 200 and "POST" in fields["access-control-allow-methods"]
        assert "authorization" in fields["access-control-allow-headers"]
        assert send(server, SHORT, Origin="http://localhost:3001")[0] == 403


def test_keys(folder: str) -> None:
    with running(folder, access=Access(keys=("alice's", "bob's"))) as server:
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Bearer "}):
            status, answer, fields = send(server, SHORT, **headers)
            assert (status, answer["error"]["type"]) == (401, "AccessError")
            assert fields["www-authenticate"] == "Bearer"
        assert send(server, None, "/health", "GET")[0] == 200
        assert send(server, None, "/v1/models", "GET")[0] == 401
        found = []
        for key in ("alice's", "bob's", "alice's"):
            status, answer, _ = send(
                server, {"prompt": "p" * 600, "max_tokens": 1}, Authorization=f"Bearer {key}"
            )
            assert status == 200
            found.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            server.wait_idle()
        assert found == [0, 0, 599]


@pytest.mark.parametrize("seeded", [False, True])
def test_salts_keep_clients_apart_in_memory_and_on_disk(
    folder: str, tmp_path: Path, seeded: bool
) -> None:
    config = pagedkv.TierConfig(**{**CONFIG.to_dict(), "cold_dir": str(tmp_path)})
    prompt = "".join(chr(97 + (i * i * 3) % 26) for i in range(700))

    def cached(server: Running, salt: str | None) -> int:
        body = {"prompt": prompt, "max_tokens": 1, **({"seed": 1} if seeded else {})}
        status, answer, _ = send(server, {**body, **({"cache_salt": salt} if salt else {})})
        assert status == 200
        server.wait_idle()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    with running(folder, config) as server:
        found = [cached(server, salt) for salt in ("alice", "mallory", None, "alice")]
        assert found == [0, 0, 0, 699]
        server.kept.trim_to(n_sequences=1)  # the one that was used last
    with running(folder, config) as server:
        assert [cached(server, salt) for salt in ("mallory", None)] == [0, 0]
        assert cached(server, "alice") >= 256


def test_the_model_that_is_served_and_no_other(folder: str, tmp_path: Path) -> None:
    other = byte_model(tmp_path)
    with running(folder, name="demo") as server:
        model = server.generator.model_provider.model
        for name in (None, "demo", "default_model", folder, Path(folder).name):
            status, answer, _ = send(server, {**SHORT, **({"model": name} if name else {})})
            assert (status, answer["model"]) == (200, name or "demo")
        for field, name in (("model", "gpt-4"), ("model", other), ("adapters", other)):
            status, answer, _ = send(server, {**SHORT, field: name})
            assert (status, answer["error"]["type"]) == (404, "UnknownModelError")
        assert server.generator.model_provider.model is model
        status, listed, _ = send(server, None, "/v1/models", "GET")
        assert status == 200 and [m["id"] for m in listed["data"]] == ["demo"]
        assert send(server, None, "/v1/models/demo", "GET")[1] == listed["data"][0]
        assert send(server, None, "/v1/models/gpt-4", "GET")[0] == 404
    with running(folder, any_name=True) as server:
        status, answer, _ = send(server, {**SHORT, "model": "gpt-4"})
        assert (status, answer["model"]) == (200, "gpt-4")


def test_an_adapter_is_not_left_out_for_the_default_models_name(folder: str) -> None:
    with running(folder, others=True, name="demo") as server:
        own = server.generator.model_provider.own
        assert own({"model": "demo"}) == own({"model": folder}) == {"model": "default_model"}
        assert own({"adapters": "a"}) == {"adapters": "a", "model": folder}
        assert own({"model": "demo", "adapters": None}) == {"model": "default_model"}


def test_a_model_without_room_is_an_error_each_time(folder: str, tmp_path: Path) -> None:
    other = byte_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 9}))
    with running(folder, others=True) as server:
        alone = server.ask(Request("hello", 3)).text
        provider = server.generator.model_provider
        small = dataclasses.replace(CONFIG, warm="1KB")
        before, provider._config = provider._config, small
        for _ in range(2):
            status, answer, _ = send(server, {**SHORT, "model": other})
            assert (status, answer["error"]["type"]) == (500, "ConfigError"), answer
        provider._config = before
        assert server.ask(Request("hello", 3)).text == alone


def test_fifty_at_once_wait_for_their_turn(folder: str) -> None:
    """Four are answered at once, and there is room for three."""
    config = dataclasses.replace(CONFIG, cold=0, warm="800KB")
    prompts = ["".join(chr(97 + (i * i * (k + 3)) % 26) for i in range(400 + k)) for k in range(50)]
    with running(folder, config, "--decode-concurrency", "4") as server:
        alone = [server.ask(Request(prompt, 2)).text for prompt in prompts[:5]]
        answers: dict[int, Any] = {}

        def ask(i: int) -> None:
            answers[i] = send(server, {"prompt": prompts[i], "max_tokens": 2})

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seen = Counter(status for status, _, _ in answers.values())
        assert seen[200] == 50, seen
        assert [answers[i][1]["choices"][0]["text"] for i in range(5)] == alone
        server.wait_idle()
        server.check()


def test_more_than_may_wait_are_told_when_to_come_again(folder: str) -> None:
    with running(folder, limits=Limits(requests=2)) as server:
        going = threading.Event()
        hold, release = server.generator._next_request, threading.Event()

        def held(*args: Any, **options: Any) -> Any:
            going.set()
            release.wait(60)
            return hold(*args, **options)

        server.generator._next_request = held  # type: ignore[method-assign]
        assert going.wait(60)
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(send(server, SHORT)[0]))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        status, answer, fields = send(server, SHORT)
        release.set()
        assert (status, answer["error"]["type"]) == (503, BusyError.__name__)
        assert int(fields["retry-after"]) > 0
        for thread in threads:
            thread.join()
        assert statuses == [200, 200]
        assert send(server, SHORT)[0] == 200


def test_a_client_that_goes_makes_room(folder: str) -> None:
    long = {"prompt": "x" * 500, "max_tokens": 4000}
    with running(folder, limits=Limits(requests=1)) as server:
        for more in ({}, {"stream": True}, {"seed": 1}, {"seed": 1, "stream": True}):
            with socket.create_connection(("127.0.0.1", server.port)) as s:
                body = json.dumps({**long, **more}).encode()
                head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
                s.sendall(head.replace(": x", ": 127.0.0.1").encode() + b"\r\n\r\n" + body)
                time.sleep(0.3)
            end = time.monotonic() + 20
            while send(server, SHORT)[0] == 503:
                assert time.monotonic() < end, more
                time.sleep(0.1)
            server.wait_idle(20)
            assert not server.generator.ledger.all()


def test_limits(folder: str) -> None:
    limits = Limits(body=2000, prompt=300, answer=5)
    with running(folder, limits=limits) as server:
        assert send(server, {"prompt": "x" * 3000})[0] == 413
        status, answer, _ = send(server, {"prompt": "x" * 400, "max_tokens": 1})
        assert status == 400 and "takes 300 at most" in answer["error"]["message"]
        status, answer, _ = send(server, {"prompt": "x", "max_tokens": 6})
        assert (status, answer["error"]["param"]) == (400, "max_tokens")
        # In pieces, without saying how long.
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        pieces = iter([b'{"prompt": "x",', b' "max_tokens": 1}'])
        connection.request("POST", "/v1/completions", pieces, encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        assert connection.getresponse().status == 200
        connection.close()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/v1/completions", iter([b"x" * 1500] * 3), encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        assert connection.getresponse().status == 413
        connection.close()


def test_bodies_that_are_none_are_told_and_not_logged(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "the patient's name is"
    caplog.set_level(logging.INFO)
    with running(folder) as server:
        for body in (
            b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"prompt": "' + secret.encode(),
            b'{"prompt": "' + secret.encode() + b'", "max_tokens": NaN}', b"[" * 100_000,
            json.dumps({"prompt": secret, "temperature": secret}).encode(),
            json.dumps({"prompt": secret, "stop": {secret: 1}}).encode(),
        ):  # fmt: skip
            status, answer, _ = send(server, body)
            assert (status, answer["error"]["type"]) == (400, "RequestError"), body
            assert secret not in json.dumps(answer)
        assert send(server, {"prompt": secret, "max_tokens": 2})[0] == 200
        for path in ("/", "/v1/embeddings", "/v1/completions/x"):
            assert send(server, SHORT, path)[0] == 404
        assert send(server, None, "/v1/completions", "GET")[0] == 405
        assert send(server, SHORT, "/health", "PUT")[0] == 405
    assert secret not in caplog.text and "Traceback" not in caplog.text


def test_null_is_as_if_it_were_not_there_and_some_fields_do_nothing() -> None:
    body = {"prompt": "x", "temperature": None, "stop": None, "n": 1, "stream_options": {}}
    body |= dict.fromkeys(WITHOUT_EFFECT, "anything")
    asked = read("/v1/completions", json.dumps(body).encode(), Limits())
    assert asked.body == {"prompt": "x", "stream_options": {"include_usage": False}}
    tools = {"messages": [{"role": "user", "content": None}], "tools": [{}], "tool_choice": "none"}
    assert "tools" not in read(CHAT, json.dumps(tools).encode(), Limits()).body
    for given, meant in ((1e-9, 0.0), (0, 0.0), (1, 1.0)):
        raw = json.dumps({"prompt": "x", "temperature": given}).encode()
        assert read("/v1/completions", raw, Limits()).body["temperature"] == meant
    raw = json.dumps({"prompt": "x", "mirostat": 2}).encode()
    with pytest.raises(RequestError, match="mirostat: there is no such field"):
        read("/v1/completions", raw, Limits())
    assert read("/v1/completions", raw, Limits(unknown=True)).body == {"prompt": "x"}
    raw = json.dumps({"prompt": "x", "seed": -1}).encode()
    assert read("/v1/completions", raw, Limits()).body["seed"] == 2**64 - 1


def test_a_thread_that_stands_still_is_told_of(folder: str) -> None:
    with running(folder) as server:
        assert send(server, None, "/health", "GET")[:2] == (200, {"status": "ok"})
        server.generator._next_request = lambda *args, **options: None  # type: ignore[method-assign]
        time.sleep(0.3)
        server.generator.ledger.beat -= 1000
        status, answer, _ = send(server, None, "/health", "GET")
        assert (status, answer["status"]) == (503, "stands still")


def test_a_key_may_have_any_letter() -> None:
    sent = "Bearer schlüssel".encode().decode("latin-1")  # as headers are read
    assert Access(keys=("schlüssel",)).check({"authorization": sent}, False)


def test_who_asks_is_checked_by_parts() -> None:
    access = Access()
    assert access.check({}, False) == ""  # no browser leaves it out
    for host in (
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "[evil]:80",
        "2130706433.",
    ):
        with pytest.raises(ForeignError):
            access.check({"host": host}, False)
    assert Access(hosts=("*",), origins=("*",)).check({"host": "x", "origin": "y"}, False) == ""


def test_an_address_that_is_taken_is_one_line(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_leave", lambda code: code)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options in (["--port", port], ["--host", "no such host"], ["--port", "99999"]):
            assert main.main(["serve", "--model", folder, *options]) == 1
            out, err = capsys.readouterr()
            assert err.startswith("pagedkv: error: cannot listen at "), err
            assert out == "" and err.count("\n") == 1


def test_keys_come_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    monkeypatch.setenv("PAGEDKV_API_KEY", "three")
    assert serve._keys(str(file)) == ("three", "one", "two")
    monkeypatch.delenv("PAGEDKV_API_KEY")
    assert serve._keys(None) == ()
    file.write_text("\n")
    with pytest.raises(pagedkv.ConfigError, match="there is no key"):
        serve._keys(str(file))

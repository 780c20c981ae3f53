"""One model spread over two processes, as `mlx.launch` starts them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import qwen2

import pagedkv
from pagedkv.integrations.mlx_lm.model_info import pipeline_size, sharing_group
from pagedkv.integrations.mlx_lm.retrieval_layers import echoes, must_look
from pagedkv.integrations.mlx_lm.wrapping import wrapping_of
from tests.models import byte_model, lively, random_tokens

ROOT = Path(__file__).parent.parent
CONFIG = pagedkv.TierConfig(
    hot_tokens=32, sink_tokens=4, kv="K4V4", page_tokens=256, warm="64MB", cold=0
)


def eight_layers() -> Any:
    mx.random.seed(0)
    return lively(
        qwen2.Model(
            qwen2.ModelArgs(
                model_type="qwen2",
                hidden_size=32,
                num_hidden_layers=8,
                intermediate_size=32,
                num_attention_heads=4,
                num_key_value_heads=2,
                rms_norm_eps=1e-5,
                vocab_size=100,
                max_position_embeddings=10_000,
            )
        )
    )


def answers(model: Any, config: pagedkv.TierConfig) -> dict[str, Any]:
    """Tokens with one cache and in a batch, pages that were sealed, and what was said."""
    prompt = random_tokens(700)[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cache = pagedkv.wrap(model, config)
    options: dict[str, Any] = {"max_tokens": 4, "prefill_step_size": 256}
    steps = generate_step(prompt, model, prompt_cache=cache, **options)
    alone = [int(token) for token, _ in steps]
    batch = BatchGenerator(model, **options)
    batch.insert([prompt.tolist(), prompt.tolist()[:300]])
    rows: dict[int, list[int]] = {0: [], 1: []}
    while responses := batch.next_generated():
        for response in responses:
            rows[response.uid].append(response.token)
    wrapping = wrapping_of(model)
    assert wrapping is not None
    found = {
        "alone": alone,
        "rows": list(rows.values()),
        "sealed": wrapping.pager.counters.sealed,
        "layers": wrapping.pager.budget.ladders.others_text,
        "said": [str(w.message) for w in said],
    }
    pagedkv.unwrap(model)
    return found


def take_part() -> None:
    """What each of two processes does; its findings are one line of JSON."""
    group = mx.distributed.init(strict=True)
    found: dict[str, Any] = {}
    for kind in ("pipeline", "tensor"):
        model = eight_layers()
        model.model.pipeline(group) if kind == "pipeline" else model.shard(group)
        found[kind] = {
            "parts": pipeline_size(model),
            "shared": sharing_group(model) is not None,
            **answers(model, CONFIG),
        }
        if kind == "tensor":  # one of them knows, and helps the other
            found[kind]["looks"] = must_look(model, group.rank() == 1)
            found[kind]["echoes"] = list(echoes(model).values())
    print(json.dumps(found), flush=True)
    mx.eval(mx.distributed.all_sum(mx.array(1)))  # nobody leaves before the other
    os._exit(0)


@contextmanager
def ranks(folder: Path, *command: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes that find each other; they are gone at the end."""
    sockets = [socket.socket() for _ in range(2)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for s in sockets:
        s.close()
    (folder / "hosts.json").write_text(json.dumps(hosts))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MLX_HOSTFILE": str(folder / "hosts.json")}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, *command], env={**env, "MLX_RANK": str(rank)}, **pipes)
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_model_in_two_processes_answers_as_in_one(tmp_path: Path) -> None:
    with ranks(tmp_path, "-c", "from tests.test_processes import take_part; take_part()") as both:
        first, second = (json.loads(p.communicate(timeout=120)[0]) for p in both)
    alone = answers(eight_layers(), replace(CONFIG, layer_kv="same", treatment="none"))
    assert alone["sealed"] > 0
    for found in (first["pipeline"], second["pipeline"]):
        assert (found["parts"], found["shared"]) == (2, False)
        assert found["alone"] == alone["alone"] and found["rows"] == alone["rows"]
        assert found["sealed"] == alone["sealed"] / 2  # half of the layers
        # Nobody reads tokens that the other one does not know of.
        assert found["layers"] == "" and len(found["said"]) == 2
        for told, instead in zip(
            found["said"], ("layer_kv='same'", "treatment='none'"), strict=True
        ):
            assert "layers of Model are in 2 processes" in told and instead in told
    first, second = first["tensor"], second["tensor"]
    assert first == second  # also the layers that look things up
    assert (first["parts"], first["shared"], first["looks"], first["said"]) == (1, True, True, [])
    assert first["sealed"] > 0 and len(first["echoes"]) == 8


def test_a_model_of_this_process_alone_asks_nobody() -> None:
    model = eight_layers()
    assert (pipeline_size(model), sharing_group(model)) == (1, None)
    assert (must_look(model, True), must_look(model, False)) == (True, False)
    model.model.pipeline_size = 2
    with pytest.raises(pagedkv.ConfigError, match="are in 2 processes"):
        pagedkv.calibrate(model, [list(range(90)) * 9])


def test_of_two_processes_that_serve_a_model_one_listens(tmp_path: Path) -> None:
    folder = byte_model(tmp_path, larger=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = ["-m", "pagedkv", "serve", "--model", folder, "--port", str(port), "--cold", "0"]
    command += ["--hot-tokens", "64", "--page-tokens", "256", "--log-level", "ERROR"]

    def ask(prompt: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(
            "POST", "/v1/completions", json.dumps({"prompt": prompt, "max_tokens": 4})
        )
        response = connection.getresponse()
        found = response.status, json.loads(response.read())
        connection.close()
        return found

    with ranks(tmp_path, *command) as (first, second):
        assert first.stderr is not None
        said = next(line for line in first.stderr if "serving" in line or "error" in line)
        assert f"127.0.0.1:{port}" in said
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            signal.sigtimedwait([], 0.1)
        once, bad, again = ask("abcdefg" * 100), ask(""), ask("abcdefg" * 100)
        assert (once[0], bad[0], again[0]) == (200, 400, 200)
        assert once[1]["choices"] == again[1]["choices"]
        assert again[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 699
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 128 + signal.SIGTERM
        assert second.wait(60) == 0  # told by the first
        assert second.stderr is not None and "serving" not in second.stderr.read()

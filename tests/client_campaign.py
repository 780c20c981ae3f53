"""What OpenAI's clients, litellm and mlx-lm's own tests get from `serve` and from mlx_lm.server.

The same calls go to both servers, with one model; what they answer must be alike, but for what
docs/serving.md lists.

python -m tests.client_campaign --model DIR [--node FOLDER] [--mlx-lm-tests test_server.py]

Needs `pip install openai litellm requests`; FOLDER is where `npm install openai` was run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.served import Served

MODEL = "default_model"
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Name three colours."}],
    "max_tokens": 12,
    "temperature": 0,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
ASKS_FOR_TOOL = {
    **CHAT,
    "messages": [{"role": "user", "content": "What is the weather in Paris? Use the tool."}],
    "tools": TOOLS,
    "max_tokens": 60,
}


def _said(answer: Any) -> Any:
    """What an answer says, without ids and times."""
    choice = answer.choices[0]
    message = choice.message
    calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]
    return message.content, calls, choice.finish_reason, answer.usage.completion_tokens


def _streamed(events: Iterator[Any]) -> Any:
    text, calls, finish, usage = "", list[Any](), None, None
    for event in events:
        for choice in event.choices:
            text += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                calls.append((call.function.name, call.function.arguments))
            finish = choice.finish_reason or finish
        usage = getattr(event, "usage", None) or usage
    return text, calls, finish, usage and usage.completion_tokens


def python_client(url: str) -> dict[str, Any]:
    """The openai package for Python."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    chat = client.chat.completions.create
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    seen: dict[str, Any] = {
        "models": bool(client.models.list().data),
        "chat": _said(chat(**CHAT)),
        "stream": _streamed(chat(**CHAT, **usage)),
        "tools": _said(chat(**ASKS_FOR_TOOL)),
        "tools, streamed": _streamed(chat(**ASKS_FOR_TOOL, **usage)),
        "seed": [_said(chat(**{**CHAT, "temperature": 0.9, "seed": 3})) for _ in range(2)],
        "stop": _said(chat(**CHAT, stop=["e"])),
    }
    logprobs = chat(**{**CHAT, "max_tokens": 3}, logprobs=True, top_logprobs=2).choices[0].logprobs
    seen["logprobs"] = [
        [(top.token, top.logprob) for top in token.top_logprobs] for token in logprobs.content
    ]
    text = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=9, temperature=0
    )
    seen["completion"] = text.choices[0].text, text.usage and text.usage.prompt_tokens
    events = client.completions.create(model=MODEL, prompt="Once", max_tokens=9, stream=True)
    seen["completion, streamed"] = "".join(event.choices[0].text for event in events)
    try:
        chat(**{**CHAT, "temperature": -1})
    except openai.BadRequestError as e:
        seen["error"] = e.status_code
    return seen


def litellm_client(url: str) -> dict[str, Any]:
    """litellm, which sends what it makes of its own arguments."""
    import litellm

    to: dict[str, Any] = {"api_base": url, "api_key": "none", "model": f"openai/{MODEL}"}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    return {
        "chat": _said(litellm.completion(**{**CHAT, **to})),
        "stream": _streamed(litellm.completion(**{**CHAT, **to}, **usage)),
        "tools": _said(litellm.completion(**{**ASKS_FOR_TOOL, **to})),
        "seed": _said(litellm.completion(**{**CHAT, **to, "temperature": 0.9, "seed": 3})),
    }


def node_client(folder: Path, url: str) -> dict[str, Any]:
    """The openai package for Node."""
    script = folder / "openai_client.mjs"
    shutil.copy(Path(__file__).with_name("openai_client.mjs"), script)
    done = subprocess.run(["node", script, url], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


def mlx_lm_tests(file: Path, port: int) -> dict[str, Any]:
    """The HTTP tests of mlx-lm's own suite, against a server that runs already."""
    sys.modules.setdefault("requests", __import__("requests"))
    module = types.ModuleType("mlx_lm_tests")
    exec(compile(file.read_text(), str(file), "exec"), module.__dict__)
    seen: dict[str, Any] = {}
    for name in ("TestServer", "TestServerWithDraftModel"):
        case = getattr(module, name)
        case.setUpClass = classmethod(lambda cls: setattr(cls, "port", port))
        case.tearDownClass = classmethod(lambda cls: None)
        for test in unittest.defaultTestLoader.loadTestsFromTestCase(case):
            if "state_machine" in test.id():
                continue  # of a function, not of the server
            result = unittest.TestResult()
            test.run(result)
            problems = [text for _, text in result.errors + result.failures]
            seen[test.id()] = problems[0].strip().splitlines()[-1] if problems else "passed"
    return seen


def campaign(
    folder: str,
    clients: dict[str, Callable[[str], dict[str, Any]]],
    tests: Path | None = None,
) -> dict[str, tuple[int, list[str]]]:
    """Make the same calls to both servers.

    Returns:
        For each client how many answers were alike, and what was not.
    """
    found: dict[str, tuple[int, list[str]]] = {}
    answers: list[dict[str, dict[str, Any]]] = []
    ours = ("--any-model-name", "--dtype", "auto", "--hot-tokens", "2048")
    for command, options in ((("mlx_lm", "server"), ()), (("pagedkv", "serve"), ours)):
        with Served(folder, *options, "--log-level", "WARNING", command=command) as server:
            url = f"http://127.0.0.1:{server.port}/v1"
            seen = {name: client(url) for name, client in clients.items()}
            if tests is not None:
                if command[0] == "mlx_lm":  # it loads what is named: the model under that name
                    tests_text = tests.read_text().replace('"chat_model"', '"default_model"')
                    tests = Path(folder, ".mlx_lm_tests.py")
                    tests.write_text(tests_text)
                seen["mlx-lm's tests"] = mlx_lm_tests(tests, server.port)
            answers.append(seen)
    for name, theirs in answers[0].items():
        mine = answers[1][name]
        other = [
            f"{call}: {theirs[call]!r}, here {mine.get(call)!r}"
            for call in theirs
            if not _alike(mine.get(call), theirs[call])
        ]
        found[name] = len(theirs) - len(other), other
    return found


def _alike(mine: Any, theirs: Any) -> bool:
    """Whether two answers say the same: ids aside, and numbers to what 16-bit keys change."""
    if isinstance(theirs, dict):
        keys = [key for key in theirs if not (key == "id" and isinstance(theirs[key], str))]
        return isinstance(mine, dict) and all(_alike(mine.get(k), theirs[k]) for k in keys)
    if isinstance(theirs, (list, tuple)):
        pairs = isinstance(mine, (list, tuple)) and len(mine) == len(theirs)
        return pairs and all(map(_alike, mine, theirs))
    if isinstance(theirs, float):
        return isinstance(mine, float) and abs(mine - theirs) < 0.01
    return bool(mine == theirs)


def main() -> None:
    """The campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--node", type=Path)
    parser.add_argument("--mlx-lm-tests", type=Path)
    args = parser.parse_args()
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network
    # Without such a folder mlx_lm.server does not say which models there are.
    os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp()
    clients: dict[str, Callable[[str], dict[str, Any]]] = {
        "openai (Python)": python_client,
        "litellm": litellm_client,
    }
    if args.node:
        clients["openai (Node)"] = lambda url: node_client(args.node, url)
    found = campaign(args.model, clients, args.mlx_lm_tests)
    for name, (alike, other) in found.items():
        print(f"{name}: {alike} alike, {len(other)} not")
        print("".join(f"  {line}\n" for line in other), end="")
    sys.exit(any(other for _, other in found.values()))


if __name__ == "__main__":
    main()

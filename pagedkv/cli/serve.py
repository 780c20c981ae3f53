"""``pagedkv serve``: an OpenAI-compatible server whose requests share three tiers."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import sys
from typing import Any, NoReturn

from pagedkv.cli.loading import add_model_options, cast_model, explain, locate
from pagedkv.cli.options import add_mlx_lm_options, add_tier_options, tier_config, user_path
from pagedkv.cli.output import Notes
from pagedkv.config.sizes import format_size, parse_size
from pagedkv.errors import ConfigError, PagedKVError
from pagedkv.integrations.releases import unsupported
from pagedkv.integrations.server.access import STOP_SECONDS, Access, Limits

_EPILOG = """\
examples:
  pagedkv serve --model demo
  pagedkv serve --model ./my-model --warm 4GB --cold 64GB --port 8081
  pagedkv serve --model owner/name --hot-tokens 1K --kv K8V4 --max-tokens 2048 --log-level WARNING

The server speaks OpenAI's interface and answers as mlx_lm.server does, whose options are taken and
passed on, such as --host, --port, --max-tokens, --decode-concurrency, --prompt-concurrency,
--prompt-cache-size and --log-level: `mlx_lm.server --help` shows them. Requests are batched, and
prompts that begin alike share pages. When pages run out, prompts kept for reuse go first, new
requests wait, and a request that cannot go on gets status 503. By default it answers this machine
alone, no page in a browser, and for no model but the one that it was started with: see
docs/serving.md. Under mlx.launch the first process listens. Once it does:
  curl localhost:8080/v1/completions -H 'Content-Type: application/json' \\
    -d '{"prompt": "What is a page table?", "max_tokens": 64}'
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP, its requests batched, with a paged cache",
        description="Serve a model with mlx_lm.server and a paged cache.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(parser)
    add_tier_options(parser)
    add_mlx_lm_options(parser)
    _add_door_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no notes on standard error")
    parser.set_defaults(run=run, passed_on=[])


def _add_door_options(parser: argparse.ArgumentParser) -> None:
    limits = Limits()
    group = parser.add_argument_group("who may ask, and for what")
    group.add_argument(
        "--api-keys",
        metavar="FILE",
        help="one key a line, of which each request must have one; keys share no prompts "
        "(or one key in PAGEDKV_API_KEY)",
    )
    group.add_argument(
        "--allowed-hosts",
        type=_names,
        default=(),
        metavar="NAMES",
        help="names of the server, with commas, besides addresses and localhost; * is any",
    )
    group.add_argument(
        "--allowed-origins",
        type=_names,
        default=(),
        metavar="SITES",
        help="sites whose pages may ask from a browser, with commas, such as "
        "http://localhost:3000; * is any (default: none)",
    )
    group.add_argument(
        "--any-model-name",
        action="store_true",
        help="answer requests for any model with the one that is served",
    )
    group.add_argument(
        "--other-models",
        action="store_true",
        help="load the models, drafts and adapters that requests ask for, in place of this one",
    )
    group.add_argument(
        "--ignore-unknown-fields",
        action="store_true",
        help="leave out fields that nobody knows, in place of refusing the request",
    )
    group.add_argument(
        "--max-body",
        metavar="SIZE",
        default=format_size(limits.body),
        help="of a request (default: %(default)s)",
    )
    for flag, what in (
        ("--max-prompt-tokens", "of a prompt (default: as many as fit the budgets)"),
        ("--max-answer-tokens", "that a request may ask for (default: any number)"),
    ):
        group.add_argument(flag, type=_count, metavar="N", help=what)
    group.add_argument(
        "--max-requests",
        type=_count,
        metavar="N",
        default=limits.requests,
        help="under way and waiting; others get status 503 (default: %(default)s)",
    )
    group.add_argument(
        "--stop-seconds",
        type=_seconds,
        metavar="S",
        default=STOP_SECONDS,
        help="in which it ends when it is told to, kept prompts written (default: %(default)g)",
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text[:40]!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 2 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"expected seconds, from 2, got {text[:40]!r}")
    return seconds


def _keys(path: str | None) -> tuple[str, ...]:
    """The API keys that the options and the environment name.

    Raises:
        ConfigError: if there is none where some are to be.
    """
    keys = [os.environ.get("PAGEDKV_API_KEY", "")]
    if path is not None:
        keys += user_path(path).read_text("utf-8", "replace").splitlines()
    found = tuple(filter(None, (key.strip() for key in keys)))
    if path is not None and not found:
        raise ConfigError(f"--api-keys: there is no key in {path!r}")
    return found


class _ServerParser(argparse.ArgumentParser):
    """mlx_lm.server's parser, with this program's name and errors of one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "prog": "pagedkv serve", "add_help": False})

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    say, config = Notes(args.quiet), tier_config(args)
    if problem := unsupported("mlx-lm"):
        raise ConfigError(f"{problem}: pip install 'pagedkv[lm]'")
    try:
        from pagedkv.integrations.server.provider import PagedModelProvider
        from pagedkv.integrations.server.server import serve, server_options
    except ImportError as e:
        raise ConfigError(f"serving a model needs more ({e}): pip install 'pagedkv[lm]'") from e
    limits = Limits(
        body=parse_size(args.max_body, "max_body"),
        prompt=args.max_prompt_tokens,
        answer=args.max_answer_tokens or Limits().answer,
        requests=args.max_requests,
        unknown=args.ignore_unknown_fields,
    )
    access = Access(
        args.allowed_hosts,
        args.allowed_origins,
        _keys(args.api_keys),
    )
    try:
        options = server_options(["--model", args.model, *args.passed_on], _ServerParser)
    except SystemExit as e:  # it was said already
        return int(e.code or 0)
    options.model = locate(args.model, say)
    provider = PagedModelProvider(
        options,
        config,
        lambda model: cast_model(model, args.dtype, say),
        name=args.model,
        limits=limits,
        others=args.other_models,
        any_name=args.any_model_name,
    )
    where = f"http://{options.host}:{options.port}/v1"
    code = 0

    def ready() -> None:
        if not access.keys and not _here_alone(options.host):
            say(
                f"warning: everybody who reaches {options.host} may use this server: see "
                f"--api-keys, and put a proxy with TLS in front of it"
            )
        say(f"serving {args.model} at {where} (stop with Ctrl-C)")

    try:
        serve(provider, access, ready, explain, args.stop_seconds)
    except SystemExit as e:  # told to stop
        code = int(e.code or 0)
    except KeyboardInterrupt:
        print("pagedkv: interrupted", file=sys.stderr)
        code = 130
    except (PagedKVError, OSError) as e:
        print(f"pagedkv: error: {' '.join(str(e).split())}", file=sys.stderr)
        code = 1
    return _leave(code)


def _here_alone(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _leave(code: int) -> int:
    """End the process, everything being closed.

    On Linux the ordinary way aborts where a thread has used MLX (0.32.4) and the server was
    interrupted, or could not begin. Nor would Python end while a thread waits for another process.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

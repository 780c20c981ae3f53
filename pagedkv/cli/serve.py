"""``pagedkv serve``: an OpenAI-compatible server whose requests share three tiers."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any, NoReturn

from pagedkv.cli.loading import add_model_options, cast_model, explain, locate
from pagedkv.cli.options import add_mlx_lm_options, add_tier_options, tier_config
from pagedkv.cli.output import Notes
from pagedkv.errors import ConfigError, PagedKVError
from pagedkv.releases import unsupported

_EPILOG = """\
examples:
  pagedkv serve --model demo
  pagedkv serve --model ./my-model --warm 4GB --cold 64GB --port 8081
  pagedkv serve --model owner/name --hot-tokens 1K --kv K8V4 --max-tokens 2048 --log-level WARNING

The server is mlx_lm.server. All of its options are taken and passed on, such as --host, --port,
--max-tokens, --decode-concurrency, --prompt-concurrency, --prompt-cache-size and --log-level:
`mlx_lm.server --help` shows them. Requests are batched, and prompts that begin alike share pages.
When pages run out, prompts kept for reuse go first, new requests wait, and a request that cannot
go on gets status 503. Under mlx.launch the first process listens. Once it does:
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
    parser.add_argument("--quiet", action="store_true", help="no notes on standard error")
    parser.set_defaults(run=run, passed_on=[])


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
        from pagedkv.serving import PagedModelProvider, serve, server_options
    except ImportError as e:
        raise ConfigError("serving a model needs mlx-lm: pip install 'pagedkv[lm]'") from e
    try:
        options = server_options(["--model", args.model, *args.passed_on], _ServerParser)
    except SystemExit as e:  # it was said already
        return int(e.code or 0)
    options.model = locate(args.model, say)
    provider = PagedModelProvider(options, config, lambda model: cast_model(model, args.dtype, say))
    where = f"http://{options.host}:{options.port}/v1"
    provider.add_name(args.model, options.model)
    code = 0
    try:
        serve(provider, lambda: say(f"serving {args.model} at {where} (stop with Ctrl-C)"), explain)
    except SystemExit as e:  # told to stop
        code = int(e.code or 0)
    except (KeyboardInterrupt, PagedKVError, OSError) as e:
        if not provider.is_distributed:
            raise
        # The thread may wait for another process for ever, and Python would wait for the thread.
        stopped = isinstance(e, KeyboardInterrupt)
        print(f"pagedkv: {'interrupted' if stopped else f'error: {e}'}", file=sys.stderr)
        code = 130 if stopped else 1
    return _leave(code)


def _leave(code: int) -> int:
    """End the process, everything being closed.

    On Linux the ordinary way aborts where a thread has used MLX (0.32.4) and the server was
    interrupted; mlx_lm.server by itself does the same.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

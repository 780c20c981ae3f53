"""What a request may say: OpenAI's fields and mlx-lm's, their types and their bounds.

Sources: OpenAI's API reference (chat completions and completions) and the fields that
`mlx_lm.server` reads. A field that is in neither is refused by its name.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, from_json

from pagedkv.integrations.server.access import MOST_TOKENS, Limits
from pagedkv.integrations.server.errors import RequestError

WITHOUT_EFFECT = frozenset(
    [
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    ]
)
"""OpenAI's fields that change nothing here, and may be sent."""

COLDEST = 1e-4
"""A temperature below this is none: the most likely token has all of the probability."""

MOST_BIASED = 1024
MOST_STOPS = 16
LONGEST_STOP = 1000
MOST_TOOLS = 128
FARTHEST_BACK = 2**20
LONGEST_SALT = 1000


def _refuse(message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{what}", {"what": message})


def _only(*allowed: Any) -> AfterValidator:
    """A field of which one value alone can be had."""

    def check(value: Any) -> Any:
        if value not in allowed:
            raise _refuse(f"only {' or '.join(json.dumps(v) for v in allowed)} can be had here")
        return value

    return AfterValidator(check)


def _stops(value: Any) -> list[str]:
    stops = [value] if value and isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise _refuse("expected a text, or a list of texts")
    if len(stops) > MOST_STOPS or not all(0 < len(s) <= LONGEST_STOP for s in stops):
        raise _refuse(f"expected at most {MOST_STOPS} texts of 1 to {LONGEST_STOP:,} characters")
    return stops


def _bias(value: dict[str, float]) -> dict[str, float]:
    if len(value) > MOST_BIASED:
        raise _refuse(f"expected at most {MOST_BIASED:,} tokens, got {len(value):,}")
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise _refuse("its keys are token ids: decimal numbers from 0")
        if not -100 <= bias <= 100:
            raise _refuse("a bias is a number from -100 to 100")
    return value


def _penalty(value: float) -> float:
    if value and not 0.01 <= value <= 100:
        raise _refuse("expected 0 for none, or a number from 0.01 to 100")
    return value


def _none_or_text(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") == "text":
        return value
    raise _refuse('only {"type": "text"} can be had: answers are not held to a format')


def _of_template(value: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the operator's template: plain values, and none that says how it is used."""
    for name, given in value.items():
        if name in _reserved():
            raise _refuse(f"{name[:50]!r} is not for a request: the template is the operator's")
        if not isinstance(given, (bool, int, float, str, type(None))):
            raise _refuse(f"{name[:50]!r} is neither text, number, true, false nor null")
        if isinstance(given, str) and len(given) > LONGEST_STOP:
            raise _refuse(f"{name[:50]!r} is longer than {LONGEST_STOP:,} characters")
        if isinstance(given, int) and abs(given) > MOST_TOKENS:
            raise _refuse(f"{name[:50]!r} is not a number of 32 bits")
    return value


@functools.cache
def _reserved() -> frozenset[str]:
    """What `apply_chat_template` and the tokenizers below take for themselves."""
    from transformers import PreTrainedTokenizerBase

    taken: set[str] = {"text", "text_pair", "bos_token", "eos_token", "messages"}
    functions: tuple[Callable[..., Any], ...] = (
        PreTrainedTokenizerBase.apply_chat_template,
        PreTrainedTokenizerBase.__call__,
    )
    for function in functions:
        taken |= inspect.signature(function).parameters.keys()
    return frozenset(taken)


def _messages(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not value:
        raise _refuse("expected at least one message")
    for i, message in enumerate(value):
        if not isinstance(message.get("role"), str):
            raise _refuse(f'[{i}].role|expected a text such as "user"')
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list) else ()):
            _check_part(f"[{i}].content[{j}]", part)
        if not isinstance(content, (str, list, type(None))):
            raise _refuse(f"[{i}].content|expected a text or a list of parts")
        calls = message.get("tool_calls")
        if calls is None:
            message.pop("tool_calls", None)
        elif not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise _refuse(f"[{i}].tool_calls|expected a list of objects")
    return value


def _check_part(where: str, part: Any) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise _refuse(f'{where}|expected an object with a type such as "text"')
    if part["type"] == "text":
        if not isinstance(part.get("text"), str):
            raise _refuse(f"{where}.text|expected a text")
        return
    image = part.get("image_url", part.get("image"))
    url = image.get("url") if isinstance(image, dict) else image
    if part["type"] not in ("image_url", "input_image", "image") or not isinstance(url, str):
        raise _refuse(f"{where}|expected a text, or an image_url with a url")
    if not url.startswith("data:"):
        raise _refuse(f"{where}|nothing is fetched: send the image itself, as a data: URL")


_Text = Annotated[str, Field(max_length=1000)]
_Count = Annotated[int, Field(ge=0, le=FARTHEST_BACK)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Penalty = Annotated[float, Field(ge=-100, le=100)]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool = False


class _Request(BaseModel):
    """The fields of both endpoints; null is as if a field were not there."""

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True
    )
    # For the door alone: mlx-lm is given what is left.
    ours: ClassVar[frozenset[str]] = frozenset(
        {
            "cache_salt",
            "prefix_salt",
            "n",
            "best_of",
            "echo",
            "suffix",
            "tool_choice",
            "response_format",
        }
        | {"modalities"}
    )

    model: _Text | None = None
    draft_model: _Text | None = None
    adapters: Annotated[str, Field(max_length=4096)] | None = None
    cache_salt: Annotated[str, Field(max_length=LONGEST_SALT)] | None = None
    prefix_salt: Annotated[str, Field(max_length=LONGEST_SALT)] | None = None
    n: Annotated[int, _only(1)] | None = None
    response_format: Annotated[Any, AfterValidator(_none_or_text)] | None = None

    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    num_draft_tokens: Annotated[int, Field(ge=0, le=64)] | None = None
    stop: Annotated[Any, AfterValidator(_stops)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    min_p: _Share | None = None
    xtc_probability: _Share | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] | None = None
    repetition_penalty: Annotated[float, AfterValidator(_penalty)] | None = None
    repetition_context_size: _Count | None = None
    presence_penalty: _Penalty | None = None
    presence_context_size: _Count | None = None
    frequency_penalty: _Penalty | None = None
    frequency_context_size: _Count | None = None
    logit_bias: Annotated[dict[str, float], AfterValidator(_bias)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=11)] | None = None


def _one_prompt(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise _refuse(
            "expected one text: send a request for each prompt of a list, and text in place of "
            "token ids"
        )
    if not value:
        raise _refuse("it has no text: there is nothing to answer")
    return value


class _Completion(_Request):
    """``/v1/completions``."""

    prompt: Annotated[Any, AfterValidator(_one_prompt)]
    best_of: Annotated[int, _only(1)] | None = None
    echo: Annotated[bool, _only(False)] | None = None
    suffix: Annotated[str, _only("")] | None = None


class _Chat(_Request):
    """``/v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], AfterValidator(_messages)]
    tools: Annotated[list[dict[str, Any]], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Annotated[Any, _only("auto", "none")] | None = None
    role_mapping: dict[str, str] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_of_template)] | None = None
    modalities: Annotated[list[str], _only(["text"])] | None = None


SCHEMAS: dict[str, type[_Request]] = {
    "/v1/completions": _Completion,
    "/v1/chat/completions": _Chat,
    "/chat/completions": _Chat,
}
"""The endpoints that take a body, and what it may have."""


@dataclass(frozen=True)
class Asked:
    """A request that is understood.

    Attributes:
        body: for mlx-lm: its own fields alone, none of them null.
        salt: what sequences are kept apart by; empty for none.
    """

    body: dict[str, Any]
    salt: str


def read(path: str, raw: bytes, limits: Limits) -> Asked:
    """Read a request's body.

    Args:
        path: one of `SCHEMAS`.
        raw: the body, JSON in UTF-8.
        limits: what may be asked for.

    Raises:
        RequestError: naming the field and what is wrong with it, never what was in it.
    """
    try:
        given = from_json(raw)
    except ValueError as e:
        raise RequestError(f"the body is not JSON: {_short(e)} ({len(raw):,} bytes)") from None
    if not isinstance(given, dict):
        raise RequestError(f"the body is a JSON object, got {_kind(given)}")
    schema = SCHEMAS[path]
    if not limits.unknown:
        _refuse_unknown(given, schema)
    try:
        asked = schema.model_validate(given)
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False)[0]
        inside, _, what = str(first["msg"]).rpartition("|")  # of our own checks
        raise RequestError(what, _place(first["loc"]) + inside) from None
    body = asked.model_dump(exclude_none=True, exclude=set(schema.ours))
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name, 1) > limits.answer:
            raise RequestError(f"this server gives {limits.answer:,} tokens at most", name)
    if body.get("temperature", 1) < COLDEST:
        body["temperature"] = 0.0
    if "seed" in body:
        body["seed"] %= 2**64
    if given.get("tool_choice") == "none":
        body.pop("tools", None)
    salts = [asked.cache_salt, asked.prefix_salt]
    return Asked(body, json.dumps(salts) if any(salts) else "")


def _refuse_unknown(given: dict[str, Any], schema: type[_Request]) -> None:
    unknown = given.keys() - schema.model_fields.keys() - WITHOUT_EFFECT
    if unknown:
        raise RequestError(
            "there is no such field here (docs/serving.md lists them; --ignore-unknown-fields "
            "leaves such fields out)",
            min(unknown)[:80],
        )


def _place(loc: Iterable[str | int]) -> str:
    """Where, as people write it; what pydantic adds for its unions is left out."""
    place = ""
    for step in loc:
        if isinstance(step, int):
            place += f"[{step}]"
        elif step.isidentifier():
            place += f".{step[:80]}" if place else step[:80]
    return place


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

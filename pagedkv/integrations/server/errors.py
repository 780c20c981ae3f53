"""What a request is answered with if not with text: errors, their statuses, and their JSON."""

from __future__ import annotations

from typing import Any

from pagedkv.errors import OutOfPagesError, PagedKVError


class RequestError(PagedKVError):
    """A request that cannot be answered as it is: says what is wrong with it.

    Attributes:
        field: what is wrong, such as ``messages[0].role``; empty if it is no field.
    """

    def __init__(self, message: str, field: str = "") -> None:
        """Say it.

        Args:
            message: what is wrong, and what would do.
            field: where.
        """
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field


class AccessError(PagedKVError):
    """A request without a key of the server."""


class ForeignError(PagedKVError):
    """A request that comes from another site's page, or by another name of this machine."""


class UnknownModelError(PagedKVError):
    """A request that names a model or an adapter that is not served, or is nowhere to be found."""


class TooLargeError(PagedKVError):
    """A request whose body is larger than is read."""


class LateError(PagedKVError):
    """A request whose body does not come."""


class BusyError(PagedKVError):
    """More requests at once than the server takes."""


class StoppedError(PagedKVError):
    """The server is about to end."""


class GenerationError(PagedKVError):
    """Something else than pagedkv failed while a request was answered."""


COME_AGAIN = 2
"""Seconds after which a client that found no room is to try again."""

_STATUS: dict[type[Exception], int] = {
    RequestError: 400,
    AccessError: 401,
    ForeignError: 403,
    UnknownModelError: 404,
    LateError: 408,
    TooLargeError: 413,
    OutOfPagesError: 503,
    BusyError: 503,
    StoppedError: 503,
}


def status_of(error: Exception) -> int:
    """The status that an error is answered with."""
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)


def fields_of(error: Exception) -> dict[str, str]:
    """Header fields that go with an error."""
    more = {
        401: {"WWW-Authenticate": "Bearer"},
        408: {"Connection": "close"},
        503: {"Retry-After": str(COME_AGAIN)},
    }
    return more.get(status_of(error), {})


def told(error: Exception) -> dict[str, Any]:
    """An error as OpenAI's interface has it."""
    what = {
        "message": str(error),
        "type": type(error).__name__,
        "param": getattr(error, "field", None) or None,
        "code": None,
    }
    return {"error": what}


def as_ours(error: Exception) -> PagedKVError:
    """An error to answer with; pagedkv's own are as they are."""
    if isinstance(error, PagedKVError):
        return error
    return GenerationError(f"generating failed with {type(error).__name__}: {error}")

"""Operations that may be broken off at any point: Ctrl-C, no memory, an error of the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from pagedkv.errors import PagedKVError

if TYPE_CHECKING:
    from pagedkv.sequence.sequence import SequenceContext

P = ParamSpec("P")
T = TypeVar("T")


def interruptible(
    method: Callable[Concatenate[Any, P], T],
) -> Callable[Concatenate[Any, P], T]:
    """A method of a cache that may be broken off at any point (Ctrl-C, no memory).

    What it was about to change is put right before anything else happens: see `Pager.recover`.
    Errors of ours are raised where everything agrees.
    """

    @functools.wraps(method)
    def marked(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except PagedKVError:
            raise
        except BaseException:
            _context_of(self).pager.inconsistent = True
            raise

    return marked


def interruptible_call(
    method: Callable[Concatenate[Any, P], T],
) -> Callable[Concatenate[Any, P], T]:
    """A part of a model's call: see `interruptible`; the call's tokens are taken back, too."""

    @functools.wraps(method)
    def taken_back(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except PagedKVError:
            raise
        except BaseException:
            _context_of(self).break_off()
            raise

    return taken_back


def interruptible_append(
    method: Callable[Concatenate[Any, P], T],
) -> Callable[Concatenate[Any, P], T]:
    """A part of a call that may begin it: see `interruptible_call`.

    If it is broken off before the call has begun, the tokens of the call before stay.
    """

    @functools.wraps(method)
    def taken_back(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        context = self._context
        waits = context.unbegun(self)
        try:
            return method(self, *args, **kwargs)
        except PagedKVError:
            raise
        except BaseException:
            if waits is not None and waits is context.unbegun(self):
                context.pager.inconsistent = True
            else:
                context.break_off()
            raise

    return taken_back


def _context_of(cache: Any) -> SequenceContext:
    """Of one layer's cache, or of the list of them."""
    context: SequenceContext = getattr(cache, "_context", None) or cache.context
    return context

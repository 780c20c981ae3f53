"""Who may ask a server, and for how much."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass

from pagedkv.integrations.server.errors import AccessError, ForeignError

MOST_TOKENS = 2**31 - 1
"""What any count of tokens is below."""

STOP_SECONDS = 10.0
"""A server that is told to stop has ended by then, unless it is given more."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much may be asked at once.

    Attributes:
        body: bytes of a request's body.
        prompt: tokens of a prompt; None leaves it to the budgets.
        answer: tokens of an answer, at most.
        requests: under way and waiting; others are told to come again.
        unknown: whether fields that nobody knows are left out in place of refused.
    """

    body: int = 32_000_000
    prompt: int | None = None
    answer: int = MOST_TOKENS
    requests: int = 128
    unknown: bool = False


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        hosts: names that the server goes by, besides addresses and localhost; ``*`` is any.
        origins: sites whose pages may ask from a browser; ``*`` is any.
        keys: one of these has to be sent; empty lets everybody ask who reaches the server. Clients
            with different keys share no prompts.
    """

    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    def check(self, headers: dict[str, str], open_to_all: bool) -> str:
        """See that a request may come in.

        Args:
            headers: of the request, names in lower case.
            open_to_all: whether it needs no key.

        Returns:
            What tells the client's key from others; empty if there are no keys.

        Raises:
            ForeignError: if it is for another host, or from another site's page.
            AccessError: if it has no key.
        """
        if (host := headers.get("host")) is not None and not self._knows(host):
            raise ForeignError(
                f"this server does not go by the name {host[:100]!r}: use its address, or start it "
                f"with --allowed-hosts"
            )
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        of_a_page = origin is not None or site not in ("none", "same-origin")
        if of_a_page and "*" not in self.origins and origin not in self.origins:
            raise ForeignError(
                f"pages of {(origin or 'other sites')[:100]!r} may not use this server: start it "
                f"with --allowed-origins to let them"
            )
        if open_to_all or not self.keys:
            return ""
        given = headers.get("authorization", "").removeprefix("Bearer ").strip().encode("latin-1")
        # All of them, so that the time tells nothing.
        fits = [hmac.compare_digest(given, key.encode()) for key in self.keys]
        if not any(fits):
            raise AccessError("this server wants one of its API keys: Authorization: Bearer KEY")
        return hashlib.sha256(given).hexdigest()

    def _knows(self, host: str) -> bool:
        name = host.rpartition("]")[0].lstrip("[") or host.partition(":")[0]
        if "*" in self.hosts or name.lower() in ("localhost", *map(str.lower, self.hosts)):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

"""What may be fetched: schemes, addresses, hosts. Checked for the URL and again for every redirect.

Addresses are judged after name resolution, in the resolver of the connection itself, so that the address
which was judged is the one connected to (no rebinding).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from schemas.errors import Reason

_ROBOTS = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
_WITH_VALUE = frozenset({"max-image-preview", "max-snippet", "max-video-preview", "unavailable_after"})
"""Directives which look like the name of a user agent: they, too, end with a colon."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Refused(Exception):
    """A URL, address, body or image that the policy does not let in."""

    def __init__(self, reason: Reason, detail: str, http_status: int | None = None) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.http_status = reason, detail, http_status


@dataclass(frozen=True)
class Policy:
    """Caps and allow-lists of fetching; private addresses are open only for ``allow_hosts``."""

    allow_hosts: frozenset[str]
    max_bytes: int
    max_redirects: int
    timeout: float
    retries: int
    respect_opt_out: bool
    user_agent: str

    def check_url(self, text: str) -> URL:
        """The URL, ready to be requested.

        Raises:
            Refused: not a URL, another scheme than http(s), credentials, or a refused literal address.
        """
        try:
            parts = urlsplit(text.strip())
            url = URL(text.strip())
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise Refused(Reason.BAD_URL, f"not a URL: {exc}") from exc
        if parts.scheme.lower() not in ("http", "https"):
            raise Refused(Reason.SCHEME_REFUSED if parts.scheme else Reason.BAD_URL, f"scheme {parts.scheme[:20]!r}")
        if not host or not url.host:
            raise Refused(Reason.BAD_URL, "no host")
        if parts.username is not None or parts.password is not None:
            raise Refused(Reason.CREDENTIALS_IN_URL, "credentials in the URL")
        if _literal(url.host) is not None:
            self.check_address(url.host, url.host, port or url.port or 0)
        return url

    def check_address(self, host: str, address: str, port: int) -> None:
        """Raises Refused unless ``address`` is public or ``host`` (with any or this port) is allowed."""
        name = host.lower()
        if {name, f"{name}:{port}", f"[{name}]", f"[{name}]:{port}"} & self.allow_hosts:
            return
        ip = _literal(address)
        if ip is None or not ip.is_global or ip.is_multicast:
            raise Refused(Reason.ADDRESS_REFUSED, f"{host} is the address {address}, which is not public")

    def check_robots(self, headers: Iterable[str]) -> None:
        """Raises Refused if an ``X-Robots-Tag`` for all, or for this user agent, opts out."""
        if not self.respect_opt_out:
            return
        agent = self.user_agent.split("/", 1)[0].lower()
        for header in headers:
            who, colon, rest = (part.strip().lower() for part in header.partition(":"))
            named = bool(colon) and "," not in who and who not in _WITH_VALUE
            if named and who not in ("", "*", agent):
                continue
            directives = rest if named else header
            if found := {d.strip().lower() for d in directives.split(",")} & _ROBOTS:
                raise Refused(Reason.OPTED_OUT, f"X-Robots-Tag: {', '.join(sorted(found))}", 200)


class GuardedResolver(AbstractResolver):
    """Resolves a name and lets through only addresses that the policy allows."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self._inner = policy, ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        for answer in found:
            self._policy.check_address(host, answer["host"], port)
        return found

    async def close(self) -> None:
        await self._inner.close()


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that ``host`` is, in any spelling the socket layer takes; None for a name."""
    try:
        ip = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        try:  # 127.1, 0x7f.1, 2130706433: no name, but addresses to the C library
            ip = ipaddress.ip_address(socket.inet_aton(host)) if host[:1].isdigit() else None  # type: ignore[assignment]
        except OSError:
            return None
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:  # a gateway hands these on to the IPv4 address at their end
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        return ip.ipv4_mapped or ip.sixtofour or ip
    return ip

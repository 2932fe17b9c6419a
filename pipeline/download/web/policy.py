"""What may be fetched: schemes, addresses, hosts. Checked for the URL and again for every redirect.

Addresses are judged once more as each connection is opened: the address which is judged is the one connected
to (no rebinding).
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

from yarl import URL

from schemas.configs import DownloadConfig
from schemas.errors import Reason

_ROBOTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})  # none: noindex and nofollow
_WITH_VALUE = frozenset({"max-image-preview", "max-snippet", "max-video-preview", "unavailable_after"})
"""Directives which look like the name of a user agent: they, too, end with a colon."""
_AGENT = re.compile(r"[a-z0-9_.*-]+")

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_PRIVATE_TOO = [ipaddress.IPv6Network(net) for net in ("::/96", "fec0::/10", "64:ff9b:1::/48")]
"""IPv4-compatible, site-local and local NAT64 addresses: deprecated or local, though the registry calls them global."""
_LONGEST = 1 << 16


class Refused(Exception):
    """A URL, address, body or image that the policy does not let in."""

    def __init__(self, reason: Reason, detail: str, http_status: int | None = None) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.http_status = reason, detail, http_status


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that may be asked for: escaped, and without its fragment; ``host`` in lower case, without brackets."""

    url: str
    scheme: str
    host: str
    port: int

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True)
class Policy:
    """Allow-lists of fetching; private addresses are open only for ``allow_hosts``."""

    allow_hosts: frozenset[str]
    schemes: frozenset[str]
    respect_opt_out: bool
    user_agent: str

    @classmethod
    def of(cls, config: DownloadConfig) -> Policy:
        return cls(
            allow_hosts=frozenset(h.lower() for h in config.allow_hosts),
            schemes=frozenset(s.lower() for s in config.schemes),
            respect_opt_out=config.respect_opt_out,
            user_agent=config.user_agent,
        )

    def check_url(self, text: str) -> Target:
        """The URL, ready to be requested.

        Raises:
            Refused: not a URL, a scheme that is not open, credentials, or a refused literal address.
        """
        text = text.strip()
        if len(text) > _LONGEST:
            raise Refused(Reason.BAD_URL, f"a URL of {len(text)} characters")
        try:
            return self._target(text)
        except Refused:
            raise
        except Exception as exc:  # URL parsers raise almost anything
            raise Refused(Reason.BAD_URL, f"not a URL: {exc}"[:300]) from exc

    def _target(self, text: str) -> Target:
        parts, url = urlsplit(text), URL(text).with_fragment(None)
        scheme = parts.scheme.lower()
        if scheme not in self.schemes:
            raise Refused(Reason.SCHEME_REFUSED if scheme else Reason.BAD_URL, f"scheme {scheme[:20]!r}")
        if parts.username is not None or parts.password is not None:
            raise Refused(Reason.CREDENTIALS_IN_URL, "credentials in the URL")
        if scheme not in ("http", "https"):
            return Target(text, scheme, url.host or "", 0)
        host = (url.raw_host or "").lower().rstrip(".")
        if not parts.hostname or not host or not host.isascii() or not host.isprintable():
            raise Refused(Reason.BAD_URL, "no host, or one that no host can have")
        target = Target(str(url), scheme, host, parts.port or url.port or 0)
        if _literal(target.host) is not None:
            self.check_address(target, target.host, target.port)
        return target

    def check_address(self, target: Target, address: str, port: int) -> None:
        """Raises Refused unless ``address`` is public, or the target's host (with any or this port) is allowed."""
        name = target.host
        if {name, f"{name}:{port}", f"[{name}]", f"[{name}]:{port}"} & self.allow_hosts and _agree(name, address):
            return
        if not _is_public(address):
            raise Refused(Reason.ADDRESS_REFUSED, f"{name} is the address {address}, which is not public")

    def check_robots(self, headers: Iterable[str]) -> None:
        """Raises Refused if an ``X-Robots-Tag`` for all, or for this user agent, opts out."""
        if not self.respect_opt_out:
            return
        agent = self.user_agent.split("/", 1)[0].lower()
        for header in headers:
            meant = True
            for part in header.lower().split(","):
                who, colon, directive = (text.strip() for text in part.partition(":"))
                if colon and who not in _WITH_VALUE and _AGENT.fullmatch(who):
                    meant = who in ("*", agent)  # it and what follows, up to the next name, is for this agent
                else:
                    directive = part.strip()
                if meant and directive in _ROBOTS:
                    raise Refused(Reason.OPTED_OUT, f"X-Robots-Tag: {directive}", 200)


def _agree(host: str, address: str) -> bool:
    """A host that is an address itself stands for this address alone."""
    literal = _literal(host)
    return literal is None or literal == _literal(address)


@lru_cache(4096)
def _is_public(address: str) -> bool:
    ip = _literal(address)
    if ip is None or not ip.is_global or ip.is_multicast:
        return False
    return ip.version == 4 or not any(ip in net for net in _PRIVATE_TOO)


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

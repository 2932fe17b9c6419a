"""The asynchronous client: one session a shard, every request under the policy and its caps."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import cache

import aiohttp
import certifi
from yarl import URL

from pipeline.download.policy import GuardedResolver, Policy, Refused
from schemas.errors import Reason

_CHUNK = 1 << 16
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True)
class Fetched:
    """What became of one URL: ``body`` where ``reason`` is ok."""

    reason: Reason
    body: bytes = b""
    http_status: int | None = None
    error: str | None = None


@cache
def _tls() -> ssl.SSLContext:
    """One TLS context a process: building one costs 37 ms of CPU."""
    return ssl.create_default_context(cafile=certifi.where())


async def fetch_all(
    urls: Sequence[str], policy: Policy, concurrency: int, per_host: int
) -> AsyncIterator[tuple[int, Fetched]]:
    """(position, result) of every URL as it arrives; at most ``concurrency`` are in flight or wait to be taken."""
    connector = aiohttp.TCPConnector(resolver=GuardedResolver(policy), limit=concurrency, ssl=_tls(), ttl_dns_cache=300)
    headers = {"User-Agent": policy.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
    slots: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(per_host))
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=None)
    ) as session:

        async def one(i: int, url: str) -> tuple[int, Fetched]:
            # The clock starts with the request: to wait for a place at a busy host is no time-out.
            async with slots[_host(url)]:
                return i, await fetch(session, url, policy)

        todo = iter(enumerate(urls))
        flying: set[asyncio.Task[tuple[int, Fetched]]] = set()
        while True:
            while len(flying) < concurrency and (item := next(todo, None)) is not None:
                flying.add(asyncio.create_task(one(*item)))
            if not flying:
                return
            done, flying = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()


def _host(url: str) -> str:
    return url.partition("://")[2].partition("/")[0].lower()


async def fetch(session: aiohttp.ClientSession, url: str, policy: Policy) -> Fetched:
    """One URL, redirects followed, what may pass tried again. Never raises for what the web does."""
    result = await _once(session, url, policy)
    for attempt in range(policy.retries):
        if not result.reason.retryable or result.reason is Reason.DNS:
            break
        await asyncio.sleep(random.uniform(0.5, 1.5) * 0.5 * 2**attempt)  # noqa: S311
        result = await _once(session, url, policy)
    return result


async def _once(session: aiohttp.ClientSession, url: str, policy: Policy) -> Fetched:
    try:
        async with asyncio.timeout(policy.timeout):
            return await _follow(session, url, policy)
    except Refused as exc:
        return Fetched(exc.reason, error=exc.detail, http_status=exc.http_status)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as exc:
        return Fetched(_reason(exc), error=_detail(exc))


async def _follow(session: aiohttp.ClientSession, text: str, policy: Policy) -> Fetched:
    url = policy.check_url(text)
    for _ in range(policy.max_redirects + 1):
        async with session.get(url, allow_redirects=False) as response:
            location = response.headers.get("Location")
            if response.status in _REDIRECTS and location:
                url = policy.check_url(str(url.join(URL(location))))
                continue
            if response.status != 200:
                return Fetched(
                    _status_reason(response.status),
                    http_status=response.status,
                    error=f"HTTP {response.status}",
                )
            policy.check_robots(response.headers.getall("X-Robots-Tag", ()))
            return await _body(response, policy)
    raise Refused(Reason.TOO_MANY_REDIRECTS, f"more than {policy.max_redirects} redirects")


async def _body(response: aiohttp.ClientResponse, policy: Policy) -> Fetched:
    declared = response.content_length
    if declared is not None and declared > policy.max_bytes:
        raise Refused(Reason.TOO_LARGE, f"{declared} bytes declared, {policy.max_bytes} allowed", 200)
    body = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK):
        body += chunk
        if len(body) > policy.max_bytes:
            raise Refused(Reason.TOO_LARGE, f"more than {policy.max_bytes} bytes", 200)
    if not body:
        return Fetched(Reason.EMPTY_BODY, http_status=200, error="empty body")
    return Fetched(Reason.OK, bytes(body), 200)


def _status_reason(status: int) -> Reason:
    if status == 429:
        return Reason.HTTP_429
    return Reason.HTTP_5XX if status >= 500 else Reason.HTTP_4XX


def _reason(exc: Exception) -> Reason:  # noqa: PLR0911
    if isinstance(exc, TimeoutError):
        return Reason.TIMEOUT
    if isinstance(exc, aiohttp.ClientConnectorDNSError):
        return Reason.DNS
    if isinstance(exc, (aiohttp.ClientSSLError, ssl.SSLError)):
        return Reason.TLS
    if isinstance(exc, aiohttp.ClientPayloadError):
        return Reason.TRUNCATED
    if isinstance(exc, aiohttp.ClientConnectorError):
        return Reason.CONNECT
    if isinstance(exc, (aiohttp.InvalidURL, ValueError)):
        return Reason.BAD_URL
    return Reason.RESET


def _detail(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"[:300]

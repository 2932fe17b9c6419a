"""Fetching: one thread a worker process, which keeps as many requests under way as pays, fair to every host.

Shards hand in their requests and take the answers as they come (:meth:`Fetcher.fetch_all`); several shards share
the fetcher, so that the stragglers of one leave no place empty. Bodies that wait to be decoded, and those still
arriving, stay below ``config.memory`` together: the youngest requests are put back where it runs short.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

from yarl import URL

from pipeline.download.web.answers import Fetched, judge_answer, location, wants_body
from pipeline.download.web.hosts import Host
from pipeline.download.web.objects import read_object
from pipeline.download.web.pace import Pace
from pipeline.download.web.policy import Policy, Refused, Target
from pipeline.download.web.robots import Robots
from pipeline.download.web.transport import Exchange, Transport
from schemas.configs import DownloadConfig
from schemas.errors import Reason

_BACKLOG = 64
"""Answers that may wait to be decoded before nothing more is asked for."""
_LONGEST_WAIT = 30.0
"""Seconds that a run waits for a further try; what a host wants to be left alone for longer is for a later run."""
_OBJECT_READERS = 16
_HOSTS = 10_000
_TIDY_SECONDS = 10.0


@dataclass(frozen=True)
class Request:
    """A URL to fetch; with ``etag`` or ``last_modified`` only if it has changed."""

    url: str
    etag: str | None = None
    last_modified: str | None = None


@dataclass(eq=False, slots=True)
class _Batch:
    """A shard's requests: where their answers go."""

    answers: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    abandoned: bool = False


@dataclass(eq=False, slots=True)
class _Task:
    """A request on its way, over redirects and tries."""

    position: int
    request: Request
    batch: _Batch | None
    target: Target
    first: Target
    hops: int = 0
    tries: int = 0
    spent: float = 0.0


class Fetcher:
    """Fetches for all shards of a process. Threads of several shards may call it at once.

    Args:
        config: caps, policy and politeness; ``per_host`` and ``host_rate`` are this process's share.
    """

    def __init__(self, config: DownloadConfig) -> None:
        self.config, self.policy = config, Policy.of(config)
        self._transport = Transport(
            self.policy.check_address,
            partial(wants_body, self.policy),
            config.user_agent,
            config.per_host,
            config.concurrency,
            config.http2,
        )
        self._pace = Pace(self._transport.places)
        self._memory = max(config.memory, 2 * config.max_bytes)
        self._hosts: dict[str, Host[_Task]] = {}
        self._ready: deque[Host[_Task]] = deque()
        self._later: list[tuple[float, int, _Task | Host[_Task]]] = []
        self._serial = itertools.count()
        self._tidy_at = 0.0
        self._robots = Robots(config.user_agent)
        self._inbox: deque[Any] = deque()
        self._objects: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._held = self._waiting = 0
        self._stopping = self._full = False
        self._failure: BaseException | None = None
        self._batches: set[_Batch] = set()
        self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)
        self._thread.start()

    # -- the callers' side ------------------------------------------------------------------------------

    def fetch_all(self, requests: Sequence[Request]) -> Iterator[tuple[int, Fetched]]:
        """(position, answer) of every request, as they arrive. The body counts as held until the next is taken."""
        batch = _Batch()
        with self._lock:
            self._batches.add(batch)
        for i, request in enumerate(requests):
            try:
                target = self.policy.check_url(request.url)
            except Refused as exc:
                self._give(batch, i, Fetched(exc.reason, error=exc.detail))
            else:
                self._inbox.append(_Task(i, request, batch, target, target))
        self._transport.wake()
        taken: Fetched | None = None
        try:
            for _ in requests:
                if self._failure is not None:
                    raise RuntimeError("the fetching thread has ended") from self._failure
                answer = batch.answers.get()
                if isinstance(answer, BaseException):
                    raise RuntimeError("the fetching thread has ended") from answer
                position, taken = answer
                yield position, taken
                self._let_go(taken)
                taken = None
        finally:
            with self._lock:
                self._batches.discard(batch)
                batch.abandoned = True
            while not batch.answers.empty():
                if not isinstance(answer := batch.answers.get(), BaseException):
                    self._let_go(answer[1])
            if taken is not None:
                self._let_go(taken)

    def close(self) -> None:
        """Drop what is under way and end the thread."""
        self._stopping = True
        self._transport.wake()
        self._thread.join()
        if self._objects is not None:
            self._objects.shutdown(wait=False, cancel_futures=True)

    def _let_go(self, answer: Fetched) -> None:
        with self._lock:
            starved = self._waiting >= _BACKLOG or self._held > self._memory // 2
            self._held -= len(answer.body)
            self._waiting -= 1
        if starved:
            self._transport.wake()

    # -- the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_in()
                self._start()
                for exchange in self._transport.turn(self._patience()):
                    self._over(exchange)
                self._relieve()
                self._tidy(time.monotonic())
            self._end(RuntimeError("the fetcher was closed"))
        except BaseException as exc:
            self._end(exc)
            raise
        finally:
            self._transport.close()

    def _end(self, why: BaseException) -> None:
        """Whoever waits for an answer must hear that there will be none."""
        with self._lock:
            self._failure = why
            for batch in self._batches:
                batch.answers.put(why)

    def _take_in(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, _Task):
                self._aim(item)
            else:
                self._answer(*item)
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            _, _, due = heapq.heappop(self._later)
            if isinstance(due, Host):
                due.listed = False
                self._make_ready(due)
            else:
                self._queue(due)

    def _aim(self, task: _Task) -> None:
        """Send a task on to its target: its own URL, or a redirect's."""
        if task.target.scheme in ("http", "https"):
            self._queue(task)
        elif task.hops:
            self._answer(task, Fetched(Reason.SCHEME_REFUSED, error=f"a redirect to {task.target.scheme}"))
        else:
            self._objects = self._objects or ThreadPoolExecutor(_OBJECT_READERS, "objects")
            self._objects.submit(self._read_object, task)

    def _queue(self, task: _Task) -> None:
        if task.batch is not None and self.config.robots_txt:
            allowed = self._robots.ask(task.target, task)
            if allowed is None:
                return  # parked until the host's robots.txt is there
            if isinstance(allowed, Target):
                self._queue(_Task(0, Request(allowed.url), None, allowed, allowed))
                return
            if allowed.reason is not Reason.OK:
                self._answer(task, allowed)
                return
        host = self._hosts.get(task.target.host)
        if host is None:
            host = self._hosts[task.target.host] = Host(task.target.host, self.config.per_host, self.config.host_rate)
        host.waiting.append(task)
        self._make_ready(host)

    def _make_ready(self, host: Host[_Task]) -> None:
        if host.waiting and not host.listed and host.active < host.places:
            host.listed = True
            self._ready.append(host)

    def _start(self) -> None:
        """Fill the places that are free, one request a host in turn."""
        now = time.monotonic()
        while self._ready and len(self._transport.flying) < self._pace.limit and self._has_room():
            host = self._ready.popleft()
            if host.not_before > now:  # it stays listed while it waits there
                heapq.heappush(self._later, (host.not_before, next(self._serial), host))
                continue
            host.listed = False
            task = host.waiting.popleft()
            if dead := host.dead(task.target.port, now):
                self._answer(task, Fetched(dead, error=f"{host.name} did not answer {host.strikes_before_dead} times"))
            elif task.batch is None or not task.batch.abandoned:
                self._send(task, host, now)
            self._make_ready(host)
        self._full = bool(self._ready) and len(self._transport.flying) >= self._pace.limit
        self._pace.glance(now, self._transport.arrived, self._full and self._waiting < 2)

    def _send(self, task: _Task, host: Host[_Task], now: float) -> None:
        try:
            self._transport.start(self._exchange(task))
        except Exception as exc:  # libcurl does not take the URL or a header: one row's fault, not the thread's
            self._answer(task, Fetched(Reason.BAD_URL, error=f"it cannot be sent: {exc}"[:300]))
        else:
            host.started(now)

    def _exchange(self, task: _Task) -> Exchange:
        headers: tuple[str, ...] = ()
        if task.request.etag:
            headers += (f"If-None-Match: {task.request.etag}",)
        if task.request.last_modified:
            headers += (f"If-Modified-Since: {task.request.last_modified}",)
        limit = self.config.max_bytes if task.batch is not None else Robots.MAX_BYTES
        return Exchange(task.target, max(self.config.timeout - task.spent, 0.001), limit, headers, owner=task)

    def _has_room(self) -> bool:
        busy = self._waiting >= _BACKLOG or self._held + self._transport.received > self._memory // 2
        return not busy or not (self._transport.flying or self._waiting)

    def _patience(self) -> float:
        if self._inbox:
            return 0.0
        longest = Pace.GLANCE if self._full else 1.0
        return min(longest, max(0.0, self._later[0][0] - time.monotonic())) if self._later else longest

    def _over(self, exchange: Exchange) -> None:
        now = time.monotonic()
        task: _Task = exchange.owner
        self._pace.answered(now, len(self._transport.flying) + 1 >= self._pace.limit and self._waiting < 2)
        host = self._hosts[task.target.host]
        task.spent += now - exchange.started
        answer = judge_answer(exchange, self.policy, conditional=bool(exchange.headers))
        host.ended(task.target.port, answer.reason, now)
        self._make_ready(host)
        if answer.reason is Reason.OK and (onward := location(exchange)):
            self._follow(task, onward)
        elif answer.reason.retryable and answer.reason is not Reason.DNS and self._try_again(task, answer, now):
            pass
        else:
            self._answer(task, answer)

    def _tidy(self, now: float) -> None:
        """A list of a million hosts must not fill the memory with hosts that are done."""
        if len(self._hosts) > _HOSTS and now >= self._tidy_at:
            self._hosts = {name: host for name, host in self._hosts.items() if not host.forgettable(now)}
            self._tidy_at = now + _TIDY_SECONDS

    def _follow(self, task: _Task, onward: str) -> None:
        task.hops += 1
        if task.hops > self.config.max_redirects:
            text = f"more than {self.config.max_redirects} redirects"
            self._answer(task, Fetched(Reason.TOO_MANY_REDIRECTS, error=text))
            return
        try:
            task.target = self.policy.check_url(str(URL(task.target.url, encoded=True).join(URL(onward))))
        except Refused as exc:
            self._answer(task, Fetched(exc.reason, error=f"a redirect: {exc.detail}"))
        except Exception as exc:  # URL parsers raise almost anything
            self._answer(task, Fetched(Reason.BAD_URL, error=f"a redirect to no URL: {exc}"[:300]))
        else:
            self._aim(task)

    def _try_again(self, task: _Task, answer: Fetched, now: float) -> bool:
        wait = answer.retry_after or 0.0
        if task.tries >= self.config.retries or wait > _LONGEST_WAIT:
            return False
        wait = max(wait, random.uniform(0.5, 1.5) * 0.5 * 2**task.tries)  # noqa: S311
        task.tries, task.hops, task.spent, task.target = task.tries + 1, 0, 0.0, task.first
        heapq.heappush(self._later, (now + wait, next(self._serial), task))
        return True

    def _answer(self, task: _Task, answer: Fetched) -> None:
        if task.batch is None:
            for parked in self._robots.learn(task.first, answer):
                self._queue(parked)
        else:
            self._give(task.batch, task.position, answer)

    def _give(self, batch: _Batch, position: int, answer: Fetched) -> None:
        with self._lock:
            if not batch.abandoned:
                self._held += len(answer.body)
                self._waiting += 1
                batch.answers.put((position, answer))

    def _relieve(self) -> None:
        """Put the youngest requests back while memory is short; once so, half as many are to be under way."""
        short = False
        while self._held + self._transport.received > self._memory and len(self._transport.flying) > 1:
            short = True
            youngest = next(reversed(self._transport.flying))
            task: _Task = youngest.owner
            self._transport.cancel(youngest)
            host = self._hosts[task.target.host]
            host.active -= 1
            host.waiting.appendleft(task)
            self._make_ready(host)
        if short:
            self._pace.squeeze()

    def _read_object(self, task: _Task) -> None:
        """In a thread; the answer comes in through the inbox."""
        self._inbox.append((task, read_object(task.target.url, self.config.max_bytes)))
        self._transport.wake()

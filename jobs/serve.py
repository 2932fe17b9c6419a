"""serve: the published indices over HTTP, on Ray Serve.

Serve starts the replicas, watches their health, replaces one that died and ends them. Requests go straight to them:
each listens on the service's port itself (SO_REUSEPORT), with no proxy between (docs/decisions/0013-serving.md).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any

from jobs.base import command, only_encoder
from pipeline.engine import Engine
from pipeline.ledger import Run
from pipeline.workspace import Workspace
from schemas.configs import ServeConfig
from schemas.errors import ClipmillError, UsageError

_GRACE = 5.0
"""Seconds that a replica has, beyond the time limit of a request, to end."""
_LINES = 200
_ASKED_EVERY = 2.0


class Replica:
    """One process of the service: the collections, and an HTTP server in a thread.

    An error at the start is kept for :meth:`error`, since Serve would hand on its text alone, after twenty tries.
    """

    def __init__(self, config: ServeConfig, encoders: Sequence[str], port: int, threads: int) -> None:
        # Before FAISS and torch are loaded: their threads are of this process, and not to spin while they wait.
        os.environ.update(OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE")
        self._log = _Log()
        logging.getLogger("pipeline.service").addHandler(self._log)
        self._failure: ClipmillError | None = None
        self._server: Any = None
        try:
            self._server = self._started(config, encoders, port)
        except ClipmillError as exc:
            self._failure = exc

    def _started(self, config: ServeConfig, encoders: Sequence[str], port: int) -> Any:
        from jobs.fetching import clean_image
        from pipeline.collection import Collection
        from pipeline.service import Server, Source, bind, create_app

        workspace = Workspace(config.workspace)
        opened = partial(Collection, workspace, clean=clean_image)
        source = Source(workspace.indexed_encoders, opened) if config.encoder is None else None
        settings = replace(options(config, workspace, str(os.getpid())), source=source)
        app = create_app({encoder: opened(encoder) for encoder in encoders}, settings)
        server = Server(app, bind(config.host, port), config.timeout)
        server.start()
        return server

    def error(self) -> ClipmillError | None:
        """Why it could not start, or None."""
        return self._failure

    def news(self) -> list[str]:
        """What it has logged since it was last asked."""
        return self._log.taken()

    def check_health(self) -> None:
        """Asked by Serve. A replica that could not start is left as it is: the driver ends with its error."""
        if self._server is not None and not self._server.alive:
            raise RuntimeError("the HTTP server has ended")

    def __del__(self) -> None:
        """Called by Serve when the replica is to end."""
        if getattr(self, "_server", None) is not None:
            self._server.stop()


class _Log(logging.Handler):
    """Keeps the last lines for the driver: a worker's own output goes nowhere."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[str] = deque(maxlen=_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))

    def taken(self) -> list[str]:
        lines = []
        while self._lines:
            lines.append(self._lines.popleft())
        return lines


def options(config: ServeConfig, workspace: Workspace, replica: str) -> Any:
    """The service's options, out of the job's config."""
    from jobs.fetching import fetch_image
    from pipeline.service import Options, is_loopback

    names = {"localhost", "127.0.0.1", "[::1]", config.host.lower()}
    return Options(
        token=config.token,
        hosts=frozenset(names) if is_loopback(config.host) else None,
        max_k=config.max_k,
        max_batch=config.max_batch,
        max_bytes=config.max_bytes,
        timeout=config.timeout,
        concurrency=config.concurrency,
        deletions=config.deletions,
        workspace=workspace,
        fetch=partial(fetch_image, allow_hosts=config.allow_hosts),
        warm=True,
        replica=replica,
    )


@dataclass
class Service:
    """A service that is up."""

    url: str
    port: int
    handle: Any
    asked_to_stop: threading.Event = field(default_factory=threading.Event)
    signal: int | None = None

    def wait(self) -> None:
        """Until SIGTERM or Ctrl-C; meanwhile what the replicas log goes to stderr."""
        with self._signals():
            while not self.asked_to_stop.wait(_ASKED_EVERY):
                for line in self._news():
                    print(line, file=sys.stderr, flush=True)

    def _news(self) -> list[str]:
        try:
            lines: list[str] = self.handle.news.remote().result(timeout_s=_ASKED_EVERY)
        except Exception:  # a replica that is busy, or has just died: Serve looks after it
            return []
        return lines

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal ends the service in order; the next one as it ends any job."""
        before: dict[int, Any] = {}

        def stop(number: int, _: FrameType | None) -> None:
            self.signal = number
            self.asked_to_stop.set()
            for one, handler in before.items():
                signal.signal(one, handler)

        for name in (signal.SIGINT, signal.SIGTERM):
            before[name] = signal.signal(name, stop)
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


@contextlib.contextmanager
def serving(config: ServeConfig, run: Run, engine: Engine) -> Iterator[Service]:
    """The service, up and listening, until the block ends; requests under way are answered before it does.

    Raises:
        UsageError: no such index, an address that needs a token, or one that cannot be listened on.
        ClipmillError: what kept a replica from opening its indices.
    """
    from pipeline.service import bind, is_loopback, require_free

    workspace = run.workspace.require()
    encoders = _encoders(config, run)
    _check_token(config, is_loopback(config.host))
    require_free(config.host, config.port)
    with contextlib.closing(bind(config.host, config.port)) as reserved:  # kept, so that nobody else takes the port
        port = int(reserved.getsockname()[1])
        name = f"clipmill-{port}"
        host = f"[{config.host}]" if ":" in config.host else config.host
        try:
            with run.stage("start"):
                engine.start()
                handle = _deploy(config, encoders, port, name)
            cards = {encoder: workspace.published_index(encoder) for encoder in encoders}
            run.figures |= {
                "url": f"http://{host}:{port}", "host": config.host, "port": port, "replicas": config.replicas,
                "indices": {encoder: card.version for encoder, card in cards.items() if card is not None},
            }  # fmt: skip
            yield Service(run.figures["url"], port, handle)
        finally:
            with run.stage("stop"):
                _remove(name, joined=engine.address is not None)


def _encoders(config: ServeConfig, run: Run) -> list[str]:
    """Ids of the encoders whose indices are served. Raises UsageError for none."""
    known = run.workspace.indexed_encoders()
    if config.encoder is not None or not known:
        return [only_encoder(run, config.encoder, known, "index")]
    return known


def _check_token(config: ServeConfig, loopback: bool) -> None:
    """Raises UsageError for an address that others reach without one, and for a token that no header can hold."""
    if config.token is None and not loopback:
        raise UsageError(
            f"--host {config.host} is open to others, and there is no token",
            expected="--token TOKEN, or CLIPMILL_TOKEN in the environment",
            remedy="give one, or leave out --host to be reached from this machine alone",
        )
    token = config.token
    if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
        raise UsageError("--token cannot be sent in a header", expected="printable ASCII without spaces")


def _deploy(config: ServeConfig, encoders: list[str], port: int, name: str) -> Any:
    """Start the replicas and wait until they listen. Returns Serve's handle to them."""
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from pipeline.service import is_loopback

    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled", logging_config=quiet)
    cpus = os.cpu_count() or 1
    needs: dict[str, Any] = {"num_cpus": min(1.0, cpus / config.replicas), "num_gpus": config.gpus_per_worker}
    if is_loopback(config.host):  # on another node nobody here would reach it
        needs["resources"] = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    deployment = serve.deployment(
        name="replica",
        num_replicas=config.replicas,
        ray_actor_options=needs,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=config.timeout + _GRACE,
        health_check_period_s=2,
        max_constructor_retry_count=2,
        logging_config=quiet,
    )(Replica)
    # With 32 clients on two cores, 500,000 x 512: 1,000 queries a second; 840 where one core is left to HTTP.
    threads = max(1, cpus // config.replicas)
    try:
        handle = serve.run(deployment.bind(config, encoders, port, threads), name=name, route_prefix=None)
    except RuntimeError as exc:
        raise ClipmillError(
            "the service does not start", actual=str(exc), remedy="the log of Ray Serve says more"
        ) from exc
    error = handle.error.remote().result(timeout_s=60)
    if error is not None:
        raise error
    return handle


def _remove(name: str, *, joined: bool) -> None:
    """End the replicas; on a cluster that was joined Serve, too, where nothing else runs on it. (Ours ends itself.)"""
    import ray
    from ray import serve

    if not ray.is_initialized():
        return
    with contextlib.suppress(Exception):  # it may not be up, or the cluster be gone
        serve.delete(name)
        if joined and not serve.status().applications:
            serve.shutdown()


def run(config: ServeConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`ServeConfig`. Returns after SIGTERM; after Ctrl-C it is interrupted."""
    with serving(config, run, engine) as service:
        print(f"serving {', '.join(run.figures['indices'])} at {service.url}", file=sys.stderr, flush=True)
        service.wait()
    if service.signal == signal.SIGINT:
        raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill serve``."""
    return command("serve", ServeConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())

"""The limit of downloading: our client and codec in one process, without tables, Ray, ledger or back-pressure.

    python -m benchmarks.lab.bare PAIRS.csv HOST:PORT,... [--no-keep-original]

The main thread turns the client, as many threads as cores decode; an image is dropped once it is encoded.
Prints ``{"stored": N}``.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from pipeline.download.pictures.images import ImageStage
from pipeline.download.web.answers import wants_body
from pipeline.download.web.policy import Policy
from pipeline.download.web.transport import Exchange, Transport
from schemas.configs import DownloadConfig
from schemas.errors import Reason

_FLYING = 64
_WAITING = 256
"""Bodies that may wait to be decoded: this much back-pressure even a bare loop needs."""


def fetch(urls: Sequence[str], config: DownloadConfig, waiting: set[Future[int]]) -> Iterator[bytes]:
    """The bodies of ``urls`` as they arrive; whatever fails is left out."""
    policy = Policy.of(config)
    transport = Transport(
        judge=policy.check_address, wants=partial(wants_body, policy), user_agent=config.user_agent,
        per_host=config.per_host, places=_FLYING, http2=config.http2,
    )  # fmt: skip
    todo = iter(urls)
    more = True
    while more or transport.flying:
        while more and len(transport.flying) < _FLYING and len(waiting) < _WAITING:
            if url := next(todo, None):
                transport.start(Exchange(policy.check_url(url), config.timeout, config.max_bytes))
            else:
                more = False
        for exchange in transport.turn(0.1):
            if exchange.reason is Reason.OK and exchange.status == 200:
                yield bytes(exchange.body)
    transport.close()


def main() -> int:
    pairs, allowed, *options = sys.argv[1:]
    config = DownloadConfig(allow_hosts=tuple(allowed.split(",")), keep_original="--no-keep-original" not in options)
    with Path(pairs).open(newline="") as file:
        urls = [row["url"] for row in csv.DictReader(file)]
    stage = ImageStage(config)
    stored, waiting = [0], set[Future[int]]()

    def done(future: Future[int]) -> None:
        waiting.discard(future)
        stored[0] += future.result()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for body in fetch(urls, config, waiting):
            future = pool.submit(lambda body=body: bool(stage(body).image))
            waiting.add(future)
            future.add_done_callback(done)
    print(json.dumps({"stored": stored[0]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

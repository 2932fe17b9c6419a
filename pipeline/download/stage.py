"""The stage: a shard of pairs -> as many rows of the table images."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any

import pyarrow as pa

from pipeline.download.fetch import Fetched, fetch_all
from pipeline.download.images import ImageStage
from pipeline.download.policy import Policy, Refused
from schemas.configs import DownloadConfig
from schemas.errors import Reason
from schemas.tables import IMAGES


class DownloadStage:
    """(pair_key, url, caption, attempts) -> the same keys as rows of images, each ok or with its reason."""

    def __init__(self, config: DownloadConfig, run: str) -> None:
        self.config, self.run = config, run
        self._image = ImageStage(config)
        self._policy = Policy(
            allow_hosts=frozenset(h.lower() for h in config.allow_hosts),
            max_bytes=config.max_bytes,
            max_redirects=config.max_redirects,
            timeout=config.timeout,
            retries=config.retries,
            respect_opt_out=config.respect_opt_out,
            user_agent=config.user_agent,
        )

    def __call__(self, pairs: pa.Table) -> pa.Table:
        return asyncio.run(self._shard(pairs.to_pylist()))

    async def _shard(self, pairs: list[dict[str, Any]]) -> pa.Table:
        rows: list[dict[str, Any]] = []
        urls = [p["url"] for p in pairs]
        async for i, fetched in fetch_all(urls, self._policy, self.config.concurrency, self.config.per_host):
            rows.append(self._row(pairs[i], fetched))
        rows.sort(key=lambda row: row["pair_key"])
        return pa.Table.from_pylist(rows, schema=IMAGES.schema)

    def _row(self, pair: dict[str, Any], fetched: Fetched) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(IMAGES.schema.names)
        reason, error = fetched.reason, fetched.error
        if reason is Reason.OK:
            try:
                stored = self._image(fetched.body)
                row |= vars(stored) | {"format": self.config.format}
            except Refused as exc:
                reason, error = exc.reason, exc.detail
        return row | {
            "pair_key": pair["pair_key"],
            "url": pair["url"],
            "caption": pair["caption"],
            "status": str(reason),
            "error": error,
            "http_status": fetched.http_status,
            "attempts": pair["attempts"] + 1,
            "retryable": reason.retryable,
            "fetched_at": dt.datetime.now(dt.UTC),
            "run": self.run,
        }

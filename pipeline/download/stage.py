"""The stage: a shard of pairs -> as many rows of the table images."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pyarrow as pa

from pipeline.download.captions import CaptionFilter
from pipeline.download.pictures.images import ImageStage
from pipeline.download.web.answers import Fetched
from pipeline.download.web.fetch import Fetcher, Request
from pipeline.download.web.policy import Refused
from schemas.configs import DownloadConfig
from schemas.errors import Reason
from schemas.tables import IMAGES

_EMPTY = dict.fromkeys(IMAGES.schema.names)


class DownloadStage:
    """Rows of :data:`schemas.tables.SHARD` -> rows of images with the same keys, in their order, ok or with a reason.

    A row that was not modified (304) comes back without an image: ``status`` ok, ``http_status`` 304.
    Threads of one process may call it at once: they share the fetcher, and each decodes its own shard's images.
    """

    def __init__(self, config: DownloadConfig, run: str) -> None:
        self.config, self.run = config, run
        self._image = ImageStage(config)
        self._fetcher = Fetcher(config)
        self._filter = CaptionFilter(config)

    def __call__(self, pairs: pa.Table) -> pa.Table:
        rows, fetch = [], []
        for pair in pairs.to_pylist():
            if refusal := self._refusal(pair):
                rows.append(self._row(pair, refusal))
            else:
                fetch.append(pair)
        requests = [Request(p["url"], p["etag"], p["last_modified"]) for p in fetch]
        rows += [self._row(fetch[i], answer) for i, answer in self._fetcher.fetch_all(requests)]
        rows.sort(key=lambda row: row["pair_key"])
        return pa.Table.from_pylist(rows, schema=IMAGES.schema)

    def close(self) -> None:
        """End the fetching thread."""
        self._fetcher.close()

    def _refusal(self, pair: dict[str, Any]) -> Fetched | None:
        """Why a pair is not fetched at all."""
        if pair["problem"] is not None:
            reason, _, detail = pair["problem"].partition(": ")
            return Fetched(Reason(reason), error=detail)
        why = self._filter(pair["caption"])
        return Fetched(Reason.CAPTION_FILTERED, error=why) if why else None

    def _row(self, pair: dict[str, Any], answer: Fetched) -> dict[str, Any]:
        row: dict[str, Any] = dict(_EMPTY)
        reason, error = answer.reason, answer.error
        if reason is Reason.OK and not answer.not_modified:
            try:
                row |= vars(self._image(answer.body))
            except Refused as exc:
                reason, error = exc.reason, exc.detail
        now = dt.datetime.now(dt.UTC)
        wait = answer.retry_after if reason.retryable else None
        return row | {
            "pair_key": pair["pair_key"],
            "url": pair["url"],
            "caption": pair["caption"],
            "status": str(reason),
            "error": error,
            "http_status": answer.http_status,
            "attempts": pair["attempts"] + 1,
            "retryable": reason.retryable,
            "original_bytes": len(answer.body) or None,
            "etag": answer.etag,
            "last_modified": answer.last_modified,
            "fetched_at": now,
            "not_before": None if wait is None else now + dt.timedelta(seconds=wait),
            "run": self.run,
        }

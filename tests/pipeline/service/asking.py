"""A service on an ephemeral port over a small real workspace, and asking it over HTTP."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.base import execute
from jobs.index import run as index_body
from pipeline.collection import Collection
from pipeline.engine import Engine
from pipeline.service import Options, Server, Source, bind, create_app
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.configs import IndexConfig
from schemas.vectors import unpack

VECTORS = {"image": "image_vec", "text": "text_vec"}


@dataclass
class Answer:
    """Status, headers (lower case) and body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Client:
    """Asks one service; every request has a connection of its own."""

    port: int
    headers: dict[str, str] = field(default_factory=dict)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, data, self.headers | named)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def search(self, *terms: dict[str, Any], **options: Any) -> Answer:
        return self.ask("POST", "/v1/search", {"terms": terms, **options})

    def keys(self, *terms: dict[str, Any], **options: Any) -> list[int]:
        answer = self.search(*terms, **options)
        assert answer.status == 200, answer.body
        return [int(r["key"]) for r in answer.json["results"]]


@contextmanager
def serving(workspace: Workspace, **options: Any) -> Iterator[Client]:
    """The app over all indices of a workspace, in this process."""
    opened = partial(Collection, workspace)
    source = Source(workspace.indexed_encoders, opened)
    settings = Options(**{"workspace": workspace, "timeout": 20.0, "refresh": 0.05, "source": source} | options)
    collections = {name: opened(name) for name in workspace.indexed_encoders()}
    bound = bind("127.0.0.1", 0)
    server = Server(create_app(collections, settings), bound, grace=5)
    port = bound.getsockname()[1]
    server.start()
    try:
        yield Client(port)
    finally:
        server.stop()


def index(workspace: Workspace, **options: Any) -> None:
    """Publish what the workspace holds now."""
    config = IndexConfig(workspace=str(workspace.root), audit=0, **options)
    with Engine() as engine:
        execute("index", config, index_body, engine)


def vectors(workspace: Workspace, card: EncoderCard, modality: str = "image") -> dict[int, NDArray[np.float32]]:
    """Key -> unit vector, as the table embeddings has them."""
    rows = workspace.table("embeddings").read(["pair_key", VECTORS[modality]])
    matrix = unpack(rows.column(1), card.dim).astype(np.float32)
    return dict(zip(rows["pair_key"].to_pylist(), matrix, strict=True))


def nearest(known: dict[int, NDArray[np.float32]], query: NDArray[np.float32], k: int) -> list[int]:
    """The k keys of the largest inner products, by brute force."""
    return sorted(known, key=lambda key: -float(known[key] @ query))[:k]


def at_once(number: int, work: Any, items: list[Any]) -> list[Any]:
    """``work`` of every item, from several threads."""
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(work, items))


def folder_of(workspace: Workspace) -> Path:
    return Path(str(workspace.root))

"""The job serve on Ray: refusals before anything starts; then a service with a swap and a deletion under load."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve as ray_serve

from jobs import serve
from pipeline.engine import Engine
from pipeline.ledger import Run
from pipeline.workspace import Workspace
from schemas.configs import ServeConfig
from schemas.errors import CardError
from tests.jobs.embedded import embed_directly, workspace_with_vectors
from tests.kills import add_images, image_row, save_clip
from tests.pipeline.models.test_clip import TINY
from tests.pipeline.service.asking import Client, index

N = 40


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), TINY)


@pytest.fixture
def workspace(tmp_path: Path, clip: Path) -> Workspace:
    made, _ = workspace_with_vectors(tmp_path / "ws", clip, N)
    index(made)
    return made


def test_refused_before_anything_starts(
    tmp_path: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*flags: str, at: Workspace = workspace) -> dict[str, Any]:
        assert serve.main(["--workspace", str(at.root), "--json", *flags]) == 2
        return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))

    assert "no token" in refused("--host", "0.0.0.0")["error"]
    assert "no token" in refused("--host", "::")["error"]
    assert "header" in refused("--token", "two words")["error"]
    assert "no index" in refused("--encoder", "another")["error"]
    empty = Workspace(tmp_path / "empty").prepare()
    add_images(empty, [1])
    assert "no index" in refused(at=empty)["error"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot listen" in refused("--port", str(taken.getsockname()[1]))["error"]


@pytest.fixture
def with_serve(engine: Engine) -> Iterator[Engine]:
    yield engine
    ray_serve.shutdown()  # of the session's Ray


def test_swap_and_delete_under_load(workspace: Workspace, clip: Path, with_serve: Engine) -> None:
    config = ServeConfig(workspace=str(workspace.root), port=0, deletions=True)
    run = Run(workspace, "serve", config)
    gone, new = image_row(3)["pair_key"], image_row(N)["pair_key"]
    encoder = workspace.indexed_encoders()[0]
    failed: list[Any] = []
    seen: list[tuple[bool, str, set[int]]] = []
    deleted, stop = threading.Event(), threading.Event()

    def load(client: Client) -> None:
        while not stop.is_set():
            after = deleted.is_set()
            answer = client.search({"text": "a"}, k=N + 1)
            if answer.status == 200:
                keys = {int(r["key"]) for r in answer.json["results"]}
                seen.append((after, answer.json["version"], keys))
            else:
                failed.append(answer)
            time.sleep(0.005)

    with run, serve.serving(config, run, with_serve) as service:
        assert service.url == f"http://127.0.0.1:{service.port}" and run.figures["port"] == service.port
        client = Client(service.port)
        while client.ask("GET", "/readyz").status != 200:
            time.sleep(0.02)
        before = client.search({"text": "a"}).json["version"]
        threads = [threading.Thread(target=load, args=(client,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            assert client.ask("DELETE", f"/v1/images/{gone}").status == 200
            deleted.set()
            add_images(workspace, [N])
            embed_directly(workspace, clip, run="later")
            index(workspace)
            published = workspace.published_index(encoder)
            assert published is not None and published.version != before
            while {version for _, version, _ in seen[-20:]} != {published.version} and not failed:
                time.sleep(0.02)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        service.wait()
        assert service.signal == signal.SIGTERM
    assert failed == []
    assert all(gone not in keys for after, _, keys in seen if after)
    assert {len(keys) for after, version, keys in seen if after and version == before} <= {N - 1}
    assert all(new in keys and len(keys) == N for _, version, keys in seen if version == published.version)
    with pytest.raises(ConnectionError):
        client.ask("GET", "/healthz")
    assert run.outcome == "done"


def test_what_keeps_a_replica_from_starting_is_kept_for_the_job(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):  # a replica sets them, in a process of its own
        monkeypatch.setenv(name, os.environ.get(name, ""))
    encoder = workspace.indexed_encoders()[0]
    card = workspace.published_index(encoder)
    assert card is not None
    file = workspace.index_dir(encoder) / card.version / card.file("image").path
    file.write_bytes(file.read_bytes()[:-4])
    replica = serve.Replica(ServeConfig(workspace=str(workspace.root)), [encoder], 0, 1)
    assert isinstance(replica.error(), CardError) and file.name in str(replica.error())
    logging.getLogger("pipeline.service.guard").error("so it failed")
    assert (replica.news(), replica.news()) == (["so it failed"], [])
    replica.check_health()  # it is not to be started again and again

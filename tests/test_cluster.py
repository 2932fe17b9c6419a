"""Three nodes give the same tables as one: download and embed, as commands that join a cluster."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import download, embed
from jobs.base import execute
from jobs.demo.server import FileServer
from pipeline.engine import Engine
from pipeline.workspace import Workspace
from schemas.configs import DownloadConfig, EmbedConfig
from tests.pipeline.models.test_encoder import folder

__all__ = ["folder"]

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
for _ in range(2):
    cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
PAIRS = 90


@pytest.fixture
def cluster() -> Iterator[tuple[str, dict[str, str]]]:
    """Address of three nodes of one CPU each, and the environment with their token."""
    environment = os.environ | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment.pop("RAY_AUTH_TOKEN_PATH", None)
    with tempfile.TemporaryDirectory(prefix="cmc-") as temp:
        environment["RAY_TMPDIR"] = temp
        command = [sys.executable, "-c", CLUSTER]
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), environment
        finally:
            process.communicate(timeout=60)


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A list of pairs, one of them dead, and the address of their server."""
    (tmp_path / "files").mkdir()
    rng = np.random.default_rng(0)
    for i in range(PAIRS - 1):
        pixels = rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "files" / f"{i}.png")
    with FileServer(tmp_path / "files", 0) as server:
        host = f"127.0.0.1:{server.port}"
        urls = [f"http://{host}/{i}.png" for i in range(PAIRS)]
        pq.write_table(
            pa.table({"url": urls, "caption": [f"picture {i}" for i in range(PAIRS)]}), tmp_path / "p.parquet"
        )
        yield tmp_path / "p.parquet", host


def clipmill(environment: dict[str, str], *arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments, "--json"],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return summary


def rows(workspace: Workspace, table: str, drop: tuple[str, ...]) -> list[dict[str, object]]:
    return workspace.table(table).read().drop_columns(list(drop)).sort_by("pair_key").to_pylist()


def one_node(workspace: Workspace, file: Path, host: str, encoder: Path, engine: Engine) -> None:
    """The same jobs in this process, on the session's Ray."""
    download_config = DownloadConfig(
        workspace=str(workspace.root),
        pairs=(str(file),),
        allow_hosts=(host,),
        shard_size=10,
        image_size=16,
        format="png",
    )
    execute("download", download_config, download.run, engine)
    embed_config = EmbedConfig(
        workspace=str(workspace.root), encoder=f"local-dir:{encoder}", shard_size=10, batch_size=10
    )
    execute("embed", embed_config, embed.run, engine)


@pytest.mark.slow
def test_three_nodes_give_the_tables_of_one(
    cluster: tuple[str, dict[str, str]], pairs: tuple[Path, str], folder: Path, tmp_path: Path, engine: Engine
) -> None:
    address, environment = cluster
    file, host = pairs
    one, three = Workspace(tmp_path / "one"), Workspace(tmp_path / "three")
    one_node(one, file, host, folder, engine)

    where = ["--workspace", str(three.root), "--address", address, "--shard-size", "10"]
    sizes = ["--image-size", "16", "--format", "png"]
    done = clipmill(environment, "download", *where, *sizes, "--pairs", str(file), "--allow-hosts", host)
    assert done["counts"] == {"in": PAIRS, "out": PAIRS - 1, "failed": 1}
    done = clipmill(environment, "embed", *where, "--encoder", f"local-dir:{folder}", "--batch-size", "10")
    assert done["counts"] == {"in": PAIRS - 1, "out": PAIRS - 1, "failed": 0}

    images = [rows(w, "images", ("run", "fetched_at")) for w in (one, three)]
    assert images[0] == images[1]
    embeddings = [rows(w, "embeddings", ("run", "similarity", "image_vec", "text_vec")) for w in (one, three)]
    assert embeddings[0] == embeddings[1]
    assert [r["pair_key"] for r in embeddings[0]] == [r["pair_key"] for r in images[0] if r["status"] == "ok"]
    for column in ("image_vec", "text_vec"):
        vectors = [w.table("embeddings").read().sort_by("pair_key")[column].to_pylist() for w in (one, three)]
        a, b = (np.frombuffer(b"".join(v), "<f2").astype(np.float32) for v in vectors)
        np.testing.assert_allclose(a, b, atol=2e-3)

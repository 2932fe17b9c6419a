"""Embed, night after night: only what is new costs anything, encoders do not mix, a killed run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from jobs.base import execute
from jobs.cli import main
from jobs.embed import run as embed_body
from pipeline.engine import Engine
from pipeline.models.encoder import Encoder
from pipeline.workspace import Workspace
from schemas.configs import EmbedConfig
from schemas.tables import IMAGES, TABLES
from tests.kills import add_images, image_row, save_clip
from tests.pipeline.models.test_clip import TINY


def embed(engine: Engine, ws: Path, clip: Path, **settings: Any) -> dict[str, Any]:
    """One run with the encoder in the folder ``clip``; the object that ``--json`` prints."""
    config = {"workspace": str(ws), "encoder": f"local-dir:{clip}", "workers": 1, "shard_size": 16} | settings
    return execute("embed", EmbedConfig.model_validate(config), embed_body, engine).summary()


def versions(ws: Path) -> dict[str, int]:
    return {name: Workspace(ws).table(name).version() for name in TABLES}


def rows(ws: Path, encoder: str) -> dict[int, dict[str, Any]]:
    """Rows of one encoder by key, none of them twice."""
    found = [row for row in Workspace(ws).table("embeddings").read().to_pylist() if row["encoder"] == encoder]
    by_key = {row["pair_key"]: row for row in found}
    assert len(by_key) == len(found)
    return by_key


def keys(numbers: Iterable[int]) -> set[int]:
    return {image_row(number)["pair_key"] for number in numbers}


def vectors(row: dict[str, Any]) -> np.ndarray[Any, Any]:
    """[2, D]: image and caption."""
    both = np.frombuffer(row["image_vec"] + row["text_vec"], "<f2").astype(np.float32)
    return both.reshape(2, -1)


def check_against_encoder(found: dict[int, dict[str, Any]], clip: Path, images: list[dict[str, Any]]) -> None:
    """Each row is what the encoder, used directly, makes of its image and caption."""
    encoder = Encoder(f"local-dir:{clip}")
    assert found.keys() == {image["pair_key"] for image in images}
    pictures, texts = encoder.images([i["image"] for i in images]), encoder.texts([i["caption"] for i in images])
    for image, picture, text in zip(images, pictures, texts, strict=True):
        row = found[image["pair_key"]]
        np.testing.assert_allclose(vectors(row), [picture, text], atol=1e-3)  # float16 of a unit vector
        assert row["similarity"] == pytest.approx(float(picture @ text), abs=1e-4)
        assert (row["caption"], row["sha256"]) == (image["caption"], image["sha256"])


@pytest.mark.slow
def test_nightly(engine: Engine, tmp_path: Path) -> None:
    """10% new pairs cost 10% of the forwards, nothing new none, a changed image one."""
    ws, clip = tmp_path / "ws", save_clip(tmp_path / "clip", TINY)
    add_images(Workspace(ws), range(60))
    first = embed(engine, ws, clip)
    encoder = first["encoder"]
    assert first["counts"] == {"in": 60, "out": 60, "failed": 0}
    assert (first["images_encoded"], first["texts_encoded"]) == (60, 60)
    night1 = rows(ws, encoder)

    add_images(Workspace(ws), range(60, 66))
    second = embed(engine, ws, clip)
    assert second["counts"] == {"in": 6, "out": 6, "failed": 0}
    assert (second["images_encoded"], second["texts_encoded"]) == (6, 6)
    night2 = rows(ws, encoder)
    assert {key for key, row in night2.items() if row["run"] == second["run"]} == keys(range(60, 66))
    assert {key: night2[key] for key in night1} == night1, "what was there is untouched"

    before = versions(ws)
    third = embed(engine, ws, clip)
    assert (third["outcome"], third["counts"]) == ("done", {"in": 0, "out": 0, "failed": 0})
    assert (third["images_encoded"], third["texts_encoded"]) == (0, 0)
    assert versions(ws) == before, "nothing to do commits nothing"

    changed = image_row(7, picture=1007)
    assert changed["pair_key"] == image_row(7)["pair_key"] and changed["sha256"] != image_row(7)["sha256"]
    Workspace(ws).table("images").upsert(pa.Table.from_pylist([changed], schema=IMAGES.schema), "refresh")
    fourth = embed(engine, ws, clip)
    assert fourth["counts"] == {"in": 1, "out": 1, "failed": 0}
    assert fourth["images_encoded"] == 1 and fourth["texts_encoded"] <= 1
    night4 = rows(ws, encoder)
    assert night4[changed["pair_key"]]["run"] == fourth["run"]
    assert {k: r for k, r in night4.items() if k != changed["pair_key"]} == {
        k: r for k, r in night2.items() if k != changed["pair_key"]
    }
    check_against_encoder(night4, clip, [changed if n == 7 else image_row(n) for n in range(66)])
    assert embed(engine, ws, clip)["images_encoded"] == 0, "once"


@pytest.mark.slow
def test_two_encoders_do_not_mix(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two in one workspace, one of them indexed: a query with the other is refused, both named."""
    ws, one, other = tmp_path / "ws", save_clip(tmp_path / "one", TINY), save_clip(tmp_path / "other", TINY, seed=1)
    images = [image_row(n) for n in range(12)]
    add_images(Workspace(ws), range(12))
    a, b = (embed(engine, ws, clip)["encoder"] for clip in (one, other))
    assert a != b
    for encoder, clip in ((a, one), (b, other)):
        check_against_encoder(rows(ws, encoder), clip, images)
    assert main(["index", "--workspace", str(ws), "--encoder", a]) == 0
    query = ["query", "--workspace", str(ws), "--text", "picture 3"]

    assert main([*query, "--encoder", a, "--json"]) == 0
    capsys.readouterr()
    assert main([*query, "--encoder", b]) == 2
    told = capsys.readouterr().err
    assert a in told and b in told

    # The same name, other weights: what is loaded counts, not what it is called.
    weights = "open_clip_model.safetensors"
    (one / weights).write_bytes((other / weights).read_bytes())
    assert main([*query, "--encoder", a]) == 1
    told = capsys.readouterr().err
    assert told.startswith("EncoderMismatch")
    assert a in told and b.rsplit("-", 1)[1] in told, "the index's encoder, and the weights that came"


@pytest.mark.slow
def test_killed_and_begun_again(engine: Engine, tmp_path: Path) -> None:
    """kill -9 of the driver once something is committed; the next run does the rest. More: python -m tests.kills."""
    ws, clip = tmp_path / "ws", save_clip(tmp_path / "clip", TINY)
    images = [image_row(n) for n in range(200)]
    add_images(Workspace(ws), range(200))
    command = ["embed", "--workspace", str(ws), "--encoder", f"local-dir:{clip}", "--shard-size", "10"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *command, "--address", ray.get_runtime_context().gcs_address],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_commits(ws / "tables" / "embeddings", 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = Workspace(ws).table("embeddings").count()
    assert 0 < kept < 200
    again = embed(engine, ws, clip)
    assert again["counts"] == {"in": 200 - kept, "out": 200 - kept, "failed": 0}
    assert again["images_encoded"] == 200 - kept, "what was committed is not embedded again"
    check_against_encoder(rows(ws, again["encoder"]), clip, images)
    runs = Workspace(ws).table("runs").read().sort_by("started")
    assert runs["outcome"].to_pylist() == ["killed", "done"]


def wait_for_commits(table: Path, number: int, process: subprocess.Popen[str]) -> None:
    """Until the table's log holds so many versions beside its first, which has no rows."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if len(list((table / "_delta_log").glob("*.json"))) > number:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError("nothing was committed")

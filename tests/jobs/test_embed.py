"""The job embed: what is marked, replaced, scored and recorded; others at work on the tables; full disks; damage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

import jobs.embed
import pipeline.encoders
from jobs.base import execute
from jobs.embed import _shard_size
from jobs.embed_workers import EmbedWorker, Order
from pipeline.embed.stage import IMAGE_COLUMNS, EmbedStage
from pipeline.engine import Done, Engine
from pipeline.ledger import Run
from pipeline.models.encoder import Encoder
from pipeline.models.heads import save_head
from pipeline.workspace import Workspace
from schemas.configs import EmbedConfig
from schemas.errors import EncoderMismatch, UsageError, WorkspaceError
from schemas.tables import IMAGES, TABLES
from tests.kills import image_row, save_clip
from tests.pipeline.models.test_clip import TINY
from tests.pipeline.test_tables import fill, tmpfs


class Here:
    """An engine without Ray: one worker of each kind, in this process."""

    def slots(self, _: Any) -> int:
        return 1

    def map(
        self, factory: Callable[[], Any], shards: Iterable[Any], resources: Any = None, *, prepare: Any = None
    ) -> Iterator[Done[Any, Any]]:
        stages: list[Any] = []
        for shard in shards:
            stages = stages or [*([prepare[0]()] if prepare else []), factory()]
            result = shard
            for stage in stages:
                result = stage(result)
            yield Done(shard, result)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), TINY)


@pytest.fixture(scope="module")
def encoder(clip: Path) -> Encoder:
    return Encoder(f"local-dir:{clip}")


def add(ws: Path, *rows: dict[str, Any]) -> None:
    """One file of images."""
    Workspace(ws).table("images").append(pa.Table.from_pylist(list(rows), schema=IMAGES.schema), "download")


def change(ws: Path, *rows: dict[str, Any]) -> None:
    Workspace(ws).table("images").upsert(pa.Table.from_pylist(list(rows), schema=IMAGES.schema), "refresh")


@pytest.fixture
def ws(tmp_path: Path) -> Path:
    """30 images in files of 1, 2, 7 and 20."""
    rows = [image_row(n) for n in range(30)]
    for start, end in ((0, 1), (1, 3), (3, 10), (10, 30)):
        add(tmp_path / "ws", *rows[start:end])
    return tmp_path / "ws"


def embed(ws: Path, clip: Path, engine: Any = None, **settings: Any) -> Run:
    config = {"workspace": str(ws), "encoder": f"local-dir:{clip}", "shard_size": 8, "batch_size": 5, "workers": 1}
    given = EmbedConfig.model_validate(config | settings)
    return execute("embed", given, jobs.embed.run, engine or Here())


def rows(ws: Path, *columns: str) -> dict[int, dict[str, Any]]:
    """Rows of embeddings by key, none twice."""
    names = ["pair_key", "image_vec", "text_vec", "sha256", "run", *columns]
    found = Workspace(ws).table("embeddings").read(names).to_pylist()
    assert len({row["pair_key"] for row in found}) == len(found)
    return {row["pair_key"]: row for row in found}


def versions(ws: Path) -> dict[str, int]:
    return {name: Workspace(ws).table(name).version() for name in TABLES}


def check(ws: Path, encoder: Encoder, images: list[dict[str, Any]]) -> None:
    """Exactly these images' rows, with the vectors of each on its own."""
    found = rows(ws)
    assert found.keys() == {image["pair_key"] for image in images}
    for image in images:
        row = found[image["pair_key"]]
        assert row["sha256"] == image["sha256"]
        vector = np.frombuffer(row["image_vec"], "<f2").astype(np.float32)
        np.testing.assert_allclose(vector, encoder.images([image["image"]])[0], atol=1e-3)


def during(monkeypatch: pytest.MonkeyPatch, what: Callable[[], Any]) -> None:
    """Do something once, in the middle of a run: a shard is embedded, and about to be committed."""
    real, left = jobs.embed.Tally.add, [what]

    def add(self: Any, *given: Any) -> None:
        if left:
            left.pop()()
        real(self, *given)

    monkeypatch.setattr(jobs.embed.Tally, "add", add)


def test_rows_marks_cards_and_figures(ws: Path, clip: Path, encoder: Encoder) -> None:
    broken = image_row(99) | {"image": b"no image"}
    add(ws, image_row(50), broken)
    run = embed(ws, clip)
    assert run.counts == {"in": 32, "out": 31, "failed": 1}
    check(ws, encoder, [image_row(n) for n in [*range(30), 50]])
    mark = Workspace(ws).table("images").read(where=pc.field("pair_key") == broken["pair_key"]).to_pylist()
    assert mark == [broken | {"status": "decode", "error": "does not decode when embedding"}]
    wanted = {
        "encoder": encoder.card.id, "dim": 16, "images_encoded": 31, "texts_encoded": 31, "batch_size": 5, "new": 32,
        "changed": 0, "quarantined": [], "rescored": 0,
    }  # fmt: skip
    assert {name: run.figures[name] for name in wanted} == wanted and run.figures["pairs_per_second"] > 0
    assert pipeline.encoders.read_card(Workspace(ws), encoder.card.id) == encoder.card
    stamps = Workspace(ws).table("embeddings").stamps()
    assert json.loads(stamps[f"clipmill.encoder.{encoder.card.id}"]) == json.loads(encoder.card.model_dump_json())
    before = versions(ws)
    again = embed(ws, clip)
    assert again.counts == {"in": 0, "out": 0, "failed": 0} and again.figures["images_encoded"] == 0
    assert versions(ws) == before


class Fatal(EmbedWorker):
    """Its first worker dies in the middle of its second shard."""

    def __call__(self, given: Any) -> Any:
        marker = Path(self._order.config.workspace, "died")
        if given.shard.number == 1 and not marker.exists():
            marker.touch()
            os._exit(9)
        return super().__call__(given)


@pytest.mark.slow
def test_decoded_beside_the_model_and_a_worker_that_dies(
    ws: Path, clip: Path, encoder: Encoder, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(ws, image_row(99) | {"image": b"no image"})
    monkeypatch.setattr(jobs.embed, "EmbedWorker", Fatal)
    run = embed(ws, clip, engine, decoders=1)
    assert (ws / "died").exists()
    assert run.counts == {"in": 31, "out": 30, "failed": 1} and run.figures["quarantined"] == []
    check(ws, encoder, [image_row(n) for n in range(30)])


@pytest.mark.parametrize(
    ("most", "images", "slots", "expected"),
    [(2048, 2000, 2, 250), (2048, 10, 4, 64), (8, 1000, 1, 8), (100, 10**6, 8, 100)],
)
def test_small_runs_are_shared_by_all_workers(most: int, images: int, slots: int, expected: int) -> None:
    assert _shard_size(most, images, slots) == expected


def test_nothing_to_do_costs_no_model(ws: Path, clip: Path) -> None:
    """No torch and no Ray, so no forward either; nor where another preprocessing would be refused."""
    embed(ws, clip)
    before = versions(ws)
    code = """
import sys
from jobs.embed import main
assert main(sys.argv[1:]) == 0
assert "torch" not in sys.modules and "open_clip" not in sys.modules
import ray
assert not ray.is_initialized()
"""
    given = ["--workspace", str(ws), "--encoder", f"local-dir:{clip}"]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert versions(ws) == before


# -- others at work ------------------------------------------------------------------------------------


def test_two_runs_at_once(ws: Path, clip: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole other run comes between planning and committing: no row twice, and nothing is taken for done."""
    during(monkeypatch, lambda: embed(ws, clip, shard_size=11))
    run = embed(ws, clip)
    assert run.counts == {"in": 30, "out": 30, "failed": 0}
    check(ws, encoder, [image_row(n) for n in range(30)])
    before = versions(ws)
    assert embed(ws, clip).counts["in"] == 0
    assert versions(ws) == before


@pytest.mark.parametrize("embedded", [False, True], ids=["new", "changed"])
def test_an_image_that_changes_meanwhile(
    embedded: bool, ws: Path, clip: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is downloaded again, and another run embeds it, before the older picture's row is committed."""
    if embedded:
        embed(ws, clip)
        change(ws, image_row(5, picture=1001))
    newest = image_row(5, picture=1002)

    def overtake() -> None:
        change(ws, newest)
        embed(ws, clip)

    during(monkeypatch, overtake)
    embed(ws, clip)
    embed(ws, clip)
    check(ws, encoder, [newest if n == 5 else image_row(n) for n in range(30)])
    assert embed(ws, clip).counts["in"] == 0


def test_an_older_row_that_is_committed_first(
    ws: Path, clip: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run had read the older picture, and commits its row while this one is at work: it is seen next time."""
    newest = image_row(5, picture=1002)
    change(ws, newest)
    older = pa.Table.from_pylist([image_row(5)], schema=IMAGES.schema).select(IMAGE_COLUMNS)
    found = EmbedStage(encoder, 4, "older")(older)
    during(monkeypatch, lambda: Workspace(ws).table("embeddings").append(found.rows, "older"))
    embed(ws, clip)
    assert embed(ws, clip).figures["changed"] == 1
    check(ws, encoder, [newest if n == 5 else image_row(n) for n in range(30)])


def test_a_mark_is_not_put_on_a_newer_image(ws: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(ws, image_row(99) | {"image": b"no image", "sha256": "older"})
    during(monkeypatch, lambda: change(ws, image_row(99)))
    assert embed(ws, clip).counts == {"in": 31, "out": 30, "failed": 1}
    (row,) = Workspace(ws).table("images").read(where=pc.field("pair_key") == image_row(99)["pair_key"]).to_pylist()
    assert row == image_row(99)
    assert embed(ws, clip).counts == {"in": 1, "out": 1, "failed": 0}


def test_images_rewritten_while_they_are_read(
    ws: Path, clip: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rewrite() -> None:
        change(ws, image_row(29) | {"etag": "new"})
        Workspace(ws).table("images").open().optimize.compact()  # type: ignore[union-attr]

    during(monkeypatch, rewrite)
    assert embed(ws, clip).counts == {"in": 30, "out": 30, "failed": 0}
    check(ws, encoder, [image_row(n) for n in range(30)])
    assert embed(ws, clip).counts["in"] == 0


def test_a_full_disk(ws: Path, clip: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with tmpfs("size=4m") as folder:
        shutil.copytree(ws, folder / "ws")
        ballast: list[Path] = []
        during(monkeypatch, lambda: ballast.append(fill(folder)))
        with pytest.raises(WorkspaceError) as caught:
            embed(folder / "ws", clip)
        assert "free some room" in caught.value.remedy
        ballast[0].unlink()
        left = 30 - len(rows(folder / "ws"))
        assert embed(folder / "ws", clip).counts == {"in": left, "out": left, "failed": 0}
        check(folder / "ws", encoder, [image_row(n) for n in range(30)])


# -- encoders ------------------------------------------------------------------------------------------


def test_weights_that_change_between_plan_and_work(
    ws: Path, tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan was made for another encoder: nothing is committed, and the next run plans with what is there."""
    mine = tmp_path / "mine"
    shutil.copytree(clip, mine)
    real = Order.encoder

    def swapped(self: Order) -> Any:
        save_clip(mine, TINY, seed=1)
        return real(self)

    monkeypatch.setattr(Order, "encoder", swapped)
    with pytest.raises(EncoderMismatch):
        embed(ws, mine)
    assert Workspace(ws).table("embeddings").count() == 0
    assert embed(ws, mine).counts["out"] == 30
    assert {c["encoder"] for c in Workspace(ws).table("embeddings").keys().to_pylist()} == {
        Encoder(f"local-dir:{mine}").card.id
    }


@pytest.mark.parametrize("where", ["file", "table"])
def test_a_card_that_does_not_match(where: str, ws: Path, clip: Path, encoder: Encoder, tmp_path: Path) -> None:
    """The same weights with another preprocessing: the same id, and other vectors."""
    embed(ws, clip)
    mine = tmp_path / "mine"
    shutil.copytree(clip, mine)
    config = json.loads((mine / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.4, 0.5, 0.5]
    (mine / "open_clip_config.json").write_text(json.dumps(config))
    if where == "table":
        (ws / "encoders" / f"{encoder.card.id}.json").unlink()
    else:
        Workspace(ws).table("embeddings").open().alter.set_table_properties(  # type: ignore[union-attr]
            {f"clipmill.encoder.{encoder.card.id}": ""}, raise_if_not_exists=False
        )
    before = versions(ws)
    monkey = f"local-dir:{mine}"
    other = Encoder(monkey, name=encoder.card.model).card
    assert other.id == encoder.card.id
    with pytest.raises(EncoderMismatch, match="mean") as caught:
        pipeline.encoders.check_card(Workspace(ws), other)
    assert "0.4" in caught.value.actual and "0.5" in caught.value.expected
    with pytest.raises(EncoderMismatch):
        pipeline.encoders.save_card(Workspace(ws), other)
    assert versions(ws) == before


def test_a_card_is_known_without_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only while its files are what they were; checkpoints beside a model's name, and folders."""
    mine = save_clip(tmp_path / "mine", TINY)
    workspace, spec = Workspace(tmp_path / "ws").prepare(), f"local-dir:{mine}"
    card = pipeline.encoders.card_of(workspace, spec, "auto")
    loads: list[str] = []
    real = pipeline.encoders.load_encoder

    def counting(workspace: Workspace, spec: str, *given: Any) -> Any:
        loads.append(spec)
        return real(workspace, spec, *given)

    monkeypatch.setattr(pipeline.encoders, "load_encoder", counting)
    assert pipeline.encoders.card_of(workspace, spec, "auto") == card and loads == []
    assert pipeline.encoders.embedded_encoders(workspace) == [], "a note is no card of embedded vectors"
    save_clip(mine, TINY, seed=1)
    other = pipeline.encoders.card_of(workspace, spec, "auto")
    assert other.id != card.id and len(loads) == 1
    assert pipeline.encoders.card_of(workspace, spec, "auto") == other and len(loads) == 1
    pipeline.encoders.forget_card(workspace, spec, "auto")
    assert pipeline.encoders.card_of(workspace, spec, "auto") == other and len(loads) == 2
    shutil.rmtree(mine)
    with pytest.raises(UsageError):
        pipeline.encoders.card_of(workspace, spec, "auto")


def test_int8_is_another_encoder_and_says_how_far_off_it_is(ws: Path, clip: Path, encoder: Encoder) -> None:
    embed(ws, clip)
    run = embed(ws, clip, precision="int8")
    assert run.counts == {"in": 30, "out": 30, "failed": 0}
    assert run.figures["encoder"] != encoder.card.id
    assert run.figures["int8_cosine"].keys() == {"image_mean", "image_min", "text_mean", "text_min"}
    assert all(0.9 < cosine <= 1.0001 for cosine in run.figures["int8_cosine"].values())
    assert Workspace(ws).table("embeddings").count() == 60
    assert pipeline.encoders.encoder_of(
        Workspace(ws), pipeline.encoders.read_card(Workspace(ws), run.figures["encoder"])
    )


# -- scores --------------------------------------------------------------------------------------------


def test_scores_asked_for_later(ws: Path, clip: Path, encoder: Encoder, tmp_path: Path) -> None:
    embed(ws, clip)
    weight = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    save_head(tmp_path / "head.safetensors", [(weight, torch.zeros(1))])
    (tmp_path / "labels.txt").write_text("red\nblue\n")
    (tmp_path / "templates.txt").write_text("a {} thing\n{}\n")
    asked = {
        "heads": [f"Fine={tmp_path / 'head.safetensors'}"], "zero_shot": str(tmp_path / "labels.txt"),
        "templates": str(tmp_path / "templates.txt"),
    }  # fmt: skip
    names = ("score_Fine", "label", "label_score")
    before = rows(ws)
    add(ws, image_row(40))
    run = embed(ws, clip, **asked)
    assert run.counts["in"] == 1 and (run.figures["images_encoded"], run.figures["rescored"]) == (1, 30)
    found = rows(ws, *names)
    for row in found.values():
        vector = np.frombuffer(row["image_vec"], "<f2").astype(np.float32)
        assert row["score_Fine"] == pytest.approx(float(weight[0].numpy() @ vector), abs=1e-3)
        assert row["label"] in ("red", "blue") and 0.5 <= row["label_score"] <= 1
    assert {k: {n: v for n, v in found[k].items() if n not in names} for k in before} == before
    check(ws, encoder, [image_row(n) for n in [*range(30), 40]])

    now = versions(ws)
    assert embed(ws, clip, **asked).figures["rescored"] == 0
    assert versions(ws) == now, "nothing lacks a score: nothing is committed"

    # A changed image has no old scores; another head of the same name scores all again, in one of the files.
    changed = image_row(3, picture=1003)
    change(ws, changed)
    embed(ws, clip)
    assert {key for key, row in rows(ws, *names).items() if row["score_Fine"] is None} == {changed["pair_key"]}
    save_head(tmp_path / "head.safetensors", [(-weight, torch.zeros(1))])
    assert embed(ws, clip, heads=asked["heads"]).figures["rescored"] == 31
    again = rows(ws, *names)
    for key, row in again.items():
        vector = np.frombuffer(row["image_vec"], "<f2").astype(np.float32)
        assert row["score_Fine"] == pytest.approx(float(-weight[0].numpy() @ vector), abs=1e-3)
        assert row["label"] == (None if key == changed["pair_key"] else found[key]["label"])


@pytest.mark.parametrize(
    "asked",
    [
        {"heads": ["fine"]},
        {"heads": ["fine=/no/such/file.safetensors"]},
        {"heads": ["no name=/no/such/file"]},
        {"zero_shot": "/no/such/labels.txt"},
        {"templates": "/no/such/templates.txt"},
    ],
)
def test_files_that_cannot_be_read_are_told_before_anything_starts(asked: dict[str, Any], ws: Path, clip: Path) -> None:
    before = versions(ws)
    with pytest.raises(UsageError):
        embed(ws, clip, **asked)
    assert versions(ws) == before

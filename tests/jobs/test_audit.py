"""Damaged, mixed up and outdated vectors stop index and training; sound ones are audited once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from jobs import audit as audit_job
from jobs.audit import New, audit
from jobs.base import execute
from jobs.index import run as index_body
from jobs.train import run as train_body
from pipeline.engine import Engine
from pipeline.ledger import Run
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.configs import DecoderTrainConfig, IndexConfig, PriorTrainConfig
from schemas.errors import AuditError
from schemas.tables import EMBEDDINGS
from schemas.vectors import pack, unpack
from tests.jobs.embedded import embed_directly, workspace_with_vectors
from tests.kills import add_images, image_row, save_clip
from tests.pipeline.models.test_clip import TINY

N = 24
Rows = dict[str, list[Any]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), TINY)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> tuple[Path, EncoderCard]:
    """A workspace to copy from."""
    folder = tmp_path_factory.mktemp("embedded") / "ws"
    return folder, workspace_with_vectors(folder, clip, N)[1]


@pytest.fixture
def sound(tmp_path: Path, embedded: tuple[Path, EncoderCard]) -> tuple[Workspace, EncoderCard]:
    shutil.copytree(embedded[0], tmp_path / "ws")
    return Workspace(tmp_path / "ws"), embedded[1]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Ids of the encoders that audits loaded."""
    calls: list[str] = []
    real = audit_job.encoder_of

    def counting(workspace: Workspace, card: EncoderCard) -> Any:
        calls.append(card.id)
        return real(workspace, card)

    monkeypatch.setattr(audit_job, "encoder_of", counting)
    yield calls


def run_audit(workspace: Workspace, card: EncoderCard, sample: int = N) -> dict[str, Any]:
    """The figures of an audit, in a run of its own."""
    run = Run(workspace, "index", IndexConfig(workspace=str(workspace.root)))
    audit(run, card, sample)
    return run.figures["audit"]


def damage(workspace: Workspace, change: Callable[[dict[str, np.ndarray]], None]) -> list[int]:
    """Rewrite the table embeddings with vectors and keys changed in place. Returns the keys as they were, ascending."""
    table = workspace.table("embeddings")
    rows = table.read().sort_by("pair_key")
    dim = len(rows["image_vec"][0].as_py()) // 2
    parts = {m: np.array(unpack(rows[f"{m}_vec"], dim)) for m in ("image", "text")}
    parts |= {n: rows[n].to_numpy().copy() for n in ("pair_key", "similarity")}
    keys = parts["pair_key"].tolist()
    change(parts)
    columns = {n: rows[n] for n in rows.column_names} | {f"{m}_vec": pack(parts[m]) for m in ("image", "text")}
    columns |= {n: parts[n] for n in ("pair_key", "similarity")}
    DeltaTable(table.uri).delete()
    _write_unchecked(table.uri, pa.table(columns, schema=EMBEDDINGS.schema))
    return keys


def _write_unchecked(uri: str, rows: pa.Table) -> None:
    from deltalake import write_deltalake

    write_deltalake(uri, rows, mode="append")


def zeros(rows: dict[str, np.ndarray]) -> None:
    rows["image"][3] = 0


def nan(rows: dict[str, np.ndarray]) -> None:
    rows["text"][3, 2] = np.nan


def long(rows: dict[str, np.ndarray]) -> None:
    rows["text"][3] *= 2


def twice(rows: dict[str, np.ndarray]) -> None:
    rows["pair_key"][4] = rows["pair_key"][3]


def one_modality_swapped(rows: dict[str, np.ndarray]) -> None:
    rows["image"][[3, 4]] = rows["image"][[4, 3]]
    # Its similarity gives it away only if it was another one: make sure that it was.
    rows["similarity"][3] += 0.1


WHOLE_TABLE = {
    zeros: "1 image vectors of zeros", nan: "1 text vectors with NaN", long: "1 text vectors not of length 1",
    twice: "1 keys that are there twice", one_modality_swapped: "pairs whose similarity",
}  # fmt: skip


@pytest.mark.parametrize("change", WHOLE_TABLE, ids=lambda f: f.__name__)
def test_damage_stops_the_index_even_without_a_sample(
    sound: tuple[Workspace, EncoderCard], change: Callable[[dict[str, np.ndarray]], None]
) -> None:
    workspace, _ = sound
    keys = damage(workspace, change)
    config = IndexConfig(workspace=str(workspace.root), audit=0)
    with pytest.raises(AuditError, match=WHOLE_TABLE[change]) as caught:
        execute("index", config, index_body, Engine(cpus=1))
    assert str(keys[3]) in str(caught.value)
    assert workspace.indexed_encoders() == []
    last = workspace.table("runs").read().to_pylist()[-1]
    assert (last["outcome"], last["error"]) == ("failed", str(caught.value))


def test_rows_mixed_up_are_found_by_embedding_again(sound: tuple[Workspace, EncoderCard]) -> None:
    workspace, _ = sound

    def shift(rows: dict[str, np.ndarray]) -> None:
        for name in ("image", "text", "similarity"):
            rows[name][:5] = np.roll(rows[name][:5], 1, axis=0)

    keys = damage(workspace, shift)
    with pytest.raises(AuditError, match="do not agree") as caught:
        execute("index", IndexConfig(workspace=str(workspace.root)), index_body, Engine(cpus=1))
    assert f"image of {keys[0]}: " in str(caught.value)
    assert str(keys[7]) not in str(caught.value)
    for kind, config in (("prior", PriorTrainConfig), ("decoder", DecoderTrainConfig)):
        with pytest.raises(AuditError, match="do not agree"):
            settings = config(workspace=str(workspace.root), batch_size=4)
            execute(f"train {kind}", settings, lambda c, r, e, kind=kind: train_body(kind, c, r, e), Engine(cpus=1))
        assert not (workspace.model_dir(kind, "default") / "training.json").exists(), "pinned to damaged vectors"


def test_another_encoders_vectors_under_this_name(sound: tuple[Workspace, EncoderCard], tmp_path: Path) -> None:
    workspace, card = sound
    other = embed_directly(workspace, save_clip(tmp_path / "other", TINY, seed=1))
    run_audit(workspace, other)
    rows = workspace.table("embeddings").read()
    theirs = rows.filter(pa.compute.equal(rows["encoder"], other.id))
    column = pa.array([card.id] * N, pa.string())
    theirs = theirs.set_column(theirs.column_names.index("encoder"), "encoder", column)
    workspace.table("embeddings").upsert(theirs, "mixed")
    with pytest.raises(AuditError, match=f"{2 * N} of {2 * N} vectors of {card.id}"):
        run_audit(workspace, card)


def test_sound_vectors_are_audited_once(
    sound: tuple[Workspace, EncoderCard], loaded: list[str], tmp_path: Path
) -> None:
    workspace, card = sound
    figures = execute("index", IndexConfig(workspace=str(workspace.root), audit=8), index_body, Engine(cpus=1)).figures
    assert (figures["audit"]["rows"], figures["audit"]["sampled"]) == (N, 8)
    assert figures["audit"]["least_cosine"] > 0.9999
    assert loaded == [card.id]
    assert run_audit(workspace, card, 8)["rows"] == run_audit(workspace, card, 3)["rows"] == N
    assert loaded == [card.id], "audited again at the same versions"
    assert run_audit(workspace, card, 9)["sampled"] == 9  # more was asked for
    other = save_clip(tmp_path / "other", TINY, seed=2)
    embed_directly(workspace, other)
    assert run_audit(workspace, card, 9)["sampled"] == 9  # another version of the table
    assert loaded == [card.id] * 3
    assert json.loads((workspace.root / "reports" / "audits" / f"{card.id}.json").read_text())["asked"] == 9


def test_images_that_changed_went_or_came(
    sound: tuple[Workspace, EncoderCard], capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, card = sound
    images = workspace.table("images")

    def put(*rows: dict[str, Any]) -> None:
        images.upsert(pa.Table.from_pylist(list(rows), schema=images.spec.schema), "later")

    gone = image_row(1) | {"status": "opted_out", "image": None, "sha256": None}
    put(gone, image_row(N))
    found = run_audit(workspace, card)
    assert (found["rows"], found["sampled"], found["not_embedded"]) == (N, N - 1, 1)
    assert found["without_image_keys"] == [gone["pair_key"]]
    assert str(gone["pair_key"]) in capsys.readouterr().err
    changed = image_row(2, picture=1000)
    put(changed)
    with pytest.raises(AuditError, match=rf"1 vectors of .*(.|\n)*key {changed['pair_key']}\n.*clipmill embed"):
        run_audit(workspace, card, 0)


def new_audit(workspace: Workspace, card: EncoderCard, sample: int, seen: tuple[set[str], set[str]]) -> dict[str, Any]:
    """The figures of an audit of what came since these files."""
    tables = [workspace.table(name) for name in ("embeddings", "images")]
    grown = [
        table.paths() - paths if paths <= table.paths() else None for table, paths in zip(tables, seen, strict=True)
    ]
    run = Run(workspace, "index", IndexConfig(workspace=str(workspace.root)))
    audit(run, card, sample, New(grown[0] or set(), grown[1]))
    return run.figures["audit"]


def test_what_came_since_is_audited_alone_or_beside_all(sound: tuple[Workspace, EncoderCard], clip: Path) -> None:
    """New vectors of new images; where one of both is of another night, all are compared."""
    workspace, card = sound
    embeddings, images = (workspace.table(name) for name in ("embeddings", "images"))

    def seen() -> tuple[set[str], set[str]]:
        return embeddings.paths(), images.paths()

    before = seen()
    add_images(workspace, range(N, N + 4))
    embed_directly(workspace, clip)
    found = new_audit(workspace, card, 32, before)
    assert (found["rows"], found["sampled"], found["not_embedded"]) == (4, 4, 0)
    before = seen()
    add_images(workspace, range(N + 4, N + 6))
    found = new_audit(workspace, card, 2, before)
    assert (found["rows"], found["not_embedded"]) == (N + 4, 2), "images without vectors: they may be another night's"
    before = seen()
    embed_directly(workspace, clip)
    assert new_audit(workspace, card, 2, before)["rows"] == N + 6, "vectors without images: they are the night before's"
    before = seen()
    add_images(workspace, range(N + 6, N + 8))
    embed_directly(workspace, clip)
    changed = image_row(N + 7, picture=1000)
    images.upsert(pa.Table.from_pylist([changed], schema=images.spec.schema), "later")
    with pytest.raises(AuditError, match=rf"key {changed['pair_key']}\n"):
        new_audit(workspace, card, 0, before)
    before = seen()
    old = image_row(1, picture=1001)
    images.upsert(pa.Table.from_pylist([image_row(N + 7), old], schema=images.spec.schema), "later")
    with pytest.raises(AuditError, match=rf"key {old['pair_key']}\n"):
        new_audit(workspace, card, 0, before)


def test_vectors_alone_are_audited_by_their_captions(sound: tuple[Workspace, EncoderCard]) -> None:
    workspace, card = sound
    shutil.rmtree(Path(str(workspace.root)) / "tables" / "images")
    assert run_audit(workspace, card)["sampled"] == N

    def captions(rows: dict[str, np.ndarray]) -> None:
        for name in ("image", "text", "similarity"):
            rows[name][:] = np.roll(rows[name], 1, axis=0)

    damage(workspace, captions)
    with pytest.raises(AuditError, match=r"text of \d+: "):
        run_audit(workspace, card)


def test_a_stored_image_that_no_longer_decodes(sound: tuple[Workspace, EncoderCard]) -> None:
    workspace, card = sound
    images = workspace.table("images")
    broken = image_row(5) | {"image": b"no image"}
    images.upsert(pa.Table.from_pylist([broken], schema=images.spec.schema), "later")
    with pytest.raises(
        AuditError, match=rf"1 of {2 * N} vectors(.|\n)*image of {broken['pair_key']} no longer decodes"
    ):
        run_audit(workspace, card)


def test_an_encoder_whose_weights_are_gone(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip", TINY, seed=7)
    workspace, card = workspace_with_vectors(tmp_path / "ws", clip, 4)
    shutil.rmtree(clip)
    with pytest.raises(AuditError, match=r"cannot load(.|\n)*--audit 0"):
        run_audit(workspace, card)
    assert run_audit(workspace, card, 0)["least_cosine"] is None
    with pytest.raises(AuditError, match="cannot load"):  # what passed without a sample has not passed with one
        run_audit(workspace, card)

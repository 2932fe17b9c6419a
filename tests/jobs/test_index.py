"""The job index, night after night: what is new is added, what went is gone, and what is published is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from upath import UPath

from jobs import index_build, index_update
from jobs.base import execute
from jobs.index import run as index_body
from pipeline.collection import Collection
from pipeline.encoders import save_card
from pipeline.engine import Engine
from pipeline.index import Extended, Source, Truth, hidden, kind_of, open_index, read_keys, search
from pipeline.index.versions import chain, published
from pipeline.ledger import Run
from pipeline.records import Records
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard, IndexCard
from schemas.configs import IndexConfig
from schemas.errors import AuditError, CardError, GateRefused, NothingToDo, UsageError
from schemas.tables import EMBEDDINGS
from schemas.vectors import normalise, pack
from tests.schemas.test_cards import encoder

N, D = 400, 16
KEYS = np.arange(1000, 1000 + N)
IMAGE, TEXT = normalise(np.random.default_rng(0).normal(size=(2 * N, D))).reshape(2, N, D)
REFINED = "IDMap,IVF4,PQ4x4fsr,Refine(SQ8)"
IDLE = Engine(cpus=1)
"""Never started: nothing here needs Ray."""


def card() -> EncoderCard:
    return encoder().model_copy(update={"dim": D})


def put(
    workspace: Workspace, run: str, rows: slice, image: np.ndarray | None = IMAGE, text: np.ndarray = TEXT,
    caption: str = "", append: bool = False,
) -> None:  # fmt: skip
    """Embeddings of some keys; without ``image`` their texts alone. ``append``: as new files, which rewrites none."""
    n = len(KEYS[rows])
    similarity = None if image is None else np.einsum("nd,nd->n", image[rows], text[rows]).astype(np.float32)
    columns = {
        "pair_key": KEYS[rows], "encoder": [card().id] * n,
        "image_vec": pa.nulls(n, pa.binary()) if image is None else pack(image[rows]),
        "text_vec": pack(text[rows]), "similarity": pa.nulls(n, pa.float32()) if similarity is None else similarity,
        "caption": [caption] * n, "sha256": [run] * n, "run": [run] * n,
    }  # fmt: skip
    table, made = workspace.table("embeddings"), pa.table(columns, schema=EMBEDDINGS.schema)
    table.append(made, run) if append else table.upsert(made, run)


def drop(workspace: Workspace, keys: np.ndarray) -> None:
    DeltaTable(workspace.table("embeddings").uri).delete(f"pair_key IN ({', '.join(map(str, keys.tolist()))})")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "ws")
    put(made, "r1", slice(0, 300))
    save_card(made, card())
    return made


def index(workspace: Workspace, engine: Engine = IDLE, **settings: Any) -> Run:
    config = IndexConfig(workspace=str(workspace.root), **{"audit": 0, "queries": 50, **settings})
    return execute("index", config, index_body, engine)


def current(workspace: Workspace) -> IndexCard:
    found = workspace.published_index(card().id)
    assert found is not None
    return found


def folder(workspace: Workspace) -> UPath:
    return workspace.index_dir(card().id)


def opened(workspace: Workspace, modality: str = "image") -> Any:
    now = current(workspace)
    return open_index(folder(workspace) / now.version / now.file(modality).path, now.file(modality))


def keys_in(found: Any) -> np.ndarray:
    """What a search can find, sorted."""
    if isinstance(found, Extended):
        main = read_keys(found.main)
        assert np.isin(found.gone, main).all()
        return np.sort(np.append(main[~np.isin(main, found.gone)], read_keys(found.side)))
    return np.sort(read_keys(found))


def check(workspace: Workspace, gone: np.ndarray | None = None) -> None:
    """The published version is that of the table: keys, every vector by its own search, records, truth, card."""
    now, place = current(workspace), folder(workspace)
    rows = workspace.table("embeddings").read()
    rows = rows.filter(pa.array(~np.isin(rows["pair_key"].to_numpy(), [] if gone is None else gone))).sort_by(
        "pair_key"
    )
    records = Records.open(place, now.segments)
    assert records.keys.tolist() == rows["pair_key"].to_pylist()
    assert records.take(records.keys, ["caption"])["caption"].to_pylist() == rows["caption"].to_pylist()
    assert now.count == rows.num_rows
    for file in now.files:
        there = rows.filter(rows[f"{file.modality}_vec"].is_valid())
        keys = there["pair_key"].to_numpy()
        vectors = np.stack([np.frombuffer(v, "<f2") for v in there[f"{file.modality}_vec"].to_pylist()])
        found = open_index(place / now.version / file.path, file)
        assert keys_in(found).tolist() == keys.tolist()
        deleted = hidden(found.main) + len(found.gone) if isinstance(found, Extended) else hidden(found)
        assert (file.count, file.deleted) == (len(keys), deleted)
        _, nearest = search(found, vectors, 2, {name: 4 * value for name, value in file.search.items()})
        exact = kind_of(file.factory) == "IDMap,SQfp16"
        assert np.mean(nearest[:, 0] == keys) >= (1.0 if exact else 0.98)
        np.testing.assert_array_equal(records.vectors(keys, file.modality), vectors)
        truth = Truth.load(place / now.version / f"{file.modality}.truth.npz")
        anew = Truth.of(truth.queries, [(keys, vectors)], truth.own)
        np.testing.assert_array_equal(truth.keys[:, :100], anew.keys[:, :100])
        assert file.recall_at_10 >= 0.95
    assert (place / now.version / "recall.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("factory", ["IVF4,SQ8", REFINED])
def test_night_after_night(workspace: Workspace, factory: str, beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Added, gone, changed and re-scored, alone and together; nothing of it builds the index anew, and ``beside`` it
    even the large file stays as it is."""
    if beside:
        monkeypatch.setattr(index_build, "BESIDE_FROM", 0)
    first = index(workspace, factory=factory)
    assert first.counts == {"in": 300, "out": 300, "failed": 0}
    assert first.figures["rebuilt"] == {"image": "first", "text": "first"} and first.figures["added"] == 300
    check(workspace)
    version = current(workspace).version
    again = index(workspace, factory=factory)
    assert again.counts["in"] == 0 and current(workspace).version == version, "nothing new publishes nothing"
    assert workspace.table("runs").count() == 1

    def night(added: int, removed: int, changed: int) -> None:
        figures = index(workspace, factory=factory, max_beside=0.5).figures
        assert [figures[n] for n in ("added", "removed", "changed")] == [added, removed, changed]
        assert figures["rebuilt"] == {}
        check(workspace)

    put(workspace, "r2", slice(300, 310))
    night(10, 0, 0)
    drop(workspace, KEYS[:3])
    night(0, 3, 0)
    put(workspace, "r3", slice(10, 12), -IMAGE)  # the same keys, embedded again as other images
    night(0, 0, 2)
    put(workspace, "r4", slice(20, 25), caption="another one")
    night(0, 0, 0)
    put(workspace, "r5", slice(305, 320), -IMAGE)
    drop(workspace, KEYS[30:32])
    night(10, 2, 5)
    put(workspace, "r6", slice(0, 3), -IMAGE)  # what was gone comes back as another one
    night(3, 0, 0)
    put(workspace, "r7", slice(40, 42), None)  # images that are no longer there: their texts stay
    night(0, 0, 0)
    assert current(workspace).file("image").count == current(workspace).file("text").count - 2
    for _ in range(3):
        put(workspace, "r8", slice(60, 61), caption=f"{_}")
        night(0, 0, 0)
    assert len(current(workspace).segments) <= 8
    assert len(list((folder(workspace) / "records").iterdir())) <= 10, "segments that nothing names are removed"
    file = current(workspace).file("image")
    assert file.deleted == (0 if factory != REFINED and not beside else 3 + 2 + 5 + 2 + 2 - 5 * beside)
    assert (file.side is not None) == beside
    if beside:
        made = {current(workspace).file("image").sha256, *(c.file("image").sha256 for c in chain(folder(workspace)))}
        assert len(made) == 1, "the large file is the first night's"


def test_what_lies_beside_is_taken_in_when_it_is_much(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_build, "BESIDE_FROM", 0)
    settings: dict[str, Any] = {"factory": REFINED, "max_beside": 0.05}
    index(workspace, **settings)
    first = current(workspace)
    put(workspace, "r2", slice(300, 310))
    put(workspace, "r3", slice(0, 2), -IMAGE)
    index(workspace, **settings)
    second = current(workspace)
    side = second.file("image").side
    assert side is not None and (side.count, side.gone) == (12, 2)
    assert second.file("image").total_bytes == first.file("image").bytes + side.bytes
    check(workspace)
    put(workspace, "r4", slice(310, 330))
    assert index(workspace, **settings).figures["rebuilt"] == {}
    third = current(workspace)
    assert third.file("image").side is None and third.file("image").sha256 != first.file("image").sha256
    check(workspace)
    assert index(workspace, rollback=True).figures["version"] == second.version
    check_keys = keys_in(opened(workspace))
    assert check_keys.tolist() == KEYS[:310].tolist()
    index(workspace, **settings)
    check(workspace)
    drop(workspace, KEYS[:5])
    index(workspace, **settings)
    side = current(workspace).file("image").side
    assert side is not None and (side.count, side.gone) == (0, 5), "where something only went nothing lies beside"
    check(workspace)
    index(workspace, rebuild=True, **settings)
    assert current(workspace).file("image").side is None
    assert (folder(workspace) / second.version / side.path).exists() is False


def test_searches_find_what_lies_beside(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """New and changed vectors at once, the old ones of changed keys no more, and none that was deleted since."""
    monkeypatch.setattr(index_build, "BESIDE_FROM", 0)
    index(workspace, factory=REFINED)
    put(workspace, "r2", slice(300, 310), caption="new")
    put(workspace, "r3", slice(0, 2), -IMAGE)
    index(workspace, factory=REFINED)
    collection = Collection(workspace)
    assert current(workspace).file("image").side is not None and len(collection) == 310
    asked = np.concatenate([IMAGE[300:310], -IMAGE[:2]]).astype(np.float32)
    similarity, found = collection.search_vectors(asked, 3)
    assert found[:, 0].tolist() == [*KEYS[300:310].tolist(), *KEYS[:2].tolist()]
    np.testing.assert_allclose(similarity[:, 0], 1.0, atol=1e-3)
    old, _ = collection.search_vectors(IMAGE[:2].astype(np.float32), 3)
    assert (old[:, 0] < 0.99).all(), "the vectors that were there before"
    only = collection.search_vectors(asked[:1], 20, where="caption = 'new'")[1]
    assert set(only[only >= 0].tolist()) == set(KEYS[300:310].tolist())
    collection.delete([KEYS[300], KEYS[0]])
    found = collection.search_vectors(asked, 310)[1]
    assert not np.isin(found, KEYS[[300, 0]]).any() and (found[:, :308] >= 0).all() and (found[:, 308:] < 0).all()


@pytest.mark.parametrize("how", ["truncated", "changed", "gone"])
@pytest.mark.parametrize("what", ["side.faiss", "gone.npz"])
def test_damage_beside(workspace: Workspace, what: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_build, "BESIDE_FROM", 0)
    index(workspace, factory=REFINED)
    put(workspace, "r2", slice(300, 310))
    put(workspace, "r3", slice(0, 2), -IMAGE)
    index(workspace, factory=REFINED)
    now = current(workspace)
    path = folder(workspace) / now.version / f"image.{what}"
    data = bytearray(path.read_bytes())
    path.unlink()
    if how != "gone":
        data[data.find(KEYS[:1].astype("<i8").tobytes())] ^= 0xFF
        path.write_bytes(data if how == "changed" else data[: len(data) // 2])
    with pytest.raises(CardError):
        opened(workspace)
    put(workspace, "r4", slice(310, 315))
    with pytest.raises(CardError) as caught:
        index(workspace, factory=REFINED)
    assert "clipmill index --rebuild" in caught.value.remedy
    index(workspace, factory=REFINED, rebuild=True)
    check(workspace)


def test_what_comes_beside_costs_what_it_is(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The large file is not read; an index of before there were its answers is written anew, with them."""
    monkeypatch.setattr(index_build, "BESIDE_FROM", 0)
    index(workspace, factory=REFINED)
    with monkeypatch.context() as patch:
        patch.setattr(index_update, "open_index", lambda *_, **__: pytest.fail("the large file is opened"))
        put(workspace, "r2", slice(300, 310))
        assert index(workspace, factory=REFINED).figures["rebuilt"] == {}
    check(workspace)
    for file in current(workspace).files:
        (folder(workspace) / current(workspace).version / f"{file.modality}.answers.npz").unlink()
    put(workspace, "r2a", slice(0, 1), -IMAGE)  # its text stays as it is
    assert index(workspace, factory=REFINED).figures["rebuilt"] == {}
    assert [file.side is None for file in current(workspace).files] == [True, False]
    put(workspace, "r3", slice(310, 312))
    assert index(workspace, factory=REFINED).figures["rebuilt"] == {}
    assert [file.side is None for file in current(workspace).files] == [False, True]
    put(workspace, "r4", slice(312, 314))
    index(workspace, factory=REFINED)
    assert [file.side is None for file in current(workspace).files] == [False, False]
    check(workspace)


def test_of_a_table_that_has_only_grown_the_new_files_are_read(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(workspace)
    read: list[Any] = []
    keys = Source.keys

    def noted(self: Source, paths: Any = None) -> np.ndarray:
        read.append(paths)
        return keys(self, paths)

    monkeypatch.setattr(Source, "keys", noted)
    before = workspace.table("embeddings").paths()
    put(workspace, "r2", slice(300, 305), append=True)
    new = workspace.table("embeddings").paths() - before
    assert index(workspace).figures["added"] == 5 and read == [new, new]
    check(workspace)
    read.clear()
    put(workspace, "r3", slice(3, 5), -IMAGE)  # rewrites files
    assert index(workspace).figures["changed"] == 2 and None in read
    check(workspace)


def test_compaction_of_the_table_changes_no_vector(workspace: Workspace) -> None:
    put(workspace, "r2", slice(300, 310))
    index(workspace)
    version = current(workspace).version
    DeltaTable(workspace.table("embeddings").uri).optimize.compact()
    assert index(workspace).counts["in"] == 0 and current(workspace).version == version


def test_further_columns_come_into_the_records(workspace: Workspace) -> None:
    index(workspace)
    table = workspace.table("embeddings").widened([pa.field("score_aesthetic", pa.float32())])
    scores = pa.table(
        {"pair_key": KEYS[:5], "encoder": [card().id] * 5, "score_aesthetic": pa.array([1.5] * 5, "float")}
    )
    table.update(scores.cast(pa.schema([table.spec.schema.field(n) for n in scores.column_names])), "scored")
    figures = index(workspace).figures
    assert (figures["added"], figures["changed"], figures["rebuilt"]) == (0, 0, {})
    records = Records.open(folder(workspace), current(workspace).segments)
    assert records.take(KEYS[3:7], ["score_aesthetic"])["score_aesthetic"].to_pylist() == [1.5, 1.5, None, None]
    check(workspace)


def test_limits_build_it_anew(workspace: Workspace) -> None:
    index(workspace, factory=REFINED)

    def why(**settings: Any) -> dict[str, str]:
        found: dict[str, str] = index(workspace, **({"factory": REFINED} | settings)).figures["rebuilt"]
        check(workspace)
        return found

    put(workspace, "r2", slice(300, 370))
    assert why(max_growth=0.5) == {}
    put(workspace, "r3", slice(370, 390))
    assert why() == {"image": "growth", "text": "growth"}, "counted from the last training: 390 > 1.25 * 300"
    put(workspace, "r4", slice(0, 38), -IMAGE)
    assert why() == {} and current(workspace).deleted == 38, "the texts are as they were"
    put(workspace, "r5", slice(38, 50), -IMAGE)
    assert why() == {"image": "tombstones"} and current(workspace).deleted == 0
    assert why(rebuild=True) == {"image": "asked", "text": "asked"}
    assert why(factory="IVF4,SQ8") == {"image": "factory", "text": "factory"}
    assert why(factory="auto") == {"image": "kind", "text": "kind"}


def test_a_recall_that_sinks_is_tuned_then_built_anew(workspace: Workspace) -> None:
    """All captions ask for one direction, where there are no images yet, and then very many: old codes do not fit."""
    asked = np.eye(D)[3]
    text = normalise(TEXT + 2 * asked)
    put(workspace, "r2", slice(0, 300), normalise(IMAGE * (1 - asked)), text)
    settings: dict[str, Any] = {"factory": "IVF16,SQ8", "modality": ("image",), "max_growth": 9}
    index(workspace, **settings, recall=0.6)
    higher = index(workspace, **settings, recall=0.97)
    assert higher.figures["rebuilt"] == {} and current(workspace).file("image").recall_at_10 >= 0.97
    put(workspace, "r3", slice(300, 400), normalise(0.02 * IMAGE + asked), text)
    figures = index(workspace, **settings, recall=0.7).figures
    assert figures["rebuilt"] == {"image": "recall"} and figures["image_recall_at_10"] >= 0.7


def test_deleted_keys_never_come_back(workspace: Workspace, tmp_path: Path) -> None:
    index(workspace)
    listed = tmp_path / "gone.txt"
    listed.write_text("pair_key\n" + "\n".join(map(str, KEYS[1:4])) + "\n")
    version = current(workspace).version
    run = index(workspace, delete=(str(KEYS[0]), str(listed), "77"))
    assert (run.figures["deleted"], run.figures["not_indexed"], run.figures["deleted_keys"]) == (5, 1, 5)
    assert current(workspace).version == version, "--delete alone builds nothing"
    np.save(tmp_path / "gone.npy", KEYS[3:5])
    assert index(workspace, delete=(str(tmp_path / "gone.npy"),)).figures["already_deleted"] == 1
    figures = index(workspace).figures
    assert (figures["removed"], figures["rebuilt"]) == (5, {})
    check(workspace, KEYS[:5])
    put(workspace, "r2", slice(0, 2), -IMAGE)  # embedded again: they are deleted all the same
    assert index(workspace).counts["in"] == 0
    index(workspace, rebuild=True)
    check(workspace, KEYS[:5])
    for wrong in ("nothing.txt", "-5", str(tmp_path)):
        with pytest.raises(UsageError, match="--delete"):
            index(workspace, delete=(wrong,))


def test_back_to_the_version_before(workspace: Workspace) -> None:
    with pytest.raises(UsageError):
        index(workspace, rollback=True)
    index(workspace)
    first = current(workspace)
    with pytest.raises(UsageError, match="first one"):
        index(workspace, rollback=True)
    put(workspace, "r2", slice(300, 310))
    index(workspace)
    second = current(workspace)
    assert second.previous == first.version
    assert index(workspace, rollback=True).figures["version"] == first.version
    assert current(workspace) == first and len(read_keys(opened(workspace))) == 300
    assert index(workspace).figures["added"] == 10, "the next run takes in again what was taken back"
    check(workspace)
    assert not (folder(workspace) / second.version).exists(), "what nothing goes back to is removed"
    with pytest.raises(UsageError, match="two commands"):
        index(workspace, rollback=True, delete=("5",))


def test_old_versions_are_removed(workspace: Workspace) -> None:
    versions = []
    for n in range(4):
        put(workspace, f"n{n}", slice(300 + n, 301 + n))
        index(workspace, keep=2)
        versions.append(current(workspace).version)
    kept = {p.name for p in folder(workspace).iterdir() if p.is_dir()}
    assert kept == {*versions[-2:], "records"}
    index(workspace, rollback=True)
    check_rows = Records.open(folder(workspace), current(workspace).segments)
    assert len(check_rows.keys) == 303
    with pytest.raises(UsageError, match="removed"):
        index(workspace, rollback=True)


def test_images_alone_can_be_indexed(tmp_path: Path) -> None:
    """Without captions there is no other modality to ask by: own vectors, which do not count as found."""
    workspace = Workspace(tmp_path / "ws")
    rows = {
        "pair_key": KEYS,
        "encoder": [card().id] * N,
        "image_vec": pack(IMAGE),
        "text_vec": pa.nulls(N, pa.binary()),
    }
    rest = {n: pa.nulls(N, EMBEDDINGS.schema.field(n).type) for n in ("similarity", "caption", "sha256", "run")}
    workspace.table("embeddings").append(pa.table(rows | rest, schema=EMBEDDINGS.schema), "r")
    save_card(workspace, card())
    run = index(workspace, factory="IVF4,SQ8")
    assert [f.modality for f in current(workspace).files] == ["image"]
    assert run.figures["image_recall_at_10"] >= 0.95 and run.figures["count"] == N
    check(workspace)
    with pytest.raises(NothingToDo):
        index(workspace, modality=("text",))
    with pytest.raises(UsageError, match="sound"):
        index(workspace, modality=("sound",))


def test_too_low_a_recall_publishes_nothing(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    index(workspace)
    before = current(workspace)
    put(workspace, "r2", slice(300, 310))
    names = {p.name for p in folder(workspace).rglob("*")}
    with pytest.raises(GateRefused, match="recall@10 of image") as caught:
        index(workspace, factory="IVF4,PQ4x4fs", recall=0.999)
    assert caught.value.exit_status == 3 and "--factory auto" in caught.value.remedy
    assert current(workspace) == before
    assert {p.name for p in folder(workspace).rglob("*")} == names, "nothing is left of it"
    with pytest.raises(GateRefused, match="fits into the memory") as caught:
        index(workspace, memory="1KB")
    assert "would do" in caught.value.remedy
    with pytest.raises(GateRefused) as caught:
        index(workspace, memory="28KB", recall=0.999)
    assert "at best" in caught.value.actual and "--memory" in caught.value.remedy
    enough = caught.value.remedy.split()[1]
    index(workspace, memory=enough, recall=0.999)
    assert current(workspace).file("image").recall_at_10 >= 0.999
    check(workspace)


def test_a_more_exact_kind_where_the_first_one_does_not_do(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.index import kinds

    monkeypatch.setattr(kinds, "EXACT_UP_TO", 0)
    found = [row.__class__(row.factory, row.code, max(row.recall, 0.7), row.ms, row.multiple) for row in kinds._TABLE]
    monkeypatch.setattr(kinds, "_TABLE", tuple(found))
    index(workspace, recall=0.7)
    said = capsys.readouterr().err
    assert current(workspace).file("image").recall_at_10 >= 0.7
    assert current(workspace).file("image").curve
    index(workspace, recall=1.0, rebuild=True)
    said = capsys.readouterr().err
    assert kind_of(current(workspace).file("image").factory) == "IDMap,SQfp16" or "now" in said


DAMAGE = {
    "index": "{version}/image.faiss", "truth": "{version}/image.truth.npz", "card": "{version}/card.json",
    "records": "{segment}",
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("index", "truncated"), ("index", "changed"), ("truth", "gone"), ("truth", "changed"), ("card", "truncated"),
        ("card", "gone"), ("records", "truncated"), ("records", "gone"), ("records", "changed"),
    ],
)  # fmt: skip
def test_damaged_files(workspace: Workspace, what: str, how: str) -> None:
    index(workspace)
    now = current(workspace)
    path = folder(workspace) / DAMAGE[what].format(version=now.version, segment=now.segments[0].path)
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "changed":
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    put(workspace, "r2", slice(300, 310))
    if (what, how) != ("records", "changed"):  # which is found when they are opened to be searched
        with pytest.raises(CardError) as caught:
            index(workspace)
        assert what == "card" or "clipmill index --rebuild" in caught.value.remedy
        assert (folder(workspace) / "CURRENT").read_text() == now.version
    else:
        with pytest.raises(CardError, match="sha256"):
            Records.open(folder(workspace), now.segments)
    run = index(workspace, rebuild=True)
    assert run.figures["rebuilt"] == {"image": "asked", "text": "asked"}
    check(workspace)


def test_a_card_of_before_there_were_records(workspace: Workspace) -> None:
    index(workspace)
    path = folder(workspace) / current(workspace).version / "card.json"
    old = json.loads(path.read_text())
    for name in ("segments", "images_version", "previous", "deleted"):
        del old[name]
    path.write_text(json.dumps(old))
    assert index(workspace).figures["rebuilt"] == {"image": "first", "text": "first"}
    check(workspace)


def test_shards_over_ray_make_the_same_index(workspace: Workspace, engine: Engine) -> None:
    index(workspace, factory=REFINED)
    one = opened(workspace)
    index(workspace, engine, factory=REFINED, rebuild=True, shard_size=90)
    merged = opened(workspace)
    check(workspace)
    assert read_keys(one).tolist() == read_keys(merged).tolist()
    for a, b in zip(*(search(i, TEXT, 20, {"nprobe": 2}) for i in (one, merged)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not list(folder(workspace).rglob("shards"))


KILL = """
import os, signal, sys
from jobs import cli, index
from pipeline.index import versions
import jobs.index_build

def dies(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

at = sys.argv[1]
if at == "index":
    jobs.index_build.Truth.save = dies
elif at == "card":
    real = versions.write_atomic
    versions.write_atomic = lambda path, data: dies() if path.name == "CURRENT" else real(path, data)
sys.exit(index.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("moment", ["index", "card"])
def test_killed_at_any_moment(workspace: Workspace, moment: str) -> None:
    """With files half written, or all but CURRENT: what is published stays, and the next run clears up."""
    index(workspace)
    before = current(workspace)
    put(workspace, "r2", slice(300, 310))
    command = [
        sys.executable,
        "-c",
        KILL,
        moment,
        "--workspace",
        str(workspace.root),
        "--audit",
        "0",
        "--queries",
        "50",
    ]
    killed = subprocess.run(
        command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert published(folder(workspace)) == before
    assert len(read_keys(opened(workspace))) == 300
    index(workspace)
    check(workspace)
    kept = {p.name for p in folder(workspace).iterdir()}
    assert kept == {"CURRENT", "records", before.version, current(workspace).version}
    assert workspace.table("runs").read(["outcome"])["outcome"].to_pylist().count("killed") == 1


def test_new_vectors_are_audited_and_no_others(workspace: Workspace) -> None:
    """What passed is not read again; for training it still is."""
    index(workspace)
    before = current(workspace)
    put(workspace, "r2", slice(300, 310))
    assert index(workspace).figures["added"] == 10
    note = workspace.reports_dir("audits") / f"{card().id}.json"
    assert json.loads(note.read_text())["whole"] is False
    wrong = IMAGE.copy()
    wrong[312] = 0
    put(workspace, "r3", slice(310, 315), wrong)
    with pytest.raises(AuditError, match=r"1 image vectors of zeros .key 1312"):
        index(workspace)
    assert current(workspace).previous == before.version
    put(workspace, "r4", slice(310, 315))
    index(workspace, rebuild=True)
    assert json.loads(note.read_text())["whole"] is True
    check(workspace)

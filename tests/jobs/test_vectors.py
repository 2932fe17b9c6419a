"""Vectors out and in: the layouts read back, exported and imported again bit for bit, LAION's, and bad ones."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from jobs import export_vectors
from jobs.cli import main
from pipeline.encoders import save_card
from pipeline.models.clip import build_clip
from pipeline.models.encoder import Encoder, read_model_config
from pipeline.vectors import read_vectors
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.keys import pair_key
from schemas.tables import DUPLICATES, EMBEDDINGS, IMAGES, PAIRS, TABLES
from schemas.vectors import normalise, pack
from tests.pipeline.models.test_clip import TINY

DIM = 8


def card_of(model: str = "a", dim: int = DIM) -> EncoderCard:
    return EncoderCard(
        model=model, pretrained="x", weights_sha256="0" * 64, dim=dim, image_size=8, mean=(0, 0, 0), std=(1, 1, 1),
        interpolation="bicubic", resize_mode="shortest", context_length=8, dtype="float32",
    )  # fmt: skip


def unit(seed: int, n: int, dim: int = DIM) -> NDArray[np.float16]:
    return normalise(np.random.default_rng(seed).standard_normal((n, dim))).astype(np.float16)


def fill(workspace: Path, count: int) -> dict[int, dict[str, Any]]:
    """Pairs with images and vectors of one encoder, in three files; rows of embeddings by key."""
    made, card = Workspace(workspace).prepare(), card_of()
    save_card(made, card)
    image, texts = unit(1, count), unit(2, count)
    rows: dict[str, list[dict[str, Any]]] = {"pairs": [], "images": [], "embeddings": []}
    for n in range(count):
        url, caption = f"http://h/{n}", f"caption {n % 7} \u05d0\n"
        key = {"pair_key": pair_key(url, caption)}
        rows["pairs"].append(
            dict.fromkeys(PAIRS.schema.names) | key | {"url": url, "caption": caption, "added_run": "r"}
        )
        rows["images"].append(dict.fromkeys(IMAGES.schema.names) | key | {
            "url": url, "caption": caption, "status": "ok", "width": n, "height": 16, "original_width": 2 * n,
            "original_height": 32, "sha256": f"s{n}", "run": "r",
            "fetched_at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        })  # fmt: skip
        rows["embeddings"].append(key | {
            "encoder": card.id, "image_vec": image[n].tobytes(), "text_vec": texts[n].tobytes(),
            "similarity": float(image[n].astype(np.float32) @ texts[n].astype(np.float32)),
            "caption": caption, "sha256": f"s{n}", "run": "r",
        })  # fmt: skip
    for name, spec in (("pairs", PAIRS), ("images", IMAGES), ("embeddings", EMBEDDINGS)):
        for third in range(3):
            made.table(name).append(pa.Table.from_pylist(rows[name][third::3], schema=spec.schema), "r")
    return {row["pair_key"]: row for row in rows["embeddings"]}


def call(capsys: pytest.CaptureFixture[str], job: str, workspace: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and the last line of stdout as JSON."""
    capsys.readouterr()
    status = main([job, *more, "--workspace", str(workspace), "--json"])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def content(folder: Path) -> dict[str, bytes]:
    """All files that are not hidden."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")
    }  # fmt: skip


def versions(workspace: Path) -> dict[str, int]:
    return {name: Workspace(workspace).table(name).version() for name in TABLES}


def stored(workspace: Path, modality: str, encoder: str | None = None) -> dict[int, bytes]:
    keys, vectors = read_vectors(Workspace(workspace).table("embeddings"), encoder or card_of().id, modality)
    return dict(zip(keys.tolist(), (v.tobytes() for v in vectors), strict=True))


# -- out -----------------------------------------------------------------------------------------------


def test_npy(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every vector beside its key, in order of the keys; a second run keeps what is there and makes what is not."""
    rows, out = fill(tmp_path / "ws", 25), tmp_path / "out"
    arguments = ("--format", "npy", "--output", str(out), "--shard-size", "10")
    status, summary = call(capsys, "export", tmp_path / "ws", *arguments)
    assert (status, summary["counts"]) == (0, {"in": 25, "out": 25, "failed": 0})
    assert (summary["shards"], summary["modalities"], summary["dim"]) == (3, ["image", "text"], DIM)
    names = [f"{folder}/{folder}_0000{n}.npy" for folder in ("img_emb", "keys", "text_emb") for n in range(3)]
    assert sorted(content(out)) == ["card.json", *names]
    assert EncoderCard.from_json((out / "card.json").read_text()) == card_of()
    keys = np.concatenate([np.load(out / "keys" / f"keys_0000{n}.npy") for n in range(3)])
    assert keys.tolist() == sorted(rows)
    for folder, column in (("img_emb", "image_vec"), ("text_emb", "text_vec")):
        parts = [np.load(out / folder / f"{folder}_0000{n}.npy") for n in range(3)]
        assert [len(p) for p in parts] == [10, 10, 5]
        assert [v.tobytes() for p in parts for v in p] == [rows[k][column] for k in keys.tolist()]

    before, seen = content(out), versions(tmp_path / "ws")
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.npy")}
    (out / "img_emb" / "img_emb_00001.npy").unlink()
    (out / "img_emb" / ".img_emb_00001.npy.part-1").write_bytes(b"of a killed run")
    monkeypatch.setattr(export_vectors, "IN_MEMORY", 0)  # sorted in a file instead
    status, summary = call(capsys, "export", tmp_path / "ws", *arguments)
    assert (status, summary["counts"]["out"], summary["already_there"]) == (0, 10, 15)
    assert content(out) == before
    assert [p.name for p in out.rglob(".*")] == [".clipmill-export"], "nothing is left lying about"
    kept = {p for p, time in times.items() if p.stat().st_mtime_ns == time}
    assert {p.name for p in set(times) - kept} == {f"{f}_00001.npy" for f in ("img_emb", "text_emb", "keys")}
    changed = versions(tmp_path / "ws")
    assert {name for name in seen if seen[name] != changed[name]} == {"runs"}
    assert call(capsys, "export", tmp_path / "ws", *arguments)[1]["counts"]["in"] == 0
    assert versions(tmp_path / "ws") == changed, "nothing to do commits nothing"

    np.save(out / "img_emb" / "img_emb_00002.npy", unit(0, 4))
    status, summary = call(capsys, "export", tmp_path / "ws", *arguments)
    assert status == 1 and "img_emb_00002.npy" in summary["error"] and "5 rows" in summary["error"]


def test_the_order_of_files_does_not_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same rows in one file that delta-rs wrote: the same files."""
    fill(tmp_path / "ws", 20)
    fill(tmp_path / "again", 20)
    embeddings = Workspace(tmp_path / "again").table("embeddings")
    embeddings.upsert(embeddings.read(), "r")
    for layout in ("clip-retrieval", "parquet-list"):
        for ws in ("ws", "again"):
            call(capsys, "export", tmp_path / ws, "--format", layout, "--output", str(tmp_path / f"{ws}-{layout}"))
        assert content(tmp_path / f"ws-{layout}") == content(tmp_path / f"again-{layout}")


def test_clip_retrieval_and_dalle2_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row i of every file of a number is the same pair's."""
    rows = fill(tmp_path / "ws", 11)
    for layout, folder, n in (("clip-retrieval", "metadata", "1"), ("dalle2-pytorch", "meta", "00001")):
        out = tmp_path / layout
        call(capsys, "export", tmp_path / "ws", "--format", layout, "--output", str(out), "--shard-size", "6")
        meta = pq.read_table(out / folder / f"{folder}_{n}.parquet").to_pylist()
        assert [m["pair_key"] for m in meta] == sorted(rows)[6:]
        for what, column in (("img_emb", "image_vec"), ("text_emb", "text_vec")):
            vectors = np.load(out / what / f"{what}_{n}.npy")
            assert [v.tobytes() for v in vectors] == [rows[m["pair_key"]][column] for m in meta]
        for m in meta:
            row = rows[m["pair_key"]]
            number = int(row["sha256"][1:])
            assert m == {
                "image_path": str(m["pair_key"]), "caption": row["caption"], "url": f"http://h/{number}",
                "pair_key": row["pair_key"], "similarity": pytest.approx(row["similarity"]), "width": number,
                "height": 16, "original_width": 2 * number, "original_height": 32, "sha256": row["sha256"],
            }  # fmt: skip


def test_where_and_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = fill(tmp_path / "ws", 20), tmp_path / "out"
    of = {row["sha256"]: key for key, row in rows.items()}
    mark = {"pair_key": of["s3"], "kept_key": of["s0"], "kind": "exact", "distance": 0, "run": "r"}
    Workspace(tmp_path / "ws").table("duplicates").append(pa.Table.from_pylist([mark], schema=DUPLICATES.schema), "r")
    predicate = "width < 9 AND url <> 'http://h/4' AND caption NOT LIKE '% 5 %' AND similarity IS NOT NULL"
    arguments = ["--format", "parquet-list", "--output", str(out), "--where", predicate, "--drop-duplicates"]
    status, summary = call(capsys, "export", tmp_path / "ws", *arguments)
    assert status == 0
    assert summary["left_out"] == {"one_vector": 0, "duplicates": 1, "where": 13}
    table = pq.read_table(out / "00000.parquet").to_pylist()
    assert {r["pair_key"] for r in table} == {of[f"s{n}"] for n in (0, 1, 2, 6, 7, 8)}
    for row in table:
        for name, column in (("image_embedding", "image_vec"), ("text_embedding", "text_vec")):
            assert np.array(row[name], np.float16).tobytes() == rows[row["pair_key"]][column]
    for more, expected, words in (
        (["--output", str(out), "--format", "npy"], 2, "another export"),
        (["--output", str(out), *arguments[4:], "--format", "npy"], 2, "format parquet-list"),
        (["--output", str(tmp_path / "new"), "--format", "npy", "--where", "widht > 1"], 2, "widht"),
        (["--output", str(tmp_path / "new"), "--format", "npy", "--where", "width > 99"], 1, "nothing to export"),
        (["--output", str(tmp_path / "new"), "--format", "npy", "--encoder", "nobody"], 2, "nobody"),
    ):
        status, summary = call(capsys, "export", tmp_path / "ws", *more)
        assert status == expected and words in summary["error"]


# -- in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["clip-retrieval", "dalle2-pytorch"])
def test_exported_and_imported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str) -> None:
    """Every key's vector is bit-equal; a second import adds nothing; and exported again, it is the same folder."""
    rows = fill(tmp_path / "ws", 40)
    out = tmp_path / "out"
    call(capsys, "export", tmp_path / "ws", "--format", layout, "--output", str(out), "--shard-size", "9")
    status, summary = call(capsys, "import", tmp_path / "new", str(out))
    assert (status, summary["counts"]) == (0, {"in": 40, "out": 40, "failed": 0})
    (figures,) = summary["vectors"].values()
    assert (figures["embeddings"], figures["normalised"], figures["other_keys"]) == (40, 0, 0)
    for modality in ("image", "text"):
        found = stored(tmp_path / "new", modality)
        assert found == stored(tmp_path / "ws", modality)
        assert found == {key: row[f"{modality}_vec"] for key, row in rows.items()}
    new = Workspace(tmp_path / "new")
    columns = ["pair_key", "encoder", "similarity", "caption", "sha256"]
    mine, theirs = (
        Workspace(tmp_path / ws).table("embeddings").read(columns).sort_by("pair_key") for ws in ("ws", "new")
    )
    assert mine.equals(theirs)
    for pair in new.table("pairs").read().to_pylist():
        assert pair["pair_key"] == pair_key(pair["url"], pair["caption"])
        assert pair["extra"] is None
    assert {r["run"] for r in new.table("embeddings").read(["run"]).to_pylist()} == {summary["run"]}

    seen = versions(tmp_path / "new")
    status, summary = call(capsys, "import", tmp_path / "new", str(out))
    (figures,) = summary["vectors"].values()
    assert (status, summary["counts"]["in"], figures["already_known"]) == (0, 0, 40)
    assert versions(tmp_path / "new") == seen
    call(
        capsys, "export", tmp_path / "new", "--format", layout, "--output", str(tmp_path / "out2"), "--shard-size", "9"
    )
    before, after = content(out), content(tmp_path / "out2")
    assert before.keys() == after.keys()
    assert {n: d for n, d in before.items() if n.endswith(".npy")} == {
        n: d for n, d in after.items() if n.endswith(".npy")
    }


def laion(folder: Path, image: NDArray[Any], text: NDArray[Any] | None, columns: dict[str, list[Any]]) -> str:
    """A folder of two files of each kind."""
    half = len(image) // 2
    for n, rows in enumerate((slice(0, half), slice(half, len(image)))):
        for name, matrix in (("img_emb", image), ("text_emb", text)):
            if matrix is not None:
                (folder / name).mkdir(parents=True, exist_ok=True)
                np.save(folder / name / f"{name}_{n:04d}.npy", matrix[rows])
        (folder / "metadata").mkdir(exist_ok=True)
        table = pa.table({name: values[rows] for name, values in columns.items()})
        pq.write_table(table, folder / "metadata" / f"metadata_{n:04d}.parquet")
    return str(folder)


def test_bad_vectors_doubles_and_vectors_that_are_not_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Left out, counted and named; scaled and counted; the first of doubles. Images alone, in float32."""
    image = unit(3, 12).astype(np.float32)
    image[2], image[3, 1], image[9, 0] = 0, np.nan, np.inf
    image[5] *= 7
    urls = [f"http://h/{n}" for n in range(12)]
    urls[7] = urls[4]  # in another file
    urls[1] = urls[0]
    source = laion(tmp_path / "laion", image, None, {"URL": urls, "TEXT": ["x"] * 12, "NSFW": ["no"] * 12})
    (tmp_path / "laion" / "card.json").write_text(card_of().to_json())
    status, summary = call(capsys, "import", tmp_path / "ws", source)
    assert (status, summary["counts"]) == (0, {"in": 10, "out": 7, "failed": 3})
    (figures,) = summary["vectors"].values()
    assert (figures["rows"], figures["doubles"], figures["normalised"]) == (12, 2, 1)
    assert figures["left_out"] == {"zero": 1, "not_finite": 2, "bad_caption": 0}
    places = [f"img_emb_000{f}.npy row {r}: {why}" for f, r, why in
              ((0, 2, "zero"), (0, 3, "not finite"), (1, 3, "not finite"))]  # fmt: skip
    assert [row.rpartition("/")[2] for row in figures["left_out_rows"]] == places
    expected = {
        pair_key(urls[n], "x"): normalise(image[n : n + 1])[0].astype(np.float16).tobytes()
        for n in (0, 4, 5, 6, 8, 10, 11)
    }
    assert stored(tmp_path / "ws", "image") == expected
    rows = Workspace(tmp_path / "ws").table("embeddings").read().to_pylist()
    assert all(row["text_vec"] is None and row["similarity"] is None for row in rows)
    pairs = Workspace(tmp_path / "ws").table("pairs").read().to_pylist()
    assert {p["pair_key"] for p in pairs} == set(expected)
    assert all(json.loads(p["extra"]) == {"NSFW": "no"} for p in pairs)

    seen = versions(tmp_path / "ws")
    assert call(capsys, "import", tmp_path / "ws", source)[1]["counts"] == {"in": 3, "out": 0, "failed": 3}
    assert versions(tmp_path / "ws") == seen
    status, summary = call(capsys, "export", tmp_path / "ws", "--format", "npy", "--output", str(tmp_path / "out"))
    assert (status, summary["modalities"]) == (0, ["image"])
    assert sorted(content(tmp_path / "out")) == ["card.json", "img_emb/img_emb_00000.npy", "keys/keys_00000.npy"]


def test_whose_vectors_they_are_must_be_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No card, another D, another number of rows, nothing to name an encoder of: refused before a row is written."""
    columns = {"url": [f"u{n}" for n in range(6)]}
    source = laion(tmp_path / "laion", unit(1, 6), unit(2, 6), columns)
    status, summary = call(capsys, "import", tmp_path / "ws", source)
    assert status == 2
    for words in ("which encoder", "--encoder", "card.json", "two encoders must never meet"):
        assert words in summary["error"]
    (tmp_path / "laion" / "card.json").write_text(card_of(dim=9).to_json())
    status, summary = call(capsys, "import", tmp_path / "ws", source)
    assert status == 2 and "D=9" in summary["error"] and "D=8" in summary["error"]
    (tmp_path / "laion" / "card.json").write_text(card_of().to_json())
    np.save(tmp_path / "laion" / "text_emb" / "text_emb_0001.npy", unit(2, 2))
    status, summary = call(capsys, "import", tmp_path / "ws", source)
    assert status == 2
    for words in ("text_emb_0001.npy", "3 rows", "2 rows"):
        assert words in summary["error"]
    assert set(versions(tmp_path / "ws").values()) == {-1}
    (tmp_path / "tars").mkdir()
    status, summary = call(capsys, "import", tmp_path / "ws", str(tmp_path / "tars"), "--encoder", "ViT-B-32:openai")
    assert status == 2 and "none in --source" in summary["error"]


def test_an_encoder_that_is_named_is_loaded_and_held_against_the_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps({"model_cfg": TINY}))
    specs = []
    for seed in (0, 1):
        folder = tmp_path / f"tiny{seed}"
        folder.mkdir()
        (folder / "open_clip_config.json").write_text(json.dumps(read_model_config(str(tmp_path / "tiny.json"))))
        torch.manual_seed(seed)
        save_file(build_clip(TINY).state_dict(), folder / "open_clip_model.safetensors")
        specs.append(f"local-dir:{folder}")
    encoder = Encoder(specs[0])
    captions = [f"a photograph of {n} cats" for n in range(10)]
    text = encoder.texts(captions).astype(np.float16)
    text[4] = np.nan  # is left out, and says nothing of the encoder
    columns = {"url": [f"http://h/{n}" for n in range(10)], "caption": captions}
    source = laion(tmp_path / "laion", unit(5, 10, encoder.card.dim), text, columns)
    status, summary = call(capsys, "import", tmp_path / "ws", source, "--encoder", specs[1])
    assert status == 1 and "were not made by" in summary["error"]
    assert set(versions(tmp_path / "ws").values()) == {-1}
    status, summary = call(capsys, "import", tmp_path / "ws", source, "--encoder", specs[0])
    assert (status, summary["encoder"], summary["counts"]["out"]) == (0, encoder.card.id, 9)
    assert sorted(stored(tmp_path / "ws", "text", encoder.card.id).values()) == sorted(
        v.tobytes() for n, v in enumerate(text) if n != 4
    )
    (tmp_path / "laion" / "card.json").write_text(card_of(dim=encoder.card.dim).to_json())
    status, summary = call(capsys, "import", tmp_path / "ws2", source, "--encoder", specs[0])
    assert status == 1 and "a-000000000000" in summary["error"] and encoder.card.id in summary["error"]


def test_further_columns_go_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A head's scores: in the metadata, and for --where; null in rows without."""
    rows = fill(tmp_path / "ws", 4)
    table = Workspace(tmp_path / "ws").table("embeddings").widened([pa.field("score_x", pa.float32())])
    more = [{**row, "pair_key": n, "score_x": n / 2} for n, row in enumerate(rows.values())]
    table.append(pa.Table.from_pylist(more, schema=table.spec.schema), "r")
    arguments = ["--format", "clip-retrieval", "--output"]
    call(capsys, "export", tmp_path / "ws", *arguments, str(tmp_path / "all"))
    found = pq.read_table(tmp_path / "all" / "metadata" / "metadata_0.parquet").to_pylist()
    expected = {n: n / 2 for n in range(4)} | dict.fromkeys(rows)
    assert {row["pair_key"]: row["score_x"] for row in found} == expected
    call(capsys, "export", tmp_path / "ws", *arguments, str(tmp_path / "some"), "--where", "score_x >= 1")
    found = pq.read_table(tmp_path / "some" / "metadata" / "metadata_0.parquet").to_pylist()
    assert [row["pair_key"] for row in found] == [2, 3]


def test_rows_with_one_vector_stay_behind_where_others_have_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = fill(tmp_path / "ws", 6)
    lonely = [{**row, "pair_key": n, "text_vec": None, "similarity": None} for n, row in enumerate(rows.values())][:2]
    Workspace(tmp_path / "ws").table("embeddings").append(pa.Table.from_pylist(lonely, schema=EMBEDDINGS.schema), "r")
    out = tmp_path / "out"
    status, summary = call(capsys, "export", tmp_path / "ws", "--format", "npy", "--output", str(out))
    assert (status, summary["counts"]["out"], summary["left_out"]["one_vector"]) == (0, 6, 2)
    assert np.load(out / "keys" / "keys_00000.npy").tolist() == sorted(rows)
    vectors = np.load(out / "img_emb" / "img_emb_00000.npy")
    assert [v.tobytes() for v in vectors] == [rows[key]["image_vec"] for key in sorted(rows)]


def test_pack_is_what_the_table_holds(tmp_path: Path) -> None:
    """The fixture's bytes are those that the pipeline packs."""
    rows = fill(tmp_path / "ws", 3)
    assert set(pack(unit(1, 3)).to_pylist()) == {row["image_vec"] for row in rows.values()}

"""The job query: one question on the terminal, and files of them over Ray."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len
from rich.console import Console

import jobs.query
import jobs.query_many
from jobs.base import execute
from jobs.prompts import read_questions
from jobs.query import run as query_body
from jobs.query import show, weighted
from pipeline.collection import Results, term
from pipeline.collection.bulk import BLOCK, BulkSearch, Shard
from pipeline.engine import Engine
from pipeline.ledger import Run
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.configs import QueryConfig
from schemas.errors import NothingToDo, UsageError
from schemas.questions import Question
from tests.jobs.embedded import workspace_with_vectors
from tests.kills import image_row, save_clip
from tests.pipeline.collection.indexed import publish
from tests.pipeline.collection.test_collection import TINY
from tests.servers import png_bomb

NUMBER = 60


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, EncoderCard]:
    """Images with their vectors by a tiny CLIP, indexed."""
    folder = tmp_path_factory.mktemp("query")
    workspace, card = workspace_with_vectors(folder / "ws", save_clip(folder / "clip", TINY), NUMBER)
    rows = workspace.table("embeddings").read()
    both = {m: np.stack([np.frombuffer(v, "<f2") for v in rows[f"{m}_vec"].to_pylist()]) for m in ("image", "text")}
    [file] = workspace.table("images").paths()
    further = {"caption": rows["caption"], "similarity": rows["similarity"], "file": [file] * NUMBER}
    publish(workspace, rows["pair_key"].to_numpy(), both, card=card, further=further)
    return workspace, card


def query(workspace: Workspace, engine: Engine, **options: Any) -> Run:
    return execute("query", QueryConfig(workspace=str(workspace.root), **options), query_body, engine)


def vectors(workspace: Workspace, modality: str) -> dict[int, np.ndarray]:
    rows = workspace.table("embeddings").read()
    found = [np.frombuffer(v, "<f2").astype(np.float32) for v in rows[f"{modality}_vec"].to_pylist()]
    return dict(zip(rows["pair_key"].to_pylist(), found, strict=True))


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def best(workspace: Workspace, vector: np.ndarray, k: int, modality: str = "image") -> list[int]:
    """By brute force."""
    scores = {key: float(own @ vector) for key, own in vectors(workspace, modality).items()}
    return sorted(scores, key=lambda key: -scores[key])[:k]


# -- one question --------------------------------------------------------------------------------------


def test_one_question(
    indexed: tuple[Workspace, EncoderCard], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, card = indexed
    key = image_row(7)["pair_key"]
    run = query(workspace, Engine(), text="picture 7", k=4, modality="text", sheet=str(tmp_path / "s.html"))
    rows = run.figures["results"]
    assert [list(row)[:8] for row in rows] == [
        ["query", "rank", "similarity", "pair_key", "caption", "url", "width", "height"]
    ] * 4
    assert rows[0]["pair_key"] == key and rows[0]["query"] == "picture 7" and rows[0]["caption"] == "picture 7"
    assert [row["pair_key"] for row in rows] == best(workspace, unit(vectors(workspace, "text")[key]), 4, "text")
    assert run.figures["encoder"] == card.id and run.counts == {"in": 1, "out": 1, "failed": 0}
    assert (tmp_path / "s.html").read_text().count("data:image/jpeg") == 4
    shown = capsys.readouterr().err
    assert "picture 7" in shown and str(key) in shown


def test_terms_of_every_kind(indexed: tuple[Workspace, EncoderCard], tmp_path: Path) -> None:
    workspace, _ = indexed
    image, text = vectors(workspace, "image"), vectors(workspace, "text")
    keys = [image_row(n)["pair_key"] for n in range(5)]
    (tmp_path / "3.png").write_bytes(image_row(3)["image"])
    np.save(tmp_path / "v.npy", image[keys[4]] * 3)
    run = query(
        workspace, Engine(), text="0.5*picture 0", image=str(tmp_path / "3.png"), key=f"-2*{keys[1]}",
        vector=f"1.5*{tmp_path / 'v.npy'}", without=["picture 2"], k=5,
    )  # fmt: skip
    total = 0.5 * unit(text[keys[0]]) + unit(image[keys[3]]) - unit(text[keys[2]])
    total += 1.5 * unit(image[keys[4]]) - 2 * unit(image[keys[1]])
    assert [row["pair_key"] for row in run.figures["results"]] == best(workspace, unit(total), 5)
    words = f"0.5*picture 0 + {tmp_path / '3.png'} + -2*{keys[1]} + 1.5*{tmp_path / 'v.npy'} + -1*picture 2"
    assert run.figures["results"][0]["query"] == words


def test_where(indexed: tuple[Workspace, EncoderCard]) -> None:
    run = query(indexed[0], Engine(), key=image_row(7)["pair_key"], where="caption LIKE 'picture 1%'", k=50)
    assert {row["caption"] for row in run.figures["results"]} == {"picture 1", *(f"picture {n}" for n in range(10, 20))}


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("red", (1.0, "red")), ("0.5*red", (0.5, "red")), ("-2*red", (-2.0, "red")), (".5*a*b", (0.5, "a*b")),
        ("1e-1*x", (0.1, "x")), ("2x*red", (1.0, "2x*red")), ("*red", (1.0, "*red")),
        ("1*2*3 tiles", (1.0, "2*3 tiles")),
        ("2*", (1.0, "2*")), ("a\nb", (1.0, "a\nb")), ("3*a\nb", (3.0, "a\nb")),
    ],
)  # fmt: skip
def test_weights(item: str, expected: tuple[float, str]) -> None:
    assert weighted(item) == expected


def test_what_cannot_be_asked(indexed: tuple[Workspace, EncoderCard], tmp_path: Path) -> None:
    workspace, card = indexed
    (tmp_path / "bomb.png").write_bytes(png_bomb(50_000))
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "wide.npy", np.ones(card.dim + 1))
    np.save(tmp_path / "nan.npy", np.full(card.dim, np.nan))
    np.save(tmp_path / "object.npy", np.array([{}] * card.dim), allow_pickle=True)
    for options, problem in (
        ({"key": "5"}, "no pair 5"), ({"key": "x"}, "no pair_key"), ({"key": str(2**64)}, "no pair_key"),
        ({"image": "/no/such.png"}, "no readable image"), ({"image": str(tmp_path / "bomb.png")}, "too_many_pixels"),
        ({"image": "http://127.0.0.1:1/x.png"}, "address_refused"), ({"vector": str(tmp_path / "text.npy")}, "npy"),
        ({"vector": str(tmp_path / "wide.npy")}, f"\\[{card.dim}\\]"),
        ({"vector": str(tmp_path / "nan.npy")}, "finite"),
        ({"vector": str(tmp_path / "object.npy")}, "npy"), ({"vector": "/none.npy"}, "npy"),
        ({"text": "1000*red"}, "weight"), ({"text": "red", "without": ["red"]}, "cancel"),
        ({"text": "red", "where": "nowhere = 1"}, "nowhere"),
        ({"text": "red", "where": "1; DROP TABLE pairs"}, "--where"),
        ({"text": "red", "encoder": "ViT-Z"}, "no index of ViT-Z"), ({"text": "x", "sheet": "/x.gif"}, "contact sheet"),
        ({"queries": "/none.txt"}, "no such file"), ({"queries": str(tmp_path / "wide.npy")}, "fit"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=problem) as caught:
            query(workspace, Engine(), **options)
        assert caught.value.exit_status == 2


def test_as_a_command(indexed: tuple[Workspace, EncoderCard], capsys: pytest.CaptureFixture[str]) -> None:
    key, root = str(image_row(7)["pair_key"]), str(indexed[0].root)
    assert jobs.query.main(["--workspace", root, "--key", key, "-k", "2", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["rank"] for row in summary["results"]] == [1, 2] and summary["results"][0]["query"] == key
    for bad in (["--text", " "], ["--text", "x", "-k", "0"], ["--text", "x", "-k", "1000000"], []):
        assert jobs.query.main(["--workspace", root, *bad]) == 2


def test_the_table_stays_whole_whatever_a_caption_holds() -> None:
    captions = [
        "\x1b[2J\x1b]0;title\x07red", "two\nlines\tand\r more", "\u202eturned round\u202c", "مرحبا بالعالم كلب",
        "x" * 5000,
        "[bold red]no markup[/bold]", "狗" * 200, "", None, "a\u0000b\ud800", "👩‍👩‍👧‍👦 family",
    ]  # fmt: skip
    n = len(captions)
    captions = [c if c is None else c.encode("utf-8", "replace").decode() for c in captions]
    table = pa.table(
        {
            "rank": range(1, n + 1),
            "similarity": [0.5] * n,
            "pair_key": [2**62 + i for i in range(n)],
            "caption": captions,
        }
    )
    out = io.StringIO()
    show(Results(table), Console(file=out, width=80, force_terminal=False))
    lines = out.getvalue().splitlines()
    assert len(lines) == n + 1, "a line a result"
    assert all(str(2**62 + i) in line for i, line in enumerate(lines[1:]))
    assert "[bold red]no markup[/bold]" in lines[6] and "two lines and more" in lines[2]
    assert not set("\x1b\x07\x00\u202e\u202c\r\t") & set(out.getvalue())
    assert max(map(cell_len, lines)) <= 80


# -- many ----------------------------------------------------------------------------------------------


def answers(path: Path) -> dict[int, list[int]]:
    """Keys found, by the number of the question."""
    found: dict[int, list[int]] = {}
    for row in pq.read_table(path).to_pylist():
        found.setdefault(row["number"], []).append(row["pair_key"])
    return found


def searched(workspace: Workspace, card: EncoderCard, folder: Path, values: Any, **settings: Any) -> pa.Table:
    """What the stage makes of one shard, here."""
    question = Question.model_construct(**{"terms": (), "k": 4, "modality": "image"} | settings)
    version = (workspace.index_dir(card.id) / "CURRENT").read_text()
    answered = BulkSearch((str(workspace.root), card.id, version), question, str(folder))(Shard(0, 100, values))
    table = pq.read_table(folder / "part-000000.parquet")
    wrong = set(table["number"].filter(pc.is_valid(table["error"])).to_pylist())
    assert (answered.questions, answered.failed, answered.rows) == (len(values), len(wrong), table.num_rows)
    return table


def test_texts(indexed: tuple[Workspace, EncoderCard], tmp_path: Path) -> None:
    workspace, card = indexed
    texts = [f"picture {n % NUMBER}" for n in range(BLOCK + 10)]
    asked: list[str | None] = [*texts]
    asked[3], asked[BLOCK + 1] = None, "  "
    table = searched(workspace, card, tmp_path, asked, k=3, modality="text")
    assert table.column_names[:9] == [
        "number", "query", "rank", "similarity", "pair_key", "caption", "url", "width", "height",
    ]  # fmt: skip
    rows = table.to_pylist()
    assert [(r["number"], r["rank"]) for r in rows if r["rank"]] == [
        (100 + n, rank) for n in range(len(texts)) if n not in (3, BLOCK + 1) for rank in (1, 2, 3)
    ]
    assert [(r["number"], r["query"], r["error"]) for r in rows if r["rank"] is None] == [
        (103, None, "the text is empty"), (101 + BLOCK, "  ", "the text is empty"),
    ]  # fmt: skip
    assert all(r["caption"] == r["query"] == texts[r["number"] - 100] for r in rows if r["rank"] == 1)


def test_what_is_unwanted_is_taken_from_every_question(indexed: tuple[Workspace, EncoderCard], tmp_path: Path) -> None:
    workspace, card = indexed
    text = vectors(workspace, "text")
    keys = [image_row(n)["pair_key"] for n in range(3)]
    asked = [f"picture {n}" for n in range(3)]
    rows = searched(workspace, card, tmp_path, asked, k=3, terms=(term("text", "picture 2", -1.0),)).to_pylist()
    for n in range(2):
        total = unit(text[keys[n]]) - unit(text[keys[2]])
        assert [r["pair_key"] for r in rows if r["number"] == 100 + n] == best(workspace, unit(total), 3)
    assert [r["error"] for r in rows if r["number"] == 102] == ["the terms cancel each other out"]


def test_files_of_keys_and_vectors(indexed: tuple[Workspace, EncoderCard], tmp_path: Path) -> None:
    workspace, card = indexed
    own = vectors(workspace, "image")
    keys = list(own)[:5]
    matrix = np.stack([unit(own[key]) for key in keys])
    pq.write_table(pa.table({"k": [*keys, 12345, None]}), tmp_path / "keys.parquet")
    pq.write_table(pa.table({"v": pa.array([*matrix.tolist(), None, [0.0] * card.dim])}), tmp_path / "lists.parquet")
    packed = [row.astype("<f2").tobytes() for row in matrix]
    pq.write_table(pa.table({"v": pa.array(packed, pa.binary(2 * card.dim))}), tmp_path / "bytes.parquet")
    np.save(tmp_path / "v.npy", np.concatenate([matrix, np.full((2, card.dim), np.nan, np.float32)]))
    np.save(tmp_path / "k.npy", np.array(keys))
    settings = {"unique": 0.9999, "where": "width = 16 OR width IS NULL"}
    for file, column, failed in (
        ("keys.parquet", "k", 2), ("lists.parquet", "v", 2), ("bytes.parquet", "v", 0), ("v.npy", "", 2),
        ("k.npy", "", 0),
    ):  # fmt: skip
        values = read_questions(str(tmp_path / file), column, card.dim)
        for some in ({}, settings, {"threshold": -1.0}):
            rows = searched(workspace, card, tmp_path, values, **some).to_pylist()
            assert [r["number"] for r in rows if r["error"]] == [105, 106][:failed], file
            found = [[r["pair_key"] for r in rows if r["number"] == 100 + n] for n in range(5)]
            assert found == [best(workspace, row, 4) for row in matrix], file
    pq.write_table(pa.table({"v": [[1.0, 2.0]]}), tmp_path / "narrow.parquet")
    pq.write_table(pa.table({"v": [True]}), tmp_path / "bools.parquet")
    for file, column in (("narrow.parquet", "v"), ("bools.parquet", "v"), ("keys.parquet", "v"), ("none.npy", "")):
        with pytest.raises(UsageError):
            read_questions(str(tmp_path / file), column, card.dim)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(NothingToDo):
        read_questions(str(tmp_path / "empty.txt"), "text", card.dim)


def test_resumed_and_the_same_whatever_the_shards(
    indexed: tuple[Workspace, EncoderCard], engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over Ray. A shard that an interrupted run left is not searched again."""
    workspace, card = indexed
    n = 2 * BLOCK + 10
    np.save(tmp_path / "q.npy", np.random.default_rng(0).normal(size=(n, card.dim)).astype(np.float32))
    options = {"queries": str(tmp_path / "q.npy"), "k": 3, "workers": 1}
    one, two = tmp_path / "one" / "r.parquet", tmp_path / "two" / "r.parquet"
    run = query(workspace, engine, **options, output=str(one))
    assert run.counts == {"in": n, "out": n, "failed": 0} and run.figures["rows"] == 3 * n
    assert list(answers(one)) == list(range(n)) and [p.name for p in one.parent.iterdir()] == ["r.parquet"]

    def interrupt(self: Any, n: int, **notes: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(jobs.query_many.Progress, "advance", interrupt)  # Ctrl-C as the first shard comes back
        query(workspace, engine, **options, output=str(two), shard_size=1)
    left = len(list(two.parent.rglob("part-*.parquet")))
    assert 1 <= left < 3 and not two.exists()
    again = query(workspace, engine, **options, output=str(two), shard_size=1)
    assert again.counts["in"] == n - again.figures["already_there"] < n
    assert again.figures["already_there"] in (left * BLOCK, (left + 1) * BLOCK), "a worker may have ended one meanwhile"
    assert pq.read_table(two).equals(pq.read_table(one)), "the same rows"
    third = query(workspace, engine, **options, output=str(two), shard_size=1)
    assert third.counts["in"] == 0 and third.figures["already_there"] == n

"""The job sql: figures, the terminal, files, and exit statuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.sql import main
from pipeline.encoders import save_card
from pipeline.sql import view_name
from pipeline.workspace import Workspace
from tests.pipeline.test_sql import CARD, D, N, embeddings, images
from tests.pipeline.test_tables import pairs


@pytest.fixture
def filled(workspace: Workspace) -> Workspace:
    save_card(workspace, CARD)
    workspace.table("pairs").append(pairs(list(range(1, 61))), "run")
    workspace.table("images").append(images([1, 2, 3]), "run")
    workspace.table("embeddings").append(embeddings(), "run")
    return workspace


def sql(capsys: pytest.CaptureFixture[str], workspace: Workspace, *arguments: str, status: int = 0) -> dict[str, Any]:
    assert main([*arguments, "--workspace", str(workspace.root), "--json"]) == status
    last: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return last


def shown(capsys: pytest.CaptureFixture[str], workspace: Workspace, *arguments: str) -> list[str]:
    assert main([*arguments, "--workspace", str(workspace.root)]) == 0
    return capsys.readouterr().out.splitlines()


def test_figures(filled: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    said = sql(capsys, filled, "--query", "SELECT pair_key, caption FROM pairs ORDER BY 1", "--limit", "2")
    assert said["columns"] == ["pair_key", "caption"] and said["types"] == ["BIGINT", "VARCHAR"]
    assert said["rows"] == [{"pair_key": 1, "caption": "a 1"}, {"pair_key": 2, "caption": "a 2"}]
    assert (said["row_count"], said["outcome"], said["job"]) == (60, "done", "sql")
    assert filled.table("runs").count() == 0, "it only reads"


def test_values_in_json(filled: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    query = (
        "SELECT sum(pair_key) s, 'nan'::DOUBLE n, TIMESTAMPTZ '2026-01-02 03:04:05Z' t, '\\x00\\x01'::BLOB b, "
        "[1, NULL] l, {'a': 0.5} d, 1.50::DECIMAL(5,2) e, NULL x, 1 a, 2 a FROM pairs"
    )
    (row,) = sql(capsys, filled, query)["rows"]
    assert row.pop("t").startswith("2026-01-02T03:04:05")
    assert row == {
        "s": 1830, "n": None, "b": "AAE=", "l": [1, None], "d": {"a": 0.5}, "e": 1.5, "x": None, "a": 1, "a_1": 2,
    }  # fmt: skip


def test_the_tables_are_listed(filled: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    tables = sql(capsys, filled)["tables"]
    assert {n: t["rows"] for n, t in tables.items() if t["rows"]} == {
        "pairs": 60, "images": 3, "embeddings": N, view_name(CARD.id): N,
    }  # fmt: skip
    assert tables["embeddings"]["columns"]["image_vec"] == f"FLOAT[{D}]"
    lines = shown(capsys, filled)
    assert max(map(len, lines)) <= 80 and any(line.split()[:2] == ["images", "3"] for line in lines)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT pair_key, url, repeat(caption, 100) AS caption FROM pairs",
        "SELECT * FROM images",
        "SELECT * FROM embeddings",
        "SELECT 'a\n\u001b[31mb\u202e' AS \"a column of a very long name that fits on no terminal, not even on yours\"",
        "SELECT [1, 2, 3, 4, 5] AS l, 'x'::BLOB AS b, NULL AS n",
        "SUMMARIZE pairs",
    ],
)
def test_the_table_fits_a_terminal(filled: Workspace, capsys: pytest.CaptureFixture[str], query: str) -> None:
    lines = shown(capsys, filled, query, "--limit", "4")
    assert lines and max(map(len, lines)) <= 80
    assert not any(c in "".join(lines) for c in "\x1b\u202e"), "captions cannot command the terminal"


def test_the_terminal_says_what_it_leaves_out(filled: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, filled, "SELECT pair_key, caption FROM pairs ORDER BY 1", "--limit", "3")
    assert [line.split() for line in lines[:2]] == [["pair_key", "caption"], ["1", "a", "1"]]
    assert lines[4].startswith("3 of 60 rows")


def test_output(filled: Workspace, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The same rows in every format, all of them whatever the limit."""
    query = "SELECT pair_key, similarity, caption, image_vec FROM embeddings ORDER BY 1"
    files = [tmp_path / f"out.{ending}" for ending in ("parquet", "csv", "jsonl")]
    for file in files:
        said = sql(capsys, filled, query, "--output", str(file), "--limit", "1")
        assert (said["row_count"], len(said["rows"]), said["outputs"]) == (N, 1, {"rows": str(file)})
    rows = pq.read_table(files[0]).to_pylist()
    assert len(rows) == N
    assert [json.loads(line) for line in files[2].read_text().splitlines()] == rows
    with files[1].open(newline="") as text:
        read = list(csv.DictReader(text))
    assert [(int(r["pair_key"]), r["caption"], json.loads(r["image_vec"])) for r in read] == [
        (r["pair_key"], r["caption"], r["image_vec"]) for r in rows
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "out.jsonl", "out.parquet", "ws"]


def test_output_of_no_rows(filled: Workspace, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for ending in ("parquet", "csv", "jsonl"):
        sql(capsys, filled, "SELECT url, 1 AS one FROM pairs WHERE false", "--output", str(tmp_path / f"o.{ending}"))
    assert pq.read_schema(tmp_path / "o.parquet").names == ["url", "one"]
    assert (tmp_path / "o.csv").read_text().strip() == "url,one" and (tmp_path / "o.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["SELECT captoin FROM pairs"], "did you mean caption"),
        (["DROP VIEW pairs"], "no single question"),
        ([" "], "--query is empty"),
        (["SELECT 1", "--output", "rows.xlsx"], "*.parquet or *.csv or *.jsonl"),
        (["SELECT 1", "--output", "no/such/folder/rows.csv"], "cannot be written"),
        (["SELECT * FROM read_csv('/etc/passwd')"], "cannot be answered"),
        (["SELECT 1", "--memory", "many"], "memory"),
    ],
)
def test_mistakes(
    filled: Workspace, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert said in sql(capsys, filled, *arguments, status=2)["error"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ws"]


def test_a_query_that_fails_leaves_no_file(
    filled: Workspace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    query = "SELECT pair_key, 1 / (pair_key - 50)::INT, error('here') FROM pairs WHERE pair_key > 49"
    sql(capsys, filled, query, "--output", str(tmp_path / "rows.csv"), status=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ws"]


def test_no_workspace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no workspace" in sql(capsys, Workspace(tmp_path / "none"), "SELECT 1", status=2)["error"]

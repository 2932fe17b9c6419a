"""SQL predicates: what they select, and that they cannot reach outside."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.predicate import matching_keys, matching_values
from schemas.errors import UsageError

ROWS = pa.table(
    {
        "pair_key": pa.array([1, 2, 3, 2**62], pa.int64()),
        "caption": ["a red circle", "A BLUE square; really", None, "x -- y"],
        "similarity": pa.array([0.1, 0.5, 0.9, None], pa.float32()),
        "width": pa.array([10, 20, 30, 40], pa.int32()),
    }
)


@pytest.mark.parametrize(
    ("predicate", "keys"),
    [
        ("true", [1, 2, 3, 2**62]),
        ("false", []),
        ("width > 15 AND similarity > 0.2", [2, 3]),
        ("caption LIKE '%red%' OR width = 40", [1, 2**62]),
        ("caption ILIKE '%blue%'", [2]),
        ("caption IS NULL", [3]),
        ("similarity < 1", [1, 2, 3]),
        ("caption = 'A BLUE square; really'", [2]),
        ("caption = 'x -- y'", [2**62]),
        ("width > 15 -- and a comment", [2, 3, 2**62]),
        ("pair_key IN (1, 3)", [1, 3]),
        ("width = (SELECT max(width) FROM pairs)", [2**62]),
    ],
)
def test_selects(predicate: str, keys: list[int]) -> None:
    assert sorted(matching_keys(ROWS, predicate).tolist()) == keys


@pytest.mark.parametrize(
    "predicate",
    [
        "",
        "width >",
        "no_such_column = 1",
        "no_such_function(width)",
        "width > 'wide'",
        "true; DROP TABLE pairs",
        "true; SELECT 1",
        "DROP TABLE pairs",
        "SELECT 1",
        "true) OR (1 = 1); COPY pairs TO '{folder}/out.csv'; --",
        "COPY pairs TO '{folder}/out.csv'",
        "ATTACH '{folder}/db'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "PRAGMA version",
        "true) UNION SELECT 7 --",
        "true) UNION SELECT 7 WHERE (true",
        "true UNION SELECT 7",
        "true LIMIT 1",
        "true, false",
        "EXISTS (SELECT * FROM read_csv('{folder}/secret.csv'))",
        "EXISTS (SELECT * FROM read_text('{folder}/secret.csv'))",
        "EXISTS (SELECT * FROM '{folder}/secret.csv')",
        "EXISTS (SELECT * FROM read_parquet('https://example.com/x.parquet'))",
        "EXISTS (SELECT * FROM glob('/*'))",
        "getenv('HOME') <> ''",
        "getvariable('x') IS NULL",
        "current_setting('threads') > '0'",
        "EXISTS (SELECT * FROM duckdb_settings())",
        "EXISTS (SELECT * FROM information_schema.tables)",
        "EXISTS (SELECT * FROM rows)",
        "EXISTS (DESCRIBE pairs)",
        "write_log('x') IS NULL",
        "caption = '\x00'",
        "caption = '\ud800'",
    ],
)
def test_refuses(predicate: str, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    with pytest.raises(UsageError, match="--where") as caught:
        matching_keys(ROWS, predicate.format(folder=tmp_path))
    assert caught.value.exit_status == 2
    assert [f.name for f in tmp_path.iterdir()] == ["secret.csv"], "nothing was written"
    assert matching_keys(ROWS, "true").tolist() == ROWS["pair_key"].to_pylist(), "nothing was changed"


def test_the_columns_are_named() -> None:
    with pytest.raises(UsageError) as caught:
        matching_keys(ROWS, "nowhere = 1")
    assert "caption" in caught.value.expected and "nowhere" in caught.value.actual


def test_no_rows() -> None:
    assert matching_keys(ROWS.slice(0, 0), "true").tolist() == []


def test_what_a_stranger_may_call() -> None:
    for predicate, keys in (
        ("length(caption) > 10 AND upper(caption) LIKE 'A%'", [1, 2]),
        ("regexp_matches(caption, '^a red') OR NOT caption ILIKE '%a%'", [1, 2**62]),
        ("coalesce(similarity, 1) > 0.6 AND width::DOUBLE / 10 >= 3", [3, 2**62]),
        ("CASE WHEN width IN (10, 20) THEN true ELSE similarity IS NULL END", [1, 2, 2**62]),
        ("width > (SELECT avg(width) FROM pairs)", [3, 2**62]),
        ("caption[1:2] = 'a ' AND similarity BETWEEN 0 AND 1", [1]),
    ):
        assert sorted(matching_values(ROWS, predicate, "pair_key", strict=True).tolist()) == keys, predicate
    for predicate in (
        "repeat(caption, 9) <> ''",
        "caption || caption <> ''",
        "lpad(caption, 9, 'x') <> ''",
        "[1] = [1]",
    ):
        assert len(matching_values(ROWS, f"{predicate} OR true", "pair_key")) == 4
        with pytest.raises(UsageError, match="is not allowed"):
            matching_values(ROWS, predicate, "pair_key", strict=True)

"""Further columns, changes of some columns, files put in the place of others, and what the log says beside the rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.tables import Table
from pipeline.workspace import Workspace
from schemas.errors import SchemaError
from schemas.tables import EMBEDDINGS
from tests.pipeline.test_tables import content, fresh, pairs

SCORE, LABEL = pa.field("score_Big", pa.float32()), pa.field("label", pa.string())


def scored(keys: list[int], scores: list[float | None], mark: str = "a") -> pa.Table:
    return pairs(keys, mark).append_column(SCORE, pa.array(scores, pa.float32()))


def scores(table: Table) -> dict[int, float | None]:
    return {row["pair_key"]: row["score_Big"] for row in table.read(["pair_key", "score_Big"]).to_pylist()}


def test_columns_beside_the_tables_own(workspace: Workspace) -> None:
    plain = workspace.table("pairs")
    assert list(plain.columns()) == plain.spec.schema.names, "of a table that is not there"
    plain.append(pairs([1]), "run")
    wide = plain.widened([SCORE, LABEL])
    assert list(plain.columns()) == plain.spec.schema.names, "added by the first write"
    assert scores(wide) == {1: None}
    part = wide.write_part(scored([2], [0.5]).append_column(LABEL, pa.array(["x"])))
    wide.commit([part], "run")
    assert plain.columns() == dict(zip(wide.spec.schema.names, wide.spec.schema.types, strict=True))
    # A plain handle reads them by name, and writes rows without them.
    plain.append(pairs([3]), "run")
    assert scores(plain) == {1: None, 2: 0.5, 3: None}
    where = pc.field("score_Big") > 0.1
    assert plain.read(["label", "pair_key"], where).to_pylist() == [{"label": "x", "pair_key": 2}]
    assert plain.batches(["label"]).read_all()["label"].to_pylist().count("x") == 1
    assert "score_Big" in plain.dataset().schema.names
    assert plain.read().schema == plain.spec.schema, "unasked for they are not read"
    with pytest.raises(SchemaError, match="no such columns"):
        plain.read(["score_small"])
    with pytest.raises(SchemaError, match="another column"):
        plain.widened([pa.field("label", pa.int64())])


def test_an_upsert_by_a_plain_handle_leaves_further_columns(workspace: Workspace) -> None:
    table = workspace.table("pairs").widened([SCORE])
    table.append(scored([1, 2], [0.5, 0.6]), "run")
    workspace.table("pairs").upsert(pairs([2, 3], "b"), "run")
    assert content(workspace.table("pairs")) == {1: "a", 2: "b", 3: "b"}
    assert scores(table) == {1: 0.5, 2: pytest.approx(0.6), 3: None}
    table.upsert(scored([2], [None], "c"), "run")
    assert scores(table) == {1: 0.5, 2: None, 3: None}


def test_some_columns_of_some_rows(workspace: Workspace) -> None:
    """Keys that are not there are passed over, and so is what the condition does not hold for."""
    table = workspace.table("pairs")
    table.append(pairs([1, 2, 3, 4]), "run")
    table.upsert(pairs([3], "other"), "run")
    changed = pa.table({"pair_key": [2, 3, 9], "source": ["a"] * 3, "caption": ["new"] * 3})
    version = table.update(changed, "run", "target.source IS NOT DISTINCT FROM source.source")
    assert version == table.version()
    rows = {row["pair_key"]: row["caption"] for row in table.read().to_pylist()}
    assert rows == {1: "a 1", 2: "new", 3: "other 3", 4: "a 4"}
    assert content(fresh(Path(str(workspace.root)))) == {1: "a", 2: "a", 3: "other", 4: "a"}


def test_a_part_in_the_place_of_files(workspace: Workspace) -> None:
    table = workspace.table("pairs").widened([SCORE])
    for keys in ([1, 2], [3], [4, 5]):
        workspace.table("pairs").append(pairs(keys), "run")
    files = [p for p in table.paths() if set(table.take({p: None}, ["pair_key"])["pair_key"].to_pylist()) & {1, 3}]
    part = table.write_part(scored([1, 2, 3], [0.25, 0.5, 1.0]))
    before = table.version()
    assert table.swap(files, part, "run") == 3
    assert table.version() == before + 2, "the column, then both files in one commit"
    assert content(workspace.table("pairs")) == dict.fromkeys(range(1, 6), "a")
    assert scores(table) == {1: 0.25, 2: 0.5, 3: 1.0, 4: None, 5: None}
    # Where one of them was changed meanwhile, nothing happens: what came instead is newer.
    (last,) = table.paths() - {part.path}
    late = table.write_part(scored([1, 2, 3, 4, 5], [0.0] * 5))
    workspace.table("pairs").upsert(pairs([4], "b"), "other")
    assert table.swap([part.path, last], late, "run") == 0
    assert scores(table)[1] == 0.25 and content(workspace.table("pairs"))[4] == "b"


def test_a_swap_that_another_writer_overtakes(workspace: Workspace) -> None:
    table, other = workspace.table("pairs"), fresh(Path(str(workspace.root)))
    table.append(pairs([1, 2]), "run")
    (file,) = table.paths()
    part = table.write_part(pairs([1, 2], "swapped"))
    stale = table._open_or_create()
    other.upsert(pairs([2], "newer"), "run")
    table._open_or_create = lambda opened=[stale]: opened.pop() if opened else Table._open_or_create(table)  # type: ignore[method-assign,misc,assignment]
    assert table.swap([file], part, "run") == 0
    assert content(other) == {1: "a", 2: "newer"}


def test_what_the_log_says_beside_the_rows(workspace: Workspace) -> None:
    table = workspace.table("pairs")
    assert (table.stamps(), table.writers(-1), table.foreign()) == ({}, set(), 0)
    table.append(pairs([1]), "one")
    assert table.record({"looked": 3}, "two") == table.version()
    table.upsert(pairs([1]), "three", record={"looked": 4})
    assert table.recorded("looked") == 4
    table.stamp({"clipmill.a": "{1}", "clipmill.b": "2"}, "four")
    assert table.stamps() == {"clipmill.a": "{1}", "clipmill.b": "2"}
    version = table.version()
    table.stamp({"clipmill.b": "2"}, "five")
    assert table.version() == version, "it stands there already"
    table.stamp({"clipmill.b": "3"}, "six")
    assert table.stamps() == {"clipmill.a": "{1}", "clipmill.b": "3"}
    assert table.writers(-1) == {"one", "two", "three", "four", "six"}
    assert table.writers(version) == {"six"} and table.writers(table.version()) == set()
    before = table.foreign()
    table.append(pairs([2]), "run")
    assert table.foreign() == before
    table.open().delete("pair_key = 1")  # type: ignore[union-attr]
    assert table.foreign() == before + 1
    table.append(pairs([3]), "run")
    table.widened([SCORE]).append(scored([4], [1.0]), "seven")
    assert table.foreign() == before + 1 and table.recorded("looked") == 4
    assert {"run", "seven"} <= table.writers(-1) and "" not in table.writers(-1)


def test_rewritten_files_keep_their_layout(workspace: Workspace) -> None:
    """Vectors that an upsert rewrites are as quick to read as before: neither compressed nor in a dictionary."""
    table = workspace.table("embeddings")
    n = 3000
    rows = pa.table(
        {
            "pair_key": range(n), "encoder": ["A"] * n, "image_vec": [bytes(8)] * n, "text_vec": [bytes(8)] * n,
            "similarity": pa.nulls(n, pa.float32()), "caption": ["c"] * n, "sha256": ["s"] * n, "run": ["r"] * n,
        },
        schema=EMBEDDINGS.schema,
    )  # fmt: skip
    table.append(rows, "run")
    table.upsert(rows.slice(5, 1), "run")
    for file in table.files():
        metadata = pq.read_metadata(file.removeprefix("file://"))
        for group in range(metadata.num_row_groups):
            column = metadata.row_group(group).column(EMBEDDINGS.schema.get_field_index("image_vec"))
            assert column.compression == "UNCOMPRESSED"
            assert not any("DICTIONARY" in encoding for encoding in column.encodings)
            assert metadata.row_group(group).num_rows <= 2048

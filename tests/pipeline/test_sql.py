"""SQL over the tables: against plain Python on the same rows; what is read; and that nothing else can be reached."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.encoders import save_card
from pipeline.sql import Database, view_name
from pipeline.workspace import Workspace
from schemas.errors import ClipmillError, SchemaError, UsageError
from schemas.tables import EMBEDDINGS, IMAGES
from schemas.vectors import normalise, pack
from tests.pipeline.test_tables import pairs
from tests.schemas.test_cards import encoder

N, D = 40, 16
KEYS = list(range(100, 100 + N))
IMAGE, TEXT = normalise(np.random.default_rng(0).normal(size=(2 * N, D))).astype(np.float16).reshape(2, N, D)
CARD = encoder().model_copy(update={"dim": D})


def embeddings(rows: slice = slice(None), card: Any = CARD, **other: Any) -> pa.Table:
    n = len(KEYS[rows])
    columns = {
        "pair_key": KEYS[rows], "encoder": [card.id] * n, "image_vec": pack(IMAGE[rows]), "text_vec": pack(TEXT[rows]),
        "similarity": np.einsum("nd,nd->n", IMAGE[rows], TEXT[rows], dtype=np.float32),
        "caption": [f"number {k}" for k in KEYS[rows]], "sha256": ["x"] * n, "run": ["r"] * n,
    }  # fmt: skip
    return pa.table(columns | other, schema=EMBEDDINGS.schema)


def images(keys: list[int]) -> pa.Table:
    rows = [
        dict.fromkeys(IMAGES.schema.names)
        | {"pair_key": k, "url": f"http://h/{k}", "status": "ok", "width": k, "image": bytes([k % 256]) * 4096}
        for k in keys
    ]
    return pa.Table.from_pylist(rows, schema=IMAGES.schema)


@pytest.fixture
def embedded(workspace: Workspace) -> Workspace:
    save_card(workspace, CARD)
    workspace.table("embeddings").append(embeddings(), "r")
    return workspace


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """Pairs of two commits, the second an upsert: its files were rewritten by delta-rs, with string views."""
    workspace = Workspace(tmp_path_factory.mktemp("sql") / "ws").prepare()
    table = workspace.table("pairs")
    table.append(pairs([1, 2, 3, 4]), "run")
    table.upsert(pairs([3, 5], "b"), "run")
    views = [pq.read_schema(f.removeprefix("file://")).field("url").type for f in table.files()]
    assert pa.string_view() in views, "else these tests show nothing"
    with Database(workspace) as database:
        yield database


def ask(source: Workspace | Database, query: str, memory: int | None = None) -> list[tuple[Any, ...]]:
    if isinstance(source, Workspace):
        with Database(source, memory) as database:
            return ask(database, query)
    return list(source.run(lambda: source.ask(query).fetchall()))


# ---- what is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "keys"),
    [
        ("true", [1, 2, 3, 4, 5]),
        ("source = 'b'", [3, 5]),
        ("source <> 'b'", [1, 2, 4]),
        ("caption IN ('a 1', 'b 5', 'nowhere')", [1, 5]),
        ("caption LIKE 'a%' AND pair_key > 1", [2, 4]),
        ("caption >= 'a 2' AND caption < 'b'", [2, 4]),
        ("extra IS NULL AND url IS NOT NULL", [1, 2, 3, 4, 5]),
        ("source = 'b' OR pair_key = 1", [1, 3, 5]),
        ("NOT source = 'b'", [1, 2, 4]),
        ("pair_key BETWEEN 2 AND 3", [2, 3]),
        ("caption = 'it''s not there'", []),
        ("url = 'http://b/5' AND source = 'b' AND pair_key <> 3", [5]),
    ],
)
def test_filters_over_rewritten_files(rewritten: Database, where: str, keys: list[int]) -> None:
    found = ask(rewritten, f"SELECT pair_key FROM pairs WHERE {where} ORDER BY 1")
    assert [key for (key,) in found] == keys
    assert ask(rewritten, f"SELECT count(*) FROM pairs WHERE {where}") == [(len(keys),)]


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("WITH b AS (SELECT * FROM pairs WHERE source = 'b') SELECT sum(pair_key) FROM b", [(8,)]),
        ("SELECT a.pair_key FROM pairs a JOIN pairs b USING (caption) WHERE b.source = 'b' ORDER BY 1", [(3,), (5,)]),
        ("SELECT source, count(*) FROM pairs GROUP BY source ORDER BY source", [("a", 3), ("b", 2)]),
        ("FROM pairs SELECT max(caption)", [("b 5",)]),
        ("-- a comment\n /* another */ SELECT 1;", [(1,)]),
        ("(SELECT 1) UNION ALL (SELECT 2) ORDER BY 1", [(1,), (2,)]),
        ("SELECT count(*) FROM runs", [(0,)]),
        ("SELECT count(*), count(image) FROM images WHERE status = 'ok'", [(0, 0)]),
        ("SELECT count(*) FROM pairs, images", [(0,)]),
    ],
)  # fmt: skip
def test_questions(rewritten: Database, query: str, rows: list[tuple[Any, ...]]) -> None:
    assert ask(rewritten, query) == rows


def test_describe_summarize_explain(rewritten: Database) -> None:
    assert [row[:2] for row in ask(rewritten, "DESCRIBE pairs")][:2] == [("pair_key", "BIGINT"), ("url", "VARCHAR")]
    assert {row[0]: row[2] for row in ask(rewritten, "SUMMARIZE pairs")}["caption"] == "a 1"
    assert "pairs" not in str(ask(rewritten, "EXPLAIN SELECT 1"))
    assert ask(rewritten, "EXPLAIN ANALYZE SELECT count(*) FROM pairs WHERE source = 'b'")


def test_columns_that_were_added(workspace: Workspace) -> None:
    table = workspace.table("pairs").widened([pa.field("score_Big", pa.float32())])
    table.append(pairs([1]).append_column("score_Big", pa.array([0.5], pa.float32())), "run")
    workspace.table("pairs").append(pairs([2]), "run")
    assert ask(workspace, "SELECT pair_key, score_Big FROM pairs ORDER BY 1") == [(1, 0.5), (2, None)]


# ---- vectors ---------------------------------------------------------------------------------------


def test_vectors_are_arrays(embedded: Workspace) -> None:
    described = {row[0]: row[1] for row in ask(embedded, "DESCRIBE embeddings")}
    assert described["image_vec"] == described["text_vec"] == f"FLOAT[{D}]"
    query = "SELECT pair_key, array_cosine_similarity(image_vec, text_vec), similarity FROM embeddings ORDER BY 1"
    keys, cosines, similarity = zip(*ask(embedded, query), strict=True)
    image, text = IMAGE.astype(np.float64), TEXT.astype(np.float64)
    expected = (image * text).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)
    assert list(keys) == KEYS
    np.testing.assert_allclose(cosines, expected, atol=1e-6)
    np.testing.assert_allclose(similarity, expected, atol=2e-3)
    (found,) = ask(embedded, "SELECT image_vec FROM embeddings WHERE pair_key = 117")
    assert np.array_equal(np.asarray(found[0], np.float16), IMAGE[17]), "bit for bit"


def test_a_search_in_sql(embedded: Workspace) -> None:
    """The nearest neighbours of one row's vector, over files that an upsert rewrote."""
    embedded.table("embeddings").upsert(embeddings(slice(3, 6)), "r2")
    query = (
        "SELECT e.pair_key FROM embeddings e, (SELECT image_vec v FROM embeddings WHERE caption = 'number 104') q "
        "ORDER BY array_inner_product(e.image_vec, q.v) DESC LIMIT 5"
    )
    expected = np.argsort(-(IMAGE.astype(np.float32) @ IMAGE[4].astype(np.float32)))[:5] + KEYS[0]
    assert [key for (key,) in ask(embedded, query)] == expected.tolist()


def test_no_vector_is_null(workspace: Workspace) -> None:
    save_card(workspace, CARD)
    text = pa.array([v if i % 2 else None for i, v in enumerate(pack(TEXT).to_pylist())], pa.binary())
    workspace.table("embeddings").append(embeddings(text_vec=text), "r")
    assert ask(workspace, "SELECT count(*), count(text_vec), count(image_vec) FROM embeddings") == [(N, N // 2, N)]
    query = "SELECT pair_key, text_vec[1], text_vec IS NULL FROM embeddings ORDER BY 1"
    expected = [(k, float(TEXT[i, 0]) if i % 2 else None, not i % 2) for i, k in enumerate(KEYS)]
    assert ask(workspace, query) == expected


def test_encoders_of_several_d(embedded: Workspace) -> None:
    wide = encoder(model="wide", weights_sha256="cd" * 32).model_copy(update={"dim": 2 * D})
    save_card(embedded, wide)
    both = normalise(np.concatenate([IMAGE, TEXT], 1)).astype(np.float16)
    embedded.table("embeddings").append(embeddings(card=wide, image_vec=pack(both), text_vec=pack(both)), "r")
    assert ask(embedded, "SELECT DISTINCT len(image_vec) FROM embeddings ORDER BY 1") == [(D,), (2 * D,)]
    for card, vectors in ((CARD, IMAGE), (wide, both)):
        view = view_name(card.id)
        types = {row[0]: row[1] for row in ask(embedded, f"DESCRIBE {view}")}
        assert types["image_vec"] == f"FLOAT[{card.dim}]"
        found = ask(embedded, f"SELECT pair_key, image_vec FROM {view} ORDER BY 1")
        assert [key for key, _ in found] == KEYS
        assert np.array_equal(np.asarray([v for _, v in found], np.float16), vectors)
        assert ask(embedded, f"SELECT count(*) FROM {view} WHERE pair_key < 110 AND caption <> 'x'") == [(10,)]
    query = "SELECT len(image_vec), image_vec FROM embeddings WHERE pair_key = 101 ORDER BY 1"
    for (count, vector), expected in zip(ask(embedded, query), (IMAGE[1], both[1]), strict=True):
        assert count == len(expected) and np.array_equal(np.asarray(vector, np.float16), expected)


def test_a_vector_of_another_length(workspace: Workspace) -> None:
    save_card(workspace, CARD)
    short = pa.array([b"\0" * 6] * N, pa.binary())
    workspace.table("embeddings").append(embeddings(text_vec=short), "r")
    assert ask(workspace, "SELECT count(image_vec) FROM embeddings") == [(N,)]
    with pytest.raises(SchemaError, match="another length") as caught:
        ask(workspace, "SELECT sum(text_vec[1]) FROM embeddings")
    assert "D=16" in caught.value.expected and "[6]" in caught.value.actual


def test_the_views_have_names_without_quotes() -> None:
    assert view_name("ViT-B-32-0123456789ab") == "embeddings_ViT_B_32_0123456789ab"


# ---- what is read ----------------------------------------------------------------------------------


def spoil(file: str, column: str) -> None:
    """Make a column of a Parquet file unreadable, and nothing else."""
    path = Path(file.removeprefix("file://"))
    metadata, data = pq.read_metadata(path), bytearray(path.read_bytes())
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(metadata.schema.names.index(column))
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(bytes(data))


def test_only_the_columns_that_are_used_are_read(workspace: Workspace) -> None:
    table = workspace.table("images")
    table.append(images([1, 2, 3]), "run")
    for file in table.files():
        spoil(file, "image")
    assert ask(workspace, "SELECT count(*) FROM images") == [(3,)]
    assert ask(workspace, "SELECT max(width) FROM images WHERE status = 'ok'") == [(3,)]
    assert ask(workspace, "SELECT url FROM images WHERE pair_key = 2") == [("http://h/2",)]
    assert ask(workspace, "SELECT count(*) FROM (SELECT * FROM images)") == [(3,)]
    with pytest.raises(ClipmillError, match="cannot be read"):
        ask(workspace, "SELECT sum(octet_length(image)) FROM images")


def test_only_the_files_that_may_hold_it_are_read(workspace: Workspace) -> None:
    table = workspace.table("images")
    table.append(images([1, 2]), "run")
    (first,) = table.files()
    table.append(images([3, 4]), "run")
    (second,) = set(table.files()) - {first}
    spoil(second, "image")
    # By the files' statistics of their keys, and by a text that only one of them has.
    for where in ("pair_key = 2", "url = 'http://h/2'", "url = 'http://h/2' AND status = 'ok' AND pair_key < 3"):
        assert ask(workspace, f"SELECT image FROM images WHERE {where}") == [(b"\2" * 4096,)]
    Path(second.removeprefix("file://")).unlink()
    assert ask(workspace, "SELECT url FROM images WHERE pair_key = 2") == [("http://h/2",)]
    with pytest.raises(ClipmillError, match="cannot be read") as caught:
        ask(workspace, "SELECT url FROM images WHERE pair_key = 3")
    assert "vacuumed" in caught.value.remedy


# ---- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a secret, in which we are: nothing in it may be read or changed."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "secret.csv").write_text("a\nsesame\n")
    pq.write_table(pa.table({"a": ["sesame"]}), folder / "secret.parquet")
    (folder / "secret.json").write_text('{"a": "sesame"}')
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SECRET", "sesame")
    before = {p: p.read_bytes() for p in folder.iterdir()}
    yield folder
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize(
    "query",
    [
        "", " ;", "-- nothing", "SELEC 1", "SELECT 1; SELECT 2", "SELECT 1; DROP VIEW pairs", "pairs",
        "INSERT INTO pairs SELECT * FROM pairs", "UPDATE pairs SET url = ''", "DELETE FROM pairs", "DROP VIEW pairs",
        "CREATE TABLE t AS SELECT 1", "CREATE MACRO m() AS 1", "CREATE SECRET s (TYPE s3)",
        "ALTER VIEW pairs RENAME TO p",
        "COPY pairs TO '{folder}/out.csv'", "COPY (SELECT 1) TO '{folder}/out.parquet'",
        "EXPORT DATABASE '{folder}/db'",
        "IMPORT DATABASE '{folder}'", "ATTACH '{folder}/db'", "ATTACH ':memory:' AS other", "DETACH memory", "USE temp",
        "INSTALL httpfs", "LOAD httpfs", "LOAD '{folder}/secret.csv'", "SET enable_external_access = true",
        "RESET memory_limit", "SET VARIABLE a = 1", "PRAGMA version", "PRAGMA table_info('pairs')",
        "PRAGMA enable_external_access", "CALL pragma_version()", "VACUUM", "CHECKPOINT", "BEGIN",
        "PREPARE p AS SELECT 1",
        "EXECUTE p", "ANALYZE", "EXPLAIN COPY pairs TO '{folder}/out.csv'",
        "EXPLAIN ANALYZE COPY pairs TO '{folder}/out.csv'", "EXPLAIN ANALYZE CREATE TABLE t AS SELECT 1",
        "EXPLAIN (FORMAT JSON) DROP VIEW pairs", "EXPLAIN ANALYZE SET memory_limit = '1TB'",
        "EXPLAIN EXPLAIN COPY pairs TO 'a'",
        "/* SELECT */ DROP VIEW pairs", "SELECT 1 /* ; */; COPY pairs TO '{folder}/out.csv'",
        "WITH a AS (SELECT 1) INSERT INTO pairs SELECT * FROM a",
        "WITH a AS (DELETE FROM pairs RETURNING *) SELECT * FROM a",
        "SELECT * FROM read_csv('{folder}/secret.csv')", "SELECT * FROM read_csv_auto('secret.csv')",
        "SELECT * FROM '{folder}/secret.csv'", "SELECT * FROM 'secret.parquet'", "FROM 'secret.json'",
        "SELECT * FROM read_parquet('{folder}/secret.parquet')", "SELECT * FROM parquet_scan(['secret.parquet'])",
        "SELECT * FROM parquet_metadata('secret.parquet')", "SELECT * FROM read_json('{folder}/secret.json')",
        "SELECT * FROM read_text('{folder}/secret.csv')", "SELECT * FROM read_blob('secret.*')",
        "SELECT * FROM sniff_csv('{folder}/secret.csv')", "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM glob('/*')",
        "SELECT * FROM read_csv('/dev/stdin')", "SELECT * FROM read_parquet('https://example.com/x.parquet')",
        "SELECT * FROM read_csv('s3://bucket/x.csv')", "SELECT * FROM delta_scan('{folder}')",
        "SELECT * FROM query('COPY pairs TO ''{folder}/out.csv''')", "SELECT * FROM query('SELECT 1; SELECT 2')",
        "SELECT * FROM query_table('{folder}/secret.csv')", "SELECT * FROM KEYS",
        "SELECT * FROM TEXT", "SELECT * FROM self",
        "SELECT getenv('SECRET')", "SELECT * FROM arrow_scan(1, 2, 3)", "SELECT * FROM pandas_scan(1)",
        "SELECT * FROM seq_scan('pairs')", "SELECT * FROM duckdb_secrets(redact := false)",
        "SELECT * FROM pairs AT (VERSION => 1)",
        "DESCRIBE SELECT * FROM '{folder}/secret.csv'", "SUMMARIZE '{folder}/secret.csv'", "DESCRIBE 'secret.parquet'",
        "EXPLAIN ANALYZE SELECT * FROM 'secret.csv'", "SELECT (SELECT a FROM 'secret.csv')",
    ],
)  # fmt: skip
def test_refuses(rewritten: Database, elsewhere: Path, query: str) -> None:
    with pytest.raises(UsageError) as caught:
        found = ask(rewritten, query.replace("{folder}", str(elsewhere)))
        assert "duckdb_secrets" in query and found == [], "there are none to be seen"
        raise UsageError("nothing was found")
    assert caught.value.exit_status == 2 and "sesame" not in str(caught.value)
    assert ask(rewritten, "SELECT count(*), min(url) FROM pairs") == [(5, "http://a/1")], "and all is as it was"


def test_settings_are_locked_in_every_way(rewritten: Database) -> None:
    settings = dict(ask(rewritten, "SELECT name, value FROM duckdb_settings()"))
    assert settings["enable_external_access"] == "false" and settings["lock_configuration"] == "true"
    assert settings["autoinstall_known_extensions"] == settings["autoload_known_extensions"] == "false"


@pytest.mark.parametrize(
    ("query", "near"),
    [
        ("SELECT captoin FROM pairs", "caption"),
        ("SELECT i.widht FROM images i", "width"),
        ("SELECT simlarity FROM embeddings", "similarity"),
        ("SELECT * FROM image", "images"),
        ("SELECT * FROM embedings WHERE pair_key = 1", "embeddings"),
        ("SELECT url FROM pairs ORDER BY adedd_run", "added_run"),
    ],
)
def test_a_wrong_name_gets_the_nearest(rewritten: Database, query: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        ask(rewritten, query)
    assert caught.value.remedy == f"did you mean {near}?"


@pytest.mark.parametrize("query", ["SELECT 'x'::INT", "SELECT nothing_like_it(1)", "SELECT url + 1 FROM pairs"])
def test_other_mistakes_are_told(rewritten: Database, query: str) -> None:
    with pytest.raises(UsageError, match="cannot be answered"):
        ask(rewritten, query)


# ---- limits ----------------------------------------------------------------------------------------


def test_the_memory_is_bounded(workspace: Workspace) -> None:
    assert ask(workspace, "SELECT sum(range) FROM range(1000)", 64 << 20) == [(499500,)]
    with pytest.raises(ClipmillError, match="more memory") as caught:
        ask(workspace, "SELECT len(list(range)) FROM range(200_000_000)", 64 << 20)
    assert caught.value.exit_status == 1 and "--memory" in caught.value.remedy


def test_what_does_not_fit_goes_to_disk_and_away_again(workspace: Workspace, elsewhere: Path) -> None:
    query = "SELECT max(n) FROM (SELECT range, row_number() OVER (ORDER BY hash(range)) n FROM range(1_500_000))"
    with Database(workspace, 32 << 20) as database:
        folder = Path(database._spill.name)
        assert ask(database, query) == [(1_500_000,)]
        assert any(folder.iterdir())
    assert not folder.exists()


def test_ctrl_c_stops_a_long_query(workspace: Workspace) -> None:
    endless = "SELECT count(*) FROM range(1_000_000_000) a, range(1_000_000_000) b WHERE hash(a.range + b.range) = 7"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the suite runs in the background
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        with Database(workspace) as database:
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                database.run(lambda: database.ask(endless).fetchall())
            assert database.run(lambda: database.ask("SELECT 1").fetchall()) == [(1,)], "and it can be asked again"
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)

"""Reading vectors: every one against its key, from parts as they are written and as delta-rs rewrites them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import pipeline.vectors
from pipeline.tables import Table
from pipeline.vectors import read_keys, read_vectors, vector_batches
from pipeline.vectors.pages import NotPlain, plain_values, seems_plain
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.errors import NothingToDo, SchemaError, UsageError, WorkspaceError
from schemas.tables import EMBEDDINGS
from schemas.vectors import pack

A, B = "a-000000000000", "b-000000000000"
DIM = {A: 8, B: 6}
SHIFT = {"image": 0, "text": 1}


def vector_of(keys: NDArray[np.int64], dim: int, modality: str = "image") -> NDArray[np.float16]:
    """What the tables below hold under these keys: a function of the key, exact in float16."""
    of = keys[:, None] % 1009 + SHIFT[modality]
    return ((of * (np.arange(dim) + 3)) % 2048 / 2048).astype(np.float16)


def rows_of(keys: NDArray[np.int64], encoder: str, text: bool = True) -> pa.Table:
    n, dim = len(keys), DIM[encoder]
    return pa.table(
        {
            "pair_key": keys,
            "encoder": pa.array([encoder] * n, pa.string()),
            "image_vec": pack(vector_of(keys, dim)),
            "text_vec": pack(vector_of(keys, dim, "text")) if text else pa.nulls(n, pa.binary()),
            "similarity": pa.array((keys % 100) / 100, pa.float32()),
            "caption": pa.array([f"caption {k % 10}" for k in keys.tolist()], pa.string()),
            "sha256": pa.nulls(n, pa.string()),
            "run": pa.array(["r"] * n, pa.string()),
        },
        schema=EMBEDDINGS.schema,
    )


def keys_of(seed: int, n: int) -> NDArray[np.int64]:
    return np.unique(np.random.default_rng(seed).integers(0, 2**63 - 1, n, dtype=np.int64))[
        np.random.default_rng(seed).permutation(n)
    ]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, NDArray[np.int64]]:
    """Three parts of A, one of several row groups, and one of B between them."""
    table = Workspace(tmp_path_factory.mktemp("ws")).table("embeddings")
    keys = keys_of(0, 4700)
    for some in (keys[:300], keys[300:4500], keys[4500:]):
        table.append(rows_of(some, A), "r")
    table.append(rows_of(keys[:500], B), "r")
    return table, keys


def check(found: tuple[NDArray[np.int64], NDArray[np.float16]], encoder: str = A, modality: str = "image") -> None:
    """Every vector is its key's."""
    keys, vectors = found
    assert (keys.dtype, vectors.dtype) == (np.int64, np.float16)
    np.testing.assert_array_equal(vectors, vector_of(keys, DIM[encoder], modality))


def test_whole_table(stored: tuple[Table, NDArray[np.int64]]) -> None:
    table, keys = stored
    for encoder, expected in ((A, keys), (B, keys[:500])):
        for modality in ("image", "text"):
            found = read_vectors(table, encoder, modality)
            check(found, encoder, modality)
            np.testing.assert_array_equal(np.sort(found[0]), np.sort(expected))
            np.testing.assert_array_equal(read_keys(table, encoder, modality), found[0], "the same order every time")
    ordered = read_vectors(table, A, ordered=True)
    check(ordered)
    np.testing.assert_array_equal(ordered[0], np.sort(keys))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_shares_are_disjoint_complete_and_even(stored: tuple[Table, NDArray[np.int64]], data: st.DataObject) -> None:
    table, keys = stored
    world = data.draw(st.integers(1, 9))
    span = data.draw(st.none() | st.tuples(st.integers(0, 2**63), st.integers(0, 2**63)))
    shares = [read_vectors(table, A, keys=span, rank=r, world=world, ordered=r == 0) for r in range(world)]
    for share in shares:
        check(share)
    sizes = [len(k) for k, _ in shares]
    assert max(sizes) - min(sizes) <= 1
    inside = keys if span is None else keys[(keys >= span[0]) & (keys.astype(object) < span[1])]
    np.testing.assert_array_equal(np.sort(np.concatenate([k for k, _ in shares])), np.sort(inside))


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 6000), world=st.integers(1, 3), among=st.booleans())
def test_batches_are_the_whole(stored: tuple[Table, NDArray[np.int64]], size: int, world: int, among: bool) -> None:
    table, keys = stored
    size = max(size, 200)
    only = np.sort(keys[::7]) if among else None
    for rank in range(world):
        whole, vectors = read_vectors(table, A, among=only, rank=rank, world=world)
        batches = list(vector_batches(table, A, size=size, among=only, rank=rank, world=world))
        assert [len(k) for k, _ in batches[:-1]] == [size] * (len(batches) - 1)
        np.testing.assert_array_equal(np.concatenate([k for k, _ in batches]), whole)
        np.testing.assert_array_equal(np.concatenate([v for _, v in batches]), vectors)
    if among:
        assert len(read_keys(table, A, among=only)) == len(keys[::7])


def test_where(stored: tuple[Table, NDArray[np.int64]]) -> None:
    table, keys = stored
    found = read_vectors(table, A, where="SIMILARITY >= 0.5 AND caption = 'caption 3'")
    check(found)
    wanted = keys[(keys % 100 >= 50) & (keys % 10 == 3)]
    np.testing.assert_array_equal(np.sort(found[0]), np.sort(wanted))
    nothing = read_vectors(table, A, where="similarity > 2")
    assert nothing[1].shape == (0, DIM[A]) and not len(nothing[0])
    for bad in ("no_such_column > 1", "true) UNION SELECT 1 --", "image_vec IS NULL"):
        with pytest.raises(UsageError, match="where"):
            read_vectors(table, A, where=bad)


def test_columns_added_later_can_be_asked_for(tmp_path: Path) -> None:
    table, keys = Workspace(tmp_path).table("embeddings"), keys_of(1, 20)
    table.append(rows_of(keys[:10], A), "r")
    wide = table.widened([pa.field("score_x", pa.float32())])
    rows = rows_of(keys[10:], A).append_column("score_x", pa.array(np.arange(10) / 10, pa.float32()))
    wide.append(rows, "r")
    found = read_vectors(table, A, where="score_x > 0.45")
    check(found)
    np.testing.assert_array_equal(np.sort(found[0]), np.sort(keys[15:]))


def test_parts_as_they_are_written_need_no_decoder(
    stored: tuple[Table, NDArray[np.int64]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.vectors, "_decoded", None)
    table, keys = stored
    check(read_vectors(table, A, dim=DIM[A]))
    check(read_vectors(table, B, "text", dim=DIM[B], among=np.sort(keys[:9])), B, "text")


@pytest.mark.parametrize("how", ["merge", "compact"])
def test_files_that_delta_rs_rewrote(tmp_path: Path, how: str) -> None:
    """Two encoders of different D in one file, string views, compression: the same vectors."""
    table, keys = Workspace(tmp_path).table("embeddings"), keys_of(2, 900)
    table.append(rows_of(keys[:600], A), "r")
    table.append(rows_of(keys[600:], A), "r")
    table.append(rows_of(keys[:400], B), "r")
    before = table.paths()
    if how == "merge":
        table.upsert(pa.concat_tables([rows_of(keys[::2], A), rows_of(keys[:400:2], B)]), "r")
    else:
        opened = table.open()
        assert opened is not None
        opened.optimize.compact()
        assert len(table.paths()) == 1
    assert not before & table.paths(), "every file is another one"
    for encoder, expected in ((A, keys), (B, keys[:400])):
        found = read_vectors(table, encoder, ordered=True)
        check(found, encoder)
        np.testing.assert_array_equal(found[0], np.sort(expected))
        some = read_vectors(table, encoder, "text", where="similarity < 0.3", rank=1, world=2)
        check(some, encoder, "text")
        assert 0 < len(some[0]) < len(expected) / 4


def test_rows_without_a_vector_are_left_out(tmp_path: Path) -> None:
    table, keys = Workspace(tmp_path).table("embeddings"), keys_of(3, 90)
    table.append(pa.concat_tables([rows_of(keys[:30], A), rows_of(keys[30:60], A, text=False)]), "r")
    table.append(rows_of(keys[60:], A, text=False), "r")
    table.append(rows_of(keys, B, text=False), "r")
    check(read_vectors(table, A))
    found = read_vectors(table, A, "text")
    check(found, modality="text")
    np.testing.assert_array_equal(np.sort(found[0]), np.sort(keys[:30]))
    with pytest.raises(NothingToDo, match="no text vectors of b-"):
        read_vectors(table, B, "text")
    table.upsert(rows_of(keys[:1], A), "r")  # rewritten by delta-rs, without statistics of the vectors
    for dim in (None, DIM[A]):
        again = read_vectors(table, A, "text", ordered=True, dim=dim)
        check(again, modality="text")
        np.testing.assert_array_equal(again[0], np.sort(keys[:30]))


def test_what_is_wrong_is_said(stored: tuple[Table, NDArray[np.int64]], tmp_path: Path) -> None:
    table, keys = stored
    with pytest.raises(NothingToDo, match="no image vectors of nobody"):
        read_vectors(table, "nobody")
    with pytest.raises(NothingToDo):
        read_vectors(Workspace(tmp_path).table("embeddings"), A)
    for dim in (7, 16):
        with pytest.raises(SchemaError, match=f"expected: {2 * dim} bytes"):
            read_vectors(table, A, dim=dim)
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(UsageError, match="no rank"):
            read_vectors(table, A, rank=rank, world=world)
    workspace = Workspace(tmp_path)
    card = EncoderCard(
        model="a", pretrained="x", weights_sha256="0" * 64, dim=4, image_size=8, mean=(0, 0, 0), std=(1, 1, 1),
        interpolation="bicubic", resize_mode="shortest", context_length=8, dtype="float32",
    )  # fmt: skip
    assert card.id == A
    mine = workspace.table("embeddings")
    mine.append(rows_of(keys[:5], A), "r")
    (workspace.root / "encoders").mkdir()
    (workspace.root / "encoders" / f"{A}.json").write_text(card.to_json())
    with pytest.raises(SchemaError, match="D=4"):
        read_vectors(mine, A)
    for file in (tmp_path / "tables" / "embeddings").glob("*.parquet"):
        file.unlink()
    with pytest.raises(WorkspaceError, match="vacuum"):
        read_vectors(mine, A)


def test_an_older_version_and_a_file_instead_of_memory(tmp_path: Path) -> None:
    table, keys = Workspace(tmp_path / "ws").table("embeddings"), keys_of(4, 50)
    version = table.append(rows_of(keys[:20], A), "r").version
    table.append(rows_of(keys[20:], A), "r")
    assert len(read_keys(table, A)) == 50
    found = read_vectors(table, A, version=version, ordered=True, into=str(tmp_path / "mapped"))
    check(found)
    np.testing.assert_array_equal(found[0], np.sort(keys[:20]))
    assert (tmp_path / "mapped").read_bytes() == found[1].tobytes()


# -- pages ---------------------------------------------------------------------------------------------


def chunk_of(column: pa.Array, **options: object) -> list[tuple[pa.Buffer, int]]:
    """The column chunks of a Parquet file with this column after another one, and their rows."""
    sink = io.BytesIO()
    table = pa.table({"n": np.arange(len(column)), "v": column})
    pq.write_table(table, sink, compression="none", **{"use_dictionary": False, **options})
    data = pa.py_buffer(sink.getvalue())
    footer = pq.read_metadata(io.BytesIO(sink.getvalue()))
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    return [(data.slice(g.column(1).data_page_offset, g.column(1).total_compressed_size), g.num_rows) for g in groups]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 300), dim=st.integers(1, 70), version=st.sampled_from(["1.0", "2.0"]),
    group=st.integers(1, 300), page=st.integers(1, 4000), batch=st.integers(1, 64), checksum=st.booleans(),
)  # fmt: skip
def test_pages_of_any_size(n: int, dim: int, version: str, group: int, page: int, batch: int, checksum: bool) -> None:
    rows = vector_of(np.arange(n), dim)
    chunks = chunk_of(
        pack(rows), data_page_version=version, row_group_size=group, data_page_size=page, write_batch_size=batch,
        write_page_checksum=checksum,
    )  # fmt: skip
    found = [v for chunk, count in chunks for v in plain_values(chunk, count, 2 * dim, nullable=True)]
    np.testing.assert_array_equal(np.concatenate(found).view(np.float16), rows)
    assert all(seems_plain(chunk, count, 2 * dim, nullable=True) for chunk, count in chunks)
    chunk, count = chunks[0]
    cut = chunk.slice(0, chunk.size - 1)
    with pytest.raises(NotPlain):
        plain_values(cut, count, 2 * dim, nullable=True)


def test_pages_of_a_column_without_nulls() -> None:
    rows = vector_of(np.arange(9), 3)
    schema = pa.schema([("n", pa.int64()), pa.field("v", pa.binary(), nullable=False)])
    sink = io.BytesIO()
    pq.write_table(pa.table([pa.array(np.arange(9)), pack(rows)], schema=schema), sink, compression="none",
                   use_dictionary=False)  # fmt: skip
    column = pq.read_metadata(io.BytesIO(sink.getvalue())).row_group(0).column(1)
    chunk = pa.py_buffer(sink.getvalue()).slice(column.data_page_offset, column.total_compressed_size)
    (found,) = plain_values(chunk, 9, 6, nullable=False)
    np.testing.assert_array_equal(found.copy().view(np.float16), rows)


def test_other_pages_are_left_to_arrow() -> None:
    even = [b"x" * 4] * 8
    cases = {
        "null": (pa.array([*even[:7], None], pa.binary()), {}),
        "width": (pa.array([b"x" * 8] * 8), {}),
        "widths that only add up": (pa.array([b"x" * 3, b"x" * 5] * 4), {}),
        "dictionary": (pa.array(even), {"use_dictionary": True}),
        "encoding": (pa.array(even), {"column_encoding": {"n": "PLAIN", "v": "DELTA_BYTE_ARRAY"}}),
    }
    for what, (column, options) in cases.items():
        for chunk, rows in chunk_of(column, **options):
            with pytest.raises(NotPlain):
                raise AssertionError(f"{what}: {plain_values(chunk, rows, 4, nullable=True)}")
            assert seems_plain(chunk, rows, 4, nullable=True) == (what == "widths that only add up")


@given(st.binary(max_size=200), st.integers(1, 5), st.booleans())
def test_no_bytes_break_the_parser(data: bytes, rows: int, nullable: bool) -> None:
    try:
        found = plain_values(pa.py_buffer(data), rows, 4, nullable=nullable)
    except NotPlain:
        return
    assert sum(map(len, found)) == rows

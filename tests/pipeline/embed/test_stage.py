"""Images to vectors, whatever the sizes of files, shards and batches are; scores; weights that are damaged."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from pipeline.embed.planning import Planner
from pipeline.embed.scores import Scores, score_fields
from pipeline.embed.stage import IMAGE_COLUMNS, DecodeStage, EmbedStage
from pipeline.models.encoder import Encoder
from pipeline.models.pixels import Decoder
from pipeline.workspace import Workspace
from schemas.errors import AuditError
from schemas.tables import EMBEDDINGS, IMAGES
from schemas.vectors import unpack
from tests.kills import image_row, save_clip
from tests.pipeline.models.test_clip import TINY

N, BAD = 41, (0, 7, 8, 40)
"""Images, some of which do not decode: the first, two in a row, the last."""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), TINY)


@pytest.fixture(scope="module")
def encoder(clip: Path) -> Encoder:
    return Encoder(f"local-dir:{clip}")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Rows of images by ascending key; every third has the caption of another."""
    made = [image_row(n) | ({"caption": "picture 0"} if n % 3 == 0 else {}) for n in range(N)]
    made.sort(key=lambda row: row["pair_key"])
    damage = [b"", b"no image", made[8]["image"][:60], None]
    for place, data in zip(BAD, damage, strict=True):
        made[place] = made[place] | {"image": data}
    return made


@pytest.fixture(scope="module")
def expected(encoder: Encoder, rows: list[dict[str, Any]]) -> dict[int, tuple[Any, Any]]:
    """The vectors of each image and caption that decodes, made one at a time."""
    good = [row for place, row in enumerate(rows) if place not in BAD]
    return {row["pair_key"]: (encoder.images([row["image"]])[0], encoder.texts([row["caption"]])[0]) for row in good}


def check(table: pa.Table, expected: dict[int, tuple[Any, Any]], card: Any) -> None:
    """Each row has the vectors of its own image and caption: other images' are far from them."""
    assert table.schema.names == EMBEDDINGS.schema.names
    keys = table["pair_key"].to_pylist()
    assert len(set(keys)) == len(keys)
    image, text = unpack(table["image_vec"], card.dim), unpack(table["text_vec"], card.dim)
    for i, key in enumerate(keys):
        np.testing.assert_allclose(image[i].astype(np.float32), expected[key][0], atol=1e-3)
        np.testing.assert_allclose(text[i].astype(np.float32), expected[key][1], atol=1e-3)
        similarity = table["similarity"][i].as_py()
        assert similarity == pytest.approx(float(expected[key][0] @ expected[key][1]), abs=1e-5)


def test_images_are_told_apart(expected: dict[int, tuple[Any, Any]]) -> None:
    """Else the other tests here would not notice a row with its neighbour's vector."""
    image = np.stack([v for v, _ in expected.values()])
    gaps = np.abs(image[:, None] - image[None]).max(axis=2) + np.eye(len(image))
    assert gaps.min() > 5e-3


@pytest.mark.parametrize(("shard", "batch"), [(1, 5), (4, 1), (4, 16), (13, 5), (13, 1000), (1000, 16)])
def test_any_files_shards_and_batches(
    shard: int, batch: int, workspace: Workspace, encoder: Encoder, rows: list[dict[str, Any]],
    expected: dict[int, tuple[Any, Any]],
) -> None:  # fmt: skip
    """As many rows as decode, each once and with its own vectors; decoded in the same worker, or by another before."""
    images, start, dice = workspace.table("images"), 0, random.Random(shard)
    while start < N:
        size = dice.choice([1, 2, 3, 19])
        images.append(pa.Table.from_pylist(rows[start : start + size], schema=IMAGES.schema), "run")
        start += size
    stage = EmbedStage(encoder, batch, "run")
    decode = DecodeStage(Decoder(encoder.card), encoder.card.image_size)
    with Planner(encoder.card.id) as planner:
        assert planner.work(images, workspace.table("embeddings"), images.version()).total == N
        taken = [images.take(s.keys, IMAGE_COLUMNS) for s in planner.shards(shard)]
    found = [stage(images) for images in taken]
    whole = pa.concat_tables([f.rows for f in found])
    assert sorted(whole["pair_key"].to_pylist()) == sorted(expected)
    check(whole, expected, encoder.card)
    assert sum(f.images for f in found) == N - len(BAD)
    assert sum(f.texts for f in found) == sum(len(set(f.rows["caption"].to_pylist())) for f in found)
    bad = {r["pair_key"]: r["sha256"] for f in found for r in f.bad.to_pylist()}
    assert bad == {rows[place]["pair_key"]: rows[place]["sha256"] for place in BAD}
    apart = [stage(decode(images)) for images in taken]
    for one, other in zip(found, apart, strict=True):
        assert one.rows.equals(other.rows) and one.bad.equals(other.bad), "the same batches, the same bits"
        assert (one.images, one.texts) == (other.images, other.texts)


def test_a_caption_that_is_missing(encoder: Encoder, rows: list[dict[str, Any]]) -> None:
    images = pa.Table.from_pylist([rows[1] | {"caption": None}], schema=IMAGES.schema).select(IMAGE_COLUMNS)
    (row,) = EmbedStage(encoder, 4, "run")(images).rows.to_pylist()
    assert row["caption"] is None
    np.testing.assert_allclose(np.frombuffer(row["text_vec"], "<f2"), encoder.texts([""])[0], atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
@pytest.mark.parametrize("what", ["image", "text"])
def test_damaged_weights(what: str, value: float, clip: Path, rows: list[dict[str, Any]]) -> None:
    encoder = Encoder(f"local-dir:{clip}")
    with torch.no_grad():
        (encoder.model.visual.proj if what == "image" else encoder.model.text_projection).fill_(value)
    images = pa.Table.from_pylist(rows[1:4], schema=IMAGES.schema).select(IMAGE_COLUMNS)
    with pytest.raises(AuditError, match=f"{what} vectors") as caught:
        EmbedStage(encoder, 2, "run")(images)
    assert all(str(row["pair_key"]) in caught.value.actual for row in rows[1:4])
    assert "weights" in caught.value.remedy


# -- scores --------------------------------------------------------------------------------------------


class First:
    """A head and a classifier by hand: the first number of the vector, and its sign."""

    name = "first"

    def __call__(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return vectors[:, 0]


def sign(vectors: NDArray[np.float32]) -> tuple[list[str], NDArray[np.float32]]:
    return ["+" if v > 0 else "-" for v in vectors[:, 0]], np.abs(vectors[:, 0])


def test_scores_with_the_vectors(encoder: Encoder, rows: list[dict[str, Any]]) -> None:
    images = pa.Table.from_pylist(rows, schema=IMAGES.schema).select(IMAGE_COLUMNS)
    found = EmbedStage(encoder, 8, "run", Scores([First()], sign))(images).rows
    names = ["score_first", "label", "label_score"]
    assert [f.name for f in score_fields(["first"], True)] == names
    assert found.schema.names == [*EMBEDDINGS.schema.names, *names]
    for row in found.to_pylist():
        first = float(np.frombuffer(row["image_vec"], "<f2")[0])
        assert row["score_first"] == pytest.approx(first, abs=1e-3)
        assert (row["label"], row["label_score"]) == ("+" if first > 0 else "-", pytest.approx(abs(first), abs=1e-3))
    assert EmbedStage(encoder, 8, "run", Scores([First()], sign))(images.slice(0, 1)).rows.num_rows == 0


def test_scores_from_stored_vectors_leave_other_encoders_alone(encoder: Encoder, rows: list[dict[str, Any]]) -> None:
    images = pa.Table.from_pylist(rows, schema=IMAGES.schema).select(IMAGE_COLUMNS)
    scores = Scores([First()], sign)
    made = EmbedStage(encoder, 8, "run", scores)(images).rows
    blank = made
    for name in ("score_first", "label", "label_score"):
        place = made.schema.get_field_index(name)
        blank = blank.set_column(place, made.schema.field(name), pa.nulls(made.num_rows, made.schema.field(name).type))
    other = blank.set_column(1, "encoder", pa.array(["other"] * made.num_rows))
    text_alone = blank.slice(0, 1).set_column(2, "image_vec", pa.nulls(1, pa.binary()))
    assert not any(scores.lacking(pa.concat_tables([other, made, text_alone]), encoder.card.id).to_pylist())
    assert scores.lacking(blank, encoder.card.id).to_pylist() == [True] * made.num_rows
    again = scores.again(text_alone, encoder.card.id, encoder.card.dim)
    assert again.to_pylist() == text_alone.to_pylist(), "an imported row without an image vector"
    again = scores.again(pa.concat_tables([other, blank]), encoder.card.id, encoder.card.dim)
    assert again.slice(0, made.num_rows).equals(other)
    filled = again.slice(made.num_rows)
    assert filled["label"].equals(made["label"])
    np.testing.assert_allclose(filled["score_first"].to_numpy(), made["score_first"].to_numpy(), atol=1e-3)

"""The collection: what a question finds, and what happens to an index while it is open."""

from __future__ import annotations

import doctest
import io
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.collection import Collection, choice, term
from pipeline.workspace import Workspace
from schemas.errors import CardError, EncoderMismatch, UsageError
from schemas.questions import Question
from tests.pipeline.collection.indexed import publish, vectors
from tests.schemas.test_cards import encoder
from tests.servers import png_bomb

N, D = 200, 8
KEYS = np.arange(1000, 1000 + N)
BOTH = {"image": vectors(N, D), "text": vectors(N, D, 1)}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "ws")
    publish(made, KEYS, BOTH, further={"width": np.arange(N, dtype=np.int32), "score_x": np.full(N, np.nan)})
    return made


@pytest.fixture
def collection(workspace: Workspace) -> Collection:
    return Collection(workspace)


# -- questions -----------------------------------------------------------------------------------------


def test_terms_are_a_weighted_sum_of_unit_vectors(collection: Collection) -> None:
    one = np.arange(1.0, D + 1)
    question = Question(terms=(term("vector", one, 2.0), term("key", 1003), term("key", 1004, -0.5)), k=7)
    image = BOTH["image"].astype(np.float64)
    unit = [v / np.linalg.norm(v) for v in (one, image[3], image[4])]
    expected = 2 * unit[0] + unit[1] - 0.5 * unit[2]
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(collection.vector_of(question), expected, atol=1e-6)
    order = np.argsort(-(image @ expected))[:7]
    results = collection.search(question)
    assert [row["pair_key"] for row in results.rows()] == KEYS[order].tolist()
    np.testing.assert_allclose([row["similarity"] for row in results.rows()], (image @ expected)[order], atol=1e-5)
    assert results.query == "2*a vector + 1003 + -0.5*1004" and results.keys.tolist() == KEYS[order].tolist()


def test_rows(collection: Collection) -> None:
    [row] = collection.search(key=1005, k=1).rows()
    assert list(row) == [
        "rank", "similarity", "pair_key", "caption", "url", "width", "height", "pair_similarity", "score_x",
    ]  # fmt: skip
    assert row | {"similarity": 1.0} == {
        "rank": 1, "similarity": 1.0, "pair_key": 1005, "caption": "pair 1005", "url": "https://h/1005", "width": 5,
        "height": None, "pair_similarity": 0.0, "score_x": None,
    }  # fmt: skip
    assert row["similarity"] == pytest.approx(1, abs=1e-3)
    similarity, keys = collection.search_vectors(BOTH["image"][:3].astype(np.float32), 4)
    rows = collection.rows(similarity, keys)
    assert [[r["pair_key"] for r in some] for some in rows] == keys.tolist()
    assert [[r["rank"] for r in some] for some in rows] == [[1, 2, 3, 4]] * 3


def test_no_similarity_above_1(collection: Collection) -> None:
    assert np.linalg.norm(BOTH["image"].astype(np.float64), axis=1).max() > 1  # as float16 has them
    assert max(collection.search(key=int(key), k=1).rows()[0]["similarity"] for key in KEYS) == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"text": "  "}, "empty"), ({"key": 1}, "no pair 1"), ({"key": 2**70}, "no pair"), ({"key": -1}, "key"),
        ({"vector": [0.0] * D}, "all zero"), ({"vector": [1.0] * (D + 1)}, f"{D} finite"),
        ({"vector": "abc"}, "no vector"), ({"key": "x"}, "no key"), ({"vector": [1e300] * D}, "finite"),
        ({"vector": [float("nan")] * D}, "finite"), ({"key": 1000, "k": 0}, "k:"), ({"key": 1000, "k": 10**6}, "k:"),
        ({"key": 1000, "modality": "sound"}, "modality"), ({"key": 1000, "where": "1 +"}, "--where"),
        ({"key": 1000, "nowhere": 1}, "nowhere"), ({}, "terms"), ({"image": b"no image"}, "image"),
        ({"image": b""}, "image"), ({"image": png_bomb(50_000)}, "too large|image"), ({"image": "/no/such"}, "image"),
        ({"image_url": "http://h/x.png"}, "not fetched"), ({"key": 1000, "unique": 0}, "unique"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(options: dict[str, object], problem: str, collection: Collection) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        collection.search(**options)  # type: ignore[arg-type]
    assert caught.value.exit_status == 2


def test_a_text_minus_itself_is_nothing(collection: Collection) -> None:
    with pytest.raises(UsageError, match="cancel each other out"):
        collection.search(Question(terms=(term("key", 1001), term("key", 1001, -1.0))))
    with pytest.raises(UsageError, match="cancel each other out"):
        collection.search(Question(terms=(term("key", 1001, 0.0),)))


def test_a_key_with_only_the_other_vector(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")
    publish(workspace, KEYS, {"image": BOTH["image"]})
    collection = Collection(workspace)
    assert collection.modalities == ("image",)
    vector = collection.vector_of(Question(terms=(term("key", 1002),), modality="text"))
    own = BOTH["image"][2].astype(np.float32)
    np.testing.assert_allclose(vector, own / np.linalg.norm(own), atol=1e-6)
    with pytest.raises(UsageError, match="no text vectors"):
        collection.search(key=1002, modality="text")


# -- choice --------------------------------------------------------------------------------------------


def test_threshold(collection: Collection) -> None:
    scores = BOTH["image"].astype(np.float32) @ (own := collection.vector_of(Question(terms=(term("key", 1000),))))
    above = int((scores >= 0.3).sum())
    assert len(collection.search(key=1000, k=N, threshold=0.3)) == above and 1 < above < N
    assert len(collection.search(vector=own, k=2, threshold=0.3)) == 2


def test_unique_searches_on_until_k_are_left(tmp_path: Path) -> None:
    """150 copies of one vector before all others: k = 5 needs many more than 5."""
    same = np.concatenate([np.repeat(BOTH["image"][:1], 150, 0), BOTH["image"][1:51]])
    workspace = Workspace(tmp_path / "ws")
    publish(workspace, KEYS, {"image": same})
    collection = Collection(workspace)
    found = collection.search(key=1000, k=5, unique=1.0).keys.tolist()
    scores = same.astype(np.float32) @ same[0].astype(np.float32)
    assert found == [1000, *KEYS[150:][np.argsort(-scores[150:])][:4].tolist()]
    assert len(collection.search(key=1000, k=100, unique=1.0)) == 51, "no more than there are"
    assert len(collection.search(key=1000, k=100, unique=1.0, where="pair_key < 1150")) == 1


def test_distinct_by_hand() -> None:
    angles = np.radians([0, 5, 30, 33, 90, 4])
    rows = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert choice.distinct(rows, float(np.cos(np.radians(10))), 10).tolist() == [0, 2, 4]
    assert choice.distinct(rows, float(np.cos(np.radians(4.5))), 10).tolist() == [0, 1, 2, 4]
    assert choice.distinct(rows, float(np.cos(np.radians(10))), 2).tolist() == [0, 2]
    many = np.repeat(rows, 200, 0)  # over several blocks
    assert choice.distinct(many, float(np.cos(np.radians(10))), 10).tolist() == [0, 400, 800]


def test_most_varied_by_the_formula() -> None:
    """Against the sum written out, step by step."""
    rows = vectors(30, 6, 3).astype(np.float32)
    scores = rows @ rows[0]
    for diversity in (0.0, 0.3, 0.7, 1.0):
        expected: list[int] = []
        while len(expected) < 8:

            def margin(i: int) -> float:
                near = max((float(rows[i] @ rows[j]) for j in expected), default=0.0)  # noqa: B023
                return (1 - diversity) * float(scores[i]) - diversity * near  # noqa: B023

            if expected or diversity < 1:
                expected.append(max((i for i in range(30) if i not in expected), key=margin))
            else:
                expected.append(int(np.argmax(scores)))
        assert choice.varied(rows, scores, 8, diversity).tolist() == expected, diversity


def test_diversity(collection: Collection) -> None:
    nearest, varied = (collection.search(key=1000, k=10, diversity=d) for d in (0.0, 0.9))
    assert varied.keys[0] == nearest.keys[0] == 1000 and len(varied) == 10
    cosines = [np.abs(v @ v.T)[~np.eye(10, dtype=bool)].mean()
               for r in (nearest, varied) for v in [collection.vectors(r.keys).astype(np.float32)]]  # fmt: skip
    assert cosines[1] < cosines[0]


# -- changes -------------------------------------------------------------------------------------------


def test_deleted_from_the_moment_on(workspace: Workspace, collection: Collection) -> None:
    other = Collection(workspace)
    assert other.search(key=1007, k=1).keys.tolist() == [1007]
    collection.delete([1007, 1008, 5])
    for one in (collection, other):
        found = one.search(vector=BOTH["image"][7], k=N).keys
        assert len(found) == N - 2 and 1007 not in found and len(one) == N - 2
        assert one.search(vector=BOTH["image"][7], k=N, where="pair_key < 1010").keys.size == 8
        assert one.records([1007, 1009])["pair_key"].to_pylist() == [1009]
        assert one.known([1007, 1009, 5]).tolist() == [False, True, False]
        assert one.deleted.tolist() == [1007, 1008] and one.tombstones.tolist() == [5, 1007, 1008]
        with pytest.raises(UsageError, match="no pair 1007"):
            one.search(key=1007)
    assert Collection(workspace).matching("pair_key < 1010").tolist() == [*range(1000, 1007), 1009]


def maps(folder: object) -> int:
    return Path("/proc/self/maps").read_text().count(str(folder))


def test_refresh_swaps_and_closes(workspace: Workspace) -> None:
    collection = Collection(workspace)
    assert not collection.refresh()
    similarity, keys = collection.search_vectors(BOTH["image"][:1].astype(np.float32), 10)
    records = workspace.index_dir(collection.encoder_id) / "records" / "records-v1.arrow"
    assert maps(records) > 0
    fresh = np.arange(5000, 5000 + N)
    publish(workspace, np.append(fresh[:-1], 1000), BOTH, version="v2")
    assert collection.card.version == "v1" and collection.search(key=1001, k=1).keys.tolist() == [1001]
    assert collection.refresh() and collection.card.version == "v2" and not collection.refresh()
    assert maps(records) == 0
    assert collection.search(key=5001, k=1).keys.tolist() == [5001]
    question = Question(terms=(term("vector", BOTH["image"][0]),))
    late = collection.finish(question, BOTH["image"][0].astype(np.float32), similarity[0], keys[0])
    assert set(late.keys.tolist()) <= {1000, *fresh.tolist()}, "what is gone meanwhile is left out"


def test_searches_while_versions_change(workspace: Workspace) -> None:
    """Every answer is one version's: all keys of it, none of another one."""
    collection = Collection(workspace)
    wrong: list[object] = []
    stop = threading.Event()

    def search() -> None:
        try:
            while not stop.is_set():
                _, keys = collection.search_vectors(BOTH["image"][:2].astype(np.float32), 20)
                if len(set((keys // 1000).ravel().tolist())) != 1 or (keys < 0).any():
                    wrong.append(keys)
                collection.rows(np.zeros(keys.shape, np.float32), keys)
        except Exception as exc:
            wrong.append(exc)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(2, 8):
        publish(workspace, np.arange(n * 1000, n * 1000 + N), BOTH, version=f"v{n}")
        assert collection.refresh()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("file", ["v2/image.faiss", "records/records-v2.arrow"])
@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_version_is_refused_and_the_old_one_goes_on(file: str, damage: str, workspace: Workspace) -> None:
    collection = Collection(workspace)
    publish(workspace, KEYS[::-1].copy(), BOTH, version="v2")
    path = Path(str(workspace.index_dir(collection.encoder_id) / file))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data) if damage == "changed" else bytes(data[:-7]))
    with pytest.raises(CardError, match=path.name):
        collection.refresh()
    assert collection.search(key=1001, k=1).keys.tolist() == [1001] and collection.card.version == "v1"
    for verify in (True, 1 << 30):
        with pytest.raises(CardError, match=path.name):
            Collection(workspace, verify=verify)
    if damage == "truncated":
        with pytest.raises(CardError, match=path.name):
            Collection(workspace, verify=1000)


def test_another_encoder(workspace: Workspace) -> None:
    folder = workspace.root / "indices"
    (folder / encoder(dim=D).id).rename(folder / "ViT-L-14-0123456789ab")
    with pytest.raises(EncoderMismatch) as caught:
        Collection(workspace)
    assert "ViT-L-14-0123456789ab" in str(caught.value) and encoder(dim=D).id in str(caught.value)


def test_which_index(workspace: Workspace) -> None:
    other = encoder(dim=D, weights_sha256="cd" * 32, model="RN50")
    publish(workspace, KEYS, BOTH, card=other)
    assert Collection(workspace, "RN50").encoder_id == Collection(workspace, other.id).encoder_id == other.id
    for name in (None, "ViT-H"):
        with pytest.raises(UsageError, match=r"which encoder's index|no index of ViT-H") as caught:
            Collection(workspace, name)
        assert other.id in caught.value.expected
    with pytest.raises(UsageError, match="no workspace"):
        Collection(str(workspace.root / "elsewhere"))


# -- pictures ------------------------------------------------------------------------------------------


def test_the_example_and_pictures(tmp_path: Path) -> None:
    """The class's own example, over a real, tiny encoder and real images; then what a notebook shows."""
    from tests.jobs.embedded import workspace_with_vectors
    from tests.kills import image_row, save_clip

    workspace, card = workspace_with_vectors(tmp_path / "ws", save_clip(tmp_path / "clip", TINY), 12)
    rows = workspace.table("embeddings").read()
    both = {m: np.stack([np.frombuffer(v, "<f2") for v in rows[f"{m}_vec"].to_pylist()]) for m in ("image", "text")}
    keys = rows["pair_key"].to_numpy()
    [file] = workspace.table("images").paths()
    further = {"width": np.full(12, 16, np.int32), "file": [file] * 12, "caption": ["<b>\x1b[31m&"] * 12}
    publish(workspace, keys, both, card=card, further=further)

    found = doctest.DocTestFinder().find(Collection, globs={"Collection": Collection, "workspace": str(workspace.root)})
    example = next(test for test in found if test.examples)
    told = io.StringIO()
    assert doctest.DocTestRunner().run(example, out=told.write).failed == 0, told.getvalue()

    collection = Collection(workspace)
    picture = image_row(3)["image"]
    results = collection.search(image=picture, k=5)
    key = image_row(3)["pair_key"]
    assert results.keys[0] == key and results.images()[0] == picture
    assert collection.images([key, 5]) == {key: picture}
    html = results._repr_html_()
    assert html.count("data:image/jpeg;base64,") == 5 and "<b>" not in html and "\x1b" not in html
    assert "&lt;b&gt;" in html
    page = results.sheet(tmp_path / "new" / "sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 5 and page.startswith("<!doctype html>")
    with Image.open(results.sheet(str(tmp_path / "sheet.png"))) as sheet:
        assert sheet.format == "PNG" and sheet.width > 5 * 96
    for bad in ("sheet.gif", "sheet"):
        with pytest.raises(UsageError, match="contact sheet"):
            results.sheet(tmp_path / bad)
    collection.delete([key])
    assert collection.images([key]) == {} and key not in collection.search(image=picture, k=12).keys
    weights = encoder(dim=card.dim)
    publish(workspace, keys, both, card=weights.model_copy(update={"model": card.model}))
    with pytest.raises(EncoderMismatch):
        Collection(workspace, weights.model_copy(update={"model": card.model}).id).search("a text")


TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}

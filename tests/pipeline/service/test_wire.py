"""clip-retrieval's protocol: requests as its ClipClient sends them, field for field, and what it reads."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from pipeline.models.encoder import Encoder
from pipeline.service.wire import KnnBody, _pleasing, _safe
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from tests.kills import image_row
from tests.pipeline.service.asking import Client, nearest, vectors
from tests.pipeline.service.conftest import N

Indexed = tuple[Workspace, EncoderCard]


def sent(indice_name: str | None, **asked: Any) -> bytes:
    """The body that ClipClient 2.45 posts (no Content-Type beside it)."""
    fields = {
        "text": None, "image": None, "image_url": None, "embedding_input": None, "deduplicate": True,
        "use_safety_model": True, "use_violence_detector": True, "indice_name": indice_name, "use_mclip": False,
        "aesthetic_score": 9, "aesthetic_weight": 0.5, "modality": "image", "num_images": 40, "num_result_ids": 40,
    }  # fmt: skip
    return json.dumps(fields | asked).encode()


def test_text_image_and_vector(client: Client, indexed: Indexed, encoder: Encoder) -> None:
    known, name, row = vectors(*indexed), indexed[1].id, image_row(9)

    def ask(**asked: Any) -> list[dict[str, Any]]:
        answer = client.ask("POST", "/knn-service", sent(name, **asked))
        assert answer.status == 200, answer.body
        return list(answer.json)

    found = ask(text="a red circle", deduplicate=False, num_images=5, num_result_ids=5)
    query = encoder.texts(["a red circle"])[0]
    assert [r["id"] for r in found] == nearest(known, query, 5)
    assert all(r["similarity"] == pytest.approx(known[r["id"]] @ query, abs=2e-3) for r in found)
    assert all({"url", "caption", "id", "similarity"} <= set(r) for r in found)
    picture = base64.b64encode(row["image"]).decode()
    for asked in ({"image": picture}, {"embedding_input": known[row["pair_key"]].tolist()}):
        first = ask(**asked)[0]
        assert (first["id"], first["url"], first["caption"]) == (row["pair_key"], row["url"], row["caption"])
        assert first["similarity"] == pytest.approx(1, abs=2e-3)
    captions = vectors(*indexed, "text")
    found = ask(text="b", modality="text", deduplicate=False, num_images=3, num_result_ids=6)
    assert [r["id"] for r in found] == nearest(captions, encoder.texts(["b"])[0], 6)
    assert ["caption" in r for r in found] == [True] * 3 + [False] * 3
    apart = [known[r["id"]] for r in ask(text="c", num_images=N, num_result_ids=N)]
    assert max(float(a @ b) for i, a in enumerate(apart) for b in apart[:i]) < 0.945


def test_lists_and_metadata(client: Client, indexed: Indexed) -> None:
    assert client.ask("GET", "/indices-list").json == [indexed[1].id]
    rows = [image_row(2), image_row(8)]
    body = {"ids": [row["pair_key"] for row in rows], "indice_name": indexed[1].id}
    found = client.ask("POST", "/metadata", body).json
    assert [f["id"] for f in found] == body["ids"]
    assert [(f["metadata"]["url"], f["metadata"]["caption"]) for f in found] == [(r["url"], r["caption"]) for r in rows]
    assert client.ask("POST", "/metadata", body | {"ids": []}).json == []


def test_errors_have_a_message(client: Client, indexed: Indexed) -> None:
    for body, status in (
        (sent("laion5B", text="a"), 404), (sent(indexed[1].id), 422), (sent(None, text="a", num_result_ids=0), 422),
        (sent(None, text="a", num_result_ids=9999), 422), (b"[", 400),
    ):  # fmt: skip
        answer = client.ask("POST", "/knn-service", body)
        assert answer.status == status and answer.json["message"] == answer.json["error"]["problem"]
    assert client.ask("POST", "/metadata", {"ids": [5], "indice_name": indexed[1].id}).status == 404


def test_scores_take_the_place_of_their_models() -> None:
    rows: list[dict[str, Any]] = [
        {"pair_key": 1, "similarity": 0.30, "score_aesthetic": 4.0, "score_nsfw": 0.1},
        {"pair_key": 2, "similarity": 0.29, "score_aesthetic": 8.0, "score_nsfw": 0.9},
        {"pair_key": 3, "similarity": 0.28, "score_aesthetic": 9.0, "score_nsfw": None},
    ]
    body = KnnBody(text="a", aesthetic_score=9, aesthetic_weight=0.5, use_safety_model=True)
    # 0.30 + 0.5 * 0.5 = 0.55; 0.29 + 0.5 * 0.9 = 0.74; 0.28 + 0.5 * 1 = 0.78
    assert [row["pair_key"] for row in _pleasing(rows, body)] == [3, 2, 1]
    assert [row["pair_key"] for row in rows if _safe(row, body)] == [1, 3]
    assert _pleasing(rows, KnnBody(text="a", aesthetic_score="", aesthetic_weight="")) == rows
    plain = [{"pair_key": 1, "similarity": 0.3}]
    assert _pleasing(plain, body) == plain and _safe(plain[0], body)

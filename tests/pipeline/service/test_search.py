"""Searching over HTTP: the same as brute force over the table's vectors, one at a time and many at once."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from pipeline.models.encoder import Encoder
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.vectors import normalise
from tests.kills import image_row
from tests.pipeline.service.asking import Client, at_once, nearest, vectors
from tests.pipeline.service.conftest import N

Indexed = tuple[Workspace, EncoderCard]


def test_by_text_as_brute_force(client: Client, indexed: Indexed, encoder: Encoder) -> None:
    known, query = vectors(*indexed), encoder.texts(["a red circle"])[0]
    answer = client.search({"text": "a red circle"}, k=7).json
    expected = nearest(known, query, 7)
    assert [int(r["key"]) for r in answer["results"]] == expected
    assert [r["rank"] for r in answer["results"]] == list(range(1, 8))
    np.testing.assert_allclose(
        [r["similarity"] for r in answer["results"]], [known[k] @ query for k in expected], atol=2e-3
    )
    rows = {
        r["pair_key"]: r for r in indexed[0].table("images").read(["pair_key", "caption", "url", "width"]).to_pylist()
    }
    for result in answer["results"]:
        row = rows[int(result["key"])]
        assert (result["caption"], result["url"], result["width"]) == (row["caption"], row["url"], row["width"])
    assert answer["index"] == indexed[1].id and answer["version"]
    assert 0 <= answer["ms"]["encode"] <= answer["ms"]["total"] >= answer["ms"]["search"] >= 0


def test_every_kind_of_term_and_their_mix(client: Client, indexed: Indexed, encoder: Encoder) -> None:
    known = vectors(*indexed)
    row = image_row(7)
    key, image = row["pair_key"], row["image"]
    picture = {"image": base64.b64encode(image).decode()}
    assert client.keys({"key": str(key)}, k=1) == client.keys({"key": key}, k=1) == [key]
    assert client.keys(picture, k=1) == [key]
    vector = (3 * known[key]).tolist()
    assert client.keys({"vector": vector}, k=5) == nearest(known, known[key], 5)
    red = encoder.texts(["red"])[0]
    mixed = normalise((known[key] + 0.5 * red)[None])[0]
    assert client.keys({"key": key}, {"text": "red", "weight": 0.5}, k=5) == nearest(known, mixed, 5)
    assert client.keys({"text": "red", "weight": -1}, k=3) == nearest(known, -red, 3)
    captions = vectors(*indexed, "text")
    assert client.keys(picture, k=4, modality="text") == nearest(captions, encoder.images([image])[0], 4)


def test_vectors_of_terms(client: Client, indexed: Indexed, encoder: Encoder) -> None:
    row = image_row(7)
    picture = {"image": base64.b64encode(row["image"]).decode()}
    terms = [{"text": "red", "weight": -2}, picture, {"key": str(row["pair_key"])}, {"vector": [3.0] * 16}]
    expected = [
        encoder.texts(["red"])[0], encoder.images([row["image"]])[0], vectors(*indexed, "text")[row["pair_key"]],
        np.full(16, 0.25),
    ]  # fmt: skip
    answer = client.ask("POST", "/v1/vectors", {"terms": terms, "modality": "text"}).json
    assert (answer["index"], answer["dim"]) == (indexed[1].id, 16)
    np.testing.assert_allclose(answer["vectors"], expected, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(answer["vectors"], axis=1), 1, atol=1e-5)
    for body, status in (
        ({"terms": []}, 422),
        ({"terms": [{"text": "a"}] * 2000}, 422),
        ({"terms": [{"key": "5"}]}, 404),
        ({"terms": [{"text": "a"}], "index": "none"}, 404),
        ({"terms": [{"text": "a"}, {"image": "AAAA"}]}, 422),
    ):
        assert client.ask("POST", "/v1/vectors", body).status == status


def test_where_threshold_and_unique(client: Client, indexed: Indexed, encoder: Encoder) -> None:
    known, query = vectors(*indexed), encoder.texts(["x"])[0]
    captions = {
        r["pair_key"]: r["caption"] for r in indexed[0].table("images").read(["pair_key", "caption"]).to_pylist()
    }
    few = {k: v for k, v in known.items() if "5" in captions[k]}
    assert client.keys({"text": "x"}, k=4, where="caption like '%5%'") == nearest(few, query, 4)
    tenth = float(known[nearest(known, query, 10)[9]] @ query)
    assert 5 <= len(client.keys({"text": "x"}, k=30, threshold=tenth + 1e-3)) < 10
    near = float(np.quantile([known[a] @ known[b] for a in known for b in known if a < b], 0.7))
    apart = client.keys({"text": "x"}, k=N, unique=near)
    assert apart[0] == nearest(known, query, 1)[0] and 1 < len(apart) < N
    assert max(float(known[a] @ known[b]) for i, a in enumerate(apart) for b in apart[:i]) < near + 1e-3
    assert all(
        max(float(known[a] @ known[b]) for b in apart) > near - 1e-3 for a in known
    )  # what is left out is near one
    assert len(client.keys({"text": "x"}, k=6, diversity=0.5)) == 6


def test_many_at_once_get_the_same_as_alone(client: Client) -> None:
    questions: list[dict[str, Any]] = [
        {"terms": [{"text": f"picture {i % 11}"}], "k": 1 + i % 9, "modality": ("image", "text")[i % 2]}
        | ({"threshold": 0.0} if i % 5 == 0 else {}) | ({"where": "width = 16"} if i % 7 == 0 else {})
        for i in range(64)
    ]  # fmt: skip

    def ask(question: dict[str, Any]) -> Any:
        answer = client.ask("POST", "/v1/search", question)
        assert answer.status == 200, answer.body
        return [(r["key"], pytest.approx(r["similarity"], abs=1e-4)) for r in answer.json["results"]]

    alone = [ask(question) for question in questions]
    assert at_once(16, ask, questions) == alone
    together = client.ask("POST", "/v1/batch", {"questions": questions}).json["answers"]
    assert [[(r["key"], r["similarity"]) for r in a["results"]] for a in together] == alone


def test_a_bad_question_of_a_batch_has_its_error_in_its_place(client: Client) -> None:
    good: dict[str, Any] = {"terms": [{"text": "a"}], "k": 2}
    questions = [good, good | {"where": "nonsense("}, good | {"terms": [{"key": 1}]}, good]
    answers = client.ask("POST", "/v1/batch", {"questions": questions}).json["answers"]
    assert [a["error"]["code"] if "error" in a else len(a["results"]) for a in answers] == [2, "where", "unknown", 2]


def test_indices_and_openapi(client: Client, indexed: Indexed) -> None:
    (info,) = client.ask("GET", "/v1/indices").json["indices"]
    assert (info["name"], info["count"], info["deleted"], info["dim"]) == (indexed[1].id, N, 0, indexed[1].dim)
    assert {f["modality"] for f in info["files"]} == set(info["modalities"]) == {"image", "text"}
    assert all(f["recall_at_10"] == 1.0 and f["count"] == N for f in info["files"])
    assert {"caption", "width", "similarity"} <= set(info["columns"])
    api = client.ask("GET", "/openapi.json").json
    schemas = api["components"]["schemas"]
    assert {"SearchBody", "SearchAnswer", "ProblemAnswer"} <= set(schemas)
    assert "terms" in schemas["SearchBody"]["properties"]
    body = api["paths"]["/v1/search"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].endswith("/SearchBody")

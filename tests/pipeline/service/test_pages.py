"""The page and its policy; health, readiness, metrics; ending in order."""

from __future__ import annotations

import asyncio
import re
import socket
import threading

import pytest

from pipeline.collection import Collection
from pipeline.service import Options
from pipeline.service.errors import Refused
from pipeline.service.pages import FOLDER
from pipeline.service.service import Service
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.questions import Question
from tests.pipeline.service.asking import Client, at_once, serving, vectors

Indexed = tuple[Workspace, EncoderCard]


def test_the_page_comes_with_a_strict_policy(client: Client) -> None:
    answer = client.ask("GET", "/")
    assert answer.body == (FOLDER / "index.html").read_bytes()
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert client.ask("GET", "/", if_none_match=answer.headers["etag"]).status == 304
    assert client.ask("HEAD", "/").body == b""
    for name in re.findall(r'(?:src|href)="page/([^"]+)"', answer.body.decode()):
        part = client.ask("GET", f"/page/{name}")
        assert (part.status, part.body) == (200, (FOLDER / name).read_bytes())
        assert part.headers["content-type"].split(";")[0] in ("text/javascript", "text/css")
    for name in ("nothing.js", "..%2Fapp.py", "../app.py", "%2e%2e/options.py"):
        assert client.ask("GET", f"/page/{name}").status == 404


def test_no_answer_is_kept_or_framed(client: Client) -> None:
    headers = client.ask("GET", "/v1/indices").headers
    assert headers["cache-control"] == "no-store" and "server" not in headers
    assert "default-src 'none'" in headers["content-security-policy"]


def test_metrics(indexed: Indexed) -> None:
    with serving(indexed[0], replica="seven") as client:
        at_once(4, lambda i: client.search({"text": f"t{i % 3}"}), list(range(12)))
        client.search({"text": "a"}, k=0)
        client.ask("GET", "/some/path")
        text = client.ask("GET", "/metrics").body.decode()
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert figures['clipmill_requests_total{route="/v1/search",status="200"}'] == "12.0"
    assert figures['clipmill_requests_total{route="/v1/search",status="422"}'] == "1.0"
    assert figures['clipmill_requests_total{route="other",status="404"}'] == "1.0"
    assert figures['clipmill_request_seconds_count{route="/v1/search"}'] == "13.0"
    name = indexed[1].id
    assert figures[f'clipmill_batch_size_sum{{index="{name}",kind="image"}}'] == "12.0"
    assert figures[f'clipmill_index_keys{{index="{name}"}}'] == "60.0"
    assert figures['clipmill_replica_info{replica="seven"}'] == "1.0"


def test_ready_once_the_encoder_is_loaded(indexed: Indexed) -> None:
    with serving(indexed[0], warm=True) as client:
        assert client.ask("GET", "/healthz").json == {"status": "ok"}
        while (answer := client.ask("GET", "/readyz")).status == 503:
            assert answer.headers["retry-after"]
        assert answer.json == {"status": "ready"}


def test_nobody_waits_for_the_encoder(indexed: Indexed) -> None:
    async def ask() -> None:
        service = Service({indexed[1].id: Collection(indexed[0])}, Options(warm=True))  # and it is not being loaded
        vector = next(iter(vectors(*indexed).values())).tolist()
        found = await service.answer(Question.model_validate({"terms": [{"vector": vector}], "k": 3}), None)
        assert len(found["results"]) == 3
        with pytest.raises(Refused) as refused:
            await service.answer(Question.of(text="a"), None)
        assert refused.value.status == 503 and refused.value.headers["retry-after"]

    asyncio.run(ask())


def test_a_request_under_way_is_answered_before_the_end(indexed: Indexed) -> None:
    answers: list[bytes] = []
    with serving(indexed[0]) as client:
        raw = socket.create_connection(("127.0.0.1", client.port), timeout=10)
        body = b'{"terms": [{"text": "late"}], "k": 1}'
        raw.sendall(b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body))
        client.ask("GET", "/healthz")  # by now its head has been read

        def late() -> None:
            raw.sendall(body)
            answers.append(raw.recv(65_536))

        timer = threading.Timer(0.5, late)
        timer.start()
    timer.join()
    raw.close()
    assert answers[0].startswith(b"HTTP/1.1 200 ") and b"results" in answers[0]

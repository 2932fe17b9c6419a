"""Bad input: every kind has its status, one JSON shape, and never a traceback; the service goes on."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.service.errors import Refused
from pipeline.service.service import key_of
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.errors import UsageError
from tests.pipeline.service.asking import Answer, Client, serving
from tests.servers import png_bomb

Indexed = tuple[Workspace, EncoderCard]
TOKEN = "not a usual word".replace(" ", "-")


def problem(answer: Answer, status: int) -> dict[str, Any]:
    """The error, after looking at the shape that all have."""
    assert answer.status == status, answer.body
    assert set(answer.json["error"]) == {"code", "problem", "expected", "actual", "remedy"}
    assert b"Traceback" not in answer.body and b'.py"' not in answer.body
    assert answer.headers["x-content-type-options"] == "nosniff"
    return dict(answer.json["error"])


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"terms": []}, 422, "invalid"),
        ({"terms": [{"text": "  "}]}, 422, "invalid"),
        ({"terms": [{"text": "a"}], "k": 0}, 422, "invalid"),
        ({"terms": [{"text": "a"}], "k": 5000}, 422, "k"),
        ({"terms": [{"text": "a"}], "k": 1_000_000}, 422, "invalid"),
        ({"terms": [{"text": "a"}] * 65}, 422, "invalid"),
        ({"terms": [{"text": "a" * 10_001}]}, 422, "invalid"),
        ({"terms": [{"text": "a", "key": 1}]}, 422, "invalid"),
        ({"terms": [{"text": "a"}], "colour": "red"}, 422, "invalid"),
        ({"terms": [{"text": "a"}], "modality": "sound"}, 422, "invalid"),
        ({"terms": [{"text": "a"}], "index": "another"}, 404, "unknown"),
        ({"terms": [{"key": 12}]}, 404, "unknown"),
        ({"terms": [{"key": 1 << 70}]}, 404, "unknown"),
        ({"terms": [{"vector": [1.0, 2.0]}]}, 422, "refused"),
        ({"terms": [{"vector": [0.0] * 16}]}, 422, "refused"),
        ({"terms": [{"image": base64.b64encode(b"no image").decode()}]}, 422, "refused"),
        ({"terms": [{"image": base64.b64encode(png_bomb(60_000)).decode()}]}, 422, "refused"),
        ({"terms": [{"image_url": "http://127.0.0.1/a.png"}]}, 422, "image_url"),
        ({"terms": [{"text": "a"}], "where": "this is none"}, 422, "where"),
        ({"terms": [{"text": "a"}], "where": "true) or (select 1"}, 422, "where"),
        ({"terms": [{"text": "a"}], "where": "caption in (select * from read_csv('/etc/passwd'))"}, 422, "where"),
    ],
)  # fmt: skip
def test_questions_that_cannot_be_answered(client: Client, body: dict[str, Any], status: int, code: str) -> None:
    assert problem(client.ask("POST", "/v1/search", body), status)["code"] == code


def test_vectors_of_no_numbers(client: Client, indexed: Indexed) -> None:
    for bad in ("NaN", "Infinity", "1e39"):
        vector = ", ".join([bad] + ["1.0"] * (indexed[1].dim - 1))
        answer = client.ask("POST", "/v1/search", f'{{"terms": [{{"vector": [{vector}]}}]}}'.encode())
        assert answer.status == 422, answer.body


def test_no_json_and_no_route(client: Client) -> None:
    assert problem(client.ask("POST", "/v1/search", b"{no json"), 400)["code"] == "json"
    assert problem(client.ask("POST", "/v1/search", b""), 400)["code"] == "json"
    assert problem(client.ask("GET", "/v1/nothing"), 404)["code"] == "not_found"
    assert problem(client.ask("GET", "/v1/search"), 405)["code"] == "method_not_allowed"
    assert problem(client.ask("GET", "/v1/images/nine"), 404)["code"] == "unknown"
    assert problem(client.ask("GET", "/v1/images/12345"), 404)["code"] == "unknown"
    assert problem(client.ask("GET", "/v1/generated?limit=0"), 422)["code"] == "invalid"
    assert problem(client.ask("DELETE", "/v1/images/12345"), 403)["code"] == "deletions"


def test_sizes(indexed: Indexed) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 65_536

    with serving(indexed[0], max_bytes=100_000, max_batch=3) as client:
        big = client.ask("POST", "/v1/search", b'{"terms": "' + b"x" * 50_000_000 + b'"}')
        assert problem(big, 413)["code"] == "too_large"
        for path in ("/v1/search", "/knn-service"):
            connection = contextlib.closing(socket.create_connection(("127.0.0.1", client.port), timeout=10))
            with connection as raw:
                raw.sendall(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
                for chunk in chunks():
                    raw.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                raw.sendall(b"0\r\n\r\n")
                assert raw.recv(65_536).startswith(b"HTTP/1.1 413 ")
        question = {"terms": [{"text": "a"}]}
        assert problem(client.ask("POST", "/v1/batch", {"questions": [question] * 4}), 422)["code"] == "batch"
        assert client.ask("POST", "/v1/batch", {"questions": [question] * 3}).status == 200
        assert client.ask("GET", "/healthz").status == 200


def test_an_endless_head_is_cut_off(client: Client) -> None:
    with contextlib.closing(socket.create_connection(("127.0.0.1", client.port), timeout=10)) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: ")
        answer = b""
        with contextlib.suppress(ConnectionError):
            for _ in range(400):
                raw.sendall(b"x" * 65_536)
        with contextlib.suppress(ConnectionError):
            answer = raw.recv(1000)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert client.ask("GET", "/healthz").status == 200


def test_time_and_load(indexed: Indexed) -> None:
    with serving(indexed[0], timeout=1e-6) as client:
        assert problem(client.search({"text": "a"}), 504)["code"] == "timeout"
        assert client.ask("GET", "/healthz").status == 200
    with serving(indexed[0], concurrency=1, timeout=30) as client:
        with contextlib.closing(socket.create_connection(("127.0.0.1", client.port), timeout=10)) as raw:
            raw.sendall(b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\n{")  # and waits
            while client.ask("GET", "/v1/indices").status == 200:
                time.sleep(0.02)
            refused = client.search({"text": "a"})
            assert problem(refused, 503)["code"] == "busy" and refused.headers["retry-after"] == "1"
            assert client.ask("GET", "/healthz").status == 200
        while client.ask("GET", "/v1/indices").status == 503:  # it is gone: there is room again
            time.sleep(0.02)
        assert client.search({"text": "a"}).status == 200


def test_token(indexed: Indexed) -> None:
    with serving(indexed[0], token=TOKEN) as client:
        for path in ("/", "/healthz", "/readyz", "/page/app.js"):
            assert client.ask("GET", path).status != 401
        for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": f"Basic {TOKEN}"},
                        {"Authorization": f"Bearer {TOKEN}x"}):  # fmt: skip
            for path in ("/v1/indices", "/metrics", "/openapi.json", "/indices-list", "/v1/images/1", "/nothing"):
                answer = client.ask("GET", path, **headers)
                assert problem(answer, 401)["code"] == "token" and answer.headers["www-authenticate"] == "Bearer"
        assert client.ask("GET", "/v1/indices", Authorization=f"Bearer {TOKEN}").status == 200
        assert client.ask("GET", "/v1/indices", authorization=f"bearer {TOKEN}").status == 200


def test_other_origins_and_other_names(indexed: Indexed) -> None:
    with serving(indexed[0], hosts=frozenset({"127.0.0.1", "localhost", "[::1]"})) as client:
        own = f"127.0.0.1:{client.port}"
        assert client.ask("GET", "/v1/indices", Host="evil.example").status == 400
        assert client.ask("GET", "/v1/indices", Host=f"evil.example:{client.port}").status == 400
        for host in ("localhost", f"LOCALHOST:{client.port}", f"[::1]:{client.port}", own):
            assert client.ask("GET", "/v1/indices", Host=host).status == 200
        for origin in ("https://evil.example", "null", f"http://127.0.0.1:{client.port + 1}"):
            answer = client.ask("POST", "/v1/search", {"terms": [{"text": "a"}]}, Host=own, Origin=origin)
            assert problem(answer, 403)["code"] == "origin"
        answer = client.ask("POST", "/v1/search", {"terms": [{"text": "a"}]}, Host=own, Origin=f"http://{own}")
        assert answer.status == 200
        asked = client.ask(
            "OPTIONS", "/v1/search", Host=own, Origin=f"http://{own}", Access_Control_Request_Method="POST"
        )
        for found in (answer, asked):
            assert not [name for name in found.headers if name.startswith("access-control")]


def test_what_fails_inside_stays_inside(indexed: Indexed, caplog: pytest.LogCaptureFixture) -> None:
    def fetch(url: str) -> bytes:
        if url.endswith("policy"):
            raise UsageError("the address is refused", actual="private")
        raise RuntimeError("a secret path")

    with serving(indexed[0], fetch=fetch) as client, caplog.at_level(logging.ERROR):
        refused = problem(client.search({"image_url": "http://h/policy"}), 422)
        assert (refused["problem"], refused["actual"]) == ("the address is refused", "private")
        answer = client.search({"image_url": "http://h/bug"})
        assert problem(answer, 500)["code"] == "failed" and b"secret" not in answer.body
        assert "a secret path" in caplog.text
        assert client.search({"text": "a"}).status == 200


@given(st.one_of(st.text(max_size=30), st.integers(-5, 1 << 66).map(str)))
def test_a_key_in_a_path_is_one_or_is_refused(text: str) -> None:
    try:
        key = key_of(text)
    except Refused as exc:
        assert exc.status == 404 and json.dumps(exc.body)
        assert not (text.isascii() and text.isdigit() and len(text) < 19)
    else:
        assert key == int(text) and 0 <= key < 1 << 63

"""The policy on its own: which URLs, addresses and headers it lets in."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.download.web.policy import Policy, Refused
from schemas.errors import Reason


def policy(*allow_hosts: str, respect_opt_out: bool = True) -> Policy:
    agent = "clipmill/0.1 (+https://example.org)"
    return Policy(frozenset(allow_hosts), frozenset({"http", "https"}), respect_opt_out, agent)


def judge(url: str, *allow_hosts: str) -> str:
    """ "ok", or the reason of the refusal."""
    try:
        policy(*allow_hosts).check_url(url)
    except Refused as exc:
        assert exc.detail
        return str(exc.reason)
    return "ok"


@pytest.mark.parametrize(
    ("url", "verdict"),
    [
        ("http://example.com/a.jpg", "ok"),
        ("https://EXAMPLE.com:8443/a.jpg?x=1#y", "ok"),
        ("  http://example.com/a.jpg\n", "ok"),
        ("http://bücher.example/ü.jpg", "ok"),
        ("http://例え.テスト/画像.png", "ok"),
        ("http://93.184.215.14/a.jpg", "ok"),
        ("http://[2606:2800:21f:cb07:6820:80da:af6b:8b2c]/", "ok"),
        ("http://127.0.0.1/", "address_refused"),
        ("http://127.1/", "address_refused"),
        ("http://0x7f.1/", "address_refused"),
        ("http://0177.0.0.1/", "address_refused"),
        ("http://2130706433/", "address_refused"),
        ("http://0.0.0.0/", "address_refused"),
        ("http://0/", "address_refused"),
        ("http://10.1.2.3/", "address_refused"),
        ("http://172.16.0.1/", "address_refused"),
        ("http://192.168.1.1:8080/", "address_refused"),
        ("http://100.64.0.1/", "address_refused"),
        ("http://169.254.169.254/latest/meta-data", "address_refused"),
        ("http://224.0.0.1/", "address_refused"),
        ("http://255.255.255.255/", "address_refused"),
        ("http://[::1]/", "address_refused"),
        ("http://[::]/", "address_refused"),
        ("http://[::ffff:127.0.0.1]/", "address_refused"),
        ("http://[::ffff:7f00:1]/", "address_refused"),
        ("http://[fe80::1]/", "address_refused"),
        ("http://[fd00::1]/", "address_refused"),
        ("http://[2002:7f00:1::]/", "address_refused"),
        ("http://[64:ff9b::7f00:1]/", "address_refused"),
        ("http://[64:ff9b::5db8:d70e]/", "ok"),
        ("http://\uff11\uff12\uff17.0.0.1/", "address_refused"),  # full-width digits
        ("http://user@example.com/", "credentials_in_url"),
        ("http://user:secret@example.com/", "credentials_in_url"),
        ("http://:secret@example.com/", "credentials_in_url"),
        ("http://example.com@127.0.0.1/", "credentials_in_url"),
        ("file:///etc/passwd", "scheme_refused"),
        ("ftp://example.com/a.jpg", "scheme_refused"),
        ("data:image/png;base64,iVBORw0KGgo=", "scheme_refused"),
        ("javascript:alert(1)", "scheme_refused"),
        ("s3://bucket/key", "scheme_refused"),
        ("", "bad_url"),
        ("   ", "bad_url"),
        ("example.com/a.jpg", "bad_url"),
        ("//example.com/a.jpg", "bad_url"),
        ("http://", "bad_url"),
        ("http:///a.jpg", "bad_url"),
        ("http://:80/", "bad_url"),
        ("http://[::1/", "bad_url"),
        ("http://example.com:99999/", "bad_url"),
        ("http://example.com:port/", "bad_url"),
        ("http://" + "a" * 70 + ".com:x/", "bad_url"),
    ],
)
def test_url(url: str, verdict: str) -> None:
    assert judge(url) == verdict


@given(st.ip_addresses())
def test_a_literal_address_is_open_only_if_global(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    host = f"[{address}]" if address.version == 6 else str(address)
    if not address.is_global:
        assert judge(f"http://{host}/") == "address_refused"


@given(st.text(max_size=60))
def test_any_text_is_a_url_or_a_reason(text: str) -> None:
    for url in (text, "http://" + text, "http://example.com/" + text, f"http://{text}.example/"):
        assert judge(url) in {"ok", "bad_url", "scheme_refused", "credentials_in_url", "address_refused"}


@pytest.mark.parametrize(
    ("allowed", "url", "verdict"),
    [
        ("127.0.0.1", "http://127.0.0.1/", "ok"),
        ("127.0.0.1", "http://127.0.0.1:8000/", "ok"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000/", "ok"),
        ("127.0.0.1:8000", "http://127.0.0.1:8001/", "address_refused"),
        ("127.0.0.1:8000", "http://127.0.0.1/", "address_refused"),
        ("127.0.0.1:80", "http://127.0.0.1/", "ok"),
        ("127.0.0.1:443", "https://127.0.0.1/", "ok"),
        ("127.0.0.1:8000", "http://10.0.0.1:8000/", "address_refused"),
        ("[::1]:8000", "http://[::1]:8000/", "ok"),
        ("[::1]:8000", "http://[::1]:8001/", "address_refused"),
        ("[::1]", "http://[::1]:8001/", "ok"),
        ("127.0.0.1:8000", "http://user@127.0.0.1:8000/", "credentials_in_url"),
        ("127.0.0.1", "file://127.0.0.1/etc/passwd", "scheme_refused"),
    ],
)
def test_allow_list(allowed: str, url: str, verdict: str) -> None:
    assert judge(url, allowed) == verdict


@pytest.mark.parametrize(
    ("allowed", "url", "address", "verdict"),
    [
        ("", "http://example.com/", "93.184.215.14", "ok"),
        ("", "http://example.com/", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "ok"),
        ("", "http://example.com/", "127.0.0.1", "address_refused"),
        ("", "http://example.com/", "10.0.0.1", "address_refused"),
        ("", "http://example.com/", "::ffff:169.254.169.254", "address_refused"),
        ("", "http://localhost/", "127.0.0.1", "address_refused"),
        ("localhost:8000", "http://localhost:8000/", "127.0.0.1", "ok"),
        ("localhost:8000", "http://LOCALHOST.:8000/", "127.0.0.1", "ok"),
        ("localhost:8000", "http://localhost:8001/", "127.0.0.1", "address_refused"),
        ("localhost", "http://localhost:8001/", "::1", "ok"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000/", "127.0.0.1", "ok"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000/", "10.0.0.1", "address_refused"),  # a literal stands for itself
    ],
)
def test_the_address_connected_to_is_judged(allowed: str, url: str, address: str, verdict: str) -> None:
    judged = policy(allowed)
    target = judged.check_url(url)
    try:
        judged.check_address(target, address, target.port)
    except Refused as exc:
        assert str(exc.reason) == verdict
    else:
        assert verdict == "ok"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://example.com/a b.jpg#top", "http://example.com/a%20b.jpg"),
        ("HTTP://Example.COM/\u00fc.jpg", "http://example.com/%C3%BC.jpg"),
        ("http://example.com/%41?q=%zz", "http://example.com/A?q=%25zz"),
        ("http://b\u00fccher.example/", "http://xn--bcher-kva.example/"),
    ],
)
def test_urls_are_escaped(text: str, url: str) -> None:
    assert policy().check_url(text).url == url


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ([], False),
        (["all"], False),
        (["nofollow"], False),
        (["noai"], True),
        (["NoAI"], True),
        (["noimageai"], True),
        (["noindex, nofollow"], True),
        (["nofollow,noimageindex"], True),
        (["nofollow", "noai"], True),
        (["clipmill: noai"], True),
        (["ClipMill: noai, nofollow"], True),
        (["*: noai"], True),
        (["otherbot: noai"], False),
        (["otherbot: noai", "noimageai"], True),
        (["max-image-preview: large, noai"], True),
        (["max-image-preview: large"], False),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST"], False),
        (["noai, unavailable_after: 25 Jun 2030 15:00:00 PST"], True),
        (["unavailable_after: Tuesday, 25-Jun-30 15:00:00 UTC, noai"], True),
        (["none"], True),
        (["nofollow, otherbot: noai"], False),
        (["otherbot: nofollow, clipmill: noai"], True),
        (["otherbot: noai, noimageai"], False),
    ],
)
def test_robots(headers: list[str], refused: bool) -> None:
    policy(respect_opt_out=False).check_robots(headers)
    if refused:
        with pytest.raises(Refused) as caught:
            policy().check_robots(headers)
        assert caught.value.reason is Reason.OPTED_OUT
    else:
        policy().check_robots(headers)

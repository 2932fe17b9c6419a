"""X-Robots-Tag: who is meant, and what is asked for. clipmill is the agent's name in all of these."""

from __future__ import annotations

from tests.hostile.case import MAX_BYTES, SLACK, Case, head, png, raw, redirect, served
from tests.servers import Repeat


def _tag(name: str, expected: str, *values: str) -> Case:
    return served(f"robots-{name}", expected, *[f"X-Robots-Tag: {value}" for value in values])


_OUT = {
    "noai": ["noai"], "noimageai": ["noimageai"], "noindex": ["noindex"], "noimageindex": ["noimageindex"],
    "none": ["none"], "upper-case": ["NOAI"], "mixed-case": ["NoImageAI"], "spaces": ["   noai   "],
    "list-first": ["noai, nofollow"], "list-last": ["nofollow, noarchive,noimageai"],
    "list-no-space": ["nofollow,noai"],
    "empty-items": [", ,noai,,"], "tab": ["nofollow,\tnoai"], "with-index": ["index, noai"], "with-all": ["all, noai"],
    "second-header": ["nofollow", "noai"], "third-header": ["", "all", "noindex"],
    "for-clipmill": ["clipmill: noai"], "for-clipmill-upper": ["CLIPMILL: NOAI"],
    "for-clipmill-list": ["clipmill: nofollow, noindex"],
    "for-clipmill-no-space": ["clipmill:noai"], "for-clipmill-space": ["clipmill : noai"], "for-all": ["*: noai"],
    "other-then-for-clipmill": ["otherbot: nofollow", "clipmill: noai"], "other-then-general": ["otherbot: noai",
    "noimageai"],
    "other-then-clipmill-joined": ["otherbot: nofollow, clipmill: noai"],
    "general-then-other": ["noai", "otherbot: all"], "general-then-other-joined": ["noai, otherbot: nofollow"],
    "max-image-preview": ["max-image-preview: large, noai"], "max-snippet": ["max-snippet:-1, noimageai"],
    "max-video-preview": ["max-video-preview: 0, noindex"], "preview-last": ["noai, max-image-preview:none"],
    "unavailable-after": ["unavailable_after: 2099-12-31, noai"],
    "unavailable-after-rfc-850": ["unavailable_after: 25 Jun 2099 15:00:00 PST, noai"],
    "1000-items": [", ".join(["nofollow"] * 1_000 + ["noai"])],
}  # fmt: skip

_IN = {
    "empty": [""], "all": ["all"], "index": ["index, follow"], "nofollow": ["nofollow"],
    "nothing-known": ["nosnippet, noarchive, notranslate, noodp"], "spelt-otherwise": ["no-ai, no ai, noaii, xnoai"],
    "inside-a-word": ["noindexing, noaim"], "for-other": ["otherbot: noai"],
    "for-other-list": ["otherbot: noindex, noai"],
    "for-googlebot": ["googlebot: none"], "for-others": ["otherbot: noai", "googlebot: noindex"],
    "for-others-joined": ["googlebot: nofollow, otherbot: noindex, nofollow"],
    "for-longer-name": ["clipmillbot: noai"], "for-shorter-name": ["clip: noai"],
    "for-other-with-preview": ["otherbot: max-image-preview: large, noai"],
    "preview-none": ["max-image-preview: none"], "snippet-0": ["max-snippet: 0, max-video-preview: 0"],
    "unavailable-after": ["unavailable_after: 25 Jun 2099 15:00:00 GMT"],
    "unavailable-in-a-row": ["unavailable_after: noai"],
}  # fmt: skip

_EITHER = {
    "quoted": ['"noai"'], "semicolons": ["nofollow; noai"], "colon-first": [": noai"], "equals": ["noai=1"],
    "for-clipmill-all": ["noai", "clipmill: all"], "for-clipmill-with-version": ["clipmill/0.1: noai"],
    "spaces-between": ["nofollow noai"], "for-two": ["otherbot, clipmill: noai"], "100-kb": ["x" * 90_000 + ", noai"],
    "nul": ["no\0ai"],
}  # fmt: skip

CASES = [
    *[_tag(f"out-{name}", "opted_out", *values) for name, values in _OUT.items()],
    *[_tag(f"in-{name}", "ok", *values) for name, values in _IN.items()],
    *[_tag(f"either-{name}", "ok|opted_out|bad_response", *values) for name, values in _EITHER.items()],
    served("robots-out-header-in-small-letters", "opted_out", "x-robots-tag:noai"),
    served("robots-in-another-header", "ok", "Robots: noai", "X-Robots: noai", "X-Robots-Tags: noai"),
    served("robots-in-body", "not_an_image", content=b"<html><meta name='robots' content='noai'></html>"),
    served("robots-with-404", "http_4xx", "X-Robots-Tag: noai", status="404 Not Found"),
    served("robots-with-text", "opted_out|not_an_image", "X-Robots-Tag: noindex", content=b"<html></html>"),
    redirect("robots-after-redirect", "opted_out", "/robots?tag=noai"),
    raw("robots-in-trailer", "ok|opted_out", head("200 OK", "Transfer-Encoding: chunked"), "\r\n",
        lambda own: b"%x\r\n%b\r\n" % (len(png(own)), png(own)), "0\r\nX-Robots-Tag: noai\r\n\r\n"),
    raw("robots-before-endless-body", "opted_out", head("200 OK", "X-Robots-Tag: noai"), "\r\n",
        Repeat(b"x" * 65_536, 100_000), sent=MAX_BYTES + SLACK),
]  # fmt: skip

"""What img2dataset says of an image that it does not have, as one of our reasons."""

from __future__ import annotations

import re

from schemas.errors import Reason

_HTTP = re.compile(r"HTTP Error (\d{3})")
_OURS = re.compile(r"(\w+)(?:: |$)")
_RULES: tuple[tuple[str, Reason], ...] = (
    (r"X-Robots-Tag", Reason.OPTED_OUT),
    (r"image too small", Reason.TOO_SMALL),
    (r"image area too large", Reason.TOO_MANY_PIXELS),
    (r"aspect ratio too large", Reason.ASPECT_RATIO),
    (r"Image decoding error|OpenCV|imdecode", Reason.DECODE),
    (
        r"not known|name resolution|nodename nor servname|getaddrinfo|No address associated|Non-recoverable failure",
        Reason.DNS,
    ),
    (r"timed? ?out", Reason.TIMEOUT),
    (r"\bSSL\b|_ssl\.c|certificate|TLS", Reason.TLS),
    (r"IncompleteRead|more expected", Reason.TRUNCATED),
    (r"reset by peer|Remote end closed|Broken pipe|connection abort", Reason.RESET),
    (r"refused|No route to host|unreachable|Cannot assign|Errno 11[13]", Reason.CONNECT),
    (r"urlopen error unknown url type", Reason.SCHEME_REFUSED),
    (
        r"unknown url type|no host given|nonnumeric port|control characters|Invalid IPv6|codec can't|'idna'|label",
        Reason.BAD_URL,
    ),
    (r"No such file|hash mismatch|Is a directory", Reason.HTTP_4XX),
    (r"BadStatusLine|status line|\bheader|Too many|chunk", Reason.BAD_RESPONSE),
)
_MATCHERS = tuple((re.compile(pattern, re.IGNORECASE), reason) for pattern, reason in _RULES)
_UNTOLD = {"failed_to_resize": Reason.DECODE, "failed_to_download": Reason.CONNECT}


def reason_of(status: str, message: str) -> tuple[Reason, int | None]:
    """The reason, and the HTTP status if there was one, of a row of img2dataset's metadata without an image.

    ``status`` and ``message`` are its columns ``status`` and ``error_message``: what urllib and the decoder said, or
    what our own export wrote (``REASON: detail``). What cannot be told of a failed download may pass: it is tried
    again.
    """
    ours = _OURS.match(message)
    if ours and ours[1] in set(Reason) - {Reason.OK}:
        return Reason(ours[1]), None
    if "infinite loop" in message:
        return Reason.TOO_MANY_REDIRECTS, None
    if http := _HTTP.search(message):
        return _of_http(int(http[1])), int(http[1])
    told = (reason for matcher, reason in _MATCHERS if matcher.search(message))
    return next(told, _UNTOLD.get(status, Reason.BAD_RECORD)), None


def _of_http(status: int) -> Reason:
    if status == 408:
        return Reason.TIMEOUT
    if status == 429:
        return Reason.HTTP_429
    return Reason.HTTP_5XX if 500 <= status < 600 else Reason.HTTP_4XX

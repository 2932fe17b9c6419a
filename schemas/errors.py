"""Errors and the closed list of reasons: what a user or an operator can act on.

A bad record is a row with a :class:`Reason`; a bad run is a :class:`ClipmillError` which says what was
expected, what came and the remedy. Each error class carries the exit status of its command.
"""

from __future__ import annotations

from enum import StrEnum


class ClipmillError(Exception):
    """A run that cannot go on. ``retryable`` says whether the same command may succeed later."""

    exit_status = 1
    retryable = False

    def __init__(self, problem: str, *, expected: str = "", actual: str = "", remedy: str = "") -> None:
        self.problem, self.expected, self.actual, self.remedy = problem, expected, actual, remedy
        super().__init__(problem, expected, actual, remedy)

    def __str__(self) -> str:
        parts = [self.problem]
        parts += [
            f"  {name}: {text}"
            for name, text in (
                ("expected", self.expected),
                ("actual", self.actual),
                ("remedy", self.remedy),
            )
            if text
        ]
        return "\n".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments: without this an error raised in a worker would not unpickle in the driver.
        return _rebuild, (type(self), self.problem, self.expected, self.actual, self.remedy)


def _rebuild(cls: type[ClipmillError], problem: str, expected: str, actual: str, remedy: str) -> ClipmillError:
    return cls(problem, expected=expected, actual=actual, remedy=remedy)


class UsageError(ClipmillError):
    """Wrong flags, config or input files: nothing was started."""

    exit_status = 2


class GateRefused(ClipmillError):
    """The work is done, but a quality gate refused to publish it."""

    exit_status = 3


class WorkspaceError(ClipmillError):
    """The workspace cannot be read or written (missing, unwritable, full)."""

    retryable = True


class SchemaError(ClipmillError):
    """A table at a door lacks a column or has one of another type."""


class CardError(ClipmillError):
    """An artifact's card is missing, unreadable or does not match the artifact."""


class EncoderMismatch(ClipmillError):
    """Vectors, index or model of one encoder met another encoder. Names both."""

    def __init__(self, what: str, *, expected: str, actual: str, remedy: str = "") -> None:
        super().__init__(
            what,
            expected=expected,
            actual=actual,
            remedy=remedy or "use the encoder that made it, or make it again with the other encoder",
        )


class AuditError(ClipmillError):
    """Stored vectors are damaged, or are not what their encoder makes of the images and captions today."""


class CountsError(ClipmillError):
    """Rows in differ from rows out plus rows failed: a stage lost or doubled a row."""


class NothingToDo(ClipmillError):
    """A stage's input is empty (no pairs, no embeddings, no prompts)."""


class Reason(StrEnum):
    """Why a pair has no image. The list is closed: a table holds no other value.

    ``retryable`` reasons are tried again by a later run, after a growing delay and up to a limit.
    """

    OK = "ok"
    BAD_RECORD = "bad_record"
    BAD_CAPTION = "bad_caption"
    CAPTION_FILTERED = "caption_filtered"
    BAD_URL = "bad_url"
    SCHEME_REFUSED = "scheme_refused"
    CREDENTIALS_IN_URL = "credentials_in_url"
    ADDRESS_REFUSED = "address_refused"
    ROBOTS_TXT = "robots_txt"
    OPTED_OUT = "opted_out"
    DNS = "dns"
    CONNECT = "connect"
    TLS = "tls"
    TIMEOUT = "timeout"
    RESET = "reset"
    BAD_RESPONSE = "bad_response"
    HTTP_4XX = "http_4xx"
    HTTP_429 = "http_429"
    HTTP_5XX = "http_5xx"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    TOO_LARGE = "too_large"
    EMPTY_BODY = "empty_body"
    TRUNCATED = "truncated"
    NOT_AN_IMAGE = "not_an_image"
    FORMAT_REFUSED = "format_refused"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_MANY_FRAMES = "too_many_frames"
    TOO_SMALL = "too_small"
    ASPECT_RATIO = "aspect_ratio"
    DECODE = "decode"
    WORKER_LOST = "worker_lost"

    @property
    def retryable(self) -> bool:
        return self in _RETRYABLE

    @property
    def meaning(self) -> str:
        """One line for people."""
        return _MEANINGS[self]


_RETRYABLE = frozenset(
    {
        Reason.DNS,
        Reason.CONNECT,
        Reason.TIMEOUT,
        Reason.RESET,
        Reason.HTTP_429,
        Reason.HTTP_5XX,
        Reason.TRUNCATED,
        Reason.WORKER_LOST,
    }
)

_MEANINGS = {
    Reason.OK: "the image is stored",
    Reason.BAD_RECORD: "the list's row cannot be read: broken quoting, wrong number of cells, invalid JSON",
    Reason.BAD_CAPTION: "the caption is not valid UTF-8",
    Reason.CAPTION_FILTERED: "the caption does not pass the config's filters",
    Reason.BAD_URL: "not a URL, or one without a host",
    Reason.SCHEME_REFUSED: "a scheme that the config does not open",
    Reason.CREDENTIALS_IN_URL: "a user name or password in the URL",
    Reason.ADDRESS_REFUSED: "a private, loopback, link-local, multicast or metadata address",
    Reason.ROBOTS_TXT: "the host's robots.txt does not let us in",
    Reason.OPTED_OUT: "X-Robots-Tag: noai, noimageai, noindex or noimageindex",
    Reason.DNS: "the host's name does not resolve",
    Reason.CONNECT: "no connection to the host",
    Reason.TLS: "no trusted TLS connection",
    Reason.TIMEOUT: "no whole answer in time (HTTP 408 included)",
    Reason.RESET: "the connection was closed before an answer",
    Reason.BAD_RESPONSE: "the answer is no proper HTTP",
    Reason.HTTP_4XX: "HTTP 400-499 but 408 and 429, or another answer without an image",
    Reason.HTTP_429: "HTTP 429: too many requests",
    Reason.HTTP_5XX: "HTTP 500-599",
    Reason.TOO_MANY_REDIRECTS: "more redirects than allowed",
    Reason.TOO_LARGE: "more bytes than allowed, after decompression",
    Reason.EMPTY_BODY: "an answer without a byte",
    Reason.TRUNCATED: "the body ended before its declared length",
    Reason.NOT_AN_IMAGE: "the bytes are of no image format that we know",
    Reason.FORMAT_REFUSED: "an image of a format that is not allowed: SVG, PDF, PSD and the like",
    Reason.TOO_MANY_PIXELS: "more pixels than allowed, read from the header",
    Reason.TOO_MANY_FRAMES: "an animation of more frames than allowed",
    Reason.TOO_SMALL: "a shorter side below the config's minimum",
    Reason.ASPECT_RATIO: "longer / shorter side above the config's maximum",
    Reason.DECODE: "an image that is damaged",
    Reason.WORKER_LOST: "the worker died with it on every try, the last time with it alone",
}

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


class CountsError(ClipmillError):
    """Rows in differ from rows out plus rows failed: a stage lost or doubled a row."""


class NothingToDo(ClipmillError):
    """A stage's input is empty (no pairs, no embeddings, no prompts)."""


class Reason(StrEnum):
    """Why a pair has no image. The list is closed: a table holds no other value.

    ``retryable`` reasons are tried again by a later run, after a delay and up to a limit.
    """

    OK = "ok"
    BAD_URL = "bad_url"
    SCHEME_REFUSED = "scheme_refused"
    CREDENTIALS_IN_URL = "credentials_in_url"
    ADDRESS_REFUSED = "address_refused"
    DNS = "dns"
    CONNECT = "connect"
    TLS = "tls"
    TIMEOUT = "timeout"
    RESET = "reset"
    HTTP_4XX = "http_4xx"
    HTTP_429 = "http_429"
    HTTP_5XX = "http_5xx"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    TOO_LARGE = "too_large"
    EMPTY_BODY = "empty_body"
    TRUNCATED = "truncated"
    OPTED_OUT = "opted_out"
    NOT_AN_IMAGE = "not_an_image"
    FORMAT_REFUSED = "format_refused"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    ASPECT_RATIO = "aspect_ratio"
    DECODE = "decode"
    BAD_CAPTION = "bad_caption"

    @property
    def retryable(self) -> bool:
        return self in _RETRYABLE


_RETRYABLE = frozenset(
    {
        Reason.DNS,
        Reason.CONNECT,
        Reason.TIMEOUT,
        Reason.RESET,
        Reason.HTTP_429,
        Reason.HTTP_5XX,
        Reason.TRUNCATED,
    }
)

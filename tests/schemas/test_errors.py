"""Errors travel between processes whole, and say what to do."""

from __future__ import annotations

import pickle

import pytest

from schemas.errors import ClipmillError, EncoderMismatch, GateRefused, Reason, UsageError


def classes(base: type[ClipmillError] = ClipmillError) -> list[type[ClipmillError]]:
    return [base] + [found for sub in base.__subclasses__() for found in classes(sub)]


@pytest.mark.parametrize("cls", classes(), ids=lambda c: c.__name__)
def test_pickle_keeps_class_and_words(cls: type[ClipmillError]) -> None:
    error = cls("a problem", expected="one", actual="two", remedy="three")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls
    assert (back.problem, back.expected, back.actual, back.remedy) == ("a problem", "one", "two", "three")
    assert str(back) == str(error) == "a problem\n  expected: one\n  actual: two\n  remedy: three"
    assert (back.exit_status, back.retryable) == (cls.exit_status, cls.retryable)


def test_what_is_not_known_is_not_shown() -> None:
    assert str(ClipmillError("a problem", remedy="three")) == "a problem\n  remedy: three"


def test_exit_statuses_and_default_remedy() -> None:
    assert (ClipmillError.exit_status, UsageError.exit_status, GateRefused.exit_status) == (1, 2, 3)
    assert EncoderMismatch("x", expected="a", actual="b").remedy


def test_reasons_are_distinct_and_only_what_may_pass_is_retried() -> None:
    assert len({str(r) for r in Reason}) == len(list(Reason))
    again = {str(r) for r in Reason if r.retryable}
    assert again == {"dns", "connect", "timeout", "reset", "http_429", "http_5xx", "truncated", "worker_lost"}


def test_every_reason_has_a_meaning_of_one_line() -> None:
    assert all(r.meaning and "\n" not in r.meaning for r in Reason)
    assert len({r.meaning for r in Reason}) == len(list(Reason))

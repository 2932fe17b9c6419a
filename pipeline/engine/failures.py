"""What Ray's errors mean: a stage that raised, an object that is gone, or a worker that is gone."""

from __future__ import annotations

import ray


def cause(exc: Exception) -> Exception:
    """What a stage raised, out of what Ray wraps it in."""
    return exc.cause if isinstance(exc, ray.exceptions.RayTaskError) and exc.cause is not None else exc


def reason(exc: Exception) -> str:
    """One line: the error's class and the first line of its text."""
    found = cause(exc)
    text = str(found).strip().splitlines()
    return f"{type(found).__name__}: {text[0] if text else ''}"


def is_lost(exc: Exception) -> bool:
    """Is the worker gone (dead, out of memory, its node lost), as opposed to a stage that raised in it?

    What another worker made for it may be gone, with its node: that is no sign of its own end.
    """
    if isinstance(exc, (ray.exceptions.RayTaskError, ray.exceptions.ObjectLostError)):
        return False
    return isinstance(exc, ray.exceptions.RayError)

"""Versions of an encoder's index: published by one rename, taken back, and removed when they are old.

A version is a folder, named by the run that made it, and complete before anything names it. Records lie beside the
versions, in segments that several of them name.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress

from upath import UPath

from pipeline.storage import storage_error, write_atomic
from schemas.cards import IndexCard
from schemas.errors import CardError, UsageError

CURRENT = "CURRENT"
CARD = "card.json"
SEGMENTS = "records"
_NO_VERSIONS = {SEGMENTS, "deleted", CURRENT}
_HOUR = 3600.0


def publish(folder: UPath, card: IndexCard) -> None:
    """Write the card of a version whose files are there, then name it in CURRENT: readers see the old or the new one.

    Raises:
        WorkspaceError: it cannot be written; what was published is so still.
    """
    try:
        write_atomic(folder / card.version / CARD, card.to_json().encode())
        write_atomic(folder / CURRENT, card.version.encode())
    except OSError as exc:
        raise storage_error(exc, str(folder)) from exc


def published(folder: UPath) -> IndexCard | None:
    """The card of the published version, None where nothing is published.

    Raises:
        CardError: CURRENT names a version that is not there, or its card is damaged.
    """
    current = folder / CURRENT
    if not current.exists():
        return None
    card = read(folder, current.read_text().strip())
    if card is None:
        raise CardError(
            f"{current} names a version which is not there",
            expected=str(folder / current.read_text().strip() / CARD),
            remedy="build it again: clipmill index --rebuild",
        )
    return card


def read(folder: UPath, version: str) -> IndexCard | None:
    """A version's card, None where it is gone. Raises CardError for a damaged one."""
    path = folder / version / CARD
    return IndexCard.from_json(path.read_bytes(), str(path)) if version and path.exists() else None


def previous(folder: UPath, card: IndexCard) -> IndexCard | None:
    """The card of the version that this one took the place of, if that is still there."""
    return read(folder, card.previous) if card.previous else None


def rollback(folder: UPath) -> IndexCard:
    """Publish the version before the present one again; its card.

    Raises:
        UsageError: nothing is published, there was none before, or it has been removed.
    """
    card = published(folder)
    before = previous(folder, card) if card else None
    if card is None or before is None:
        raise UsageError(
            "there is no version to go back to",
            expected="the version before the published one",
            actual="nothing is published" if card is None
            else f"{card.version} is the first one" if card.previous is None
            else f"{card.previous} has been removed",
            remedy="keep more of them (--keep), or build the index again: clipmill index --rebuild",
        )  # fmt: skip
    paths = [path for file in before.files for path in file.paths]
    missing = [path for path in paths if not (folder / before.version / path).exists()]
    missing += [segment.path for segment in before.segments if not (folder / segment.path).exists()]
    if missing:
        raise UsageError(
            f"the version {before.version} is no longer whole", actual=f"gone: {', '.join(missing)}",
            remedy="build the index again: clipmill index --rebuild",
        )  # fmt: skip
    write_atomic(folder / CURRENT, before.version.encode())
    return before


def chain(folder: UPath) -> list[IndexCard]:
    """The published version and those before it, as far as they are there, newest first."""
    found: list[IndexCard] = []
    with suppress(CardError):
        card = published(folder)
        while card is not None and card.version not in {c.version for c in found}:
            found.append(card)
            card = previous(folder, card)
    return found


def vacuum(folder: UPath, keep: int, busy: Collection[str] = ()) -> list[str]:
    """Remove versions and segments that nothing needs any more; their names.

    Kept are: the published version and those before it, ``keep`` in all; what runs that are under way write (``busy``,
    and whatever was changed within the last hour by a run that is not known to have ended); and all segments that a
    version which is kept names. Where CURRENT or a card cannot be read, nothing is removed.
    """
    cards = chain(folder)
    if not cards:
        return []
    kept = cards[:keep]
    names = {card.version for card in kept}
    segments = {segment.path for card in kept for segment in card.segments}
    removed = []
    for path in sorted(folder.iterdir(), key=str):
        name = path.name
        if name in _NO_VERSIONS or name in names or name in busy:
            continue
        if path.is_dir():
            _remove(path)
            removed.append(name)
        elif _old(path):  # written aside by a run that was killed
            path.unlink(missing_ok=True)
            removed.append(name)
    for path in sorted((folder / SEGMENTS).iterdir(), key=str) if (folder / SEGMENTS).exists() else []:
        name = f"{SEGMENTS}/{path.name}"
        if name not in segments and not any(run in path.name for run in busy):
            path.unlink(missing_ok=True)
            removed.append(name)
    return removed


def _old(path: UPath) -> bool:
    try:
        return time.time() - float(path.stat().st_mtime) > _HOUR
    except (OSError, AttributeError):
        return False


def _remove(folder: UPath) -> None:
    """A folder with all in it; its card first, so that nothing half removed looks whole."""
    (folder / CARD).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), key=lambda p: -len(str(p))):
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def discard(folder: UPath, version: str) -> None:
    """Remove what a run wrote of a version that will not be published, if it is not."""
    current = folder / CURRENT
    if current.exists() and current.read_text().strip() == version:
        return
    if (folder / version).exists():
        _remove(folder / version)
    for path in (folder / SEGMENTS).iterdir() if (folder / SEGMENTS).exists() else ():
        if version in path.name:
            path.unlink(missing_ok=True)

"""The hostile corpus: what a web full of mistakes and malice answers, and what must become of each answer.

A case names a URL, what the server says to it, and the reasons that may come out: mostly one, several where more than
one can be defended. ``tests/jobs/test_hostile.py`` runs them all through the command.
"""

from __future__ import annotations

from dataclasses import replace

from tests.hostile import addresses, bodies, content, encodings, optout, redirects, rows, statuses
from tests.hostile.case import Case

_FAMILIES = (statuses, redirects, addresses, bodies, encodings, content, optout, rows)

CASES: tuple[Case, ...] = tuple(
    replace(case, family=family.__name__.rpartition(".")[2]) for family in _FAMILIES for case in family.CASES
)

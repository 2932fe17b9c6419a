"""A quicker start for processes that are ours alone: commands and workers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _NoPandas:
    """A finder by which there is no pandas."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is not wanted here", name=name)
        return None


def import_arrow_without_pandas() -> None:
    """Import pyarrow, and let it find no pandas.

    It imports pandas, where that is installed, at its first scalar, only to know whether it is handed any: more than a
    second of CPU a process, for nothing. Not for a process that others share, where pyarrow must convert to pandas.
    Does nothing where either is imported already.
    """
    if "pandas" in sys.modules or "pyarrow.dataset" in sys.modules:
        return
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        import pyarrow.dataset  # noqa: F401
    finally:
        sys.meta_path.remove(finder)

"""Shared fixtures: one Ray for the whole session, with a temp dir and a token of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

from pipeline.engine import Engine
from pipeline.workspace import Workspace


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The session's Ray, started once, in this process."""
    with tempfile.TemporaryDirectory(prefix="cmt-") as folder, Engine(cpus=2, temp_dir=folder) as started:
        started.start()
        yield started


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty workspace."""
    return Workspace(tmp_path / "ws").prepare()

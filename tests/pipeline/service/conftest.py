"""One small indexed workspace for all tests of the service that only read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.models.encoder import Encoder
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from tests.jobs.embedded import workspace_with_vectors
from tests.kills import save_clip
from tests.pipeline.models.test_clip import TINY
from tests.pipeline.service.asking import Client, index, serving

N = 60


@pytest.fixture(scope="package")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), TINY)


@pytest.fixture(scope="package")
def encoder(clip: Path) -> Encoder:
    return Encoder(f"local-dir:{clip}")


@pytest.fixture(scope="package")
def indexed(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> tuple[Workspace, EncoderCard]:
    """A workspace with N images and an index of them. To be read only, or copied."""
    workspace, card = workspace_with_vectors(tmp_path_factory.mktemp("served") / "ws", clip, N)
    index(workspace)
    return workspace, card


@pytest.fixture(scope="package")
def client(indexed: tuple[Workspace, EncoderCard]) -> Iterator[Client]:
    """A service over it."""
    with serving(indexed[0]) as asked:
        yield asked

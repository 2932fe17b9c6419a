"""One directory or object-store URL with everything under it: tables, indices, models, reports."""

from __future__ import annotations

import os
import uuid
from typing import TypeVar

from upath import UPath

from pipeline.storage import storage_error
from pipeline.tables import Table
from schemas.cards import Card, IndexCard, ModelCard
from schemas.errors import CardError, UsageError
from schemas.tables import TABLES

K = TypeVar("K", bound=Card)


class Workspace:
    """Paths and doors of a workspace. Cheap to make, picklable: workers make their own."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        text = os.fspath(root)
        try:
            self.root = UPath(text) if "://" in text else UPath(text).absolute()
        except (ValueError, ImportError) as exc:
            raise UsageError(
                f"--workspace {text} cannot be opened",
                expected="a directory, s3://..., gs://...",
                actual=str(exc),
                remedy="for s3:// install clipmill[s3], for gs:// clipmill[gs]",
            ) from exc

    def __reduce__(self) -> tuple[type[Workspace], tuple[str]]:
        return Workspace, (str(self.root),)

    def table(self, name: str) -> Table:
        return Table(str(self.root / "tables" / name), TABLES[name])

    def model_dir(self, kind: str, name: str) -> UPath:
        return self.root / "models" / kind / name

    def index_dir(self, encoder_id: str) -> UPath:
        return self.root / "indices" / encoder_id

    def reports_dir(self, run: str) -> UPath:
        return self.root / "reports" / run

    def prepare(self) -> Workspace:
        """Make the workspace's root, and check that it can be written.

        Raises:
            WorkspaceError: it cannot be written, or its disk is full.
        """
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x" * 4096)
            probe.unlink()
        except OSError as exc:
            raise storage_error(exc, str(self.root)) from exc
        return self

    def require(self) -> Workspace:
        """Raises UsageError unless this is a workspace that some job has written to."""
        if not (self.root / "tables").exists():
            raise UsageError(
                f"there is no workspace at {self.root}",
                remedy="name one with --workspace, or begin one with: clipmill download --pairs FILE",
            )
        return self

    def models(self, kind: str) -> list[ModelCard]:
        """Cards of all finished models of a kind."""
        folder = self.root / "models" / kind
        if not folder.exists():
            return []
        return [
            ModelCard.from_json((d / "card.json").read_text(), str(d / "card.json"))
            for d in sorted(folder.iterdir(), key=str)
            if (d / "card.json").exists()
        ]

    def model(self, kind: str, name: str | None) -> ModelCard:
        """The finished model ``name``, or the only one of its kind.

        Raises:
            UsageError: there is none, or several and no name.
        """
        cards = self.models(kind)
        found = [c for c in cards if name is None or name in (c.name, c.id)]
        if len(found) == 1:
            return found[0]
        have = ", ".join(c.name for c in cards) or "none"
        raise UsageError(
            f"which {kind}?" if found else f"no {kind} {name or ''} in {self.root}".replace("  ", " "),
            expected=f"--{kind} NAME" if found else f"a trained {kind}",
            actual=f"there are: {have}",
            remedy=f"name one of them, or train one: clipmill train {kind} --workspace {self.root}",
        )

    def published_index(self, encoder_id: str) -> IndexCard | None:
        """Card of the published version, or None."""
        folder = self.index_dir(encoder_id)
        current = folder / "CURRENT"
        if not current.exists():
            return None
        card = folder / current.read_text().strip() / "card.json"
        if not card.exists():
            raise CardError(
                f"{current} names a version which is not there",
                expected=str(card),
                remedy="build it again: clipmill index --rebuild",
            )
        return IndexCard.from_json(card.read_bytes(), str(card))

    def indexed_encoders(self) -> list[str]:
        folder = self.root / "indices"
        return sorted(d.name for d in folder.iterdir() if (d / "CURRENT").exists()) if folder.exists() else []

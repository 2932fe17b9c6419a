"""What ``--encoder`` means: a CLIP trained in this workspace, or one of open_clip's."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from pipeline.models.encoder import Encoder
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.errors import CardError

CARDS = "encoders"


def load_encoder(workspace: Workspace, spec: str | None, precision: str = "auto") -> Encoder:
    """The encoder that ``spec`` names: a local CLIP by its name or card id, else open_clip's grammar.

    Raises:
        UsageError: nothing of that name, or no ``spec`` where the workspace has not exactly one CLIP.
    """
    local = workspace.models("clip")
    if spec is None:
        spec = workspace.model("clip", None).name
    for card in local:
        if spec in (card.name, card.encoder.id if card.encoder else None):
            folder = local_folder(str(workspace.model_dir("clip", card.name)))
            encoder = Encoder(f"local-dir:{folder}", name=card.name, precision=precision)
            if card.encoder is not None:
                card.encoder.require(encoder.card, f"the CLIP {card.name} in {workspace.root}")
            return encoder
    return Encoder(spec, precision=precision)


def encoder_of(workspace: Workspace, card: EncoderCard) -> Encoder:
    """Load the encoder that a card describes, and check that it is the same.

    Raises:
        EncoderMismatch: its weights have changed since.
    """
    names = {c.name for c in workspace.models("clip")}
    if card.model in names or card.model.startswith(("hf-hub:", "local-dir:")):
        spec = card.model
    else:
        spec = f"{card.model}:{card.pretrained}"
    encoder = load_encoder(workspace, spec)
    card.require(encoder.card, "these vectors")
    return encoder


def save_card(workspace: Workspace, card: EncoderCard) -> None:
    """Keep an encoder's card with the workspace: indices, models and queries check against it."""
    from pipeline.storage import write_atomic

    write_atomic(workspace.root / CARDS / f"{card.id}.json", card.to_json().encode())


def read_card(workspace: Workspace, encoder_id: str) -> EncoderCard:
    """Raises CardError where the workspace has no card of that encoder."""
    path = workspace.root / CARDS / f"{encoder_id}.json"
    if not path.exists():
        raise CardError(f"no card of the encoder {encoder_id}", expected=str(path), remedy="embed with it again")
    return EncoderCard.from_json(path.read_text(), str(path))


def embedded_encoders(workspace: Workspace) -> list[str]:
    """Ids of the encoders whose vectors the workspace holds."""
    folder = workspace.root / CARDS
    return sorted(p.name.removesuffix(".json") for p in folder.iterdir()) if folder.exists() else []


@cache
def local_folder(uri: str) -> str:
    """A model folder on this machine; copied from an object store once a process."""
    from upath import UPath

    source = UPath(uri)
    if source.protocol in ("", "file"):
        return str(source)
    target = Path(tempfile.mkdtemp(prefix="clipmill-model-"))
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return str(target)

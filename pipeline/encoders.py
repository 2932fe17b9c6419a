"""What ``--encoder`` means: a CLIP trained in this workspace, or one of open_clip's; and the cards of both."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from upath import UPath

from pipeline.ledger import code_version
from pipeline.storage import write_atomic
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.errors import CardError, EncoderMismatch, UsageError

if TYPE_CHECKING:  # torch: not for a run that finds nothing to do, nor for workers that only decode
    from pipeline.models.encoder import Encoder

CARDS = "encoders"
_LOADED = "loaded"
"""Folder of notes: which card came of which files."""
_STAMP = "clipmill.encoder."
_MAKES_VECTORS = (
    "weights_sha256", "dim", "image_size", "mean", "std", "interpolation", "resize_mode", "context_length",
    "quick_gelu",
)  # fmt: skip
"""Fields of a card that two cards of the same id must have in common."""
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

Files = dict[str, list[int]]
"""Path -> [size, time of the last change in ns]."""


# ---- loading ---------------------------------------------------------------------------------------


def load_encoder(workspace: Workspace, spec: str | None, precision: str = "auto", compile: str = "off") -> Encoder:
    """The encoder that ``spec`` names: a local CLIP by its name or card id, else open_clip's grammar.

    Raises:
        UsageError: nothing of that name, or no ``spec`` where the workspace has not exactly one CLIP.
        EncoderMismatch: the local CLIP's weights are not those of its card.
    """
    from pipeline.models.encoder import Encoder

    spec = named(workspace, spec)
    for card in workspace.models("clip"):
        if spec in (card.name, card.encoder.id if card.encoder else None):
            folder = local_folder(str(workspace.model_dir("clip", card.name)))
            encoder = Encoder(f"local-dir:{folder}", name=card.name, precision=precision, compile=compile)
            if card.encoder is not None:
                card.encoder.require(encoder.float_card, f"the CLIP {card.name} in {workspace.root}")
            return encoder
    return Encoder(spec, precision=precision, compile=compile)


def named(workspace: Workspace, spec: str | None) -> str:
    """``spec``, or the name of the only CLIP in the workspace. Raises UsageError where there is not exactly one."""
    return workspace.model("clip", None).name if spec is None else spec


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
    encoder = load_encoder(workspace, spec, "int8" if card.dtype == "int8" else "auto")
    card.require(encoder.card, "these vectors")
    return encoder


@cache
def local_folder(uri: str) -> str:
    """A model folder on this machine; copied from an object store once a process."""
    source = UPath(uri)
    if source.protocol in ("", "file"):
        return str(source)
    target = Path(tempfile.mkdtemp(prefix="clipmill-model-"))
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return str(target)


# ---- cards -----------------------------------------------------------------------------------------


def save_card(workspace: Workspace, card: EncoderCard) -> None:
    """Keep an encoder's card with the workspace: indices, models and queries check against it.

    Raises:
        EncoderMismatch: there is one of the same id that makes other vectors.
    """
    check_card(workspace, card)
    path = workspace.root / CARDS / f"{card.id}.json"
    if not path.exists():
        write_atomic(path, card.to_json().encode())


def check_card(workspace: Workspace, card: EncoderCard) -> None:
    """Compare with the card of this id that the workspace and its table embeddings have, if they have one.

    The same weights with another preprocessing have the same id, but make other vectors.

    Raises:
        EncoderMismatch: naming what differs.
    """
    stamped = workspace.table("embeddings").stamps().get(_STAMP + card.id)
    known = {"the table embeddings": EncoderCard.from_json(stamped, "the table embeddings")} if stamped else {}
    with suppress(CardError):
        known[f"{CARDS}/{card.id}.json"] = read_card(workspace, card.id)
    for where, other in known.items():
        differ = [n for n in _MAKES_VECTORS if getattr(card, n) != getattr(other, n)]
        if differ:
            raise EncoderMismatch(
                f"the encoder {card.id} is not the one that {where} names by this id",
                expected=", ".join(f"{n} {getattr(other, n)}" for n in differ),
                actual=", ".join(f"{n} {getattr(card, n)}" for n in differ),
                remedy="embed with the same preprocessing as before, or into another workspace",
            )


def stamp_of(card: EncoderCard) -> dict[str, str]:
    """What the metadata of the table embeddings is to say of an encoder: see :meth:`pipeline.tables.Table.stamp`."""
    return {_STAMP + card.id: card.model_dump_json()}


def read_card(workspace: Workspace, encoder_id: str) -> EncoderCard:
    """Raises CardError where the workspace has no card of that encoder."""
    path = workspace.root / CARDS / f"{encoder_id}.json"
    if not path.exists():
        raise CardError(f"no card of the encoder {encoder_id}", expected=str(path), remedy="embed with it again")
    return EncoderCard.from_json(path.read_text(), str(path))


def embedded_encoders(workspace: Workspace) -> list[str]:
    """Ids of the encoders whose vectors the workspace holds."""
    folder = workspace.root / CARDS
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


# ---- cards without loading -------------------------------------------------------------------------


def card_of(workspace: Workspace, spec: str, precision: str) -> EncoderCard:
    """The card of the encoder that ``spec`` names.

    It is loaded for that only if the files of its weights are not those that the last card came of (by path, size and
    time), or are not known. Workers compare the card with what they load.

    Raises: what :func:`load_encoder` does.
    """
    note = _note(workspace, spec, precision)
    asked = {"clipmill": code_version(), "open_clip": version("open_clip_torch")}
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(note.read_text())
        if found["asked"] == asked and found["files"] and found["files"] == _states(found["files"]):
            files = _files(workspace, spec)
            if not files or found["files"].keys() == files.keys():
                return EncoderCard.model_validate(found["card"])
    files = _files(workspace, spec)
    card = load_encoder(workspace, spec, precision).card
    files = files or _states(_hub_files(spec))
    if files:
        text = json.dumps({"asked": asked, "spec": spec, "files": files, "card": card.model_dump()}, indent=2)
        with suppress(OSError):  # it only saves time
            write_atomic(note, text.encode())
    return card


def forget_card(workspace: Workspace, spec: str, precision: str) -> None:
    """The note that :func:`card_of` made was wrong."""
    with suppress(OSError):
        _note(workspace, spec, precision).unlink()


def _note(workspace: Workspace, spec: str, precision: str) -> UPath:
    name = hashlib.sha256(f"{spec} {precision}".encode()).hexdigest()[:16]
    return workspace.root / CARDS / _LOADED / f"{name}.json"


def _files(workspace: Workspace, spec: str) -> Files:
    """The files on this machine that an encoder is loaded from; empty where they are not known beforehand."""
    folder: Path | None = None
    for card in workspace.models("clip"):
        if spec in (card.name, card.encoder.id if card.encoder else None):
            place = workspace.model_dir("clip", card.name)
            if place.protocol not in ("", "file"):
                return {}
            folder = Path(str(place))
    if folder is None and spec.startswith("local-dir:"):
        folder = Path(spec.removeprefix("local-dir:"))
    if folder is not None:
        return _states(sorted(str(p) for p in folder.iterdir() if p.is_file())) if folder.exists() else {}
    _, _, checkpoint = spec.partition(":")
    return _states([checkpoint]) if Path(checkpoint).is_file() else {}


def _states(files: list[str] | Files) -> Files:
    """Raises OSError where one is gone."""
    stats = {str(Path(file).absolute()): Path(file).stat() for file in files}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def _hub_files(spec: str) -> list[str]:
    """Where the hub's cache has what a tag or hub id was loaded from; empty where that is not known."""
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    if spec.startswith("hf-hub:"):
        place = spec.removeprefix("hf-hub:").partition("@")[0] + "/"
    else:
        model, _, tag = spec.partition(":")
        place = (open_clip.get_pretrained_cfg(model.replace("/", "-"), tag) or {}).get("hf_hub", "")
    repository, file = os.path.split(place)
    found = [try_to_load_from_cache(repository, name) for name in ([file] if file else _HUB_FILES)] if place else []
    return [path for path in found if isinstance(path, str)][:1]


def only_one(name: str | None, known: Sequence[str], what: str, remedy: str) -> str:
    """The encoder id that ``name`` (an id, or a model's name) means among ``known``, or the only one.

    Raises:
        UsageError: none fits, or several do.
    """
    found = [k for k in known if name is None or name == k or k.rsplit("-", 1)[0] == name]
    if len(found) == 1:
        return found[0]
    raise UsageError(
        f"which encoder's {what}?" if found else f"no {what} of {'any encoder' if name is None else name}",
        expected="--encoder, one of: " + (", ".join(known) or "none"),
        remedy=remedy,
    )

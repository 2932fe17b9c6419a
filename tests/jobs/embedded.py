"""A workspace with images and their vectors by a tiny CLIP, written without a run of embed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.encoders import save_card
from pipeline.models.encoder import Encoder
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.tables import EMBEDDINGS
from schemas.vectors import pack
from tests.kills import add_images


def embed_directly(workspace: Workspace, clip: Path, run: str = "embed") -> EncoderCard:
    """Rows of embeddings for all images that have none by this encoder, made by it in this process."""
    encoder = Encoder(f"local-dir:{clip}")
    table, card = workspace.table("embeddings"), encoder.card
    done = {r["pair_key"] for r in table.read(["pair_key", "encoder"]).to_pylist() if r["encoder"] == card.id}
    images = [r for r in workspace.table("images").read().to_pylist() if r["pair_key"] not in done]
    image, text = encoder.images([r["image"] for r in images]), encoder.texts([r["caption"] for r in images])
    n = len(images)
    rows = {
        "pair_key": [r["pair_key"] for r in images], "encoder": [card.id] * n, "image_vec": pack(image),
        "text_vec": pack(text), "similarity": np.einsum("nd,nd->n", image, text).astype(np.float32),
        "caption": [r["caption"] for r in images], "sha256": [r["sha256"] for r in images], "run": [run] * n,
    }  # fmt: skip
    table.append(pa.table(rows, schema=EMBEDDINGS.schema), run)
    save_card(workspace, card)
    return card


def workspace_with_vectors(folder: Path, clip: Path, number: int) -> tuple[Workspace, EncoderCard]:
    """``number`` images with their vectors."""
    workspace = Workspace(folder).prepare()
    add_images(workspace, range(number))
    return workspace, embed_directly(workspace, clip)

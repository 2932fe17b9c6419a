"""Cards: JSON there and back, and encoders that must not be mixed."""

from __future__ import annotations

import pytest

from schemas.cards import EncoderCard, IndexCard, IndexFile, ModelCard
from schemas.errors import CardError, EncoderMismatch


def encoder(**changes: object) -> EncoderCard:
    fields: dict[str, object] = {
        "model": "ViT-B-32", "pretrained": "openai", "weights_sha256": "ab" * 32, "dim": 512, "image_size": 224,
        "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711),
        "interpolation": "bicubic", "resize_mode": "shortest", "context_length": 77, "dtype": "float32",
    }  # fmt: skip
    return EncoderCard.model_validate(fields | changes)


def index() -> IndexCard:
    file = IndexFile(
        path="image.faiss", modality="image", factory="IVF16,SQ8", count=3, bytes=99, sha256="cd" * 32,
        recall_at_1=1.0, recall_at_10=0.97, ms_per_query=0.1 + 0.2, search={"nprobe": 4},
    )  # fmt: skip
    return IndexCard(
        encoder=encoder(), version="v1", count=3, keys_sha256="ef" * 32, table_version=4, files=(file,), run="r"
    )


def model() -> ModelCard:
    return ModelCard(
        kind="prior", name="p", config={"lr": 1e-3, "network": {"width": 8}}, step=10, samples_seen=640,
        metrics={"loss": 1 / 3}, table="embeddings", table_version=2, weights_sha256="0" * 64, encoder=encoder(),
        run="r",
    )  # fmt: skip


@pytest.mark.parametrize("card", [encoder(), index(), model()], ids=["encoder", "index", "model"])
def test_json_round_trip_is_exact(card: EncoderCard | IndexCard | ModelCard) -> None:
    assert type(card).from_json(card.to_json()) == card
    assert type(card).from_json(card.to_json().encode()) == card


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        encoder().to_json().replace('"dim": 512', '"dim": 0'),
        '{"more": 1, ' + encoder().to_json()[1:],
    ],
)
def test_an_unfit_card_names_its_file(text: str) -> None:
    with pytest.raises(CardError, match=r"models/x/card\.json") as caught:
        EncoderCard.from_json(text, "models/x/card.json")
    assert caught.value.remedy


def test_id_is_safe_as_a_folder_name() -> None:
    assert encoder().id == "ViT-B-32-abababababab"
    assert encoder(model="hf-hub:a/b c").id == "hf-hub-a-b-c-abababababab"


def test_a_mismatch_names_both() -> None:
    other = encoder(model="ViT-L-14", weights_sha256="12" * 32, dim=768)
    with pytest.raises(EncoderMismatch) as caught:
        encoder().require(other, "the index v1")
    for word in ("the index v1", "ViT-B-32-abababababab", "D=512", "ViT-L-14-121212121212", "D=768"):
        assert word in str(caught.value)


def test_the_same_weights_under_another_name_match() -> None:
    encoder().require(encoder(model="other", pretrained="/some/path"), "the index")


def test_index_files_by_modality() -> None:
    assert index().file("image").path == "image.faiss"
    with pytest.raises(CardError, match="no text vectors"):
        index().file("text")

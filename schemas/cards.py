"""Cards: the JSON which travels beside every artifact and says what it is and what it was made from."""

from __future__ import annotations

import re
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.errors import CardError, EncoderMismatch


class Card(BaseModel):
    """Base of all cards: frozen, unknown keys refused, JSON in and out."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "card.json") -> Self:
        """Raises CardError, naming ``where``, for a card that does not fit its schema."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as exc:
            raise CardError(
                f"{where} is not a readable {cls.__name__}",
                actual=str(exc),
                remedy="the file was changed or written by another version: make the artifact again",
            ) from exc


class EncoderCard(Card):
    """What a CLIP encoder is. Computed from what was really loaded, stamped on all that is made with it."""

    model: str = Field(description="open_clip model name, or the name of a local model")
    pretrained: str = Field(description="pretrained tag, hub id or path that the weights came from")
    weights_sha256: str = Field(
        description="sha256 over names, shapes and bytes of the loaded weights; of int8, over that and 'int8'"
    )
    dim: int = Field(gt=0, description="D of image and text vectors")
    image_size: int = Field(gt=0, description="side of the square input, pixels")
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str
    context_length: int = Field(gt=0, description="text tokens, with start and end")
    dtype: str = Field(description="of the weights while encoding, e.g. float32")
    quick_gelu: bool = False

    @property
    def id(self) -> str:
        """Short name: the ``encoder`` column of tables, the folder of indices."""
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.model).strip("-")
        return f"{name}-{self.weights_sha256[:12]}"

    def require(self, other: EncoderCard, what: str) -> None:
        """Raises EncoderMismatch, naming both, unless ``other`` gives the same vectors."""
        if self.weights_sha256 == other.weights_sha256 and self.dim == other.dim:
            return
        raise EncoderMismatch(
            f"{what} was made with another encoder",
            expected=f"{self.id} (D={self.dim})",
            actual=f"{other.id} (D={other.dim})",
        )


class Point(Card):
    """What one setting of the search reaches: a point of the plot of recall against latency."""

    search: dict[str, int] = Field(description="search-time parameters, e.g. nprobe")
    recall_at_1: float
    recall_at_10: float
    recall_at_100: float = Field(description="0: not measured")
    ms_per_query: float


class SideFile(Card):
    """A small FAISS file of what came since its large one was written, and keys of that one that no longer count."""

    path: str
    factory: str
    count: int
    bytes: int
    sha256: str
    gone: int = Field(description="keys of the large file that went, or are in this one with another vector")
    gone_path: str
    gone_sha256: str = Field(description="over the keys in it")


class IndexFile(Card):
    """One FAISS file of an index version, with what was measured on it."""

    path: str
    modality: str = Field(pattern="^(image|text)$")
    factory: str = Field(description="FAISS factory string")
    count: int = Field(description="vectors that a search can find, those beside it among them")
    deleted: int = Field(0, description="vectors still in the file that no search finds: its tombstones")
    bytes: int
    sha256: str
    recall_at_1: float
    recall_at_10: float = Field(description="against exact search on held-out queries")
    recall_at_100: float = Field(0.0, description="0: not measured")
    ms_per_query: float = Field(description="one thread, one query at a time")
    search: dict[str, int] = Field(default_factory=dict, description="search-time parameters, e.g. nprobe")
    curve: tuple[Point, ...] = Field((), description="what was tried on the way to these parameters")
    trained_on: int = Field(0, description="vectors there when the lists were trained; growth is counted from here")
    side: SideFile | None = Field(None, description="what came since the file was written, and is searched with it")

    @property
    def paths(self) -> tuple[str, ...]:
        """All its files, within the version's folder."""
        return (self.path, self.side.path, self.side.gone_path) if self.side else (self.path,)

    @property
    def total_bytes(self) -> int:
        """Of the large file and the small one."""
        return self.bytes + (self.side.bytes if self.side else 0)


class Segment(Card):
    """One immutable file of records (see ``schemas.records``), shared by the versions that name it."""

    path: str = Field(description="under the encoder's folder of indices")
    rows: int
    bytes: int
    sha256: str


class IndexCard(Card):
    """A published version of the index over one encoder's embeddings."""

    encoder: EncoderCard
    version: str
    metric: str = "inner_product"
    count: int = Field(description="keys that a search can find in some modality")
    deleted: int = Field(0, description="tombstones in all files")
    keys_sha256: str = Field(description="over the sorted keys")
    vectors_sha256: str | None = Field(
        None, description="of older versions alone: over the vectors in the order of their keys"
    )
    table_version: int = Field(description="version of the embeddings table it was made from")
    images_version: int = Field(-1, description="version of the images table that its records were made from")
    files: tuple[IndexFile, ...]
    segments: tuple[Segment, ...] = Field((), description="its records, newest last: the last one of a key counts")
    previous: str | None = Field(None, description="the version that it took the place of: where a rollback goes")
    run: str

    def file(self, modality: str) -> IndexFile:
        for f in self.files:
            if f.modality == modality:
                return f
        raise CardError(
            f"index {self.version} has no {modality} vectors",
            expected=modality,
            actual=", ".join(f.modality for f in self.files),
        )


class ModelCard(Card):
    """A trained network: its kind and config, how far it was trained, on what, and what it reached."""

    kind: str = Field(description="clip, prior, decoder, ...")
    name: str
    config: dict[str, Any] = Field(description="network and training settings, resolved")
    step: int
    samples_seen: int
    metrics: dict[str, float] = Field(default_factory=dict)
    table: str = Field(description="table trained on")
    table_version: int
    weights_sha256: str
    encoder: EncoderCard | None = Field(default=None, description="of the vectors it was trained on")
    run: str

    @property
    def id(self) -> str:
        return f"{self.name}-{self.weights_sha256[:12]}"

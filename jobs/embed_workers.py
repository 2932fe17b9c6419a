"""What the workers of embed are told, and what they do: decode, embed, score again."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.embed.planning import Shard
from pipeline.embed.scores import Classifier, Scores, score_fields
from pipeline.embed.stage import IMAGE_COLUMNS, Decoded, DecodeStage, EmbedStage
from pipeline.encoders import load_encoder
from pipeline.tables import Part, Table
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.configs import EmbedConfig
from schemas.errors import UsageError

if TYPE_CHECKING:
    from pipeline.models.encoder import Encoder

_PROBED = 64
"""Pairs that int8 is compared with float32 on."""


@dataclass(frozen=True)
class File:
    """A file of the user's, by content: a worker's machine may not have it."""

    name: str
    data: bytes

    @classmethod
    def read(cls, path: str, what: str) -> Self:
        try:
            return cls(Path(path).name, Path(path).read_bytes())
        except OSError as exc:
            raise UsageError(f"cannot read {what} {path}", actual=exc.strerror or str(exc)) from exc

    def write(self, folder: str) -> str:
        path = Path(folder, self.name)
        path.write_bytes(self.data)
        return str(path)


@dataclass(frozen=True)
class Asked:
    """The further columns that a config asks for, with the files that they are made of."""

    heads: dict[str, File] = field(default_factory=dict)
    labels: File | None = None
    templates: File | None = None

    @classmethod
    def of(cls, config: EmbedConfig) -> Self:
        """Raises UsageError for a file that cannot be read, or what is not NAME=FILE."""
        heads: dict[str, File] = {}
        for spec in config.heads:
            name, equals, path = spec.partition("=")
            if not (equals and path and name.isidentifier()) or name in heads:
                raise UsageError(f"--heads {spec}", expected="NAME=FILE.safetensors, each NAME once")
            heads[name] = File.read(path, "the head")
        if config.templates and not config.zero_shot:
            raise UsageError("--templates without --zero-shot", remedy="name the file of labels, too")
        labels = File.read(config.zero_shot, "the labels") if config.zero_shot else None
        return cls(heads, labels, File.read(config.templates, "the templates") if config.templates else None)

    @property
    def fields(self) -> list[pa.Field]:
        return score_fields(list(self.heads), self.labels is not None)

    def records(self, encoder: str) -> dict[str, tuple[int, list[str]]]:
        """By what the log of embeddings calls them: a number of the files' content, and the columns made of them."""
        found = {
            f"clipmill-head-{name}-{encoder}": (_number(file.data), [f"score_{name}"])
            for name, file in self.heads.items()
        }
        if self.labels is not None:
            texts = self.labels.data + b"\0" + (self.templates.data if self.templates else b"")
            found[f"clipmill-zero-shot-{encoder}"] = (_number(texts), ["label", "label_score"])
        return found

    def load_heads(self, card: EncoderCard) -> list[Any]:
        """Raises UsageError or EncoderMismatch for a file that is no head, or none for this encoder."""
        if not self.heads:
            return []
        from pipeline.models.heads import load_head

        with tempfile.TemporaryDirectory(prefix="clipmill-heads-") as folder:
            return [load_head(f"{name}={file.write(folder)}", card) for name, file in self.heads.items()]

    def load_classifier(self, encoder: Encoder) -> Classifier | None:
        """The labels' vectors. Raises UsageError for files that are no labels or templates."""
        if self.labels is None:
            return None
        from pipeline.models.zero_shot import ZeroShot

        with tempfile.TemporaryDirectory(prefix="clipmill-labels-") as folder, tempfile.TemporaryDirectory() as other:
            templates = self.templates.write(other) if self.templates else None
            return ZeroShot.load(encoder, self.labels.write(folder), templates)


@dataclass(frozen=True)
class Order:
    """What every worker of a run is told. ``further``: columns of embeddings beside its own.

    ``again``: rows that have a score get another one, since a file that it was made with is another one.
    """

    config: EmbedConfig
    spec: str
    card: EncoderCard
    run: str
    asked: Asked = Asked()
    classifier: Classifier | None = None
    further: tuple[pa.Field, ...] = ()
    again: bool = False

    def embeddings(self) -> Table:
        """The table with all its columns, and those asked for."""
        return Workspace(self.config.workspace).table("embeddings").widened([*self.further, *self.asked.fields])

    def encoder(self) -> Encoder:
        """Raises EncoderMismatch: it is not the one that the run was planned with."""
        workspace, config = Workspace(self.config.workspace), self.config
        encoder = load_encoder(workspace, self.spec, config.precision, config.compile)
        self.card.require(encoder.card, f"the plan of this run with {self.spec}")
        return encoder


@dataclass(frozen=True)
class Handed:
    """A shard of pixels on its way from a decoding worker to one with the model. ``probe``: some images as files."""

    shard: Shard
    decoded: Decoded
    probe: list[bytes]


@dataclass(frozen=True)
class Result:
    """A shard's part, written; of changed images the rows themselves. ``bad``: see :class:`Decoded`."""

    part: Part | None
    changed: pa.Table | None
    bad: pa.Table
    card: EncoderCard
    figures: dict[str, Any]


class DecodeWorker:
    """Reads a shard's images and decodes them, on any node."""

    def __init__(self, order: Order) -> None:
        from pipeline.models.pixels import Decoder

        self._images = Workspace(order.config.workspace).table("images")
        self._stage = DecodeStage(Decoder(order.card), order.card.image_size)
        self._probes = order.card.dtype == "int8"

    def __call__(self, shard: Shard) -> Handed:
        images = self._images.take(shard.keys, IMAGE_COLUMNS)
        decoded = self._stage(images)
        probed = self._probes and shard.number == 0
        return Handed(shard, decoded, images["image"].to_pylist()[:_PROBED] if probed else [])


class EmbedWorker:
    """Embeds a shard, which it reads and decodes itself or is handed, and writes the part. Holds the model."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._images = Workspace(order.config.workspace).table("images")
        self._embeddings = order.embeddings()
        self._encoder = order.encoder()
        scores = Scores(order.asked.load_heads(order.card), order.classifier)
        self._stage = EmbedStage(self._encoder, order.config.batch_size, order.run, scores)

    def __call__(self, given: Shard | Handed) -> Result:
        if isinstance(given, Handed):
            shard, found, probe = given.shard, self._stage(given.decoded), given.probe
        else:
            shard, images = given, self._images.take(given.keys, IMAGE_COLUMNS)
            found = self._stage(images)
            probe = images["image"].to_pylist()[:_PROBED] if self._encoder.card.dtype == "int8" else []
        figures: dict[str, Any] = {"images": found.images, "texts": found.texts, "batch_size": self._stage.batch_size}
        if probe and shard.number == 0:
            figures["int8_cosine"] = self._int8_cosine(probe, found.rows["caption"].to_pylist()[:_PROBED])
        rows = _filled(found.rows, self._embeddings)
        part = None if shard.changed else self._embeddings.write_part(rows)
        return Result(part, rows if shard.changed else None, found.bad, self._encoder.card, figures)

    def _int8_cosine(self, images: Sequence[bytes], captions: list[str]) -> dict[str, float]:
        good = []
        for data in images:
            try:
                self._encoder.decode(data)
            except (OSError, ValueError):
                continue
            good.append(data)
        return self._encoder.int8_cosine(good, captions)


class ScoreWorker:
    """Files of embeddings -> one part in their place, with scores made from the stored image vectors. No model.

    None, where no row lacks a score that it could have.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._encoder, self._dim = order.card.id, order.card.dim
        self._embeddings = order.embeddings()
        self._scores = Scores(order.asked.load_heads(order.card), order.classifier)

    def __call__(self, files: list[str]) -> Part | None:
        rows = self._embeddings.take(dict.fromkeys(files), self._embeddings.spec.schema.names)
        if not self._order.again and not pc.any(self._scores.lacking(rows, self._encoder)).as_py():
            return None
        return self._embeddings.write_part(self._scores.again(rows, self._encoder, self._dim))


class LabelWorker:
    """Makes the labels' vectors, once a run: a thousand labels in eighty templates are many texts."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def __call__(self, _: int) -> Classifier | None:
        return self._order.asked.load_classifier(self._order.encoder())


def _filled(rows: pa.Table, table: Table) -> pa.Table:
    """With nulls in the table's columns that nobody asked for this time: a changed image's old scores must go."""
    missing = [f for f in table.spec.schema if f.name not in rows.column_names]
    for column in missing:
        rows = rows.append_column(column, pa.nulls(rows.num_rows, column.type))
    return rows


def _number(data: bytes) -> int:
    """63 bits of the content's digest."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1

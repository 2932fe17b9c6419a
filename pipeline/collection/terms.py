"""What is asked, as vectors: texts and images by the index's own encoder, keys by their own vectors."""

from __future__ import annotations

import base64
import io
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError

from pipeline.encoders import encoder_of
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.errors import UsageError
from schemas.questions import Question, Term
from schemas.vectors import normalise

if TYPE_CHECKING:  # torch: not for searches by key or vector
    from pipeline.models.encoder import Encoder

Vectors = NDArray[np.float32]
KINDS = ("text", "image", "image_url", "key", "vector")
MAX_PIXELS = 100_000_000
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_REMEMBERED = 1024
CANCELLED = 1e-5
"""Length of a sum, as a share of its weights, below which nothing but rounding is left of it."""


def term(what: str, value: Any, weight: float = 1.0) -> Term:
    """A :class:`Term` of Python values: an image as bytes or the path of a file, a vector as anything of D numbers.

    Args:
        what: text, image, image_url, key or vector.

    Raises:
        UsageError: an empty text, a file that cannot be read, a value of another kind.
    """
    try:
        if what == "image":
            value = base64.b64encode(value if isinstance(value, (bytes, bytearray)) else _read(value))
        elif what == "vector":
            value = np.asarray(value, np.float64).ravel().tolist()
        elif what == "key":
            value = int(value)
        return Term.model_validate({what: value, "weight": weight})
    except ValidationError as exc:
        raise invalid(exc) from exc
    except (TypeError, ValueError, OverflowError) as exc:
        raise UsageError(f"that is no {what}", actual=str(exc)) from exc


def question_of(asked: str | Question | None, options: dict[str, Any]) -> Question:
    """A question of a text, or of the one of :data:`KINDS` among ``options``; the others are its settings.

    Raises:
        UsageError: it is no question that can be asked.
    """
    if isinstance(asked, Question):
        if options:
            raise UsageError("a Question has its settings in itself", actual=", ".join(options))
        return asked
    given = {what: options.pop(what) for what in KINDS if options.get(what) is not None}
    if asked is not None:
        given = {"text": asked} | given
    try:
        return Question.model_validate({"terms": [term(what, value) for what, value in given.items()], **options})
    except ValidationError as exc:
        raise invalid(exc) from exc


def invalid(exc: ValidationError) -> UsageError:
    """What is wrong with a question, in a line."""
    first = exc.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return UsageError("that cannot be asked", actual=f"{where}: {first['msg']}" if where else first["msg"])


def check_picture(data: bytes) -> bytes:
    """An encoded image whose header lets it be decoded: of a common format, and no bomb.

    Raises:
        UsageError: naming what it is instead.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
    except Exception as exc:  # Pillow's plugins raise nearly everything
        raise UsageError(
            "that is no readable image", expected=", ".join(_FORMATS), actual=f"{type(exc).__name__}: {exc}"[:300]
        ) from exc
    if width * height > MAX_PIXELS:
        raise UsageError(
            "the image is too large", expected=f"{MAX_PIXELS:,} pixels at most", actual=f"{width} x {height}"
        )
    return data


class Encoding:
    """Texts and images by the encoder of a card, loaded at the first of them. Thread-safe.

    Args:
        clean: what an image passes through before it is decoded.
    """

    def __init__(self, workspace: Workspace, card: EncoderCard, clean: Callable[[bytes], bytes] | None = None) -> None:
        self._workspace, self._card, self._clean = workspace, card, clean or check_picture
        self._encoder: Encoder | None = None
        self._kept: OrderedDict[str, Vectors] = OrderedDict()
        self._lock = Lock()

    def load(self) -> Encoder:
        """The encoder. Raises EncoderMismatch where it is no longer the one of the card."""
        with self._lock:
            return self._loaded()

    def texts(self, texts: Sequence[str]) -> Vectors:
        """float32 [n, D], unit-norm; those of the last texts are remembered."""
        with self._lock:
            missing = [text for text in dict.fromkeys(texts) if text not in self._kept]
            vectors = dict(zip(missing, self._loaded().texts(missing), strict=True)) if missing else {}
            vectors |= {text: self._kept[text] for text in texts if text not in vectors}
            for text in list(vectors)[:_REMEMBERED]:
                self._kept[text] = vectors[text]
                self._kept.move_to_end(text)
            while len(self._kept) > _REMEMBERED:
                self._kept.popitem(last=False)
        return np.stack([vectors[text] for text in texts]) if texts else np.empty((0, self._card.dim), np.float32)

    def images(self, images: Sequence[bytes]) -> Vectors:
        """Encoded images -> float32 [n, D], unit-norm. Raises UsageError for one that cannot be decoded."""
        from pipeline.models.pixels import Undecodable

        cleaned = [self._clean(bytes(data)) for data in images]
        with self._lock:
            try:
                return self._loaded().images(cleaned)
            except Undecodable as exc:
                raise UsageError("that is no readable image", actual=str(exc)) from exc

    def _loaded(self) -> Encoder:
        if self._encoder is None:
            self._encoder = encoder_of(self._workspace, self._card)
        return self._encoder


def weighted(vectors: Vectors, weights: Sequence[float]) -> Vectors:
    """The sum of vectors [n, D], each of unit length times its weight, at unit length: float32 [D].

    Raises:
        UsageError: nothing is left of it (a text minus itself), or all weights are zero.
    """
    total = np.asarray(weights, np.float64) @ normalise(vectors)
    length = float(np.linalg.norm(total))
    if length <= CANCELLED * sum(map(abs, weights)) or length == 0.0:
        raise UsageError(
            "the terms of the question cancel each other out",
            expected="a weighted sum that is not zero",
            actual=f"weights {', '.join(f'{w:g}' for w in weights)}; length {length:.1e}",
            remedy="take out what is both wanted and unwanted, or weigh it otherwise",
        )
    return np.asarray(total / length, np.float32)


def checked_vector(value: ArrayLike, dim: int) -> Vectors:
    """A vector of a term as float32 [D]. Raises UsageError unless it has D finite numbers that are not all zero."""
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite
        vector = np.asarray(value, np.float32).ravel()
    if vector.shape != (dim,) or not np.isfinite(vector).all() or not vector.any():
        what = "all zero" if vector.shape == (dim,) and not vector.any() else f"{vector.size} numbers"
        raise UsageError("the vector does not fit the index", expected=f"{dim} finite numbers, not all 0", actual=what)
    return vector


def _read(path: Any) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, TypeError, ValueError) as exc:
        raise UsageError(f"{path} is no readable image", actual=str(exc)) from exc


def describe(question: Question) -> str:
    """A question in words: its terms, with the weights that are not 1."""
    words = []
    for one in question.terms:
        what = one.text or one.image_url or (str(one.key) if one.key is not None else None)
        what = what or ("an image" if one.image is not None else "a vector")
        words.append(what if one.weight == 1 else f"{one.weight:g}*{what}")
    return " + ".join(words)

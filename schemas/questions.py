"""What is asked of an index: the door that the command line, Python and HTTP come in by."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, model_validator

MAX_K = 10_000
Modality = Literal["image", "text"]


class Term(BaseModel):
    """One thing that results should be like, or with a negative weight unlike: exactly one of the five."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | None = Field(None, max_length=10_000, description="a text")
    image: Base64Bytes | None = Field(None, description="an encoded image; base64 in JSON")
    image_url: str | None = Field(None, max_length=8_192, description="an image to fetch, under the fetch policy")
    key: Annotated[int, Field(ge=0)] | None = Field(None, description="a pair_key: its own vector")
    vector: tuple[float, ...] | None = Field(None, description="D numbers in the encoder's space, of any length")
    weight: float = Field(1.0, ge=-100, le=100, allow_inf_nan=False)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [n for n in ("text", "image", "image_url", "key", "vector") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of text, image, image_url, key, vector; given: {given or 'none'}")
        if self.text is not None and not self.text.strip():
            raise ValueError("the text is empty")
        return self


class Question(BaseModel):
    """One search. Its vector is the weighted sum of the terms' unit vectors, scaled to unit length."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    terms: tuple[Term, ...] = Field(min_length=1, max_length=64)
    k: int = Field(10, ge=1, le=MAX_K, description="results")
    modality: Modality = Field("image", description="index to search: image vectors, or text vectors (captions)")
    where: str | None = Field(None, max_length=10_000, description="SQL predicate over the records' columns")
    threshold: float | None = Field(None, ge=-1, le=1, description="least cosine similarity")
    unique: float | None = Field(None, gt=0, le=1, description="drop a result as near as this cosine to a better one")
    diversity: float = Field(0.0, ge=0, le=1, description="maximal marginal relevance: 1 - lambda of the paper")

    @classmethod
    def of(cls, *, text: str | None = None, **rest: object) -> Self:
        """A question of one text: ``Question.of(text="a red circle", k=5)``."""
        return cls.model_validate({"terms": [{"text": text}], **rest})

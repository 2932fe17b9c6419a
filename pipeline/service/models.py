"""What goes in and out over HTTP, typed: the source of /openapi.json. Keys are texts: JavaScript has no int64."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from pipeline.service.errors import Problem
from schemas.questions import Modality, Question, Term

Scalar = float | int | str | bool | None


class SearchBody(Question):
    """A question, and the index that it is for."""

    index: str | None = Field(None, max_length=500, description="encoder id; by default the only one, or the first")


class BatchBody(BaseModel):
    """Many questions at once: they share the passes of the encoder and the searches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: str | None = Field(None, max_length=500, description="encoder id; by default the only one, or the first")
    questions: tuple[Question, ...] = Field(min_length=1)


class VectorsBody(BaseModel):
    """Terms whose vectors are wanted, each for itself: their weights do not matter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: str | None = Field(None, max_length=500, description="encoder id; by default the only one, or the first")
    terms: tuple[Term, ...] = Field(min_length=1)
    modality: Modality = Field("image", description="which vector of a key; the other one where it has only that")


class Vectors(BaseModel):
    """A unit-norm vector for each term, in their order."""

    index: str
    dim: int
    vectors: list[list[float]]


class Result(BaseModel):
    """One pair that was found."""

    key: str = Field(description="pair_key")
    similarity: float = Field(description="cosine with the question")
    rank: int = Field(description="from 1")
    caption: str | None = None
    url: str | None = None
    width: int | None = None
    height: int | None = None
    scores: dict[str, Scalar] = Field(default_factory=dict, description="further columns: scores and labels")


class Milliseconds(BaseModel):
    """Where the time went, waiting included."""

    encode: float
    search: float
    total: float


class SearchAnswer(BaseModel):
    """Results, best first."""

    index: str
    version: str
    results: list[Result]
    ms: Milliseconds


class QuestionProblem(BaseModel):
    """What stands in a batch for a question that was refused; the others are answered."""

    error: Problem


class BatchAnswer(BaseModel):
    """One answer for each question, in their order."""

    answers: list[SearchAnswer | QuestionProblem]


class FileInfo(BaseModel):
    """One FAISS file, as measured when it was built."""

    modality: Modality
    factory: str
    count: int
    bytes: int
    recall_at_1: float
    recall_at_10: float
    recall_at_100: float
    ms_per_query: float


class IndexInfo(BaseModel):
    """A published index."""

    name: str = Field(description="encoder id: what `index` means in requests")
    encoder: str
    model: str
    version: str
    modalities: list[Modality]
    count: int = Field(description="pairs that a search can find")
    deleted: int = Field(description="pairs that were taken out since this version was built")
    dim: int
    columns: list[str] = Field(description="names to be used in `where`")
    files: list[FileInfo]


class Indices(BaseModel):
    indices: list[IndexInfo]


class Record(BaseModel):
    """Everything known of a pair, by where it is known from. Whole numbers of 64 bits are texts."""

    key: str
    index: str
    record: dict[str, Scalar] = Field(description="what searches see: caption, url, size, scores")
    image: dict[str, Scalar] = Field(description="its row of images, without the bytes")
    pair: dict[str, Scalar] = Field(description="its row of pairs: the list that it came from")


class Deleted(BaseModel):
    key: str
    index: str
    deleted: bool


class Candidate(BaseModel):
    """A kept picture."""

    number: int
    rank: int
    clip_score: float
    seed: int
    prior: str
    decoder: str
    encoder: str
    sampling: str
    run: str
    image: str = Field(description="where the picture is, relative to the page")


class Ranked(BaseModel):
    number: int
    rank: int
    clip_score: float


class Prompt(BaseModel):
    """A prompt and what one run made of it: the pictures that it kept, and the ranks of all."""

    prompt_key: str
    prompt: str
    run: str
    candidates: list[Candidate]
    rankings: list[Ranked]


class Generated(BaseModel):
    prompts: list[Prompt]

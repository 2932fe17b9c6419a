"""The typed config of every job. Each field is also a flag, an environment variable and a YAML key."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from schemas.errors import Reason
from schemas.networks import DecoderConfig, PriorConfig


def _split(value: object) -> object:
    """``["a,b", "c"]`` or ``"a,b,c"`` -> ``["a", "b", "c"]``."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)):
        return [part.strip() for item in value for part in str(item).split(",") if part.strip()]
    return value


CommaList = Annotated[tuple[str, ...], BeforeValidator(_split)]


ImageFormat = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif"]


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]


def _words(value: object) -> object:
    """A number in YAML is a word, too."""
    value = value if isinstance(value, (list, tuple)) else [value]
    return [str(v) if isinstance(v, (int, float)) else v for v in value]


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _bytes(value: object) -> object:
    """``"4GB"``, ``"512 MiB"``, ``"1.5G"`` -> bytes."""
    found = isinstance(value, str) and re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]?)(?:i?B)?\s*", value, re.IGNORECASE)
    return int(float(found[1]) * _UNITS[found[2].upper()]) if found else value


Size = Annotated[int, BeforeValidator(_bytes), Field(ge=1)]
"""A number of bytes, also written with a unit of 1,024."""


class JobConfig(BaseModel):
    """Fields that all jobs take. ``argument``, where a job has it: the field that may be given without its flag."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    workspace: str = Field("./ws", description="directory or object-store URL (s3://, gs://) of the workspace")
    address: str | None = Field(None, description="Ray cluster to join; without it Ray starts in this process")
    workers: int | None = Field(None, ge=1, description="parallel workers; by default as many as CPUs or GPUs")


def _default_quality(given: dict[str, Any]) -> int:
    return 6 if given.get("format") == "png" else 95


class DownloadConfig(JobConfig):
    """Download image-text pairs into the tables pairs and images.

    Every input row ends as exactly one row of images: status ok, or a reason from a closed list.
    Run again to continue, to add new pairs, and to retry what is due.
    """

    pairs: Paths = Field(
        (), description="files, directories or globs: parquet, csv, tsv, json, jsonl, txt (.gz, .zst), webdataset tar"
    )
    url_col: str = Field("url", description="name of the URL column")
    caption_col: str = Field("caption", description="name of the caption column")
    extra_cols: CommaList = Field(("*",), description="columns carried along in pairs.extra as JSON; *: all others")
    caption_match: str | None = Field(None, description="fetch only captions in which this regular expression is found")
    min_caption_length: int = Field(0, ge=0, description="fetch only captions of at least so many characters")
    max_caption_length: int | None = Field(None, ge=0, description="fetch only captions of at most so many characters")
    image_size: int = Field(256, ge=1, description="side of the stored image, pixels")
    resize_mode: Literal["border", "keep_ratio", "keep_ratio_largest", "center_crop", "no"] = Field(
        "keep_ratio", description="img2dataset's resize modes"
    )
    upscale: bool = Field(False, description="resize smaller images up, too")
    format: Literal["jpg", "png", "webp"] = Field("jpg", description="encoding of the stored image")
    quality: int = Field(
        default_factory=_default_quality,
        ge=0,
        le=100,
        description="jpg and webp quality (default: 95), or png compression level 0-9 (default: 6)",
    )
    keep_original: bool = Field(
        True, description="keep the encoded pixels where format and size fit already; metadata is stripped all the same"
    )
    formats: Annotated[tuple[ImageFormat, ...], BeforeValidator(_split)] = Field(
        get_args(ImageFormat), description="formats let in, by content"
    )
    min_image_size: int = Field(0, ge=0, description="refuse a shorter side below this, pixels")
    max_aspect_ratio: float = Field(float("inf"), gt=0, description="refuse longer / shorter side above this")
    max_pixels: int = Field(100_000_000, ge=1, description="refuse more pixels, read from the header before decoding")
    max_frames: int = Field(1000, ge=1, description="refuse animations of more frames; the first one is stored")
    max_bytes: int = Field(32 << 20, ge=1, description="refuse larger bodies, bytes, counted while streaming")
    max_redirects: int = Field(5, ge=0, description="redirects followed for one image")
    timeout: float = Field(20.0, gt=0, description="total seconds for one image, redirects included")
    concurrency: int = Field(512, ge=1, description="most requests in flight per worker; fewer where more do not help")
    per_host: int = Field(8, ge=1, description="connections to one host, over all workers (at least one each)")
    host_rate: float = Field(0.0, ge=0, description="requests a second to one host, over all workers; 0: no limit")
    http2: bool = Field(True, description="HTTP/2 where an https host offers it")
    memory: int = Field(256 << 20, ge=1 << 20, description="bytes of fetched, not yet stored bodies per worker")
    retries: int = Field(2, ge=0, description="further tries within the run, with jittered back-off, for what may pass")
    allow_hosts: CommaList = Field((), description="private addresses to open: HOST[:PORT],...")
    schemes: CommaList = Field(("http", "https"), description="URL schemes let in; others (s3, gs) go through fsspec")
    user_agent: str = Field(
        "clipmill/0.1 (+https://github.com/clipmill/clipmill)", description="honest, with a contact"
    )
    respect_opt_out: bool = Field(True, description="honour X-Robots-Tag noai, noimageai, noindex, noimageindex")
    robots_txt: bool = Field(False, description="ask every host's robots.txt first, and keep its answer")
    shard_size: int = Field(1000, ge=1, description="pairs in one shard, the unit of work and retry")
    max_attempts: int = Field(5, ge=1, description="tries of a retryable pair over all runs")
    retry_delay: float = Field(3600.0, ge=0, description="seconds until the second try; doubles with each further one")
    retry: CommaList = Field((), description="reasons whose rows are tried again now, whatever their number of tries")
    refresh: str = Field(
        "never",
        pattern=r"^(never|always|\d+(\.\d+)?[smhdw])$",
        description="ask again for stored images: never, always, or if older than 12h, 30d, ...",
    )
    dedup: Literal["off", "exact", "near"] = Field(
        "near", description="mark duplicates in the table duplicates: by sha256, or by perceptual hash, too"
    )
    near_distance: int = Field(3, ge=0, le=16, description="bits of 64 by which near duplicates' hashes may differ")

    @field_validator("caption_match")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as exc:
            raise ValueError(f"no regular expression: {exc}") from exc
        return value

    @model_validator(mode="after")
    def _known_reasons(self) -> Self:
        if unknown := set(self.retry) - (set(Reason) - {Reason.OK}):
            raise ValueError(f"--retry {', '.join(sorted(unknown))}: the reasons are {', '.join(list(Reason)[1:])}")
        return self

    @model_validator(mode="after")
    def _png_level(self) -> Self:
        if self.format == "png" and self.quality > 9:
            raise ValueError(f"--quality {self.quality}: the compression level of a png is 0 to 9")
        return self


class EmbedConfig(JobConfig):
    """Embed images and captions with a CLIP encoder into the table embeddings."""

    encoder: str | None = Field(
        None,
        description="MODEL[:PRETRAINED|:PATH] of open_clip, or the name of a CLIP trained in this workspace",
    )
    batch_size: int = Field(0, ge=0, description="images in one forward pass; 0: found by itself")
    shard_size: int = Field(2048, ge=1, description="most pairs in one shard, the unit of work and retry")
    precision: Literal["auto", "float32", "float16", "bfloat16", "int8"] = Field(
        "auto", description="float32 on CPU, bfloat16 or float16 on GPU; int8 (CPU) reports how far its vectors are off"
    )
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of one worker; may be a fraction")
    decoders: int | None = Field(
        None, ge=0, description="workers that decode beside the models; by default 0 on CPU, 4 a GPU worker"
    )
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto: on GPU")
    heads: CommaList = Field(
        (), description="NAME=FILE.safetensors,...: linear or MLP heads over the image vector -> columns score_NAME"
    )
    zero_shot: str | None = Field(None, description="a file with a label on each line -> columns label and label_score")
    templates: str | None = Field(
        None, description="a file of prompt templates with {} for the label; by default the 80 of the CLIP paper"
    )


class IndexConfig(JobConfig):
    """Build or update the FAISS indices of an encoder's embeddings and publish them with measured recall."""

    encoder: str | None = Field(None, description="encoder id or model name; by default the only one embedded")
    modality: CommaList = Field(("image", "text"), description="image, text or both; those that have vectors")
    factory: str = Field("auto", description="FAISS factory string; auto: the fastest kind for memory and recall")
    memory: Size | None = Field(None, description="most memory for one modality's index while searching, e.g. 4GB")
    recall: float = Field(
        0.95, gt=0, le=1, description="recall@10 to tune the search to; below it nothing is published"
    )
    queries: int = Field(500, ge=1, description="held-out queries that the recall is measured on")
    shard_size: int = Field(1_000_000, ge=1, description="vectors added by one task; more go over Ray and are merged")
    rebuild: bool = Field(False, description="build from nothing even where adding would do")
    max_beside: float = Field(
        0.05, ge=0, le=1, description="share of new vectors up to which they lie in a small file beside the large one"
    )
    max_deleted: float = Field(0.1, ge=0, le=1, description="share of tombstones from which an index is built anew")
    max_growth: float = Field(0.25, ge=0, description="growth since the last training from which it is built anew")
    delete: CommaList = Field((), description="pair_keys, or files of them, that no search finds from now on")
    rollback: bool = Field(False, description="publish again the version before the present one, and do nothing else")
    keep: int = Field(3, ge=1, description="versions kept, the published one among them; older ones are removed")
    audit: int = Field(32, ge=0, description="pairs that are embedded again and must agree before publishing; 0: none")


class QueryConfig(JobConfig):
    """Query a published index by text, image, key, vector or a mix of them; one question, or a file of them."""

    text: Words = Field((), description="texts to search with; WEIGHT*TEXT weighs one: --text '0.5*red'")
    image: Words = Field((), description="image files or URLs to search with; WEIGHT*FILE weighs one")
    key: Words = Field((), description="pair_keys whose own vectors to search with; WEIGHT*KEY weighs one")
    vector: Words = Field((), description=".npy files with a vector [D] each; WEIGHT*FILE weighs one")
    without: Words = Field((), description="texts of what is not wanted: their vectors are subtracted")
    queries: str | None = Field(
        None,
        description="a file of questions: results go to --output. Texts (txt, csv, jsonl, parquet), vectors (.npy "
        "[Q, D]) or a Parquet column of keys or vectors",
    )
    query_col: str = Field("text", description="column of the --queries file: texts, keys (int64) or vectors")
    output: str = Field(
        "results.parquet",
        description="Parquet file of the results of --queries; finished shards lie in OUTPUT.parts till then",
    )
    shard_size: int = Field(
        8192, ge=1, description="questions of --queries in one shard; rounded up to a multiple of 256"
    )
    k: int = Field(10, ge=1, le=10_000, description="results per query")
    where: str | None = Field(
        None,
        description="SQL predicate over pair_key, caption, similarity, url, width, height, scores and labels",
    )
    threshold: float | None = Field(None, ge=-1, le=1, description="least cosine similarity of a result")
    unique: float | None = Field(None, gt=0, le=1, description="drop a result as near as this cosine to a better one")
    diversity: float = Field(0.0, ge=0, le=1, description="maximal marginal relevance: 0 nearest first, 1 most varied")
    modality: Literal["image", "text"] = Field("image", description="index to search")
    encoder: str | None = Field(None, description="encoder id or model name; by default the only one indexed")
    allow_hosts: CommaList = Field((), description="private addresses from which --image may fetch: HOST[:PORT],...")
    sheet: str | None = Field(None, description="write the found images as a contact sheet: a .png or .html file")

    @model_validator(mode="after")
    def _some_question(self) -> Self:
        terms = [n for n in ("text", "image", "key", "vector") if getattr(self, n)]
        if bool(terms) == (self.queries is not None):
            raise ValueError(
                "give --text, --image, --key, --vector or several of them, or else --queries; "
                f"given: {', '.join(terms + ['queries'] * bool(self.queries)) or 'none'}"
            )
        if any(not text.strip() for text in (*self.text, *self.without)):
            raise ValueError("--text or --without is empty")
        return self


class ServeConfig(JobConfig):
    """Serve the published indices over HTTP: our API, clip-retrieval's protocol and the web page."""

    host: str = Field("127.0.0.1", description="address to listen on; another than loopback needs a token")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    token: str | None = Field(None, description="bearer token asked of every request (health checks apart)")
    encoder: str | None = Field(None, description="encoder id or model name; by default all that are indexed")
    replicas: int = Field(1, ge=1, description="Ray Serve replicas, each with the index mapped into memory")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of one replica, for its encoder; may be a fraction")
    max_k: int = Field(1000, ge=1, le=10_000, description="most results of one query")
    max_batch: int = Field(1024, ge=1, description="most queries in one request to /v1/batch")
    max_bytes: int = Field(16 << 20, ge=1, description="refuse larger request bodies, bytes")
    timeout: float = Field(10.0, gt=0, description="seconds after which a request is given up")
    concurrency: int = Field(256, ge=1, description="requests in a replica at once; more are turned away with 503")
    allow_hosts: CommaList = Field((), description="private addresses that images may come from: HOST[:PORT],...")
    deletions: bool = Field(False, description="let DELETE /v1/images/{key} take a key out of the index")


class SqlConfig(JobConfig):
    """Ask the workspace's tables in SQL (DuckDB, read-only), vectors as FLOAT[D]."""

    argument: ClassVar[str] = "query"

    query: str | None = Field(None, description="one SELECT over pairs, images, embeddings, ...; without: the tables")
    output: str | None = Field(None, description="write the rows to this .parquet, .csv or .jsonl file")
    limit: int = Field(50, ge=0, description="rows shown on the terminal")
    memory: Size | None = Field(None, description="memory limit of DuckDB, e.g. 4GB; by default its own")


class TrainConfig(JobConfig):
    """Fields that all training jobs take."""

    name: str = Field("default", pattern=r"^[A-Za-z0-9_.-]+$", description="name of the model in the workspace")
    steps: int = Field(10_000, ge=1, description="optimizer steps")
    batch_size: int = Field(256, ge=1, description="samples in one step, over all workers")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    muon_lr: float = Field(0.0, ge=0, description="peak learning rate of Muon for the blocks' matrices; 0: none")
    warmup: int = Field(200, ge=0, description="steps of linear warm-up; then linear to zero")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW, matrices only")
    clip_grad: float = Field(1.0, gt=0, description="limit of the gradient's norm")
    seed: int = Field(0, ge=0, description="initial weights, data order, noise and times")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints; a killed run loses at most these")
    log_every: int = Field(50, ge=1, description="steps between lines of metrics.jsonl")
    threads: int = Field(1, ge=1, description="torch threads of a CPU worker")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of one worker")
    precision: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="autocast type; auto: float32 on CPU, bfloat16 on GPU"
    )
    held_out: float = Field(0.02, ge=0, lt=1, description="share of pairs, by hash of the key, kept for validation")


class ClipTrainConfig(TrainConfig):
    """Train CLIP from scratch on the images of the workspace, with open_clip's network and tokenizer."""

    model: str = Field(
        "ViT-B-32", description="open_clip model name, or a JSON file in the layout of its model configs"
    )
    lr: float = Field(5e-4, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.2, ge=0, description="of AdamW, matrices only")
    decorrelation: float = Field(
        0.0, ge=0, description="weight of VICReg's variance and covariance terms; 0: the paper's recipe"
    )
    decorrelation_warmup: int = Field(200, ge=0, description="steps over which that weight grows")
    hard_negatives: bool = Field(
        False, description="add false captions with two swapped spans as wrong answers (NegCLIP)"
    )
    ordered_pairs: float = Field(
        0.0, ge=0, description="weight of predicting a caption's ordered word pairs from either embedding"
    )


class PriorTrainConfig(TrainConfig):
    """Train the diffusion prior (text -> CLIP image embedding) on the embeddings table."""

    encoder: str | None = Field(None, description="encoder of the embeddings; by default the only one in the workspace")
    audit: int = Field(32, ge=0, description="pairs that are embedded again and must agree before training; 0: none")
    network: PriorConfig = PriorConfig()
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights, which are the ones kept")
    whitening_floor: float = Field(1e-3, gt=0, le=1, description="smallest variance kept, as a share of the largest")
    sample_steps: int = Field(5, ge=1, description="DDIM steps when generating, unless the job says otherwise")


class DecoderTrainConfig(TrainConfig):
    """Train the decoder (CLIP image embedding -> picture) on images and their embeddings."""

    encoder: str | None = Field(None, description="encoder of the embeddings; by default the only one in the workspace")
    audit: int = Field(32, ge=0, description="pairs that are embedded again and must agree before training; 0: none")
    network: DecoderConfig = DecoderConfig()
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights, which are the ones kept")
    whitening_floor: float = Field(1e-3, gt=0, le=1, description="smallest variance kept, as a share of the largest")
    sample_steps: int = Field(12, ge=1, description="steps when generating, unless the job says otherwise")
    guidance: float = Field(
        2.0, ge=0, description="classifier-free guidance when generating, unless the job says otherwise"
    )
    blur: float = Field(0.0, ge=0, description="noise level that the prior's embeddings are taken to have")


class GenerateConfig(JobConfig):
    """Generate N candidates for every prompt, rerank them with CLIP and keep the best K."""

    prompts: str | None = Field(None, description="file of prompts: txt (a line each), csv, tsv, jsonl, parquet")
    prompt_col: str = Field("prompt", description="column of the prompts in a table file")
    candidates: int = Field(8, ge=1, le=1_000_000, description="pictures made for each prompt")
    keep: int = Field(4, ge=1, description="best pictures kept for each prompt, by CLIP score")
    seed: int = Field(0, ge=0, description="a candidate depends on (prompt, number, seed, models) alone")
    guidance: float | None = Field(None, ge=0, description="classifier-free guidance; by default the decoder's own")
    steps: int | None = Field(None, ge=1, description="decoder steps; by default the decoder's own")
    prior: str | None = Field(None, description="name of the prior; by default the only one")
    decoder: str | None = Field(None, description="name of the decoder; by default the only one")
    encoder: str | None = Field(None, description="CLIP that ranks; by default the one of prior and decoder")
    batch_size: int = Field(64, ge=1, description="pictures in one forward pass")
    shard_size: int = Field(16, ge=1, description="prompts in one shard")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of one worker; may be a fraction")
    sheet: str | None = Field(None, description="write the kept pictures as a contact sheet to this PNG")

    @model_validator(mode="after")
    def _keep_fits(self) -> Self:
        if self.keep > self.candidates:
            raise ValueError(f"--keep {self.keep} is more than --candidates {self.candidates}")
        return self


class EvaluateConfig(JobConfig):
    """Measure retrieval, prior, generation and index of a workspace; write a report with plots."""

    encoder: str | None = Field(None, description="encoder to evaluate; by default the only one")
    sample: int = Field(1000, ge=10, description="held-out pairs that retrieval and prior are measured on")
    seed: int = Field(0, ge=0, description="of the sample")
    zero_shot: str | None = Field(None, description="a file with a label on each line: measure zero-shot accuracy")
    templates: str | None = Field(
        None, description="a file of prompt templates with {} for the label; by default the 80 of the CLIP paper"
    )
    label_col: str | None = Field(
        None, description="column of pairs.extra with the true label; by default the one label in the caption"
    )


class ImportConfig(JobConfig):
    """Read images that are there already into the tables pairs and images: webdataset tars, img2dataset's output.

    Every sample ends as exactly one row of images; images are kept as they are. Run again to go on, or after mending
    an archive: only what has no image yet is added.
    """

    source: Paths = Field(
        min_length=1,
        description="tars, Parquet files with images, folders or globs of them, or a folder of vectors in "
        "clip-retrieval's layout; also without the flag",
    )
    encoder: str | None = Field(
        None, description="of vectors: MODEL:PRETRAINED that made them; it is loaded for its card, and they are audited"
    )
    formats: Annotated[tuple[ImageFormat, ...], BeforeValidator(_split)] = Field(
        get_args(ImageFormat), description="formats let in, by content"
    )
    max_bytes: int = Field(32 << 20, ge=1, description="refuse larger files, bytes, without reading them")
    max_pixels: int = Field(100_000_000, ge=1, description="refuse more pixels, read from the header before decoding")
    max_frames: int = Field(1000, ge=1, description="refuse animations of more frames; the first one is stored")
    shard_size: int = Field(1000, ge=1, description="samples written at once; an archive is the unit of work and retry")


class ExportConfig(JobConfig):
    """Write images with their captions and metadata as webdataset tars, or in img2dataset's layouts.

    The same rows give the same tars. Run again to go on: finished shards are kept.
    """

    format: Literal["webdataset", "img2dataset", "files", "npy", "clip-retrieval", "dalle2-pytorch", "parquet-list"] = (
        Field(
            "webdataset",
            description="images: tars; tars with img2dataset's metadata beside them; folders of files with it. "
            "Vectors: npy files; clip-retrieval's layout; dalle2-pytorch's; Parquet with lists of floats",
        )
    )
    encoder: str | None = Field(None, description="of vectors: whose; by default the only one in the workspace")
    output: str = Field(description="directory or object-store URL: empty, or with the same export begun")
    shard_size: int = Field(10_000, ge=1, description="rows in one shard")
    where: str | None = Field(
        None, description="SQL predicate over pair_key, caption, url, width, height, status, sha256"
    )
    drop_duplicates: bool = Field(False, description="leave out what the table duplicates marks")


class SemdedupConfig(JobConfig):
    """Mark semantic near-duplicates of one encoder's image vectors in the table semantic_duplicates (SemDeDup)."""

    encoder: str | None = Field(None, description="encoder of the embeddings; by default the only one in the workspace")
    threshold: float = Field(0.95, gt=0, le=1, description="cosine from which two images count as the same")
    clusters: int = Field(0, ge=0, description="k of k-means; 0: chosen by the number of images")
    keep: Literal["first", "caption"] = Field(
        "first", description="of a group: the first by (run, key), or the one whose caption fits its image best"
    )
    seed: int = Field(0, ge=0, description="of k-means")


class StatusConfig(JobConfig):
    """Show what a workspace holds: tables, reasons of failures, encoders, indices, models, runs."""

    runs: int = Field(10, ge=0, description="newest runs to list")


class DemoConfig(BaseModel):
    """The whole pipeline on a small drawn world: URLs to a page of generated pictures, on two cores.

    Killed or interrupted, the same command goes on where it stopped.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str = Field("demo", description="where everything goes: world/, ws/, report/index.html, demo.json")
    pairs: int = Field(40_000, ge=500, description="scenes drawn, served and downloaded")
    effort: float = Field(1.0, gt=0, description="factor on all training steps: 0.02 for a quick look, more for better")
    minutes: float = Field(13.5, gt=0, description="on a slow machine prior and decoder are shortened to end by then")
    seed: int = Field(0, ge=0, description="of the world, the training and the prompts")
    prompts: int = Field(30, ge=1, description="prompts of each kind that are generated and judged")
    candidates: int = Field(8, ge=1, description="pictures made for each prompt")
    address: str | None = Field(None, description="Ray cluster to join; without it Ray starts in this process")

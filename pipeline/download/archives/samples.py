"""Samples of an archive: what belongs together, its pair, and the row of images that it becomes."""

from __future__ import annotations

import datetime as dt
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from pipeline.download.archives.failures import reason_of
from pipeline.download.archives.layouts import IMAGE_SUFFIXES
from pipeline.download.archives.tars import Member
from pipeline.download.captions import CaptionFilter
from pipeline.download.pictures.images import ImageStage
from pipeline.download.web.policy import Refused
from schemas.configs import DownloadConfig
from schemas.errors import Reason
from schemas.keys import pair_key
from schemas.tables import IMAGES

_OWN = frozenset(
    ("url", "caption", "key", "status", "error_message", "width", "height", "original_width", "original_height",
     "sha256", "txt")
)  # fmt: skip
"""img2dataset's columns that have a place of their own in our tables, or none (its key); others are extra."""
_NO_EXIF = (None, "", "{}")
_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$", re.DOTALL)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAGIC = (
    (re.compile(rb"\xff\xd8\xff"), "jpg"),
    (re.compile(rb"\x89PNG\r\n"), "png"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp"),
    (re.compile(rb"GIF8"), "gif"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "avif"),
)
_LONG_AGO = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
"""When another tool failed to fetch it: unknown, so the next download may try."""
_EMPTY = dict.fromkeys(IMAGES.schema.names)


@dataclass
class Sample:
    """One sample of an archive, whatever the archive's layout.

    ``member`` names it inside the archive. ``meta`` is its JSON or its row of img2dataset's metadata. ``problem``:
    why it is no good, before any look at the image.
    """

    member: str
    image: bytes | None = None
    text: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    problem: tuple[Reason, str] | None = None


@dataclass(frozen=True)
class Pair:
    """A sample's pair: what the table pairs holds of it. ``given``: the archive names its URL."""

    key: int
    url: str
    caption: str
    extra: str | None
    given: bool


# -- from files to samples -----------------------------------------------------------------------------


def split_name(name: str) -> tuple[str, str] | None:
    """("a/0001", "seg.png") of "a/0001.seg.PNG": webdataset's rule. None: no sample's file (no dot, or hidden)."""
    found = _NAME.match(name)
    return (found[1], found[2].lower()) if found else None


def role_of(suffix: str) -> str | None:
    """``image``, ``text`` or ``meta``; None for a file that we have no place for."""
    last = suffix.rpartition(".")[2]
    return "image" if last in IMAGE_SUFFIXES else {"txt": "text", "json": "meta"}.get(last)


class Grouper:
    """Consecutive files of one key -> samples. ``ignored`` counts files that belong to none."""

    def __init__(self, metadata: dict[str, Mapping[str, Any]]) -> None:
        self._metadata = metadata
        self.ignored = 0

    def __call__(self, members: Iterable[Member]) -> Iterator[Sample]:
        """The metadata's rows are taken out as they are used. An error of ``members`` drops the unfinished sample."""
        key, files = "", dict[str, tuple[str, Member]]()
        for member in members:
            name = split_name(member.name)
            role = role_of(name[1]) if name else None
            if name is None or role is None:
                self.ignored += 1
                continue
            held = files.get(role)
            if name[0] != key or (held is not None and held[0] == name[1]):
                if files:
                    yield self._sample(key, files)
                key, files = name[0], {role: (name[1], member)}
            elif held is None or ("." in held[0] and "." not in name[1]):
                self.ignored += held is not None
                files[role] = (name[1], member)
            else:  # a second image of the sample: seg.png beside jpg
                self.ignored += 1
        if files:
            yield self._sample(key, files)

    def _sample(self, key: str, files: Mapping[str, tuple[str, Member]]) -> Sample:
        held = {role: member for role, (_, member) in files.items()}
        first = held.get("image") or next(iter(held.values()))
        sample = Sample(first.name, meta=self._metadata.pop(key.rpartition("/")[2], {}))
        for member in held.values():
            if member.data is None:
                sample.problem = Reason.TOO_LARGE, f"{member.name}: {member.size:,} bytes"
        if (meta := held.get("meta")) and meta.data is not None:
            _read_meta(sample, meta)
        if (text := held.get("text")) and text.data is not None:
            _read_text(sample, text.data)
        if image := held.get("image"):
            sample.image = image.data
        else:
            sample.problem = sample.problem or (Reason.BAD_RECORD, "a sample without an image")
        return sample


def _read_meta(sample: Sample, member: Member) -> None:
    try:
        found = json.loads(member.data or b"", parse_constant=lambda _: None)
    except (ValueError, RecursionError) as exc:
        sample.problem = Reason.BAD_RECORD, f"{member.name} is not readable JSON: {exc}"[:300]
        return
    if isinstance(found, dict):
        sample.meta = {**sample.meta, **found}
    else:
        sample.problem = Reason.BAD_RECORD, f"{member.name} is no JSON object"


def _read_text(sample: Sample, data: bytes) -> None:
    try:
        sample.text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        sample.text = data.decode("utf-8", "replace")
        sample.problem = sample.problem or (Reason.BAD_CAPTION, f"not valid UTF-8: {exc.reason}")


def from_row(row: Mapping[str, Any], image: bytes | None, max_bytes: int) -> Sample:
    """The sample of a row of img2dataset's metadata, with its image or without (a failed one)."""
    sample = Sample(str(row.get("key") or ""), meta=row)
    if isinstance(text := row.get("txt"), str):
        sample.text = text
    if image is None:
        status, message = str(row.get("status") or ""), str(row.get("error_message") or "")
        if status in ("success", ""):
            sample.problem = Reason.BAD_RECORD, "a sample without an image"
        else:
            sample.problem = reason_of(status, message)[0], message
    elif len(image) > max_bytes:
        sample.problem = Reason.TOO_LARGE, f"{len(image):,} bytes"
    else:
        sample.image = image
    return sample


# -- from samples to rows ------------------------------------------------------------------------------


def pair_of(sample: Sample, archive: str) -> Pair:
    """The sample's pair. ``archive``: URI that stands for the URL where the sample has none, with its name."""
    url, given = sample.meta.get("url"), True
    if not isinstance(url, str) or not url:
        name = quote(sample.member.encode("utf-8", "surrogateescape"), safe="/:@!$&'()*+,;=~")
        url, given = f"{archive}#{name}", False
    caption = _caption(sample)
    if (clean := _clean(caption)) != caption:
        sample.problem = sample.problem or (Reason.BAD_CAPTION, "half a surrogate pair")
    url = _clean(url)
    extra = {k: v for k, v in sample.meta.items() if k not in _OWN and (k != "exif" or v not in _NO_EXIF)}
    return Pair(pair_key(url, clean), url, clean, _dump(extra) if extra else None, given)


def _caption(sample: Sample) -> str:
    """The text, else the JSON's caption. A file's last line end is no part of it, unless the JSON says so, too."""
    meta = sample.meta.get("caption")
    if sample.text is None:
        return meta if isinstance(meta, str) else ""
    return sample.text if sample.text == meta else sample.text.removesuffix("\n").removesuffix("\r")


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _dump(extra: Mapping[str, Any]) -> str:
    try:
        return json.dumps(extra, allow_nan=False, default=str)
    except ValueError:  # JSON knows neither NaN nor infinity
        return json.dumps(_finite(extra), allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value


class RowMaker:
    """(sample, its pair) -> a row of images, ok or with its reason.

    The image goes through the config's resizing. ``as_is``: jpg, png and webp keep their encoding, and what is of
    another is stored as png.
    """

    def __init__(self, config: DownloadConfig, run: str, *, as_is: bool = False) -> None:
        self.config, self.run = config, run
        kinds = ("jpg", "png", "webp") if as_is else (config.format,)
        update = {k: {"format": k, "quality": 6 if k == "png" else 95} if as_is else {} for k in kinds}
        self._stages = {k: ImageStage(config.model_copy(update=update[k])) for k in kinds}
        self._other = "png" if as_is else config.format
        self._filter = CaptionFilter(config)

    def __call__(self, sample: Sample, pair: Pair) -> dict[str, Any]:
        row: dict[str, Any] = dict(_EMPTY)
        problem = sample.problem
        if problem is None and (why := self._filter(pair.caption)):
            problem = Reason.CAPTION_FILTERED, why
        if problem is None:
            try:
                row |= self._stored(sample)
            except Refused as exc:
                problem = exc.reason, exc.detail
        reason, error = problem or (Reason.OK, None)
        retryable = reason.retryable and pair.given  # a later run may ask for it, if it is told where
        return row | {
            "pair_key": pair.key,
            "url": pair.url,
            "caption": pair.caption,
            "status": str(reason),
            "error": error,
            "http_status": _http_status(sample) if problem else None,
            "attempts": 1,
            "original_bytes": None if sample.image is None else len(sample.image),
            "retryable": retryable,
            "fetched_at": _LONG_AGO if retryable else dt.datetime.now(dt.UTC),
            "run": self.run,
        }

    def _stored(self, sample: Sample) -> dict[str, Any]:
        image, meta = sample.image or b"", sample.meta
        if not image:
            raise Refused(Reason.EMPTY_BODY, "no bytes")
        kind = next((name for magic, name in _MAGIC if magic.match(image)), None)
        chosen = kind if kind in self._stages else self._other
        found = {k: v for k, v in vars(self._stages[chosen](image)).items() if k in _EMPTY}
        row: dict[str, Any] = {"format": chosen, "original_format": kind} | found
        if isinstance(digest := meta.get("sha256"), str) and _SHA256.fullmatch(digest):
            row["sha256"] = digest  # of the bytes as fetched; ours is of the bytes as archived
        sides = [meta.get("original_width"), meta.get("original_height")]
        if all(isinstance(side, int) and 0 < side < 1 << 31 for side in sides):
            row["original_width"], row["original_height"] = sides
        return row


def _http_status(sample: Sample) -> int | None:
    return reason_of("", str(sample.meta.get("error_message") or ""))[1]

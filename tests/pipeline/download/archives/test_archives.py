"""Reading archives: against tarfile and the webdataset library, cut anywhere, and full of hostile members."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from pipeline.download.archives.failures import reason_of
from pipeline.download.archives.layouts import Archive, find_archives
from pipeline.download.archives.samples import split_name
from pipeline.download.archives.stage import ArchiveStage, Batch, BrokenArchive
from pipeline.download.archives.tars import Broken, Gunzip, Member, TarReader
from schemas.configs import DownloadConfig
from schemas.errors import Reason, UsageError
from schemas.keys import pair_key
from tests.servers import number_of, picture, png_bomb

Files = Sequence[tuple[str, bytes]]


def tar_of(files: Files, kind: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return out.getvalue()


def members(stream: Any, max_bytes: int = 1 << 20) -> tuple[list[Member], str]:
    """What is read of a tar, and why no more."""
    found = []
    try:
        for member in TarReader(stream, max_bytes):
            found.append(member)
    except Broken as exc:
        return found, str(exc)
    return found, ""


def nothing_known(keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.zeros(len(keys), np.bool_)


def read(path: Path, config: DownloadConfig | None = None, known: Any = nothing_known) -> list[Batch]:
    config = config or DownloadConfig(resize_mode="no", keep_original=True)
    stage = ArchiveStage(config, "run-1", as_is=True)
    return [batch for archive in find_archives([str(path)]) for batch in stage(archive, known)]


def rows(batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Rows of images, with source, extra and problem of their pair."""
    found = []
    for batch in batches:
        for pair, image in zip(batch.pairs.to_pylist(), batch.images.to_pylist(), strict=True):
            assert pair["added_run"] == image["run"] == "run-1"
            assert pair["pair_key"] == image["pair_key"] == pair_key(image["url"], image["caption"])
            assert (image["status"] == "ok") == (image["image"] is not None)
            found.append(pair | image)
    return found


def write_tar(path: Path, files: Files) -> Path:
    path.write_bytes(tar_of(files))
    return path


# -- tars ----------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=140).filter(
    lambda name: name not in (".", "..") and "\\" not in name
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=6),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_tars_of_all_formats(files: list[tuple[str, bytes]], kind: int) -> None:
    data = tar_of(files, kind)
    for stream in (io.BytesIO(data), Gunzip(io.BytesIO(gzip.compress(data)))):
        found, why = members(stream)
        assert why == ""
        assert [(m.name, m.data) for m in found] == [(n, d) for n, d in files]


def test_a_cut_anywhere_keeps_what_came_before() -> None:
    files = [("a.txt", b"x" * 700), ("b" * 150 + ".txt", b"y"), ("c.json", b"z" * 512)]
    data = tar_of(files, tarfile.GNU_FORMAT)
    # A header, and a payload filled up to 512 bytes; the second has a long name's two blocks before its own.
    ends = [512 + 700, 1536 + 1024 + 512 + 1, 3584 + 512 + 512]
    for cut in [*range(0, ends[-1] + 513, 64), *ends, *(e - 1 for e in ends)]:
        found, why = members(io.BytesIO(data[:cut]))
        whole = sum(end <= cut for end in ends)
        assert [(m.name, m.data) for m in found] == files[:whole]
        assert bool(why) == (cut < ends[-1] + 512), "behind it is the end mark, a block of zeros"


def test_a_cut_gzip_gives_all_that_can_be_unpacked() -> None:
    rng = np.random.default_rng(0)
    files = [(f"{n}.txt", rng.bytes(900)) for n in range(20)]
    data = tar_of(files)
    packed = gzip.compress(data)
    for cut in range(1, len(packed), 997):
        found, why = members(Gunzip(io.BytesIO(packed[:cut])))
        assert [(m.name, m.data) for m in found] == files[: len(found)]
        assert why != ""
        assert len(found) >= cut // 1600 - 1, "bytes that do not shrink: a member of 1,536 bytes or so"
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    assert members(Gunzip(io.BytesIO(bytes(flipped))))[1] != ""


def test_archives_one_behind_the_other_are_both_read() -> None:
    one, two = tar_of([("a.txt", b"1")]), tar_of([("b.txt", b"2")])
    assert [m.name for m in members(io.BytesIO(one + two))[0]] == ["a.txt", "b.txt"]
    assert members(io.BytesIO(one + b"junk" * 300)) == members(io.BytesIO(one))
    parts = gzip.compress(one) + gzip.compress(two) + bytes(100)
    assert [m.name for m in members(Gunzip(io.BytesIO(parts)))[0]] == ["a.txt", "b.txt"]


def test_links_devices_and_climbing_names_are_passed_over() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
        for name in ("/etc/a.jpg", "../b.jpg", "x/../../c.jpg", "..\\d.jpg"):
            header = tarfile.TarInfo(name)
            header.size = 3
            tar.addfile(header, io.BytesIO(b"abc"))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("folder/good.txt"))
    reader = TarReader(io.BytesIO(out.getvalue()), 100)
    assert [m.name for m in reader] == ["folder/good.txt"]
    assert reader.strange == 8


class Zeros(io.RawIOBase):
    """``head``, then zeros without end; counts the bytes that were read."""

    def __init__(self, head: bytes) -> None:
        self.head, self.at, self.count = head, 0, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset if whence == 0 else self.at + offset
        return self.at

    def read(self, size: int = -1) -> bytes:
        piece = self.head[self.at : self.at + size].ljust(size, b"\0")
        self.at += size
        self.count += size
        return piece


def test_large_members_and_headers_are_not_read() -> None:
    header = tarfile.TarInfo("bomb.png")
    header.size = 1 << 40
    stream = Zeros(header.tobuf(tarfile.GNU_FORMAT))
    assert next(iter(TarReader(stream, 1000))) == Member("bomb.png", 1 << 40, None)
    assert stream.count < 2000
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        header.type = kind
        stream = Zeros(header.tobuf(tarfile.GNU_FORMAT))
        assert members(stream) == ([], f"an extended header of {1 << 40:,} bytes")
        assert stream.count < 2000


@pytest.mark.parametrize(
    "records",
    [b"5 a=b\n" * 3, b"99 path=x\n", b"path=x\n", b"9999999999999999 path=x\n", b"10 pathxxx\n", b"11 size=-1\n"],
    ids=["length too short", "too long", "none", "endless", "no value", "negative size"],
)
def test_damaged_pax_headers(records: bytes) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    data = header.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + tar_of([("a.txt", b"1")])
    found, why = members(io.BytesIO(data))
    assert found == [] and "extended header" in why


def test_a_damaged_header_is_told(tmp_path: Path) -> None:
    data = bytearray(tar_of([("a.jpg", picture(1)), ("b.jpg", picture(2))], tarfile.USTAR_FORMAT))
    data[1024 + 100] ^= 0xFF  # mode of the second header: its checksum no longer fits
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(BrokenArchive, match=r"x\.tar: a damaged header"):
        read(tmp_path / "x.tar")


# -- samples -------------------------------------------------------------------------------------------


@given(st.lists(st.text("ab.É ", min_size=1, max_size=8), min_size=1, max_size=3))
def test_names_are_split_as_webdataset_does(parts: list[str]) -> None:
    name = "/".join(parts)
    split = split_name(name)
    if split is None:  # hidden, or without a dot
        assert parts[-1].startswith(".") or "." not in parts[-1]
    else:
        base, suffix = base_plus_ext(name)
        assert split == (base, suffix.lower())


def test_a_tar_of_the_webdataset_library(tmp_path: Path) -> None:
    """Written by the library, read by us; keys with folders, suffixes in capitals, all formats."""
    kinds = ["jpg", "jpeg", "png", "webp", "gif"]
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as sink:
        for n in range(10):
            image = picture(n, {"jpeg": "jpg"}.get(kinds[n % 5], kinds[n % 5]))
            sink.write({"__key__": f"v1.0/{n:04}", kinds[n % 5]: image, "txt": f"number {n}", "cls": n})
    found = rows(read(tmp_path / "w.tar"))
    assert [r["caption"] for r in found] == [f"number {n}" for n in range(10)]
    assert [number_of(r["image"]) for r in found] == list(range(10))
    assert [(r["format"], r["original_format"]) for r in found[:5]] == [
        ("jpg", "jpeg"), ("jpg", "jpeg"), ("png", "png"), ("webp", "webp"), ("png", "gif"),
    ]  # fmt: skip
    assert {r["status"] for r in found} == {"ok"}
    assert found[2]["url"] == f"{(tmp_path / 'w.tar').as_uri()}#v1.0/0002.png"
    assert found[2]["source"] == str(tmp_path / "w.tar")
    assert {(r["width"], r["height"], r["original_width"]) for r in found} == {(24, 16, 24)}
    assert read(tmp_path / "w.tar")[-1].ignored == 10, "the .cls files"


def test_images_are_kept_to_the_byte(tmp_path: Path) -> None:
    for kind in ("jpg", "png", "webp"):
        image = picture(7, kind)
        (row,) = rows(read(write_tar(tmp_path / f"{kind}.tar", [(f"x.{kind}", image)])))
        assert row["image"] == image
        assert row["original_bytes"] == len(image)


def test_what_a_sample_is(tmp_path: Path) -> None:
    meta = json.dumps({"url": "http://a/1", "caption": "json's", "score": 0.5, "tags": ["x"], "width": 1}).encode()
    files = [
        ("one.json", meta), ("one.jpg", picture(1, "jpg")),
        ("two.jpg", picture(2, "jpg")), ("two.seg.png", picture(9)), ("two.txt", b"text's\n"), ("two.json", meta),
        ("three.v2.PNG", picture(3)), ("three.v2.txt", "\u202e \U0001f600 \0".encode()),
        ("one.jpg", picture(4, "jpg")), ("one.txt", b"again"),
        ("README.md", b"no sample"), ("noext", b""),
        ("five.jpg", picture(5, "jpg")), ("five.jpg", picture(6, "jpg")),
    ]  # fmt: skip
    batches = read(write_tar(tmp_path / "x.tar", files))
    found = rows(batches)
    assert [number_of(r["image"]) for r in found] == [1, 2, 3, 4, 5]
    assert [r["caption"] for r in found] == ["json's", "text's", "\u202e \U0001f600 \0", "again", ""]
    assert [r["url"].rpartition("#")[2] for r in found] == [
        "http://a/1", "http://a/1", "three.v2.PNG", "one.jpg", "five.jpg",
    ]  # fmt: skip
    assert json.loads(found[0]["extra"]) == {"score": 0.5, "tags": ["x"]}
    assert (batches[-1].doubles, batches[-1].ignored) == (1, 3)


def test_bad_samples_are_rows(tmp_path: Path) -> None:
    half = picture(5, "jpg", (200, 200))[:300]
    files = [
        ("damaged.jpg", half), ("empty.jpg", b""), ("html.jpg", b"<!doctype html><html></html>"),
        ("bomb.png", png_bomb(30_000)), ("large.jpg", b"\xff\xd8\xff" + bytes(70_000)), ("large.txt", b"seventy"),
        ("alone.txt", b"no image"), ("broken.jpg", picture(1, "jpg")), ("broken.json", b"{"),
        ("list.jpg", picture(2, "jpg")), ("list.json", b"[1]"), ("deep.jpg", picture(3, "jpg")),
        ("deep.json", b"[" * 60_000), ("latin.jpg", picture(4, "jpg")), ("latin.txt", b"caf\xe9"),
        ("half.jpg", picture(6, "jpg")), ("half.json", b'{"caption": "\\ud83d"}'), ("last.jpg", picture(7, "jpg")),
    ]  # fmt: skip
    config = DownloadConfig(resize_mode="no", max_bytes=65_536)
    found = rows(read(write_tar(tmp_path / "x.tar", files), config))
    assert {r["url"].rpartition("#")[2]: (r["status"], r["retryable"]) for r in found} == {
        "damaged.jpg": ("decode", False), "empty.jpg": ("empty_body", False), "html.jpg": ("not_an_image", False),
        "bomb.png": ("too_many_pixels", False), "large.jpg": ("too_large", False),
        "alone.txt": ("bad_record", False), "broken.jpg": ("bad_record", False), "list.jpg": ("bad_record", False),
        "deep.jpg": ("bad_record", False), "latin.jpg": ("bad_caption", False), "half.jpg": ("bad_caption", False),
        "last.jpg": ("ok", False),
    }  # fmt: skip
    captions = {r["url"].rpartition("#")[2]: r["caption"] for r in found}
    assert (captions["alone.txt"], captions["large.jpg"], captions["latin.jpg"]) == ("no image", "seventy", "caf\ufffd")
    unreadable = {r["status"] for r in found if r["problem"]}
    assert unreadable == {"bad_record", "bad_caption"}
    assert all(r["problem"] is None or r["problem"].startswith(f"{r['status']}: ") for r in found)


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    files = [("a.jpg", picture(1, "jpg")), ("a.json", b'{"x": NaN, "y": [1e999, {"z": -1e999}], "w": 2}')]
    (row,) = rows(read(write_tar(tmp_path / "x.tar", files)))
    assert json.loads(row["extra"]) == {"x": None, "y": [None, {"z": None}], "w": 2}


def test_known_samples_are_not_decoded(tmp_path: Path) -> None:
    """The known ones are damaged: decoded, they would be rows."""
    files = [(f"{n}.jpg", picture(n, "jpg") if n % 2 else b"\xff\xd8\xff damaged") for n in range(20)]
    tar = write_tar(tmp_path / "x.tar", files)
    damaged = [pair_key(f"{tar.as_uri()}#{n}.jpg", "") for n in range(0, 20, 2)]
    batches = read(tar, known=lambda keys: np.isin(keys, damaged))
    assert [number_of(r["image"]) for r in rows(batches)] == list(range(1, 20, 2))
    assert sum(b.known for b in batches) == 10


def test_batches_are_bounded(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [(f"{n}.jpg", picture(n, "jpg")) for n in range(23)])
    batches = read(tar, DownloadConfig(resize_mode="no", shard_size=5))
    assert [b.images.num_rows for b in batches] == [5, 5, 5, 5, 3]
    assert [number_of(r["image"]) for r in rows(batches)] == list(range(23))
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as big:
        for n in range(12):
            body = webdataset.writer.imageencoder(np.roll(noise, n, 0) / 255.0, "PNG")
            header = tarfile.TarInfo(f"{n}.png")
            header.size = len(body)
            big.addfile(header, io.BytesIO(body))
    (tmp_path / "big.tar").write_bytes(out.getvalue())
    assert len(body) > 1 << 18
    sizes = [b.images.num_rows for b in read(tmp_path / "big.tar", DownloadConfig(resize_mode="no", memory=1 << 20))]
    assert sum(sizes) == 12 and max(sizes) <= 4, "a megabyte is at most four of these"


def test_memory_does_not_grow_with_the_tar(tmp_path: Path) -> None:
    """What Python holds at most while 64 and 128 samples of a megabyte go by; known ones, so that it is quick."""

    def peak(samples: int) -> int:
        tar = write_tar(tmp_path / f"{samples}.tar", [(f"{n}.jpg", bytes(1 << 20)) for n in range(samples)])
        tracemalloc.start()
        read(tar, known=lambda keys: np.ones(len(keys), np.bool_))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        tar.unlink()
        return most

    assert abs(peak(128) - peak(64)) < 2 << 20


def test_with_the_config_of_a_download(tmp_path: Path) -> None:
    """Resizing, format and caption filters of the config, as for fetched images."""
    files = [
        ("a.png", picture(1, "png", (100, 50))), ("a.txt", b"long enough"),
        ("b.png", picture(2, "png", (100, 50))), ("b.txt", b"no"),
    ]  # fmt: skip
    config = DownloadConfig(image_size=20, format="webp", min_caption_length=5)
    stage = ArchiveStage(config, "run-1")
    tar = write_tar(tmp_path / "x.tar", files)
    found = rows(list(stage(Archive(str(tar), "tar"), nothing_known)))
    assert [(r["status"], r["format"], r["width"], r["height"], r["original_width"]) for r in found] == [
        ("ok", "webp", 40, 20, 100), ("caption_filtered", None, None, None, None),
    ]  # fmt: skip


# -- img2dataset's metadata ----------------------------------------------------------------------------

META = {"key": "0", "url": "http://a/0", "caption": "c", "status": "success", "error_message": None}


def metadata(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([META | row for row in rows])


def test_metadata_beside_a_tar(tmp_path: Path) -> None:
    digest = "ab" * 32
    write_tar(tmp_path / "00000.tar", [("0.jpg", picture(1, "jpg")), ("0.txt", b"c\n")])
    table = metadata(
        {"sha256": digest, "original_width": 640, "original_height": 480, "score": 1.5},
        {"key": "1", "url": "http://a/1", "status": "failed_to_download", "error_message": "HTTP Error 503: x"},
        {"key": "2", "url": "http://a/2", "caption": None},
        {"key": "3", "url": "http://a/0", "status": "failed_to_download", "error_message": "timed out"},
    )
    pq.write_table(table, tmp_path / "00000.parquet")
    batches = read(tmp_path)
    found = {r["url"]: r for r in rows(batches)}
    assert {url: (r["status"], r["http_status"], r["retryable"]) for url, r in found.items()} == {
        "http://a/0": ("ok", None, False), "http://a/1": ("http_5xx", 503, True),
        "http://a/2": ("bad_record", None, False),
    }  # fmt: skip
    ok = found["http://a/0"]
    assert (ok["sha256"], ok["original_width"], ok["original_height"], ok["width"]) == (digest, 640, 480, 24)
    assert (ok["caption"], json.loads(ok["extra"])) == ("c", {"score": 1.5})
    assert found["http://a/1"]["attempts"] == 1 and found["http://a/1"]["problem"] is None
    assert batches[-1].doubles == 1, "listed twice, and the image came first"

    known = {r["pair_key"] for r in found.values()}
    (tmp_path / "00000.tar").write_bytes(b"not read at all")
    (again,) = read(tmp_path, known=lambda keys: np.array([k in known for k in keys.tolist()]))
    assert (again.images.num_rows, again.known + again.doubles) == (0, 4)


def test_a_cut_tar_says_nothing_of_what_follows(tmp_path: Path) -> None:
    """Cut inside the third picture. The second is whole, but its text may have followed."""
    data = tar_of([(f"{n}.jpg", picture(n, "jpg")) for n in range(4)])
    small = {"key": "9", "url": "http://a/9", "status": "failed_to_resize", "error_message": "image too small"}
    table = metadata(*({"key": str(n), "url": f"http://a/{n}"} for n in range(4)), small)
    pq.write_table(table, tmp_path / "0.parquet")
    assert 512 < len(picture(1, "jpg")) <= 1024
    (tmp_path / "0.tar").write_bytes(data[: 2 * (512 + 1024) + 700])
    stage = ArchiveStage(DownloadConfig(resize_mode="no"), "run-1", as_is=True)
    found: list[Batch] = []
    with pytest.raises(BrokenArchive, match="cut off"):
        for batch in stage(find_archives([str(tmp_path / "0.tar")])[0], nothing_known):
            found.append(batch)
    assert {r["url"]: r["status"] for r in rows(found)} == {"http://a/0": "ok", "http://a/9": "too_small"}


def test_parquet_with_images_and_files(tmp_path: Path) -> None:
    table = metadata(
        {"key": "0", "status": "failed_to_download", "error_message": "timed out"},
        {"key": "1", "url": "http://a/1", "txt": "text's", "caption": "text's"},
        {"key": "2"},
    )
    images = pa.array([None, picture(1, "jpg"), picture(2, "jpg")], pa.binary())
    (tmp_path / "parquet").mkdir()
    pq.write_table(table.append_column("jpg", images), tmp_path / "parquet" / "0.parquet")
    found = rows(read(tmp_path / "parquet"))
    assert [(r["url"], r["status"], number_of(r["image"])) for r in found] == [
        ("http://a/1", "ok", 1), ("http://a/0", "ok", 2),
    ], "a failure of the same pair comes after its image"  # fmt: skip

    folder = tmp_path / "files" / "00000"
    folder.mkdir(parents=True)
    for n in (1, 2):
        (folder / f"{n}.jpg").write_bytes(picture(n, "jpg"))
        (folder / f"{n}.json").write_text(json.dumps(table.to_pylist()[n]))
    (folder / "0000_stats.json").write_text("{}")
    (folder / "9.jpg").symlink_to("/etc/passwd")
    pq.write_table(table, tmp_path / "files" / "00000.parquet")
    batches = read(tmp_path / "files")
    assert [(r["url"], r["status"]) for r in rows(batches)] == [("http://a/1", "ok"), ("http://a/0", "ok")]
    assert (batches[-1].ignored, batches[-1].doubles) == (1, 1)


def test_metadata_without_its_images(tmp_path: Path) -> None:
    failed = {"key": "1", "url": "http://a/1", "status": "failed_to_download", "error_message": "x"}
    pq.write_table(metadata(failed), tmp_path / "all-failed.parquet")
    assert [r["status"] for r in rows(read(tmp_path / "all-failed.parquet"))] == ["connect"]
    pq.write_table(metadata(failed, {}), tmp_path / "lost.parquet")
    with pytest.raises(BrokenArchive, match="its images are missing"):
        read(tmp_path / "lost.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(BrokenArchive, match="neither a column of images"):
        read(tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "lost.parquet").read_bytes()[:-9])
    with pytest.raises(BrokenArchive, match="cannot be read"):
        read(tmp_path / "cut.parquet")


@pytest.mark.parametrize(
    ("status", "message", "reason", "code"),
    [
        ("failed_to_download", "HTTP Error 404: Not Found", Reason.HTTP_4XX, 404),
        ("failed_to_download", "HTTP Error 408: Request Timeout", Reason.TIMEOUT, 408),
        ("failed_to_download", "HTTP Error 429: Too Many Requests", Reason.HTTP_429, 429),
        ("failed_to_download", "HTTP Error 502: Bad Gateway", Reason.HTTP_5XX, 502),
        ("failed_to_download", "HTTP Error 302: ... to an infinite loop.\nX", Reason.TOO_MANY_REDIRECTS, None),
        ("failed_to_download", "<urlopen error [Errno -2] Name or service not known>", Reason.DNS, None),
        ("failed_to_download", "<urlopen error [Errno -3] Temporary failure in name resolution>", Reason.DNS, None),
        ("failed_to_download", "<urlopen error timed out>", Reason.TIMEOUT, None),
        ("failed_to_download", "The read operation timed out", Reason.TIMEOUT, None),
        ("failed_to_download", "<urlopen error [Errno 110] Connection timed out>", Reason.TIMEOUT, None),
        ("failed_to_download", "<urlopen error [Errno 111] Connection refused>", Reason.CONNECT, None),
        ("failed_to_download", "<urlopen error [Errno 113] No route to host>", Reason.CONNECT, None),
        ("failed_to_download", "[Errno 104] Connection reset by peer", Reason.RESET, None),
        ("failed_to_download", "Remote end closed connection without response", Reason.RESET, None),
        ("failed_to_download", "IncompleteRead(83 bytes read, 100 more expected)", Reason.TRUNCATED, None),
        (
            "failed_to_download",
            "<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: Hostname mismatch>",
            Reason.TLS,
            None,
        ),
        ("failed_to_download", "Use of image disallowed by X-Robots-Tag directive", Reason.OPTED_OUT, None),
        ("failed_to_download", "unknown url type: 'foo'", Reason.BAD_URL, None),
        ("failed_to_download", "<urlopen error unknown url type: ftpx>", Reason.SCHEME_REFUSED, None),
        ("failed_to_download", "URL can't contain control characters. '/a b'", Reason.BAD_URL, None),
        ("failed_to_download", "something new", Reason.CONNECT, None),
        ("failed_to_resize", "Image decoding error", Reason.DECODE, None),
        ("failed_to_resize", "image too small", Reason.TOO_SMALL, None),
        ("failed_to_resize", "image area too large", Reason.TOO_MANY_PIXELS, None),
        ("failed_to_resize", "aspect ratio too large", Reason.ASPECT_RATIO, None),
        ("failed_to_resize", "something new", Reason.DECODE, None),
        ("failed_to_download", "http_429: slow down", Reason.HTTP_429, None),
        ("failed_to_resize", "not_an_image", Reason.NOT_AN_IMAGE, None),
        ("failed_to_download", "ok: but failed", Reason.CONNECT, None),
    ],
)  # fmt: skip
def test_what_img2dataset_says(status: str, message: str, reason: Reason, code: int | None) -> None:
    assert reason_of(status, message) == (reason, code)


# -- finding -------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    for name in ("a/00000.tar", "a/00000.parquet", "a/00000_stats.json", "b/00001/1.jpg", "b/00001.parquet", "b/x.csv",
                 "c/only.parquet", "d/x.tar.gz", "d/y.tgz", "d/.hidden.tar", "d/.git/z.tar", "d/__MACOSX/m.tar",
                 "e/deep/er/1.PNG"):  # fmt: skip
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    (tmp_path / "e" / "round").symlink_to(tmp_path)
    yield tmp_path


def test_finding(tree: Path) -> None:
    whole = [
        Archive(f"{tree}/a/00000.tar", "tar", f"{tree}/a/00000.parquet"),
        Archive(f"{tree}/b/00001", "files", f"{tree}/b/00001.parquet"),
        Archive(f"{tree}/c/only.parquet", "parquet"),
        Archive(f"{tree}/d/x.tar.gz", "tar"),
        Archive(f"{tree}/d/y.tgz", "tar"),
        Archive(f"{tree}/e/deep/er", "files"),
    ]
    assert find_archives([str(tree)]) == whole
    assert find_archives([f"{tree}/[a-d]", f"{tree}/e/deep", f"{tree}/a/*"]) == whole
    for single in ("a/00000.tar", "a/00000.parquet"):
        assert find_archives([str(tree / single)]) == whole[:1]
    for nothing in ("b/x.csv", "nowhere", "*.tar"):
        with pytest.raises(UsageError, match="no archive found"):
            find_archives([str(tree / nothing)])


def test_object_stores(tmp_path: Path) -> None:
    """fsspec's memory file system stands for one."""
    from upath import UPath

    folder = UPath("memory://bucket/data")
    (folder / "0.tar").write_bytes(tar_of([("x.jpg", picture(3, "jpg"))]))
    (folder / ".tmp" / "1.tar").write_bytes(b"")
    assert find_archives(["memory://bucket/data"]) == find_archives(["memory://bucket/data/*.tar"])
    (archive,) = find_archives(["memory://bucket/data/0.tar"])
    stage = ArchiveStage(DownloadConfig(resize_mode="no"), "run-1", as_is=True)
    (row,) = rows(list(stage(archive, nothing_known)))
    assert (row["url"], number_of(row["image"])) == (f"{archive.path}#x.jpg", 3)
    assert archive.path.startswith("memory://")

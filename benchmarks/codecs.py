"""JPEG codecs: OpenCV, Pillow and simplejpeg on decoding, shrinking and encoding; our image stage and img2dataset's.

    python -m benchmarks codecs
    python -m benchmarks codecs -- --pictures 5 --rounds 3

Photo-like JPEGs of 1024 x 768 and 256 x 256 (``lab/corpus.py``), all to 256 px, keep_ratio, quality 95, one thread.
CPU microseconds for one image: each round takes every candidate in turn over all pictures; the median of ``--rounds``
after a warm-up. PSNR is the mean over the pictures, against what img2dataset's Resizer makes at that step.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.lab.corpus import jpeg, photo
from pipeline.download.pictures.images import ImageStage
from schemas.configs import DownloadConfig

Pixels = NDArray[np.uint8]
SIZES = ((1024, 768), (256, 256))
SMALL = (341, 256)
"""What 1024 x 768 becomes."""


@dataclass(frozen=True)
class Candidate:
    """One way of doing a step, on the picture of a number; ``seen`` shows the result as pixels."""

    name: str
    work: Callable[[int], Any]
    seen: Callable[[Any], Pixels] | None = None


@dataclass(frozen=True)
class Result:
    """CPU microseconds for one image, PSNR in dB (None: not asked), bytes of one result."""

    name: str
    micros: float
    psnr: float | None
    bytes: float


def measure(candidates: Sequence[Candidate], pictures: int, rounds: int) -> list[Result]:
    """All candidates, in turn, ``rounds`` times. The first one is what the others are compared with.

    Raises:
        AssertionError: a candidate's pixels are far from those of the first one.
    """
    taken: dict[str, list[float]] = {c.name: [] for c in candidates}
    truth = candidates[0]
    psnrs: dict[str, list[float]] = {c.name: [] for c in candidates if c.seen and c is not truth}
    size: dict[str, float] = {}
    for candidate in candidates:  # warms up, and checks
        outputs = [candidate.work(i) for i in range(pictures)]
        size[candidate.name] = statistics.mean(len(o) if isinstance(o, bytes) else o.nbytes for o in outputs)
        if candidate.name in psnrs and candidate.seen and truth.seen:
            psnrs[candidate.name] = [psnr(candidate.seen(o), truth.seen(truth.work(i))) for i, o in enumerate(outputs)]
            assert min(psnrs[candidate.name]) > 25, candidate.name
    for _ in range(rounds):
        for candidate in candidates:
            start = time.process_time()
            for i in range(pictures):
                candidate.work(i)
            taken[candidate.name].append((time.process_time() - start) / pictures * 1e6)
    return [
        Result(n, statistics.median(t), statistics.mean(psnrs[n]) if psnrs.get(n) else None, size[n])
        for n, t in taken.items()
    ]


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal to noise, dB; 99 for equal ones.

    Raises:
        AssertionError: the sizes differ.
    """
    assert a.shape == b.shape, (a.shape, b.shape)
    error = float(np.square(a.astype(np.float64) - b).mean())
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def decoders(files: list[bytes]) -> list[Candidate]:
    """Whole, and at a half, a quarter, an eighth, as far as a codec offers it; 3/8 where only simplejpeg does."""
    arrays = [np.frombuffer(f, np.uint8) for f in files]
    width, height = Image.open(io.BytesIO(files[0])).size

    def opencv(flag: int) -> Callable[[int], Pixels]:
        return lambda i: np.asarray(cv2.imdecode(arrays[i], flag), np.uint8)

    def pillow(divisor: int) -> Callable[[int], Pixels]:
        def decode(i: int) -> Pixels:
            with Image.open(io.BytesIO(files[i])) as image:
                image.draft("RGB", (width // divisor, height // divisor))
                return np.asarray(image)

        return decode

    def turbo(eighths: int, colours: str = "RGB", **fast: bool) -> Callable[[int], Pixels]:
        least = {"min_height": -(-height * eighths // 8), "min_width": -(-width * eighths // 8)}
        return lambda i: np.asarray(simplejpeg.decode_jpeg(files[i], colours, **least, **fast))

    whole = Candidate("OpenCV, as img2dataset", opencv(cv2.IMREAD_UNCHANGED))
    reduced = [Candidate(f"OpenCV 1/{d}", opencv(getattr(cv2, f"IMREAD_REDUCED_COLOR_{d}"))) for d in (2, 4, 8)]
    drafts = [Candidate(f"Pillow {f'draft 1/{d}' if d > 1 else ''}".strip(), pillow(d)) for d in (1, 2, 4, 8)]
    scaled = [Candidate(f"simplejpeg {n}/8", turbo(n)) for n in (8, 5, 4, 3, 2, 1)]
    fast = Candidate("simplejpeg 8/8, fastdct, fastupsample", turbo(8, fastdct=True, fastupsample=True))
    return [whole, *reduced, *drafts, *scaled, fast, Candidate("simplejpeg 1/8 grey", turbo(1, "GRAY"))]


def shrinkers(files: list[bytes]) -> list[Candidate]:
    """1024 x 768 -> 341 x 256, from pixels that were decoded before."""
    width, height = SIZES[0]

    def candidate(eighths: int, name: str, way: int) -> Candidate:
        least = {"min_height": height * eighths // 8, "min_width": width * eighths // 8}
        decoded = [simplejpeg.decode_jpeg(f, "RGB", **least) for f in files]
        work: Callable[[int], Pixels] = lambda i: np.asarray(cv2.resize(decoded[i], SMALL, interpolation=way))  # noqa: E731
        return Candidate(f"from {eighths}/8, {name}", work, np.asarray)

    return [
        candidate(n, name, way)
        for n in (8, 5, 4, 3)
        for name, way in (("area", cv2.INTER_AREA), ("bilinear", cv2.INTER_LINEAR), ("cubic", cv2.INTER_CUBIC))
    ]


def encoders(files: list[bytes]) -> list[Candidate]:
    """341 x 256 at quality 95."""
    small = [cv2.resize(simplejpeg.decode_jpeg(f, "RGB"), SMALL, interpolation=cv2.INTER_AREA) for f in files]
    bgr = [np.ascontiguousarray(s[:, :, ::-1]) for s in small]
    flags = [cv2.IMWRITE_JPEG_QUALITY, 95]

    def pillow(i: int) -> bytes:
        out = io.BytesIO()
        Image.fromarray(small[i]).save(out, "JPEG", quality=95, subsampling="4:2:0")
        return out.getvalue()

    def turbo(**options: Any) -> Callable[[int], bytes]:
        return lambda i: simplejpeg.encode_jpeg(small[i], 95, "RGB", **{"colorsubsampling": "420"} | options)

    return [
        Candidate("OpenCV", lambda i: cv2.imencode(".jpg", bgr[i], flags)[1].tobytes(), pixels),
        Candidate("Pillow", pillow, pixels),
        Candidate("simplejpeg", turbo(), pixels),
        Candidate("simplejpeg, fastdct", turbo(fastdct=True), pixels),
        Candidate("simplejpeg, 4:4:4", turbo(colorsubsampling="444"), pixels),
    ]


def stages(files: list[bytes]) -> list[Candidate]:
    """From bytes to bytes: img2dataset's Resizer, the same with its sha256, and our stage, with both its hashes."""
    config = DownloadConfig()
    resize = resizer(config)
    keep, again = ImageStage(config), ImageStage(config.model_copy(update={"keep_original": False}))

    def theirs(i: int) -> bytes:
        image, *_, error = resize(io.BytesIO(files[i]))
        assert error is None, error
        return bytes(image)

    def hashed(i: int) -> bytes:
        hashlib.sha256(files[i]).hexdigest()
        return theirs(i)

    return [
        Candidate("img2dataset's Resizer", theirs, pixels),
        Candidate("the same, and sha256", hashed, pixels),
        Candidate("our stage", lambda i: keep(files[i]).image, pixels),
        Candidate("our stage, --no-keep-original", lambda i: again(files[i]).image, pixels),
    ]


def resizer(config: DownloadConfig) -> Any:
    """img2dataset's Resizer, by its file: the package imports all of itself, torch included."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # what it imports would ask the internet
    package = importlib.util.find_spec("img2dataset")
    assert package is not None and package.submodule_search_locations, "img2dataset is not installed"
    spec = importlib.util.spec_from_file_location("resizer", Path(package.submodule_search_locations[0], "resizer.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Resizer(config.image_size, config.resize_mode, not config.upscale, encode_quality=config.quality)


def pixels(data: bytes) -> Pixels:
    """What a reader of the data set sees."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def show(title: str, results: list[Result]) -> None:
    """Times, and how many times faster than the first."""
    table = Table(title, "CPU us", "times as fast", "images / CPU s", "PSNR, dB", "KB", box=None)
    for r in results:
        quality = "" if r.psnr is None else f"{r.psnr:.1f}"
        speed = f"{results[0].micros / r.micros:.2f}"
        table.add_row(r.name, f"{r.micros:.0f}", speed, f"{1e6 / r.micros:.0f}", quality, f"{r.bytes / 1000:.1f}")
    Console(width=110).print(table, "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codecs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args(argv)
    cv2.setNumThreads(1)
    print(
        f"{given.pictures} pictures, medians of {given.rounds}, Python {platform.python_version()}, "
        f"OpenCV {cv2.__version__}, Pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}, {platform.machine()}"
    )
    for width, height in SIZES:
        files = [jpeg(photo(i, width, height)) for i in range(given.pictures)]
        print(f"\n{width} x {height}, {statistics.mean(map(len, files)) / 1000:.0f} KB\n")
        steps = {"decode": decoders, "whole": stages}
        if (width, height) == SIZES[0]:
            steps = {"decode": decoders, "shrink": shrinkers, "encode": encoders, "whole": stages}
        for title, make in steps.items():
            show(title, measure(make(files), given.pictures, given.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())

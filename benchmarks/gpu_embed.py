"""Embedding on one GPU, without Ray and network: the encoder against the bare model, and its share of the peak.

    python -m benchmarks gpu_embed                                        # ViT-L-14 and ViT-B-32, about ten minutes
    python -m benchmarks gpu_embed -- --models ViT-H-14 --seconds 20 --decoders 16
    python -m benchmarks gpu_embed -- --quick                             # small, fp32, on a CPU too: does it run?

Weights are random and images drawn, so nothing is fetched. For each model:

    bare      open_clip's encode_image in bf16 on a batch that lies on the device, a sweep of batch sizes, with
              torch.compile and without; the fastest is the limit that the rest is held against
    uint8     Encoder.encode_stream over uint8 batches on the host: pinned copies, normalising, network, vectors back
    jpeg      the same from JPEG bytes of 256 px, decoded by --decoders processes beside it
    text      Encoder.texts (tokenizing, sorting, cutting) over captions as long as people's, against encode_text in
              bf16 at full length on tokens that lie on the device

*Model FLOP utilisation* is FLOPs of the images / seconds / the device's peak: two for each multiplication and addition
of the matrices (counted from the model's config: patches, projections, attention, MLP), none for what is computed again
or thrown away. The peaks are the makers' dense bf16 figures; name another with --peak.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from benchmarks.lab.captions import captions
from benchmarks.lab.corpus import draw
from benchmarks.lab.report import Line, Report, machine, table
from pipeline.models.encoder import Encoder
from pipeline.models.pixels import Decoder

PEAKS = {
    "GB200": 2500e12, "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
    "H100": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A40": 150e12,
    "A10G": 70e12, "A10": 125e12, "A30": 165e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Part of the device's name -> dense bf16 FLOPs a second (fp32 accumulation). The first that fits is meant."""
BATCHES = (64, 128, 256, 512, 1024)


# ---- counting --------------------------------------------------------------------------------------


def image_flops(config: dict[str, Any]) -> float | None:
    """FLOPs of one image through a vision transformer of open_clip's config; None for other networks.

    T tokens of width W, in each layer: 4 T W^2 for q, k, v and output, 2 T^2 W for attention, 2 r T W^2 for an MLP of
    ratio r; before them P^2 * 3 * W for each patch, after them W D for the projection. Times two.
    """
    vision = config["vision_cfg"]
    if not isinstance(vision.get("layers"), int) or "timm_model_name" in vision:
        return None
    width, patch, size = vision["width"], vision["patch_size"], vision.get("image_size", 224)
    patches = (size // patch) ** 2
    tokens = patches + 1
    layer = (4 + 2 * vision.get("mlp_ratio", 4.0)) * tokens * width**2 + 2 * tokens**2 * width
    return float(2 * (vision["layers"] * layer + patches * 3 * patch**2 * width + width * config["embed_dim"]))


def peak_flops(name: str) -> float | None:
    """The device's peak, None where it is not known."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


# ---- measuring -------------------------------------------------------------------------------------


@dataclass
class Lab:
    """One model on one device, with what has been measured of it."""

    name: str
    cache: Path
    device: torch.device
    peak: float | None
    seconds: float
    batches: Sequence[int]
    compiles: Sequence[bool]
    decoders: int
    raw: list[dict[str, Any]] = field(default_factory=list)

    @property
    def half(self) -> bool:
        return self.device.type == "cuda"

    @property
    def flops(self) -> float | None:
        return image_flops(open_clip.get_model_config(self.name))

    @property
    def checkpoint(self) -> Path:
        """Random weights, made once."""
        file = self.cache / "weights" / f"{self.name}-0.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(0)
            save_file(open_clip.create_model(self.name).state_dict(), file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
        return file

    def bare(self) -> Any:
        """The model in bf16 (fp32 on a CPU), on the device."""
        model = open_clip.create_model(self.name, pretrained=str(self.checkpoint)).eval().requires_grad_(False)
        return model.to(self.device, torch.bfloat16 if self.half else torch.float32)

    def wait(self) -> None:
        if self.half:
            torch.cuda.synchronize()

    def note(self, what: str, rate: float, **more: Any) -> float:
        self.raw.append({"model": self.name, "what": what, "rate": rate, "mfu": self.mfu(rate)} | more)
        told = ", ".join(f"{k} {v}" for k, v in more.items())
        print(f"    {self.name:<10} {what:<8} {self.shown(rate):<28} {told}", flush=True)
        return rate

    def mfu(self, rate: float) -> float | None:
        return None if self.flops is None or self.peak is None else rate * self.flops / self.peak

    def shown(self, rate: float) -> str:
        mfu = self.mfu(rate)
        return f"{rate:,.1f} images/s" + ("" if mfu is None else f", MFU {100 * mfu:.1f}%")


def repeated(lab: Lab, step: Callable[[], Any], items: int) -> float:
    """Items a second of ``step``, after two for warming up."""
    for _ in range(2):
        step()
    lab.wait()
    start, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < lab.seconds:
        for _ in range(4 if lab.half else 1):  # so that the queue of the device does not run dry between looks
            step()
            steps += 1
        lab.wait()
    return items * steps / elapsed


@torch.inference_mode()
def bare(lab: Lab) -> float:
    """The fastest of the sweep, images a second."""
    model, best = lab.bare(), 0.0
    size = open_clip.get_model_config(lab.name)["vision_cfg"].get("image_size", 224)
    for compiled in lab.compiles:
        forward = torch.compile(model.encode_image, dynamic=False) if compiled else model.encode_image
        for batch in lab.batches:
            pixels = torch.randn(batch, 3, size, size, device=lab.device, dtype=model.logit_scale.dtype)
            pixels = pixels.contiguous(memory_format=torch.channels_last) if lab.half else pixels
            try:
                rate = repeated(lab, lambda f=forward, p=pixels: f(p), batch)  # type: ignore[misc]
            except torch.OutOfMemoryError:
                print(f"    {lab.name:<10} bare: no memory for batches of {batch}", flush=True)
                break
            best = max(best, lab.note("bare", rate, batch=batch, compiled=compiled))
    return best


def streamed(lab: Lab, encoder: Encoder, batches: Iterator[NDArray[np.uint8]]) -> float:
    """Images a second of ``encode_stream`` over ``batches``, for about ``lab.seconds``, after the first three."""
    stream = encoder.encode_stream(timed(batches, lab.seconds))
    for _ in range(3):
        next(stream)
    start = time.perf_counter()
    count = sum(len(vectors) for vectors in stream)
    return count / (time.perf_counter() - start)


def timed(batches: Iterator[NDArray[np.uint8]], seconds: float) -> Iterator[NDArray[np.uint8]]:
    """Batches until the time is over, four at least before it begins."""
    yield from itertools.islice(batches, 4)
    end = time.perf_counter() + seconds
    for batch in batches:
        yield batch
        if time.perf_counter() > end:
            return


def uint8(lab: Lab, encoder: Encoder, batch: int) -> float:
    """From pixels on the host: other memory every time, as decoders hand it over."""
    size = encoder.card.image_size
    rng = np.random.default_rng(0)
    some = [rng.integers(0, 256, (batch, 3, size, size), dtype=np.uint8) for _ in range(8)]
    return streamed(lab, encoder, itertools.cycle(some))


class Jpegs(Dataset[Any]):
    """Pictures without end, decoded where they are asked for."""

    def __init__(self, files: list[bytes], decoder: Decoder) -> None:
        self.files, self.decoder = files, decoder

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, number: int) -> NDArray[np.uint8]:
        return self.decoder(self.files[number % len(self.files)])


def stacked(images: list[NDArray[np.uint8]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images))


def jpeg(lab: Lab, encoder: Encoder, batch: int, pictures: Path) -> float:
    """From JPEG bytes, with processes that decode."""
    files = [file.read_bytes() for file in sorted(pictures.glob("*.jpg"))]
    loader = DataLoader(
        Jpegs(files, encoder.decoder), batch, sampler=itertools.count(), num_workers=lab.decoders, collate_fn=stacked,
        prefetch_factor=4, multiprocessing_context="forkserver",
    )  # fmt: skip
    return streamed(lab, encoder, (pixels.numpy() for pixels in loader))


@torch.inference_mode()
def text(lab: Lab, encoder: Encoder, count: int) -> list[Line]:
    """Captions through the encoder's text path, and at full length through the bare model."""
    texts = captions(count)
    encoder.texts(texts[: count // 4])
    start = time.perf_counter()
    encoder.texts(texts)
    ours = count / (time.perf_counter() - start)
    model, batch = lab.bare(), min(256, count)
    tokens = open_clip.get_tokenizer(lab.name)(texts[:batch]).to(lab.device)
    full = repeated(lab, lambda: model.encode_text(tokens), batch)
    lab.raw.append({"model": lab.name, "what": "text", "rate": ours, "full": full, "captions": count})
    what = f"{lab.name}: text path / bare encode_text at full length"
    return [Line(what, f"{ours:,.0f} texts/s", f"{full:,.0f} texts/s", ours / full, 3.0 if lab.half else None)]


def measured(lab: Lab, pictures: Path, texts: int) -> list[Line]:
    """All of one model."""
    limit = bare(lab)
    lines = [Line(f"{lab.name}: bare forward, the fastest of the sweep", "", lab.shown(limit))]
    goal = 0.9 if lab.half and lab.name == "ViT-L-14" else None
    for compiled in lab.compiles:
        encoder = Encoder(f"{lab.name}:{lab.checkpoint}", compile="on" if compiled else "off")
        batch = encoder.batch_size(0)
        how = f"batches of {batch}, {'compiled' if compiled else 'eager'}"
        sides = {"uint8 on the host": lambda e=encoder, b=batch: uint8(lab, e, b)}  # type: ignore[misc]
        sides[f"JPEG, {lab.decoders} decoding processes"] = lambda e=encoder, b=batch: jpeg(lab, e, b, pictures)  # type: ignore[misc]
        for what, side in sides.items():
            rate = lab.note(what.partition(" ")[0].strip(","), side(), batch=batch, compiled=compiled)
            line = f"{lab.name}: encoder from {what} / bare ({how})"
            lines.append(Line(line, lab.shown(rate), lab.shown(limit), rate / limit, goal))
        if compiled == lab.compiles[-1]:
            lines += text(lab, encoder, texts)
        del encoder
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_embed", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--models", nargs="+", default=["ViT-L-14", "ViT-B-32"])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--decoders", type=int, default=os.cpu_count() or 1, help="decoding processes")
    parser.add_argument("--compile", choices=("both", "off"), default="both")
    parser.add_argument("--peak", type=float, help="of the device in TFLOPs a second, dense bf16")
    parser.add_argument("--quick", action="store_true", help="ViT-B-32, small batches, a second each, not compiled")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "clipmill-benchmarks"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(argv)
    if given.quick:
        given.models, given.seconds, given.decoders, given.compile = ["ViT-B-32"], 1.0, 1, "off"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.quick:
        print("no GPU here; --quick runs on a CPU, to see that it runs")
        return 0
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = given.peak * 1e12 if given.peak else peak_flops(name)
    setting = machine(("torch", "open-clip-torch")) | {
        "device": name, "peak": "unknown" if peak is None else f"{peak / 1e12:.0f} TFLOPs/s",
        "CUDA": str(torch.version.cuda),
    }  # fmt: skip
    report = Report(given.results, "gpu_embed-quick" if given.quick else "gpu_embed", "Embedding on one GPU")
    pictures = draw(given.cache / "pictures", 40 if given.quick else 500, 256, 256)
    for model in given.models:
        lab = Lab(
            model, given.cache, device, peak, given.seconds, (4, 8) if given.quick else BATCHES,
            (False, True) if given.compile == "both" else (False,), given.decoders,
        )  # fmt: skip
        lines = measured(lab, pictures, 64 if given.quick else 20_000)
        report.add(model, setting, lines, lab.raw)
        print("\n".join(table(lines)), flush=True)
    print(f"\nwritten: {report.markdown}, {report.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

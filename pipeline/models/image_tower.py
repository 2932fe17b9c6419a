"""CLIP's image tower: uint8 pixels to the device, normalised there, and through the network."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.models.devices import Place, Room, fastest_batch
from schemas.cards import EncoderCard
from schemas.errors import ClipmillError

_CPU_BATCH = 32
_GPU_BATCHES = (32, 64, 128, 256, 512, 1024)


class ImageTower:
    """Pixels -> unit-norm vectors. Batches that do not fit into the device's memory are halved from then on."""

    def __init__(self, model: nn.Module, card: EncoderCard, place: Place, *, compiled: Compiled | None = None) -> None:
        self._model: Any = model
        self._place, self._compiled = place, compiled
        self._mean, self._std = (torch.tensor(v, device=place.device).view(1, 3, 1, 1) for v in (card.mean, card.std))
        self._shape = (3, card.image_size, card.image_size)
        self.dim = card.dim
        self.room = Room("images")
        self._fastest = 0

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 pixels, or preprocessed floats, [B, 3, S, S] -> unit-norm float32 [B, D] on the device."""
        if len(pixels) == 0:
            return torch.empty(0, self.dim, device=self._place.device)
        return self.room.run(self._forward, pixels)

    def stream(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
        """Batches of uint8 [B, 3, S, S] -> unit-norm float32 [B, D] each, in order.

        On a GPU the next batch is drawn and copied while one is computed.
        """
        if self._place.device.type != "cuda":
            for batch in batches:
                yield self(as_tensor(batch)).numpy()
            return
        copies = torch.cuda.Stream()
        under_way: tuple[Tensor, torch.cuda.Event] | None = None
        for batch in batches:
            queued = self._queue(batch, copies)
            if under_way is not None:
                yield _arrived(*under_way)
            under_way = queued
        if under_way is not None:
            yield _arrived(*under_way)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32, as torchvision's ToTensor and Normalize do it. Floats stay as they are."""
        if pixels.dtype != torch.uint8:
            return pixels
        return pixels.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)

    def batch_size(self, asked: int) -> int:
        """``asked`` unless 0. Else on a CPU a small batch, on a GPU what a short trial finds fastest."""
        if asked > 0:
            return asked
        if self._place.device.type == "cpu":
            return _CPU_BATCH
        if not self._fastest:
            self._fastest = fastest_batch(self._trial, _GPU_BATCHES)
        return self._fastest

    @torch.inference_mode()
    def _trial(self, n: int) -> Tensor:
        """Raises torch.OutOfMemoryError, unlike a call. Not compiled, since every size would be compiled anew."""
        with self._place.autocast():
            pixels = torch.zeros(n, *self._shape, dtype=torch.uint8, device=self._place.device)
            return self._model.encode_image(self.normalise(pixels)).cpu()

    def _forward(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self._place.device, non_blocking=True)
        if self._place.device.type == "cuda":
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.normalise(x)
        with self._place.autocast():
            if self._compiled is not None:
                vectors = self._compiled(x, self.room.largest)
            else:
                vectors = self._model.encode_image(x)
        return F.normalize(vectors.float(), dim=-1)

    @torch.inference_mode()
    def _queue(self, batch: NDArray[np.uint8], copies: torch.cuda.Stream) -> tuple[Tensor, torch.cuda.Event]:
        """Copy a batch while the one before is computed; queue its forward pass, and the copy of its vectors."""
        pinned = as_tensor(batch).pin_memory()
        with torch.cuda.stream(copies):
            pixels = pinned.to(self._place.device, non_blocking=True)
        computing = torch.cuda.current_stream()
        computing.wait_stream(copies)
        pixels.record_stream(computing)
        vectors = self(pixels)
        here = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        here.copy_(vectors, non_blocking=True)
        done = torch.cuda.Event()
        done.record(computing)
        return here, done


class Compiled:
    """``model.encode_image`` through torch.compile, always with the same number of rows: another is compiled anew.

    Where it cannot be compiled (no compiler on the machine, an operation without a kernel), ``required`` decides
    whether that is an error or the uncompiled one is used, with a warning.
    """

    def __init__(self, model: Any, *, required: bool, backend: Any = "inductor") -> None:
        self._eager = model.encode_image
        self._forward: Any = torch.compile(self._eager, dynamic=False, backend=backend)
        self._required, self._proved, self._rows = required, False, 0

    def __call__(self, x: Tensor, most: int) -> Tensor:
        """x [B, 3, S, S] -> [B, D]; smaller batches than before are filled up, but not above ``most`` rows.

        Raises:
            ClipmillError: it is required, and cannot be compiled.
        """
        self._rows = min(max(self._rows, len(x)), most)
        filling = x[-1:].expand(self._rows - len(x), -1, -1, -1)
        full = torch.cat([x, filling]) if len(filling) else x
        try:
            vectors = self._forward(full)
        except torch.OutOfMemoryError:
            raise
        except Exception as exc:  # dynamo, inductor and the compilers behind it have no error in common
            if self._proved or self._forward is self._eager:
                raise
            problem = " ".join(str(exc).split())[:300] or type(exc).__name__
            if self._required:
                raise ClipmillError("torch.compile fails", actual=problem, remedy="--compile off") from exc
            warnings.warn(f"torch.compile fails, the model runs without it: {problem}", stacklevel=2)
            self._forward = self._eager
            vectors = self._eager(full)
        self._proved = True
        return vectors[: len(x)]


def as_tensor(batch: NDArray[Any] | Tensor) -> Tensor:
    """Without a copy, unless the array is read-only (as Ray's are), which torch does not know."""
    if isinstance(batch, Tensor):
        return batch
    return torch.from_numpy(batch if batch.flags.writeable else batch.copy())


def _arrived(vectors: Tensor, done: torch.cuda.Event) -> NDArray[np.float32]:
    done.synchronize()
    return vectors.numpy()

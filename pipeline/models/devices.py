"""Where and in which type a network runs, and how much of it at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from schemas.errors import ClipmillError, UsageError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """auto: float32 on CPU (its bfloat16 may be emulated), bfloat16 or float16 on GPU. int8: CPU only.

    Raises:
        UsageError: half precision asked for on a CPU, or int8 on a GPU.
    """
    if device.type == "cpu":
        if precision in ("float16", "bfloat16"):
            raise UsageError(f"--precision {precision} needs a GPU", remedy="use auto or float32")
        return torch.int8 if precision == "int8" else torch.float32
    if precision == "int8":
        raise UsageError("--precision int8 is for CPUs", remedy="use auto: half precision is faster on a GPU")
    if precision == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return DTYPES[precision]


@dataclass(frozen=True)
class Place:
    """A device and the type that is computed in."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        half = self.dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(self.device.type, dtype=self.dtype if half else None, enabled=half)


class Room:
    """How much goes through a network at once: halved where it does not fit into memory, and kept at that."""

    def __init__(self, what: str) -> None:
        self.what, self.largest = what, sys.maxsize

    def run(self, forward: Callable[[Tensor], Tensor], rows: Tensor, cost: int = 1) -> Tensor:
        """``forward`` over ``rows`` [N, ...], in as many pieces as memory needs; a row takes ``cost`` of the room.

        Raises:
            ClipmillError: a single row does not fit.
        """
        parts: list[Tensor] = []
        done = 0
        while done < len(rows):
            n = max(min(self.largest // cost, len(rows) - done), 1)
            part = _unless_full(forward, rows[done : done + n])
            if part is not None:
                parts.append(part)
                done += n
            elif n > 1:
                self.largest = n // 2 * cost
            else:
                raise ClipmillError(
                    f"the device has no memory left for one of the {self.what}",
                    remedy="end what else runs on it, give each worker a larger --gpus-per-worker, or take a smaller "
                    "model",
                )
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _unless_full(forward: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor | None:
    """None if the device ran out of memory."""
    try:
        return forward(rows)
    except torch.OutOfMemoryError:
        pass
    # Not within the handler: until it is left, the exception holds on to the tensors of the failed pass.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def fastest_batch(forward: Callable[[int], Tensor], sizes: Iterable[int]) -> int:
    """The size, of ascending ``sizes``, with the most rows a second; larger ones must gain 3%, and fit.

    ``forward(n)`` runs n rows and waits for them.
    """
    best, rate = 0, 0.0
    for size in sizes:
        try:
            forward(size)  # the first one makes buffers and picks kernels
            start = time.perf_counter()
            forward(size)
            now = size / (time.perf_counter() - start)
        except torch.OutOfMemoryError:
            break
        if best and now < rate * 1.03:
            break
        best, rate = size, now
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return best or 1

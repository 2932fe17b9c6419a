"""The loop: what a task calls its loss, trained with AdamW, kept in checkpoints, resumed at the same batch.

A step is a function of (parameters, optimizer state, seed, step): the rows of a batch, its noise and its times
are drawn anew from (seed, step), so a run that was killed goes on exactly as it would have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from upath import UPath

from pipeline.models.encoder import pick_device, pick_dtype
from pipeline.models.optim import Optimizers, averaged, schedule, step_generator
from pipeline.storage import write_atomic
from schemas.configs import TrainConfig
from schemas.errors import ClipmillError, UsageError
from schemas.keys import digest

CHECKPOINT = "checkpoint.safetensors"
_SHUFFLE = 99
Rows = NDArray[np.int64]
Report = Callable[[dict[str, Any]], None]


class Task(Protocol):
    """What is trained: a module, the number of its samples, and the loss of some of them."""

    module: nn.Module
    size: int

    def loss(self, rows: Rows, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of these samples, and figures for the log. ``generator`` gives all its random numbers."""
        ...


@dataclass(frozen=True)
class Place:
    """This worker among its peers."""

    rank: int = 0
    world: int = 1
    address: str = ""


@dataclass
class Progress:
    """How far a training is, and the lines of its log."""

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Fitted:
    """What training leaves: the module to keep (the averaged one, if any), the log, the samples seen."""

    module: nn.Module
    progress: Progress
    samples: int


def order(size: int, seed: int, epoch: int) -> Rows:
    """The samples of an epoch: a permutation drawn from (seed, epoch)."""
    return np.asarray(torch.randperm(size, generator=step_generator(seed, epoch, _SHUFFLE)).numpy())


def rows_of(step: int, batch: int, size: int, seed: int) -> Rows:
    """The samples of a step: batches run through one epoch's permutation into the next."""
    start, parts = step * batch, []
    while start < (step + 1) * batch:
        epoch, offset = divmod(start, size)
        take = min(size - offset, (step + 1) * batch - start)
        parts.append(order(size, seed, epoch)[offset : offset + take])
        start += take
    return np.concatenate(parts)


def fit(task: Task, config: TrainConfig, folder: UPath, place: Place, report: Report, ema: float = 0.0) -> Fitted:
    """Train to ``config.steps``, from the checkpoint in ``folder`` where there is one.

    Raises:
        UsageError: the checkpoint belongs to another config.
        ClipmillError: the loss is no longer finite.
    """
    device = pick_device()
    if device.type == "cpu":
        torch.set_num_threads(config.threads)
    module = task.module.to(device).train()
    optimizer = Optimizers(module, lr=config.lr, muon_lr=config.muon_lr, weight_decay=config.weight_decay)
    shadow = averaged(module, ema) if ema else None
    state = _State(module, optimizer, shadow, config_digest(config))
    progress = state.load(folder / CHECKPOINT)
    each = config.batch_size // place.world
    dtype = pick_dtype(config.precision, device)
    rows_order = _Order(task.size, config)
    for step in range(progress.step, config.steps):
        mine = rows_order(step)[place.rank * each : (place.rank + 1) * each]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss, figures = task.loss(mine, step_generator(config.seed, step, place.rank), step)
        loss.backward()
        if place.world > 1:
            average_gradients(module, place.world)
        share = schedule(step, steps=config.steps, warmup=config.warmup)
        optimizer.step(share, max_norm=config.clip_grad)
        if shadow is not None:
            shadow.update_parameters(module)
        progress.step = step + 1
        if progress.step % config.log_every == 0 or progress.step == config.steps:
            line = {"step": progress.step, "lr": share * config.lr, "loss": float(loss)}
            line |= {name: float(value) for name, value in figures.items()}
            if not np.isfinite(line["loss"]):
                raise ClipmillError(
                    f"the loss is {line['loss']} at step {progress.step}",
                    remedy="use a lower --lr or a longer --warmup",
                )
            progress.history.append(line)
            report(line)
        if progress.step % config.checkpoint_every == 0 and place.rank == 0:
            state.save(folder / CHECKPOINT, progress)
    final = shadow.module if shadow is not None else module
    return Fitted(final.eval(), progress, config.steps * config.batch_size)


class _Order:
    """rows_of with the epoch's permutation kept."""

    def __init__(self, size: int, config: TrainConfig) -> None:
        if size < 2:
            raise ClipmillError("too few samples to train on", expected="at least 2", actual=str(size))
        self._size, self._config = size, config
        self._epochs: dict[int, Rows] = {}

    def __call__(self, step: int) -> Rows:
        batch = self._config.batch_size
        first, last = step * batch // self._size, ((step + 1) * batch - 1) // self._size
        self._epochs = {
            e: self._epochs[e] if e in self._epochs else order(self._size, self._config.seed, e)
            for e in range(first, last + 1)
        }
        start = step * batch - first * self._size
        return np.concatenate(list(self._epochs.values()))[start : start + batch]


class _State:
    """All that a checkpoint holds, to and from one safetensors file (never pickle)."""

    def __init__(self, module: nn.Module, optimizer: Optimizers, shadow: AveragedModel | None, config: str) -> None:
        self.module, self.optimizer, self.shadow, self.config = module, optimizer, shadow, config

    def save(self, path: UPath, progress: Progress) -> None:
        tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        if self.shadow is not None:
            tensors |= {f"shadow.{k}": v for k, v in self.shadow.state_dict().items()}
        for part, saved in self.optimizer.state_dict().items():
            for i, state in saved["state"].items():
                tensors |= {f"optimizer.{part}.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        about = {"step": str(progress.step), "config": self.config, "history": json.dumps(progress.history)}
        flat = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        write_atomic(path, save_tensors(flat, about))
        lines = "".join(json.dumps(line) + "\n" for line in progress.history)
        write_atomic(path.with_name("metrics.jsonl"), lines.encode())

    def load(self, path: UPath) -> Progress:
        if not path.exists():
            return Progress()
        data = path.read_bytes()
        about = _metadata(data)
        if about.get("config") != self.config:
            raise UsageError(
                f"{path.parent} holds a training with other settings",
                remedy="give it another --name, repeat its settings, or delete that folder",
            )
        tensors = load_tensors(data)
        self.module.load_state_dict(_under(tensors, "module."))
        if self.shadow is not None:
            self.shadow.load_state_dict(_under(tensors, "shadow."))
        saved = self.optimizer.state_dict()
        for name, tensor in _under(tensors, "optimizer.").items():
            part, i, key = name.split(".", 2)
            saved[part]["state"].setdefault(int(i), {})[key] = tensor
        self.optimizer.load_state_dict(saved)
        return Progress(int(about["step"]), json.loads(about["history"]))


def _metadata(data: bytes) -> dict[str, str]:
    """The text beside the tensors: safetensors begins with the length of a JSON header."""
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length]).get("__metadata__", {}))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def config_digest(config: TrainConfig) -> str:
    """Of all settings that change what is learnt: a checkpoint of another digest is not resumed."""
    free = {"workspace", "address", "audit", "checkpoint_every", "log_every", "threads", "gpus_per_worker"}
    return digest(json.dumps(config.model_dump(exclude=free), sort_keys=True, default=str))


def average_gradients(module: nn.Module, world: int) -> None:
    """Replace every gradient by its mean over the workers: one all-reduce over all of them."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    offset = 0
    for g in gradients:
        g.copy_(flat[offset : offset + g.numel()].view_as(g))
        offset += g.numel()


def join_peers(place: Place, gpu: bool) -> None:
    """Make this process one of ``place.world`` workers; leave with :func:`leave_peers`."""
    if place.world > 1:
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            init_method=f"tcp://{place.address}",
            rank=place.rank,
            world_size=place.world,
        )


def leave_peers(place: Place) -> None:
    if place.world > 1:
        dist.destroy_process_group()

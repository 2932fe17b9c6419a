"""What every training step needs: its random numbers, its learning rate, its averaged weights.

A step is a function of (parameters, optimizer state, batch, seed, step), so training is
reproducible and can go on from any step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The random numbers of one step; `stream` tells apart the workers or uses of a step."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1342543DE82EF95 + stream * 0x632BE59BD9B4E019) % 2**63
    return torch.Generator().manual_seed(mixed)


def learning_rate(step: int, *, steps: int, peak: float, warmup: int = 100, final: float = 0.0) -> float:
    """Linear warm-up, then a cosine from `peak` to `final` x peak at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


def schedule(step: int, *, steps: int, warmup: int = 100) -> float:
    """The part of the peak learning rate at a step: linear warm-up, then linear to zero at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return max(steps - step, 0) / max(steps - warmup, 1)


def adamw(
    model: nn.Module | Iterable[Tensor],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.98),
) -> torch.optim.AdamW:
    """AdamW; no decay for vectors and scalars (biases, norms, temperatures)."""
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices to g [K, M, N], by Newton-Schulz iterations.

    Jordan, «Muon: an optimizer for hidden layers in neural networks», 2024; its coefficients.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.transpose(1, 2) if tall else g  # [K, m, n], m <= n
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.transpose(1, 2)  # [K, m, m]
        x = a * x + (b * s + c * s @ s) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan, 2024) in float32: momentum, orthogonalised, for the matrices of hidden layers.

    Matrices of one shape are orthogonalised together. A matrix that stacks several (the projection
    to queries, keys and values) is treated as that many.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                m = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(m, group["momentum"])  # Nesterov
                pieces = (
                    p.shape[0] // p.shape[1]
                    if p.shape[0] % p.shape[1] == 0 and p.shape[0] // p.shape[1] in (3, 6)
                    else 1
                )
                for q, u in zip(p.chunk(pieces), update.chunk(pieces), strict=True):
                    updates.setdefault(u.shape, []).append((q, u))
            for shape, pairs in updates.items():
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (q, _), o in zip(pairs, orthogonalize(torch.stack([u for _, u in pairs])), strict=True):
                    q.mul_(1 - group["lr"] * group["weight_decay"]).add_(o, alpha=-scale)


HIDDEN = re.compile(r"(resblocks|blocks)\.\d+\.(?!modulation)")


class Optimizers:
    """AdamW, and Muon for the matrices of a transformer's blocks if `muon_lr` > 0, stepped as one.

    `step` sets both learning rates to `share` of their peak, clips the gradient's norm and clears it.
    """

    def __init__(self, model: nn.Module, *, lr: float, muon_lr: float, weight_decay: float) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        hidden = [
            p
            for name, p in model.named_parameters()
            if p.requires_grad and muon_lr and p.ndim == 2 and HIDDEN.search(name)
        ]
        chosen = {id(p) for p in hidden}
        rest = [p for p in self.parameters if id(p) not in chosen]
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [(adamw(rest, lr=lr, weight_decay=weight_decay), lr)]
        if hidden:
            self.parts.append((Muon(hidden, lr=muon_lr, weight_decay=weight_decay), muon_lr))

    def step(self, share: float, *, max_norm: float = 1.0) -> None:
        nn.utils.clip_grad_norm_(self.parameters, max_norm)
        for optimizer, peak in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): optimizer.state_dict() for i, (optimizer, _) in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, (optimizer, _) in enumerate(self.parts):
            optimizer.load_state_dict(state[str(i)])


def averaged(model: nn.Module, decay: float = 0.999) -> AveragedModel:
    """A copy of the model that follows it by an exponential moving average."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def parameter_count(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())

"""What can be read from an embedding: a small classifier of attributes, trained on frozen vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ProbeAccuracy:
    per_attribute: tuple[float, ...]
    all_right: float  # rows with every attribute right


def probe_accuracy(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    hidden: int = 256,
    epochs: int = 8,
    seed: int = 0,
) -> ProbeAccuracy:
    """Accuracy of a probe on vectors [N, D] with class numbers [N, A]: fit on `train`, told on `test`.

    The vectors are standardised; the probe is an MLP with one hidden layer and a softmax for each
    attribute (hidden = 0: a linear probe).
    """
    (x, y), (x_test, y_test) = train, test
    mean, std = x.mean(0), x.std(0) + 1e-8
    x, x_test = (x - mean) / std, (x_test - mean) / std
    classes = [int(k) + 1 for k in y.amax(0)]
    devices: list[int] = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Linear(x.shape[1], hidden), nn.GELU()] if hidden else []
        probe = nn.Sequential(*layers, nn.Linear(hidden or x.shape[1], sum(classes)))
    generator = torch.Generator().manual_seed(seed)
    batch = 256
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch)[: len(x) // batch]:
            losses = [F.cross_entropy(logits, y[rows, i]) for i, logits in enumerate(probe(x[rows]).split(classes, 1))]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        guesses = torch.stack([part.argmax(1) for part in probe(x_test).split(classes, 1)], 1)
    right = guesses == y_test  # [N, A]
    return ProbeAccuracy(
        per_attribute=tuple(right.float().mean(0).tolist()),
        all_right=float(right.all(1).float().mean()),
    )

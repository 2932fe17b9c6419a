"""The loop: every sample once an epoch, resumed bit for bit, refused with other settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from upath import UPath

from pipeline.training.loop import CHECKPOINT, Place, _Order, fit, rows_of
from schemas.configs import TrainConfig
from schemas.errors import ClipmillError, UsageError


class Killed(Exception):
    pass


class Regression:
    """y = x A, learnt with noise from the generator; may be killed at a step."""

    def __init__(self, kill_at: int = -1) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        self.x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
        self.y = self.x @ torch.arange(8.0).view(4, 2)
        self.size, self.kill_at = 50, kill_at

    def loss(self, rows: Any, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == self.kill_at:
            raise Killed
        index = torch.from_numpy(rows)
        noise = 0.1 * torch.randn(len(index), 4, generator=generator)
        return (self.module(self.x[index] + noise) - self.y[index]).square().mean(), {"seen": torch.tensor(step)}


def config(**kwargs: Any) -> TrainConfig:
    values = {"steps": 23, "batch_size": 8, "checkpoint_every": 5, "log_every": 1, "warmup": 3, "lr": 0.01}
    return TrainConfig(**(values | kwargs))


def train(folder: Path, task: Regression, settings: TrainConfig, ema: float = 0.9) -> Any:
    return fit(task, settings, UPath(folder), Place(), lambda _: None, ema=ema)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(2, 40), batch=st.integers(1, 60), seed=st.integers(0, 1000))
def test_an_epoch_holds_every_sample_once(size: int, batch: int, seed: int) -> None:
    drawn = np.concatenate([rows_of(s, batch, size, seed) for s in range(3 * size // batch + 2)])
    for epoch in range(3):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 40), batch=st.integers(1, 60))
def test_the_kept_permutations_give_the_same_rows(size: int, batch: int) -> None:
    order = _Order(size, config(batch_size=batch, seed=3))
    for step in range(5):
        np.testing.assert_array_equal(order(step), rows_of(step, batch, size, 3))


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_killed_and_resumed_is_the_same_bit_for_bit(tmp_path: Path, muon_lr: float) -> None:
    settings = config(muon_lr=muon_lr)
    whole = train(tmp_path / "whole", Regression(), settings)
    for kill_at in (7, 13, 21):
        with pytest.raises(Killed):
            train(tmp_path / "broken", Regression(kill_at), settings)
    resumed = train(tmp_path / "broken", Regression(), settings)
    for a, b in zip(whole.module.state_dict().values(), resumed.module.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert whole.progress.history == resumed.progress.history
    assert [line["step"] for line in resumed.progress.history] == list(range(1, 24))


def test_it_learns(tmp_path: Path) -> None:
    history = train(tmp_path, Regression(), config(steps=300, lr=0.03), ema=0.0).progress.history
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]


def test_another_config_does_not_resume(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, Regression(9), config())
    with pytest.raises(UsageError, match="other settings"):
        train(tmp_path, Regression(), config(lr=0.02))


def test_where_it_runs_is_no_setting(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, Regression(9), config())
    assert train(tmp_path, Regression(), config(workspace="elsewhere", log_every=2)).progress.step == 23


def test_checkpoint_is_no_pickle(tmp_path: Path) -> None:
    train(tmp_path, Regression(), config())
    data = (tmp_path / CHECKPOINT).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["step"] == "20"


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    task = Regression()
    task.y = task.y * float("nan")
    with pytest.raises(ClipmillError, match="nan"):
        train(tmp_path, task, config())

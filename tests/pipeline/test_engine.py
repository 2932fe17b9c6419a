"""The engine: real Ray workers which fail, die and refuse."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine import Done, Engine, Quarantined, Rank, Resources
from schemas.errors import ClipmillError, EncoderMismatch

TWO = Resources(workers=2, cpus=0.5)


class Square:
    """n -> (n, n * n, its process); what happens at some numbers is given by name."""

    def __init__(self, folder: str, behaviour: dict[int, str]) -> None:
        self.folder, self.behaviour = Path(folder), behaviour

    def __call__(self, n: int) -> tuple[int, int, int]:
        tries = self.folder / f"{n}-{time.time_ns()}"
        tries.touch()
        what = self.behaviour.get(n, "")
        if what == "raise" or (what == "raise once" and self.tries(n) == 1):
            raise ValueError(f"no {n}\nand a second line")
        if what == "die" or (what == "die once" and self.tries(n) == 1):
            os._exit(1)
        if what == "refuse":
            raise EncoderMismatch("the vectors", expected="A", actual="B")
        return n, n * n, os.getpid()

    def tries(self, n: int) -> int:
        return len(list(self.folder.glob(f"{n}-*")))


def square(folder: Path, behaviour: dict[int, str] | None = None) -> Callable[[], Square]:
    return partial(Square, str(folder), behaviour or {})


def sort(outcomes: Iterator[Done[int, Any] | Quarantined[int]]) -> tuple[dict[int, int], dict[int, str]]:
    """What was done, and what was quarantined; each shard at most once."""
    done: dict[int, int] = {}
    failed: dict[int, str] = {}
    for outcome in outcomes:
        assert outcome.shard not in done and outcome.shard not in failed
        if isinstance(outcome, Quarantined):
            failed[outcome.shard] = outcome.reason
        else:
            assert outcome.result[0] == outcome.shard, "a result that belongs to another shard"
            done[outcome.shard] = outcome.result[1]
    return done, failed


def squares(numbers: Any) -> dict[int, int]:
    return {n: n * n for n in numbers}


def test_no_shards_start_nothing() -> None:
    with Engine("address that is not there") as never_started:
        assert list(never_started.map(lambda: lambda x: x, [])) == []


def test_started_once_and_counted(engine: Engine) -> None:
    engine.start()
    engine.start()
    assert engine.slots(Resources()) == 2
    assert engine.slots(Resources(workers=1)) == 1
    assert engine.slots(Resources(workers=9, cpus=0.5)) == 4
    with pytest.raises(ClipmillError, match="no such GPU"):
        engine.slots(Resources(gpus=1))


def test_every_shard_once(engine: Engine, tmp_path: Path) -> None:
    done, failed = sort(engine.map(square(tmp_path), range(20), TWO))
    assert (done, failed) == (squares(range(20)), {})
    assert len(list(tmp_path.iterdir())) == 20


def test_a_stage_that_raises_for_one_shard(engine: Engine, tmp_path: Path) -> None:
    done, failed = sort(engine.map(square(tmp_path, {3: "raise", 5: "raise once"}), range(8), TWO, retries=2))
    assert done == squares(set(range(8)) - {3})
    assert failed == {3: "ValueError: no 3"}
    tries = {n: len(list(tmp_path.glob(f"{n}-*"))) for n in range(8)}
    assert tries == dict.fromkeys(range(8), 1) | {3: 3, 5: 2}


def test_a_worker_that_dies_once(engine: Engine, tmp_path: Path) -> None:
    done, failed = sort(engine.map(square(tmp_path, {2: "die once"}), range(8), TWO))
    assert (done, failed) == (squares(range(8)), {})


def test_a_shard_that_always_kills_its_worker_takes_no_other_with_it(engine: Engine, tmp_path: Path) -> None:
    """With one worker, every other shard waits behind the killer at some time."""
    one = Resources(workers=1, cpus=0.5)
    done, failed = sort(engine.map(square(tmp_path, {0: "die"}), range(5), one, retries=2))
    assert done == squares(range(1, 5))
    assert failed.keys() == {0}
    assert len(list(tmp_path.glob("0-*"))) == 3


def test_an_error_of_the_run_ends_it_and_arrives_whole(engine: Engine, tmp_path: Path) -> None:
    drawn = []

    def shards() -> Iterator[int]:
        for n in range(1000):
            drawn.append(n)
            yield n

    with pytest.raises(EncoderMismatch) as caught:
        list(engine.map(square(tmp_path, {4: "refuse"}), shards(), TWO))
    error = caught.value
    assert (error.problem, error.expected, error.actual) == ("the vectors", "A", "B")
    assert error.remedy and error.exit_status == 1
    assert len(drawn) < 50, "nothing was begun after it"


class Unmakeable:
    def __init__(self) -> None:
        raise ClipmillError("no such model", remedy="train one")


def test_an_error_in_making_the_stage_arrives_whole(engine: Engine) -> None:
    with pytest.raises(ClipmillError, match="no such model") as caught:
        list(engine.map(Unmakeable, [1, 2], TWO))
    assert caught.value.remedy == "train one"


def test_shards_are_not_drawn_far_ahead(engine: Engine, tmp_path: Path) -> None:
    drawn = 0

    def shards() -> Iterator[int]:
        nonlocal drawn
        for n in range(30):
            drawn += 1
            yield n

    taken = 0
    for _ in engine.map(square(tmp_path), shards(), TWO):
        taken += 1
        # Two workers with two places each, and one shard that was looked at.
        assert drawn <= taken + 2 * 2 + 1
    assert taken == 30


def test_a_map_that_is_left_early_frees_its_workers(engine: Engine, tmp_path: Path) -> None:
    for _ in range(2):
        outcomes = engine.map(square(tmp_path), range(10), Resources(workers=2, cpus=1))
        next(outcomes)
        outcomes.close()  # type: ignore[attr-defined]
    done, _ = sort(engine.map(square(tmp_path), range(3), Resources(workers=2, cpus=1)))
    assert done == squares(range(3))


def _sum_over_ranks(rank: Rank, report: Callable[[dict[str, Any]], None]) -> tuple[int, int, float]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://{rank.address}", rank=rank.rank, world_size=rank.world)
    value = torch.tensor(float(10**rank.rank))
    dist.all_reduce(value)
    report({"step": 1, "rank": rank.rank})
    time.sleep(2.5 if rank.rank == 0 else 0)
    dist.destroy_process_group()
    return rank.rank, rank.world, float(value)


@pytest.mark.slow
def test_two_training_workers_meet(engine: Engine) -> None:
    seen: list[dict[str, Any]] = []
    found = engine.train(_sum_over_ranks, Resources(workers=2, cpus=0.5), seen.append)
    assert found == (0, 2, 11.0), "rank 0's result, over both"
    assert {"step": 1, "rank": 0} in seen
    assert all(figures in ({}, {"step": 1, "rank": 0}) for figures in seen)


def _fails(how: str, rank: Rank, report: Callable[[dict[str, Any]], None]) -> None:
    if rank.rank == 1:
        if how == "die":
            os._exit(1)
        raise ClipmillError("diverged") if how == "refuse" else ValueError("odd")
    time.sleep(30)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "text"), [("die", "worker failed"), ("refuse", "diverged"), ("raise", "ValueError: odd")]
)
def test_a_training_worker_that_fails_ends_the_training(how: str, text: str, engine: Engine) -> None:
    with pytest.raises(ClipmillError, match=text):
        engine.train(partial(_fails, how), Resources(workers=2, cpus=0.5))

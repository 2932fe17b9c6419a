"""The engine: real Ray workers which fail, die and refuse."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, OutOfMemoryError, RayTaskError

from pipeline.engine import Done, Engine, Quarantined, Rank, Resources
from pipeline.engine.failures import is_lost
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


@pytest.mark.parametrize("overlap", [1, 3])
def test_shards_are_not_drawn_far_ahead(overlap: int, engine: Engine, tmp_path: Path) -> None:
    """Also of an input that never ends."""
    drawn = 0

    def shards() -> Iterator[int]:
        nonlocal drawn
        for n in itertools.count():
            drawn += 1
            yield n

    outcomes = engine.map(square(tmp_path), shards(), Resources(workers=2, cpus=0.5, overlap=overlap))
    for taken, _ in enumerate(itertools.islice(outcomes, 30), start=1):
        # Two workers with the shards under way and one that waits, and one shard that was looked at.
        assert drawn <= taken + 2 * (overlap + 1) + 1
    assert taken == 30
    outcomes.close()  # type: ignore[attr-defined]


class Together:
    """n -> how many shards were under way in this worker with n, itself included, at most; and how many stages it made.

    ``meet``: as many shards wait for one another. ``deadly`` kills its worker, once others are there (if others come).
    """

    made = 0

    def __init__(self, folder: str, meet: int, deadly: int | None) -> None:
        self.folder, self.deadly = Path(folder), deadly
        self.barrier = threading.Barrier(meet)
        self.under_way: set[int] = set()
        time.sleep(0.2)  # long enough for a second thread to make a second stage, if it could
        Together.made += 1

    def __call__(self, n: int) -> tuple[int, int, int]:
        (self.folder / f"{n}-{time.time_ns()}").touch()
        self.under_way.add(n)
        if n == self.deadly:
            time.sleep(0.3)
            os._exit(1)
        first = len(list(self.folder.glob(f"{n}-*"))) == 1
        if self.barrier.parties > 1:
            self.barrier.wait(60)
        elif first or self.deadly is None:
            time.sleep(0.5)
        most = len(self.under_way)
        time.sleep(0.05)
        most = max(most, len(self.under_way))
        self.under_way.discard(n)
        return n, most, Together.made


def test_one_worker_works_on_several_shards_with_one_stage(engine: Engine, tmp_path: Path) -> None:
    """Three shards wait for one another: with fewer at once none would ever end."""
    stage = partial(Together, str(tmp_path), 3, None)
    outcomes = list(engine.map(stage, range(9), Resources(workers=1, cpus=0.5, overlap=3)))
    assert all(isinstance(outcome, Done) for outcome in outcomes), outcomes
    assert sorted(outcome.shard for outcome in outcomes) == list(range(9))
    assert {outcome.result[2] for outcome in outcomes if isinstance(outcome, Done)} == {1}, "one stage was made"
    assert max(outcome.result[1] for outcome in outcomes if isinstance(outcome, Done)) == 3, "no more than overlap"


def test_what_was_in_a_dead_worker_is_tried_again_alone(engine: Engine, tmp_path: Path) -> None:
    """Three shards at once and one that waits: all four fail with the killer's worker, and come back one by one."""
    stage = partial(Together, str(tmp_path), 1, 1)
    outcomes = list(engine.map(stage, range(8), Resources(workers=1, cpus=0.5, overlap=3), retries=2))
    tries = {n: len(list(tmp_path.glob(f"{n}-*"))) for n in range(8)}
    assert [o.shard for o in outcomes if isinstance(o, Quarantined)] == [1]
    assert tries.pop(1) == 3, "one for each try"
    found = {o.shard: o.result[1] for o in outcomes if isinstance(o, Done)}
    assert found.keys() == tries.keys(), "every other shard, once"
    assert set(tries.values()) == {1, 2}
    assert {found[n] for n in tries if tries[n] == 2} == {1}, "alone in its worker"


def test_two_killers(engine: Engine, tmp_path: Path) -> None:
    """With as many suspects as workers, or more, nothing is lost, doubled or stuck."""
    done, failed = sort(engine.map(square(tmp_path, {0: "die", 1: "die once"}), range(12), TWO, retries=2))
    assert (done, failed.keys()) == (squares(range(1, 12)), {0})


def test_a_worker_for_which_there_is_no_room_gets_no_shard(engine: Engine, tmp_path: Path) -> None:
    """As after the loss of a node: the cluster counts two places, but only one worker comes up."""
    engine.start()
    guest = ray.remote(Square).options(num_cpus=1.5).remote(str(tmp_path), {})
    ray.get(guest.tries.remote(0))
    try:
        done, failed = sort(engine.map(square(tmp_path), range(10), TWO))
    finally:
        ray.kill(guest)
    assert (done, failed) == (squares(range(10)), {})


@pytest.mark.parametrize("lost", [ActorDiedError(), ActorUnavailableError("x", None), NodeDiedError("x")])
def test_lost_workers(lost: Exception) -> None:
    assert is_lost(lost)
    assert is_lost(OutOfMemoryError("killed by the memory monitor")), "which is no RayActorError"


class Chained:
    """A stage that uses Ray itself, and whose own actor died: no sign that its worker did."""

    def __call__(self, n: int) -> tuple[int, int]:
        if n == 1:
            raise ActorDiedError()
        return n, os.getpid()


def test_an_error_of_ray_that_a_stage_raises_is_the_stages(engine: Engine) -> None:
    outcomes = list(engine.map(Chained, range(6), Resources(workers=1, cpus=0.5), retries=1))
    assert [o.shard for o in outcomes if isinstance(o, Quarantined)] == [1]
    assert len({o.result[1] for o in outcomes if isinstance(o, Done)}) == 1, "the worker was never replaced"
    assert not is_lost(RayTaskError("work", "", ActorDiedError()))


class Closing:
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, n: int) -> int:
        return n

    def close(self) -> None:
        (self.folder / f"closed-{os.getpid()}").touch()
        raise ValueError("none of the run's concern")


def test_stages_are_closed_after_the_last_shard(engine: Engine, tmp_path: Path) -> None:
    outcomes = engine.map(partial(Closing, str(tmp_path)), range(20), TWO)
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == [], "not where the run was left early"
    assert len(list(engine.map(partial(Closing, str(tmp_path)), range(20), TWO))) == 20
    assert 1 <= len(list(tmp_path.iterdir())) <= 2, "each worker that made a stage, once"


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

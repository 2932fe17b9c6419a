"""Two pools of workers, of which the first feeds the second: what fails where, and what waits between them."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ObjectLostError, ObjectReconstructionFailedError, RayTaskError

from pipeline.engine import Done, Engine, Quarantined, Resources, pool
from pipeline.engine.failures import is_lost
from schemas.errors import ClipmillError, EncoderMismatch

SMALL = Resources(workers=1, cpus=0.25)
TWO = Resources(workers=2, cpus=0.25)


class Made:
    """Something large that only the workers may hold; lost on its way where ``lost`` names a file that is not there."""

    def __init__(self, n: int, driver: int, lost: str = "") -> None:
        self.n, self.driver, self.lost = n, driver, lost
        self.data = np.full(200_000, n)

    def __setstate__(self, state: dict[str, Any]) -> None:
        assert os.getpid() != state["driver"], "it came to the driver"
        if state["lost"] and not Path(state["lost"]).exists():
            Path(state["lost"]).touch()
            raise ObjectLostError("ref", None, "")
        self.__dict__ |= state


class Stage:
    """One of the two: notes each try of a number, and does what is given for it, by name."""

    def __init__(self, name: str, folder: str, behaviour: dict[int, str], driver: int) -> None:
        self.name, self.folder, self.behaviour, self.driver = name, Path(folder), behaviour, driver

    def close(self) -> None:
        (self.folder / f"{self.name}-closed").touch()

    def note(self, n: int) -> str:
        (self.folder / f"{self.name}-{n}-{time.time_ns()}").touch()
        what = self.behaviour.get(n, "")
        first = len(list(self.folder.glob(f"{self.name}-{n}-*"))) == 1
        if what == "die" or (what == "die once" and first):
            os._exit(1)
        if what == "raise" or (what == "raise once" and first):
            raise ValueError(f"no {n}")
        if what == "refuse":
            raise EncoderMismatch("the vectors", expected="A", actual="B")
        return what


class First(Stage):
    def __call__(self, n: int) -> Made:
        what = self.note(n)
        return Made(n, self.driver, str(self.folder / f"lost-{n}") if what == "lost once" else "")


class Second(Stage):
    def __call__(self, made: Made) -> tuple[int, int]:
        what = self.note(made.n)
        if what.startswith("wait for"):  # until the first stage has begun with that number
            wanted = f"first-{what.removeprefix('wait for ')}-*"
            for _ in range(6000):
                if list(self.folder.glob(wanted)):
                    break
                time.sleep(0.01)
            else:
                raise AssertionError("the first stage did not go on")
        assert (made.data == made.n).all()
        return made.n, os.getpid()


def outcomes(
    engine: Engine, folder: Path, shards: Any, first: dict[int, str], second: dict[int, str], needs: Resources = SMALL
) -> Iterator[Done[int, tuple[int, int]] | Quarantined[int]]:
    stages = [
        partial(kind, name, str(folder), behaviour, os.getpid())
        for kind, name, behaviour in ((First, "first", first), (Second, "second", second))
    ]
    return engine.map(stages[1], shards, needs, prepare=(stages[0], TWO), retries=2)


def tries(folder: Path, stage: str, n: int) -> int:
    return len(list(folder.glob(f"{stage}-{n}-*")))


def test_every_shard_goes_through_both(engine: Engine, tmp_path: Path) -> None:
    """The second stage holds number 0 until the first one has begun with number 3: they work at the same time."""
    found = list(outcomes(engine, tmp_path, range(12), {}, {0: "wait for 3"}))
    assert sorted(o.shard for o in found) == list(range(12))
    assert all(isinstance(o, Done) and o.result[0] == o.shard for o in found)
    assert len({o.result[1] for o in found if isinstance(o, Done)}) == 1
    assert {tries(tmp_path, stage, n) for stage in ("first", "second") for n in range(12)} == {1}
    assert {f.name for f in tmp_path.glob("*-closed")} == {"first-closed", "second-closed"}


def sort(found: Iterator[Done[int, tuple[int, int]] | Quarantined[int]]) -> tuple[list[int], dict[int, str]]:
    """What was done, and why the others were not."""
    done, failed = [], {}
    for outcome in found:
        if isinstance(outcome, Quarantined):
            failed[outcome.shard] = outcome.reason
        else:
            assert outcome.result[0] == outcome.shard
            done.append(outcome.shard)
    return sorted(done), failed


def test_what_fails_begins_again_in_the_first(engine: Engine, tmp_path: Path) -> None:
    first = {1: "raise once", 2: "raise", 5: "lost once"}
    second = {3: "raise once", 4: "raise"}
    done, failed = sort(outcomes(engine, tmp_path, range(8), first, second))
    assert (done, failed) == ([0, 1, 3, 5, 6, 7], {2: "ValueError: no 2", 4: "ValueError: no 4"})
    # What is lost between the two is lost before the second begins with it.
    expected = {0: (1, 1), 1: (2, 1), 2: (3, 0), 3: (2, 2), 4: (3, 3), 5: (2, 1), 6: (1, 1), 7: (1, 1)}
    assert {n: (tries(tmp_path, "first", n), tries(tmp_path, "second", n)) for n in range(8)} == expected


def test_workers_of_either_die(engine: Engine, tmp_path: Path) -> None:
    """What always kills its worker takes no other shard with it, wherever those are at that time."""
    done, failed = sort(outcomes(engine, tmp_path, range(8), {1: "die once"}, {4: "die"}))
    assert (done, failed.keys()) == ([0, 1, 2, 3, 5, 6, 7], {4})
    assert tries(tmp_path, "first", 1) >= 2 and tries(tmp_path, "first", 4) == 3


class Guest:
    """Takes the room that a dead worker leaves."""

    def here(self) -> None:
        pass


def test_a_pool_that_was_crowded_out_gets_room(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the loss of a node: the second pool's only worker dies, and another takes its CPU."""
    monkeypatch.setattr(pool, "_PATIENCE", 1.0)
    retired: list[bool] = []
    real = pool.Pool.retire
    monkeypatch.setattr(pool.Pool, "retire", lambda self: retired.append(real(self)) or retired[-1])
    behaviour = {4: "die once"}
    stages = [
        partial(kind, name, str(tmp_path), b, os.getpid())
        for kind, name, b in ((First, "first", {}), (Second, "second", behaviour))
    ]
    half = Resources(workers=1, cpus=0.5)
    found = engine.map(stages[1], range(12), half, prepare=(stages[0], Resources(workers=3, cpus=0.5)))
    done = [next(found)]
    guest = ray.remote(Guest).options(num_cpus=0.5).remote()
    try:
        done += found
        ray.get(guest.here.remote())
    finally:
        ray.kill(guest)
    assert sorted(o.shard for o in done if isinstance(o, Done)) == list(range(12))
    assert True in retired, "the first pool gave up one of its three"


def test_what_waits_between_them_is_bounded(engine: Engine, tmp_path: Path) -> None:
    """Of an endless input; two workers fill, one empties: three to four shards on their way."""
    drawn = 0

    def shards() -> Iterator[int]:
        nonlocal drawn
        for n in itertools.count():
            drawn += 1
            yield n

    found = outcomes(engine, tmp_path, shards(), {}, {})
    for taken, _ in enumerate(itertools.islice(found, 15), start=1):
        # Two in the first pool's workers, one in the second's and one before it; and one that was looked at.
        assert drawn <= taken + 2 + 2 + 1
        assert len(list(tmp_path.glob("first-*"))) <= taken + 4
    found.close()  # type: ignore[attr-defined]


def test_an_error_of_the_run_ends_it(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(EncoderMismatch) as caught:
        list(outcomes(engine, tmp_path, range(1000), {3: "refuse"}, {}))
    assert (caught.value.expected, caught.value.actual) == ("A", "B")
    assert len(list(tmp_path.glob("first-*"))) < 20


def test_how_many_of_each(engine: Engine) -> None:
    """The session's cluster has two CPUs."""
    any_, one = Resources(), Resources(workers=1)
    assert engine.slots_of_two(any_, any_) == (1, 1)
    assert engine.slots_of_two(Resources(workers=8), any_) == (1, 1), "one remains for the model"
    assert engine.slots_of_two(Resources(workers=8, cpus=0.25), one) == (4, 1), "what the model leaves"
    assert engine.slots_of_two(Resources(workers=2, cpus=0.25), Resources(cpus=0.5)) == (2, 3)
    assert engine.slots_of_two(Resources(workers=1, cpus=0), any_) == (1, 2)
    with pytest.raises(ClipmillError, match="no room for two"):
        engine.slots_of_two(Resources(cpus=1.5), one)


def test_a_lost_object_is_no_lost_worker() -> None:
    lost = ObjectReconstructionFailedError("ref", None, "")
    assert not is_lost(lost)
    assert not is_lost(RayTaskError("work", "", lost))

"""Room halves what does not fit, remembers it, and loses no row; the fastest batch is one that fits."""

import pytest
import torch
from torch import Tensor

from pipeline.models.devices import Place, Room, fastest_batch, pick_dtype
from schemas.errors import ClipmillError, UsageError


class Narrow:
    """Squares its rows, and runs out of memory above ``most`` of them."""

    def __init__(self, most: int) -> None:
        self.most, self.sizes = most, []

    def __call__(self, rows: Tensor) -> Tensor:
        self.sizes.append(len(rows))
        if len(rows) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows**2


@pytest.mark.parametrize("most", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("n", [1, 2, 13, 40])
def test_what_does_not_fit_is_halved(most: int, n: int) -> None:
    rows = torch.arange(n)
    torch.testing.assert_close(Room("images").run(Narrow(most), rows), rows**2)


def test_the_limit_is_remembered() -> None:
    room, forward = Room("images"), Narrow(5)
    room.run(forward, torch.arange(40))
    assert forward.sizes[:4] == [40, 20, 10, 5]
    assert room.largest == 5
    forward.sizes.clear()
    room.run(forward, torch.arange(12))
    assert forward.sizes == [5, 5, 2]


def test_longer_rows_take_more_of_the_room() -> None:
    room, forward = Room("texts"), Narrow(8)
    room.run(forward, torch.arange(16), cost=10)
    assert room.largest == 80  # tokens
    forward.sizes.clear()
    room.run(forward, torch.arange(6), cost=40)
    assert forward.sizes == [2, 2, 2]


def test_a_single_row_that_does_not_fit_ends_the_run() -> None:
    with pytest.raises(ClipmillError, match=r"no memory left(.|\n)*remedy"):
        Room("images").run(Narrow(0), torch.arange(4))


def test_fastest_batch_fits() -> None:
    def forward(n: int) -> Tensor:
        if n > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(n)

    assert fastest_batch(forward, [4, 8, 16, 32, 64]) in (4, 8, 16)
    assert fastest_batch(forward, [32, 64]) == 1


def test_precisions_keep_to_their_devices() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_dtype("auto", cpu) is torch.float32
    assert pick_dtype("int8", cpu) is torch.int8
    assert pick_dtype("float16", gpu) is torch.float16
    for precision, device in (("bfloat16", cpu), ("float16", cpu), ("int8", gpu)):
        with pytest.raises(UsageError, match=precision):
            pick_dtype(precision, device)


def test_autocast_is_for_half_precision_only() -> None:
    x = torch.ones(2, 2)
    for dtype in (torch.float32, torch.int8):
        with Place(torch.device("cpu"), dtype).autocast():
            assert (x @ x).dtype == torch.float32

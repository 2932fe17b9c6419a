"""Contact sheets: every picture at its place."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from pipeline.sheets import contact_sheet
from tests.servers import colour, picture

GAP, TEXT = 6, 26


def opened(images: list[bytes | None], columns: int, side: int = 32) -> Image.Image:
    return Image.open(io.BytesIO(contact_sheet(images, [f"label {i}" for i in range(len(images))], columns, side)))


@pytest.mark.parametrize(
    ("n", "columns", "grid"), [(1, 8, (1, 1)), (8, 8, (8, 1)), (9, 8, (8, 2)), (7, 3, (3, 3)), (0, 8, (1, 1))]
)
def test_size(n: int, columns: int, grid: tuple[int, int]) -> None:
    sheet = opened([picture(i) for i in range(n)], columns)
    assert sheet.format == "PNG"
    assert sheet.size == (GAP + grid[0] * (32 + GAP), GAP + grid[1] * (32 + TEXT + GAP))


def test_pictures_in_reading_order() -> None:
    numbers = [5, 77, 123, 900, 31]
    sheet = opened([picture(n, "png", (16, 16)) for n in numbers], columns=3)
    for i, number in enumerate(numbers):
        x, y = GAP + i % 3 * (32 + GAP), GAP + i // 3 * (32 + TEXT + GAP)
        for corner in ((0, 0), (31, 31), (16, 16)):
            assert sheet.getpixel((x + corner[0], y + corner[1])) == colour(number)


def test_a_picture_keeps_its_shape_on_white() -> None:
    sheet = opened([picture(7, "png", (32, 8))], columns=1)
    assert sheet.getpixel((GAP + 16, GAP + 16)) == colour(7)
    assert sheet.getpixel((GAP + 16, GAP + 2)) == (255, 255, 255)


def test_a_missing_picture_leaves_its_place_empty() -> None:
    sheet = opened([None, picture(9, "png", (16, 16))], columns=2)
    assert sheet.getpixel((GAP + 16, GAP + 16)) == (238, 238, 238)
    assert sheet.getpixel((GAP + 32 + GAP + 16, GAP + 16)) == colour(9)


def test_labels_belong_to_pictures() -> None:
    with pytest.raises(ValueError, match="argument"):
        contact_sheet([picture(1)], ["one", "two"])
    plain = contact_sheet([picture(1)], [""])
    assert contact_sheet([picture(1)], ["a label that is longer than both of its lines, and says 🎈"]) != plain

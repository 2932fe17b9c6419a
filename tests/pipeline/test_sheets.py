"""Contact sheets: every picture at its place."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image

from pipeline.sheets import contact_sheet, html_grid, html_page, one_line, thumbnail
from tests.servers import colour, number_of, picture

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


def test_a_damaged_picture_leaves_its_place_empty() -> None:
    broken = picture(9, "png", (16, 16))[:-30]
    assert opened([broken, b"no picture"], columns=2).getpixel((GAP + 16, GAP + 16)) == (238, 238, 238)
    assert thumbnail(broken, 32) is None and thumbnail(None, 32) is None


def test_html_holds_the_pictures_and_escapes_the_labels() -> None:
    grid = html_grid(
        [(picture(123), 'a "dog" <img src=x onerror=alert(1)> & \x1b[31m'), (None, "none"), (b"x", "broken")]
    )
    assert grid.count("<img") == 1 and grid.count("<figure") == 3
    assert "a &quot;dog&quot; &lt;img src=x onerror=alert(1)&gt; &amp; [31m" in grid and "\x1b" not in grid
    [data] = re.findall(r"data:image/jpeg;base64,([^\"]+)", grid)
    assert number_of(base64.b64decode(data)) == 123
    page = html_page("</title><script>", grid)
    assert grid in page and "<script>" not in page and page.startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\r\nc  d", "a b c d"),
        ("\x1b[2J\x07x\x9b31m", "[2Jx31m"),
        ("\u202eabc\u202c\u2066d\u2069\u200f", "abcd"),
        ("\u2028x\u0000\ufeff", "x"),
        ("क्\u200dष ok", "क्\u200dष ok"),
        ("", ""),
    ],
)
def test_one_line(text: str, shown: str) -> None:
    assert one_line(text) == shown

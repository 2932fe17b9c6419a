"""The page by keyboard alone, at phone width, in the dark, and with less motion."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.pages.site import Visit
from tests.pages.test_page import PNG


def focused(page: Page) -> str:
    """What has the focus: its data-id, id or label."""
    found: str = page.evaluate(
        "(at => at.dataset.id || at.id || at.getAttribute('aria-label') || at.textContent)(document.activeElement)"
    )
    return found


def test_a_walk_by_keyboard_alone(visit: Visit) -> None:
    page = visit.open()
    page.keyboard.press("/")
    assert focused(page) == "text"
    page.keyboard.type("a red circle/")
    assert page.input_value("#text") == "a red circle/"
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    keys = visit.keys()
    page.keyboard.press("ArrowDown")
    assert focused(page) == keys[0]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert focused(page) == keys[1]
    ring = page.evaluate(
        "getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth"
    )
    assert ring == "solid2px"
    # Down and up again: to the item below, by place, and back to the same column.
    place = "(b => [b.top + scrollY, (b.left + b.right) / 2])(document.activeElement.getBoundingClientRect())"
    top, middle = page.evaluate(place)
    page.keyboard.press("ArrowDown")
    below, near = page.evaluate(place)
    assert below > top
    assert abs(near - middle) < 300
    page.keyboard.press("ArrowUp")
    assert page.evaluate(place)[0] == pytest.approx(top, abs=1)
    page.keyboard.press("End")
    assert focused(page) == keys[-1]
    page.keyboard.press("Home")
    # Only one of the grid is in the Tab order.
    assert page.locator("#results .item[tabindex='0']").count() == 1
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".record")).to_contain_text(keys[0])
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate("document.querySelector('#details').contains(document.activeElement)")
        seen.add(focused(page))
    assert {"Close", "More like this", "Copy key", "Previous result"} <= seen
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.querySelector('#details').contains(document.activeElement)")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert focused(page) == keys[0]
    page.keyboard.press("/")
    assert focused(page) == "text"


def test_tabs_by_arrow_keys_and_roles(visit: Visit) -> None:
    page = visit.open(q="a red circle")
    page.get_by_role("tab", name="Images").focus()
    page.keyboard.press("ArrowRight")
    visit.settle()
    expect(page.get_by_role("tab", name="Captions")).to_be_focused()
    expect(page.get_by_role("tab", name="Captions")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("ArrowLeft")
    visit.settle()
    named = {
        "tabpanel": "Results",
        "list": "Results",
        "combobox": "Filter, a SQL predicate",
        "search": None,
        "main": None,
    }
    for role, name in named.items():
        expect(page.get_by_role(role, name=name).first).to_be_visible()  # type: ignore[arg-type]
    # Every control has a name.
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input:not([type=file]), select, a')].filter((e) => !(
          e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim())).map((e) => e.outerHTML)"""
    )
    assert unnamed == []


def test_nothing_scrolls_sideways_on_a_phone(visit: Visit) -> None:
    page = visit.page
    page.set_viewport_size({"width": 360, "height": 640})
    states: list[dict[str, object]] = [
        {}, {"q": "a red circle", "k": 36, "diversity": 0.5}, {"q": "x", "view": "text", "k": 36},
        {"view": "generated"}, {"q": "x", "where": "nonsense nonsense"}, {"q": "x", "k": 0},
    ]  # fmt: skip
    for state in states:
        page.goto("about:blank")
        visit.open(**state)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, state
    visit.open(
        q="a red circle", text="1*a long text as a term of its own, longer than the screen is wide", key="-0.25*1"
    )
    visit.drop(PNG, zone="add")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    visit.open(q="a red circle")
    page.locator("#results .item").nth(1).click()
    expect(page.locator("#details .record dl")).not_to_have_count(0)
    assert page.evaluate("(s => s.scrollWidth <= 360)(document.querySelector('#details .sheet'))")
    page.get_by_role("button", name="Close").click()
    expect(page.locator("#details")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(visit: Visit, scheme: str) -> None:
    page = visit.page
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    visit.open(q="a red circle", where="nonsense nonsense")
    lightness = page.evaluate(_LIGHTNESS, ["body", "color", "backgroundColor"])
    assert (lightness[1] < 0.05) == (scheme == "dark")
    # WCAG 2.2, 1.4.3: text stands out from its ground by 4.5 at least.
    for selector in ("body", "label", "#status", "[role=tab]", "#where-problem p"):
        text, _ = page.evaluate(_LIGHTNESS, [selector, "color", "backgroundColor"])
        light, dark = sorted((text, lightness[1]), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, selector


_LIGHTNESS = """([selector, ...names]) => names.map((name) => {
  const parts = getComputedStyle(document.querySelector(selector))[name].match(/[\\d.]+/g).slice(0, 3).map(Number);
  const [r, g, b] = parts.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
})"""
"""Relative luminance of a colour, as WCAG defines it."""


def test_less_motion(visit: Visit) -> None:
    page = visit.page
    moving = "() => (document.querySelector('main').setAttribute('aria-busy', 'true'), document.getAnimations().length)"
    visit.open()
    assert page.evaluate(moving) > 0
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate("document.getAnimations().length") == 0

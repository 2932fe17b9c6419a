"""One workspace, one server and one Chromium for the tests of the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.pages.site import Site, Visit

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """A Chromium without a window. Closed before other tests: Playwright's event loop is this thread's meanwhile."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium on PATH: {', '.join(NAMES)}")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@pytest.fixture(scope="package")
def site(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The service over a workspace of 36 pairs with two encoders."""
    from pipeline.collection import Collection
    from pipeline.service.options import Options
    from tests.pages.site import Site
    from tests.pages.world import build

    folder: Path = tmp_path_factory.mktemp("pages")
    workspace = build(folder)
    encoders = sorted(p.name for p in (folder / "ws" / "indices").iterdir())
    collections = {name: Collection(workspace, name) for name in encoders}
    with Site(collections, Options(workspace=workspace)) as started:
        yield started


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Visit]:
    """A new page; in the end nothing may have gone wrong in it, and nobody else been asked for anything."""
    from tests.pages.site import Visit

    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(8000)
    visit = Visit(context, site)
    yield visit
    context.close()
    assert visit.wrongs == []

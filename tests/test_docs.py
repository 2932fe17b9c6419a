"""The documentation cannot drift: options, tables, reasons and links are compared with the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from jobs.cli import JOBS
from schemas.errors import Reason
from schemas.settings import variables
from schemas.tables import TABLES, TableSpec

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {"demo", "ws", "build", "dist", "node_modules"}
PAGES = sorted(
    page
    for page in ROOT.rglob("*.md")
    if not {part for part in page.relative_to(ROOT).parts if part.startswith(".") or part in SKIPPED}
)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """docs/generate_commands.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("generate_commands", ROOT / "docs" / "generate_commands.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_are_as_generated(generator: ModuleType) -> None:
    written = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert written == generator.render(), "run: make docs"


@pytest.mark.parametrize("job", JOBS)
def test_every_job_is_documented_with_all_its_settings(job: str, generator: ModuleType) -> None:
    assert job in generator.FIGURES
    for command, cls in generator.config_classes(job):
        assert cls is not None, f"schemas.configs has no config of {command}"
        # The generator walks the fields by itself: the loader's own list must be the same.
        assert {generator.variable(path) for path, _ in generator.fields(cls)} == variables(cls)


def test_readme_lists_every_job() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)`", readme, re.MULTILINE)
    assert listed == list(JOBS)


@pytest.mark.parametrize("spec", TABLES.values(), ids=TABLES)
def test_every_column_is_documented(spec: TableSpec) -> None:
    text = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {spec.name}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"docs/tables.md has no section {spec.name}"
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", section[1], re.MULTILINE)
    assert rows == [(field.name, str(field.type)) for field in spec.schema]


def test_every_reason_is_documented() -> None:
    text = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8").split("## Reasons")[1]
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \|", text, re.MULTILINE)
    assert rows == [(str(reason), "yes" if reason.retryable else "no") for reason in Reason]


def anchors(page: Path) -> set[str]:
    """Ids of a page's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links to {link}: no such heading"

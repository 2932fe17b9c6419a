"""Generated pictures: prompts with what was kept and all ranks, and the pictures themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.service import generated
from pipeline.service.errors import Refused
from pipeline.workspace import Workspace
from schemas.keys import prompt_key
from schemas.tables import CANDIDATES, RANKINGS
from tests.pipeline.service.asking import Client
from tests.servers import picture

SCORES = {"a red circle": (0.1, 0.4, 0.3), "a blue square": (0.5, 0.2, 0.6)}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Two runs; each made three pictures a prompt and kept two."""
    made = Workspace(tmp_path / "ws")
    for run, seed, better in (("20260101T000000-generate-a", 0, 0.0), ("20260102T000000-generate-b", 1, 0.05)):
        rows: list[dict[str, Any]] = []
        for prompt, scores in SCORES.items():
            order = sorted(range(3), key=lambda n, of=scores: -of[n])  # type: ignore[misc]
            for n, score in enumerate(scores):
                rank = order.index(n) + 1
                rows.append({
                    "prompt_key": prompt_key(prompt), "prompt": prompt, "number": n, "seed": seed, "rank": rank,
                    "clip_score": score + better, "kept": rank <= 2, "prior": "p", "decoder": "d", "encoder": "e",
                    "image": picture(10 * seed + n) if rank <= 2 else None, "sampling": "s", "run": run,
                })  # fmt: skip
        table = pa.Table.from_pylist(rows, schema=CANDIDATES.schema)
        made.table("candidates").append(table, run)
        made.table("rankings").append(table.select(RANKINGS.schema.names), run)
    return made


def test_prompts_newest_run_first(workspace: Workspace) -> None:
    found = generated.prompts(workspace, "", 10).prompts
    assert [(p.prompt, p.run[:8]) for p in found] == [
        ("a blue square", "20260102"), ("a red circle", "20260102"),
        ("a blue square", "20260101"), ("a red circle", "20260101"),
    ]  # fmt: skip
    red = found[3]
    assert red.prompt_key == str(prompt_key("a red circle"))
    assert [(c.number, c.rank) for c in red.candidates] == [(1, 1), (2, 2)]
    assert [(r.number, r.rank) for r in red.rankings] == [(1, 1), (2, 2), (0, 3)]
    assert red.candidates[0].clip_score == pytest.approx(0.4)
    assert len(generated.prompts(workspace, "", 3).prompts) == 3
    assert [p.prompt for p in generated.prompts(workspace, "RED", 10).prompts] == ["a red circle"] * 2
    assert generated.prompts(workspace, ".*", 10).prompts == []


def test_each_picture_is_found_by_its_own_address(workspace: Workspace) -> None:
    key = prompt_key("a red circle")
    for prompt in generated.prompts(workspace, "red", 10).prompts:
        for candidate in prompt.candidates:
            assert candidate.image.startswith(f"v1/generated/{key}/{candidate.number}?run=")
            data = generated.picture(workspace, key, candidate.number, prompt.run)
            assert data == picture(10 * candidate.seed + candidate.number)
    assert generated.picture(workspace, key, 1, None) == picture(11)  # the better of two
    for number, run in ((0, None), (1, "another"), (7, None)):
        with pytest.raises(Refused):
            generated.picture(workspace, key, number, run)


def test_over_http(client: Client) -> None:
    assert client.ask("GET", "/v1/generated?prompt=red&limit=5").json == {"prompts": []}  # nothing generated yet
    assert client.ask("GET", "/v1/generated/12/0").status == 404

"""Generated pictures and their ranks, out of the tables candidates and rankings."""

from __future__ import annotations

from collections import defaultdict
from typing import Any
from urllib.parse import quote

import pyarrow.compute as pc

from pipeline.service.errors import unknown
from pipeline.service.models import Candidate, Generated, Prompt, Ranked
from pipeline.workspace import Workspace

_CANDIDATE = [name for name in Candidate.model_fields if name != "image"]
_RANKED = list(Ranked.model_fields)


def prompts(workspace: Workspace | None, prompt: str, limit: int) -> Generated:
    """Prompts that contain a text, one entry for each run that made pictures of them, the newest run first."""
    if workspace is None:
        return Generated(prompts=[])
    kept = pc.field("kept") == True  # noqa: E712 - an expression
    where = kept & pc.match_substring(pc.field("prompt"), prompt, ignore_case=True) if prompt else kept
    rows = workspace.table("candidates").read(["prompt_key", "prompt", *_CANDIDATE], where).to_pylist()
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["run"], row["prompt"], row["prompt_key"]].append(row)
    # A run's name begins with its time.
    newest = sorted(groups, key=lambda g: g[1])
    newest = sorted(newest, key=lambda g: g[0], reverse=True)[:limit]
    ranks = _ranks(workspace, sorted({key for _, _, key in newest}))
    return Generated(
        prompts=[
            Prompt(
                prompt_key=str(key),
                prompt=text,
                run=run,
                candidates=[_candidate(row) for row in sorted(groups[run, text, key], key=lambda r: r["rank"])],
                rankings=ranks[run, key],
            )
            for run, text, key in newest
        ]
    )


def picture(workspace: Workspace | None, key: int, number: int, run: str | None) -> bytes:
    """The kept picture of that number; of several runs' the one with the best score. Raises Refused for none."""
    if workspace is not None:
        where = (pc.field("prompt_key") == key) & (pc.field("number") == number) & pc.field("image").is_valid()
        where = where & (pc.field("run") == run) if run is not None else where
        rows = workspace.table("candidates").read(["image", "clip_score"], where).to_pylist()
        if rows:
            best: bytes = max(rows, key=lambda r: r["clip_score"])["image"]
            return best
    raise unknown("picture of", f"{key}/{number}")


def _ranks(workspace: Workspace, keys: list[int]) -> dict[tuple[str, int], list[Ranked]]:
    """All candidates of these prompts by (run, prompt_key), best first."""
    found: dict[tuple[str, int], list[Ranked]] = defaultdict(list)
    rows = workspace.table("rankings").read(["prompt_key", "run", *_RANKED], pc.field("prompt_key").isin(keys))
    for row in rows.sort_by("rank").to_pylist():
        found[row["run"], row["prompt_key"]].append(Ranked(**{name: row[name] for name in _RANKED}))
    return found


def _candidate(row: dict[str, Any]) -> Candidate:
    place = f"v1/generated/{row['prompt_key']}/{row['number']}?run={quote(row['run'], safe='')}"
    return Candidate(**{name: row[name] for name in _CANDIDATE}, image=place)

"""status: what a workspace holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table as RichTable

from jobs.base import command
from pipeline.encoders import embedded_encoders
from pipeline.engine import Engine
from pipeline.ledger import Run
from schemas.configs import StatusConfig
from schemas.errors import Reason
from schemas.tables import TABLES

_MODELS = ("clip", "prior", "decoder")


def run(config: StatusConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`StatusConfig`. Reads only."""
    workspace = run.workspace.require()
    tables = {name: workspace.table(name) for name in TABLES}
    images = tables["images"].read(["status", "retryable"])
    reasons = images.group_by(["status", "retryable"]).aggregate([([], "count_all")]).to_pylist()
    embeddings = tables["embeddings"].read(["encoder"])
    encoders = {v["values"]: v["counts"] for v in pc.value_counts(embeddings["encoder"]).to_pylist()}
    run.figures |= {
        "tables": {n: {"rows": t.count(), "version": t.version()} for n, t in tables.items()},
        "images": {r["status"]: {"rows": r["count_all"], "retryable": r["retryable"]} for r in reasons},
        "encoders": {e: encoders.get(e, 0) for e in embedded_encoders(workspace)},
        "indices": {e: _index(run, e) for e in workspace.indexed_encoders()},
        "models": {k: {c.name: _model(c) for c in workspace.models(k)} for k in _MODELS},
        "runs": _runs(run, config.runs),
    }
    _show(run.figures)


def _index(run: Run, encoder: str) -> dict[str, Any]:
    card = run.workspace.published_index(encoder)
    assert card is not None, "indexed_encoders lists published ones"
    return {"version": card.version, "count": card.count, **{f.modality: f.recall_at_10 for f in card.files}}


def _model(card: Any) -> dict[str, Any]:
    return {"id": card.id, "step": card.step, "encoder": card.encoder.id if card.encoder else None}


def _runs(run: Run, newest: int) -> list[dict[str, Any]]:
    columns = ["run", "job", "started", "ended", "outcome", "counts_in", "counts_out", "counts_failed", "error"]
    rows = run.workspace.table("runs").read(columns).sort_by([("started", "descending")]).slice(0, newest)
    return [dict(row) for row in rows.to_pylist()]


def _show(figures: dict[str, Any]) -> None:
    console = Console(stderr=True)
    tables = RichTable("table", "rows", "version", box=None)
    for name, t in figures["tables"].items():
        tables.add_row(name, f"{t['rows']:,}", str(t["version"]) if t["version"] >= 0 else "-")
    console.print(tables)
    total = sum(r["rows"] for r in figures["images"].values())
    reasons = RichTable("images", "rows", "share", "later", "meaning", box=None)
    for name, r in sorted(figures["images"].items(), key=lambda item: -item[1]["rows"]):
        later = "retry" if r["retryable"] else ""
        reasons.add_row(name, f"{r['rows']:,}", f"{r['rows'] / total:.1%}", later, Reason(name).meaning)
    console.print(reasons)
    for encoder, count in figures["encoders"].items():
        console.print(f"encoder {encoder}: {count:,} embedded", highlight=False)
    for encoder, card in figures["indices"].items():
        console.print(f"index {encoder}: {card['count']:,} vectors, version {card['version']}", highlight=False)
    for kind, models in figures["models"].items():
        for name, model in models.items():
            console.print(f"{kind} {name}: step {model['step']:,}", highlight=False)
    runs = RichTable("run", "outcome", "in", "out", "failed", box=None)
    for row in figures["runs"]:
        runs.add_row(row["run"], row["outcome"], *(f"{row[f'counts_{c}']:,}" for c in ("in", "out", "failed")))
    console.print(runs)


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill status``."""
    return command("status", StatusConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())

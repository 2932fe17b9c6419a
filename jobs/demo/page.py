"""The demo's page: one HTML file with everything inside, to be looked at."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from jinja2 import Environment, StrictUndefined

from jobs.demo import judge, world
from jobs.evaluate import read_history
from pipeline.ledger import Run
from pipeline.plots import Axes, Curves, lines
from schemas.configs import DemoConfig

_SHOWN = 6
"""Prompts of each kind on the page; all are in the tables."""


@dataclass(frozen=True)
class View:
    """What the page shows beside the result: the steps' figures, the prompts by kind, all candidates."""

    config: DemoConfig
    run: Run
    figures: dict[str, Any]
    prompts: dict[str, list[str]]
    candidates: list[dict[str, Any]]


def write_page(path: Path, result: dict[str, Any], view: View) -> None:
    """Write the page, one file with its pictures inside."""
    template = resources.files("jobs.demo").joinpath("page.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(template)
    path.parent.mkdir(parents=True, exist_ok=True)
    html = page.render(
        result=result,
        metrics=result["metrics"],
        kinds=judge.KINDS,
        n=str(view.config.candidates),
        flow=_flow(view, result),
        queries=_queries(view),
        sheets=_sheets(view),
        plots=_plots(result["metrics"], view.run),
        pairs=_pairs(view),
    )
    path.write_text(html, encoding="utf-8")


def _flow(view: View, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The data's way: each step with what came out of it and its seconds."""
    figures, seconds, counts = view.figures, result["seconds"], result["counts"]
    models = figures["train prior and decoder"]
    index = figures["index"]
    rows = [
        ("world", "drawn and served over HTTP", f"{view.config.pairs:,} pictures with captions"),
        ("download", "URL → image, or a row with its reason", f"{counts['images']:,} rows of images"),
        ("train clip", "contrastive, from scratch", f"{figures['train clip']['step']:,} steps"),
        ("embed", "image and text vectors", f"{counts['embeddings']:,} rows of embeddings"),
        ("index", "FAISS, recall measured", f"{index['count']:,} vectors, recall@10 {index['image_recall_at_10']:.3f}"),
        ("query", "text → nearest pictures", f"{len(figures['query']['queries'])} queries"),
        (
            "train prior and decoder",
            "text → embedding, embedding → picture, side by side",
            f"{models['prior']['step']:,} and {models['decoder']['step']:,} steps",
        ),
        ("generate", "prompts → candidates, ranked by CLIP", f"{counts['candidates']:,} candidates"),
        ("evaluate", "retrieval, prior, verdicts on pixels", f"{figures['evaluate']['job']['pairs']:,} held-out pairs"),
    ]
    return [{"name": name, "what": what, "out": out, "seconds": seconds.get(name, 0.0)} for name, what, out in rows]


def _queries(view: View) -> list[dict[str, Any]]:
    queries = view.figures["query"]["queries"]
    keys = [r["pair_key"] for q in queries for r in q["results"]]
    rows = view.run.workspace.table("images").read(["pair_key", "image"], pc.field("pair_key").isin(keys)).to_pylist()
    images = {row["pair_key"]: _data(row["image"]) for row in rows}
    return [
        {"text": q["text"], "results": [r | {"image": images[r["pair_key"]]} for r in q["results"]]} for q in queries
    ]


def _sheets(view: View) -> dict[str, list[dict[str, Any]]]:
    """Some prompts of each kind, their candidates in rank order with the checker's verdicts."""
    sheets: dict[str, list[dict[str, Any]]] = {}
    for kind, prompts in view.prompts.items():
        sheets[kind] = [
            {"prompt": p, "candidates": [r | {"image": _data(r["image"])} for r in view.candidates if r["prompt"] == p]}
            for p in prompts[:_SHOWN]
        ]
    return sheets


def _pairs(view: View) -> list[dict[str, str]]:
    """A few training pairs, as drawn."""
    return [{"caption": caption, "image": _data(png)} for _, caption, png in world.training_pairs(8, view.config.seed)]


def _plots(metrics: dict[str, Any], run: Run) -> dict[str, str]:
    plots = {}
    for kind in ("clip", "prior", "decoder"):
        history = [h for card in run.workspace.models(kind) for h in read_history(run, kind, card.name)]
        curve = {kind: ([h["step"] for h in history], [h["loss"] for h in history])}
        plots[kind] = _data(lines(curve, Axes(f"training loss: {kind}", "step", "loss", log_y=True)))
    for kind, g in metrics["generation"].items():
        curves: Curves = {
            name: ([float(n) for n in g[key]], list(g[key].values()))
            for name, key in (("ranked by CLIP", "best_of"), ("oracle", "oracle"))
        }
        axes = Axes(judge.KINDS[kind], "best of N", "matches", ticks=tuple(float(n) for n in g["best_of"]), share=True)
        plots[kind] = _data(lines(curves, axes))
    return plots


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()

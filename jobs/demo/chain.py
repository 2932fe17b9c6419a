"""The demo's chain: one job after the other, in one process with one Ray, resumable at every step."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table as RichTable

from jobs import download, embed, evaluate, generate, index, query, train
from jobs.base import EXIT_INTERRUPTED, execute
from jobs.demo import judge, settings, world
from jobs.demo.page import View, write_page
from jobs.demo.server import HOST, FileServer
from pipeline.encoders import load_encoder
from pipeline.engine import Engine
from pipeline.ledger import Run
from pipeline.progress import Progress
from pipeline.storage import write_atomic
from pipeline.workspace import Workspace
from schemas.configs import (
    DemoConfig,
    DownloadConfig,
    EmbedConfig,
    EvaluateConfig,
    GenerateConfig,
    IndexConfig,
    QueryConfig,
)
from schemas.errors import ClipmillError, UsageError
from schemas.settings import load

_QUERIES = 4
_AFTERWARDS = 70.0
"""Seconds of what follows the training: generation, evaluation, the page."""
_TEST_SEED = 1_000_003
_SAMPLE_SEED = 424_242
"""Apart from the seeds that people take: who generates in the demo's workspace starts with nothing made already."""


class Demo:
    """Folders and state of one demo; each method is a step that finds out by itself what is left to do."""

    def __init__(self, config: DemoConfig, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.root = Path(config.folder).absolute()
        self.world, self.report = self.root / "world", self.root / "report"
        self.workspace = Workspace(self.root / "ws")
        self.state = self._load_state()

    # -- state: what a restart must know ---------------------------------------------------------------

    def _load_state(self) -> dict[str, Any]:
        path = self.root / "state.json"
        asked = self.config.model_dump(exclude={"folder", "address"})
        if not path.exists():
            return {"settings": asked, "seconds": {}, "figures": {}, "port": 0}
        state: dict[str, Any] = json.loads(path.read_text())
        if state["settings"] != asked:
            raise UsageError(
                f"{self.root} holds a demo with other settings",
                expected=str(state["settings"]),
                actual=str(asked),
                remedy=f"use another --folder, or remove {self.root}",
            )
        return state

    def _save_state(self) -> None:
        from upath import UPath

        write_atomic(UPath(self.root / "state.json"), json.dumps(self.state, indent=2, default=str).encode())

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """A step's figures; its seconds are added up over restarts."""
        print(f"demo: {name}", file=sys.stderr, flush=True)
        start = time.monotonic()
        figures: dict[str, Any] = self.state["figures"].get(name, {})
        try:
            yield figures
            self.state["figures"][name] = figures
        finally:
            seconds = self.state["seconds"]
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
            self._save_state()

    def _job(self, name: str, config: Any, body: Callable[[Any, Run, Engine], None]) -> dict[str, Any]:
        """Run a job; its counts and figures, those of the run that did the work."""
        run = execute(name, config, body, self.engine)
        if run.counts["in"] == 0 and (before := self.state["figures"].get(f"job {name}")):
            return dict(before)
        figures = {"counts": run.counts, "seconds": run.seconds, "run": run.id, **run.figures}
        self.state["figures"][f"job {name}"] = figures
        return figures

    # -- the steps ---------------------------------------------------------------------------------------

    def draw_world(self) -> None:
        """Image files and a pairs.parquet of their URLs."""
        with self.step("world") as figures:
            pairs = self.world / "pairs.parquet"
            if pairs.exists():
                return
            self.world.mkdir(parents=True, exist_ok=True)
            with FileServer(self.world, 0) as server:
                self.state["port"] = server.port
            rows: dict[str, list[str]] = {"url": [], "caption": []}
            base = f"http://{HOST}:{self.state['port']}"
            with Progress("world", self.config.pairs, "pictures") as progress:
                for i, (_, caption, png) in enumerate(world.training_pairs(self.config.pairs, self.config.seed)):
                    name = f"{i // 1000:04d}/{i:06d}.png"
                    if i % 1000 == 0:
                        (self.world / name).parent.mkdir(exist_ok=True)
                        progress.at(i)
                    (self.world / name).write_bytes(png)
                    rows["url"].append(f"{base}/{name}")
                    rows["caption"].append(caption)
            aside = self.world / ".pairs.parquet"
            pq.write_table(pa.table(rows), aside)
            aside.replace(pairs)
            figures["pairs"] = self.config.pairs

    def download(self) -> None:
        with self.step("download") as figures, FileServer(self.world, self.state["port"]):
            config = DownloadConfig(
                workspace=str(self.workspace.root),
                pairs=(str(self.world / "pairs.parquet"),),
                allow_hosts=(f"{HOST}:{self.state['port']}",),
                image_size=world.IMAGE_SIZE,
                format="png",
                quality=1,
                shard_size=2000,
                retry_delay=0,
            )
            figures.update(self._job("download", config, download.run))

    def train_clip(self) -> None:
        with self.step("train clip") as figures:
            config = settings.clip(self.config, str(self.workspace.root), self.root)
            figures.update(self._job("train clip", config, partial(train.run, "clip")))

    def embed(self) -> None:
        with self.step("embed") as figures:
            config = EmbedConfig(workspace=str(self.workspace.root), encoder=settings.NAME, batch_size=256)
            figures.update(self._job("embed", config, embed.run))

    def index(self) -> None:
        with self.step("index") as figures:
            figures.update(self._job("index", IndexConfig(workspace=str(self.workspace.root)), index.run))

    def query(self) -> None:
        """A few texts with their nearest pictures."""
        with self.step("query") as figures:
            if figures:
                return
            texts = [world.prompts(kind, 1, self.config.seed + 7)[0] for kind in judge.KINDS][:_QUERIES]
            results = []
            for text in texts:
                config = QueryConfig(workspace=str(self.workspace.root), text=text, k=8)
                results.append(
                    {"text": text, "results": execute("query", config, query.run, self.engine).figures["results"]}
                )
            figures["queries"] = results

    def train_prior_and_decoder(self) -> None:
        """Side by side: one core each."""
        with self.step("train prior and decoder") as figures:
            root, pace = str(self.workspace.root), self._pace()
            jobs = {
                "prior": settings.prior(self.config, root, pace),
                "decoder": settings.decoder(self.config, root, pace),
            }
            if any(not (self.workspace.model_dir(k, settings.NAME) / "card.json").exists() for k in jobs):
                # Here, not in a thread of the pool: the kernel ends Ray with the thread that started it.
                self.engine.start()
            with ThreadPoolExecutor(len(jobs)) as pool:
                futures = {
                    kind: pool.submit(self._job, f"train {kind}", config, partial(train.run, kind))
                    for kind, config in jobs.items()
                }
                figures.update({kind: future.result() for kind, future in futures.items()})

    def _pace(self) -> float:
        """Share of the planned steps of prior and decoder that this machine has time for; settled once."""
        if "pace" not in self.state:
            clip = self.state["figures"]["job train clip"]
            left = 60 * self.config.minutes - sum(self.state["seconds"].values()) - _AFTERWARDS
            self.state["pace"] = settings.affordable(
                self.config, clip["seconds"].get("train", 0.0) / clip["step"], left
            )
            self._save_state()
        return float(self.state["pace"])

    def prompts(self) -> dict[str, list[str]]:
        """The prompts of each kind, canonical captions."""
        return {kind: world.prompts(kind, self.config.prompts, self.config.seed + 11) for kind in judge.KINDS}

    def generate(self) -> None:
        with self.step("generate") as figures:
            path = self.root / "prompts.txt"
            path.write_text("".join(f"{p}\n" for texts in self.prompts().values() for p in texts))
            figures.update(self._job("generate", self._generate_config(), generate.run))

    def _generate_config(self) -> GenerateConfig:
        n = self.config.candidates
        return GenerateConfig(
            workspace=str(self.workspace.root),
            prompts=str(self.root / "prompts.txt"),
            candidates=n,
            keep=n,
            seed=self.config.seed + _SAMPLE_SEED,
            batch_size=64,
        )

    def evaluate(self) -> None:
        """The evaluate job, then what only the demo can judge."""
        with self.step("evaluate") as figures:
            if figures:
                return
            root = str(self.workspace.root)
            figures["job"] = execute("evaluate", EvaluateConfig(workspace=root), evaluate.run, self.engine).figures[
                "metrics"
            ]
            encoder = load_encoder(self.workspace, settings.NAME)
            figures["clip"] = judge.clip_recall(encoder, 1000, _TEST_SEED)
            figures["probe"] = judge.probe(encoder, 8000, _TEST_SEED)
            rows = self.candidates()
            figures["generation"] = judge.generation(rows, self.prompts(), self.config.candidates)

    def candidates(self) -> list[dict[str, Any]]:
        """All candidates of the demo's prompts with their pictures and verdicts."""
        config = self._generate_config()
        plan = generate.make_plan(config, self.workspace)
        rows = generate.kept_rows(config, self.workspace, plan, [p for ps in self.prompts().values() for p in ps])
        for row in rows:
            verdict = judge.verdict(row["image"], row["prompt"])
            row |= {"core": verdict.core, "ok": verdict.ok}
        return rows

    def finish(self) -> dict[str, Any]:
        """Write demo.json and the page."""
        seconds = self.state["seconds"]
        # Through JSON, so that a first run and a restart give the same keys.
        figures = json.loads(json.dumps(self.state["figures"], default=str))
        result = {
            "workspace": str(self.workspace.root),
            "page": str(self.report / "index.html"),
            "minutes": sum(seconds.values()) / 60,
            "seconds": seconds,
            "settings": self.state["settings"],
            "pace": self.state["pace"],
            "counts": {
                name: self.workspace.table(name).count() for name in ("pairs", "images", "embeddings", "candidates")
            },
            "metrics": {
                **figures["evaluate"],
                "index": {k: v for k, v in figures["index"].items() if k not in ("counts", "seconds", "run")},
                "images_per_second": figures["generate"].get("images_per_second"),
                "embedded_per_second": figures["embed"].get("pairs_per_second"),
                "prior": figures["evaluate"]["job"]["prior"][settings.NAME],
            },
        }
        (self.root / "demo.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
        with Run(self.workspace, "demo", self.config) as run:
            view = View(self.config, run, figures, self.prompts(), self.candidates())
            write_page(self.report / "index.html", result, view)
        return result


def summary(result: dict[str, Any]) -> RichTable:
    """The table that ends the demo."""
    n = str(result["settings"]["candidates"])
    table = RichTable("prompts", "n", "@1", f"best of {n}", f"oracle of {n}", box=None)
    for kind, g in result["metrics"]["generation"].items():
        best, oracle = g["best_of"][n], g["oracle"][n]
        name = judge.KINDS[kind]
        table.add_row(name, str(g["prompts"]), f"{g['at_1']:.2f}", f"{best:.2f}", f"{oracle:.2f}")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill demo``. Exit status: 0 done, 1 failed, 2 usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        config, as_json = load(DemoConfig, arguments, os.environ, "clipmill demo")
        with Engine(config.address) as engine:
            result = run(config, engine)
    except ClipmillError as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr)
        return exc.exit_status
    except KeyboardInterrupt:
        print("interrupted: what is done is kept, run the same command to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    metrics, console = result["metrics"], Console(stderr=True, highlight=False)
    console.print(summary(result))
    prior = metrics["prior"]
    console.print(
        f"CLIP R@1 of 1,000: {metrics['clip']['text_to_image_r@1']:.3f}   probe, all attributes: "
        f"{metrics['probe']['all_right']:.3f}\nprior cosine: {prior['cosine']:.3f} raw "
        f"(text {prior['cosine_text']:.3f}), "
        f"{prior['whitened']:.3f} whitened (text {prior['whitened_text']:.3f})\n"
        f"{result['minutes']:.1f} minutes   page: {result['page']}"
    )
    if as_json:
        done = {"job": "demo", "run": None, "outcome": "done", "outputs": {"page": result["page"]}}
        print(json.dumps(done | result, default=str))
    return 0


def run(config: DemoConfig, engine: Engine) -> dict[str, Any]:
    """All steps in order; what is done already costs next to nothing."""
    demo = Demo(config, engine)
    demo.workspace.prepare()
    for step in (
        demo.draw_world, demo.download, demo.train_clip, demo.embed, demo.index, demo.query,
        demo.train_prior_and_decoder, demo.generate, demo.evaluate,
    ):  # fmt: skip
        step()
    return demo.finish()

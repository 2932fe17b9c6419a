"""generate: prompts -> N candidates each, ranked with CLIP, the best K kept with their pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.base import command
from jobs.prompts import read_texts
from pipeline.encoders import encoder_of, load_encoder
from pipeline.engine import Engine, Quarantined, Resources
from pipeline.ledger import Run
from pipeline.progress import Progress
from pipeline.sheets import contact_sheet
from pipeline.tables import Part
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard, ModelCard
from schemas.configs import GenerateConfig
from schemas.errors import CardError, ClipmillError, UsageError
from schemas.keys import prompt_key
from schemas.tables import CANDIDATES, RANKINGS


@dataclass(frozen=True)
class Plan:
    """What is generated with: the cards of the models, and the sampling settings."""

    prior: ModelCard
    decoder: ModelCard
    steps: int
    guidance: float
    prior_steps: int
    blur: float
    ranker: str

    @property
    def encoder(self) -> EncoderCard:
        if self.decoder.encoder is None:
            raise CardError(f"the decoder {self.decoder.name} names no encoder")
        return self.decoder.encoder

    @property
    def sampling(self) -> str:
        """The column that keeps candidates of other settings apart."""
        return f"steps={self.steps} guidance={self.guidance:g} prior_steps={self.prior_steps} blur={self.blur:g}"


class Worker:
    """Draws and ranks all candidates of a shard's prompts; writes both parts."""

    def __init__(self, config: GenerateConfig, plan: Plan, run: str) -> None:
        from pipeline.generate import GenerateStage, Sampling
        from pipeline.models.encoder import pick_device
        from pipeline.models.store import load_decoder, load_prior

        self.config, self.plan, self.run = config, plan, run
        self.workspace = Workspace(config.workspace)
        encoder, device = encoder_of(self.workspace, plan.encoder), pick_device()
        prior = load_prior(plan.prior, self._weights(plan.prior), device)
        decoder = load_decoder(plan.decoder, self._weights(plan.decoder), device)
        sampling = Sampling(plan.steps, plan.guidance, plan.prior_steps, plan.blur)
        self.ranker = encoder if config.encoder is None else load_encoder(self.workspace, config.encoder)
        self.stage = GenerateStage(encoder, prior, decoder, sampling, config.batch_size)

    def _weights(self, card: ModelCard) -> bytes:
        return bytes((self.workspace.model_dir(card.kind, card.name) / "model.safetensors").read_bytes())

    def __call__(self, prompts: list[str]) -> tuple[Part, Part]:
        from pipeline.generate import to_png
        from pipeline.rerank import clip_scores, ranks

        n, keep = self.config.candidates, self.config.keep
        each = [p for p in prompts for _ in range(n)]
        numbers = list(range(n)) * len(prompts)
        pictures = [to_png(p) for p in self.stage(each, numbers, self.config.seed)]
        size = self.config.batch_size
        scores = clip_scores(self.ranker.images(pictures, size), self.ranker.texts(each, size))
        rank = np.concatenate([ranks(scores[i : i + n]) for i in range(0, len(each), n)])
        kept = rank <= keep
        count = len(each)
        columns: dict[str, Any] = {
            "prompt_key": [prompt_key(p) for p in each],
            "prompt": each,
            "number": numbers,
            "seed": [self.config.seed] * count,
            "clip_score": scores,
            "rank": rank,
            "kept": kept,
            "image": [picture if k else None for picture, k in zip(pictures, kept, strict=True)],
            "prior": [self.plan.prior.id] * count,
            "decoder": [self.plan.decoder.id] * count,
            "encoder": [self.ranker.card.id] * count,
            "sampling": [self.plan.sampling] * count,
            "run": [self.run] * count,
        }
        rows = CANDIDATES.conform(pa.table(columns))
        return (
            self.workspace.table("candidates").write_part(rows),
            self.workspace.table("rankings").write_part(rows.select(RANKINGS.schema.names)),
        )


def run(config: GenerateConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`GenerateConfig`."""
    workspace = run.workspace.require()
    if not config.prompts:
        raise UsageError("--prompts is required", remedy="a text file with one prompt a line will do")
    with run.stage("plan"):
        prompts = list(dict.fromkeys(read_texts(config.prompts, config.prompt_col)))
        plan = make_plan(config, workspace)
        finished = _finished(config, workspace, plan)
        missing = [p for p in prompts if prompt_key(p) not in finished]
    run.encoder = plan.ranker
    run.counts["in"] = len(missing) * config.candidates
    shards = [missing[i : i + config.shard_size] for i in range(0, len(missing), config.shard_size)]
    quarantined: list[str] = []
    resources = Resources(workers=config.workers, gpus=config.gpus_per_worker)
    with run.stage("generate"), Progress("generate", run.counts["in"], "images") as progress:
        for outcome in engine.map(partial(Worker, config, plan, run.id), shards, resources):
            count = len(outcome.shard) * config.candidates
            if isinstance(outcome, Quarantined):
                quarantined.append(outcome.reason)
                run.counts["failed"] += count
                continue
            candidates, rankings = outcome.result
            # Rankings first: a prompt counts as finished by its candidates.
            run.commit("rankings", [rankings])
            run.commit("candidates", [candidates])
            run.counts["out"] += count
            progress.advance(count, failed=run.counts["failed"])
    run.figures |= {
        "prompts": len(prompts), "sampling": plan.sampling, "prior": plan.prior.id, "decoder": plan.decoder.id,
        "encoder": plan.ranker, "images_per_second": run.counts["out"] / max(run.seconds["generate"], 1e-9),
        "quarantined": quarantined,
    }  # fmt: skip
    run.outputs |= {t: workspace.table(t).uri for t in ("candidates", "rankings")}
    if config.sheet:
        write_sheet(config, run, plan, prompts)
    if quarantined:
        raise ClipmillError(
            f"{len(quarantined)} shards failed on every try",
            actual=quarantined[-1],
            remedy="run the same command again: only missing prompts are drawn",
        )


def make_plan(config: GenerateConfig, workspace: Workspace) -> Plan:
    """The models and settings that a config means.

    Raises:
        UsageError: a model is missing or ambiguous.
        EncoderMismatch: prior and decoder were trained on vectors of different encoders.
    """
    prior, decoder = workspace.model("prior", config.prior), workspace.model("decoder", config.decoder)
    if prior.encoder is None or decoder.encoder is None:
        raise CardError("prior or decoder names no encoder")
    decoder.encoder.require(prior.encoder, f"the prior {prior.name} (beside the decoder {decoder.name})")
    own = decoder.config
    ranker = decoder.encoder.id if config.encoder is None else load_encoder(workspace, config.encoder).card.id
    return Plan(
        prior=prior,
        decoder=decoder,
        steps=config.steps or int(own["sample_steps"]),
        guidance=config.guidance if config.guidance is not None else float(own["guidance"]),
        prior_steps=int(prior.config["sample_steps"]),
        blur=float(own["blur"]),
        ranker=ranker,
    )


def _made_by(config: GenerateConfig, plan: Plan) -> pc.Expression:
    """Rows of exactly these models and settings."""
    return (
        (pc.field("seed") == config.seed)
        & (pc.field("prior") == plan.prior.id)
        & (pc.field("decoder") == plan.decoder.id)
        & (pc.field("encoder") == plan.ranker)
        & (pc.field("sampling") == plan.sampling)
    )


def _finished(config: GenerateConfig, workspace: Workspace, plan: Plan) -> set[int]:
    """Keys of prompts that have all their candidates.

    Raises:
        UsageError: they have another number of candidates, or of kept ones.
    """
    rows = workspace.table("candidates").read(["prompt_key", "kept"], _made_by(config, plan))
    counts = rows.group_by("prompt_key").aggregate([("kept", "count"), ("kept", "sum")]).to_pylist()
    other = [c for c in counts if (c["kept_count"], c["kept_sum"]) != (config.candidates, config.keep)]
    if other:
        raise UsageError(
            "these prompts have candidates of this seed already, in another number",
            expected=f"{config.candidates} candidates, {config.keep} kept",
            actual=f"{other[0]['kept_count']} candidates, {other[0]['kept_sum']} kept",
            remedy="use another --seed, or the same numbers",
        )
    return {c["prompt_key"] for c in counts}


def kept_rows(config: GenerateConfig, workspace: Workspace, plan: Plan, prompts: list[str]) -> list[dict[str, Any]]:
    """Kept candidates of these prompts, in the prompts' order and by rank."""
    columns = ["prompt_key", "prompt", "number", "clip_score", "rank", "image"]
    rows = workspace.table("candidates").read(columns, _made_by(config, plan) & pc.field("kept")).to_pylist()
    place = {prompt: i for i, prompt in enumerate(prompts)}
    return sorted((r for r in rows if r["prompt"] in place), key=lambda r: (place[r["prompt"]], r["rank"]))


def write_sheet(config: GenerateConfig, run: Run, plan: Plan, prompts: list[str]) -> None:
    """The contact sheet of the kept candidates: a row a prompt, best first."""
    rows = kept_rows(config, run.workspace, plan, prompts)
    labels = [f"{r['clip_score']:.2f} {r['prompt']}" for r in rows]
    path = Path(str(config.sheet))
    path.write_bytes(contact_sheet([r["image"] for r in rows], labels, columns=config.keep))
    run.outputs["sheet"] = str(path)


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill generate``."""
    return command("generate", GenerateConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())

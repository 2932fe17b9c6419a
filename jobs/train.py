"""train clip | prior | decoder: from the tables to a model with its card, resumable at its checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs.audit import audit
from jobs.base import command, only_encoder
from pipeline.encoders import embedded_encoders, encoder_of, read_card
from pipeline.engine import Engine, Rank, Resources
from pipeline.ledger import Run
from pipeline.progress import Progress
from pipeline.storage import write_atomic
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard, ModelCard
from schemas.configs import ClipTrainConfig, DecoderTrainConfig, PriorTrainConfig, TrainConfig
from schemas.errors import NothingToDo, UsageError

Report = Callable[[dict[str, Any]], None]
START = "training.json"


@dataclass(frozen=True)
class Start:
    """What a training is pinned to from its first step: table versions and encoder."""

    versions: dict[str, int]
    encoder: EncoderCard | None

    def to_json(self) -> str:
        encoder = json.loads(self.encoder.to_json()) if self.encoder else None
        return json.dumps({"versions": self.versions, "encoder": encoder}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Start:
        loaded = json.loads(text)
        encoder = EncoderCard.model_validate(loaded["encoder"]) if loaded["encoder"] else None
        return cls(loaded["versions"], encoder)


@dataclass(frozen=True)
class Result:
    """What rank 0 sends back when it has written the weights."""

    weights_sha256: str
    network: dict[str, Any]
    metrics: dict[str, float]
    samples: int


def run(kind: str, config: TrainConfig, run: Run, engine: Engine) -> None:
    """The body of ``train KIND``."""
    from pipeline.training.loop import config_digest

    workspace = run.workspace.require()
    folder = workspace.model_dir(kind, config.name)
    digest = config_digest(config)
    if (folder / "card.json").exists():
        card = ModelCard.from_json((folder / "card.json").read_text(), str(folder / "card.json"))
        if card.config.get("digest") != digest:
            raise UsageError(
                f"there is a {kind} {config.name!r} already, trained with other settings",
                actual=str(folder),
                remedy="give the new one another --name, or delete that folder",
            )
        run.figures |= {"model": card.id, "metrics": card.metrics, "step": card.step}
        return
    workers = config.workers or 1
    if config.batch_size % workers:
        raise UsageError("--batch-size must be a multiple of --workers", actual=f"{config.batch_size} and {workers}")
    with run.stage("plan"):
        start = _start(kind, config, run)
    run.input_versions |= start.versions
    run.encoder = start.encoder.id if start.encoder else None
    run.begin()
    if isinstance(config, PriorTrainConfig | DecoderTrainConfig):
        audit(run, _encoder_card(start), config.audit)  # before anything is pinned to these versions
    write_atomic(folder / START, start.to_json().encode())
    resources = Resources(workers=workers, gpus=config.gpus_per_worker)
    with run.stage("train"), Progress(f"train {kind}", config.steps, "steps") as progress:

        def show(line: dict[str, Any]) -> None:
            if line:
                progress.at(int(line["step"]), loss=line["loss"])

        result = engine.train(partial(work, kind, config, start), resources, show)
    card = ModelCard(
        kind=kind,
        name=config.name,
        config=config.model_dump(mode="json", exclude={"workspace", "address"})
        | {"network": result.network, "digest": digest},
        step=config.steps,
        samples_seen=result.samples,
        metrics=result.metrics,
        table="images" if kind == "clip" else "embeddings",
        table_version=start.versions["images" if kind == "clip" else "embeddings"],
        weights_sha256=result.weights_sha256,
        encoder=_own_encoder(workspace, config.name) if kind == "clip" else start.encoder,
        run=run.id,
    )
    write_atomic(folder / "card.json", card.to_json().encode())
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    run.counts |= {"in": result.samples, "out": result.samples}
    run.figures |= {"model": card.id, "metrics": card.metrics, "step": card.step}
    run.outputs["model"] = str(folder)


def _start(kind: str, config: TrainConfig, run: Run) -> Start:
    """Where a killed training began, or the newest versions and the encoder that the config names."""
    path = run.workspace.model_dir(kind, config.name) / START
    if path.exists():
        return Start.from_json(path.read_text())
    if kind == "clip":
        version = run.reads("images")
        if version < 0:
            raise NothingToDo("there are no images to train on", remedy="clipmill download first")
        return Start({"images": version}, None)
    encoder = only_encoder(run, getattr(config, "encoder", None), embedded_encoders(run.workspace), "embeddings")
    versions = {"images": run.reads("images"), "embeddings": run.reads("embeddings")}
    return Start(versions, read_card(run.workspace, encoder))


def work(kind: str, config: Any, start: Start, rank: Rank, report: Report) -> Result:
    """One training worker, of any kind; rank 0 writes the weights."""
    from pipeline.training.loop import Place, fit, join_peers, leave_peers

    place = Place(rank.rank, rank.world, rank.address)
    join_peers(place, rank.gpu)
    try:
        task = _TASKS[kind](config, start, place.world)
        folder = Workspace(config.workspace).model_dir(kind, config.name)
        fitted = fit(task, config, folder, place, report, ema=getattr(config, "ema", 0.0))
        if place.rank:
            return Result("", {}, {}, 0)
        return _write(kind, config, fitted)
    finally:
        leave_peers(place)


def _clip_task(config: ClipTrainConfig, start: Start, world: int) -> Any:
    import open_clip

    from pipeline.models.encoder import read_model_config
    from pipeline.training.data import Pictures, held_out, read_pairs
    from pipeline.training.tasks import ClipTask

    rows = read_pairs(Workspace(config.workspace), start.versions["images"])
    rows = rows.filter(~held_out(rows["pair_key"].to_numpy(), config.held_out))
    network = read_model_config(config.model)
    text = network["model_cfg"]["text_cfg"]
    tokenizer = open_clip.SimpleTokenizer(context_length=text.get("context_length", 77))
    tokens = tokenizer(rows["caption"].to_pylist())
    pictures = Pictures(rows["image"], int(network["model_cfg"]["vision_cfg"]["image_size"]))
    return ClipTask(config, network, pictures, tokens, world)


def _prior_task(config: PriorTrainConfig, start: Start, world: int) -> Any:
    from pipeline.training.data import held_out, read_embeddings, vectors
    from pipeline.training.tasks import PriorTask

    workspace = Workspace(config.workspace)
    card = _encoder_card(start)
    rows = read_embeddings(workspace, card.id, start.versions["embeddings"], ["caption"])
    rows = rows.filter(~held_out(rows["pair_key"].to_numpy(), config.held_out))
    image, text = (vectors(rows, f"{m}_vec", card.dim) for m in ("image", "text"))
    return PriorTask(config, encoder_of(workspace, card), rows["caption"].to_pylist(), image, text)


def _decoder_task(config: DecoderTrainConfig, start: Start, world: int) -> Any:
    from pipeline.training.data import Pictures, held_out, read_embeddings, read_pairs, vectors
    from pipeline.training.tasks import DecoderTask

    workspace = Workspace(config.workspace)
    card = _encoder_card(start)
    rows = read_embeddings(workspace, card.id, start.versions["embeddings"])
    images = read_pairs(workspace, start.versions["images"])
    rows = rows.join(images.select(["pair_key", "image"]), "pair_key", join_type="inner").sort_by("pair_key")
    rows = rows.filter(~held_out(rows["pair_key"].to_numpy(), config.held_out))
    image, text = (vectors(rows, f"{m}_vec", card.dim) for m in ("image", "text"))
    network = config.network.model_copy(update={"embed_dim": card.dim})
    return DecoderTask(
        config.model_copy(update={"network": network}),
        Pictures(rows["image"], network.image_size),
        image,
        text,
    )


_TASKS: dict[str, Callable[[Any, Start, int], Any]] = {
    "clip": _clip_task,
    "prior": _prior_task,
    "decoder": _decoder_task,
}
CONFIGS: dict[str, type[TrainConfig]] = {
    "clip": ClipTrainConfig,
    "prior": PriorTrainConfig,
    "decoder": DecoderTrainConfig,
}


def _encoder_card(start: Start) -> EncoderCard:
    assert start.encoder is not None, "prior and decoder start from an encoder's embeddings"
    return start.encoder


def _write(kind: str, config: Any, fitted: Any) -> Result:
    from pipeline.models.encoder import read_model_config, weights_sha256
    from pipeline.models.store import to_bytes

    folder = Workspace(config.workspace).model_dir(kind, config.name)
    module = fitted.module.clip if kind == "clip" else fitted.module
    if kind == "clip":
        network = read_model_config(config.model)
        write_atomic(folder / "open_clip_config.json", json.dumps(network, indent=2).encode())
        write_atomic(folder / "open_clip_model.safetensors", to_bytes(module))
    else:
        network = module.config.as_dict()
        write_atomic(folder / "model.safetensors", to_bytes(module))
    lines = "".join(json.dumps(line) + "\n" for line in fitted.progress.history)
    write_atomic(folder / "metrics.jsonl", lines.encode())
    last = fitted.progress.history[-1] if fitted.progress.history else {}
    metrics = {name: value for name, value in last.items() if name != "step"}
    return Result(weights_sha256(module), network, metrics, fitted.samples)


def _own_encoder(workspace: Workspace, name: str) -> EncoderCard:
    """The card of a CLIP just trained, from what really loads."""
    from pipeline.encoders import local_folder
    from pipeline.models.encoder import Encoder

    return Encoder(f"local-dir:{local_folder(str(workspace.model_dir('clip', name)))}", name=name).card


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill train KIND``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in CONFIGS:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        usage = f"usage: clipmill train {{{','.join(CONFIGS)}}} [options]"
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    kind = arguments[0]
    return command(f"train {kind}", CONFIGS[kind], partial(run, kind), arguments[1:])


if __name__ == "__main__":
    sys.exit(main())

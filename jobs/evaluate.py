"""evaluate: what a workspace's encoder, prior, index and candidates reach, on held-out pairs; a report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.base import command, only_encoder
from pipeline.encoders import embedded_encoders, encoder_of, read_card
from pipeline.engine import Engine
from pipeline.evaluate import (
    NO_LABEL,
    SEVERAL_LABELS,
    LabelFinder,
    ZeroShotScores,
    best_of,
    cosine,
    powers,
    retrieval,
)
from pipeline.ledger import Run
from pipeline.plots import Axes, lines, matrix
from pipeline.storage import write_atomic
from schemas.cards import EncoderCard
from schemas.configs import EvaluateConfig, TrainConfig
from schemas.errors import UsageError
from schemas.vectors import normalise, unpack

_SHARE = float(TrainConfig.model_fields["held_out"].default)


def run(config: EvaluateConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`EvaluateConfig`."""
    workspace = run.workspace.require()
    if (config.templates or config.label_col) and not config.zero_shot:
        raise UsageError("--templates and --label-col are for --zero-shot", remedy="add --zero-shot LABELS.txt")
    encoder = only_encoder(run, config.encoder, embedded_encoders(workspace), "embeddings")
    card = read_card(workspace, encoder)
    run.encoder = encoder
    run.reads("embeddings")
    rows = _held_out(config, run, card)
    run.counts |= {"in": rows.num_rows, "out": rows.num_rows}
    image, text = (unpack(rows[f"{m}_vec"], card.dim).astype(np.float32) for m in ("image", "text"))
    metrics: dict[str, Any] = {"pairs": rows.num_rows}
    with run.stage("retrieval"):
        metrics["text_to_image"] = retrieval(text, image)
        metrics["image_to_text"] = retrieval(image, text)
    with run.stage("prior"):
        if priors := [p for p in workspace.models("prior") if p.encoder and p.encoder.id == encoder]:
            metrics["prior"] = {p.name: _prior(run, p.name, card, rows, image, text) for p in priors}
    plots: dict[str, bytes] = {}
    if config.zero_shot:
        with run.stage("zero_shot"):
            metrics["zero_shot"], plots["zero-shot"] = _zero_shot(config, run, card)
    if published := workspace.published_index(encoder):
        metrics["index"] = {f.modality: f.model_dump(include=_INDEX) for f in published.files}
    with run.stage("generation"):
        metrics["generation"] = generation = _generation(run)
    run.begin()
    folder = workspace.reports_dir(run.id)
    write_atomic(folder / "metrics.json", json.dumps(metrics, indent=2).encode())
    for name, curves in _training(run).items():
        plots[f"train-{name}"] = lines(curves, Axes(f"training {name}", "step", "loss", log_y=True))
    if generation:
        curve = {float(n): v for n, v in generation["best_of"].items()}
        axes = Axes("CLIP score of the best of N", "candidates N", "CLIP score", ticks=tuple(curve))
        plots["best-of-n"] = lines({"best": (list(curve), list(curve.values()))}, axes)
    for name, plot in plots.items():
        write_atomic(folder / f"{name}.png", plot)
    run.figures["metrics"] = metrics
    run.outputs["report"] = str(folder)


_INDEX = {"factory", "count", "bytes", "recall_at_1", "recall_at_10", "ms_per_query"}


def _held_out(config: EvaluateConfig, run: Run, card: EncoderCard) -> pa.Table:
    """A seeded sample of the pairs that training keeps apart; of all pairs where those are too few."""
    from pipeline.training.data import held_out, read_embeddings

    rows = read_embeddings(run.workspace, card.id, run.input_versions["embeddings"], ["caption"])
    apart = held_out(rows["pair_key"].to_numpy(), _share(run))
    if apart.sum() >= 10:
        rows = rows.filter(pa.array(apart))
    chosen = np.random.default_rng(config.seed).permutation(rows.num_rows)[: config.sample]
    return rows.take(pa.array(np.sort(chosen)))


def _share(run: Run) -> float:
    """Of the pairs that the workspace's CLIPs were not trained on."""
    return float(min([c.config.get("held_out", _SHARE) for c in run.workspace.models("clip")] or [_SHARE]))


def _prior(
    run: Run, name: str, card: EncoderCard, rows: pa.Table, image: NDArray[np.float32], text: NDArray[np.float32]
) -> dict[str, float]:
    """Cosines of the prior's embeddings with the true ones, raw and whitened, beside three baselines."""
    import torch

    from pipeline.models.store import load_prior

    model_card = run.workspace.model("prior", name)
    weights = (run.workspace.model_dir("prior", name) / "model.safetensors").read_bytes()
    encoder = encoder_of(run.workspace, card)
    prior = load_prior(model_card, weights, encoder.device)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    steps = int(model_card.config["sample_steps"])
    captions, parts = rows["caption"].to_pylist(), []
    for i in range(0, len(captions), 256):
        states = encoder.states(captions[i : i + 256])
        parts.append(prior.sample(*states, noise[i : i + 256].to(encoder.device), steps).cpu())
    predicted = torch.cat(parts).numpy()

    def whiten(x: NDArray[np.float32]) -> NDArray[np.float32]:
        whitened: NDArray[np.float32] = prior.image_whitening.cpu()(torch.from_numpy(x)).numpy()
        return whitened

    shuffled = np.roll(predicted, 1, axis=0)
    mean = np.broadcast_to(image.mean(0), image.shape)
    return {
        "cosine": cosine(predicted, image),
        "cosine_text": cosine(text, image),
        "cosine_shuffled": cosine(shuffled, image),
        "cosine_mean": cosine(mean, image),
        "whitened": cosine(whiten(predicted), whiten(image)),
        "whitened_text": cosine(whiten(text), whiten(image)),
        "whitened_shuffled": cosine(whiten(shuffled), whiten(image)),
        "r@1": retrieval(predicted, image)["r@1"],
    }


def _zero_shot(config: EvaluateConfig, run: Run, card: EncoderCard) -> tuple[dict[str, Any], bytes]:
    """Accuracy over all embedded rows whose label is known (of a CLIP trained here: those kept apart), and a plot.

    Raises:
        UsageError: no row's label is known.
    """
    from pipeline.models.zero_shot import ZeroShot
    from pipeline.training.data import held_out

    model = ZeroShot.load(encoder_of(run.workspace, card), config.zero_shot or "", config.templates)
    truth, scores = _truth(config, run, model.labels), ZeroShotScores(model.labels)
    share = _share(run) if card.id in {c.encoder.id for c in run.workspace.models("clip") if c.encoder} else 1.0
    unknown = {NO_LABEL: 0, SEVERAL_LABELS: 0}
    columns = ("pair_key", "encoder", "image_vec", "caption")
    for batch in run.workspace.table("embeddings").batches(columns, run.input_versions["embeddings"]):
        own = pc.and_(pc.equal(batch.column("encoder"), card.id), batch.column("image_vec").is_valid())
        rows = batch.filter(own)
        rows = rows.filter(pa.array(held_out(rows.column("pair_key").to_numpy(), share)))
        true = truth(rows)
        for reason in unknown:
            unknown[reason] += int((true == reason).sum())
        known = np.flatnonzero(true >= 0)
        vectors = unpack(rows.column("image_vec"), card.dim)
        for part in np.array_split(known, len(known) // _BLOCK + 1):
            scores.add(true[part], model.probabilities(normalise(vectors[part])))
    found = {"labels": len(model.labels), "without_label": unknown[NO_LABEL], "several_labels": unknown[SEVERAL_LABELS]}
    if scores.rows == 0:
        place = f"column {config.label_col!r} of the list" if config.label_col else "captions"
        raise UsageError(
            "no row's label is known, so there is no zero-shot accuracy to measure",
            expected=f"labels of {config.zero_shot} in {place}",
            actual=f"{found['without_label']} rows with none, {found['several_labels']} with several",
            remedy="name the list's column with the labels: --label-col (download keeps it with --extra-cols)",
        )
    names, shares = scores.confusion(_CONFUSION)
    return found | scores.metrics(), matrix(
        shares, names, Axes("zero-shot: % of each label's images", "answer", "true")
    )


_BLOCK = 8192
"""Images classified at once."""
_CONFUSION = 20
"""Labels in the picture of the confusion matrix."""

Truth = Callable[[pa.RecordBatch], NDArray[np.int64]]


def _truth(config: EvaluateConfig, run: Run, labels: Sequence[str]) -> Truth:
    """(pair_key, caption) -> number of the true label; NO_LABEL or SEVERAL_LABELS where it is not known."""
    if config.label_col is None:
        find = LabelFinder(labels)
        return lambda rows: np.array([find(text or "") for text in rows.column("caption").to_pylist()], np.int64)
    keys, numbers = _listed_labels(run, config.label_col, labels)

    def look_up(rows: pa.RecordBatch) -> NDArray[np.int64]:
        wanted = rows.column("pair_key").to_numpy()
        place = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        found = keys[place] == wanted if len(keys) else np.zeros(len(wanted), np.bool_)
        return np.where(found, numbers[place] if len(keys) else 0, NO_LABEL)

    return look_up


def _listed_labels(run: Run, column: str, labels: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys, ascending, and the number of the label that the list has for each; only what is one of the labels."""
    number = {label.casefold(): i for i, label in enumerate(labels)}
    keys, numbers = [], []
    for batch in run.workspace.table("pairs").batches(("pair_key", "extra"), run.reads("pairs")):
        for key, extra in zip(batch.column("pair_key").to_pylist(), batch.column("extra").to_pylist(), strict=True):
            value = json.loads(extra).get(column) if extra else None
            found = number.get(" ".join(str(value).split()).casefold()) if value is not None else None
            if found is not None:
                keys.append(key)
                numbers.append(found)
    order = np.argsort(np.array(keys, np.int64))
    return np.array(keys, np.int64)[order], np.array(numbers, np.int64)[order]


def _generation(run: Run) -> dict[str, Any]:
    """The best-of-N curve of the CLIP score over all prompts of the newest run that generated."""
    rows = run.workspace.table("rankings").read(["prompt_key", "number", "clip_score", "run"])
    if rows.num_rows == 0:
        return {}
    newest = max(rows["run"].to_pylist())
    rows = rows.filter(pc.field("run") == newest).sort_by([("prompt_key", "ascending"), ("number", "ascending")])
    prompts = len(pc.unique(rows["prompt_key"]))
    if rows.num_rows % prompts:
        return {}
    scores = rows["clip_score"].to_numpy().reshape(prompts, -1)  # [P, N]
    curve = best_of(scores, scores, powers(scores.shape[1]))
    return {"run": newest, "prompts": prompts, "candidates": scores.shape[1], "best_of": curve}


def _training(run: Run) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Loss curves of all models, by kind."""
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for kind in ("clip", "prior", "decoder"):
        for card in run.workspace.models(kind):
            history = read_history(run, kind, card.name)
            curve = [h["step"] for h in history], [h["loss"] for h in history]
            found.setdefault(kind, {})[card.name] = curve
    return found


def read_history(run: Run, kind: str, name: str) -> list[dict[str, float]]:
    """The lines of a model's metrics.jsonl."""
    path = run.workspace.model_dir(kind, name) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill evaluate``."""
    return command("evaluate", EvaluateConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())

"""How well does the demo's chain draw? Trains CLIP, prior and decoder on rendered pairs, and judges.

    python benchmarks/demo_quality.py clip --name a --set decorrelation=0.3 steps=1000
    python benchmarks/demo_quality.py prior --clip a --name a
    python benchmarks/demo_quality.py decoder --clip a --name a
    python benchmarks/demo_quality.py evaluate --clip a --prior a --decoder a --prompt-seed 1

Every command is one process with one thread; run two side by side on two cores. Weights and logs go
to --out (default: $TMPDIR/clipmill-exp), so experiments on later stages reuse an earlier CLIP.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.demo import checker, recipe, world
from pipeline.models.clip import (
    OrderedPairs,
    SpanSwaps,
    build_clip,
    contrastive_loss,
    decorrelation_loss,
    text_states,
)
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.optim import Optimizers, averaged, schedule, step_generator
from pipeline.models.prior import DiffusionPrior, PriorConfig
from pipeline.models.probe import probe_accuracy

Settings = dict[str, Any]


def say(**fields: Any) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()}), flush=True)


def tokenize(captions: list[str]) -> Tensor:
    return open_clip.SimpleTokenizer(context_length=recipe.CONTEXT_LENGTH)(captions)


def to_input(pictures: np.ndarray) -> Tensor:
    """uint8 [N, 32, 32, 3] -> [N, 3, 32, 32] in [-1, 1]"""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


class Data:
    """Rendered pairs of a seed, kept on disk."""

    def __init__(self, out: Path, n: int, seed: int) -> None:
        file = out / f"data-{n}-{seed}.npz"
        if not file.exists():
            scenes = list(world.training_scenes(n, seed))
            temporary = file.with_name(f"{time.time_ns()}.npz")
            np.savez(
                temporary,
                pictures=np.stack([world.pixels(s) for s, _ in scenes]),
                tokens=tokenize([c for _, c in scenes]).numpy(),
                labels=np.array([world.attributes(s) for s, _ in scenes]),
            )
            temporary.rename(file)
        with np.load(file) as z:
            self.pictures, labels, tokens = z["pictures"], z["labels"], z["tokens"]
        self.tokens, self.labels = torch.from_numpy(tokens), torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, step: int, batch: int, seed: int) -> Tensor:
        """The rows of a step: every epoch is a new permutation."""
        each = len(self) // batch
        order = torch.randperm(len(self), generator=step_generator(seed, step // each, 99))
        return order[(step % each) * batch :][:batch]


# ---- training ------------------------------------------------------------------------------------


def train_clip(data: Data, g: Settings, seed: int, log: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = json.loads(json.dumps(recipe.CLIP_CONFIG))
    for key, value in g.items():
        tower, _, name = key.partition(".")
        if name:
            config[f"{tower}_cfg"][name] = value
    config["embed_dim"] = g.get("embed_dim", config["embed_dim"])
    model = build_clip(config)
    model.config = config  # type: ignore[assignment]
    if g.get("std"):
        nn.init.normal_(model.token_embedding.weight, std=g["std"])
        nn.init.normal_(model.positional_embedding, std=g["std"])
    pairs = OrderedPairs(data.tokens, config["embed_dim"], classes=g.get("classes", 2048))
    model.pairs = pairs  # type: ignore[assignment]
    optimizer = Optimizers(model, lr=g["lr"], muon_lr=g["muon_lr"], weight_decay=g["weight_decay"])
    swaps = SpanSwaps(data.tokens)
    ema = averaged(model, g["ema"]) if g.get("ema") else None
    start = time.process_time()
    order: Tensor | None = None
    for step in range(g["steps"]):
        rows = data.rows(step, g["batch"], seed)
        tokens = data.tokens[rows]
        image = model.encode_image(to_input(data.pictures[rows.numpy()]), normalize=True)
        if g["negatives"]:
            false, found = swaps(tokens, step_generator(seed, step, 1))
            false = false[found][: int(g["negatives"] * g["batch"])]
            both = model.encode_text(torch.cat([tokens, false]), normalize=True)
            text, negatives = both[: len(tokens)], both[len(tokens) :]
        else:
            text, negatives = model.encode_text(tokens, normalize=True), None
        scale = model.logit_scale.exp().clamp(max=100)
        contrast = contrastive_loss(image, text, scale, negatives=negatives)
        spread = decorrelation_loss(image) + decorrelation_loss(text)
        ramp = min((step + 1) / g["decorrelation_ramp"], 1) if g["decorrelation_ramp"] else 1
        loss = contrast + g["decorrelation"] * ramp * spread
        if g.get("pairs"):
            targets = pairs.targets(tokens)
            told = (pairs.loss(image, targets), pairs.loss(text, targets))
            loss = loss + g["pairs"] * (told[0] + told[1]) / 2
        loss.backward()
        optimizer.step(schedule(step, steps=g["steps"], warmup=g["warmup"]))
        if ema:
            ema.update_parameters(model)
        if step % 100 == 99:
            model.eval()
            with torch.no_grad():
                order = order_accuracy(model, "trained")
            model.train()
            extra = {"pairs_image": told[0].item(), "pairs_text": told[1].item()} if g.get("pairs") else {}
            log(
                order=order,
                **extra,
                step=step + 1,
                loss=loss.item(),
                contrast=contrast.item(),
                spread=spread.item(),
                scale=scale.item(),
                cpu=time.process_time() - start,
            )
    log(cpu_per_step=(time.process_time() - start) / g["steps"])
    if ema:
        ema.module.config = config
        del ema.module.pairs
        return ema.module.eval()
    del model.pairs
    return model.eval()


def order_accuracy(clip: Any, kind: Any, n: int = 200) -> float:
    """How often a picture of two objects is nearer to its caption than to that with them swapped."""
    scenes = [s for s in world.prompt_scenes(kind, n, 11) if s.relation]
    pictures = to_input(np.stack([world.pixels(s) for s in scenes]))
    swapped = [replace(s, objects=s.objects[::-1]) for s in scenes]
    a = clip.encode_image(pictures, normalize=True)
    b = clip.encode_text(tokenize([world.canonical_caption(s) for s in scenes]), normalize=True)
    c = clip.encode_text(tokenize([world.canonical_caption(s) for s in swapped]), normalize=True)
    return float(((a * b).sum(1) > (a * c).sum(1)).float().mean())


@torch.no_grad()
def embed(clip: Any, data: Data, states: bool = False) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {"image": [], "text": [], "states": [], "mask": []}
    for rows in torch.arange(len(data)).split(500):
        parts["image"].append(clip.encode_image(to_input(data.pictures[rows.numpy()]), normalize=True))
        text, hidden, mask = text_states(clip, data.tokens[rows])
        parts["text"].append(text)
        if states:
            parts["states"].append(hidden.half())
            parts["mask"].append(mask)
    return {k: torch.cat(v) for k, v in parts.items() if v}


def config_settings(g: Settings) -> Settings:
    """The settings `config.NAME=value` of a network."""
    return {k.removeprefix("config."): v for k, v in g.items() if k.startswith("config.")}


def train_prior(data: Data, e: dict[str, Tensor], g: Settings, seed: int, log: Any) -> DiffusionPrior:
    torch.manual_seed(seed)
    sizes = {"embed_dim": e["image"].shape[1], "state_dim": e["states"].shape[2]}
    config = recipe.PRIOR_CONFIG.model_copy(update=sizes | config_settings(g))
    model = DiffusionPrior(config)
    model.fit_whitening(e["image"], e["text"], g["whitening_floor"])
    optimizer = Optimizers(model, lr=g["lr"], muon_lr=g["muon_lr"], weight_decay=g["weight_decay"])
    ema = averaged(model, g["ema"])
    start = time.process_time()
    total = 0.0
    for step in range(g["steps"]):
        rows = data.rows(step, g["batch"], seed)
        loss = model.loss(
            e["image"][rows], e["text"][rows], e["states"][rows].float(), e["mask"][rows], step_generator(seed, step, 2)
        )
        loss.backward()
        optimizer.step(schedule(step, steps=g["steps"], warmup=g["warmup"]))
        ema.update_parameters(model)
        total += loss.item()
        if step % 200 == 199:
            log(step=step + 1, loss=total / 200, cpu=time.process_time() - start)
            total = 0.0
    log(cpu_per_step=(time.process_time() - start) / g["steps"])
    return ema.module.eval()


def train_decoder(data: Data, e: dict[str, Tensor], g: Settings, seed: int, log: Any) -> Decoder:
    torch.manual_seed(seed)
    config = recipe.DECODER_CONFIG.model_copy(update={"embed_dim": e["image"].shape[1]} | config_settings(g))
    model = Decoder(config)
    model.fit_whitening(e["image"], e["text"], g["whitening_floor"])
    optimizer = Optimizers(model, lr=g["lr"], muon_lr=g["muon_lr"], weight_decay=g["weight_decay"])
    ema = averaged(model, g["ema"])
    start = time.process_time()
    total = 0.0
    for step in range(g["steps"]):
        rows = data.rows(step, g["batch"], seed)
        loss = model.loss(
            to_input(data.pictures[rows.numpy()]), e["image"][rows], e["text"][rows], step_generator(seed, step, 3)
        )
        loss.backward()
        optimizer.step(schedule(step, steps=g["steps"], warmup=g["warmup"]))
        ema.update_parameters(model)
        total += loss.item()
        if step % 200 == 199:
            log(step=step + 1, loss=total / 200, cpu=time.process_time() - start)
            total = 0.0
    log(cpu_per_step=(time.process_time() - start) / g["steps"])
    return ema.module.eval()


# ---- judging -------------------------------------------------------------------------------------


def recall(queries: Tensor, answers: Tensor, k: int = 1) -> float:
    """R@k of matching rows; rows that score as high as the right one count against it by half."""
    scores = queries @ answers.T
    right = scores.diagonal()[:, None]
    return float(((scores > right).sum(1) < k).float().mean())


def judge_clip(clip: Any, train: Data, test: Data, log: Any) -> None:
    e, t = embed(clip, test), embed(clip, train)
    spectrum = torch.linalg.eigvalsh(torch.cov(t["image"].T)).flip(0)
    share = (spectrum / spectrum.sum()).cumsum(0)
    scenes = world.retrieval_scenes(1000, 2)
    with torch.no_grad():
        image = clip.encode_image(to_input(np.stack([world.pixels(s) for s in scenes])), normalize=True)
        text = clip.encode_text(tokenize([world.canonical_caption(s) for s in scenes]), normalize=True)
    log(
        r1_text_to_image=recall(text, image),
        r1_image_to_text=recall(image, text),
        r5=recall(text, image, 5),
        dims99=int((share < 0.99).sum()) + 1,
        share16=float(share[15]),
    )
    for kind in ("trained", "held_out_pair", "held_out_shape"):
        captions, pictures = draw_kind(kind, 200, 11)
        a = F.normalize(clip.encode_image(to_input(pictures)), dim=-1)
        b = F.normalize(clip.encode_text(tokenize(captions)), dim=-1)
        order = order_accuracy(clip, kind)
        log(kind=kind, r1=recall(b, a), order=order)
    for name in ("image", "text"):
        for hidden in (0, 256):
            p = probe_accuracy((t[name][:20000], train.labels[:20000]), (e[name], test.labels), hidden=hidden)
            log(probe=name, hidden=hidden, all_right=p.all_right, each=[round(v, 3) for v in p.per_attribute])


def draw_kind(kind: Any, n: int, seed: int) -> tuple[list[str], np.ndarray]:
    scenes = world.prompt_scenes(kind, n, seed)
    return [world.canonical_caption(s) for s in scenes], np.stack([world.pixels(s) for s in scenes])


def to_pixels(x: Tensor) -> np.ndarray:
    return x.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def verdicts(pictures: np.ndarray, scenes: list[world.Scene]) -> np.ndarray:
    return np.array([checker.check(p, s).core for p, s in zip(pictures, scenes, strict=True)])


@torch.no_grad()
def evaluate(clip: Any, prior: DiffusionPrior | None, decoder: Decoder, g: Settings, log: Any) -> None:
    n, k = g.get("prompts", 60), g.get("candidates", 8)
    for kind in world.PROMPT_KINDS:
        captions, true = draw_kind(kind, n, g["prompt_seed"])
        scenes = [world.parse_caption(c) for c in captions]
        tokens = tokenize(captions)
        text, states, mask = text_states(clip, tokens)
        image = F.normalize(clip.encode_image(to_input(true)), dim=-1)
        rng = torch.Generator().manual_seed(g["prompt_seed"])
        options = {"steps": recipe.DECODER_STEPS, "guidance": recipe.GUIDANCE}
        options |= {key: g[key] for key in ("steps", "guidance", "blur") if key in g}
        noise = torch.randn(n, 3, 32, 32, generator=rng)
        drawn = to_pixels(decoder.sample(image, text, noise, **options))
        row: Settings = {"kind": kind, "n": n, "true_embedding": float(verdicts(drawn, scenes).mean())}
        if prior is not None:
            hits, scores, cosines = [], [], []
            for _ in range(k):
                z = prior.sample(
                    text,
                    states,
                    mask,
                    torch.randn(text.shape, generator=rng) * g.get("temperature", 1.0),
                    g.get("prior_steps", recipe.PRIOR_STEPS),
                )
                w = prior.image_whitening
                cosines.append(F.cosine_similarity(w(z), w(image)).mean().item())
                pictures = to_pixels(decoder.sample(z, text, torch.randn(n, 3, 32, 32, generator=rng), **options))
                hits.append(verdicts(pictures, scenes))
                seen = F.normalize(clip.encode_image(to_input(pictures)), dim=-1)
                scores.append((seen * text).sum(1).numpy())
            right, score = np.stack(hits, 1), np.stack(scores, 1)  # [N, K]
            best = right[np.arange(n), score.argmax(1)]
            row |= {
                "cosine": float(np.mean(cosines)),
                "at1": float(right[:, 0].mean()),
                "mean": float(right.mean()),
                "best": float(best.mean()),
                "oracle": float(right.any(1).mean()),
            }
        log(**row)


def save(model: DiffusionPrior | Decoder, path: Path) -> None:
    torch.save({"config": model.config.as_dict(), "state": model.state_dict()}, path)


def load(path: Path) -> Any:
    saved = torch.load(path)
    kind, config = (DiffusionPrior, PriorConfig) if path.name.startswith("prior-") else (Decoder, DecoderConfig)
    model = kind(config(**saved["config"]))
    model.load_state_dict(saved["state"])
    return model.eval()


# ---- command line --------------------------------------------------------------------------------


def settings(pairs: list[str]) -> Settings:
    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    return {k: value(v) for k, _, v in (pair.partition("=") for pair in pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["clip", "judge", "prior", "decoder", "evaluate"])
    parser.add_argument("--name", default="a")
    parser.add_argument("--clip", default="a")
    parser.add_argument("--prior", default="")
    parser.add_argument("--decoder", default="a")
    parser.add_argument("--pairs", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "clipmill-exp")
    parser.add_argument("--set", nargs="*", default=[])
    a = parser.parse_args()
    torch.set_num_threads(1)
    a.out.mkdir(parents=True, exist_ok=True)
    g = settings(a.set)
    train, test = Data(a.out, a.pairs, 0), Data(a.out, 2000, 1)
    say(command=a.command, name=a.name, clip=a.clip, settings=g)
    if a.command == "clip":
        clip = train_clip(train, asdict(recipe.ClipRecipe()) | g, a.seed, say)
        torch.save({"config": clip.config, "state": clip.state_dict()}, a.out / f"clip-{a.name}.pt")
        judge_clip(clip, train, test, say)
        return
    saved = torch.load(a.out / f"clip-{a.clip}.pt")
    clip = build_clip(saved["config"])
    clip.load_state_dict(saved["state"])
    clip.eval()
    if a.command == "judge":
        judge_clip(clip, train, test, say)
    elif a.command == "evaluate":
        prior = load(a.out / f"prior-{a.prior}.pt") if a.prior else None
        decoder = load(a.out / f"decoder-{a.decoder}.pt")
        evaluate(clip, prior, decoder, g | {"prompt_seed": a.prompt_seed}, say)
    elif a.command == "prior":
        prior = train_prior(train, embed(clip, train, states=True), asdict(recipe.PriorRecipe()) | g, a.seed, say)
        save(prior, a.out / f"prior-{a.name}.pt")
        held = embed(clip, test, states=True)
        with torch.no_grad():
            noise = torch.randn(held["text"].shape, generator=torch.Generator().manual_seed(0))
            z = prior.sample(held["text"], held["states"].float(), held["mask"], noise)
            w = prior.image_whitening
            say(
                cosine=F.cosine_similarity(z, held["image"]).mean().item(),
                whitened=F.cosine_similarity(w(z), w(held["image"])).mean().item(),
            )
    else:
        decoder = train_decoder(train, embed(clip, train), asdict(recipe.DecoderRecipe()) | g, a.seed, say)
        save(decoder, a.out / f"decoder-{a.name}.pt")
        evaluate(clip, None, decoder, {"prompt_seed": a.prompt_seed, "prompts": 80}, say)


if __name__ == "__main__":
    main()

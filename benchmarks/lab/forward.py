"""The limit of embedding: open_clip's forward on tensors that are there already, timed alone, in one or more processes.

    python -m benchmarks.lab.forward WORKSPACE MODEL CHECKPOINT --what pairs [--processes 2 --threads 1 --batch 32]

    pairs    images, and captions cut after the end token of the longest of their batch, sorted by length
    images   the images alone
    texts    captions at full length, as open_clip's encode_text takes them
    direct   images, and captions at full length
    encoder  captions through clipmill's own text path, tokenizing and all

Loading, decoding and (but for ``encoder``) tokenizing are done before the clock starts. Prints ``{"count", "wall",
"cpu"}``: seconds from the first process's start to the last one's end, and CPU seconds of all. ``--out FILE.npz`` keeps
keys and unit-norm vectors: what open_clip used directly makes of the same images and captions.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import queue
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipeline.models.encoder import Encoder
from pipeline.workspace import Workspace

TEXT_BATCH = 256
PICTURES = ("pairs", "images", "direct")
Vectors = dict[str, Tensor]


def rows(given: argparse.Namespace, rank: int) -> list[dict[str, Any]]:
    """This process's share of the pairs, in the order of their keys."""
    table = Workspace(given.workspace).table("images")
    columns = ["pair_key", "caption", *(["image"] if given.what in PICTURES else [])]
    keys = table.keys().sort_by("pair_key")["pair_key"].slice(0, given.count)
    mine: list[dict[str, Any]] = table.read(columns, pc.field("pair_key").isin(keys)).sort_by("pair_key").to_pylist()
    return mine[rank :: given.processes]


def cut_text(model: Any, tokens: Tensor) -> Tensor:
    """tokens [B, L] of a causal tower -> [B, D]. What stands after the end token changes nothing: it is left out."""
    ends = tokens.argmax(1)  # [B], the end token has the highest number
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]  # [B, L', W]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    return model.ln_final(x[torch.arange(len(x)), ends]) @ model.text_projection


def batches(count: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, count, size)]


def prepared(given: argparse.Namespace, mine: list[dict[str, Any]]) -> Callable[[int | None], Vectors]:
    """The work, on tensors that are loaded. Its argument: how many batches, for warming up (None: all)."""
    if given.what == "encoder":
        encoder = Encoder(f"{given.model}:{given.checkpoint}")
        captions = [row["caption"] for row in mine]
        return lambda most: {"text": torch.from_numpy(encoder.texts(captions[: most and most * TEXT_BATCH]))}
    made = open_clip.create_model_and_transforms(given.model, pretrained=str(given.checkpoint))
    model: Any = made[0].eval().requires_grad_(False)
    work: dict[str, list[Callable[[], Tensor]]] = {}
    order: Tensor | None = None
    if given.what in PICTURES:
        pictures = [made[2](Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in mine]
        pixels = [torch.stack(pictures[s]) for s in batches(len(mine), given.batch)]
        del pictures
        work["image"] = [lambda p=p: model.encode_image(p) for p in pixels]  # type: ignore[misc]
    if given.what != "images":
        tokens = open_clip.get_tokenizer(given.model)([row["caption"] for row in mine])  # [N, L]
        if given.what == "pairs":
            order = tokens.argmax(1).argsort(stable=True)
            parts = [tokens[order[s]] for s in batches(len(mine), TEXT_BATCH)]
            work["text"] = [lambda t=t: cut_text(model, t) for t in parts]  # type: ignore[misc]
        else:
            parts = [tokens[s] for s in batches(len(mine), given.batch)]
            work["text"] = [lambda t=t: model.encode_text(t) for t in parts]  # type: ignore[misc]

    def run(most: int | None) -> Vectors:
        done = {name: torch.cat([call() for call in calls[:most]]) for name, calls in work.items()}
        if order is not None and most is None:
            done["text"] = done["text"][order.argsort()]
        return done

    return run


def process(rank: int, given: argparse.Namespace, barrier: Barrier, results: Any) -> None:
    """One of the processes: prepare, warm up, wait for the others, work."""
    torch.set_num_threads(given.threads)
    mine = rows(given, rank)
    with torch.inference_mode():
        work = prepared(given, mine)
        work(1)
        barrier.wait()
        start, cpu = time.monotonic(), time.process_time()
        vectors = work(None)
        end, cpu = time.monotonic(), time.process_time() - cpu
    arrays = {name: F.normalize(v.float(), dim=-1).numpy() for name, v in vectors.items()} if given.out else {}
    arrays["key"] = np.array([row["pair_key"] for row in mine], np.int64)
    results.put((start, end, cpu, arrays))


def collected(results: Any, workers: list[Any]) -> list[Any]:
    """What all of the processes hand back. Raises SystemExit where one of them died."""
    found: list[Any] = []
    while len(found) < len(workers):
        try:
            found.append(results.get(timeout=5.0))
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                raise SystemExit("one of the processes died") from None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("model")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--what", choices=("pairs", "images", "texts", "direct", "encoder"), required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(given.processes), context.Queue()
    workers = [
        context.Process(target=process, args=(rank, given, barrier, results), daemon=True)
        for rank in range(given.processes)
    ]
    for worker in workers:
        worker.start()
    found = collected(results, workers)
    for worker in workers:
        worker.join()
    starts, ends, cpus, arrays = zip(*found, strict=True)
    if given.out:
        np.savez(given.out, **{name: np.concatenate([a[name] for a in arrays]) for name in arrays[0]})
    count = sum(len(a["key"]) for a in arrays)
    print(json.dumps({"count": count, "wall": max(ends) - min(starts), "cpu": sum(cpus)}))


if __name__ == "__main__":
    main()

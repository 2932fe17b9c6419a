"""What is embedded, and the programs that do it: ours, the bare forward, clip-retrieval in a venv of its own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.workspace import Workspace
from schemas.keys import pair_key
from schemas.tables import IMAGES, PAIRS

Found = dict[int, NDArray[np.float32]]
"""Key -> [2, D]: vectors of the image and of the caption."""

CLIP_RETRIEVAL = "clip-retrieval==2.45.0"
RIVAL = (
    CLIP_RETRIEVAL, "setuptools<81", "numpy<2", "pyarrow<16", "open-clip-torch<3",
    f"torch=={version('torch')}", f"torchvision=={version('torchvision')}",
)  # fmt: skip
"""With the torch that we use: what is compared is the code around it. It imports pkg_resources, which newer setuptools
lack."""

_TAR = 250
"""Pairs in a tar. clip-retrieval's readers take whole tars, so there must be several for each."""


@dataclass(frozen=True)
class Corpus:
    """The first ``count`` pictures of a folder with captions: as a workspace, and as tars for the rival."""

    folder: Path
    pictures: Path
    captions: tuple[str, ...]
    count: int

    @property
    def workspace(self) -> Path:
        return self.folder / f"ws-{self.count}"

    @property
    def tars(self) -> Path:
        return self.folder / f"tars-{self.count}"

    def make(self) -> Corpus:
        """Write both, unless they are there with these captions."""
        done, digest = self.folder / f"{self.count}.sha256", self.digest()
        if done.exists() and done.read_text() == digest:
            return self
        for folder in (self.workspace, self.tars):
            shutil.rmtree(folder, ignore_errors=True)
        self.tars.mkdir(parents=True)
        rows = [self.row(i) for i in range(self.count)]
        pairs = [{n: row.get(n) for n in PAIRS.schema.names} | {"added_run": "bench"} for row in rows]
        workspace = Workspace(self.workspace).prepare()
        workspace.table("pairs").append(pa.Table.from_pylist(pairs, schema=PAIRS.schema), "bench")
        for start in range(0, self.count, 1000):  # in files as large as a download's shards
            some = pa.Table.from_pylist(rows[start : start + 1000], schema=IMAGES.schema)
            workspace.table("images").append(some, "bench")
        for start in range(0, self.count, _TAR):
            write_tar(self.tars / f"{start // _TAR:05d}.tar", rows[start : start + _TAR])
        done.write_text(digest)
        return self

    def digest(self) -> str:
        return hashlib.sha256("\n".join([*self.captions[: self.count], str(self.pictures)]).encode()).hexdigest()

    def row(self, number: int) -> dict[str, Any]:
        data = (self.pictures / f"{number}.jpg").read_bytes()
        url, caption = f"https://h/{number}.jpg", self.captions[number]
        return dict.fromkeys(IMAGES.schema.names) | {
            "pair_key": pair_key(url, caption), "url": url, "caption": caption, "status": "ok", "attempts": 1,
            "retryable": False, "sha256": hashlib.sha256(data).hexdigest(), "width": 256, "height": 256,
            "original_width": 256, "original_height": 256, "image": data, "format": "jpg", "run": "bench",
        }  # fmt: skip


def write_tar(file: Path, rows: list[dict[str, Any]]) -> None:
    """A webdataset tar: KEY.jpg, KEY.txt."""
    with tarfile.open(file, "w") as tar:
        for row in rows:
            for ending, data in (("jpg", row["image"]), ("txt", row["caption"].encode())):
                info = tarfile.TarInfo(f"{row['pair_key']}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@dataclass(frozen=True)
class Model:
    """An open_clip model with random weights, made once."""

    name: str
    checkpoint: Path

    @classmethod
    def make(cls, folder: Path, name: str, seed: int = 0) -> Model:
        file = folder / f"{name}-{seed}.safetensors"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            program = (
                "import sys, torch, open_clip; from safetensors.torch import save_file\n"
                "torch.manual_seed(int(sys.argv[2]))\n"
                "save_file(open_clip.create_model(sys.argv[1]).state_dict(), sys.argv[3])"
            )
            unfinished = file.with_suffix(".part")
            subprocess.run([sys.executable, "-c", program, name, str(seed), str(unfinished)], check=True)
            unfinished.rename(file)
        return cls(name, file)


@dataclass(frozen=True)
class Task:
    """A corpus to embed with a model, into a folder of the task's own."""

    folder: Path
    corpus: Corpus
    model: Model

    @property
    def out(self) -> Path:
        return self.folder / "out"

    env: ClassVar[dict[str, str]] = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}

    def prepare(self) -> None:
        """The copy of the workspace that ours works in; nothing that an earlier run left."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.corpus.workspace, self.workspace)

    @property
    def workspace(self) -> Path:
        return self.folder / "ws"


@dataclass(frozen=True)
class Tool:
    """A way of doing a :class:`Task`."""

    name: str
    options: tuple[str, ...] = ()

    def command(self, task: Task) -> list[str]:
        raise NotImplementedError

    def embedded(self, task: Task, output: str) -> int:
        """How many pairs it says that it embedded."""
        raise NotImplementedError

    def vectors(self, task: Task) -> Found:
        raise NotImplementedError


class Ours(Tool):
    """``clipmill embed`` in this interpreter."""

    def command(self, task: Task) -> list[str]:
        return [
            sys.executable, "-m", "jobs.embed", "--workspace", str(task.workspace), "--encoder",
            f"{task.model.name}:{task.model.checkpoint}", "--json", *self.options,
        ]  # fmt: skip

    def embedded(self, task: Task, output: str) -> int:
        return int(last_json(output)["counts"]["out"])

    def vectors(self, task: Task) -> Found:
        rows = Workspace(task.workspace).table("embeddings").read(["pair_key", "image_vec", "text_vec"]).to_pylist()
        both = {r["pair_key"]: np.frombuffer(r["image_vec"] + r["text_vec"], "<f2") for r in rows}
        return {key: v.astype(np.float32).reshape(2, -1) for key, v in both.items()}


@dataclass(frozen=True)
class Bare(Tool):
    """``lab/forward.py``: its own clock counts, for its work alone."""

    what: str = "pairs"
    processes: int = 1
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    batch: int = 32

    def command(self, task: Task) -> list[str]:
        return [
            sys.executable, "-m", "benchmarks.lab.forward", str(task.corpus.workspace), task.model.name,
            str(task.model.checkpoint), "--what", self.what, "--count", str(task.corpus.count), "--out",
            str(task.out.with_suffix(".npz")), "--processes", str(self.processes), "--threads", str(self.threads),
            "--batch", str(self.batch), *self.options,
        ]  # fmt: skip

    def embedded(self, task: Task, output: str) -> int:
        return int(last_json(output)["count"])

    def arrays(self, task: Task) -> dict[str, NDArray[Any]]:
        """``key`` and, of what was made, ``image`` and ``text``."""
        with np.load(task.out.with_suffix(".npz")) as file:
            return dict(file)

    def vectors(self, task: Task) -> Found:
        found = self.arrays(task)
        return {int(k): np.stack(v) for k, *v in zip(found["key"], found["image"], found["text"], strict=True)}


@dataclass(frozen=True)
class ClipRetrieval(Tool):
    """``clip-retrieval inference`` from its venv over tars of images and captions, on as many threads as we use."""

    venv: Path = Path()
    batch: int = 32
    readers: int = 1

    def command(self, task: Task) -> list[str]:
        tars = sorted(task.corpus.tars.glob("*.tar"))
        many = f"{tars[0].parent}/{{{tars[0].stem}..{tars[-1].stem}}}.tar" if len(tars) > 1 else str(tars[0])
        return [
            str(self.venv / "bin" / "clip-retrieval"), "inference", f"--input_dataset={many}",
            f"--output_folder={task.out}", "--input_format=webdataset", "--enable_metadata=False",
            f"--clip_model=open_clip:{task.model.name}/{task.model.checkpoint}", f"--batch_size={self.batch}",
            f"--num_prepro_workers={self.readers}", "--use_jit=False", "--enable_wandb=False",
            f"--wds_number_file_per_input_file={_TAR}", *self.options,
        ]  # fmt: skip

    def embedded(self, task: Task, output: str) -> int:
        return len(np.load(task.out / "img_emb" / "img_emb_0.npy", mmap_mode="r"))

    def vectors(self, task: Task) -> Found:
        keys = pq.read_table(task.out / "metadata" / "metadata_0.parquet")["image_path"].to_pylist()
        image, text = (np.load(task.out / f"{n}_emb" / f"{n}_emb_0.npy").astype(np.float32) for n in ("img", "text"))
        return {int(k): np.stack(v) for k, *v in zip(keys, image, text, strict=True)}


def last_json(output: str) -> dict[str, Any]:
    """The last line that is a JSON object."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return {"counts": {"out": -1}, "count": -1}


def cosines(a: Found, b: Found) -> dict[str, float]:
    """The smallest cosine between the two sides' vectors of a key, of images and of captions.

    Raises:
        AssertionError: other keys.
    """
    assert a.keys() == b.keys(), f"{len(a.keys() ^ b.keys())} keys are on one side only"
    both = np.stack([[a[k], b[k]] for k in a])  # [N, 2, 2, D]
    both /= np.linalg.norm(both, axis=-1, keepdims=True)
    least = (both[:, 0] * both[:, 1]).sum(-1).min(0)  # [2]
    return {"image": float(least[0]), "text": float(least[1])}

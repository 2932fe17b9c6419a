"""autofaiss in a venv of its own: an index of .npy vectors in so much memory, and how it wants to be searched.

Version 2.18.0 asks for numpy<2, while the pyarrow that it allows asks for numpy>=2: it does not import as it is
resolved. So numpy 2 is put in after it. FAISS newer than 1.13 refuses the keyword that it sets for OPQ. With an HNSW it
dies at the very end, when it writes numbers of NumPy as JSON: these are made plain for it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from benchmarks.lab.meter import Cost, measure
from benchmarks.lab.searches import Keys, Search, Vectors
from benchmarks.lab.tools import make_venv

AUTOFAISS = "autofaiss==2.18.0"
REQUIREMENTS = (AUTOFAISS, "faiss-cpu==1.13.2", "pyarrow<=25")
FORCED = "numpy>=2,<2.5"
_SAME = 0.01

PROGRAM = """
import functools, json, sys
json.dump = functools.partial(json.dump, default=float)
from autofaiss import build_index
vectors, out, memory, cores = sys.argv[1:]
_, said = build_index(
    embeddings=vectors, index_path=out + "/knn.index", index_infos_path=out + "/infos.json", metric_type="ip",
    max_index_memory_usage=memory, current_memory_available="8G", nb_cores=int(cores), save_on_disk=True,
)
print(json.dumps(said, default=str))
"""


@dataclass(frozen=True)
class Theirs:
    """What autofaiss made, as it says, and the index itself; ids are places in the .npy file."""

    index: Any
    key: str
    parameters: str
    bytes: int
    cost: Cost

    def search(self, keys: NDArray[np.int64]) -> Search:
        """As autofaiss set it, through FAISS alone. ``keys``: of the places."""
        faiss.ParameterSpace().set_index_parameters(self.index, self.parameters)
        named = np.append(keys, np.int64(-1))

        def search(queries: Vectors, k: int) -> Keys:
            return named[self.index.search(queries, k)[1]]

        return search


def make(folder: Path) -> Path:
    """The venv."""
    venv = make_venv(folder, list(REQUIREMENTS))
    forced = venv / "forced.txt"
    if not forced.exists() or forced.read_text() != FORCED:
        own, uv = str(venv / "bin" / "python"), shutil.which("uv")
        install = [uv, "pip", "install", "--quiet", "--python", own] if uv else [own, "-m", "pip", "install", "-q"]
        subprocess.run([*install, FORCED], check=True)
        forced.write_text(FORCED)
    return venv


def build(venv: Path, vectors: Path, out: Path, memory: int, cores: int) -> Theirs:
    """An index of the folder ``vectors`` in ``memory`` bytes, kept in ``out``, since it takes long: one that was made
    there in as many, but for 1%, is taken. Raises SystemExit where there is none in the end."""
    out.mkdir(parents=True, exist_ok=True)
    kept = json.loads((out / "cost.json").read_text()) if (out / "cost.json").exists() else {}
    if kept and abs(kept.pop("memory") - memory) <= _SAME * memory:
        cost = Cost(**kept)
    else:
        # Its units are of 1,024; it reads no plain number.
        arguments = [str(vectors), str(out), f"{memory // 1024}K", str(cores)]
        command = [str(venv / "bin" / "python"), "-c", PROGRAM, *arguments]
        cost = measure(command, {"OMP_NUM_THREADS": str(cores)}, timeout=14_400.0)
        if cost.status or not (out / "knn.index").exists():
            raise SystemExit(f"autofaiss made no index (status {cost.status}):\n{cost.output[-3000:]}")
        (out / "cost.json").write_text(json.dumps(asdict(cost) | {"memory": memory}))
    infos = json.loads((out / "infos.json").read_text())
    index = faiss.read_index(str(out / "knn.index"))
    size = (out / "knn.index").stat().st_size
    return Theirs(index, infos["index_key"], infos["index_param"], size, cost)

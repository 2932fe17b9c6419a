"""The services that are compared: ours on Ray Serve, and clip-retrieval's Flask back end on the same FAISS index."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.lab.embedders import Model

Keys = NDArray[np.int64]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        data: bytes = answer.read()
    return data


def post(port: int, path: str, body: bytes) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


@contextlib.contextmanager
def running(command: Sequence[str], port: int, ready: str, env: dict[str, str] | None = None) -> Iterator[int]:
    """The process id of a service, from when it answers ``ready`` with 200 until the block ends.

    Raises:
        SystemExit: it ended before, or was not ready in five minutes; with its last lines.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        try:
            _await(process, port, ready, log)
            yield process.pid
        finally:
            _end(process)


def _await(process: subprocess.Popen[bytes], port: int, ready: str, log: Any) -> None:
    end = time.monotonic() + 300
    while True:
        with contextlib.suppress(OSError):
            get(port, ready)
            return
        if process.poll() is not None or time.monotonic() > end:
            log.seek(0)
            text = log.read().decode("utf-8", "replace")[-4000:]
            raise SystemExit(f"the service did not start (status {process.poll()}):\n{text}")
        time.sleep(0.25)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def our_command(workspace: Path, port: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "jobs.serve", "--workspace", str(workspace), "--port", str(port), *options]


def by_position(index: Any) -> tuple[Any, Keys]:
    """The same index with places as ids, and the key of each place: clip-retrieval finds metadata by the row's number.

    Same codes and same lists: an index under a map of keys numbers its vectors itself; in one with keys in its lists
    they are replaced, in place.
    """
    outer = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexIDMap):
        return faiss.downcast_index(outer.index), faiss.vector_to_array(outer.id_map).astype(np.int64)
    lists: Any = faiss.downcast_InvertedLists(faiss.extract_index_ivf(index).invlists)
    ids = [faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)) for i in range(lists.nlist)]
    keys = np.sort(np.concatenate(ids))
    for some in ids:
        some[:] = np.searchsorted(keys, some)
    return index, keys


def set_parameters(index: Any, parameters: dict[str, int]) -> None:
    """Leave search parameters in an index, so that its file carries them: other programs pass none."""
    while True:
        index = faiss.downcast_index(index)
        if isinstance(index, faiss.IndexRefine):
            index.k_factor = float(parameters.get("k_factor", 1))
            index = index.base_index
        elif isinstance(index, faiss.IndexPreTransform):
            index = index.index
        else:
            break
    if isinstance(index, faiss.IndexIVF):
        index.nprobe = parameters.get("nprobe", 1)


class ClipRetrieval:
    """``clip-retrieval back`` from its venv. Its text model is given, so that it starts without any download."""

    def __init__(self, venv: Path, folder: Path, model: Model) -> None:
        self.venv, self.folder, self.model = venv, folder, model

    def prepare(self, index: Any, parameters: dict[str, int], rows: pa.Table) -> Keys:
        """Its layout: image.index and metadata/*.parquet with ``rows`` (pair_key, url, caption) in the index's order.

        Returns the keys by place.
        """
        index, keys = by_position(index)
        set_parameters(index, parameters)
        (self.folder / "metadata").mkdir(parents=True, exist_ok=True)
        faiss.write_index(index, str(self.folder / "image.index"))
        have = rows["pair_key"].to_numpy()
        order = np.argsort(have)
        places = order[np.searchsorted(have, keys, sorter=order)]
        pq.write_table(rows.take(places).select(["url", "caption"]), self.folder / "metadata" / "metadata_0.parquet")
        (self.folder / "indices_paths.json").write_text(json.dumps({"bench": str(self.folder)}))
        return keys

    def command(self, port: int) -> list[str]:
        return [
            str(self.venv / "bin" / "clip-retrieval"), "back", "--port", str(port), "--indices-paths",
            str(self.folder / "indices_paths.json"), "--clip_model",
            f"open_clip:{self.model.name}/{self.model.checkpoint}", "--use_jit=False", "--enable_mclip_option=False",
            "--provide_aesthetic_embeddings=False",
        ]  # fmt: skip

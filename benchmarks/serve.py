"""The service: against bare FAISS in process, against clip-retrieval's Flask back end, and under load while it changes.

    python -m benchmarks serve                                     # 500,000 x 512, all parts, half an hour
    python -m benchmarks serve -- --parts swap
    python -m benchmarks serve -- --count 20000 --seconds 3 --rounds 1      # some minutes: does everything run?

Vectors are drawn as in ``index`` and indexed by the job; the encoder is a ViT-B-32 with random weights, which both
services load and nobody asks. Clients ask by vector (512 numbers in JSON), k = 10, and get captions and URLs. The load
comes from a process of its own (``lab/hammer.py``), whose CPU is told; everything shares one machine.

    single   one client, a question at a time: p50 and p95, beside FAISS called in this process on the same file,
             on one thread or on all, whichever is faster
    many     32 clients: queries a second, of ours with a replica for each core, by its own API and by clip-retrieval's
             protocol, and with one replica; of clip-retrieval's back end (own venv, same index, started by its
             documented command); and of FAISS in this process, asked in batches as large as ours had on the average
             (its metrics tell)
    swap     60 seconds of 32 clients, while 1% of new vectors are indexed and published, and then a key is deleted: no
             request may fail, the last answers must come of the new version, and none that was asked for after the
             deletion has returned may have the key

Medians of ``--rounds``, services in turn. Checked: all sides find the same keys for the same vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks.lab.embedders import CLIP_RETRIEVAL, RIVAL, Model
from benchmarks.lab.meter import measure
from benchmarks.lab.report import Line, Report, machine, run_parts
from benchmarks.lab.searches import milliseconds
from benchmarks.lab.services import ClipRetrieval, free_port, get, our_command, post, running
from benchmarks.lab.space import Space, add_rows, make_workspace
from benchmarks.lab.tools import make_venv
from pipeline.index import open_index, search
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard, IndexCard

CORES = os.cpu_count() or 1
CLIENTS, QUERIES, K = 32, 512, 10
MODEL, DIM = "ViT-B-32", 512
PACKAGES = ("faiss-cpu", "ray", "fastapi", "uvicorn", "numpy")
Raw = dict[str, Any]


@dataclass
class Lab:
    """The indexed workspace, the questions, and what was measured."""

    folder: Path
    cache: Path
    space: Space
    rounds: int
    seconds: float
    load: float
    raw: list[Raw] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = Model.make(self.cache / "weights", MODEL)
        self.card = self._encoder()
        self.queries = self.space.queries(QUERIES).astype(np.float32)  # [Q, D]
        self.workspace: Workspace = make_workspace(self.cache / "spaces" / "served", self.space, self.card)
        self.index_job("the index is built")
        lists = [[round(x, 7) for x in v] for v in self.queries.tolist()]
        ours = [{"terms": [{"vector": v}], "k": K} for v in lists]
        theirs = [
            {"embedding_input": v, "modality": "image", "num_images": K, "num_result_ids": K, "indice_name": None}
            for v in lists
        ]
        self.bodies = {name: self._bodies(name, some) for name, some in (("ours", ours), ("theirs", theirs))}

    def _encoder(self) -> EncoderCard:
        """Of the weights, kept beside them: loading takes its time."""
        kept = self.model.checkpoint.with_suffix(".card.json")
        if not kept.exists():
            from pipeline.models.encoder import Encoder

            kept.write_text(Encoder(f"{MODEL}:{self.model.checkpoint}").card.to_json())
        return EncoderCard.from_json(kept.read_text(), str(kept))

    def _bodies(self, name: str, bodies: Sequence[Raw]) -> Path:
        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(body) + "\n" for body in bodies))
        return file

    def index_job(self, note: str) -> None:
        command = [
            sys.executable, "-m", "jobs.index", "--workspace", str(self.workspace.root), "--modality", "image",
            "--audit", "0", "--json",
        ]  # fmt: skip
        cost = measure(command, timeout=7200.0)
        if cost.status:
            raise SystemExit(f"clipmill index: status {cost.status}\n{cost.output[-3000:]}")
        print(f"    {note}: {cost.wall:.1f} s", flush=True)

    def published(self) -> tuple[IndexCard, Any]:
        card = self.workspace.published_index(self.card.id)
        assert card is not None
        file = card.file("image")
        return card, open_index(self.workspace.index_dir(self.card.id) / card.version / file.path, file)

    def hammer(self, port: int, path: str, bodies: Path, clients: int, note: str, **more: Any) -> Raw:
        """A load, from a process of its own."""
        load = {"port": port, "path": path, "bodies": str(bodies), "clients": clients, "seconds": self.seconds} | more
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.lab.hammer", json.dumps(load)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"the load on {path} ended:\n{done.stderr[-2000:]}")
        found: Raw = json.loads(done.stdout.splitlines()[-1])
        self.raw.append({"what": note} | found)
        print(
            f"    {note:<36} {found['per_second']:8.1f}/s  p50 {found['p50']:7.2f}  p95 {found['p95']:7.2f} ms  "
            f"failed {found['failed']}  the load's own CPU {found['cpu_us_a_request']:.0f} us a request",
            flush=True,
        )
        if found["failed"] and "watch" not in more:
            raise SystemExit(f"requests to {path} failed: {found['errors']}")
        return found


def batches(port: int, replicas: int = 1) -> tuple[float, float]:
    """Batches of searches so far, and the questions in them, of all replicas: each tells its own, whichever answers."""
    found: dict[str, list[float]] = {}
    while len(found) < replicas:
        text = get(port, "/metrics").decode()
        [replica] = re.findall(r'^clipmill_replica_info{replica="([^"]*)"}', text, re.MULTILINE)
        said = (
            re.findall(rf'^clipmill_batch_size_{name}{{[^}}]*kind="image"[^}}]*}} (\S+)', text, re.MULTILINE)
            for name in ("count", "sum")
        )
        found[replica] = [sum(map(float, numbers)) for numbers in said]
    count, questions = (sum(numbers) for numbers in zip(*found.values(), strict=True))
    return count, questions


def bare(index: Any, parameters: dict[str, int]) -> Callable[[Any, int], Any]:
    return lambda queries, k: search(index, queries, k, parameters)[1]


def check(lab: Lab, port: int, theirs: tuple[int, Any] | None = None) -> None:
    """The services find what FAISS finds. (Ours puts it in the order of the stored vectors, not of the codes.)"""
    card, index = lab.published()
    expected = bare(index, card.file("image").search)(lab.queries[:20], K)
    for body, keys in zip(lab.bodies["ours"].read_bytes().splitlines()[:20], expected, strict=True):
        found = [int(r["key"]) for r in post(port, "/v1/search", body)["results"]]
        if set(found) != set(keys.tolist()):
            raise SystemExit(f"the service finds {found}, FAISS {keys.tolist()}")
    if theirs:
        same = 0
        for body, keys in zip(lab.bodies["theirs"].read_bytes().splitlines()[:20], expected, strict=True):
            rows = post(theirs[0], "/knn-service", body)
            same += len({int(theirs[1][r["id"]]) for r in rows} & set(keys.tolist()))
        if same < 0.97 * expected.size:
            raise SystemExit(f"clip-retrieval finds {same} of the {expected.size} keys that FAISS does")


# ---- parts -----------------------------------------------------------------------------------------


def single(lab: Lab) -> list[Line]:
    """One client, a question at a time, against FAISS called in this process."""
    card, index = lab.published()
    faiss_search = bare(index, card.file("image").search)
    port = free_port()
    asked, alone = [], []
    with running(our_command(Path(str(lab.workspace.root)), port), port, "/readyz"):
        check(lab, port)
        for _ in range(lab.rounds):
            alone.append(min(_on_threads(n, partial(milliseconds, faiss_search, lab.queries, K)) for n in (1, CORES)))
            asked.append(lab.hammer(port, "/v1/search", lab.bodies["ours"], 1, "one client"))
            wire = lab.hammer(port, "/knn-service", lab.bodies["theirs"], 1, "one client, /knn-service")
    lab.raw.append({"what": "FAISS in process, ms", "rounds": alone})
    p50, p95 = (statistics.median(a[name] for a in asked) for name in ("p50", "p95"))
    more = statistics.median(a["p50"] - b for a, b in zip(asked, alone, strict=True))
    return [
        Line(
            "p50 of one client, ms, beside FAISS in process; the difference", f"{p50:.2f}",
            f"{statistics.median(alone):.2f}", more, 3.0, most=True,
        ),
        Line("p95", f"{p95:.2f}", ""),
        Line("p50 by clip-retrieval's protocol", f"{wire['p50']:.2f}", ""),
    ]  # fmt: skip


def many(lab: Lab) -> list[Line]:
    """32 clients, against clip-retrieval's back end and against FAISS in batches of the same size."""
    card, index = lab.published()
    parameters = card.file("image").search
    python = sys.executable if sys.version_info[:2] == (3, 11) else "python3.11"
    rival = ClipRetrieval(make_venv(lab.cache / "clip-retrieval", RIVAL, python), lab.folder / "rival", lab.model)
    file = card.file("image")
    whole = open_index(lab.workspace.index_dir(lab.card.id) / card.version / file.path, file, mapped=False)
    keys = rival.prepare(whole, parameters, lab.workspace.table("images").read(["pair_key", "url", "caption"]))
    port, one_port, their_port = free_port(), free_port(), free_port()
    rates: dict[str, list[float]] = {"ours": [], "one": [], "wire": [], "theirs": [], "bare": []}
    sizes, loads = [], []
    env, root = {"OMP_NUM_THREADS": str(CORES)}, Path(str(lab.workspace.root))
    with (
        running(our_command(root, port, "--replicas", str(CORES)), port, "/readyz"),
        running(our_command(root, one_port), one_port, "/readyz"),
        running(rival.command(their_port), their_port, "/indices-list", env),
    ):
        check(lab, port, (their_port, keys))
        for _ in range(lab.rounds):
            before = batches(port, CORES)
            own = lab.hammer(port, "/v1/search", lab.bodies["ours"], CLIENTS, "ours, /v1/search")
            count, questions = (b - a for a, b in zip(before, batches(port, CORES), strict=True))
            sizes.append(questions / max(count, 1))
            batched = partial(_in_batches, lab, bare(index, parameters), round(sizes[-1]))
            rates["bare"].append(max(_on_threads(n, batched) for n in (1, CORES)))
            wire = lab.hammer(port, "/knn-service", lab.bodies["theirs"], CLIENTS, "ours, /knn-service")
            one = lab.hammer(one_port, "/v1/search", lab.bodies["ours"], CLIENTS, "ours, one replica")
            other = lab.hammer(their_port, "/knn-service", lab.bodies["theirs"], CLIENTS, "clip-retrieval")
            for name, found in (("ours", own), ("one", one), ("wire", wire), ("theirs", other)):
                rates[name].append(found["per_second"])
            loads.append(own)
    lab.raw.append({"rates": rates, "batch_sizes": sizes})
    p50 = statistics.median(load["p50"] for load in loads)
    used = statistics.median(load["cpu"] / (lab.seconds + 1.0) for load in loads)
    return [
        _times(
            f"queries/s, {CLIENTS} clients, ours ({CORES} replicas) / clip-retrieval",
            rates["ours"],
            rates["theirs"],
            5.0,
        ),
        _times("the same, ours with one replica", rates["one"], rates["theirs"], 5.0),
        _times("the same, ours by clip-retrieval's protocol", rates["wire"], rates["theirs"], 5.0),
        _times(
            f"ours / FAISS in process, batches of {statistics.median(sizes):.1f}", rates["ours"], rates["bare"], 0.5
        ),
        _times("the same, ours with one replica", rates["one"], rates["bare"], None),
        Line(f"p50 of {CLIENTS} clients, ms", f"{p50:.1f}", ""),
        Line("cores that the load itself takes, of all", f"{used:.2f}", f"{CORES}"),
    ]


def _times(what: str, mine: Sequence[float], other: Sequence[float], goal: float | None) -> Line:
    ratio = statistics.median(a / b for a, b in zip(mine, other, strict=True))
    return Line(what, f"{statistics.median(mine):,.0f}", f"{statistics.median(other):,.0f}", ratio, goal)


def _on_threads(number: int, work: Callable[[], float]) -> float:
    """With so many threads of FAISS in this process: for one query one of them may be faster than all."""
    faiss.omp_set_num_threads(number)
    return work()


def _in_batches(lab: Lab, faiss_search: Callable[[Any, int], Any], size: int) -> float:
    """Queries a second of FAISS in this process, so many at once, for as long as a load takes (at most 5 s)."""
    size = max(1, min(size, len(lab.queries)))
    some = [lab.queries[n : n + size] for n in range(0, len(lab.queries) - size + 1, size)]
    faiss_search(some[0], K)
    start, asked = time.perf_counter(), 0
    while time.perf_counter() - start < min(lab.seconds, 5.0):
        for queries in some:
            faiss_search(queries, K)
            asked += len(queries)
    return asked / (time.perf_counter() - start)


def swap(lab: Lab) -> list[Line]:
    """A load, while a new version is published and a key is deleted."""
    card, index = lab.published()
    own = bare(index, card.file("image").search)(lab.queries[:1], 1)  # the nearest of the first question
    watched = int(own[0, 0])
    port = free_port()
    few = lab.folder / "few.jsonl"  # every sixteenth request looks for the key
    few.write_bytes(b"\n".join(lab.bodies["ours"].read_bytes().splitlines()[:16]))
    published: list[float] = []

    def publish(start: float) -> None:
        time.sleep(2.0)
        lab.index_job("1% is added and published under load")
        published.append(time.perf_counter() - start)

    add_rows(lab.workspace, lab.space, lab.card, lab.space.count, max(1, lab.space.count // 100))
    with running(our_command(Path(str(lab.workspace.root)), port, "--deletions"), port, "/readyz"):
        before = lab.published()[0].version
        job = threading.Thread(target=publish, args=(time.perf_counter(),))
        job.start()
        found = lab.hammer(
            port, "/v1/search", few, CLIENTS, "a swap and a deletion in the middle",
            seconds=lab.load, watch=str(watched), delete_at=0.75 * lab.load,
        )  # fmt: skip
        job.join()
        time.sleep(3.0)  # the service looks for a new version every second
        last = post(port, "/v1/search", lab.bodies["ours"].read_bytes().splitlines()[0])
    after, seen = lab.published()[0].version, found["watched"]
    lab.raw.append({"published_after_s": published, "versions": [before, after]})
    if not published or after == before or last["version"] != after:
        raise SystemExit(f"the service answers from {last['version']}; published is {after}, before it was {before}")
    old, new = (found["versions"].get(version, 0) for version in (before, after))
    failed, left = float(found["failed"]), float(seen["after"])
    took = f"{found['p50']:.1f}, {found['most']:.0f}"
    return [
        Line("requests, those that failed", f"{found['requests']:,}", f"{failed:.0f}", failed, 0.0, most=True),
        Line("answers of the new version, of the old one", f"{new:,}", f"{old:,}", float(new), 1.0),
        Line("seconds after which it was published", f"{published[0]:.0f}", f"of {lab.load:.0f}"),
        Line("answers with the key before the deletion, without it", f"{seen['before']:,}", f"{seen['missed']:,}"),
        Line("answers without the key after it, with it", f"{seen['absent']:,}", f"{left:.0f}", left, 0.0, most=True),
        Line("ms: the deletion; p50 and most of all requests", f"{found['delete_ms']:.1f}", took),
    ]


PARTS: dict[str, Callable[[Lab], list[Line]]] = {"single": single, "many": many, "swap": swap}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--count", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one load")
    parser.add_argument("--load", type=float, default=60.0, help="seconds of the load test")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "clipmill-benchmarks"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running is ended, too
    report = Report(given.results, "serve", "The service, compared")
    given.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        lab = Lab(Path(folder), given.cache, Space(given.count, DIM), given.rounds, given.seconds, given.load)
        setting = machine(PACKAGES) | {
            "clip-retrieval": CLIP_RETRIEVAL.partition("==")[2], "vectors": f"{given.count:,} x {DIM}",
            "rounds": str(given.rounds), "seconds": f"{given.seconds:g}",
        }  # fmt: skip
        run_parts(report, PARTS, given.parts, lab, setting)
    return 0


if __name__ == "__main__":
    sys.exit(main())

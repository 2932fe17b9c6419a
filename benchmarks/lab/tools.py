"""The programs that are compared: the command line of each for the same job, and the venv of the rival."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMG2DATASET = "img2dataset==1.47.0"


@dataclass(frozen=True)
class Job:
    """``count`` URLs of one kind of picture, to be stored at 256 px. ``folder`` is the job's own."""

    folder: Path
    scheme: str
    size: str
    count: int
    port: int
    hosts: Sequence[str]
    slow: Sequence[str] = ()
    ca: Path | None = None

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.csv"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def urls(self) -> list[str]:
        """The fast ones in turn over all hosts, the slow ones spread evenly among them."""
        total = self.count + len(self.slow)
        slow = {int((i + 0.5) * total / len(self.slow)): host for i, host in enumerate(self.slow)}
        hosts = [slow.get(i) or self.hosts[i % len(self.hosts)] for i in range(total)]
        return [f"{self.scheme}://{host}:{self.port}/{self.size}/{i}.jpg" for i, host in enumerate(hosts)]

    def prepare(self) -> None:
        """Write the list; remove what an earlier run left."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        lines = [f"{url},photograph {i}\n" for i, url in enumerate(self.urls())]
        self.pairs.write_text("url,caption\n" + "".join(lines))

    @property
    def env(self) -> dict[str, str]:
        quiet = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
        return quiet | ({"SSL_CERT_FILE": str(self.ca)} if self.ca else {})


@dataclass(frozen=True)
class Tool:
    """A way of doing a :class:`Job`."""

    name: str
    options: tuple[str, ...] = ()

    def command(self, job: Job) -> list[str]:
        raise NotImplementedError

    def stored(self, job: Job, output: str) -> int:
        """How many images it says that it stored."""
        raise NotImplementedError


class Ours(Tool):
    """``clipmill download`` in this interpreter, with its defaults but for ``options``."""

    def command(self, job: Job) -> list[str]:
        allowed = ",".join(f"{host}:{job.port}" for host in [*job.hosts, *job.slow])
        return [
            sys.executable, "-m", "jobs.download", "--workspace", str(job.out), "--pairs", str(job.pairs),
            "--allow-hosts", allowed, "--json", *self.options,
        ]  # fmt: skip

    def stored(self, job: Job, output: str) -> int:
        return int(_last_json(output)["counts"]["out"])


class Bare(Tool):
    """Our client and codec in one process: no tables, no Ray, no ledger."""

    def command(self, job: Job) -> list[str]:
        allowed = ",".join(f"{host}:{job.port}" for host in [*job.hosts, *job.slow])
        # One thread of linear algebra, as Ray gives its workers.
        program = ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "benchmarks.lab.bare"]
        return [*program, str(job.pairs), allowed, *self.options]

    def stored(self, job: Job, output: str) -> int:
        return int(_last_json(output)["stored"])


@dataclass(frozen=True)
class Img2dataset(Tool):
    """img2dataset from its venv, same output, with the settings that suited it best on two cores."""

    venv: Path = Path()

    def command(self, job: Job) -> list[str]:
        return [
            str(self.venv / "bin" / "img2dataset"), f"--url_list={job.pairs}", "--input_format=csv", "--url_col=url",
            "--caption_col=caption", f"--output_folder={job.out}", "--output_format=parquet", "--image_size=256",
            "--resize_mode=keep_ratio", "--resize_only_if_bigger=True", "--encode_quality=95", "--encode_format=jpg",
            f"--processes_count={os.cpu_count()}", "--thread_count=32", "--number_sample_per_shard=1000",
            "--extract_exif=False", *self.options,
        ]  # fmt: skip

    def stored(self, job: Job, output: str) -> int:
        return sum(int(json.loads(f.read_text())["successes"]) for f in job.out.glob("*_stats.json"))


def _last_json(output: str) -> dict[str, Any]:
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            parsed: dict[str, Any] = json.loads(line)
            return parsed
    return {"counts": {"out": -1}, "stored": -1}


def make_venv(folder: Path, requirements: Sequence[str], python: str = sys.executable) -> Path:
    """A venv of ``python`` (this one) with ``requirements``; one that is complete already is kept."""
    done = folder / "installed.txt"
    wanted = "\n".join(requirements)
    if done.exists() and done.read_text() == wanted:
        return folder
    uv = shutil.which("uv") or _beside_python("uv")
    own = str(folder / "bin" / "python")
    if uv:
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", python, str(folder)], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", own, *requirements], check=True)
    else:
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([own, "-m", "pip", "install", "--quiet", *requirements], check=True)
    done.write_text(wanted)
    return folder


def _beside_python(name: str) -> str | None:
    found = Path(sys.executable).parent / name
    return str(found) if found.exists() else None


TLS_CHECK = """
import json, ssl, sys
from img2dataset import downloader
made, original = [], ssl._create_default_https_context
def counted(*a, **k):
    made.append(1)
    return original(*a, **k)
ssl._create_default_https_context = counted
errors = [downloader.download_image((i, u), 10, None, None)[2] for i, u in enumerate(sys.argv[1:])]
print(json.dumps({"requests": len(errors), "failed": sum(e is not None for e in errors), "contexts": len(made)}))
"""


def tls_contexts(venv: Path, urls: Sequence[str], env: dict[str, str]) -> dict[str, int]:
    """How many TLS contexts img2dataset makes for these https requests: ``requests``, ``failed``, ``contexts``."""
    done = subprocess.run(
        [str(venv / "bin" / "python"), "-c", TLS_CHECK, *urls],
        env={**os.environ, **env}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    counted: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counted

"""import: images that are there already, in tars or as img2dataset wrote them -> tables pairs and images."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.archives import complain, take_in
from jobs.base import command
from jobs.download import mark
from pipeline.download.archives.layouts import find_archives
from pipeline.engine import Engine
from pipeline.ledger import Run
from schemas.configs import DownloadConfig, ImportConfig


def run(config: ImportConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`ImportConfig`."""
    with run.stage("read"):
        archives = find_archives(config.source)
    run.workspace.prepare()
    run.outputs |= {t: run.workspace.table(t).uri for t in ("pairs", "images")}
    run.reads("images")
    with run.stage("import"):
        run.figures |= take_in(_as_download(config), archives, run, engine, as_is=True)
    with run.stage("duplicates"):
        run.figures["duplicates"] = mark(_as_download(config), run)
    complain(run.figures)


def _as_download(config: ImportConfig) -> DownloadConfig:
    return DownloadConfig(
        workspace=config.workspace,
        workers=config.workers,
        resize_mode="no",
        keep_original=True,
        formats=config.formats,
        max_bytes=config.max_bytes,
        max_pixels=config.max_pixels,
        max_frames=config.max_frames,
        shard_size=config.shard_size,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill import``. Arguments before the first flag are sources, too, and ``--from`` is ``--source``."""
    arguments = ["--source" if a == "--from" else a for a in (sys.argv[1:] if argv is None else argv)]
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--source")
    return command("import", ImportConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""import: images that are there already, in tars or as img2dataset wrote them -> tables pairs and images;
vectors in clip-retrieval's layout -> tables pairs and embeddings."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.archives import complain, take_in
from jobs.base import command
from jobs.download import mark
from pipeline.download.archives.layouts import find_archives
from pipeline.engine import Engine
from pipeline.ledger import Run
from pipeline.vectors.folders import is_vector_folder
from schemas.configs import DownloadConfig, ImportConfig
from schemas.errors import UsageError


def run(config: ImportConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`ImportConfig`."""
    with run.stage("read"):
        folders = [source for source in config.source if is_vector_folder(source)]
        others = [source for source in config.source if source not in folders]
        if config.encoder is not None and not folders:
            raise UsageError(
                "--encoder is of vectors, and there are none in --source",
                expected="a folder with img_emb/*.npy and metadata/*.parquet",
                actual=", ".join(config.source),
            )
        archives = find_archives(others) if others else []
    run.workspace.prepare()
    tables = ("pairs", *(["images"] if archives else []), *(["embeddings"] if folders else []))
    run.outputs |= {t: run.workspace.table(t).uri for t in tables}
    if folders:
        _vectors(config, run, folders)
    if not archives:
        return
    run.reads("images")
    with run.stage("import"):
        run.figures |= take_in(_as_download(config), archives, run, engine, as_is=True)
    with run.stage("duplicates"):
        run.figures["duplicates"] = mark(_as_download(config), run)
    complain(run.figures)


def _vectors(config: ImportConfig, run: Run, folders: Sequence[str]) -> None:
    from jobs import import_vectors

    run.reads("embeddings")
    with run.stage("vectors"):
        run.figures |= import_vectors.take_in(config, run, folders)
    for folder, figures in run.figures["vectors"].items():
        for row in figures["left_out_rows"]:
            print(f"{folder}: left out: {row}", file=sys.stderr)


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

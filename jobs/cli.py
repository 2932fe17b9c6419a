"""``clipmill NAME ...``: finds the job and hands it its arguments."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from pipeline.lean import import_arrow_without_pandas

JOBS = {
    "demo": "the whole pipeline on a small drawn world, to a page of generated pictures",
    "download": "pairs of URL and caption -> tables pairs and images",
    "import": "webdataset tars, img2dataset's output -> pairs and images; clip-retrieval's vectors -> embeddings",
    "embed": "images and captions -> CLIP vectors in the table embeddings",
    "semdedup": "images that mean the same to an encoder -> table semantic_duplicates",
    "index": "embeddings -> FAISS indices with measured recall, published",
    "query": "search an index by text, image, key or vector, or a mix of them; one question, or a file of them",
    "serve": "the indices over HTTP: an API, clip-retrieval's protocol, a web page",
    "sql": "ask the tables in SQL, vectors as FLOAT[D]",
    "train": "train clip, prior or decoder",
    "generate": "prompts -> candidates, reranked with CLIP, the best kept",
    "evaluate": "retrieval, prior, generation and index metrics, with plots",
    "export": "images -> webdataset tars, img2dataset's layouts; vectors -> npy, clip-retrieval's and other layouts",
    "status": "what a workspace holds",
}


def _usage() -> str:
    rows = "\n".join(f"  {name:<10} {text}" for name, text in JOBS.items())
    return f"usage: clipmill JOB [options]\n\njobs:\n{rows}\n\nclipmill JOB --help lists a job's options.\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``clipmill``. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    name = arguments[0]
    if name not in JOBS:
        near = difflib.get_close_matches(name, JOBS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        print(f"clipmill: no job {name!r}{hint}\n\n{_usage()}", file=sys.stderr)
        return 2
    if argv is None:
        import_arrow_without_pandas()
    return int(importlib.import_module(f"jobs.{name}").main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())

"""What a service may do and how much: its limits, its token, and what it is given from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.collection import Collection
from pipeline.workspace import Workspace

Fetch = Callable[[str], bytes]
"""URL -> the bytes of its image. Raises UsageError, with the reason, for one that the fetch policy refuses."""


@dataclass(frozen=True)
class Source:
    """Where indices come from that are published for the first time while the service runs.

    Args:
        names: of all that there are now.
        open: one of them. What it raises is logged, and it is tried again later.
    """

    names: Callable[[], Sequence[str]]
    open: Callable[[str], Collection]


@dataclass(frozen=True)
class Options:
    """Settings of :func:`pipeline.service.create_app`, as ``schemas.configs.ServeConfig`` describes them.

    Args:
        hosts: names that the ``Host`` header may have, without port. None: any. On loopback they keep out a web page
            whose own name was pointed at 127.0.0.1 (DNS rebinding).
        workspace: whose generated pictures are shown; None: none.
        fetch: how ``image_url`` is fetched; None: it is refused.
        source: of indices that are new; None: there will be none but those at the start.
        refresh: seconds between two looks at whether a new version was published.
        warm: load the encoders at the start instead of at the first text.
        replica: name of this process in the metrics.
    """

    token: str | None = None
    hosts: frozenset[str] | None = None
    max_k: int = 1000
    max_batch: int = 1024
    max_bytes: int = 16 << 20
    timeout: float = 10.0
    concurrency: int = 256
    deletions: bool = False
    workspace: Workspace | None = None
    fetch: Fetch | None = None
    source: Source | None = None
    refresh: float = 1.0
    warm: bool = False
    replica: str = "0"

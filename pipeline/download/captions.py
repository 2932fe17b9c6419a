"""Which captions the config lets through."""

from __future__ import annotations

import re

from schemas.configs import DownloadConfig


class CaptionFilter:
    """``caption_match``, ``min_caption_length`` and ``max_caption_length`` of a config."""

    def __init__(self, config: DownloadConfig) -> None:
        self._least, self._most = config.min_caption_length, config.max_caption_length
        self._wanted = re.compile(config.caption_match) if config.caption_match else None

    def __call__(self, caption: str) -> str | None:
        """Why a caption does not pass, or None."""
        if len(caption) < self._least or (self._most is not None and len(caption) > self._most):
            return f"{len(caption)} characters"
        if self._wanted is not None and not self._wanted.search(caption):
            return f"no match for {self._wanted.pattern}"
        return None

"""The demo's web server: the world's image files on a loopback port, from this process."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from schemas.errors import ClipmillError

HOST = "127.0.0.1"


class FileServer:
    """``with FileServer(folder, port) as server``: serves ``folder``. Port 0 takes a free one, told by ``port``."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self._ready, self._error = threading.Event(), ""

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error:
            raise ClipmillError(
                f"the demo's web server cannot use port {self.port}",
                actual=self._error,
                remedy="end the program that uses it, or begin anew with another --folder",
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        application = web.Application()
        application.router.add_static("/", self.folder)
        runner = web.AppRunner(application, access_log=None)
        try:
            self._loop.run_until_complete(runner.setup())
            site = web.TCPSite(runner, HOST, self.port, backlog=1024)
            self._loop.run_until_complete(site.start())
            self.port = runner.addresses[0][1]
        except OSError as exc:
            self._error = str(exc)
            self._ready.set()
            return
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

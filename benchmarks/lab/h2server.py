"""A server of one small file over HTTP/2 and HTTP/1.1, run by the Python of a venv that has hypercorn.

    python h2server.py BYTES DELAY CERT KEY

Every path answers BYTES bytes after DELAY seconds (as a distant host does). Prints its port.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import Any

from hypercorn.asyncio import serve
from hypercorn.config import Config


async def main() -> None:
    size, delay, cert, key = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4]
    body = os.urandom(size)

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if delay:
            await asyncio.sleep(delay)
        headers = [(b"content-type", b"image/jpeg"), (b"content-length", str(size).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.certfile, config.keyfile = cert, key
    config.keep_alive_max_requests = 1_000_000
    config.h2_max_concurrent_streams = 100
    config.loglevel, config.accesslog = "error", None
    config.include_server_header = False
    waiting = asyncio.ensure_future(serve(app, config))  # type: ignore[arg-type]
    await asyncio.sleep(0.5)
    print(port, flush=True)
    await waiting


asyncio.run(main())

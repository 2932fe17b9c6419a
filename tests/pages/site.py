"""The service on a port of its own in a thread of this process, and a page of it in Chromium that is watched."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self
from urllib.parse import quote

import uvicorn
from playwright.sync_api import BrowserContext, ConsoleMessage, Dialog, Page, Request

from pipeline.collection import Collection
from pipeline.service import create_app
from pipeline.service.options import Options
from schemas.questions import Question


class Site:
    """Serves the real app. ``collections``: name -> collection."""

    def __init__(self, collections: Mapping[str, Collection], options: Options) -> None:
        self.collections, self._options = collections, options
        self._app = create_app(collections, options)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(self._serve, interface="asgi3", log_level="warning", ws="none"))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()

    @property
    def first(self) -> Collection:
        """The collection that the page begins with."""
        return next(iter(self.collections.values()))

    @contextmanager
    def limited(self, **options: Any) -> Iterator[None]:
        """Meanwhile the same collections are served with other options."""
        before, self._app = self._app, create_app(self.collections, replace(self._options, **options))
        try:
            yield
        finally:
            self._app = before

    def keys(self, name: str | None = None, k: int = 30, **question: Any) -> list[str]:
        """What a search finds, asked in Python."""
        collection = self.first if name is None else self.collections[name]
        rows = collection.search(Question.model_validate({"k": k, **question})).rows()
        return [str(row["pair_key"]) for row in rows]


class Visit:
    """A page of the site. Whatever it asks of other servers, and whatever its scripts fail at, is held against it."""

    def __init__(self, context: BrowserContext, site: Site) -> None:
        self.page, self.site = context.new_page(), site
        self.requests: list[Request] = []
        self.wrongs: list[str] = []
        self.page.on("request", self._request)
        self.page.on("pageerror", lambda error: self.wrongs.append(str(error)))
        self.page.on("console", self._console)
        self.page.on("dialog", self._dialog)

    def _request(self, request: Request) -> None:
        self.requests.append(request)
        if not request.url.startswith((f"{self.site.url}/", "blob:", "data:")):
            self.wrongs.append(f"asks {request.url}")

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:  # a status that is not 2xx
            self.wrongs.append(message.text)

    def _dialog(self, dialog: Dialog) -> None:
        self.wrongs.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    # ---- what a visitor does -----------------------------------------------------------------------

    def open(self, **state: Any) -> Page:
        """The page in this state, once everything is there."""
        self.page.goto(f"{self.site.url}/#" + "&".join(f"{n}={quote(str(v))}" for n, v in state.items()))
        self.settle()
        return self.page

    def settle(self) -> None:
        """Wait until no request is under way."""
        self.page.wait_for_selector("main:not([aria-busy])")

    def search(self, text: str) -> list[str]:
        """Type a text and Enter; the keys found."""
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")
        return self.keys()

    def keys(self) -> list[str]:
        """Keys of the results on the screen."""
        self.settle()
        return [item.get_attribute("data-id") or "" for item in self.page.locator("#results .item").all()]

    def drop(self, data: bytes, *, zone: str = "new", name: str = "picture.png", kind: str = "image/png") -> None:
        """Drop a file."""
        self.page.evaluate(_DROP, [zone, name, kind, base64.b64encode(data).decode()])
        self.settle()


_DROP = """([zone, name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, { type }));
  const options = { dataTransfer, bubbles: true, cancelable: true };
  const fire = (kind, target) => target.dispatchEvent(new DragEvent(kind, options));
  fire('dragenter', document.body);
  fire('drop', document.querySelector(`#drop [data-drop=${zone}]`));
}"""

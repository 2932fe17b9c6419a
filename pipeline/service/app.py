"""The FastAPI app over a workspace's collections."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI

from pipeline.collection import Collection
from pipeline.service.api import add_generated, add_images, add_search
from pipeline.service.errors import HANDLED, handle
from pipeline.service.guard import Guard
from pipeline.service.options import Options
from pipeline.service.pages import add_page, add_watch
from pipeline.service.routes import JsonRoute
from pipeline.service.service import Service
from pipeline.service.wire import add_wire

_VERSION = "1"
"""Of the API: it changes where an old client would no longer be understood."""


def create_app(collections: Mapping[str, Collection], options: Options | None = None) -> FastAPI:
    """The API, clip-retrieval's protocol and the web page over open collections, by name (encoder id).

    The collections stay the caller's: the app searches them and refreshes them while it runs (its lifespan).
    """
    options = options or Options()
    service = Service(collections, options)
    app = FastAPI(
        title="clipmill",
        version=_VERSION,
        summary="Search image-text pairs by CLIP vectors",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=service.lifespan,
    )
    app.router.route_class = JsonRoute
    app.state.service = service
    add_search(app, service)  # first: routes are tried in order
    add_wire(app, service)
    add_images(app, service)
    add_generated(app, service)
    add_watch(app, service)
    add_page(app)
    for kind in HANDLED:
        app.add_exception_handler(kind, handle)
    routes = [route for route in app.routes if isinstance(route, JsonRoute) and route.straight is not None]
    straight = {(method, route.path): route for route in routes for method in route.methods or ()}
    app.add_middleware(Guard, options=options, metrics=service.metrics, straight=straight)
    return app

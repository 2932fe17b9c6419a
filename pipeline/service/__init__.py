"""The HTTP service: our API, clip-retrieval's protocol and the web page over the collections of a workspace.

``create_app`` makes the ASGI app; ``Server`` serves it from a thread. ``jobs/serve.py`` runs both on Ray Serve.
"""

from pipeline.service.app import create_app
from pipeline.service.options import Options, Source
from pipeline.service.server import Server, bind, is_loopback, require_free

__all__ = ["Options", "Server", "Source", "bind", "create_app", "is_loopback", "require_free"]

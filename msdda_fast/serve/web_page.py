# SPDX-License-Identifier: Apache-2.0
"""The web page at `/`: a few static files of this package that use the public API."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response

__all__ = ["add_page"]

TYPES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "api.js": "text/javascript",
    "balance.js": "text/javascript",
    "paint.js": "text/javascript",
    "start.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    # images are in the answers, as data: URLs
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # the files are those of the version that runs
}


def add_page(app: FastAPI) -> None:
    """Serve the page at `/` and its files beside it; no other file is reachable."""
    folder = files("msdda_fast.serve") / "page"
    for name, kind in TYPES.items():
        _add(app, "/" if name == "index.html" else f"/{name}", (folder / name).read_bytes(), kind)


def _add(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    async def read() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    app.add_api_route(path, read, methods=["GET", "HEAD"], include_in_schema=False)

"""The inspector page at /promprune: a few static files, nothing loaded from other hosts."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse

PATH = "/promprune"
_STATIC = Path(str(files("promprune_vllm") / "server" / "static"))
_PHOTOS = Path(str(files("promprune_vllm") / "demo" / "photos"))
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".jpg": "image/jpeg"}
_HEADERS = {
    # The browser refuses anything that is not from this server; images are shown from memory (data: and blob:).
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page() -> APIRouter:
    """Return the page's routes. They need no API key; the routes that the page calls do."""
    routes = APIRouter(prefix=PATH, include_in_schema=False)
    files_by_name = {folder: {path.name: path for path in folder.iterdir()} for folder in (_STATIC, _PHOTOS)}

    def file(folder: Path, name: str) -> FileResponse:
        path = files_by_name[folder].get(name)
        if path is None or path.suffix not in _TYPES:
            raise HTTPException(404, f"{PATH} has no file {name!r}.")
        return FileResponse(path, media_type=_TYPES[path.suffix], headers=_HEADERS)

    @routes.get("")
    def index() -> FileResponse:
        return file(_STATIC, "index.html")

    @routes.get("/static/{name}")
    def static(name: str) -> FileResponse:
        return file(_STATIC, name)

    @routes.get("/samples/{name}")
    def sample(name: str) -> FileResponse:
        return file(_PHOTOS, name)

    return routes

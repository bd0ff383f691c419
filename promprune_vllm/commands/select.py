"""``promprune select``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from promprune_vllm.commands.failures import failing
from promprune_vllm.core.budget import from_text
from promprune_vllm.errors import InspectError

_DEFAULT_BUDGET = "64"
_WIDTH_PX = 840  # maximum width of one picture in a sheet
_CLIP_WIDTH_PX = 1680  # likewise, of all frames of a video


def select(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Images and videos, such as .mp4.", show_default=False)
    ],
    *,
    budget: Annotated[
        str | None, typer.Option(help='Tokens to keep: 64, 0.25, "25%" or "full" (default: 64).')
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Method that selects the tokens (default: the server's).")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Draw one picture for each of these methods.")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(metavar="K,K", help="Draw one picture for each of these budgets.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="The question, to be answered; some methods use it.")] = None,
    url: Annotated[str, typer.Option(help="Address of a running server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="API key of the server at --url, if any.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG file to write (default: FILE.overlay.png for the first FILE).")
    ] = None,
    columns: Annotated[int, typer.Option(min=1, help="Pictures per row of the sheet.")] = 4,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the server's reply, one JSON line per picture.")
    ] = False,
) -> None:
    """Draw which visual tokens of your images and videos a server keeps.

    One picture per file; with --compare or --budgets, one row per file with a picture per method or budget. The
    picture of a video has all frames as the model gets them, each with the number of tokens that it keeps.
    """
    from rich.console import Console

    settings = _settings(budget, budgets, method, compare)
    err = Console(stderr=True)
    with failing(status=1):
        rows = _inspect_all(files, settings, text=text, url=url, api_key=api_key, err=err, as_json=as_json)
        if out is not None or not as_json:
            target = out or files[0].with_suffix(".overlay.png")
            _write(rows, target, columns)
            err.print(f"Wrote {target}.", highlight=False)


def _settings(
    budget: str | None, budgets: str | None, method: str | None, compare: str | None
) -> list[tuple[object, str | None]]:
    if budget is not None and budgets is not None:
        raise typer.BadParameter("--budget takes one value, --budgets several: give only one of these options.")
    if method is not None and compare is not None:
        raise typer.BadParameter("--method takes one name, --compare several: give only one of these options.")
    each_budget = _names(budgets) if budgets else [budget or _DEFAULT_BUDGET]
    each_method = _names(compare) if compare else [method]
    return [(from_text(text), name) for name in each_method for text in each_budget]


def _inspect_all(
    files: list[Path],
    settings: list[tuple[object, str | None]],
    *,
    text: str | None,
    url: str,
    api_key: str | None,
    err: Any,
    as_json: bool,
) -> list[list[Any]]:
    from rich.progress import track

    from promprune_vllm.overlay.client import InspectClient
    from promprune_vllm.overlay.drawing import caption, titled

    rows: list[list[Any]] = [[] for _ in files]
    jobs = [(row, file, setting) for row, file in zip(rows, files, strict=True) for setting in settings]
    with InspectClient(url, api_key) as server:
        for row, file, (budget, method) in track(jobs, "Inspecting …", console=err, disable=not err.is_terminal):
            reply = server.inspect(file, budget, method, text)
            if as_json:
                print(_line(file, budget, reply), flush=True)
            row.append(titled(_drawn(file, reply), f"{file.name}, {caption(reply)}"))
    return rows


def _line(file: Path, budget: object, reply: dict[str, Any]) -> str:
    """Return a line of JSON, without the pictures of frames."""
    frames = reply["frames"] and [{"kept": frame["kept"]} for frame in reply["frames"]]
    return json.dumps({"file": str(file), "visual_token_budget": budget, **reply, "frames": frames})


def _drawn(file: Path, reply: dict[str, Any]) -> Any:
    from promprune_vllm.overlay.drawing import contact_sheet, overlay

    if reply["frames"]:
        return _fit(contact_sheet(reply), _CLIP_WIDTH_PX)
    return _fit(overlay(_open(file), reply), _WIDTH_PX)


def _open(image: Path) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(image) as file:
            return ImageOps.exif_transpose(file).convert("RGB")  # rotated as the server does it
    except (OSError, Image.DecompressionBombError) as error:
        raise InspectError(f"{image} cannot be drawn: {error}") from error


def _fit(picture: Any, width: int) -> Any:
    if picture.width <= width:
        return picture
    return picture.resize((width, max(1, round(picture.height * width / picture.width))))


def _write(rows: list[list[Any]], target: Path, columns: int) -> None:
    from promprune_vllm.overlay.drawing import sheet

    try:
        sheet(rows, columns).save(target)
    except (OSError, ValueError) as error:
        raise InspectError(f"{target} cannot be written: {error}. Give a PNG file with --out.") from error


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter(f"{text!r} has no values; give them comma-separated.")
    return names

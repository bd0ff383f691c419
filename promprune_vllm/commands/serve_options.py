"""The options that ``promprune serve`` adds to vLLM's: built from ``Settings``, passed on as variables."""

from __future__ import annotations

import argparse
import os
import typing
from collections.abc import Sequence

from pydantic.fields import FieldInfo

from promprune_vllm.config import FLAG, PREFIX, Settings

_ALIASES = {"allow_methods": ("--allow-methods",), "inspector": ("--inspector",)}
_METAVARS = {
    "method": "NAME",
    "method_options": "JSON",
    "allow_methods": "NAME,NAME",
    "escalate": "PROBABILITY",
    "audit": "PERCENT",
    "target": "PERCENT",
    "feature_cache_gb": "GB",
}
_EPILOG = """\
Each request sets how many tokens to keep per image or video: {"visual_token_budget": 64, ...}.
The rest of this help is vLLM's own.
"""


def take(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Put our options into the environment, where every process of vLLM finds them.

    Returns:
        The arguments that are not ours, and whether ``--dry-run`` is among ours.
    """
    ours, rest = _parser().parse_known_args(list(arguments))
    options = vars(ours)
    dry_run: bool = options.pop("dry_run")
    for name, value in options.items():
        if value is not None:
            os.environ[variable(name)] = str(value).lower() if isinstance(value, bool) else value
    return rest, dry_run


def help_text() -> str:
    """Return our part of ``promprune serve --help``."""
    return _parser().format_help()


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"{PREFIX}{name.upper()}"


def explanation(field: FieldInfo) -> str:
    """Return what a setting does and its default, for ``--help`` and the documents."""
    says_default = "default" in str(field.description) or field.default_factory is not None
    default = "" if says_default or field.default in (None, False, ()) else f" (default: {field.default})"
    return f"{field.description}{default}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="promprune serve",
        usage="promprune serve MODEL [PromPrune options] [options of vllm serve]",
        add_help=False,
        allow_abbrev=False,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("PromPrune options")
    for name, field in Settings.model_fields.items():
        flags = (FLAG + name.replace("_", "-"), *_ALIASES.get(name, ()))
        explained = f"{explanation(field)}. Also {variable(name)}.".replace("%", "%%")
        if field.annotation is bool:
            switch = argparse.BooleanOptionalAction
            group.add_argument(*flags, dest=name, action=switch, default=None, help=explained)
        else:
            # No `choices=` here: Settings refuses other values, in the same way as for the variable.
            choices = typing.get_args(field.annotation) if _is_choice(field.annotation) else ()
            metavar = f"{{{','.join(choices)}}}" if choices else _METAVARS.get(name, "TOKENS")
            group.add_argument(*flags, dest=name, metavar=metavar, help=explained)
    group.add_argument("--dry-run", action="store_true", help="print the settings in force and exit.")
    return parser


def _is_choice(annotation: object) -> bool:
    return typing.get_origin(annotation) is typing.Literal

"""The one list of methods. Knows no method: each file in ``methods/`` registers its own."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.selection import Selection
from promprune_vllm.errors import SettingsError, UnknownMethodError


class Selector(Protocol):
    """A method: a frozen dataclass whose fields are the paper's symbols, with the paper's defaults.

    ``merges`` says whether its selections carry ``rows``, merged out of several tokens, or only drop tokens;
    a method that does not say it drops.

    A method that gains by choosing from several groups at once adds ``select_many(groups, keeps)``, a list of what
    ``select`` returns for each; the others are asked group by group.
    """

    name: ClassVar[str]
    needs: ClassVar[Need]
    paper: ClassVar[str]
    merges: ClassVar[bool]

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Choose ``keep`` of N tokens. May assume ``1 <= keep < N`` and that every need is there."""


_S = TypeVar("_S", bound=type)
_METHODS: dict[str, type] = {}


def register(cls: _S) -> _S:
    """Class decorator: add a method to the registry under its ``name``."""
    name = cls.name  # type: ignore[attr-defined]
    taken = _METHODS.get(name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"two methods are named {name!r}: {taken} and {cls}")
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"method {name!r} must be a frozen dataclass: its fields are its options")
    if not hasattr(cls, "merges"):
        cls.merges = False  # type: ignore[attr-defined]
    _METHODS[name] = cls
    return cls


def methods() -> MappingProxyType[str, type[Selector]]:
    """Every registered method by name, in alphabetical order."""
    _load()
    return MappingProxyType(dict(sorted(_METHODS.items())))


def get_method(name: str, **options: Any) -> Selector:
    """Return a method with its options set.

    Args:
        name: A key of ``methods()``.
        options: Fields of the method; what is left out keeps the paper's default.

    Raises:
        UnknownMethodError: No such method; the message names the nearest one.
        SettingsError: An option the method does not have, or a value it refuses.
    """
    known = methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownMethodError(f"There is no method {name!r}.{hint} Known: {', '.join(known)}.")
    fields = option_names(known[name])
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise SettingsError(
            f"Method {name!r} has no option {', '.join(map(repr, unknown))}. "
            f"Its options: {', '.join(fields) or 'none'}."
        )
    try:
        return known[name](**options)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"Method {name!r} refuses {options!r}: {error}") from error


def option_names(method: type[Selector] | Selector) -> tuple[str, ...]:
    """Names of a method's options."""
    return tuple(field.name for field in dataclasses.fields(method))  # type: ignore[arg-type]


def options_of(method: Selector) -> dict[str, Any]:
    """Every option of a method with the value in force."""
    return {name: getattr(method, name) for name in option_names(method)}


@functools.cache
def _load() -> None:
    """Import every module of ``promprune_vllm.methods``, once, so that adding a file is adding a method."""
    load: Callable[[str], object] = importlib.import_module
    package = importlib.import_module("promprune_vllm.methods")
    for module in pkgutil.iter_modules(package.__path__):
        load(f"{package.__name__}.{module.name}")

"""The registry of methods. Each file in ``methods/`` registers its own; nothing here names one."""

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

    ``merges`` tells whether its selections carry ``rows``, merged from several tokens, or only drop tokens. It
    may be left out if the method drops.

    ``calibrated_as`` names the method whose calibration for a model it uses; its own if left out.

    ``over_frames`` tells whether it compares the frames of a video. Such a method gets a whole clip as one group,
    with at least two frames in its grid, and divides ``keep`` over them itself; it cannot prune an image. Other
    methods get images, and videos frame by frame. It may be left out for these.

    A method that is faster on several groups at once adds ``select_many(groups, keeps)``, which returns what
    ``select`` would for each group. For other methods, ``select`` is called group by group.
    """

    name: ClassVar[str]
    needs: ClassVar[Need]
    paper: ClassVar[str]
    merges: ClassVar[bool]
    over_frames: ClassVar[bool]
    calibrated_as: ClassVar[str]

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Choose ``keep`` of N tokens. May assume ``1 <= keep < N`` and that the features meet ``needs``."""


_S = TypeVar("_S", bound=type)
_METHODS: dict[str, type[Any]] = {}
_TRAITS = ("merges", "over_frames")
"""What a method may leave out; then it is not so."""


def register(cls: _S) -> _S:
    """Class decorator: add a method to the registry under its ``name``."""
    name = cls.name  # type: ignore[attr-defined]
    other = _METHODS.get(name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"two methods are named {name!r}: {other} and {cls}")
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"method {name!r} must be a frozen dataclass: its fields are its options")
    for trait in _TRAITS:
        if not hasattr(cls, trait):
            setattr(cls, trait, False)
    if not hasattr(cls, "calibrated_as"):
        cls.calibrated_as = name  # type: ignore[attr-defined]
    _METHODS[name] = cls
    return cls


def methods(*, over_frames: bool | None = None) -> MappingProxyType[str, type[Selector]]:
    """Return the registered methods by name, in alphabetical order.

    Args:
        over_frames: ``True``: only the methods that compare the frames of a video; ``False``: only those that can
            prune an image; all by default.
    """
    _load()
    wanted = (False, True) if over_frames is None else (over_frames,)
    return MappingProxyType({name: cls for name, cls in sorted(_METHODS.items()) if cls.over_frames in wanted})


def get_method(name: str, **options: Any) -> Selector:
    """Return a method with its options set.

    Args:
        name: A key of ``methods()``.
        options: Fields of the method; options left out keep the paper's default.

    Raises:
        UnknownMethodError: There is no such method; the message suggests the closest name.
        SettingsError: The method does not have an option, or refuses its value.
    """
    registered = methods()
    if name not in registered:
        close = difflib.get_close_matches(name, registered, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnknownMethodError(f"There is no method {name!r}.{hint} Known: {', '.join(registered)}.")
    fields = option_names(registered[name])
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise SettingsError(
            f"Method {name!r} has no option {', '.join(map(repr, unknown))}. "
            f"Its options: {', '.join(fields) or 'none'}."
        )
    try:
        return registered[name](**options)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"Method {name!r} refuses {options!r}: {error}") from error


def option_names(method: type[Selector] | Selector) -> tuple[str, ...]:
    """Return the names of a method's options."""
    return tuple(field.name for field in dataclasses.fields(method))  # type: ignore[arg-type]


def options_of(method: Selector) -> dict[str, Any]:
    """Return every option of a method with its current value."""
    return {name: getattr(method, name) for name in option_names(method)}


@functools.cache
def _load() -> None:
    """Import every module of ``promprune_vllm.methods``, once: adding a file adds a method."""
    load: Callable[[str], object] = importlib.import_module
    package = importlib.import_module("promprune_vllm.methods")
    for module in pkgutil.iter_modules(package.__path__):
        load(f"{package.__name__}.{module.name}")

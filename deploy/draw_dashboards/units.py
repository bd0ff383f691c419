"""Writes numbers as Grafana does: with a prefix of their size, about three digits, and the unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

_SI = ("", "K", "M", "G", "T", "P", "E")
_COUNTS = ("", " K", " Mil", " Bil", " Tri", " Quadr", " Quint")
_BYTES = (" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB")
_SECONDS = ((60.0, " mins"), (1.0, " s"), (1e-3, " ms"), (1e-6, " µs"), (1e-9, " ns"))
_PREFIXED = {"si:FLOP": "FLOP", "flops": "FLOP/s", "reqps": "req/s", "ops": "ops/s"}


def written(value: float, unit: str, decimals: int | None = None) -> str:
    """Return a number with its unit.

    Args:
        value: The number.
        unit: Grafana's name of a unit; one that it does not know is written behind the number, as it does.
        decimals: Digits behind the point; as many as fit if ``None``.
    """
    if unit == "percentunit":
        return f"{_digits(100 * value, decimals)}%"
    if unit == "s":
        divisor, name = next((each for each in _SECONDS if abs(value) >= each[0]), _SECONDS[-1])
        return f"{_digits(value / divisor, decimals)}{name}" if value else "0 s"
    if unit in ("bytes", "binBps"):
        return _scaled(value, 1024, _BYTES, decimals) + ("/s" if unit == "binBps" else "")
    if unit == "short":
        return _scaled(value, 1000, _COUNTS, decimals)
    if unit in _PREFIXED:
        prefixes = [f" {each}" for each in _SI]
        return _scaled(value, 1000, prefixes, decimals) + _PREFIXED[unit]
    return _digits(value, decimals) + ("" if unit == "none" else f" {unit}")


def _scaled(value: float, base: int, names: Sequence[str], decimals: int | None) -> str:
    power = 0 if abs(value) < 1 else min(len(names) - 1, int(math.log(abs(value), base) + 1e-9))
    return f"{_digits(value / base**power, decimals)}{names[power]}"


def _digits(value: float, decimals: int | None) -> str:
    if decimals is not None:
        return f"{value:.{decimals}f}"
    if value == 0:
        return "0"
    behind = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(behind, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text

"""Numbers on the drawn dashboards are written as Grafana writes them."""

from __future__ import annotations

import pytest

from deploy.draw_dashboards.units import written
from tests.deploy.watching import targets

WRITTEN = [
    (0.5642, "percentunit", None, "56.4%"),
    (0.5642, "percentunit", 0, "56%"),
    (34_012, "short", None, "34 K"),
    (999, "short", None, "999"),
    (2_500_000, "short", None, "2.5 Mil"),
    (75_000_000, "bytes", None, "71.5 MiB"),
    (512, "binBps", None, "512 B/s"),
    (5.03e10, "si:FLOP", None, "50.3 GFLOP"),
    (2.13e8, "flops", None, "213 MFLOP/s"),
    (0.0345, "s", None, "34.5 ms"),
    (0.000625, "s", None, "625 µs"),
    (95, "s", None, "1.58 mins"),
    (0, "s", None, "0 s"),
    (4.2, "reqps", None, "4.2 req/s"),
    (0.78, "none", 2, "0.78"),
    (186, "tokens/s", None, "186 tokens/s"),  # no unit of Grafana's: it stands behind the number
]


@pytest.mark.parametrize(("value", "unit", "decimals", "text"), WRITTEN)
def test_a_number_is_written_with_its_unit(value: float, unit: str, decimals: int | None, text: str) -> None:
    assert written(value, unit, decimals) == text


def test_every_unit_of_the_dashboards_is_among_them() -> None:
    units = {panel["fieldConfig"]["defaults"].get("unit", "none") for _, panel, _ in targets()}
    known = {unit for _, unit, _, _ in WRITTEN}
    assert {unit for unit in units - known if "/" not in unit and unit not in ("tokens", "ops")} == set()

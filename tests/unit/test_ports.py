"""The ports of servers that we start."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from promprune_vllm.demo import server

GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The ports that Linux gives to whoever asks for any, such as engines."""


@pytest.mark.skipif(not GIVEN.exists(), reason="this system has no such file")
def test_a_servers_port_is_none_that_the_system_gives_to_others() -> None:
    lowest, _ = map(int, GIVEN.read_text().split())
    assert all(server.free_port() < lowest for _ in range(50))


def test_a_port_that_somebody_listens_on_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening:
        taken = server.free_port()
        listening.bind(("127.0.0.1", taken))
        listening.listen()
        monkeypatch.setattr(server, "_PORTS", (taken, taken + 2))
        assert server.free_port() == taken + 1

"""A slice of `promprune bench soak` on the common server; the whole of it is `make soak`."""

from __future__ import annotations

import pytest

from promprune_vllm.bench.soak import Soak, run
from promprune_vllm.demo.server import Server

pytestmark = [pytest.mark.server, pytest.mark.release]


def test_mixed_traffic_is_answered_as_one_by_one(server: Server) -> None:
    # Answers long enough for some of the clients that leave to do so before the end, on a fast machine too.
    soak = Soak(requests=250, minutes=8, concurrency=8, distinct=24, output_tokens=12)
    document = run(server.url, soak, server.process.pid, show_progress=print)
    counts = document["counts"]
    assert not {"wrong", "lost", "refused", "failed"} & counts.keys(), document["troubles"]
    assert counts["answered"] > 50
    assert counts["aborted"] > 0  # how many get away in time is a matter of the machine's speed
    assert set(document["fullest"]) == {"encoder cache", "processor cache"}
    assert all(0 < share <= 1 for share in document["fullest"].values())
    assert document["held"][-1]["descriptors"] > 0

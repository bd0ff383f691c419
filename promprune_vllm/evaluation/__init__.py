"""``promprune eval``: measures how pruning affects answers, by asking a server about scenes over HTTP."""

"""``promprune tune``: chooses a budget on an operator's own questions, by asking a server over HTTP."""

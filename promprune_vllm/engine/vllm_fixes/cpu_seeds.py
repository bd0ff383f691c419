"""Workaround for requests on a CPU with a ``seed`` and a prompt that takes several steps.

In each step vLLM (0.29 to 0.33) samples a token for every request, even if its prompt is not complete yet, and
then returns the random numbers by moving the generator's offset back. CPU generators have no offset: the step
fails, which ends the engine. A seed and a prompt longer than ``--max-num-batched-tokens`` are enough.
"""

from __future__ import annotations

from typing import Any

from promprune_vllm.engine.keys import SAVED_GENERATORS


def save_states(original: Any) -> Any:
    """Wrap sampling: save the state of each generator that vLLM will rewind."""

    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        discarded = self.discard_request_mask.np
        generators = self.input_batch.generators
        saved = {i: (each, each.get_state()) for i, each in generators.items() if discarded[i]}
        setattr(self, SAVED_GENERATORS, saved)
        return original(self, *args, **kwargs)

    return sample


def restore_states(original: Any) -> Any:
    """Wrap the bookkeeping that rewinds generators: restore their saved states instead."""

    def bookkeeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        hidden = {}
        for i, (generator, state) in self.__dict__.pop(SAVED_GENERATORS, {}).items():
            generator.set_state(state)
            hidden[i] = generators.pop(i)  # hidden, as vLLM would move its offset
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(hidden)

    return bookkeeping

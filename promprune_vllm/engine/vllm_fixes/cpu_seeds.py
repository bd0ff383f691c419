"""Requests with a ``seed`` whose prompt takes several steps, on a CPU.

vLLM (0.29 to 0.32) samples for every request in a step, also for one whose prompt has not been read to its end,
and takes the random numbers back by moving the generator's offset. Generators of a CPU have no offset: the step
fails, and that ends the engine. A seed and a prompt longer than ``--max-num-batched-tokens`` are enough.
"""

from __future__ import annotations

from typing import Any

from promprune_vllm.engine.keys import GENERATORS


def save_states(original: Any) -> Any:
    """Wrap sampling: keep the state of each generator whose random numbers are to be taken back."""

    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        discarded = self.discard_request_mask.np
        generators = self.input_batch.generators
        saved = {i: (each, each.get_state()) for i, each in generators.items() if discarded[i]}
        setattr(self, GENERATORS, saved)
        return original(self, *args, **kwargs)

    return sample


def restore_states(original: Any) -> Any:
    """Wrap what takes them back: by restoring the state, where vLLM would move an offset."""

    def bookkeeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        hidden = {}
        for i, (generator, state) in self.__dict__.pop(GENERATORS, {}).items():
            generator.set_state(state)
            hidden[i] = generators.pop(i)  # vLLM would move its offset
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(hidden)

    return bookkeeping

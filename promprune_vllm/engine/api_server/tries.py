"""What becomes of the tries of one prompt, for the reply's usage and the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from promprune_vllm.engine.api_server import prompt_metrics
from promprune_vllm.engine.api_server.answer_confidence import Watch
from promprune_vllm.engine.api_server.pruning_plan import Retry, Summary, replace_prompt_images
from promprune_vllm.engine.keys import COUNTED, REPROCESS, SUMMARY
from promprune_vllm.metrics.recorder import recorder
from promprune_vllm.server.usage import FirstTry, record_first_try


class Tries:
    """The tries of one prompt.

    A prompt is counted in the metrics of images and tokens once, as the try that is answered.

    Args:
        input_processor: vLLM's, of the engine's client.
        prompt: The first try's.
        retry: The second try.
    """

    def __init__(self, input_processor: Any, prompt: dict[str, Any], retry: Retry) -> None:
        self._input_processor = input_processor
        self._metrics = recorder(input_processor.model_config.served_model_name)
        self._accepted = self._counted = False
        self.prompt = prompt
        self.retry = retry

    def accept(self) -> None:
        """Remember that the engine has accepted the first try."""
        self._accepted = True

    def no_room(self) -> None:
        """Count a prompt whose second try would be too long."""
        self._metrics.escalation("no_room")

    def ended(self) -> None:
        """Count a prompt that ended before it was known which try is answered: it failed, or was canceled."""
        if self._accepted:
            self._count_first()

    def first_stands(self, watch: Watch) -> None:
        """Tell that the first try is answered. Idempotent."""
        if self._counted:
            return
        self._count_first()
        self.prompt.pop(REPROCESS, None)  # frees the images
        if not watch.failed:
            self._metrics.escalation("sure", watch.confidence)
            record_first_try(FirstTry(watch.confidence))

    def _count_first(self) -> None:
        if not self._counted:
            self._counted = True
            prompt_metrics.count(self._input_processor, self.prompt)

    def second_ended(self, prompt: Mapping[str, Any]) -> None:
        """Tell that a second try ended, answered or not; once the engine has accepted it, it is counted."""
        self._counted = self._counted or COUNTED in prompt

    def second_starts(self, prompt: dict[str, Any], watch: Watch) -> None:
        """Tell of the second try, whose answer begins.

        Args:
            prompt: Of the second try; the first prompt if there could be none.
            watch: Of the first try.
        """
        again = prompt is not self.prompt
        summary: Summary = self.prompt[SUMMARY]
        length = len(self.prompt["prompt_token_ids"])
        self._metrics.escalation("asked_again" if again else "failed", watch.confidence)
        self._metrics.discarded(prompt=length, visual=summary.kept, answer=watch.tokens)
        placeholders = prompt["mm_placeholders"] if again else {}
        lengths = {kind: sum(each.length for each in ranges) for kind, ranges in placeholders.items()}
        record_first_try(FirstTry(watch.confidence, again, summary.kept, length, watch.tokens), lengths)
        replace_prompt_images(self.prompt, prompt)
        self.prompt[SUMMARY] = prompt[SUMMARY]  # an audit looks at what was answered
        self.prompt.pop(REPROCESS, None)

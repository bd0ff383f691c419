"""The shares that images keep under a target, the same in all API servers of a machine.

Each API server audits its own answers. What they find moves one ladder per class of image sizes, which is kept in
a small file next to the metrics: a server that has audited an answer locks it, counts, and replaces it; the others
see that it has changed. It ends with the server, so a server starts with all tokens.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from promprune_vllm.config import FLAG
from promprune_vllm.core.target import CLASSES, Audits, Ladder, size_class
from promprune_vllm.engine.api_server.all_media import EncodedMedia
from promprune_vllm.engine.api_server.pruning_plan import Targeted
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.metrics.metric import SIZES
from promprune_vllm.metrics.recorder import DIRECTORY_VARIABLE, prepare_directory, recorder
from promprune_vllm.server.schemas import Target, TargetSize

logger = logging.getLogger("vllm.promprune")
SIZE_WORDS = ("up to 1,024", "1,025 to 4,096", "more than 4,096")


class TargetLevels:
    """The ladders of all classes of image sizes.

    Args:
        file: File with their state, shared by the API servers of this machine.
        target: Share of answers that are to agree.
        model_name: Label of the metrics.
    """

    def __init__(self, file: Path, target: float, model_name: str) -> None:
        self._file, self._target = file, target
        self._metrics = recorder(model_name)
        self._seen: tuple[int, int] | None = None
        self._ladders = [Ladder(target) for _ in range(len(CLASSES) + 1)]
        self._show()

    @property
    def ladders(self) -> list[Ladder]:
        """The ladder of each class now; to be read and not changed."""
        try:
            status = os.stat(self._file)
        except FileNotFoundError:  # nothing was audited yet
            return self._ladders
        if self._seen != (status.st_mtime_ns, status.st_ino):
            self._seen = status.st_mtime_ns, status.st_ino
            self._ladders = [_ladder(each, self._target) for each in json.loads(self._file.read_text())]
            self._show()
        return self._ladders

    def targeted(self, tokens: Sequence[int], request: PruningRequest) -> Targeted:
        """Return what the images of one prompt keep: one share, that of the largest image.

        Args:
            tokens: Tokens before pruning of the images whose sizes are known.
            request: Says something else for an audit.
        """
        size = size_class(max(tokens, default=1))
        return Targeted(size, self.ladders[size].share if request.share is None else request.share)

    def trial(self, targeted: Targeted | None) -> Targeted | None:
        """Return the share to try out behind an answer, ``None`` if there is none or the ladder has moved."""
        if targeted is None:
            return None
        ladder = self.ladders[targeted.size]
        if targeted.share != ladder.share or ladder.next_share is None:
            return None
        return Targeted(targeted.size, ladder.next_share)

    def try_out(self, trial: Targeted, agreed: float) -> None:
        """Count how probably an answer is the same with a share on trial."""
        self._metrics.trial(SIZES[trial.size], agreed)
        self.observe(trial, agreed)

    def observe(self, targeted: Targeted, agreed: float) -> None:
        """Count an audit: how probably the answer is the same as with all visual tokens."""
        with self._locked():
            ladders = self.ladders
            ladder = ladders[targeted.size]
            before, now = ladder.share, ladder.observe(targeted.share, agreed)
            new = self._file.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps([asdict(each) for each in ladders]))
            new.replace(self._file)
        if now != before:
            logger.info(
                "PromPrune: by %starget, images of %s visual tokens now keep %s of them (%s before).",
                *(FLAG, SIZE_WORDS[targeted.size], now, before),
            )
        self._show()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for a millisecond
            yield
        finally:
            os.close(descriptor)

    def _show(self) -> None:
        for name, ladder in zip(SIZES, self._ladders, strict=True):
            self._metrics.target(name, ladder.share, ladder.proof)


def _ladder(state: dict[str, Any], target: float) -> Ladder:
    audits = {name: Audits(**state[name]) for name in ("present", "next")}
    return Ladder(target, state["index"], attempts=state["attempts"], **audits)


_levels: dict[str, TargetLevels] = {}


def target_levels(target: float | None, model_name: str) -> TargetLevels | None:
    """Return this process's levels, ``None`` without a target."""
    if target is None:
        return None
    prepare_directory()
    directory = os.environ[DIRECTORY_VARIABLE]
    if directory not in _levels:
        _levels[directory] = TargetLevels(Path(directory) / "target", target, model_name)
    return _levels[directory]


def find_targeted(
    processor: Any, request: PruningRequest, images: Any, kwargs: Mapping[str, object]
) -> Targeted | None:
    """Return what images of a prompt keep by the server's target, ``None`` if it has none.

    Args:
        processor: Our processor, which counts an image's tokens.
        request: What the client sent.
        images: ``None`` if the prompt has none, or ``PromptMedia``.
        kwargs: Processor options of the request.
    """
    levels = target_levels(processor.agreement, processor.info.ctx.model_config.served_model_name)
    if levels is None or images is None or isinstance(images, EncodedMedia):
        return None
    known = [i for i, size in enumerate(images.sizes) if size is not None]
    return levels.targeted([processor.image_tokens(images, i, kwargs) for i in known], request)


def target_state(target: float | None, model_name: str) -> Target:
    """Return what ``GET /v1/visual_tokens`` tells."""
    levels = target_levels(target, model_name)
    ladders = zip((*CLASSES, None), [] if levels is None else levels.ladders, strict=False)
    return Target(
        agreement=target,
        sizes=[
            TargetSize(
                up_to=up_to,
                share=float(ladder.share),
                next_share=None if ladder.next_share is None else float(ladder.next_share),
                proof=min(1.0, ladder.proof),
                agreed=ladder.next.agreed,
                differed=ladder.next.differed,
            )
            for up_to, ladder in ladders
        ],
    )

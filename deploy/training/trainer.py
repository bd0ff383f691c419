"""The training loop: a clock, a log, checkpoints, and steps on any number of patches."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from deploy.training import schedule
from deploy.training.architecture import Heads, begin_projector, new_model
from deploy.training.data import Pool, pair_texts, subset
from deploy.training.forward import encode_patches, normalize_patches, patch_statistics, predict
from deploy.training.losses import answer_loss, gaze_loss, patch_loss, place_loss
from deploy.training.optimiser import Optimiser
from deploy.training.samples import LABELS, TASK_IDS
from deploy.training.schedule import Stage
from promprune_vllm.demo.threads import torch_threads

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
_SAVE_EVERY_S = 120.0
_LOG_EVERY_S = 20.0
_CHECK_EVERY_S = 300.0  # scoring on held-out scenes
_TASKS = list(TASK_IDS)


class Trainer:
    """One run in its own directory; a new trainer in the same directory resumes from the last checkpoint.

    Args:
        directory: Directory of the checkpoint and the log.
        minutes: Total training time, including time before a resumption, but without scoring and saving.
        device: "cpu" or "cuda".
        seed: Random seed of the weights and the scenes.
        tell: Called with lines of text on the progress.
        workers: Processes that draw scenes; by default one when training on a CPU, all cores but one with a GPU.
    """

    def __init__(
        self,
        directory: Path,
        *,
        minutes: float,
        device: str,
        seed: int,
        tell: Callable[[str], None],
        workers: int | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.seconds, self.device, self.seed = directory, 60 * minutes, device, seed
        self.tell = tell
        if workers is None:
            workers = 1 if device == "cpu" else max(1, (os.cpu_count() or 2) - 1)
        self.workers = workers
        self.model, self.heads = new_model(seed)
        self.model.to(device)
        self.heads.to(device)
        self.optimiser = Optimiser(_parts(self.model, self.heads))
        # One thread per shard of a batch, instead of all threads on every operation: operations are small, and on
        # two cores half of the time was spent on synchronization.
        self.shards = 1 if device == "cuda" else max(1, min(8, os.cpu_count() or 1))
        self._threads = ThreadPoolExecutor(self.shards)
        self.elapsed, self.step, self.scenes, self.stage, self.reading = 0.0, 0, 0, "", False
        self._sums: Counter[str] = Counter()
        saved = self.directory / CHECKPOINT
        self._begin(torch.load(saved, weights_only=True) if saved.is_file() else None)

    def _begin(self, state: dict[str, Any] | None) -> None:
        if state is None:
            self.pool = Pool(self.seed, workers=self.workers)
            return
        if state["seed"] != self.seed:
            raise ValueError(
                f"{self.directory} has a run with seed {state['seed']}: use --fresh, or another directory"
            )
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.elapsed, self.step, self.scenes = state["elapsed"], state["step"], state["scenes"]
        self.reading = state["reading"]
        log = self.directory / LOG  # drop lines from after the checkpoint
        lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))
        self.tell(f"resuming at step {self.step}, {self.elapsed / 60:.1f} min")
        self.pool = Pool(self.seed, workers=self.workers, following=state["following"])
        self.pool.generator.set_state(state["generator"])

    def save(self) -> None:
        """Write the checkpoint atomically: a crash leaves the previous one intact."""
        state = {
            "seed": self.seed,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "elapsed": self.elapsed,
            "step": self.step,
            "scenes": self.scenes,
            "reading": self.reading,
            "following": self.pool.following,
            "generator": self.pool.generator.get_state(),
        }
        fresh = self.directory / f"{CHECKPOINT}.new"
        torch.save(state, fresh)
        os.replace(fresh, self.directory / CHECKPOINT)

    def train(self, check: Callable[[Any], dict[str, float]] | None = None, *, limit_s: float = math.inf) -> None:
        """Train until the time is up.

        Args:
            check: Function that scores the model on held-out scenes; called periodically.
            limit_s: Stop after at most this many seconds, at any point of the schedule.
        """
        with torch_threads(1) if self.device == "cpu" else nullcontext():
            self._train(check, min(self.seconds, self.elapsed + limit_s))

    def _train(self, check: Callable[[Any], dict[str, float]] | None, end: float) -> None:
        saved = logged = checked = self.elapsed
        while self.elapsed < end:
            begun = time.perf_counter()
            stage, within = schedule.stage_at(self.elapsed / self.seconds)
            if stage.reader[0] and not self.reading:
                self._begin_reading()
            if stage.name != self.stage:
                self.stage = stage.name
                self.tell(f"stage {stage.name!r} at {self.elapsed / 60:.1f} min, step {self.step}")
            self._one_step(stage, schedule.rates_at(stage, within))
            self.elapsed += time.perf_counter() - begun
            if self.elapsed - logged >= _LOG_EVERY_S:
                self._log(self._means())
                logged = self.elapsed
            if self.elapsed - saved >= _SAVE_EVERY_S:
                self.save()
                saved = self.elapsed
            if check is not None and stage.reader[0] and self.elapsed - checked >= _CHECK_EVERY_S:
                self._log({f"held-out {name}": score for name, score in check(self.model).items()})
                checked = self.elapsed
        self._log(self._means())
        self.save()

    @torch.no_grad()
    def _begin_reading(self) -> None:
        batch = self.pool.batch(32, uses=4)
        indices = subset(batch["held"], 144, self.pool.generator).to(self.device)
        chosen = normalize_patches(batch["patches"].to(self.device), indices)
        hidden = encode_patches(self.model.model.vision_tower, chosen, indices)
        begin_projector(self.model.model.multi_modal_projector, hidden[:, 1:].flatten(0, 1))
        self.reading = True

    def _one_step(self, stage: Stage, rates: dict[str, float]) -> None:
        rng = Random(f"step/{self.seed}/{self.step}")
        keep = rng.choice(stage.keep)
        paired = rng.random() < stage.pairs
        whole = 2 * self.shards  # gives every shard the same number of pairs
        size = max(whole, stage.batch * min(stage.keep) // keep // whole * whole)
        batch = self.pool.batch(size, uses=stage.uses)
        if paired:
            batch["text"] = pair_texts(batch["named"], rng)
        batch["indices"] = subset(batch.pop("held"), keep, self.pool.generator)
        parameters = [p for part in rates for p in self.optimiser.parameters[part]]
        columns = {name: column.to(self.device).chunk(self.shards) for name, column in batch.items()}
        shards = [{name: column[i] for name, column in columns.items()} for i in range(self.shards)]
        done = list(
            self._threads.map(lambda shard: self._gradients(stage, shard, parameters, paired=paired), shards)
        )
        for parameter, *gradients in zip(parameters, *(one for one, _ in done), strict=True):
            there = [gradient for gradient in gradients if gradient is not None]
            parameter.grad = torch.stack(there).sum(0) / self.shards if there else None
        self.optimiser.step(rates)
        for _, sums in done:
            self._sums.update(sums)
        self.step += 1
        self.scenes += size

    def _gradients(
        self, stage: Stage, batch: dict[str, Tensor], parameters: Sequence[Tensor], *, paired: bool
    ) -> tuple[tuple[Tensor | None, ...], Counter[str]]:
        sums: Counter[str] = Counter()
        with torch.autocast(self.device, torch.bfloat16, enabled=has_fast_bfloat16(self.device)):
            loss = self._loss(stage, batch, sums, paired=paired)
        sums.update({"steps": 1, "loss": loss.item()})
        return torch.autograd.grad(loss, parameters, allow_unused=True), sums

    def _loss(self, stage: Stage, batch: dict[str, Tensor], sums: Counter[str], *, paired: bool) -> Tensor:
        indices, text = batch["indices"], batch["text"]
        with torch.set_grad_enabled(stage.tower[0] > 0):
            chosen = normalize_patches(batch["patches"], indices)
            hidden = encode_patches(self.model.model.vision_tower, chosen, indices)
            loss = torch.zeros((), device=self.device)
            if stage.aux:
                predictions, shown = self.heads(hidden)
                labels = batch["labels"].gather(1, indices[..., None].expand(-1, -1, batch["labels"].shape[-1]))
                aux, figures = patch_loss(
                    predictions, shown, (labels, batch["shown"]), indices, patch_statistics(chosen)
                )
                loss = loss + stage.aux * aux
                sums.update({"aux steps": 1} | {f"aux {name}": value.item() for name, value in figures.items()})
        if not stage.reader[0]:
            return loss
        images = self.model.model.multi_modal_projector(hidden[:, 1:])
        captured: list[tuple[Tensor, Tensor]] = []
        logits = predict(self.model, [images[0::2], images[1::2]] if paired else [images], text, captured)
        answers, right = answer_loss(logits, text)
        for task, good in zip(text[:, 4].flatten().tolist(), right.flatten().tolist(), strict=True):
            if task >= 0:
                sums.update({f"n {_TASKS[task]}": 1, f"right {_TASKS[task]}": int(good)})
        sums.update({"read steps": 1, "answers": answers.item()})
        if stage.gaze and not paired:
            centre = batch["labels"][..., LABELS.index("centre")].gather(1, indices).clamp(min=0) / 100
            gaze = gaze_loss(
                [attention for attention, _ in captured], text, batch["owner"].gather(1, indices), centre
            )
            place = place_loss([self.heads.place(hidden) for _, hidden in captured[1:]], text, batch["owner"])
            sums.update({"gaze steps": 1, "gaze": gaze.item(), "place": place.item()})
            loss = loss + stage.gaze * (gaze + 2 * place)
        return loss + answers

    def _means(self) -> dict[str, float]:
        sums, self._sums = self._sums, Counter()
        means = {"loss": sums["loss"] / max(1, sums["steps"])}
        if sums["read steps"]:
            means["answers"] = sums["answers"] / sums["read steps"]
            means |= {name: sums[name] / max(1, sums["gaze steps"]) for name in ("gaze", "place")}
        means |= {
            name: sums[name] / sums["aux steps"]
            for name in sums
            if name.startswith("aux ") and name != "aux steps"
        }
        return means | {task: sums[f"right {task}"] / sums[f"n {task}"] for task in _TASKS if sums[f"n {task}"]}

    def _log(self, values: dict[str, float]) -> None:
        line = {
            "minutes": round(self.elapsed / 60, 2),
            "stage": self.stage,
            "step": self.step,
            "scenes": self.scenes,
        }
        rounded = {name: round(value, 4) for name, value in values.items()}
        with (self.directory / LOG).open("a") as file:
            file.write(json.dumps(line | rounded) + "\n")
        shown = " ".join(f"{name}={value:.3g}" for name, value in rounded.items())
        self.tell(f"{self.elapsed / 60:6.1f} min {self.stage} step {self.step}: {shown}")


def _parts(model: Any, heads: Heads) -> dict[str, Iterable[tuple[str, nn.Parameter]]]:
    """Return the named parameters of `tower` and `reader`, the parts that a stage trains or freezes."""
    inner = model.model
    tower = (inner.vision_tower, heads.patch, heads.shown)
    reader = (inner.multi_modal_projector, inner.language_model, model.lm_head, heads.place)
    return {
        part: [named for module in modules for named in module.named_parameters()]
        for part, modules in (("tower", tower), ("reader", reader))
    }


def has_fast_bfloat16(device: str) -> bool:
    """Return whether bfloat16 is faster than float32: on GPUs, and on CPUs with bfloat16 instructions."""
    return device == "cuda" or bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

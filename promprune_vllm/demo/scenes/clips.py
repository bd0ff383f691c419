"""Makes a short video from a seed: a scene in which something happens, and where each event can be seen.

The camera's sensor adds a little noise to every frame, so that no two frames are equal.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from promprune_vllm.demo.scenes.backgrounds import BACKGROUNDS, SCATTERED_WEIGHTS, background
from promprune_vllm.demo.scenes.drawing import cover, draw
from promprune_vllm.demo.scenes.layout import placed_among, scattered_things
from promprune_vllm.demo.scenes.record import HELD, PATCH, PIXELS, SPLITS, Thing

CLIP_KINDS = ("appears", "count", "order", "digit", "pan", "still")
"""``appears``: an object is there in one frame. ``count``: three to five objects, one after the other, each in two
frames. ``order``: two objects at different times, each in two frames. ``digit``: a card shows its digit in three
frames and is blank in the others. ``pan``: as ``appears``, in two frames, while the camera moves slowly.
``still``: nothing happens, and the "event" is a thing that is there all the time."""
FRAMES = 16
FPS = 2.0
_LASTS = {"appears": 1, "count": 2, "order": 2, "digit": 3, "pan": 2}  # frames of an event
_NOISE = 3  # gray levels that the sensor is off by at most
_ZOOM = 1.25  # of a picture that the camera moves over
_MOVED = 5.5  # pixels that the camera moves from a frame to the next, less than half a patch


@dataclass(frozen=True, slots=True)
class Event:
    """Something that can be seen in some of the frames.

    Args:
        thing: What is seen.
        frames: Numbers of the frames.
    """

    thing: Thing
    frames: range


@dataclass(frozen=True, slots=True)
class SceneClip:
    """One clip; its frames are the same on any machine.

    Args:
        kind: One of ``CLIP_KINDS``.
        seed: Seed of the clip.
        split: One of ``SPLITS``.
        things: What is there in every frame, in the order it is drawn.
        events: What happens.
        backdrop: The kind of background.
        moves: Pixels that the camera moves per frame, to the right and down.
    """

    kind: str
    seed: int
    split: str
    things: tuple[Thing, ...]
    events: tuple[Event, ...]
    backdrop: str
    moves: tuple[float, float]

    def frames(self) -> NDArray[np.uint8]:
        """Return the frames, ``(FRAMES, PIXELS, PIXELS, 3)``, red, green and blue."""
        generator = np.random.default_rng(Random(_key(self.kind, self.seed, self.split, "paint")).getrandbits(64))
        scene = background(self.backdrop, generator, self.split)
        for thing in self.things:
            draw(scene, thing)
        frames = []
        for number in range(FRAMES):
            canvas = scene.copy()
            for event in self.events:
                if number in event.frames:
                    draw(canvas, event.thing)
            noise = generator.integers(-_NOISE, _NOISE + 1, (PIXELS, PIXELS, 3), dtype=np.int16)
            frames.append((np.asarray(self._view(canvas, number)).astype(np.int16) + noise).clip(0, 255))
        return np.stack(frames).astype(np.uint8)

    def masks(self) -> list[dict[int, NDArray[np.bool_]]]:
        """Return, for each event, a (24, 24) mask of its patches in each frame in which some of it can be seen."""
        masks = []
        for event in self.events:
            canvas = Image.new("L", (PIXELS, PIXELS))
            cover(canvas, event.thing)
            covered = {n: np.asarray(self._view(canvas, n).reduce(PATCH)) >= 255 * HELD for n in event.frames}
            masks.append({number: mask for number, mask in covered.items() if mask.any()})
        return masks

    def _view(self, canvas: Image.Image, number: int) -> Image.Image:
        """Return what the camera sees of the scene in a frame: all of it, unless it moves."""
        if self.moves == (0, 0):
            return canvas
        side = PIXELS / _ZOOM
        start = [(PIXELS - side) / 2 - (FRAMES - 1) / 2 * step / _ZOOM for step in self.moves]
        left, top = (first + number * step / _ZOOM for first, step in zip(start, self.moves, strict=True))
        box = (left, top, left + side, top + side)
        return canvas.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR, box=box)


def make_clip(kind: str, seed: int, split: str = "held-out") -> SceneClip:
    """Return the clip of a kind, a seed and a split."""
    if kind not in CLIP_KINDS or split not in SPLITS:
        raise ValueError(f"no clip is {kind!r} and {split!r}: kinds are {CLIP_KINDS}, splits {SPLITS}")
    rng = Random(_key(kind, seed, split, "compose"))
    things, *_ = scattered_things(rng, split)
    (backdrop,) = rng.choices(BACKGROUNDS, SCATTERED_WEIGHTS)
    moves = (0.0, 0.0)
    if kind == "pan":
        angle = rng.uniform(0, 2 * math.pi)
        moves = (_MOVED * math.cos(angle), _MOVED * math.sin(angle))
    events: tuple[Event, ...]
    if kind == "still":
        events = (Event(rng.choice(things), range(FRAMES)),)
    else:
        number = {"count": rng.randint(3, 5), "order": 2}.get(kind, 1)
        times = _times(rng, number, _LASTS[kind])
        what = "card" if kind == "digit" else "shape"
        shown = placed_among(rng, split, things, what, number, middle=kind == "pan")
        events = tuple(map(Event, shown, times))
    if kind == "digit":
        things = (*things, *(replace(event.thing, what="plate", sample=-1, digit=-1) for event in events))
    return SceneClip(kind, seed, split, things, events, backdrop, moves)


def mp4(frames: NDArray[np.uint8], fps: float = FPS) -> bytes:
    """Return frames, ``(T, H, W, 3)``, as an MPEG-4 file, whose encoder loses a little. Needs OpenCV.

    Raises:
        RuntimeError: This build of OpenCV cannot write MPEG-4.
    """
    import cv2

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        size = (frames.shape[2], frames.shape[1])
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
        if not writer.isOpened():
            raise RuntimeError("This build of OpenCV cannot write MPEG-4; install opencv-python-headless.")
        for frame in frames:
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        writer.release()
        return path.read_bytes()


def _times(rng: Random, number: int, lasts: int) -> Sequence[range]:
    """Return when each event is seen: never in the first frame, and at least one frame apart."""
    free = FRAMES - 1 - number * (lasts + 1) + 1
    starts = sorted(rng.randint(0, free) for _ in range(number))
    return [range(1 + s + i * (lasts + 1), 1 + s + i * (lasts + 1) + lasts) for i, s in enumerate(starts)]


def _key(kind: str, seed: int, split: str, purpose: str) -> str:
    return f"clip/{split}/{kind}/{seed}/{purpose}"

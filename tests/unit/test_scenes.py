"""Scenes of the demo model: the same on any machine, split cleanly, asked about fairly, answerable."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from promprune_vllm.demo.scenes import KINDS, PIXELS, SPLITS, TASKS, make_scene, pair_question
from promprune_vllm.demo.scenes.assets import digit_samples, photo_names
from promprune_vllm.demo.scenes.clips import CLIP_KINDS, FRAMES, make_clip, mp4
from promprune_vllm.demo.scenes.record import SHAPES, Question, Thing

CHANCE = {
    "presence": 1 / 2,
    "count": 1 / 6,
    "colour": 1 / 6,
    "digit": 1 / 10,
    "where": 1 / 4,
    "relation": 1 / 4,  # between two of four answers, each asked for equally often
    "big-shape": 1 / 8,
    "big-colour": 1 / 6,
    "plate": 1 / 10,
}


def held_out_questions() -> dict[str, list[Question]]:
    asked = defaultdict(list)
    for kind in KINDS:
        for seed in range(1100):
            for question in make_scene(kind, seed).questions():
                asked[question.task].append(question)
    return asked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_seed_is_one_scene(kind: str, split: str) -> None:
    one, same, other = (make_scene(kind, seed, split) for seed in (7, 7, 8))
    assert one == same
    assert one.questions() == same.questions()
    assert one.image().tobytes() == same.image().tobytes()
    assert one.image().size == (PIXELS, PIXELS)
    assert one != other


def test_scenes_stay_what_they_were() -> None:
    scenes = [make_scene(kind, 3) for kind in KINDS]
    assert [scene.questions()[0].text for scene in scenes] == [
        "is there a blue triangle?",
        "what is the green digit?",
    ]


def test_splits_share_no_digit_no_photo_and_no_seed() -> None:
    train, held_out = ({s for digit in digit_samples(split) for s in digit} for split in SPLITS)
    assert not train & held_out
    assert len(train | held_out) == 1797
    assert 0.15 < len(held_out) / 1797 < 0.25
    assert not set(photo_names("train")) & set(photo_names("held-out"))
    for kind in KINDS:
        train_things = {thing for seed in range(50) for thing in make_scene(kind, seed, "train").things}
        held_out_things = {thing for seed in range(50) for thing in make_scene(kind, seed).things}
        assert not train_things & held_out_things


def test_no_constant_answer_does_well() -> None:
    asked = held_out_questions()
    assert set(asked) == set(TASKS)
    for task, questions in asked.items():
        counts = Counter(question.answer for question in questions)
        assert len(questions) >= 500
        assert counts.most_common(1)[0][1] / len(questions) < CHANCE[task] + 0.06, task
    yes = Counter(question.answer for question in asked["presence"])
    assert yes["yes"] == yes["no"]
    by_form = Counter((" above " in q.text, q.answer) for q in asked["relation"])
    assert max(by_form.values()) < 1.2 * min(by_form.values())


def answer_from_the_record(things: tuple[Thing, ...], question: Question) -> str:  # noqa: PLR0911
    words = question.text.rstrip("?").split()
    named = {thing.name: thing for thing in things}  # of equal names the last; only presence asks about such
    match question.task:
        case "presence":
            return "yes" if " ".join(words[-2:]) in named else "no"
        case "count":
            shapes = [thing for thing in things if thing.what in SHAPES]
            wanted = words[2].removesuffix("es") if words[2] == "crosses" else words[2].removesuffix("s")
            return str(sum(wanted in (thing.what, thing.colour) for thing in shapes))
        case "colour":
            return next(thing.colour for thing in things if thing.what == words[-1])
        case "digit":
            return str(named[" ".join(words[-2:])].digit)
        case "where":
            thing = named[" ".join(words[-2:])]
            return f"{'bottom' if thing.y > PIXELS / 2 else 'top'}-{'right' if thing.x > PIXELS / 2 else 'left'}"
        case "relation":
            one, other = named[" ".join(words[2:4])], named[" ".join(words[-2:])]
            if "left" in words:
                return "left" if one.x < other.x else "right"
            return "above" if one.y < other.y else "below"
        case "big-shape":
            return things[0].what
        case "big-colour":
            return things[0].colour
        case _:
            glyphs = things[1:]
            if words[-2] in ("first", "last"):
                return str(glyphs[0 if words[-2] == "first" else -1].digit)
            return str(named[f"{words[-2]} glyph"].digit)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_record(kind: str) -> None:
    for seed in range(200):
        scene = make_scene(kind, seed)
        names = Counter(thing.name for thing in scene.things)
        for question in scene.questions():
            assert question.answer == answer_from_the_record(scene.things, question)
            if question.task in ("where", "relation", "digit"):
                text = question.text.rstrip("?")
                assert all(names[name] == 1 for name in names if name in text)


@pytest.mark.parametrize("kind", KINDS)
def test_things_keep_apart(kind: str) -> None:
    for seed in range(100):
        things = [thing for thing in make_scene(kind, seed).things if thing.what not in ("plate", "glyph")]
        for i, one in enumerate(things):
            for other in things[i + 1 :]:
                reach = (one.width + other.width) / 2
                assert abs(one.x - other.x) > reach or abs(one.y - other.y) > reach


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_covers_what_was_drawn(kind: str) -> None:
    for seed in range(30):
        scene = make_scene(kind, seed)
        bare = np.asarray(replace(scene, things=()).image(), dtype=int)
        drawn = np.abs(np.asarray(scene.image(), dtype=int) - bare).sum(axis=2) > 12
        by_patch = drawn.reshape(24, 14, 24, 14).mean(axis=(1, 3))
        mask = scene.mask()
        assert mask.shape == (24, 24)
        assert mask[by_patch > 0.5].all()
        assert by_patch[~mask].max() < 0.5
        assert by_patch[mask].mean() > 0.5
        assert 0.01 < mask.mean() < 0.5


def test_two_images_can_be_told_apart() -> None:
    answers: Counter[str] = Counter()
    for kinds in (("scattered", "scattered"), ("concentrated", "concentrated"), ("scattered", "concentrated")):
        for seed in range(100):
            first, second = make_scene(kinds[0], seed), make_scene(kinds[1], seed + 1)
            try:
                question = pair_question(first, second)
            except ValueError:  # two plates, say
                continue
            assert question == pair_question(first, second)
            assert question.task == "which-image"
            answers[question.answer] += 1
            name = question.text.rstrip("?").removeprefix("which image shows a ")
            has = [any(name in (thing.name, thing.what) for thing in scene.things) for scene in (first, second)]
            assert has == [question.answer == "first", question.answer == "second"]
    assert set(answers) == {"first", "second"}
    assert abs(answers["first"] - answers["second"]) < 60


def test_no_such_kind_or_split() -> None:
    with pytest.raises(ValueError, match="no scene is"):
        make_scene("crowded", 0)
    with pytest.raises(ValueError, match="no scene is"):
        make_scene("scattered", 0, "test")


def test_scenes_need_no_torch() -> None:
    code = "import sys, promprune_vllm.demo.scenes; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "skimage", "vllm"} & set(result.stdout.split())


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_a_seed_is_one_clip_whose_events_can_be_seen(kind: str) -> None:
    clips = [make_clip(kind, seed) for seed in range(40)]
    assert clips == [make_clip(kind, seed) for seed in range(40)]
    for made in clips:
        assert len(made.events) in {"count": (3, 4, 5), "order": (2,)}.get(kind, (1,))
        assert [mask.keys() for mask in made.masks()] == [dict.fromkeys(e.frames).keys() for e in made.events]
        seen = [frame for event in made.events for frame in event.frames]
        assert len(set(seen)) == len(seen)  # one at a time
        assert kind == "still" or 0 not in seen
        assert max(seen) < FRAMES
    frames = clips[3].frames()
    assert frames.shape == (FRAMES, PIXELS, PIXELS, 3)
    assert np.array_equal(frames, clips[3].frames())
    assert not np.array_equal(frames, make_clip(kind, 3, "train").frames())


@pytest.mark.parametrize("kind", [kind for kind in CLIP_KINDS if kind not in ("pan", "still")])
def test_in_a_clip_nothing_changes_but_where_its_events_are(kind: str) -> None:
    """Beyond the noise. A patch of which an event covers little changes too, beside those of its mask."""
    made = make_clip(kind, 5)
    frames, masks = made.frames().astype(int), made.masks()
    for number in range(1, FRAMES):
        changed = abs(frames[number] - frames[0]).max(axis=2) > 12
        patches = changed.reshape(24, 14, 24, 14).any(axis=(1, 3))
        here = [mask[number] for mask in masks if number in mask]
        assert patches.any() == bool(here)
        for mask in here:
            near = np.pad(mask, 1)
            around = [near[1 + y : 25 + y, 1 + x : 25 + x] for y in (-1, 0, 1) for x in (-1, 0, 1)]
            assert not (patches & ~np.logical_or.reduce(around)).any()


def test_a_digit_is_on_its_card_in_some_frames_only() -> None:
    made = make_clip("digit", 2)
    (event,) = made.events
    assert event.thing.what == "card"
    assert made.things[-1] == replace(event.thing, what="plate", sample=-1, digit=-1)


def test_a_clip_as_a_file_has_its_frames() -> None:
    import cv2

    frames = make_clip("order", 1).frames()
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(mp4(frames))
        file.flush()
        video = cv2.VideoCapture(file.name)
        read = [cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for ok, frame in iter(video.read, (False, None)) if ok]
    assert len(read) == FRAMES
    assert abs(np.stack(read).astype(int) - frames).mean() < 12


def test_a_clip_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="no clip is 'zoom'"):
        make_clip("zoom", 0)

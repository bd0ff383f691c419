"""Generates all questions about a scene, with balanced answers where possible."""

from __future__ import annotations

from collections import Counter
from random import Random

from promprune_vllm.demo.scenes.record import (
    COLOURS,
    MAX_COUNT,
    PIXELS,
    PLURALS,
    QUARTERS,
    SHAPES,
    Question,
    Thing,
)

_CLEAR_PX = 18.0  # "where" questions: minimum distance from the other quarters
_APART_PX = 40.0  # "relation" questions: minimum distance along the axis in question
_EACH = 3  # approximate number of questions per task and scene


def scattered_questions(
    rng: Random, things: tuple[Thing, ...], counted_shape: str, counted_colour: str
) -> list[Question]:
    """Return questions about shapes and cards; "the red star" always refers to exactly one thing."""
    shapes = [thing for thing in things if thing.what in SHAPES]
    cards = [thing for thing in things if thing.what == "card"]
    names = Counter(thing.name for thing in shapes)
    single = [thing for thing in shapes if names[thing.name] == 1]
    questions = _presence(rng, shapes, single) + _count(shapes, counted_shape, counted_colour)
    kinds = Counter(thing.what for thing in shapes)
    alone = [thing for thing in shapes if kinds[thing.what] == 1]
    questions += [Question("colour", f"what colour is the {t.what}?", t.colour) for t in alone[:_EACH]]
    questions += [
        Question("digit", f"what digit is on the {card.name}?", str(card.digit)) for card in cards[:_EACH]
    ]
    findable = [*single, *cards]
    rng.shuffle(findable)
    questions += _where(findable) + _relations(rng, findable)
    rng.shuffle(questions)
    return questions


def _presence(rng: Random, shapes: list[Thing], single: list[Thing]) -> list[Question]:
    """Ask for two names that are in the scene (unique if possible) and two that are not.

    Of the latter, one has a shape and a color that are both in the scene.
    """
    there = {thing.name for thing in shapes}
    yes = [thing.name for thing in rng.sample(single or shapes, min(2, len(single or shapes)))]
    absent = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if f"{colour} {shape}" not in there]
    kinds, colours = {thing.what for thing in shapes}, {thing.colour for thing in shapes}
    near = [name for name in absent if name.split()[0] in colours and name.split()[1] in kinds] or absent
    no = [rng.choice(near), rng.choice(absent)][: len(yes)]
    ask = "is there a {}?"
    return [Question("presence", ask.format(name), "yes") for name in yes] + [
        Question("presence", ask.format(name), "no") for name in no
    ]


def _count(shapes: list[Thing], shape: str, colour: str) -> list[Question]:
    of_shape = sum(thing.what == shape for thing in shapes)
    of_colour = sum(thing.colour == colour for thing in shapes)
    numbers = {PLURALS[shape]: of_shape, f"{colour} shapes": of_colour}
    return [
        Question("count", f"how many {what} are there?", str(n)) for what, n in numbers.items() if n <= MAX_COUNT
    ]


def _where(findable: list[Thing]) -> list[Question]:
    middle = PIXELS / 2
    clear = [t for t in findable if min(abs(t.x - middle), abs(t.y - middle)) >= _CLEAR_PX]
    return [
        Question("where", f"where is the {t.name}?", QUARTERS[2 * (t.y > middle) + (t.x > middle)])
        for t in clear[:_EACH]
    ]


def _relations(rng: Random, findable: list[Thing]) -> list[Question]:
    pairs = [(one, other) for i, one in enumerate(findable) for other in findable[i + 1 :]]
    rng.shuffle(pairs)
    questions: list[Question] = []
    for one, other in pairs:
        across = rng.random() < 0.5
        far = abs(one.x - other.x) if across else abs(one.y - other.y)
        if far < _APART_PX:
            continue
        if across:
            ask, answer = "left or right of", "left" if one.x < other.x else "right"
        else:
            ask, answer = "above or below", "above" if one.y < other.y else "below"
        questions.append(Question("relation", f"is the {one.name} {ask} the {other.name}?", answer))
        if len(questions) == _EACH:
            break
    return questions


def concentrated_questions(rng: Random, things: tuple[Thing, ...]) -> list[Question]:
    """Return questions about the single large thing: its shape and color, or the digits of a plate."""
    if things[0].what != "plate":
        questions = [
            Question("big-shape", "what shape is it?", things[0].what),
            Question("big-colour", "what colour is it?", things[0].colour),
        ]
    else:
        glyphs = things[1:]
        questions = [Question("plate", f"what is the {g.colour} digit?", str(g.digit)) for g in glyphs]
        for which, glyph in (("first", glyphs[0]), ("last", glyphs[-1])):
            questions.append(Question("plate", f"what is the {which} digit?", str(glyph.digit)))
    rng.shuffle(questions)
    return questions


def shown(things: tuple[Thing, ...]) -> set[str]:
    """Return the names of everything that a scene shows, such as "red star" or "plate"."""
    return {"plate" if t.what == "plate" else t.name for t in things if t.what != "glyph"}

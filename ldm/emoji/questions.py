"""What can be asked of a composition, part by part: of its own picture, or of one that should show it."""

from dataclasses import dataclass, replace

from ldm.emoji.composition import HOLDING, Composition
from ldm.emoji.places import COUNTED, HOLDER, PAIRED

Place = tuple[float, float, float]  # centre x, centre y and side of a square, as shares of the frame
WHOLE: Place = (0.5, 0.5, 1.0)


@dataclass(frozen=True)
class Question:
    """`attribute` names the detector, `place` what it looks at; `told`: whether the caption tells the answer."""

    attribute: str
    place: Place
    answer: str
    told: bool = True


def readings(composition: Composition) -> list[list[Question]]:
    """Return the questions of each way to show this: two things next to each other may stand either way round."""
    if composition.relation != "next to":
        return [questions(composition)]
    turned = replace(
        composition,
        things=composition.things[::-1],
        colour=composition.second_colour,
        second_colour=composition.colour,
    )
    return [questions(composition), questions(turned)]


def questions(composition: Composition) -> list[Question]:
    """Return all that a picture of this composition shows and a detector can see, as the mixture paints it.

    A thing's own colour is part of the thing, and is not asked for.
    """
    asked = [
        Question(
            "style",
            WHOLE,
            composition.finish or composition.style,
            bool(composition.finish) or composition.style_named,
        ),
        Question("setting", WHOLE, composition.setting, composition.setting_named),
    ]
    if composition.finish:
        asked.pop()  # colours are gone; scenes in outlines are little more than dots
    if composition.costume:
        return [
            *asked,
            Question("face", WHOLE, composition.things[0]),
            Question("costume", WHOLE, composition.costume),
        ]
    places = _places(composition)
    seen = "thing" if places == [WHOLE] else "holder" if composition.relation == HOLDING else "part"
    for number, (place, thing) in enumerate(zip(places, composition.things * composition.count, strict=True)):
        asked.append(Question("part" if number and seen == "holder" else seen, place, thing))
    if not composition.relation:
        asked.append(Question("count", WHOLE, str(composition.count), composition.count > 1))
        if composition.count == 1:
            asked.append(Question("size", WHOLE, composition.size or "large", bool(composition.size)))
    if composition.finish:
        return asked
    for place, colour in zip(places, (composition.colour, composition.second_colour), strict=False):
        if colour and composition.relation:
            asked.append(Question("part's colour", place, colour))
    if composition.colour and not composition.relation:
        asked.append(
            Question("colour" if composition.count == 1 else "part's colour", places[0], composition.colour)
        )
    return asked


def _places(composition: Composition) -> list[Place]:
    if composition.relation == HOLDING:
        return list(HOLDER)
    if composition.relation:
        return list(PAIRED[composition.relation])
    if composition.count > 1:
        return list(COUNTED[composition.count])
    return [(0.5, 0.5, 0.5)] if composition.size == "small" else [WHOLE]

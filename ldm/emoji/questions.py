"""What can be asked of a composition, part by part: of a real one, or of one that should show a plan."""

from dataclasses import dataclass, replace

from ldm.emoji.composition import HOLDING, Composition
from ldm.emoji.recipe import COUNTED, HOLDER, PAIRED

Place = tuple[float, float, float]  # centre x, centre y and side of a square, as shares of the frame
WHOLE: Place = (0.5, 0.5, 1.0)


@dataclass(frozen=True)
class Question:
    """`attribute` names the detector, `place` what it looks at; `told`: whether the caption tells the answer."""

    attribute: str
    place: Place
    answer: str
    told: bool = True


def readings(plan: Composition) -> list[list[Question]]:
    """The questions of each way to show this plan: two things next to each other may stand either way round."""
    if plan.relation != "next to":
        return [questions(plan)]
    turned = replace(plan, things=plan.things[::-1], colour=plan.second_colour, second_colour=plan.colour)
    return [questions(plan), questions(turned)]


def questions(plan: Composition) -> list[Question]:
    """All that a picture of this plan shows and a detector can see, as the recipe paints it.

    A thing's own colour is part of the thing, and is not asked for.
    """
    asked = [
        Question("style", WHOLE, plan.finish or plan.style, bool(plan.finish) or plan.style_named),
        Question("setting", WHOLE, plan.setting, plan.setting_named),
    ]
    if plan.finish:
        asked.pop()  # colours are gone; scenes in outlines are little more than dots
    if plan.costume:
        return [*asked, Question("face", WHOLE, plan.things[0]), Question("costume", WHOLE, plan.costume)]
    places = _places(plan)
    seen = "thing" if places == [WHOLE] else "holder" if plan.relation == HOLDING else "part"
    for number, (place, thing) in enumerate(zip(places, plan.things * plan.count, strict=True)):
        asked.append(Question("part" if number and seen == "holder" else seen, place, thing))
    if not plan.relation:
        asked.append(Question("count", WHOLE, str(plan.count), plan.count > 1))
        if plan.count == 1:
            asked.append(Question("size", WHOLE, plan.size or "large", bool(plan.size)))
    if plan.finish:
        return asked
    for place, colour in zip(places, (plan.colour, plan.second_colour), strict=False):
        if colour and plan.relation:
            asked.append(Question("part's colour", place, colour))
    if plan.colour and not plan.relation:
        asked.append(Question("colour" if plan.count == 1 else "part's colour", places[0], plan.colour))
    return asked


def _places(plan: Composition) -> list[Place]:
    if plan.relation == HOLDING:
        return list(HOLDER)
    if plan.relation:
        return list(PAIRED[plan.relation])
    if plan.count > 1:
        return list(COUNTED[plan.count])
    return [(0.5, 0.5, 0.5)] if plan.size == "small" else [WHOLE]

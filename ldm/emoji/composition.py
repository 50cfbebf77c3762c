"""What one picture shows: the one description that both the drawing and the wording read."""

from dataclasses import dataclass

RELATIONS = ("next to", "left of", "right of", "above", "below")
HOLDING = "holding"


@dataclass(frozen=True)
class Composition:
    """The content of one picture. `things` are sprites' names (a costume's wearer is the face's sprite).

    `setting` is a plain background's colour or a scene's name; the `..._named` say what the caption tells. `colour` is
    of the first thing, `second_colour` of the second. `relation`: of the first to the second, one of RELATIONS or
    HOLDING. `size`: "small", or "" for about as large as the frame. `finish`: a style of the whole
    picture, a key of FINISHES; the caption always names it, in place of `style`.
    """

    kind: str
    things: tuple[str, ...]
    style: str
    setting: str
    colour: str = ""
    second_colour: str = ""
    costume: str = ""
    relation: str = ""
    count: int = 1
    size: str = ""
    finish: str = ""
    style_named: bool = False
    setting_named: bool = False
    own_colour_named: bool = False

    @property
    def names(self) -> set[str]:
        return {*self.things, self.colour, self.second_colour, self.costume, self.finish} - {""}

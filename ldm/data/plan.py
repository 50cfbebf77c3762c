"""What one picture shows: the one description that both the drawing and the wording read."""

from dataclasses import dataclass

RELATIONS = ("next to", "left of", "right of", "above", "below")


@dataclass(frozen=True)
class Plan:
    """What one picture shows. `things` are sprites' names (a costume's wearer is the face's sprite).

    `setting` is a plain background's colour or a scene's name; the `..._named` say what the caption tells.
    """

    kind: str
    things: tuple[str, ...]
    style: str
    setting: str
    colour: str = ""
    costume: str = ""
    relation: str = ""
    count: int = 1
    style_named: bool = False
    setting_named: bool = False
    own_colour_named: bool = False

    @property
    def names(self) -> set[str]:
        return {*self.things, self.colour, self.costume} - {""}

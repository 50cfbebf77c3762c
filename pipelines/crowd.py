"""Unlike drawings that share the network's calls: any number of them, each picture as soon as it is done."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Asking
from ldm.diffusion.driver import Callback, Step
from ldm.errors import UserError
from ldm.sampling import run
from ldm.sampling.engine import Engine, Ticket
from ldm.system import System
from pipelines.completion import picture_notes
from pipelines.drawing import Drawing
from pipelines.enlarging import second
from pipelines.loaded import Loaded
from pipelines.output import pictures
from pipelines.recipe import Recipe
from pipelines.requests import request_for

if TYPE_CHECKING:
    from PIL.Image import Image

_DECODED = 8  # pictures at a time


@dataclass(frozen=True)
class Drawn:
    """A picture that is done, or what prevented it. place: of its recipe among those that were given, from 0."""

    place: int
    recipe: Recipe
    image: "Image | None" = None
    notes: tuple[str, ...] = ()
    error: Exception | None = None


def asking(
    system: System,
    drawing: Drawing,
    loaded: Loaded,
    device: torch.device,
    notes: list[str],
    callback: Callback | None = None,
) -> Asking:
    """Draw the latents (1, C, h, w) of a drawing, through both of its passes, as a coroutine that asks the network."""
    request = request_for(system, [drawing], loaded, device)
    notes += request.notes
    latents = yield from run(system, request, callback)
    if drawing.second is None:
        return latents
    larger = second(system, drawing, latents[0], loaded.upscalers)
    return (yield from run(system, request_for(system, [larger], loaded, device), callback))


@dataclass
class _Guest:
    place: int
    drawing: Drawing
    notes: list[str]


class Crowd:
    """Draws for one call of a pipeline, within its turn.

    together: how many pictures are drawn at a time. They may lie `ahead` places apart at most, so that who keeps their
    order holds few.
    """

    def __init__(self, system: System, loaded: Loaded, device: torch.device, together: int):
        self.system, self.loaded, self.device = system, loaded, device
        self.together, self.ahead = together, 8 * together

        def within(weights: Hashable) -> AbstractContextManager[Any]:
            assert isinstance(weights, tuple)
            return loaded.adapters.weighed(dict(weights))

        self.engine = Engine(system, 2 * together, within)
        self._guests: dict[Ticket, _Guest] = {}

    def drawn(
        self,
        recipes: Iterable[Recipe | Drawing],
        complete: Callable[[Recipe | Drawing], Drawing],
        stepped: Callable[[], object],
    ) -> Iterator[Drawn]:
        """Yield every picture as soon as it is done, in no order, and for what can't be drawn its error.

        complete: makes a drawing of a recipe; may raise UserError. stepped: called after every prediction.
        """
        coming, place, empty = iter(recipes), -1, False
        while True:
            while not empty and len(self._guests) < self.together and not self._too_far(place + 1):
                recipe, place = next(coming, None), place + 1
                if recipe is None:
                    empty = True
                    break
                try:
                    drawing = complete(recipe)
                except UserError as error:
                    yield Drawn(place, recipe.recipe if isinstance(recipe, Drawing) else recipe, error=error)
                else:
                    self._admit(place, drawing, stepped)
            if not self._guests:
                return
            yield from self._finished(self.engine.tick())

    def _too_far(self, place: int) -> bool:
        """Whether a place is too far ahead of one that is being drawn."""
        return any(place - guest.place > self.ahead for guest in self._guests.values())

    def _admit(self, place: int, drawing: Drawing, stepped: Callable[[], object]) -> None:
        guest = _Guest(place, drawing, list(picture_notes([drawing])))

        def callback(step: Step) -> None:
            stepped()

        coroutine = asking(self.system, drawing, self.loaded, self.device, guest.notes, callback)
        self._guests[self.engine.add(coroutine, tuple(sorted(drawing.lora_weights.items())))] = guest

    def _finished(self, tickets: Sequence[Ticket]) -> Iterator[Drawn]:
        """The pictures of those that are done, decoded in small batches of one size."""
        alike: dict[object, list[tuple[_Guest, Tensor]]] = {}
        for ticket in tickets:
            guest = self._guests.pop(ticket)
            if ticket.latents is None:
                yield _told(guest, error=ticket.error)
                continue
            recipe = guest.drawing.recipe
            key = (ticket.latents.shape, recipe.upscale, recipe.upscaler)
            alike.setdefault(key, []).append((guest, ticket.latents))
        for some in alike.values():
            for start in range(0, len(some), _DECODED):
                yield from self._decoded(some[start : start + _DECODED])

    def _decoded(self, some: Sequence[tuple[_Guest, Tensor]]) -> Iterator[Drawn]:
        guests = [guest for guest, _ in some]
        recipe, enlarge = guests[0].drawing.recipe, None
        try:
            if recipe.upscale is not None:
                enlarge = partial(self.loaded.upscalers.get(recipe.upscaler), outscale=recipe.upscale)
            canvases = [guest.drawing.canvas for guest in guests]
            latents = torch.cat([each for _, each in some])
            images = pictures(self.system.autoencoder, latents, "pil", canvases, enlarge)
        except Exception as error:
            if len(some) > 1:  # the others' pictures are whole
                for each in some:
                    yield from self._decoded([each])
            else:
                yield _told(guests[0], error=error)
            return
        for guest, image in zip(guests, images, strict=True):
            yield _told(guest, image)


def _told(guest: _Guest, image: "Image | None" = None, error: Exception | None = None) -> Drawn:
    return Drawn(guest.place, guest.drawing.recipe, image, tuple(guest.notes), error)

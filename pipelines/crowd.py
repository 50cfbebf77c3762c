"""Drawings through the engine: those of one call, or any number of unlike ones, each picture as soon as it is done."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.conditioning.remembering import Remembering
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

# Called after every prediction, with the place of the picture that it is for.
Stepped = Callable[[int, Step], object]
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
    drawings: Sequence[Drawing],
    loaded: Loaded,
    device: torch.device,
    notes: list[str],
    first: Callback | None = None,
    again: Callback | None = None,
) -> Asking:
    """Draw the latents (B, C, h, w) of drawings that share a request, as a coroutine that asks the network.

    notes: those on the prompts are added. first, again: called after each prediction of the first pass, and of the
    second, where there is one: if the first returns False, there is none.
    """
    request = request_for(system, drawings, loaded, device)
    notes += [note for note in request.notes if note not in notes]
    ended = False

    def watched(step: Step) -> bool:
        nonlocal ended
        ended = first is not None and first(step) is False
        return not ended

    latents = yield from run(system, request, watched)
    if drawings[0].second is None or ended:
        return latents
    pairs = zip(drawings, latents, strict=True)
    larger = [second(system, drawing, each, loaded.upscalers) for drawing, each in pairs]
    return (yield from run(system, request_for(system, larger, loaded, device), again))


def engine(system: System, loaded: Loaded, rows: int) -> Engine:
    """Return an engine whose settings are the weights of LoRAs, (name, weight) each; within the pipeline's turn."""

    def within(weights: Hashable) -> AbstractContextManager[Any]:
        assert isinstance(weights, tuple)
        return loaded.adapters.weighed(dict(weights))

    return Engine(system, rows, within)


def setting_of(drawing: Drawing) -> Hashable:
    """Return the setting in which a drawing is drawn by such an engine."""
    return tuple(sorted(drawing.lora_weights.items()))


def drawn_alone(system: System, drawings: Sequence[Drawing], loaded: Loaded, coroutine: Asking) -> Tensor:
    """Draw the latents (B, C, h, w) of what `asking` gave for these drawings; where memory is short, in parts."""
    alone = engine(system, loaded, 2 * len(drawings))
    ticket = alone.add(coroutine, setting_of(drawings[0]))
    while not ticket.done:
        alone.tick()
    if ticket.latents is None:
        raise ticket.error or RuntimeError("nothing was drawn")
    return ticket.latents


def likeness(drawing: Drawing) -> tuple[Any, ...]:
    """Return what the network's calls for a drawing depend on, and last how many there are: equal ones share all calls.

    It can be sorted by.
    """
    recipe = drawing.recipe
    size = (recipe.height, recipe.width, recipe.hires_scale or 0.0)
    beside = tuple(each.path for each in (*recipe.controls, *recipe.image_prompts))
    plans = [plan for plan in (drawing.plan, drawing.second) if plan is not None]
    return (
        *size,
        str(drawing.batch),
        setting_of(drawing),
        beside,
        recipe.token_merging,
        recipe.feature_reuse,
        recipe.clip_guidance_scale,
        sum(plan.evaluations for plan in plans),
        drawing.guided,
    )


@dataclass
class _Guest:
    place: int
    drawing: Drawing
    notes: list[str]


class Crowd:
    """Draws for one call of a pipeline, within its turn.

    together: how many pictures are drawn at a time. They may lie `ahead` places apart at most, so that who keeps their
    order holds few; of a sequence those alike are drawn next to each other, within a `range` of places. waves: each
    `together` of them begin when all before them are done, and not when there is room: who its neighbours are then
    depends on a picture's place alone, and on them its last bits.
    """

    def __init__(
        self, system: System, loaded: Loaded, device: torch.device, together: int, waves: bool = False
    ):
        remembering = Remembering(system.text, lambda: tuple(loaded.adapters.weights().items()))
        self.system, self.loaded, self.device = replace(system, text=remembering), loaded, device
        self.waves = waves
        self.together, self.range, self.ahead = together, 8 * together, 16 * together
        self.engine = engine(system, loaded, 2 * together)
        self._guests: dict[Ticket, _Guest] = {}

    def drawn(
        self,
        recipes: Iterable[Recipe | Drawing],
        complete: Callable[[Recipe | Drawing], Drawing],
        stepped: Stepped,
    ) -> Iterator[Drawn]:
        """Yield every picture as soon as it is done, in no order, and for what can't be drawn its error.

        complete: makes a drawing of a recipe; may raise UserError.
        """
        coming = self._ordered(recipes, complete)
        upcoming = next(coming, None)
        while upcoming is not None or self._guests:
            while upcoming is not None and self._has_room(upcoming[0]):
                place, recipe = upcoming
                try:
                    drawing = complete(recipe)
                except UserError as error:
                    yield Drawn(place, recipe.recipe if isinstance(recipe, Drawing) else recipe, error=error)
                else:
                    self.admit(place, drawing, stepped)
                upcoming = next(coming, None)
            yield from self.tick()

    def _ordered(
        self, recipes: Iterable[Recipe | Drawing], complete: Callable[[Recipe | Drawing], Drawing]
    ) -> Iterator[tuple[int, Recipe | Drawing]]:
        """Places and recipes; where all are known, those that can share calls next to each other, within some range."""
        if self.waves or not isinstance(recipes, Sequence):
            yield from enumerate(recipes)
            return
        for start in range(0, len(recipes), self.range):
            ready = list[tuple[int, Drawing]]()
            for place in range(start, min(start + self.range, len(recipes))):
                try:
                    drawing = replace(complete(recipes[place]), canvas=None)  # made again when its turn comes
                except UserError:  # which is told when it comes
                    yield place, recipes[place]
                else:
                    ready.append((place, drawing))
            backward = start // self.range % 2 == 1  # so begins a range with what the last one ended with
            yield from sorted(ready, key=lambda pair: likeness(pair[1]), reverse=backward)

    def _has_room(self, place: int) -> bool:
        """Whether the next one, of this place, may begin."""
        if self.waves and place % self.together == 0:
            return not self._guests
        too_far = any(place - guest.place > self.ahead for guest in self._guests.values())
        return len(self._guests) < self.together and not too_far

    def __len__(self) -> int:
        """How many pictures are being drawn."""
        return len(self._guests)

    def admit(self, place: int, drawing: Drawing, stepped: Stepped = lambda place, step: None) -> None:
        """Begin a picture, which shares the network's calls from the next tick on."""
        guest = _Guest(place, drawing, list(picture_notes([drawing])))

        def callback(step: Step) -> None:
            stepped(place, step)

        how = (self.loaded, self.device, guest.notes, callback, callback)
        self._guests[self.engine.add(asking(self.system, [drawing], *how), setting_of(drawing))] = guest

    @torch.no_grad()
    def tick(self) -> Iterator[Drawn]:
        """Call the network once, if any picture needs it; yield those that are done."""
        yield from self._finished(self.engine.tick())

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
            failed = error.with_traceback(None)  # which holds what was half decoded
        else:
            for guest, image in zip(guests, images, strict=True):
                yield _told(guest, image)
            return
        if len(some) == 1:
            yield _told(guests[0], error=failed)
        for each in some if len(some) > 1 else ():  # the others' pictures are whole
            yield from self._decoded([each])


def _told(guest: _Guest, image: "Image | None" = None, error: Exception | None = None) -> Drawn:
    return Drawn(guest.place, guest.drawing.recipe, image, tuple(guest.notes), error)

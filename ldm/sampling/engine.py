"""The engine: unlike requests share calls of one network, step by step.

    engine = Engine(system)
    tickets = [engine.add(run(system, request)) for request in requests]
    for ticket in engine.run():
        pixels = decode(system.autoencoder, ticket.latents)

What draws is a coroutine that asks for the network's output: `ldm.sampling.run` of a request, or more. At every tick
the ask that has waited longest, and those of others that are of one shape with it, become one call of the network:
whatever their sampler, number of steps, guidance, start, limits and masks, for all of these are in the coroutines.
Requests come and go between any two ticks. What one draws does not depend on the others, but for the rounding of a
network's call of another number of rows.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ldm.condition import concatenate
from ldm.conditioning.bound import BoundNetwork, call
from ldm.console import out_of_memory
from ldm.diffusion.denoiser import Ask, Asking
from ldm.errors import UserError
from ldm.models.denoising import Residuals
from ldm.models.feature_reuse import Features
from ldm.system import System

ROWS = 32  # of a call, where nobody says otherwise


class Ticket:
    """A coroutine in the engine.

    latents: (B, C, h, w), once it is done. error: what ended it, in their place. cancelled: by `cancel`.
    """

    latents: Tensor | None = None
    error: Exception | None = None
    cancelled = False

    def __init__(self, asking: Asking, setting: Hashable, turn: int):
        """Begin it. turn: when its ask came, for the longest waiting to be first."""
        self.setting, self._asking = setting, asking
        self.ask: Ask | None = None
        self.answer(None, turn)

    @property
    def done(self) -> bool:
        """Whether it needs nothing more: its latents are there, or an error, or it was cancelled."""
        return self.ask is None

    def cancel(self) -> None:
        """Draw it no further."""
        if not self.done:
            self._asking.close()
            self.ask, self.cancelled = None, True

    def fail(self, error: Exception) -> None:
        """Draw it no further, for this reason."""
        self._asking.close()
        self.ask, self.error = None, error

    def answer(self, output: Tensor | None, turn: int) -> None:
        """Give it what it asked for, None at its beginning."""
        self.turn = turn
        try:
            self.ask = next(self._asking) if output is None else self._asking.send(output)
        except StopIteration as end:
            self.ask, self.latents = None, end.value
        except Exception as error:
            self.ask, self.error = None, error


class Engine:
    """Draws for many, by one system.

    rows: the most of one call of the network, of which a guided picture takes two at a step. Where memory does not
    suffice for those of a kind (size and the like), half as many are tried, and so on; `limits` then says what did, by
    kind. Those of a kind that does not fit even row by row end with that error. within: gives the context in which all
    is done for those of one `setting` of `add`, such as weights of LoRAs: they share no calls with others.
    """

    def __init__(
        self,
        system: System,
        rows: int = ROWS,
        within: Callable[[Hashable], AbstractContextManager[object]] = lambda setting: nullcontext(),
    ):
        if rows < 1:
            raise UserError(f"rows is {rows}: give 1 or more")
        self.system, self.rows, self._within = system, rows, within
        self.limits: dict[Hashable, int] = {}
        self._waiting: list[Ticket] = []
        self._turns = itertools.count()

    def __len__(self) -> int:
        """How many are being drawn."""
        return len(self._waiting)

    @torch.no_grad()
    def add(self, asking: Asking, setting: Hashable = None) -> Ticket:
        """Take in a coroutine, which goes on to its first ask, and shares calls from the next tick on."""
        with self._within(setting):
            ticket = Ticket(asking, setting, next(self._turns))
        self._waiting.append(ticket)
        return ticket

    @torch.no_grad()
    def tick(self) -> list[Ticket]:
        """Call the network once, if any asks for it; return those that are done since the last tick.

        What fails in a coroutine ends that one alone, and so does a lack of memory. Raises what else the network
        raises.
        """
        chosen = self._chosen()
        if chosen:
            with self._within(chosen[0].setting):
                self._answer(chosen)
        done = [ticket for ticket in self._waiting if ticket.done]
        self._waiting = [ticket for ticket in self._waiting if not ticket.done]
        return done

    def run(self) -> Iterator[Ticket]:
        """Tick until nothing is left, and yield every ticket once it is done; more may be added meanwhile."""
        while self._waiting:
            yield from self.tick()

    def _chosen(self) -> list[Ticket]:
        """Who is answered next: the one that has waited longest, and those that can share its call."""
        waiting = sorted((each for each in self._waiting if each.ask), key=lambda each: each.turn)
        if not waiting:
            return []
        kind = _kind(waiting[0])
        chosen, rows, most = list[Ticket](), 0, self.limits.get(kind, self.rows)
        for ticket in waiting:
            assert ticket.ask is not None
            more = len(ticket.ask.x)
            if not chosen or (rows + more <= most and _kind(ticket) == kind):
                chosen.append(ticket)
                rows += more
        return chosen

    def _answer(self, chosen: list[Ticket]) -> None:
        """Call the network for tickets of one kind."""
        try:
            outputs = self._outputs([ticket.ask for ticket in chosen if ticket.ask], _kind(chosen[0]))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            failed = error.with_traceback(None)  # which holds what the call had made
        else:
            for ticket, output in zip(chosen, outputs, strict=True):
                ticket.answer(output, next(self._turns))
            return
        for ticket in chosen:
            ticket.fail(failed)

    def _outputs(self, asks: list[Ask], kind: Hashable) -> Iterator[Tensor]:
        """The network's outputs, one an ask, in as few calls as there may be. Raises what it raises for one row."""
        rows = [len(ask.x) for ask in asks]
        bound = [_bound(ask) for ask in asks]
        x, timestep = torch.cat([ask.x for ask in asks]), torch.cat([ask.timestep for ask in asks])
        told = concatenate([each.condition.last(count) for each, count in zip(bound, rows, strict=True)])
        found = [each.residuals(ask.x, ask.timestep) for each, ask in zip(bound, asks, strict=True)]
        residuals = Residuals.joined(list(zip(found, rows, strict=True)))
        reused = [
            deep for each, count in zip(bound, rows, strict=True) if (deep := each.held(count)) is not None
        ]
        held = torch.cat(reused) if reused else None  # of all asks of one kind, or of none
        kept = list[Tensor]()
        outputs, begin, most = list[Tensor](), 0, self.limits.get(kind, self.rows)
        while begin < len(x):
            part = slice(begin, begin + most)
            more = None if residuals is None else residuals.map(lambda _, each, part=part: each[part])
            within = told.map(lambda each, part=part: each[part])
            features = None
            if any(each.reuse for each in bound):
                features = Features(None if held is None else held[part])
            how = (features, bound[0].merging)
            try:
                outputs.append(call(self.system.network, x[part], timestep[part], within, more, *how))
            except (RuntimeError, MemoryError) as error:
                if most == 1 or not out_of_memory(error):
                    raise
            else:
                begin += most
                if features is not None and features.deep is not None:
                    kept.append(features.deep)
                continue
            # Outside of the handler, whose error holds on to what the call had made.
            self.limits[kind] = most = max(1, min(most, len(x)) // 2)
            if x.is_cuda:
                torch.cuda.empty_cache()
        if kept:
            for each, deep in zip(bound, torch.cat(kept).split(rows), strict=True):
                each.keep(deep)
        return iter(torch.cat(outputs).split(rows))


def _bound(ask: Ask) -> BoundNetwork:
    """The network of an ask, which `run` has bound."""
    assert isinstance(ask.network, BoundNetwork)
    return ask.network


def _kind(ticket: Ticket) -> Hashable:
    """What is equal of asks that can be rows of one call."""
    assert ticket.ask is not None
    bound = _bound(ticket.ask)
    parts = bound.condition.parts()
    shapes = sorted((name, each.shape[1:], each.dtype) for name, each in parts.items())
    # What computes all of the network shares calls with what is not approximate.
    approximate = bound.held(len(ticket.ask.x)) is not None, bound.merging
    return ticket.setting, ticket.ask.x.shape[1:], tuple(shapes), approximate

"""A target network: a running average of the student, which a consistency model is compared with (Song et al. 2023)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.training.distributed import sharded


class Pupil(nn.Module):
    """A student in training and, where its method wants one, the average of it.

    The average lies in buffers, so that the state of a run has it. What is frozen is shared, not copied.
    """

    def __init__(self, student: nn.Module, averaged: bool):
        """Raises UserError for an average where processes hold a part of each weight."""
        super().__init__()
        self.student = student
        if averaged and sharded():
            raise UserError("a target's average is not for sharded weights (FSDP): leave it out, or use DDP")
        self.average = _Average(student) if averaged else None

    def forward(self, *arguments: Any) -> Tensor:
        return self.student(*arguments)

    def target(self) -> nn.Module:
        """Return the module that gives the targets, for calls without a gradient."""
        return self.student if self.average is None else self.average.module()

    def follow(self, decay: float, seen: int) -> None:
        """Move the average towards the student, once after each step: `seen` pictures tell which that was."""
        if self.average is not None:
            self.average.follow(self.student, decay, seen)


class _Average(nn.Module):
    """A copy of a module whose trained parameters are this module's buffers."""

    seen: Tensor

    def __init__(self, student: nn.Module):
        super().__init__()
        frozen: dict[int, Any] = {id(p): p for p in student.parameters() if not p.requires_grad}
        shell = copy.deepcopy(student, frozen)
        trained = {n: p for n, p in shell.named_parameters() if p.requires_grad}
        for name, parameter in trained.items():
            parameter.requires_grad_(False)
            self.register_buffer(_key(name), parameter.detach().clone())
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        # Out of reach of `parameters`, and as it is in copies: what it computes with is put in at each call.
        self._hidden = _Hidden(shell, list(trained))

    def module(self) -> nn.Module:
        """Return the copy with the average in it."""
        for name in self._hidden.names:
            self._hidden.module.get_parameter(name).data = self._buffer(name)
        return self._hidden.module.train(self.training)

    @torch.no_grad()
    def follow(self, student: nn.Module, decay: float, seen: int) -> None:
        if int(self.seen) >= seen:
            return
        self.seen.fill_(seen)
        for name in self._hidden.names:
            self._buffer(name).lerp_(student.get_parameter(name).detach(), 1 - decay)

    def _buffer(self, name: str) -> Tensor:
        return self.get_buffer(_key(name))


class _Hidden:
    """A module that belongs to another without being a part of it, and is shared by copies."""

    def __init__(self, module: nn.Module, names: list[str]):
        self.module, self.names = module, names

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hidden":
        return self


def _key(name: str) -> str:
    return name.replace(".", "/")

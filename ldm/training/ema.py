"""Exponential moving average of weights, with the half-life in pictures, as in EDM (Karras et al. 2022)."""

import copy

import torch
from torch import Tensor, nn

from ldm.training.distributed import whole

RAMP_UP = 0.05  # `ema_rampup_ratio` of EDM's training loop


class EMA:
    """Follows the trained parameters of a model, in float32; what is frozen is shared with it, not copied.

    half_life: in pictures; early on it is shortened to RAMP_UP of those seen before the step, so that the random start
    is forgotten: the first step's weights are the first average.
    """

    def __init__(self, model: nn.Module, half_life: float):
        """Make it before the model is wrapped or sharded, and `start` it after."""
        self.half_life = half_life
        self.averages: dict[str, Tensor] = {}
        stand_ins: dict[int, object] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
            if p.requires_grad
            else p
            for p in model.parameters()
        }
        # A second model costs no memory: its trained parameters are stand-ins until `model` puts the averages there.
        self._shell = copy.deepcopy(model, stand_ins).eval()

    def start(self, trained: nn.Module) -> None:
        """Take the weights, or each process's part of them, as the first average."""
        self.averages = {n: p.detach().clone() for n, p in trained.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, trained: nn.Module, batch_size: int, seen: int) -> None:
        """Take in a step on `batch_size` pictures, `seen` in all."""
        half_life = min(self.half_life, RAMP_UP * (seen - batch_size))
        weight = 1 - 0.5 ** (batch_size / max(half_life, 1e-8))
        moved = {n: p.detach() for n, p in trained.named_parameters() if n in self.averages}
        # In one call: a kernel for each of hundreds of tensors would take a GPU as long as the optimizer does.
        lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
        lerp([self.averages[name] for name in moved], list(moved.values()), weight)

    def model(self, trained: nn.Module, keep: bool = True) -> nn.Module:
        """Return the averaged model, in evaluation mode; all processes must ask for it together.

        Buffers are the trained model's own. It follows no further: ask again after the next step.
        keep: where weights are sharded, this process gets the whole of them, where it computes; else nothing of use.
        """
        device = next(iter(self.averages.values())).device
        tensors = {name: whole(each, keep).to(device) for name, each in self.averages.items()}
        tensors |= dict(trained.named_buffers())
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            module = self._shell.get_submodule(owner)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[leaf] = tensor
        return self._shell

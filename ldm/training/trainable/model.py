"""The networks of a system that a loss in training runs through."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.conditioning.control import Control
from ldm.conditioning.text import TextEncoder
from ldm.models.denoising import DenoisingNetwork
from ldm.models.packed import unpack
from ldm.system import System


class TrainableModel(nn.Module):
    """The denoising network, and what is trained beside it, as one module with one call, as DDP wants it.

    with_text: the text encoders are part of it, for gradients to reach them. Adapters may be put into `adapters`, by
    the component that they are beside.
    """

    def __init__(self, system: System, with_text: bool):
        super().__init__()
        self.component = system.network.component
        self.add_module(self.component, system.network)
        self.text = (
            system.text if with_text else None
        )  # with its tokenizers, for a copy of this to be complete
        self.text_encoders = nn.ModuleDict(system.text.modules if with_text else {})
        self.adapters = nn.ModuleDict()

    def train(self, mode: bool = True) -> "TrainableModel":
        """Keep text encoders in evaluation mode: they were pretrained with dropout that is of no use here."""
        super().train(mode)
        self.text_encoders.eval()
        return self

    @property
    def network(self) -> DenoisingNetwork:
        """The denoising network; its weights have the name of its component, as a system's folder has them."""
        network = self.get_submodule(self.component)
        assert isinstance(network, DenoisingNetwork)
        return network

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        condition: Callable[[], Condition],
        picture: Tensor | None = None,
    ) -> Tensor:
        """Compute what the network does. condition: gives it, with a graph where text encoders are trained.

        picture: (B, 3, H, W) in [0, 1], for a model that is shown one.
        """
        return self.network(x, timestep, condition())

    def controls(self, pictures: Tensor | None) -> list[Control]:
        """Return what a system draws with beside these networks. pictures: (B, 3, H, W) in [0, 1], those shown."""
        return []

    def within(self, system: System) -> System:
        """Return the system with these networks: to draw with an average."""
        return replace(system, network=self.network, text=self.text or system.text)


def thaw(module: nn.Module) -> None:
    """Have it trained, in float32 and as copies: training must not write into a mapped file."""
    unpack(module)  # what has drawn before
    for parameter in module.parameters():
        parameter.data = parameter.data.float().clone()
        parameter.requires_grad_(True)


def freeze_idle(text: TextEncoder, modules: Sequence[nn.Module]) -> None:
    """Leave out what no condition depends on, such as BERT's pooler, or a last layer whose states are not taken.

    Its gradients would never come, and processes that share a batch wait for all of them.
    """
    embedding = text.encode([""])[0]
    loss = torch.stack([part.sum() for part in embedding.parts().values()]).sum()
    if not loss.requires_grad:
        return  # new words alone, of which "" has none
    loss.backward()
    for module in modules:
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
            parameter.grad = None

"""What is trained of a system: the U-Net, a LoRA beside it, or a new word; and how it is written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.checkpoints.folder import write_folder
from ldm.checkpoints.lora import FILE as LORA_FILE
from ldm.checkpoints.lora import write_lora
from ldm.condition import Condition
from ldm.conditioning.inversion import FILE as WORD_FILE
from ldm.conditioning.inversion import NewWords, write_inversion
from ldm.conditioning.load import write_tokenizers
from ldm.conditioning.sdxl import parts_of
from ldm.conditioning.text import TextEncoder, WindowedEncoder
from ldm.errors import UserError
from ldm.models.denoising import DenoisingNetwork
from ldm.models.lora import LoRA
from ldm.system import System
from ldm.training.start import half


@dataclass(frozen=True)
class LoRAConfig:
    """A LoRA beside the U-Net and, with `text_encoder`, beside the text encoders.

    targets, text_targets: which layers; see `ldm.models.lora.select`. alpha: None is the rank.
    layout: of the file, diffusers' (and peft's) or kohya's.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: str = "attention"
    text_encoder: bool = False
    text_targets: str = "attention"
    layout: Literal["diffusers", "kohya"] = "diffusers"


@dataclass(frozen=True)
class WordConfig:
    """A new word for the text encoders: textual inversion.

    word: such as <toy>. start: a word that they know, from which it begins. vectors: how many it stands for.
    """

    word: str
    start: str
    vectors: int = 1


class Trained(nn.Module):
    """The networks that a loss runs through, as one module with one call, as DDP wants it.

    Neither lora nor word: the whole network is trained and, with `text_encoder`, the text encoders.
    Everything else stays frozen. The system's networks are changed: they get adapters and words.
    """

    def __init__(
        self,
        system: System,
        lora: LoRAConfig | None = None,
        word: WordConfig | None = None,
        text_encoder: bool = False,
    ):
        super().__init__()
        self.lora, self.word = lora, word
        self.component = system.network.component
        self.add_module(self.component, system.network)
        encoders = system.text.modules
        reads = bool(word or text_encoder or (lora and lora.text_encoder))
        self.text = system.text if reads else None  # with its tokenizers, for a copy of this to be complete
        self.text_encoders = nn.ModuleDict(encoders if reads else {})
        self.adapters = nn.ModuleDict()
        if lora:
            arguments = (lora.rank, lora.alpha, lora.dropout)
            self.adapters[self.component] = LoRA(system.network, lora.targets, *arguments)
            if lora.text_encoder:
                for name, encoder in encoders.items():
                    self.adapters[name] = LoRA(encoder, lora.text_targets, *arguments)
        elif word:
            for encoder in parts_of(system.text):
                _begin(encoder, word)
        else:
            for module in (self.network, *self.text_encoders.values()):
                _thaw(module)
        if self.text:
            beside = [each for name, each in self.adapters.items() if name != self.component]
            _freeze_idle(self.text, [*self.text_encoders.values(), *beside])

    def train(self, mode: bool = True) -> "Trained":
        """Text encoders stay in evaluation mode: they were pretrained with dropout that is of no use here."""
        super().train(mode)
        self.text_encoders.eval()
        return self

    @property
    def network(self) -> DenoisingNetwork:
        """The denoising network; its weights have the name of its component, as a system's folder has them."""
        network = self.get_submodule(self.component)
        assert isinstance(network, DenoisingNetwork)
        return network

    def forward(self, x: Tensor, timestep: Tensor, condition: Callable[[], Condition]) -> Tensor:
        """As the network's own. condition: gives it, with a graph where text encoders are trained."""
        return self.network(x, timestep, condition())

    def within(self, system: System) -> System:
        """The system with these networks: to draw with an average."""
        return replace(system, network=self.network, text=self.text or system.text)

    def write(self, system: System, folder: Path, metadata: Mapping[str, str]) -> None:
        """What was trained, as others read it: a diffusers folder, a LoRA's file, or a word's. Raises UserError."""
        if self.lora:
            adapters = {
                name: each.weights() for name, each in self.adapters.items() if isinstance(each, LoRA)
            }
            settings = self.network.config.to_diffusers()
            write_lora(folder / LORA_FILE, adapters, self.lora.layout, settings, metadata)
        elif self.word:
            assert self.text is not None
            vectors = {each.name: _rows(each) for each in parts_of(self.text)}
            write_inversion(folder / WORD_FILE, self.word.word, vectors, metadata)
        else:
            whole = self.within(system)
            write_folder(folder, half(whole.checkpoint()), lambda new: write_tokenizers(whole.text, new))


def _thaw(module: nn.Module) -> None:
    """Have it trained, in float32 and as copies: training must not write into a mapped file."""
    for parameter in module.parameters():
        parameter.data = parameter.data.float().clone()
        parameter.requires_grad_(True)


def _freeze_idle(text: TextEncoder, modules: Sequence[nn.Module]) -> None:
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


def _begin(encoder: WindowedEncoder, config: WordConfig) -> None:
    """Give the encoder the word, with the vectors of a word it knows, to be trained."""
    ids = encoder.tokenize(config.start)
    if not ids or config.vectors < 1:
        raise UserError("a new word starts from a word that the text encoder knows, and has 1 vector or more")
    table = encoder.module.get_input_embeddings()  # type: ignore[operator]
    vector = table(torch.tensor(ids)).mean(0, keepdim=True)
    words = NewWords(encoder)
    words.add(config.word, vector.repeat(config.vectors, 1))
    assert words.embedding is not None
    words.embedding.rows.data = words.embedding.rows.data.float()
    words.embedding.rows.requires_grad_(True)


def _rows(encoder: WindowedEncoder) -> Tensor:
    embedding = NewWords(encoder).embedding
    assert embedding is not None
    return embedding.rows.detach()

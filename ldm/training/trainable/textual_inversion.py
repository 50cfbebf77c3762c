"""Textual inversion (Gal et al. 2022): the embedding of a new token."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ldm.conditioning.inversion import FILE, NewWords, write_inversion
from ldm.conditioning.sdxl import parts_of
from ldm.conditioning.text import WindowedEncoder
from ldm.errors import UserError
from ldm.system import System
from ldm.training.trainable.base import Trainable
from ldm.training.trainable.model import TrainableModel, freeze_idle


@dataclass(frozen=True)
class TrainTextualInversion(Trainable):
    """The embedding of a new token in the text encoders. The export is its file.

    placeholder_token: the new one, such as <toy>. initializer_token: a word that they know, from which it begins.
    num_vectors: how many tokens it stands for.
    """

    kind: ClassVar[str] = "textual_inversion"
    renamed: ClassVar[dict[str, str]] = {
        "word": "placeholder_token",
        "start": "initializer_token",
        "vectors": "num_vectors",
    }

    placeholder_token: str
    initializer_token: str
    num_vectors: int = 1

    def check(self, from_nothing: bool, inpainting: bool) -> None:
        if from_nothing:
            raise UserError("textual inversion goes with a base that is there, not with a U-Net from nothing")
        if inpainting:
            raise UserError("inpainting trains the whole U-Net, not a token: set train.kind to unet")

    def check_captions(self, captions: Iterable[str]) -> None:
        if not any(self.placeholder_token in caption for caption in captions):
            raise UserError(f"no caption has the word {self.placeholder_token}: put it into data.captions")

    def model(self, system: System) -> TrainableModel:
        model = TrainableModel(system, with_text=True)
        for encoder in parts_of(system.text):
            self._begin(encoder)
        freeze_idle(system.text, list(model.text_encoders.values()))
        return model

    def export(
        self, model: TrainableModel, system: System, folder: Path, metadata: Mapping[str, str]
    ) -> None:
        assert model.text is not None
        vectors = {each.name: _rows(each) for each in parts_of(model.text)}
        write_inversion(folder / FILE, self.placeholder_token, vectors, metadata)

    def _begin(self, encoder: WindowedEncoder) -> None:
        """Give the encoder the token, with the vectors of a word it knows, to be trained."""
        ids = encoder.tokenize(self.initializer_token)
        if not ids or self.num_vectors < 1:
            raise UserError(
                "a new token starts from an initializer_token that the text encoder knows, and has num_vectors of 1 "
                "or more"
            )
        table = encoder.module.get_input_embeddings()  # type: ignore[operator]
        vector = table(torch.tensor(ids)).mean(0, keepdim=True)
        words = NewWords(encoder)
        words.add(self.placeholder_token, vector.repeat(self.num_vectors, 1))
        assert words.embedding is not None
        words.embedding.rows.data = words.embedding.rows.data.float()
        words.embedding.rows.requires_grad_(True)


def _rows(encoder: WindowedEncoder) -> Tensor:
    embedding = NewWords(encoder).embedding
    assert embedding is not None
    return embedding.rows.detach()

"""The text networks by their names in a config.json: which class, what it reads, what of its output we take.

CLIP and BERT are our own networks, with transformers' names. T5 is run through transformers, which takes longer to be
imported than a small picture to be drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ldm.conditioning.text import States
from ldm.errors import UserError, nearest
from ldm.models.bert import BertModel
from ldm.models.clip_text import CLIPTextModel, CLIPTextModelWithProjection
from ldm.models.text import TextNetwork


@dataclass(frozen=True)
class Architecture:
    """An architecture of text networks, as transformers names it.

    name: the class of its tokenizer, and the architecture's name in messages.
    model: the class to build, or its name in transformers; a folder of a larger model gives it only the tensors under
        `keep`.
    masks: whether padding is masked where the folder's config does not say (`use_attention_mask`).
    stretches: reads sequences longer than it was trained on.
    """

    name: str
    model: type[TextNetwork] | str
    keep: tuple[str, ...] = ()
    masks: bool = False
    stretches: bool = False


_T5_PARTS = ("shared.", "encoder.")
ARCHITECTURES = {
    "CLIPTextModel": Architecture("clip", CLIPTextModel),
    "CLIPTextModelWithProjection": Architecture("clip", CLIPTextModelWithProjection),
    "CLIPModel": Architecture("clip", CLIPTextModel, keep=("text_model.",)),
    "BertModel": Architecture("bert", BertModel),
    "T5EncoderModel": Architecture("t5", "T5EncoderModel", masks=True, stretches=True),
    "T5ForConditionalGeneration": Architecture(
        "t5", "T5EncoderModel", keep=_T5_PARTS, masks=True, stretches=True
    ),
}
_BY_TYPE = {
    "clip_text_model": "CLIPTextModel",
    "clip": "CLIPModel",
    "bert": "BertModel",
    "t5": "T5EncoderModel",
}


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """Return the architecture that a transformers config.json names. Raises UserError for one that we do not run."""
    kind, listed = config.get("model_type"), config.get("architectures")
    named = str(listed[0]) if isinstance(listed, list) and listed else _BY_TYPE.get(str(kind), "")
    if named not in ARCHITECTURES:
        raise UserError(
            f"{where}: no text encoder we know is called {named or kind!r}{nearest(named, ARCHITECTURES)} "
            f"(known: {', '.join(ARCHITECTURES)})"
        )
    return ARCHITECTURES[named]


def states_of(architecture: Architecture, penultimate: bool) -> States:
    """Return the function that runs the architecture's network.

    penultimate: take CLIP's states before its last layer and without the final norm, as SDXL does
    (Podell et al. 2023, sec. 2.1); else the last ones, normalised.
    """
    if architecture.name == "clip":
        return lambda module, ids, mask, skip: _clip(module, ids, mask, skip, penultimate)
    if penultimate:
        raise UserError(f"SDXL's conditioning takes CLIP text encoders, not {architecture.name}'s")
    return _plain


def _clip(
    module: Any, ids: Tensor, mask: Tensor | None, skip: int, penultimate: bool
) -> tuple[Tensor, Tensor | None]:
    output = module(ids, attention_mask=mask, output_hidden_states=True)
    layers = output.hidden_states  # the embedding's output, then each layer's
    check_skip(skip, len(layers) - 1 - penultimate)
    hidden = layers[-1 - penultimate - skip]
    if not penultimate:
        hidden = module.text_model.final_layer_norm(hidden) if skip else output.last_hidden_state
    return hidden, getattr(output, "text_embeds", None)


def _plain(module: nn.Module, ids: Tensor, mask: Tensor | None, skip: int) -> tuple[Tensor, Tensor | None]:
    if skip:
        raise UserError("clip_skip is for CLIP text encoders only: leave it at 0")
    return module(ids, attention_mask=mask)[0], None


def check_skip(skip: int, layers: int) -> None:
    """Raise UserError unless 0 <= skip < layers."""
    if not 0 <= skip < layers:
        raise UserError(f"clip_skip is {skip}: this text encoder allows 0 to {layers - 1}")

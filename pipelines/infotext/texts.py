"""Which program's text a picture carries."""

from collections.abc import Mapping

from ldm.foreign import json_object
from pipelines.infotext.a1111 import read_parameters
from pipelines.infotext.comfyui import read_graph
from pipelines.infotext.others import read_invokeai, read_swarmui
from pipelines.infotext.values import Infotext, Taking


def infotext_in(texts: Mapping[str, str], where: object = "the picture") -> Infotext | None:
    """Return what the texts of a picture, by their keywords, say of how it was made; None where none does.

    AUTOMATIC1111's `parameters`, which is also where SwarmUI has its JSON; `invokeai_metadata`; ComfyUI's `prompt`.
    Raises UserError for JSON that can't be read.
    """
    text = texts.get("parameters", "")
    if text.lstrip().startswith("{") and '"sui_image_params"' in text:
        return read_swarmui(json_object(text, f"{where}: its parameters"))
    if text.strip() and not text.lstrip().startswith("{"):
        return read_parameters(text)
    if "invokeai_metadata" in texts:
        return read_invokeai(json_object(texts["invokeai_metadata"], f"{where}: its invokeai_metadata"))
    if "prompt" in texts and texts["prompt"].lstrip().startswith("{"):
        return read_graph(json_object(texts["prompt"], f"{where}: its prompt"))
    if "workflow" in texts:
        taking = Taking("ComfyUI", "comfyui")
        taking.note("it holds the editor's workflow alone, and not the graph that was run: nothing is taken")
        return taking.done()
    return None

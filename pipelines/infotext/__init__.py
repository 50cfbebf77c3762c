"""What other programs write into pictures of how they were made ("infotext"), read into our words, and written.

Nothing that is named inside a picture is loaded, looked for or run: models and LoRAs are names in what comes back.
"""

from pipelines.infotext.a1111 import parameters, read_parameters
from pipelines.infotext.comfyui import read_graph
from pipelines.infotext.files import exif_of, read_infotext, texts_of
from pipelines.infotext.others import read_invokeai, read_swarmui
from pipelines.infotext.texts import infotext_in
from pipelines.infotext.values import Infotext, NamedLoRA

__all__ = [
    "Infotext",
    "NamedLoRA",
    "exif_of",
    "infotext_in",
    "parameters",
    "read_graph",
    "read_infotext",
    "read_invokeai",
    "read_parameters",
    "read_swarmui",
    "texts_of",
]

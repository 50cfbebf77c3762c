"""Pipelines: from a prompt to a picture."""

from pipelines.output import TextToImageOutput
from pipelines.text_to_image import TextToImagePipeline

__all__ = ["TextToImageOutput", "TextToImagePipeline"]

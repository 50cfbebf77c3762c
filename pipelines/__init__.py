"""Pipelines: from a prompt to a picture."""

from pipelines.text_to_image import TextToImageOutput, TextToImagePipeline

__all__ = ["TextToImageOutput", "TextToImagePipeline"]

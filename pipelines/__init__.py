"""Pipelines: from a prompt to a picture."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.output import TextToImageOutput
    from pipelines.text_to_image import TextToImagePipeline

__all__ = ["TextToImageOutput", "TextToImagePipeline"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and not before: the command line answers `--help` without torch (PEP 562)."""
    if name == "TextToImageOutput":
        from pipelines.output import TextToImageOutput

        return TextToImageOutput
    if name == "TextToImagePipeline":
        from pipelines.text_to_image import TextToImagePipeline

        return TextToImagePipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

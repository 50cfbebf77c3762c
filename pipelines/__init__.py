"""Pipelines: from a prompt to a picture, and from a picture to a larger one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.class_to_image import ClassToImagePipeline
    from pipelines.output import TextToImageOutput
    from pipelines.text_to_image import TextToImagePipeline
    from pipelines.upscaler import Upscaler

__all__ = ["ClassToImagePipeline", "TextToImageOutput", "TextToImagePipeline", "Upscaler"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and not before: the command line answers `--help` without torch (PEP 562)."""
    if name == "ClassToImagePipeline":
        from pipelines.class_to_image import ClassToImagePipeline

        return ClassToImagePipeline
    if name == "TextToImageOutput":
        from pipelines.output import TextToImageOutput

        return TextToImageOutput
    if name == "TextToImagePipeline":
        from pipelines.text_to_image import TextToImagePipeline

        return TextToImagePipeline
    if name == "Upscaler":
        from pipelines.upscaler import Upscaler

        return Upscaler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

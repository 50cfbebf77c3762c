"""The names by which users of diffusers load things beside a model; what is behind them has names of its own."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ldm.checkpoints.paths import readable
from ldm.errors import UserError
from pipelines.adapters import Adapters
from pipelines.controlnets import ControlNets
from pipelines.image_prompts import ImageAdapters
from pipelines.uses import BUNDLED


class DiffusersNames:
    """Methods of a pipeline that are called as diffusers'."""

    adapters: Adapters
    controlnets: ControlNets
    image_adapters: ImageAdapters

    def load_lora_weights(
        self, path: str | Path, weight_name: str | None = None, adapter_name: str | None = None
    ) -> str:
        """As diffusers': load a LoRA with weight 1 (see `Adapters.load_lora`); returns its name.

        weight_name: of the file, where `path` is a folder of several. adapter_name: None is the file's name.
        """
        return self.adapters.load_lora(Path(path, weight_name) if weight_name else path, name=adapter_name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """As diffusers': use these LoRAs, with these weights (None is 1), and no others. Raises UserError."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = 1.0 if adapter_weights is None else adapter_weights
        each = [float(weights)] * len(names) if isinstance(weights, int | float) else list(weights)
        if len(each) != len(names):
            raise UserError(
                f"there are {len(each)} adapter_weights for {len(names)} adapter_names: one, or one each"
            )
        self.adapters.set_weights(dict(zip(names, each, strict=True)))

    def get_active_adapters(self) -> list[str]:
        """As diffusers': the names of the LoRAs whose weight is not 0."""
        return [name for name, weight in self.adapters.weights().items() if weight]

    def delete_adapters(self, adapter_names: str | Iterable[str]) -> None:
        """As diffusers': take these LoRAs out. Raises UserError."""
        self.adapters.unload_loras([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def unload_lora_weights(self) -> None:
        """As diffusers': take all LoRAs out, merged or not; the weights are then the model's own."""
        self.adapters.unload_loras()

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """As diffusers': add LoRAs to the weights (see `Adapters.merge`). Raises UserError."""
        self.adapters.merge(adapter_names, lora_scale)

    def unfuse_lora(self) -> None:
        """As diffusers': give the networks the very weights from before; the LoRAs are beside them again."""
        self.adapters.unmerge()

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> list[str]:
        """As diffusers': teach the text encoders new words (see `Adapters.load_words`); returns the words."""
        return self.adapters.load_words(path, token)

    def unload_textual_inversion(self) -> None:
        """As diffusers': forget all words that were loaded."""
        self.adapters.unload_words()

    def load_controlnet(
        self, path: str | Path = BUNDLED, name: str | None = None, variant: str | None = None
    ) -> str:
        """Load a ControlNet beside those that are there; returns its name (see `ControlNets.load`)."""
        return self.controlnets.load(path, name, variant)

    def load_ip_adapter(
        self,
        path: str | Path,
        subfolder: str | None = None,
        weight_name: str | None = None,
        image_encoder_folder: str | Path | None = None,
    ) -> str:
        """As diffusers': load an IP-Adapter over the network (see `ImageAdapters.load`); returns its name.

        path: a file, or a folder in which `subfolder` and weight_name lead to one. image_encoder_folder: None is the
        folder image_encoder beside the file; as in diffusers a mere name is of a folder in `subfolder`, and a path
        begins at `path`, if there is one. Raises UserError.
        """
        file = Path(path, *(each for each in (subfolder, weight_name) if each))
        encoder = image_encoder_folder
        if encoder is not None:
            within = Path(path, subfolder or "") if len(Path(encoder).parts) == 1 else Path(path)
            with readable(encoder):
                encoder = within / encoder if (within / encoder).is_dir() else encoder
        return self.image_adapters.load(file, encoder)

    def set_ip_adapter_scale(self, scale: float | Sequence[float] | Mapping[str, float]) -> None:
        """As diffusers': how much calls take of pictures that are prompts, unless they say it. Raises UserError."""
        self.image_adapters.set_scale(scale)

    def unload_ip_adapter(self) -> None:
        """As diffusers': take all IP-Adapters out of the network."""
        self.image_adapters.unload()

"""A model without text that begins from nothing, for methods that have no teacher."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from ldm.diffusion.edm_processes import EDMConfig
from ldm.errors import UserError
from ldm.system.plain import PlainSystem
from ldm.training.data.examples import Examples
from ldm.training.data.kinds import Data
from ldm.training.data.plain import PlainSource
from ldm.training.data.told import Nothing
from ldm.training.networks import NetworkSettings, UNet2DSettings, built_for
from ldm.training.start import load_autoencoder


@dataclass(frozen=True)
class NewPlain:
    """A network with weights drawn at random.

    network: of a kind: unet2d, unet, or points. Its channels, its side and its classes are those of the data.
    autoencoder: a folder that holds a first stage, for a model of its latents.
    timestep_scale: the network is told so many times ln(sigma) / 4; diffusers draws consistency models of 1000.
    """

    network: NetworkSettings = field(default_factory=UNet2DSettings)
    autoencoder: str | None = None
    timestep_scale: float = 1000.0

    def system(
        self, data: Data, examples: Examples, condition: Nothing, crop: int | None, where: str
    ) -> PlainSystem:
        """Build it for what it will learn from, on EDM's noise levels. Raises UserError."""
        if self.autoencoder and not Path(self.autoencoder).is_dir():
            raise UserError(f"{where}.base.autoencoder: there is no folder {self.autoencoder}")
        first_stage = load_autoencoder(Path(self.autoencoder)) if self.autoencoder else None
        # Nothing is dropped in distillation: a row of "no class" would stay as it was drawn.
        told = replace(condition, dropout=0.0) if condition.left_out else condition
        source = PlainSource(examples, told, first_stage, crop)
        network = built_for(self.network, source, data, where)
        process = EDMConfig(timestep_scale=self.timestep_scale).process()
        return PlainSystem(network, process, first_stage, condition.names(examples))

"""The networks that denoise, by the names of their classes in diffusers: a new one is a file and a line here."""

from ldm.models.denoising import DenoisingNetwork
from ldm.models.unet import UNet
from ldm.models.unet2d import UNet2D

NETWORKS: dict[str, type[DenoisingNetwork]] = {"UNet2DConditionModel": UNet, "UNet2DModel": UNet2D}

"""The adversary of an autoencoder: a discriminator of patches (Isola et al. 2017)."""

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """A network that judges whether each patch of a picture is real: (B, 3, H, W) in [-1, 1] to logits (B, 1, h, w).

    width: channels of the first layer. n_layers: halvings; a logit sees 16, 34, 70, 142 pixels a side for 1, 2, 3, 4
    (Isola et al. 2017, app. 6.1.2, whose 70x70 is the default).

    Norms are GroupNorm where Isola et al. have BatchNorm. A batch's statistics are poor where a process holds a few
    pictures, differ from process to process, and mix real pictures with made ones; a picture's own statistics do
    none of it, so that several processes do what one does and nothing but parameters has to be stored.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, n_layers: int = 3):
        super().__init__()
        self.least_side = 3 * 2**n_layers  # pixels a side that leave one logit
        widths = [width * min(2**i, 8) for i in range(n_layers + 1)]
        self.conv_in = nn.Conv2d(in_channels, width, 4, stride=2, padding=1)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for i, (before, after) in enumerate(pairwise(widths)):
            stride = 2 if i < n_layers - 1 else 1
            self.convs.append(nn.Conv2d(before, after, 4, stride, padding=1, bias=False))
            self.norms.append(nn.GroupNorm(math.gcd(32, after // 2), after))
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)  # as Isola et al.

    def forward(self, picture: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv_in(picture), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.conv_out(x)

"""One step of Stable Diffusion 1.5's U-Net at 512 pixels, of random weights: ours against diffusers'.

"as torch multiplies" is ours by `scaled_dot_product_attention` and torch's own linear layers alone.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.models import attention, onednn, packed
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig


def contenders(precision: str, pictures: int) -> tuple[dict[str, Callable[[], int]], float]:
    """Each does a step of so many guided pictures. Beside them: the relative L2 distance of ours and diffusers'."""
    import diffusers

    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64).eval()
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_diffusers(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    theirs, ours = theirs.to(dtype), ours.eval().to(dtype)
    rows = 2 * pictures
    x, hidden = torch.randn(rows, 4, 64, 64).to(dtype), torch.randn(rows, 77, 768).to(dtype)
    timestep = torch.full((rows,), 500.0)

    @torch.no_grad()
    def step() -> Tensor:
        return ours(x, timestep, Condition(hidden=hidden))

    @torch.no_grad()
    def of_diffusers() -> Tensor:
        return theirs(x, timestep, hidden, return_dict=False)[0]

    def as_torch_multiplies() -> Tensor:
        with (
            patch.object(onednn, "mkl_is_slow", lambda: False),
            patch.object(packed, "multiplies", lambda _: False),
            patch.object(attention, "_on_cpu", torch.nn.functional.scaled_dot_product_attention),
        ):
            return step()

    one, other = step().float(), of_diffusers().float()
    works = {"diffusers": of_diffusers, "ours, as torch multiplies": as_torch_multiplies, "ours": step}
    counted = {name: lambda work=work: len(work()) // 2 for name, work in works.items()}
    return counted, float((one - other).norm() / other.norm())

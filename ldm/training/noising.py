"""The noise and the timesteps of a batch in training."""

import torch
from torch import Tensor

from ldm.diffusion.noising import Noised, add_noise, shifted
from ldm.diffusion.schedule import Schedule
from ldm.training.distributed import BatchGenerator
from ldm.training.layout import memory_format


def noised_batch(
    latents: Tensor,
    rng: BatchGenerator,
    schedule: Schedule,
    device: torch.device,
    *,
    timestep_shift: float = 1.0,
    offset_noise: float = 0.0,
    input_perturbation: float = 0.0,
) -> Noised:
    """Draw noise and timesteps for latents (B, C, h, w) and put it on them, on `device`.

    See `ldm.diffusion.losses.LossConfig` for the three settings. Drawn in this order: noise, timestep, offset,
    perturbation.
    """
    shape = latents.shape[1:]
    noise = rng.normal(*shape)
    timestep = schedule.draw(shifted(rng.uniform(), timestep_shift))
    if offset_noise:
        noise = noise + offset_noise * rng.normal(shape[0], 1, 1)
    seen = noise + input_perturbation * rng.normal(*shape) if input_perturbation else None

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(device, memory_format=memory_format(device))

    return add_noise(
        placed(latents),
        placed(noise),
        timestep.to(device),
        schedule,
        None if seen is None else placed(seen),
    )

"""Latent consistency distillation (Luo et al. 2023, arXiv:2310.04378), and of a LoRA, LCM-LoRA (arXiv:2311.05556)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ldm.diffusion.consistency import HUBER_C, check_decay, latent_boundary
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.parameterization import per_image
from ldm.diffusion.process import Discrete, Process
from ldm.diffusion.samplers import straight_step
from ldm.errors import UserError
from ldm.training.bounds import refuse_outside
from ldm.training.distillation.lesson import Lesson, Method
from ldm.training.distributed import BatchGenerator


@dataclass(frozen=True)
class LatentConsistency(Method):
    """The student says the same at a noise level and at the one that a step of its guided teacher leads to.

    solver_steps: of the teacher's DDIM, from noise to the picture: 50 of 1,000 timesteps are steps of k = 20.
    timestep_scaling: of the boundary condition, see `ldm.diffusion.consistency.latent_boundary`.
    loss: "huber" is the pseudo-Huber loss of each number, with `huber_c`; or "l2".
    ema_decay: of the target, a share a step; None takes the student itself, as LCM-LoRA does.
    """

    kind: ClassVar[str] = "latent_consistency"

    solver_steps: int = 50
    timestep_scaling: float = 10.0
    loss: Literal["huber", "l2"] = "huber"
    huber_c: float = 0.001
    ema_decay: float | None = None

    def check(self, where: str) -> None:
        refuse_outside(where, self, ("solver_steps",), 2, 1000)
        refuse_outside(where, self, ("timestep_scaling",), 1e-6, 1e6)  # as its scheduler's file is read
        refuse_outside(where, self, ("huber_c",), *HUBER_C)
        if self.ema_decay is not None:
            check_decay(f"{where}.ema_decay", self.ema_decay)

    def process(self, teacher: Process) -> Process:
        """The teacher's noise, drawn with as LCMScheduler does. Raises UserError where it has no discrete timesteps."""
        if not isinstance(teacher, Discrete):
            raise UserError(
                "latent_consistency is of a model in discrete timesteps: for others take consistency_distillation"
            )
        total = teacher.schedule.num_train_timesteps
        if self.solver_steps > total:
            raise UserError("distillation.method.solver_steps are more than the model's timesteps")
        if total % self.solver_steps:
            raise UserError(
                f"distillation.method.solver_steps, {self.solver_steps}, do not divide the model's {total} timesteps: "
                "LCMScheduler would draw on other noise levels than it learned"
            )
        lcm = teacher.scheduler.with_sampler("lcm").with_values(
            timestep_scaling=self.timestep_scaling,
            original_inference_steps=self.solver_steps,
            clip_sample=False,
        )
        return Discrete(lcm)

    def around(self, denoise: Denoise, process: Process) -> Denoise:
        assert isinstance(process, Discrete)
        return latent_boundary(denoise, process.schedule, self.timestep_scaling)

    def averaging(self, seen: int) -> float | None:
        return self.ema_decay

    def losses(self, lesson: Lesson, x0: Tensor, rng: BatchGenerator, seen: int) -> Tensor:
        """See `Method`. Drawn in this order: the noise, the timestep."""
        assert isinstance(lesson.process, Discrete)
        schedule = lesson.process.schedule.to(x0.device)
        total = schedule.num_train_timesteps
        noise = rng.normal(*x0.shape[1:]).to(x0)
        index = rng.integers(self.solver_steps).to(x0.device)
        begin = (index + 1) * (total // self.solver_steps) - 1
        end = (begin - total // self.solver_steps).clamp(min=0)
        sigma, sigma_end = (schedule.sigma(each).to(x0.dtype) for each in (begin, end))
        x = x0 + per_image(sigma, x0) * noise
        x_end = straight_step(x, lesson.teacher(x, sigma), sigma, sigma_end)
        error = lesson.student(x, sigma) - lesson.target(x_end, sigma_end)
        each = error.square()
        if self.loss == "huber":
            each = (each + self.huber_c**2).sqrt() - self.huber_c
        return each.flatten(1).mean(1)

"""The one place that draws: conditions, plans that begin on the way, rows of unlike requests, another network."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import SCHEDULER, tiny_pipeline_folder
from torch import Tensor, nn
from training_runs import write_config

from ldm.condition import Condition, concatenate
from ldm.diffusion import driver, guidance
from ldm.diffusion.denoiser import Denoiser, Network, answered
from ldm.diffusion.driver import Noise
from ldm.diffusion.plan import plan
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.scheduler_config import SchedulerConfig
from ldm.errors import UserError
from ldm.models.denoising import DenoisingNetwork
from ldm.models.networks import NETWORKS
from ldm.sampling import Guidance, decode, prepare, sample
from ldm.system import System
from ldm.training.run import train
from pipelines import TextToImagePipeline

SHAPE = (4, 8, 8)


# Conditions


def test_a_condition_knows_its_rows_and_moves_whole() -> None:
    one = Condition(torch.ones(2, 3, 4), time_ids=torch.full((2, 6), 1023.0), labels=torch.tensor([1, 2]))
    assert one.rows == 2 and list(one.parts()) == ["hidden", "time_ids", "labels"]
    moved = concatenate([one.zeros(), one]).to(dtype=torch.bfloat16)
    assert moved.rows == 4 and moved.text.dtype == torch.bfloat16
    assert moved.labels is not None and moved.labels.tolist() == [0, 0, 1, 2]
    assert moved.time_ids is not None and moved.time_ids[3, 0] == 1023  # bfloat16 has no such number
    assert torch.equal(moved.last(2).text.float(), one.text) and moved.last(4) is moved
    with pytest.raises(ValueError, match=r"other numbers of rows \(hidden \(2, 3, 4\), labels \(3,\)\)"):
        Condition(torch.ones(2, 3, 4), labels=torch.zeros(3))
    with pytest.raises(ValueError, match="either all conditions have labels, time_ids or none has"):
        concatenate([one, Condition(one.hidden)])


def test_what_a_network_wants_is_asked_for_by_name() -> None:
    text = Condition(torch.ones(1, 3, 4))
    text.require(["hidden"], "the unet")
    with pytest.raises(UserError, match="the unet wants pooled in its condition, and it has hidden"):
        text.require(["hidden", "pooled"], "the unet")
    with pytest.raises(UserError, match="the unet takes no labels in its condition, only hidden"):
        replace(text, labels=torch.zeros(1)).require(["hidden"], "the unet")


# Plans that begin, or end, on the way


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The best estimate of x0 where all pictures are a standard normal one."""
    return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


def test_a_run_in_two_halves_is_the_run() -> None:
    """Of the samplers without a memory of earlier steps, to the bit."""
    for name in ("euler", "ddim", "heun", "ddpm", "euler_ancestral", "dpmpp_sde", "lcm"):
        whole = plan(SchedulerConfig.from_dict(SCHEDULER), 9, sampler=name)
        whole = replace(whole, unit_variance=False)
        noise, again = Noise([1, 2], SHAPE), Noise([1, 2], SHAPE)
        expected = whole.sample(gaussian, noise)
        first = whole.part(0, 4).sample(gaussian, again)
        second = whole.part(4)
        x = SAMPLERS[name].solve(first, whole.sigmas, again, span=second.span, **whole.options)
        assert torch.equal(driver.sample(whole.wrap(gaussian), x), expected), name


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp_2m", "unipc", "heun", "dpmpp_2m_sde"])
@pytest.mark.parametrize("begin", [0, 3, 8, 9])
def test_a_plan_that_begins_on_the_way_is_diffusers(name: str, begin: int) -> None:
    """Image to image: noise is added to latents, and the solver knows the whole from where it begins."""
    import diffusers

    own = diffusers.DDIMScheduler(**{k: v for k, v in SCHEDULER.items() if k != "_class_name"})
    kind = getattr(diffusers, SAMPLERS[name].scheduler)
    more = {"algorithm_type": "sde-dpmsolver++"} if name == "dpmpp_2m_sde" else {}
    theirs = kind.from_config(own.config, **more)
    theirs.set_timesteps(10)
    order = theirs.order
    timesteps = theirs.timesteps[begin * order :]
    theirs.set_begin_index(begin * order) if hasattr(theirs, "set_begin_index") else None
    x0 = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    noise = torch.stack([torch.randn(SHAPE, generator=each) for each in generators])
    x = theirs.add_noise(x0, noise, timesteps[:1])
    for t in timesteps:
        scaled = theirs.scale_model_input(x, t)
        level = 1 - own.alphas_cumprod[t.round().long()]
        epsilon = (
            scaled * level.sqrt()
        )  # the best estimate of the noise, of unit variance, in `gaussian`'s world
        step = {"generator": generators} if "generator" in theirs.step.__code__.co_varnames else {}
        x = theirs.step(epsilon, t, x, **step).prev_sample

    how = plan(SchedulerConfig.from_dict(SCHEDULER), 10, sampler=name).part(begin)
    denoise = how.denoiser(lambda seen, timestep: seen * _level(how.schedule, timestep))
    found = how.sample(denoise, Noise([1, 2], SHAPE), x0=x0)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=2e-4)


def _level(schedule: NoiseSchedule, timestep: Tensor) -> Tensor:
    sigma = schedule.sigma(timestep.double()).view(-1, 1, 1, 1)
    return (sigma / (1 + sigma**2).sqrt()).float()


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_begins_and_ends_anywhere(name: str) -> None:
    whole = plan(SchedulerConfig.from_dict(SCHEDULER), 7, sampler=name)
    last = len(whole.sigmas) - 1
    for begin, end in itertools.combinations_with_replacement(range(last + 1), 2):
        how = whole.part(begin, end)
        asked: list[float] = []

        def denoise(x: Tensor, sigma: Tensor, asked: list[float] = asked) -> Tensor:
            asked.append(sigma[0].item())
            return gaussian(x, sigma)

        found = how.sample(denoise, Noise([3], SHAPE), x0=torch.zeros(1, *SHAPE))
        assert found.isfinite().all() and bool(asked) == (begin < end)
        assert how.evaluations == len(asked)
        assert all(whole.sigmas[end] - 1e-6 <= each <= whole.sigmas[begin] + 1e-6 for each in asked)
    with pytest.raises(UserError, match="steps 3 to 9 are asked for of 7"):
        whole.part(3, 9)


# Rows of unlike requests in one call


def test_rows_of_unlike_requests_are_as_they_are_alone() -> None:
    schedule = SchedulerConfig.from_dict(SCHEDULER).noise_schedule()
    scales, rescales = [1.0, 5.0, 7.5, 3.0], [0.0, 0.0, 0.7, 0.3]
    lows, highs = [0.0, 0.0, 0.5, 2.0], [math.inf, math.inf, 9.0, 4.0]
    roundings = ["none", "floor", "round", "none"]
    limits = [None, lambda x0: x0.clamp(-1, 1), guidance.threshold_x0, None]
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(4, *SHAPE, generator=generator)
    sigma = torch.tensor([1.0, 1.3, 1.7, 1.1])

    def network_of(images: int) -> Network:
        """What it gives depends on the timestep, and on the condition, which all rows but the last `images` lack."""

        def network(x: Tensor, timestep: Tensor) -> Tensor:
            without = torch.arange(len(x)).view(-1, 1, 1, 1) < len(x) - images
            shift = timestep.view(-1, 1, 1, 1) / 1000
            return torch.where(without, x.cos(), x.sin() * 1.3 + shift)

        return network

    rows = [torch.tensor(each) for each in (scales, rescales, lows, highs)]
    denoiser = Denoiser(network_of(4), schedule, rounding=roundings)  # type: ignore[arg-type]
    guided = guidance.classifier_free(denoiser, rows[0], rows[1], (rows[2], rows[3]))
    found = answered(guidance.limited(guided, limits)(x, sigma))  # type: ignore[arg-type]
    for k, limit in enumerate(limits):
        own = Denoiser(network_of(1), schedule, rounding=roundings[k])  # type: ignore[arg-type]
        denoise = guidance.classifier_free(own, scales[k], rescales[k], (lows[k], highs[k]))
        denoise = denoise if limit is None else guidance.limited(denoise, limit)
        alone = answered(denoise(x[k : k + 1], sigma[k : k + 1]))
        torch.testing.assert_close(found[k : k + 1], alone)


# Another kind of network


@dataclass(frozen=True)
class StubConfig:
    """Of the stub below."""

    sample_size: int = 16
    in_channels: int = 4
    out_channels: int = 4
    layers: int = 1
    _class_name: str = field(default="StubTransformer2DModel")

    def to_diffusers(self) -> dict[str, Any]:
        return asdict(self)


class Stub(DenoisingNetwork):
    """A transformer's place, taken by one convolution that the text moves."""

    component = "transformer"
    pipelines = ("StubPipeline",)

    def __init__(self, config: StubConfig):
        super().__init__()
        self.config = config
        self.mix, self.text = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(32, 4)

    @classmethod
    def read_config(cls, mapping: Mapping[str, Any], where: str) -> StubConfig:
        return StubConfig(**{k: v for k, v in mapping.items() if not k.startswith("_diffusers")})

    def wants(self, latent_channels: int) -> dict[str, int]:
        return {"hidden": 32}

    def forward(self, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self.mix(sample) + self.text(condition.text.mean(1))[:, :, None, None]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(NETWORKS, "StubTransformer2DModel", Stub)
    system = System.load(tiny_pipeline_folder(tmp_path, "sd1"))
    torch.manual_seed(0)
    replace(system, network=Stub(StubConfig()), pipeline="StubPipeline").save(tmp_path / "stub")
    return tmp_path / "stub"


def test_another_network_draws_through_the_pipeline(stub: Path, tmp_path: Path) -> None:
    assert (stub / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    pipe = TextToImagePipeline.from_pretrained(stub, device="cpu")
    images = pipe(
        ["a cat", "the dog"], seed=3, num_inference_steps=3, output_type="pt", progress=False
    ).images
    assert images.shape == (2, 3, 32, 32) and not torch.equal(*images)
    pipe.save_pretrained(tmp_path / "again")
    again = TextToImagePipeline.from_pretrained(tmp_path / "again", device="cpu")
    found = again(
        ["a cat", "the dog"], seed=3, num_inference_steps=3, output_type="pt", progress=False
    ).images
    assert torch.equal(found, images)


def test_a_request_is_the_pipelines_picture(stub: Path) -> None:
    system = System.load(stub)
    how = plan(system.scheduler, 3)
    with torch.no_grad():
        request = prepare(system, how, ["a cat"], [3], guidance=Guidance(4.0))
        pixels = decode(system.autoencoder, sample(system, request))
    pipe = TextToImagePipeline.from_pretrained(stub, device="cpu")
    found = pipe("a cat", seed=3, num_inference_steps=3, guidance_scale=4.0, output_type="pt", progress=False)
    assert torch.equal(found.images, pixels)


def test_another_network_trains_through_the_loop(stub: Path, tmp_path: Path) -> None:
    """Its weights move, and what is exported is a system that draws."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(4):
        Image.new("RGB", (32, 32), (60 * k, 30, 200)).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text("a cat")
    sections = {
        "loop": {"pictures": 16, "batch_size": 4, "precision": "no", "gradient_checkpointing": True},
        "text_to_image": {
            "base": str(stub),
            "data": {"kind": "pictures", "path": str(pictures), "resolution": 32},
            "validation": {"prompts": ["a cat"], "steps": 2},
        },
    }
    assert train(write_config(tmp_path, sections), ["loop.validate_every=16"])
    assert (tmp_path / "run" / "drawn-00000016.png").is_file()
    before, after = (System.load(path).network.state_dict() for path in (stub, tmp_path / "run" / "export"))
    assert all(not torch.equal(before[name].half(), after[name].half()) for name in before)
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run" / "export", device="cpu")
    assert pipe("a cat", num_inference_steps=2, progress=False).images[0].size == (32, 32)

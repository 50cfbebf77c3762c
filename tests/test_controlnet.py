"""ControlNets against diffusers', as networks and in whole pictures; their windows, rows and families."""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from controls import control_picture, louder, saved_controlnet, tiny_controlnet
from PIL import Image
from tiny import SCHEDULER, Family, tiny_pipeline_folder
from torch import Tensor

from ldm.condition import Condition
from ldm.conditioning.control import Control, Controls, control_pictures
from ldm.conditioning.controlnets import load_controlnet
from ldm.diffusion.plan import plan
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.scheduler_config import SchedulerConfig
from ldm.errors import UserError
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.preprocess import canny
from ldm.sampling import Guidance, controlled, decode, prepare, sample
from ldm.system import System

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny systems and, beside each, ControlNets of its family."""
    made = tmp_path_factory.mktemp("controlled")
    for family in ("sd1", "sdxl"):
        tiny_pipeline_folder(made / family, family)
    saved_controlnet(made / "one", "sd1", 7)
    saved_controlnet(made / "two", "sd1", 8, controlnet_conditioning_channel_order="bgr")
    saved_controlnet(made / "shuffle", "sd1", 9, global_pool_conditions=True)
    saved_controlnet(made / "xl", "sdxl", 10)
    return made


# Networks


def inputs(family: Family, rows: int = 2) -> tuple[Tensor, Tensor, Condition, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, 16, 16, generator=generator)
    width = 64 if family == "sdxl" else 32
    more: dict[str, Tensor] = {}
    if family == "sdxl":
        pooled = torch.randn(rows, 24, generator=generator)
        more = {"pooled": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * rows)}
    condition = Condition(torch.randn(rows, 7, width, generator=generator), **more)
    return x, torch.tensor([7.0, 801.0][:rows]), condition, torch.rand(rows, 3, 32, 32, generator=generator)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sd1", {}),
        ("sd2", {"controlnet_conditioning_channel_order": "bgr"}),
        ("sdxl", {}),
        ("sd1", {"global_pool_conditions": True}),
    ],
)
def test_residuals_are_diffusers(tmp_path: Path, family: Family, settings: dict[str, Any]) -> None:
    theirs = tiny_controlnet(family, **settings)
    theirs.save_pretrained(tmp_path / "controlnet")
    network = load_controlnet(tmp_path / "controlnet")
    x, timestep, condition, picture = inputs(family)
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    with torch.no_grad():
        down, mid = theirs(x, timestep, condition.hidden, picture, added_cond_kwargs=added, return_dict=False)
        found = network(x, timestep, condition, network.embed(picture))
    assert min(each.std() for each in (*down, mid)) > 0.02
    for ours, expected in zip((*found.down, found.mid), (*down, mid), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_network_without_attention_is_diffusers() -> None:
    """As the small ones for SDXL: no transformer at all, and one residual block in the middle."""
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    theirs = ControlNetModel(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=(0, 0),
        attention_head_dim=(1, 2),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        conditioning_embedding_out_channels=(8, 16),
    )
    louder(theirs)
    network = ControlNet(ControlNetConfig.from_diffusers(dict(theirs.config)))
    network.load_state_dict(theirs.state_dict())
    x, timestep, condition, picture = inputs("sd1")
    with torch.no_grad():
        down, mid = theirs(x, timestep, condition.hidden, picture, return_dict=False)
        found = network(x, timestep, condition, network.embed(picture))
    for ours, expected in zip((*found.down, found.mid), (*down, mid), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_copy_of_the_encoder_changes_nothing_yet(folders: Path) -> None:
    unet = loaded(folders / "sdxl" / "sdxl").network
    network = ControlNet.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    x, timestep, condition, picture = inputs("sdxl")
    with torch.no_grad():
        residuals = network(x, timestep, condition, network.embed(picture))
        assert torch.equal(unet(x, timestep, condition, residuals), unet(x, timestep, condition))
    own, copied = network.state_dict(), unet.state_dict()
    shared = own.keys() & copied.keys()
    assert all(torch.equal(own[name], copied[name]) for name in shared)
    assert {name.partition(".")[0] for name in own.keys() - shared} == {
        "controlnet_cond_embedding",
        "controlnet_down_blocks",
        "controlnet_mid_block",
    }
    assert {"down_blocks", "mid_block", "add_embedding"} < {name.partition(".")[0] for name in shared}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_unet_with_residuals_is_diffusers(tmp_path: Path, family: Family, folders: Path) -> None:
    theirs = their_pipeline(folders / family / family).unet
    control = tiny_controlnet(family)
    unet = loaded(folders / family / family).network
    control.save_pretrained(tmp_path)
    network = load_controlnet(tmp_path)
    x, timestep, condition, picture = inputs(family)
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    with torch.no_grad():
        down, mid = control(
            x, timestep, condition.hidden, picture, added_cond_kwargs=added, return_dict=False
        )
        expected = theirs(
            x,
            timestep,
            condition.hidden,
            added_cond_kwargs=added,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample
        found = unet(x, timestep, condition, network(x, timestep, condition, network.embed(picture)))
        plain = unet(x, timestep, condition)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().mean() > 0.01


# Whole pictures


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((one.astype(np.float64) - other) ** 2) + 1e-20))


@cache
def their_pipeline(model: Path) -> Any:
    import diffusers

    xl = model.name == "sdxl"
    kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    return kind.from_pretrained(model, **({} if xl else {"safety_checker": None}))


@cache
def their_controlnet(folder: Path) -> Any:
    from diffusers import ControlNetModel

    return ControlNetModel.from_pretrained(folder)


def theirs_drawn(model: Path, controls: list[Path], pictures: Any, **settings: Any) -> np.ndarray:
    """(B, 32, 32, 3) by diffusers, from folders."""
    import diffusers

    networks = [their_controlnet(each) for each in controls]
    xl = model.name == "sdxl"
    kind = (
        diffusers.StableDiffusionXLControlNetPipeline if xl else diffusers.StableDiffusionControlNetPipeline
    )
    parts = {**their_pipeline(model).components, "controlnet": networks if len(networks) > 1 else networks[0]}
    pipe = kind(**parts, **({} if xl else {"requires_safety_checker": False}))
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(each) for each in settings.pop("seeds", [5])]
    return pipe(
        generator=generators, image=pictures, num_inference_steps=6, output_type="np", **settings
    ).images


loaded = cache(System.load)


def ours_drawn(
    model: Path, controls: list[Control], prompts: list[str], seeds: list[int], scale: float
) -> np.ndarray:
    system = loaded(model)
    how = plan(system.scheduler, 6)
    with torch.no_grad():
        request = prepare(system, how, prompts, seeds, guidance=Guidance(scale))
        request = controlled(system, request, controls)
        return decode(system.autoencoder, sample(system, request)).permute(0, 2, 3, 1).numpy()


CASES: dict[str, tuple[list[str], dict[str, Any], list[dict[str, Any]]]] = {
    "pooled": (["shuffle"], {}, [{}]),
    "two": (
        ["one", "two"],
        {
            "controlnet_conditioning_scale": [0.7, 0.4],
            "control_guidance_start": [0.0, 0.5],
            "control_guidance_end": [0.5, 1.0],
        },
        [{"scale": 0.7, "end": 0.5}, {"scale": 0.4, "start": 0.5}],
    ),
    "two, guessing": (
        ["two", "one"],
        {"guess_mode": True, "controlnet_conditioning_scale": [0.6, 1.2]},
        [{"guess_mode": True, "scale": 0.6}, {"guess_mode": True, "scale": 1.2}],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_diffusers(folders: Path, case: str) -> None:
    names, settings, own = CASES[case]
    model, picture = folders / "sd1" / "sd1", [control_picture(k) for k in range(len(names))]
    shown: Any = picture[0] if len(names) == 1 else picture
    expected = theirs_drawn(
        model, [folders / each for each in names], shown, prompt="a cat", guidance_scale=4.0, **settings
    )
    controls = [
        Control(load_controlnet(folders / name), control_pictures([each], (32, 32)), **more)
        for name, each, more in zip(names, picture, own, strict=True)
    ]
    found = ours_drawn(model, controls, ["a cat"], [5], 4.0)
    assert psnr(found, expected) > 60
    plain = ours_drawn(model, [], ["a cat"], [5], 4.0)
    assert psnr(found, plain) < 45  # the control is seen


def test_each_row_has_its_own_picture_and_scale(folders: Path) -> None:
    """Two pictures in one batch are diffusers' two, and, with a scale each, the same as alone."""
    model, network = folders / "sd1" / "sd1", load_controlnet(folders / "one")
    prompts, seeds, pictures = ["a cat", "the dog"], [5, 6], [control_picture(k) for k in (0, 1)]
    expected = theirs_drawn(
        model, [folders / "one"], pictures, prompt=prompts, guidance_scale=4.0, seeds=seeds
    )
    shown = control_pictures(pictures, (32, 32))
    found = ours_drawn(model, [Control(network, shown)], prompts, seeds, 4.0)
    assert psnr(found, expected) > 60
    scales = torch.tensor([0.3, 1.1])
    for guess in (False, True):
        both = ours_drawn(model, [Control(network, shown, scales, guess_mode=guess)], prompts, seeds, 4.0)
        for k in (0, 1):
            alone = Control(network, shown[k : k + 1], float(scales[k]), guess_mode=guess)
            assert (
                psnr(ours_drawn(model, [alone], prompts[k : k + 1], seeds[k : k + 1], 4.0), both[k : k + 1])
                > 90
            )


def test_without_guidance_guess_mode_steers_all_rows(folders: Path) -> None:
    model, picture = folders / "sd1" / "sd1", control_picture(2)
    expected = theirs_drawn(
        model, [folders / "one"], picture, prompt="a cat", guidance_scale=1.0, guess_mode=True
    )
    shown = control_pictures([picture], (32, 32))
    control = Control(load_controlnet(folders / "one"), shown, guess_mode=True)
    assert psnr(ours_drawn(model, [control], ["a cat"], [5], 1.0), expected) > 60


def test_the_picture_is_embedded_once(folders: Path) -> None:
    network = load_controlnet(folders / "one")
    seen: list[int] = []
    network.controlnet_cond_embedding.register_forward_hook(lambda *_: seen.append(1))
    called: list[int] = []
    network.register_forward_hook(lambda *_: called.append(1))
    shown = control_pictures([control_picture()], (32, 32))
    ours_drawn(folders / "sd1" / "sd1", [Control(network, shown, end=0.5)], ["a cat"], [5], 4.0)
    assert len(seen) == 1 and len(called) == 3  # half of six steps; the others don't cost anything


# Windows


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("begin", [0, 3])
def test_windows_are_diffusers_for_every_sampler(name: str, begin: int) -> None:
    """The predictions inside are those that diffusers counts, but for a level that is visited twice at the edge."""
    how = plan(SchedulerConfig.from_dict(SCHEDULER), 10, sampler=name).part(begin)
    levels = how.predictions
    timesteps = how.denoiser(lambda x, timestep: x).timestep(torch.tensor(levels))
    for start, end in [(0.0, 1.0), (0.0, 0.5), (0.3, 0.8), (0.5, 1.0), (0.25, 0.3), (0.98, 1.0)]:
        low, high = how.window(start, end)
        found = ((timesteps > low) & (timesteps <= high)).tolist()
        count = len(levels)
        expected = [not (i / count < start or (i + 1) / count > end) for i in range(count)]
        for i, level in enumerate(levels):
            later = max(k for k, each in enumerate(levels) if each == level)
            assert found[i] == expected[later], (start, end, i)
        doubtful = [i for i in range(count) if found[i] != expected[i]]
        assert len(doubtful) <= 2


def test_a_plan_that_begins_on_the_way_counts_its_own_steps(folders: Path) -> None:
    network = load_controlnet(folders / "one")
    system = loaded(folders / "sd1" / "sd1")
    shown = control_pictures([control_picture()], (32, 32))
    for begin, expected in ((0, [8, 9]), (4, [8, 9]), (8, [9])):
        how = plan(system.scheduler, 10, sampler="euler").part(begin)
        window = how.window(1 - len(expected) / (10 - begin) - 1e-9, 1.0)
        controls = Controls([Control(network, shown)], [window], 1)
        timesteps = how.denoiser(lambda x, timestep: x).timestep(torch.tensor(how.predictions))
        condition = Condition(torch.zeros(1, 7, 32))
        with torch.no_grad():
            active = [
                begin + i
                for i, each in enumerate(timesteps)
                if controls(torch.zeros(1, 4, 16, 16), each[None], condition) is not None
            ]
        assert active == expected


# What is refused


def test_other_families_are_refused_before_anything_is_drawn(folders: Path, tmp_path: Path) -> None:
    sd1, xl = loaded(folders / "sd1" / "sd1"), loaded(folders / "sdxl" / "sdxl")
    one, other = load_controlnet(folders / "one"), load_controlnet(folders / "xl")
    shown = control_pictures([control_picture()], (32, 32))

    def ask(system: System, *controls: Control) -> None:
        request = prepare(system, plan(system.scheduler, 2), ["a cat", "the dog"], [1, 2])
        controlled(system, request, controls)

    ask(sd1, Control(one, shown), Control(one, shown.expand(2, -1, -1, -1), torch.ones(2)))
    cases = [
        (
            xl,
            Control(one, shown),
            "another family than the model: it attends to 32 features of text, the model has 64",
        ),
        (sd1, Control(other, shown), "another family than the model: it attends to 64"),
        (sd1, Control(one, shown[..., :16]), r"shape \(1, 3, 32, 16\), where \(2, 3, 32, 32\) is needed"),
        (sd1, Control(one, shown.expand(3, -1, -1, -1)), r"shape \(3, 3, 32, 32\)"),
        (sd1, Control(one, shown * 255), "values outside of 0 to 1"),
        (sd1, Control(one, shown * torch.nan), "values outside of 0 to 1"),
        (sd1, Control(one, shown, torch.ones(3)), "its scale is"),
        (sd1, Control(one, shown, float("nan")), "its scale is nan"),
        (sd1, Control(one, shown, start=0.5, end=0.5), "from 0.5 to 0.5 of the steps"),
        (sd1, Control(one, shown, start=-1), "from -1 to 1.0 of the steps"),
    ]
    for system, control, message in cases:
        with pytest.raises(UserError, match=message):
            ask(system, control)
    wider = ControlNet(replace(one.config, conditioning_embedding_out_channels=(8, 16, 32)))
    with pytest.raises(
        UserError, match=r"ControlNet 2 of 2 is of another family .* 4 times .* the model has 2"
    ):
        ask(sd1, Control(one, shown), Control(wider, shown))
    for change, what in (
        ({"layers_per_block": 2}, "layers_per_block 2"),
        ({"block_out_channels": (32, 32)}, r"block_out_channels \[32, 32\]"),
        ({"in_channels": 9}, "takes 5 channels beside the latents', the model has 0"),
    ):
        with pytest.raises(UserError, match=what):
            ask(sd1, Control(ControlNet(replace(one.config, **change)), shown))


def test_an_inpainting_model_takes_a_plain_controlnet(tmp_path: Path, folders: Path) -> None:
    model = tiny_pipeline_folder(tmp_path, "inpaint")
    shown = control_pictures([control_picture()], (32, 32))
    plain = ours_drawn(model, [], ["a cat"], [5], 4.0)
    found = ours_drawn(model, [Control(load_controlnet(folders / "one"), shown)], ["a cat"], [5], 4.0)
    assert np.isfinite(found).all() and psnr(found, plain) < 45


# Pictures


def test_pictures_are_prepared_as_diffusers_does() -> None:
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(vae_scale_factor=2, do_convert_rgb=True, do_normalize=False)
    for size in ((32, 32), (50, 37), (20, 90)):
        for picture in (control_picture(1, size), control_picture(1, size).convert("L")):
            expected = processor.preprocess(picture, height=32, width=48)
            assert torch.equal(control_pictures([picture], (32, 48)), expected)
    both = control_pictures([control_picture(1), np.asarray(control_picture(2))], (32, 32))
    assert both.shape == (2, 3, 32, 32) and both.max() <= 1
    deep = Image.fromarray((np.arange(32 * 32).reshape(32, 32) * 60).astype(np.uint16))
    assert 0.2 < control_pictures([deep], (32, 32)).mean() < 0.8  # 16 bits of depth are not clipped
    for wrong in (np.zeros((3, 4, 4), np.float32), "picture.png"):
        with pytest.raises(UserError, match="a control picture is"):
            control_pictures([wrong], (32, 32))  # type: ignore[list-item]


def test_edges_are_opencvs(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")
    picture = np.asarray(control_picture(4, (48, 40)))
    edges = canny(picture)
    assert edges.shape == (40, 48, 3) and set(np.unique(edges)) == {0, 255}
    assert np.array_equal(edges[..., 0], cv2.Canny(picture, 100, 200))
    assert canny(picture, 400, 900).sum() < edges.sum()
    with pytest.raises(UserError, match=r"uint8 \(H, W, 3\), and this is float64"):
        canny(picture / 255)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="pip install opencv-python-headless"):
        canny(picture)

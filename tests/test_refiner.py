"""SDXL's refiner, and the classes of pipelines that diffusers saves a whole model under."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from controls import tiny_controlnet
from test_pipeline_pictures import PIPELINES, SETTINGS, mask, picture, psnr, seeded, theirs
from tiny import tiny_pipeline_folder
from torch import Tensor

from ldm.conditioning.controlnets import load_controlnet
from ldm.conditioning.tokenizer import clip_tokenizer
from ldm.diffusion.plan import plan
from ldm.errors import UserError
from ldm.sampling import Guidance, Request, decode, prepare, sample
from ldm.sampling.editing import Pictures, begin_from, first_step, go_on_from
from ldm.system import System
from pipelines import TextToImagePipeline

REFINER = "StableDiffusionXLImg2ImgPipeline"
PLAIN = {key: value for key, value in SETTINGS.items() if key != "output_type"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: tiny_pipeline_folder(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="module")
def refiner(folder: Callable[[str], Path]) -> System:
    return System.load(folder("refiner"))


@pytest.fixture(scope="module")
def ours(folder: Callable[[str], Path]) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(folder("refiner"), device="cpu")


def rewritten(source: Path, target: Path, **changes: Any) -> Path:
    """A folder of the same parts under another model_index.json."""
    target.mkdir()
    for each in source.iterdir():
        if each.is_dir():
            (target / each.name).symlink_to(each)
    index = json.loads((source / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps(index | changes))
    return target


def asked(system: System, guided: bool = True, **told: Any) -> Request:
    how = plan(system.scheduler, 10)
    return prepare(system, how, ["cat", "the dog"], [3, 4], guidance=Guidance(5.0 if guided else 1.0), **told)


@torch.no_grad()
def finished(system: System, request: Request) -> np.ndarray:
    return decode(system.autoencoder, sample(system, request)).permute(0, 2, 3, 1).numpy()


# What the network is told


def test_five_numbers_and_scores_by_halves(refiner: System) -> None:
    """Podell et al. 2023, sec. 2.5: sizes, crop and an aesthetic score; the half without the prompt has its own."""
    assert refiner.requires_aesthetics_score and refiner.is_xl
    assert refiner.wants == {"hidden": 32, "pooled": 24, "time_ids": 5}
    told = asked(refiner).condition.time_ids
    assert told is not None and told.tolist() == [[32, 32, 0, 0, 2.5]] * 2 + [[32, 32, 0, 0, 6]] * 2
    told = asked(refiner, guided=False, aesthetic_score=7.5).condition.time_ids
    assert told is not None and told.tolist() == [[32, 32, 0, 0, 7.5]] * 2
    sizes, other = (48, 40, 4, 6, 32, 32), (20, 24, 1, 2, 3, 4)
    told = asked(refiner, sizes=sizes, negative_aesthetic_score=1.0).condition.time_ids
    assert told is not None and told[1:3].tolist() == [[48, 40, 0, 0, 1], [48, 40, 4, 6, 6]]
    told = asked(refiner, sizes=sizes, negative_sizes=other).condition.time_ids
    assert told is not None and told[1:3].tolist() == [[20, 24, 1, 2, 2.5], [48, 40, 4, 6, 6]]


def test_sdxl_itself_is_told_six_as_ever(folder: Callable[[str], Path]) -> None:
    base = System.load(folder("sdxl"))
    assert not base.requires_aesthetics_score
    sizes, other = (48, 40, 4, 6, 32, 32), (20, 24, 1, 2, 3, 4)
    told = asked(base, sizes=sizes).condition.time_ids
    assert told is not None and told.tolist() == [list(sizes)] * 4
    told = asked(base, sizes=sizes, negative_sizes=other).condition.time_ids
    assert told is not None and told.tolist() == [list(other)] * 2 + [list(sizes)] * 2
    told = asked(base, guided=False).condition.time_ids
    assert told is not None and told.tolist() == [[32, 32, 0, 0, 32, 32]] * 2


@pytest.mark.parametrize(
    ("family", "told", "message"),
    [
        ("sdxl", {"aesthetic_score": 6.0}, "aesthetic_score is for SDXL's refiner"),
        ("sd1", {"negative_aesthetic_score": 2.5}, "negative_aesthetic_score is for SDXL's refiner"),
        ("refiner", {"aesthetic_score": float("nan")}, "aesthetic_score is nan: give a number"),
    ],
)
def test_scores_that_nothing_is_told_are_one_line(
    folder: Callable[[str], Path], family: str, told: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        asked(System.load(folder(family)), **told)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "said", "message"),
    [
        ("refiner", False, "or requires_aesthetics_score is wrong in model_index.json"),
        ("sdxl", True, "or requires_aesthetics_score is wrong in model_index.json"),
        ("sd1", True, "a UNet is told no aesthetic score"),
        ("refiner", "yes", "requires_aesthetics_score as 'yes': make it true or false"),
    ],
)
def test_an_index_that_says_it_wrongly_is_one_line(
    folder: Callable[[str], Path], tmp_path: Path, family: str, said: object, message: str
) -> None:
    wrong = rewritten(folder(family), tmp_path / "wrong", requires_aesthetics_score=said)
    with pytest.raises(UserError, match=message) as caught:
        System.load(wrong)
    assert "\n" not in str(caught.value)


# Pictures


@pytest.mark.parametrize(("sampler", "share"), [("ddim", 0.8), ("euler", 0.8), ("euler", 0.4)])
def test_it_goes_on_where_the_base_ended(
    folder: Callable[[str], Path], ours: TextToImagePipeline, sampler: str, share: float
) -> None:
    """The two pipelines of diffusers on the same weights; the base draws a part of the noise, the refiner the rest."""
    first = theirs(folder("sdxl"), "StableDiffusionXLPipeline", sampler)
    second = theirs(folder("refiner"), REFINER, sampler)
    middle = first("cat", denoising_end=share, output_type="latent", generator=seeded(3), **PLAIN).images
    expected = second("cat", image=middle, denoising_start=share, generator=seeded(3), **SETTINGS).images
    base = TextToImagePipeline.from_pretrained(folder("sdxl"), device="cpu")
    settings = {**SETTINGS, "seed": 3, "sampler": sampler}
    half = base("cat", denoising_end=share, **{**settings, "output_type": "latent"}).images
    drawn = ours("cat", image=half, denoising_start=share, **settings).images
    assert expected.std() > 0.02
    assert psnr(drawn, expected) > 60
    # The last steps change little in tiny networks: much nearer than the base is without the refiner.
    assert psnr(drawn, expected) > psnr(base("cat", **settings).images, expected) + 20


@pytest.mark.parametrize("negative", [None, "the dog"])
def test_alone_it_draws_from_a_picture(
    folder: Callable[[str], Path], ours: TextToImagePipeline, negative: str | None
) -> None:
    """A missing negative prompt is the empty prompt for it, not zeros, as its folder says."""
    given: dict[str, Any] = {"image": picture(), "strength": 0.3, "negative_prompt": negative, **SETTINGS}
    expected = theirs(folder("refiner"), REFINER)("cat", generator=seeded(3), **given).images
    drawn = ours("cat", seed=3, **given).images
    assert psnr(drawn, expected) > 60
    assert np.abs(drawn - np.asarray(picture()) / 255).max() > 1 / 255


def test_sizes_and_scores_of_ones_own(folder: Callable[[str], Path], refiner: System) -> None:
    """They are told as diffusers tells them, and each moves the picture by more than both differ."""
    told = {"original_size": (48, 40), "crops_coords_top_left": (4, 6)}
    scores = {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0}
    given: dict[str, Any] = {"image": [picture()] * 2, "strength": 0.6, **SETTINGS}
    expected = theirs(folder("refiner"), REFINER)(
        ["cat", "the dog"], generator=seeded(3, 4), **given, **told, **scores
    ).images
    pixels = torch.from_numpy(np.asarray(picture()) / 255).float().permute(2, 0, 1).expand(2, -1, -1, -1)

    def ours(**more: Any) -> np.ndarray:
        request = asked(refiner, **more)
        part = request.plan.part(first_step(request.plan, 0.6))
        return finished(refiner, begin_from(refiner, replace(request, plan=part), Pictures(pixels)))

    sizes = (48, 40, 4, 6, 32, 32)
    drawn = ours(sizes=sizes, **scores)
    assert psnr(drawn, expected) > 60
    for name in scores:
        rest = {key: value for key, value in scores.items() if key != name}
        assert psnr(ours(sizes=sizes, **rest), expected) < 60, name
    assert psnr(ours(**scores), expected) < 60


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "the wrong way round": ({"denoising_start": 0.8, "denoising_end": 0.4}, "not before denoising_end 0.4"),
    "nothing between": ({"denoising_start": 0.5, "denoising_end": 0.51}, "none of 10 steps lies between"),
    "at the end": ({"denoising_start": 1.0}, "between 0 and 1"),
    "nan": ({"denoising_start": float("nan")}, "between 0 and 1"),
    "a picture": ({"denoising_start": 0.8, "image": picture()}, "goes on with latents"),
    "three channels": ({"denoising_start": 0.8, "image": torch.zeros(1, 3, 16, 16)}, "goes on with latents"),
    "eight channels": ({"denoising_start": 0.8, "image": torch.zeros(1, 8, 16, 16)}, "has .4, 16, 16."),
    "with a mask": ({"denoising_start": 0.8, "mask_image": mask()}, "leave out strength and masks"),
    "with noise": ({"denoising_start": 0.8, "latents": torch.zeros(1, 4, 16, 16)}, "leave latents out"),
    "nan inside": ({"denoising_start": 0.8, "image": torch.full((1, 4, 16, 16), torch.nan)}, "hold NaN"),
    "infinity to draw from": ({"strength": 0.5, "image": torch.full((1, 4, 16, 16), torch.inf)}, "hold NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_gone_on_with_is_one_line(ours: TextToImagePipeline, case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        ours("cat", **{"image": torch.zeros(1, 4, 16, 16), **SETTINGS, **given})
    assert "\n" not in str(caught.value)


def test_latents_of_another_size_or_kind_are_one_line(refiner: System) -> None:
    with pytest.raises(UserError, match=r"are \(1, 4, 16, 16\), where \(2, 4, 16, 16\) are drawn"):
        go_on_from(asked(refiner), torch.zeros(1, 4, 16, 16))
    with pytest.raises(UserError, match="complex numbers"):
        go_on_from(asked(refiner), torch.ones(2, 4, 16, 16) * 1j)


# Files


def test_folder_and_single_file_are_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved in both forms, it is read back as it was, also by diffusers, with what its model_index.json says."""
    monkeypatch.setattr(tiny, "CLIP_VOCABULARY", 49408)  # a single file has no tokenizer: it is CLIP's
    made = tiny_pipeline_folder(tmp_path, "refiner")
    clip_tokenizer(pad_token="!").save_pretrained(made / "tokenizer_2")
    first = System.load(made)
    first.save_single_file(tmp_path / "one.safetensors")
    second = System.load(tmp_path / "one.safetensors")
    second.save(tmp_path / "folder")
    third = System.load(tmp_path / "folder")
    images = [finished(each, asked(each)) for each in (first, second, third)]
    for system, drawn in zip((second, third), images[1:], strict=True):
        assert system.options == {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
        assert (system.fingerprint, system.pipeline) == (first.fingerprint, REFINER)
        assert list(system.modules()) == ["text_encoder_2", "unet", "vae"]
        assert psnr(drawn, images[0]) > 100
    found = theirs(tmp_path / "folder", REFINER)
    assert found.config.requires_aesthetics_score and not found.config.force_zeros_for_empty_prompt
    assert found.text_encoder is None and found.tokenizer is None
    unet = first.network.state_dict()
    assert all(torch.equal(unet[name], each) for name, each in found.unet.state_dict().items())


def saved_as(kind: str, source: Path, target: Path, **more: Any) -> Path:
    """The parts of a folder, saved by diffusers as another pipeline's."""
    import diffusers

    parts = diffusers.DiffusionPipeline.from_pretrained(source, local_files_only=True).components
    if "XL" not in kind:
        more["requires_safety_checker"] = False
    getattr(diffusers, kind)(**parts, **more).save_pretrained(target)
    return target


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("what", ["image", "mask"])
def test_pipelines_for_pictures_are_the_same_model(
    folder: Callable[[str], Path], tmp_path: Path, family: str, what: str
) -> None:
    """What diffusers' classes save draws as it does there, and keeps its class and its weights."""
    kind = PIPELINES[family, what]
    found = saved_as(kind, folder(family), tmp_path / "theirs")
    pipe = TextToImagePipeline.from_pretrained(found, device="cpu")
    assert pipe.system.fingerprint == System.load(folder(family)).fingerprint
    pipe.save_pretrained(tmp_path / "ours")
    given: dict[str, Any] = {"image": picture(), "strength": 0.5, **SETTINGS}
    size = {}
    if what == "mask":
        given, size = given | {"mask_image": mask()}, {"height": 32, "width": 32}
    expected = theirs(tmp_path / "ours", kind)("cat", generator=seeded(3), **size, **given).images
    drawn = pipe("cat", seed=3, **given).images
    white = np.asarray(mask()) > 0 if what == "mask" else np.ones((32, 32), bool)
    assert psnr(drawn[:, white], expected[:, white]) > 60


BESIDE = {
    "StableDiffusionControlNetPipeline": "StableDiffusionPipeline",
    "StableDiffusionControlNetImg2ImgPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline": "StableDiffusionInpaintPipeline",
    "StableDiffusionXLControlNetPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline": REFINER,
    "StableDiffusionXLControlNetInpaintPipeline": "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetUnionPipeline": "StableDiffusionXLPipeline",
}


@pytest.mark.parametrize("kind", BESIDE)
def test_a_class_with_a_controlnet_is_the_models_own(
    folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    source = folder("sdxl" if "XL" in kind else "sd1")
    found = rewritten(source, tmp_path / "x", _class_name=kind, controlnet=["diffusers", "ControlNetModel"])
    system = System.load(found)
    assert system.pipeline == BESIDE[kind]
    assert system.notes == ["not used: the folder's ControlNet, which is loaded by itself"]


@pytest.mark.parametrize("seeds", [[7], [7, 8]])
def test_a_model_with_controlnets_beside_it(
    folder: Callable[[str], Path], tmp_path: Path, seeds: list[int]
) -> None:
    """As diffusers saves it. The ControlNet is loaded by itself; what is saved is the model without it."""
    import diffusers

    networks = [tiny_controlnet("sdxl", seed) for seed in seeds]
    kind = "StableDiffusionXLControlNetImg2ImgPipeline"
    controlnet = networks if len(networks) > 1 else networks[0]
    found = saved_as(kind, folder("sdxl"), tmp_path / "theirs", controlnet=controlnet)
    system = System.load(found)
    assert system.fingerprint == System.load(folder("sdxl")).fingerprint
    ours: dict[str, Tensor] = load_controlnet(found).state_dict()
    assert all(torch.equal(ours[name], each) for name, each in networks[0].state_dict().items())
    system.save(tmp_path / "ours")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", local_files_only=True)
    assert type(again).__name__ == REFINER

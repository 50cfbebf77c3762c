"""Folders of older versions and of people: what diffusers mends is mended, to the same picture, and told."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from tiny import Family, tiny_pipeline_folder

from ldm.checkpoints.files import read_tensors, write_tensors
from ldm.checkpoints.folder import component_file, read_folder
from ldm.errors import UserError
from ldm.system import System
from pipelines import TextToImagePipeline

diffusers.utils.logging.disable_progress_bar()


@pytest.fixture
def sd1(tmp_path: Path) -> Path:
    return tiny_pipeline_folder(tmp_path, "sd1")


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drawn(folder: Path, **load: str) -> torch.Tensor:
    pipe = TextToImagePipeline.from_pretrained(folder, device="cpu", **load)
    settings = {"seed": 3, "num_inference_steps": 4, "guidance_scale": 4.0, "progress": False}
    return pipe("a cat", output_type="latent", **settings).images


def theirs(folder: Path, **load: object) -> torch.Tensor:
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), **load)
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator("cpu").manual_seed(3)
    return pipe(
        "a cat", generator=rng, num_inference_steps=4, guidance_scale=4.0, output_type="latent"
    ).images


def same_picture(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Four steps of two float32 programs; another scheduler, size or precision is 1e-2 off and more."""
    return bool((one - other).norm() < 1e-3 * other.norm())


@pytest.mark.parametrize(
    ("version", "side", "wanted"),
    [("0.6.0", 32, 64), ("0.8.1", 16, 64), ("0.8.0.dev0", 48, 64), ("0.9.0", 32, 32), ("0.6.0", 96, 96)],
)
def test_the_sample_size_of_old_folders(sd1: Path, version: str, side: int, wanted: int) -> None:
    edit(sd1 / "unet/config.json", sample_size=side, _diffusers_version=version)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(str(sd1)).unet.config.sample_size
    system = System.load(sd1)
    assert system.network.config.sample_size == reference == wanted
    assert ("sample_size is taken to be 64" in " ".join(system.notes)) == (side != wanted)


def test_xl_keeps_its_sample_size(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder(tmp_path, "sdxl")
    edit(folder / "unet/config.json", sample_size=32, _diffusers_version="0.6.0")
    assert System.load(folder).network.config.sample_size == 32


@pytest.mark.parametrize("class_name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_the_scheduler_is_that_of_the_index(sd1: Path, class_name: str) -> None:
    edit(sd1 / "scheduler/scheduler_config.json", _class_name="PNDMScheduler", skip_prk_steps=True)
    edit(sd1 / "model_index.json", scheduler=["diffusers", class_name])
    assert System.load(sd1).scheduler.class_name == class_name
    assert any(class_name in note and "PNDMScheduler" in note for note in System.load(sd1).notes)
    assert same_picture(drawn(sd1), theirs(sd1))


def test_the_text_encoder_is_that_of_the_index(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder(tmp_path, "sdxl")
    edit(folder / "text_encoder_2/config.json", architectures=["CLIPTextModel"])
    assert any(
        "text_encoder_2 is a CLIPTextModelWithProjection" in note for note in System.load(folder).notes
    )
    assert same_picture(drawn(folder), theirs(folder))


@pytest.mark.parametrize("stated", [False, None])
def test_inpainting_takes_no_runge_kutta(tmp_path: Path, stated: bool | None) -> None:
    folder = tiny_pipeline_folder(tmp_path, "inpaint", {"_class_name": "PNDMScheduler"})
    path = folder / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text()) | {"skip_prk_steps": stated}
    if stated is None:
        del config["skip_prk_steps"]
    path.write_text(json.dumps(config))
    reference = diffusers.StableDiffusionInpaintPipeline.from_pretrained(str(folder)).scheduler
    assert System.load(folder).scheduler.get("skip_prk_steps") is reference.config.skip_prk_steps is True


def halve(folder: Path, *components: str) -> None:
    """Leave these components' weights as variant fp16 only."""
    for component in components:
        file = component_file(folder, component)
        tensors = {name: each.half() for name, each in read_tensors(file).items()}
        write_tensors(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")), tensors)
        file.unlink()


@pytest.mark.parametrize("components", [("unet",), ("vae",), ("unet", "text_encoder")])
def test_parts_without_the_variant_are_read_without_it(sd1: Path, components: tuple[str, ...]) -> None:
    halve(sd1, *components)
    note = next(each for each in read_folder(sd1, "fp16").notes if "variant" in each)
    assert all((part in note) == (part not in components) for part in ("unet", "vae", "text_encoder"))
    assert same_picture(drawn(sd1, variant="fp16"), theirs(sd1, variant="fp16", torch_dtype=torch.float32))
    with pytest.raises(UserError, match=r": give variant='fp16' \(--variant fp16\)$"):
        read_folder(sd1)


def test_a_variant_that_no_part_has_is_an_error(sd1: Path) -> None:
    with pytest.raises(UserError, match="no weights of variant 'fp16' in any part"):
        read_folder(sd1, "fp16")


def test_what_the_hub_has_no_variant_of_is_fetched_without(sd1: Path, monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    from ldm.checkpoints import hub

    halve(sd1, "unet")
    hidden = {part: component_file(sd1, part) for part in ("vae", "text_encoder")}
    for file in hidden.values():
        file.rename(file.with_suffix(".away"))
    asked: list[list[str]] = []

    def download(name: str, local_files_only: bool = False, **patterns: list[str]) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        asked.append(patterns["allow_patterns"])
        if len(asked) == 2:
            for file in hidden.values():
                file.with_suffix(".away").rename(file)
        return str(sd1)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("some-org/model", variant="fp16") == sd1
    assert sorted(asked[1]) == ["text_encoder/*.safetensors", "vae/*.safetensors"]


# Precision


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("held", [torch.float16, torch.float32])
@pytest.mark.parametrize("single", [False, True])
def test_what_is_saved_has_the_precision_of_its_file(
    tmp_path: Path, family: Family, held: torch.dtype, single: bool
) -> None:
    """SDXL's autoencoder is held in float32 beside a float16 U-Net: it overflows there."""
    folder = tiny_pipeline_folder(tmp_path, family)
    diffusers.DiffusionPipeline.from_pretrained(str(folder)).to(torch.float16).save_pretrained(str(folder))
    pipe = TextToImagePipeline.from_pretrained(folder, device="cpu", torch_dtype=held)
    if family == "sdxl" or held == torch.float32:
        assert pipe.system.autoencoder.decoder.conv_in.weight.dtype == torch.float32
    if single:
        pipe.save_single_file(tmp_path / "one.safetensors")
        saved = {"all": read_tensors(tmp_path / "one.safetensors")}
    else:
        pipe.save_pretrained(tmp_path / "again")
        saved = read_folder(tmp_path / "again").tensors
        before = read_folder(folder).tensors
        for part, tensors in saved.items():
            assert all(torch.equal(each, before[part][name]) for name, each in tensors.items())
    assert {each.dtype for own in saved.values() for each in own.values()} == {torch.float16}


def test_what_a_smaller_precision_would_lose_is_kept(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder(tmp_path, "sd1")
    diffusers.DiffusionPipeline.from_pretrained(str(folder)).to(torch.float16).save_pretrained(str(folder))
    system = System.load(folder)
    weight = system.network.conv_in.weight
    weight.data = weight + 1e-5
    system.save(tmp_path / "changed")
    saved = read_folder(tmp_path / "changed").tensors
    assert torch.equal(saved["unet"]["conv_in.weight"], weight)
    assert {each.dtype for each in saved["vae"].values()} == {torch.float16}
    System.load(tmp_path / "sd1", torch_dtype=torch.bfloat16).save(tmp_path / "bf16")
    assert read_folder(tmp_path / "bf16").tensors["unet"]["conv_in.weight"].dtype == torch.bfloat16

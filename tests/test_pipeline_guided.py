"""The pipeline with ControlNets, image prompts, weighed words, a second pass and upscaling: calls, recipes, files."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from controls import control_picture, saved_controlnet
from ip_adapters import saved_adapter
from PIL import Image
from random_lora import CASES, made
from tiny import tiny_pipeline_folder

from ldm.checkpoints.lora import write_lora
from ldm.errors import UserError
from ldm.preprocess import canny
from ldm.sampling import decode, encode
from pipelines import TextToImagePipeline, Upscaler
from pipelines.cli import main
from pipelines.infotext import read_infotext
from pipelines.recipe import Recipe, read_recipe

SETTINGS: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 5.0, "output_type": "np"}
QUIET: dict[str, Any] = {**SETTINGS, "progress": False}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A pipeline's folder by its family, of ControlNets and the like by theirs and a number; each made once."""

    @cache
    def build(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        family, _, kind = name.partition("-")
        if not kind:
            return tiny_pipeline_folder(folder, family)
        if kind.startswith("control"):
            return saved_controlnet(folder / kind, family, int(kind[-1]))
        if kind.startswith("lora"):
            own = TextToImagePipeline.from_pretrained(build(family), device="cpu")
            write_lora(folder / f"{kind}.safetensors", made(own, CASES[family]))
            return folder / f"{kind}.safetensors"
        return saved_adapter(folder, kind, family, 0)

    return build


@pytest.fixture
def pipe(folders: Callable[[str], Path]) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(folders("sd1"), device="cpu")


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(-10 * np.log10(max(np.square(ours - theirs).mean(), 1e-20)))


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(each) for each in seeds]


def mask() -> Image.Image:
    drawn = Image.new("L", (32, 32), 0)
    drawn.paste(255, (8, 4, 24, 20))
    return drawn


@pytest.mark.parametrize(
    ("family", "mode", "nets"),
    [("sd1", "image", 2), ("sd1", "mask", 1), ("sdxl", "image", 1)],
)
def test_controlnets_are_diffusers(folders: Callable[[str], Path], family: str, mode: str, nets: int) -> None:
    """One and two networks, with scales and windows of their own, beside a picture to draw from and a mask.

    Text alone, guess mode and pooled networks are compared in test_controlnet.py, below the pipeline.
    """
    import diffusers

    middle = {"image": "Img2Img", "mask": "Inpaint"}[mode]
    name = f"StableDiffusion{'XL' if family == 'sdxl' else ''}ControlNet{middle}Pipeline"
    paths = [folders(f"{family}-control{k}") for k in range(nets)]
    networks = [diffusers.ControlNetModel.from_pretrained(path) for path in paths]
    reference = getattr(diffusers, name).from_pretrained(
        folders(family), controlnet=networks if nets > 1 else networks[0], local_files_only=True
    )
    reference.set_progress_bar_config(disable=True)
    ours = TextToImagePipeline.from_pretrained(folders(family), device="cpu")
    for k, path in enumerate(paths):
        ours.load_controlnet(path, f"net{k}")
    shown = [control_picture(k) for k in range(nets)]
    control: dict[str, Any] = {
        "control_image": shown if nets > 1 else shown[0],
        "controlnet_conditioning_scale": [0.7, 1.2] if nets > 1 else 0.9,
        "control_guidance_end": [0.7, 1.0] if nets > 1 else 1.0,
    }
    starts, prompts = [control_picture(8), control_picture(9)], ["cat", "the dog"]
    masks = {"mask_image": mask()} if mode == "mask" else {}
    strength = 1.0 if mode == "mask" else 0.7
    size = {"height": 32, "width": 32} if mode == "mask" else {}
    theirs = [
        reference(
            prompt,
            image=start,
            strength=strength,
            generator=seeded(3 + k),
            **masks,
            **size,
            **control,
            **SETTINGS,
        ).images[0]
        for k, (prompt, start) in enumerate(zip(prompts, starts, strict=True))
    ]
    shared: dict[str, Any] = {"image": starts, "strength": strength, "seed": 3, **masks, **QUIET}
    drawn, plain = ours(prompts, **shared, **control).images, ours(prompts, **shared).images
    where = np.asarray(mask()) > 0 if mode == "mask" else np.ones((32, 32), bool)
    for found, expected, without in zip(drawn, theirs, plain, strict=True):
        assert np.abs(without - found).max() > 0.01
        assert psnr(found[where], expected[where]) > 60


def test_image_prompts_are_diffusers(folders: Callable[[str], Path], pipe: TextToImagePipeline) -> None:
    import diffusers

    file = folders("sd1-plus")
    reference = diffusers.DiffusionPipeline.from_pretrained(folders("sd1"), local_files_only=True)
    reference.set_progress_bar_config(disable=True)
    reference.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name)
    reference.set_ip_adapter_scale(0.6)
    pipe.load_ip_adapter(file.parent, weight_name=file.name)
    pipe.set_ip_adapter_scale(0.6)
    pictures = [control_picture(1, (40, 56)), control_picture(2, (70, 48))]
    before = pipe("cat", seed=3, **QUIET).images
    for given in (pictures[:1], [pictures]):
        theirs = reference("cat", ip_adapter_image=given, generator=seeded(3), **SETTINGS).images
        drawn = pipe("cat", ip_adapter_image=given, seed=3, **QUIET)
        assert drawn.recipes[0].image_prompts[0].scale == 0.6
        assert psnr(drawn.images, theirs) > 60
        assert np.abs(drawn.images - before).max() > 0.01
    pipe.unload_ip_adapter()
    assert np.array_equal(pipe("cat", seed=3, **QUIET).images, before)


def loaded(folders: Callable[[str], Path], pipe: TextToImagePipeline) -> TextToImagePipeline:
    pipe.load_controlnet(folders("sd1-control1"), "edges")
    pipe.load_ip_adapter(folders("sd1-base"))
    pipe.load_lora_weights(folders("sd1-lora1"), adapter_name="ink")
    pipe.set_adapters("ink", 0.0)
    return pipe


MODES: dict[str, dict[str, Any]] = {
    "control": {"control_image": [control_picture(k) for k in range(3)]},
    "edges": {"control_image": control_picture(4), "control_preprocessor": "canny"},
    "image prompt": {"ip_adapter_image": control_picture(5), "ip_adapter_scale": 0.7},
    "weights": {
        "prompt_syntax": "a1111",
        "prompt": ["(cat:1.4) dog", "a [cat:dog:0.5]", "(cat) <lora:ink:0.8>"],
    },
    "comfyui": {"prompt_syntax": "comfyui", "prompt": ["(cat:1.4) dog", "(the dog)", "cat"]},
    "second pass": {"hires_scale": 1.5},
    "second pass by a network": {"hires_scale": 2, "hires_upscaler": "bundled", "upscale": 1.5},
    "all": {
        "control_image": control_picture(4),
        "ip_adapter_image": control_picture(5),
        "prompt_syntax": "a1111",
        "prompt": ["(cat:1.4) <lora:ink:0.8>", "a [cat:dog:0.5]", "dog"],
        "hires_scale": 1.5,
        "image": [control_picture(k, (32, 32)) for k in (6, 7, 8)],
        "strength": 0.8,
    },
}


@pytest.mark.parametrize("mode", MODES)
def test_an_image_is_its_own(folders: Callable[[str], Path], pipe: TextToImagePipeline, mode: str) -> None:
    """At any place of a batch as alone, and again from its recipe with what no file holds."""
    loaded(folders, pipe)
    given = {"prompt": ["cat", "the dog", "a"], **MODES[mode]}
    if mode in ("edges",):
        pytest.importorskip("cv2")
    together = pipe(seed=[5, 6, 7], **given, **QUIET)
    assert len({each.tobytes() for each in together.images}) == 3
    for k in range(3):
        own = {name: value[k] if isinstance(value, list) else value for name, value in given.items()}
        alone = pipe(seed=5 + k, **own, **QUIET)
        assert np.abs(alone.images[0] - together.images[k]).max() < 1 / 255
        assert alone.recipes[0] == together.recipes[k]
    assert pipe.adapters.weights() == {"ink": 0.0}


def test_what_is_asked_for_is_done(folders: Callable[[str], Path], pipe: TextToImagePipeline) -> None:
    """Edges are those of the picture at the size that is drawn; weights and changes of words change the picture."""
    pytest.importorskip("cv2")
    loaded(folders, pipe)
    picture, seed = control_picture(4, (32, 32)), {"seed": 5, **QUIET}
    found = pipe("cat", control_image=picture, control_preprocessor="canny", **seed).images
    edges = Image.fromarray(canny(np.asarray(picture)))
    assert np.array_equal(found, pipe("cat", control_image=edges, **seed).images)
    assert not np.array_equal(found, pipe("cat", control_image=picture, **seed).images)
    plain, other = pipe("cat", **seed).images, pipe("dog", **seed).images

    def a1111(prompt: str) -> np.ndarray:
        return pipe(prompt, prompt_syntax="a1111", **seed).images

    assert np.array_equal(a1111("(cat:1.0)"), plain)
    assert np.abs(a1111("(cat:1.6) dog") - a1111("cat dog")).max() > 1e-3
    between = a1111("[cat:dog:0.5]")
    assert min(np.abs(between - each).max() for each in (plain, other)) > 1e-3
    assert np.array_equal(a1111("[cat:dog:6]"), plain)


def test_an_inpainting_model_has_no_second_pass(folders: Callable[[str], Path]) -> None:
    ours = TextToImagePipeline.from_pretrained(folders("inpaint"), device="cpu")
    seen: list[int] = []
    with pytest.raises(UserError, match="inpainting model"):
        ours("cat", hires_scale=2, callback_on_step_end=lambda *step: seen.append(1), **QUIET)
    assert not seen


def test_a_prompt_that_is_too_long_is_not_parsed(pipe: TextToImagePipeline) -> None:
    """Whatever would take minutes to parse: a stranger's recipe may hold it."""
    with pytest.raises(UserError, match="600,000 characters"):
        pipe.load_for([Recipe("[a|b]" * 120_000, prompt_syntax="a1111")])


def test_a_lora_in_the_prompt_is_that_weight(
    folders: Callable[[str], Path], pipe: TextToImagePipeline
) -> None:
    pipe.load_lora_weights(folders("sd1-lora1"), adapter_name="ink")
    pipe.set_adapters("ink", 0.3)
    asked = pipe("cat <lora:ink:0.8>", prompt_syntax="a1111", seed=1, **QUIET)
    assert [(each.name, each.weight) for each in asked.recipes[0].loras] == [("ink", 0.8)]
    assert pipe.adapters.weights() == {"ink": 0.3}
    pipe.set_adapters("ink", 0.8)
    assert np.array_equal(asked.images, pipe("cat", seed=1, **QUIET).images)
    with pytest.raises(UserError, match="no LoRA is named 'in'"):
        pipe("cat <lora:in:0.8>", prompt_syntax="a1111", seed=1, **QUIET)


def test_the_second_pass_by_hand(pipe: TextToImagePipeline) -> None:
    """Latents stretched and drawn from by their strength; or decoded, enlarged by the network, and encoded."""
    system = pipe.system
    first = torch.as_tensor(pipe("cat", seed=2, **{**QUIET, "output_type": "latent"}).images)
    shape = [side * 3 // 2 for side in first.shape[-2:]]
    again = {"seed": 2, "strength": 0.55, **QUIET, "num_inference_steps": 9}
    by_hand = pipe("cat", image=list(F.interpolate(first, shape, mode="bilinear")), **again)
    settings = {"hires_scale": 1.5, "hires_strength": 0.55, "hires_steps": 9}
    found = pipe("cat", seed=2, **settings, **QUIET)
    assert np.array_equal(found.images, by_hand.images)
    with torch.no_grad():
        grown = Upscaler.from_pretrained()(decode(system.autoencoder, first))
        size = [side * 3 // 2 * system.autoencoder.config.factor for side in first.shape[-2:]]
        pixels = F.interpolate(grown, size, mode="bicubic", antialias=True).clamp(0, 1)
        begin = encode(system.autoencoder, pixels)
    by_hand = pipe("cat", image=list(begin), **again)
    found = pipe("cat", seed=2, hires_upscaler="bundled", **settings, **QUIET)
    assert np.array_equal(found.images, by_hand.images)


def test_upscaling_is_the_upscaler(pipe: TextToImagePipeline) -> None:
    plain = pipe(["cat", "dog"], seed=2, **{**QUIET, "output_type": "pt"}).images
    drawn = pipe(["cat", "dog"], seed=2, upscale=2, **{**QUIET, "output_type": "pt"})
    assert drawn.images.shape == (2, 3, 64, 64)
    assert torch.equal(drawn.images, Upscaler.from_pretrained()(plain, 2))
    assert (drawn.recipes[0].height, drawn.recipes[0].upscale) == (32, 2.0)


def test_a_callback_sees_both_passes(pipe: TextToImagePipeline) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []

    def watch(_: Any, index: int, timestep: int, state: dict[str, Any]) -> object:
        seen.append((index, tuple(state["latents"].shape)))
        return len(seen) < 9

    drawn = pipe("cat", seed=1, hires_scale=2, hires_strength=0.5, callback_on_step_end=watch, **QUIET).images
    assert [index for index, _ in seen] == list(range(9))
    assert {shape[-1] for _, shape in seen[:6]} != {shape[-1] for _, shape in seen[6:]}
    assert drawn.shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"control_image": control_picture(), "control_guidance_start": 0.8, "control_guidance_end": 0.2},
            "0.8 to 0.2",
        ),
        (
            {"control_image": control_picture(), "controlnet_conditioning_scale": [1.0, 2.0]},
            "2 numbers for 1",
        ),
        ({"control_image": {"edge": control_picture()}}, "no ControlNet is named 'edge'"),
        ({"control_image": "none.png"}, "none.png: no such file"),
        ({"control_image": control_picture(), "control_preprocessor": "cany"}, "did you mean canny"),
        ({"control_guidance_end": 0.5}, "goes with control_image"),
        ({"guess_mode": True}, "goes with control_image"),
        ({"ip_adapter_image": []}, "is empty"),
        ({"ip_adapter_image": control_picture(), "ip_adapter_scale": float("nan")}, "scale"),
        ({"ip_adapter_scale": 0.5}, "goes with ip_adapter_image"),
        ({"prompt_syntax": "a1112"}, "prompt_syntax"),
        ({"emphasis": "no_norm"}, 'prompt_syntax "a1111"'),
        ({"prompt": "(cat:9999)", "prompt_syntax": "a1111"}, "9999"),
        ({"hires_steps": 3}, "goes with hires_scale"),
        ({"hires_scale": 0.5}, "hires_scale is 0.5"),
        ({"hires_scale": 2, "hires_strength": 0.01}, "strength 0.01 leaves none"),
        ({"hires_scale": 2, "hires_upscaler": "none.pth"}, "none.pth"),
        ({"upscaler": "bundled"}, "goes with upscale"),
        ({"image": torch.zeros(4, 16, 16), "resize_mode": "crop"}, "image is latents"),
        ({"image": torch.zeros(3, 16, 16, device="meta")}, "device meta"),
        ({"aesthetic_score": 5.0}, "for SDXL's refiner"),
        ({"upscale": 0}, "upscale is 0"),
        ({"upscale": 2, "upscaler": __file__}, "test_pipeline_guided.py"),
        ({"upscale": 2, "output_type": "latent"}, "leave one out"),
        ({"hires_scale": 2, "image": control_picture(), "mask_image": mask()}, "leave out masks"),
    ],
)
def test_what_can_not_be_costs_a_line(
    folders: Callable[[str], Path], pipe: TextToImagePipeline, given: dict[str, Any], words: str
) -> None:
    loaded(folders, pipe)
    with pytest.raises(UserError) as caught:
        pipe(**{"prompt": "cat", **QUIET, **given})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_loaded_costs_a_line(folders: Callable[[str], Path], pipe: TextToImagePipeline) -> None:
    with pytest.raises(UserError, match="load one first, with load_controlnet"):
        pipe("cat", control_image=control_picture(), **QUIET)
    with pytest.raises(UserError, match="load one first, with load_ip_adapter"):
        pipe("cat", ip_adapter_image=control_picture(), **QUIET)
    with pytest.raises(UserError, match="another family"):
        pipe.load_controlnet(folders("sdxl-control1"))
    pipe.load_controlnet(folders("sd1-control1"), "a")
    with pytest.raises(UserError, match="the name of another ControlNet"):
        pipe.load_controlnet(folders("sd1-control1"), "a")
    pipe.load_controlnet(folders("sd1-control2"), "b")
    with pytest.raises(UserError, match=r"2 ControlNets are loaded \(a, b\)"):
        pipe("cat", control_image=control_picture(), **QUIET)
    recipe = pipe("cat", seed=1, control_image={"b": control_picture()}, **QUIET).recipes[0]
    pipe.controlnets.unload(["b"])
    with pytest.raises(UserError, match="beside its recipe"):
        pipe.draw([recipe])


# The command line


def drawn(out: Path, *arguments: Any) -> np.ndarray:
    assert main([*map(str, arguments), "--out", str(out), "--quiet", "--device", "cpu"]) == 0
    return np.asarray(Image.open(out))


def test_everything_on_the_command_line_and_again(
    folders: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in range(2):
        control_picture(k).save(tmp_path / f"{k}.png")
    loras = tmp_path / "loras" / "more"
    loras.mkdir(parents=True)
    (loras / "ink.safetensors").write_bytes(folders("sd1-lora1").read_bytes())
    network, adapter = folders("sd1-control1"), folders("sd1-base")
    said = ["a (cat:1.3) <lora:ink:0.8>", "--model", folders("sd1"), "--steps", 4, "--seed", 7]
    said += ["--prompt-syntax", "a1111", "--lora-folder", tmp_path / "loras"]
    said += ["--control", f"{tmp_path / '0.png'}:{network}:0.8", "--control-end", 0.8]
    said += ["--ip-adapter", f"{adapter}:0.5", "--ip-image", tmp_path / "1.png"]
    said += ["--hires-scale", 1.5, "--upscale", 2, "--infotext"]
    first = drawn(tmp_path / "first.png", *said)
    assert first.shape == (96, 96, 3)
    recipe = read_recipe(tmp_path / "first.png")
    (control,), (prompt,), (lora,) = recipe.controls, recipe.image_prompts, recipe.loras
    assert (control.scale, control.end, control.path) == (0.8, 0.8, str(network))
    assert (prompt.scale, prompt.images[0].path) == (0.5, str(tmp_path / "1.png"))
    assert (lora.name, lora.weight, recipe.beside) == ("ink", 0.8, ())
    pipe = TextToImagePipeline.from_pretrained(folders("sd1"), device="cpu")
    pipe.load_controlnet(network)
    pipe.load_ip_adapter(adapter)
    pipe.load_lora_weights(loras / "ink.safetensors")
    python = pipe.draw([recipe]).images[0]
    assert np.array_equal(np.asarray(python), first)
    capsys.readouterr()
    again = ["--from-image", tmp_path / "first.png"]
    assert main([*map(str, again), "--out", str(tmp_path / "no.png"), "--quiet"]) == 2
    assert "--control" in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert np.array_equal(drawn(tmp_path / "again.png", *again, "--trust"), first)
    text = read_infotext(tmp_path / "first.png")
    assert text.settings["prompt"] == "a (cat:1.3)" and text.beyond["hr_scale"] == 1.5


def test_rows_say_it_likewise(folders: Callable[[str], Path], tmp_path: Path) -> None:
    control_picture(0).save(tmp_path / "0.png")
    network = folders("sd1-control1")
    rows = [
        {"prompt": "cat", "controls": [f"0.png:{network}:0.8"]},
        {"prompt": "cat", "controls": [{"path": str(network), "image": "0.png", "scale": 0.8}]},
        {"prompt": "(cat:1.3)", "prompt_syntax": "a1111", "upscale": 2, "hires_upscaler": "latent"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    shared = ["--model", folders("sd1"), "--steps", "3", "--seed", "7", "--quiet", "--device", "cpu"]
    assert main([*map(str, shared), "--file", str(file), "--out", str(out)]) == 0
    first, second, third = (np.asarray(Image.open(path)) for path in sorted(out.glob("*.png")))
    assert np.array_equal(first, second) and third.shape == (64, 64, 3)
    pipe = TextToImagePipeline.from_pretrained(folders("sd1"), device="cpu")
    pipe.load_controlnet(network)
    how: dict[str, Any] = {"control_image": str(tmp_path / "0.png"), "controlnet_conditioning_scale": 0.8}
    own = pipe("cat", seed=7, num_inference_steps=3, progress=False, **how).images[0]
    assert np.array_equal(np.asarray(own), first)


def test_pictures_of_other_programs(
    folders: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL.PngImagePlugin import PngInfo

    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "ink.safetensors").write_bytes(folders("sd1-lora1").read_bytes())
    (tmp_path / "loras" / "never.safetensors").write_bytes(b"no LoRA")
    info = PngInfo()
    info.add_text(
        "parameters",
        "a (cat:1.2) <lora:ink:0.7> <lora:gone:1>\nNegative prompt: dog\nSteps: 4, Sampler: Euler a, CFG scale: 6, "
        "Seed: 9, Size: 32x32, Model: other, Denoising strength: 0.6, Hires upscale: 1.5, Hires upscaler: Latent",
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs.png", pnginfo=info)
    said = ["--from-image", tmp_path / "theirs.png", "--model", folders("sd1")]
    found = drawn(tmp_path / "ours.png", *said, "--lora-folder", tmp_path / "loras")
    assert found.shape == (48, 48, 3)
    error = capsys.readouterr().err
    assert (
        "AUTOMATIC1111" in error and "the LoRA gone is in none of these folders" in error and "other" in error
    )
    recipe = read_recipe(tmp_path / "ours.png")
    assert recipe.sampler == "euler_ancestral" and recipe.prompt_syntax == "a1111"
    assert [(each.name, each.weight) for each in recipe.loras] == [("ink", 0.7)]
    assert (recipe.hires_scale, recipe.hires_strength, recipe.negative_prompt) == (1.5, 0.6, "dog")


def test_a_recipe_of_before_is_read() -> None:
    """As 0.1.0 wrote them: nothing of what came later stands in them."""
    known = {"prompt": "cat", "loras": [{"path": "a.safetensors", "weight": 0.5, "hash": "0123456789"}]}
    recipe = Recipe.parse(known, "a picture")
    assert recipe.loras[0].name is None and recipe.prompt_syntax == "plain" and recipe.controls == ()

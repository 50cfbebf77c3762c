"""The whole pipeline: the same picture as diffusers from one saved folder, seeds, callbacks, bad input."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SCHEDULER, tiny_pipeline_folder

from ldm.checkpoints.files import read_tensors, write_tensors
from ldm.errors import UserError
from ldm.models.unet import UNet
from ldm.system import System
from pipelines import TextToImagePipeline
from pipelines.placement import LowMemory
from pipelines.recipe import Recipe, read_recipe, recipes_for

V_ZERO_SNR = {
    **SCHEDULER,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
CASES = [
    ("sd1", SCHEDULER),
    ("sd1", V_ZERO_SNR),
    ("sd2", {**SCHEDULER, "prediction_type": "v_prediction"}),
    ("sdxl", SCHEDULER),
    ("bert", V_ZERO_SNR),
]
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
PROMPTS, NEGATIVES = ["a photo of the cat", "raccoon"], ["dog", "the dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @cache
    def build(family: str, scheduler: tuple[tuple[str, Any], ...]) -> Path:
        return tiny_pipeline_folder(tmp_path_factory.mktemp(family), family, dict(scheduler))  # type: ignore[arg-type]

    return lambda family, scheduler=SCHEDULER: build(family, tuple(scheduler.items()))


@pytest.fixture(scope="module")
def pipe(folder: Callable[..., Path]) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu")


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(-10 * np.log10(max(np.square(ours - theirs).mean(), 1e-20)))


@pytest.mark.parametrize("case", range(len(CASES)), ids=["sd1", "sd1-v-zsnr", "sd2-v", "sdxl", "bert-v-zsnr"])
def test_the_picture_is_diffusers_picture(folder: Callable[..., Path], case: int) -> None:
    import diffusers

    path = folder(*CASES[case])
    ours = TextToImagePipeline.from_pretrained(path, device="cpu")
    theirs = diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    own = theirs.scheduler.config
    for sampler, scheduler in SCHEDULERS.items():
        theirs.scheduler = getattr(diffusers, scheduler).from_config(own)
        settings: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 5.0, "output_type": "np"}
        expected = theirs(
            PROMPTS,
            negative_prompt=NEGATIVES,
            generator=[torch.Generator().manual_seed(s) for s in (3, 4)],
            **settings,
        ).images
        drawn = ours(PROMPTS, negative_prompt=NEGATIVES, seed=3, sampler=sampler, **settings).images
        assert drawn.std() > 0.02  # a flat picture would agree with any other flat picture
        assert psnr(drawn, expected) > 60, sampler


def test_defaults_of_diffusers_without_negative_prompt(folder: Callable[..., Path]) -> None:
    """No sampler named, no negative prompt (zeros for SDXL), another size: still the same picture."""
    from diffusers import StableDiffusionXLPipeline

    path = folder("sdxl")
    settings: dict[str, Any] = {"num_inference_steps": 4, "height": 48, "width": 64, "output_type": "np"}
    theirs = StableDiffusionXLPipeline.from_pretrained(path, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs("cat", generator=torch.Generator().manual_seed(0), **settings).images
    ours = TextToImagePipeline.from_pretrained(path, device="cpu")("cat", seed=0, **settings).images
    assert psnr(ours, expected) > 60


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m_sde"])
def test_an_image_depends_on_its_own_seed_only(pipe: TextToImagePipeline, sampler: str) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 6, "sampler": sampler, "output_type": "np"}
    batch = pipe(
        ["cat", "the dog"], num_images_per_prompt=4, seed=[9, 1, 7, 3, 5, 2, 8, 4], **settings
    ).images
    alone = pipe("the dog", seed=2, **settings).images[0]
    assert np.abs(batch[5] - alone).max() < 1 / 255
    assert np.abs(batch[4] - alone).max() > 1 / 255


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_neighbours_do_not_change_a_picture(folder: Callable[..., Path], family: str) -> None:
    """Beside a prompt of more windows, and beside a row with a negative prompt (SDXL's zeros are for none at all)."""
    pipe = TextToImagePipeline.from_pretrained(folder(family), device="cpu")
    rows = [
        Recipe("cat", None, 1),
        Recipe("cat " * 100, None, 2),
        Recipe("dog", "the cat", 3),
        Recipe("dog", None, 4),
    ]
    rows = [replace(row, num_inference_steps=3) for row in rows]
    together = pipe.draw(rows, "np").images
    for row, picture in zip(rows, together, strict=True):
        assert np.abs(pipe.draw([row], "np").images[0] - picture).max() < 1 / 255


def test_guidance_one_runs_no_unconditional_pass(pipe: TextToImagePipeline) -> None:
    rows: list[int] = []
    hook = pipe.system.network.register_forward_pre_hook(
        lambda module, arguments: rows.append(len(arguments[0]))
    )
    pipe("cat", num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    pipe("cat", num_inference_steps=2, guidance_scale=3.0, output_type="latent")
    hook.remove()
    assert rows == [1, 1, 2, 2]


def test_the_callback_sees_every_step_and_can_stop(pipe: TextToImagePipeline) -> None:
    seen: list[tuple[int, int]] = []

    def callback(owner: TextToImagePipeline, step: int, timestep: int, state: dict[str, Any]) -> bool:
        assert state["latents"].shape == state["denoised"].shape == (1, 4, 16, 16)
        assert state["preview"]()[0].size == (16, 16)
        seen.append((step, timestep))
        return step < 2

    pipe("cat", num_inference_steps=5, sampler="ddim", seed=0, callback_on_step_end=callback)
    assert seen == [(0, 801), (1, 601), (2, 401)]


def test_a_call_of_several_batches_is_counted_and_stopped_as_one(pipe: TextToImagePipeline) -> None:
    seen: list[tuple[int, list[int]]] = []

    def callback(owner: TextToImagePipeline, step: int, timestep: int, state: dict[str, Any]) -> bool:
        seen.append((step, state["images"]))
        return step != stop

    settings: dict[str, Any] = {"num_inference_steps": 2, "sampler": "ddim", "seed": 0, "output_type": "np"}
    prompts = ["cat", "cat " * 100, "dog"]
    stop = None
    whole = pipe(prompts, callback_on_step_end=callback, **settings)
    assert seen == [(0, [0, 2]), (1, [0, 2]), (2, [1]), (3, [1])]
    stop = 1
    ended = pipe(prompts, callback_on_step_end=callback, **settings)
    assert [recipe.prompt for recipe in ended.recipes] == ["cat", "dog"]
    # The folder's DDIM stops just above the last estimate.
    np.testing.assert_allclose(ended.images, whole.images[[0, 2]], atol=0.01)
    assert np.abs(ended.images[0] - ended.images[1]).max() > 0.02


def test_callbacks_cannot_change_or_reenter_the_call(pipe: TextToImagePipeline) -> None:
    def call(callback: Callable[..., Any]) -> None:
        pipe("cat", num_inference_steps=1, output_type="latent", callback_on_step_end=callback)

    call(lambda owner, step, timestep, state: state)  # as diffusers' callbacks return it
    with pytest.raises(UserError, match="returned other latents"):
        call(lambda owner, step, timestep, state: {"latents": state["latents"] * 0})
    with pytest.raises(UserError, match="can't use the pipeline that called it"):
        call(lambda owner, step, timestep, state: owner("dog", num_inference_steps=1))
    call(lambda owner, step, timestep, state: None)  # and it is free again


def test_numbers_of_numpy_are_numbers(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    output = pipe("cat", seed=np.array([3]), num_inference_steps=np.int64(1), guidance_scale=np.float32(2))
    assert read_recipe(output.save(tmp_path / "cat.png")[0]) == output.recipes[0]
    with pytest.raises(UserError, match='only output_type "pil"'):
        pipe("cat", num_inference_steps=1, output_type="np").save(tmp_path)


class Column:
    """As a table's column is: it has a shape and tolist, and no truth of its own."""

    def __init__(self, *cells: Any, wide: bool = False):
        self.cells, self.shape = list(cells), (len(cells), 1) if wide else (len(cells),)

    def tolist(self) -> list[Any]:
        return list(self.cells)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)

    def __bool__(self) -> bool:
        raise ValueError("the truth value of a column is ambiguous")


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        iter,
        np.array,
        lambda cells: np.array(cells, dtype=object),
        lambda cells: [np.array(cell) for cell in cells],
        lambda cells: Column(*cells),
    ],
)
def test_prompts_and_seeds_come_in_any_list(kind: Callable[[list[Any]], Any]) -> None:
    expected = recipes_for(["a", "b"], ["x", "y"], [3, 4], 1, {})
    made = recipes_for(kind(["a", "b"]), kind(["x", "y"]), kind([3, 4]), np.int64(1), {})
    assert made == expected
    assert {type(each) for recipe in made for each in (recipe.prompt, recipe.negative_prompt)} == {str}
    assert {type(recipe.seed) for recipe in made} == {int}


@pytest.mark.parametrize("one", [np.array, lambda value: value, lambda value: np.array(value, dtype=object)])
def test_a_single_value_of_an_array_is_one_for_all(one: Callable[[Any], Any]) -> None:
    made = recipes_for(one("a"), one("x"), one(3), torch.tensor(2), {})
    assert made == recipes_for("a", "x", 3, 2, {}) and [each.seed for each in made] == [3, 4]


def test_seeds_of_ranges_and_tensors() -> None:
    for seeds in (
        range(3, 5),
        torch.tensor([3, 4]),
        [torch.tensor(3), np.uint8(4)],
        np.array([3, 4], "uint64"),
    ):
        assert [each.seed for each in recipes_for(["a", "b"], None, seeds, 1, {})] == [3, 4]
    assert [each.seed for each in recipes_for(["a", "b"], None, torch.tensor(3), 1, {})] == [3, 4]


def test_none_among_negatives_is_no_negative() -> None:
    made = recipes_for(["a", "b"], ["x", None], 0, 1, {})
    assert [each.negative_prompt for each in made] == ["x", None]
    empty = recipes_for(["a", "b"], Column("x", float("nan")), None, 1, {})  # a table's empty cell
    assert [each.negative_prompt for each in empty] == ["x", None]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": Column("a", float("nan"))}, r"prompt\[1\] is nan \(float\), which is no text"),
        ({"prompt": np.array(["a", None])}, r"prompt\[1\] is None"),
        ({"prompt": ["a", ["b"]]}, r"prompt\[1\] is \['b'\] \(list\)"),
        ({"prompt": [b"a"]}, r"prompt\[0\] is b'a' \(bytes\), which is no text: decode it first"),
        ({"prompt": b"a"}, "decode it first"),
        ({"prompt": 3}, r"prompt is 3 \(int\)"),
        ({"prompt": {"a": 1}}, "prompt is a dict: give a list"),
        ({"prompt": {"a", "b"}}, "prompt is a set: give a list"),
        ({"prompt": np.array([["a"], ["b"]])}, "of 2 x 1: give one dimension"),
        ({"prompt": Column("a", wide=True)}, "Column of 1 x 1: give one dimension"),
        ({"prompt": np.array([])}, "there is no prompt"),
        ({"negative_prompt": Column("x", 1.5)}, r"negative_prompt\[1\] is 1.5"),
        ({"negative_prompt": itertools.repeat("x")}, "more than 2 negative prompts for 2 prompts"),
        ({"negative_prompt": np.array(["x"])}, "1 negative prompts for 2 prompts"),
        ({"seed": itertools.count(5)}, "more than 2 seeds for 2 images"),
        ({"seed": True}, "seed is True: give an int"),
        ({"seed": torch.tensor(True)}, "seed is True: give an int"),
        ({"seed": [1, np.False_]}, r"seed\[1\] is False"),
        ({"seed": 1.0}, r"seed is 1.0 \(float\), which is no whole number"),
        ({"seed": Column(1.0, 2.0)}, r"seed\[0\] is 1.0"),
        ({"seed": torch.tensor(1.0)}, "seed is 1.0"),
        ({"seed": [1, None]}, r"seed\[1\] is None"),
        ({"seed": "42"}, "seed is '42'"),
        ({"seed": {1, 2}}, "seed is a set: give a list"),
        ({"images_per_prompt": 2.0}, "num_images_per_prompt is 2.0"),
        ({"images_per_prompt": True}, "num_images_per_prompt is True"),
        ({"settings": {"height": np.array([64, 64])}}, r"'height' is \[64, 64\]"),
        ({"settings": {"guidance_interval": np.ones(3)}}, "'guidance_interval' is"),
        ({"settings": {"clip_skip": np.array([1, 2])}}, "'clip_skip' is"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(given: dict[str, Any], message: str) -> None:
    call = {"prompt": ["a", "b"], "negative_prompt": None, "seed": 0, "images_per_prompt": 1, "settings": {}}
    with pytest.raises(UserError, match=message) as caught:
        recipes_for(**{**call, **given})
    assert "\n" not in str(caught.value)


def test_settings_come_as_arrays_and_tensors() -> None:
    settings = {
        "height": np.int32(64),
        "width": torch.tensor(32),
        "num_inference_steps": np.array(3),
        "guidance_scale": torch.tensor(2),
        "guidance_interval": Column(np.float32(1), 2),
        "original_size": np.array([64, 32]),
        "sampler": np.str_("ddim"),
    }
    (made,) = recipes_for("a", None, 0, 1, settings)
    assert (made.height, made.width, made.num_inference_steps, made.guidance_scale) == (64, 32, 3, 2.0)
    assert (made.guidance_interval, made.original_size, made.sampler) == ((1.0, 2.0), (64, 32), "ddim")
    json.dumps(asdict(made))  # nothing of numpy is left


def test_a_call_takes_an_array(pipe: TextToImagePipeline) -> None:
    output = pipe(
        np.array(["cat", "dog"]), seed=np.array([1, 2]), clip_skip=np.int64(0), num_inference_steps=1
    )
    assert [(each.prompt, each.seed) for each in output.recipes] == [("cat", 1), ("dog", 2)]


def test_a_fingerprint_is_of_all_that_draws(folder: Callable[..., Path], tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        return TextToImagePipeline.from_pretrained(path, device="cpu").system.fingerprint

    first = fingerprint(folder("sd1"))
    for part in ("unet", "vae", "text_encoder"):
        other = shutil.copytree(folder("sd1"), tmp_path / part)
        file = next((other / part).glob("*.safetensors"))
        tensors = {
            name: tensor + 1 if tensor.is_floating_point() else tensor
            for name, tensor in read_tensors(file).items()
        }
        write_tensors(file, tensors)
        assert fingerprint(other) != first
    other = shutil.copytree(folder("sd1"), tmp_path / "scheduler")
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02}))
    assert fingerprint(other) != first


def test_it_moves_as_diffusers_pipelines_do(folder: Callable[..., Path]) -> None:
    pipe = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu")
    assert pipe.to(torch.bfloat16).dtype == torch.bfloat16
    assert pipe.to("cpu", torch.float64).dtype == torch.float64
    assert pipe.to(device="cpu", dtype=torch.float32).dtype == torch.float32
    with pytest.raises(UserError, match="the device 'gpu' can't be used"):
        pipe.to("gpu")
    with pytest.raises(UserError, match="torch_dtype is 'float16'"):
        TextToImagePipeline.from_pretrained(folder("sd1"), torch_dtype="float16")  # type: ignore[arg-type]


def test_the_preview_resembles_the_picture(pipe: TextToImagePipeline) -> None:
    """Colour fields that the fit has not seen come back; the tiny random autoencoder is linear enough."""
    autoencoder = pipe.system.autoencoder
    fields = torch.rand(4, 3, 1, 1).expand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = autoencoder.scale(autoencoder.encode(fields).mean)
    shown = np.stack([np.asarray(picture) / 255 for picture in pipe.preview(latents)]).mean((1, 2))
    true = (fields[:, :, 0, 0].numpy() + 1) / 2
    assert np.corrcoef(shown.ravel(), true.ravel())[0, 1] > 0.5


def test_long_prompts_are_noted(pipe: TextToImagePipeline) -> None:
    output = pipe("cat " * 100, num_inference_steps=1, output_type="latent")
    assert any("2 chunks of 75" in note for note in output.notes)


@pytest.mark.parametrize("how", [True, "sequential"])
def test_offloaded_parts_draw_the_same(
    folder: Callable[..., Path], pipe: TextToImagePipeline, how: LowMemory
) -> None:
    offloaded = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu", low_memory=how)
    hooked = [each for each in offloaded.system.network.modules() if each._forward_pre_hooks]
    assert bool(hooked) == (how == "sequential")
    order = (pipe, offloaded, offloaded, offloaded.to("cpu"))
    pictures = [p("cat", seed=0, num_inference_steps=2, output_type="np").images for p in order]
    # Layers with hooks don't pack their weights, and round otherwise.
    error = 0 if how is True else 1e-4
    for picture in pictures[1:3]:
        np.testing.assert_allclose(picture, pictures[0], atol=error, rtol=0)
    np.testing.assert_array_equal(pictures[3], pictures[0])
    assert not any(hasattr(module, "_hf_hook") for module in offloaded.system.modules().values())
    assert not any(each._forward_pre_hooks for each in offloaded.system.network.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("low_memory", [False, True, "sequential"])
def test_half_precision_on_cuda(folder: Callable[..., Path], low_memory: LowMemory) -> None:
    """Close to the CPU's picture, twice over, and with low memory nothing stays on the device."""
    settings: dict[str, Any] = {
        "seed": 0,
        "num_inference_steps": 4,
        "sampler": "euler_ancestral",
        "output_type": "np",
    }
    expected = TextToImagePipeline.from_pretrained(folder("sdxl"), device="cpu")("cat", **settings).images
    pipe = TextToImagePipeline.from_pretrained(
        folder("sdxl"), device="cuda", torch_dtype=torch.float16, low_memory=low_memory
    )
    for _ in range(2):
        assert psnr(pipe("cat", **settings).images, expected) > 30
    if low_memory:
        assert all(p.device.type == "cpu" for m in pipe.system.modules().values() for p in m.parameters())


def test_pictures_are_saved_with_their_recipes(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    output = pipe(["cat", "dog"], seed=[np.int64(5), 7], num_inference_steps=1)
    assert output.save(tmp_path / "many") == [
        tmp_path / "many" / "0000-cat.png",
        tmp_path / "many" / "0001-dog.png",
    ]
    assert read_recipe(tmp_path / "many" / "0001-dog.png") == output.recipes[1]
    with pytest.raises(UserError, match=r"one.png is one file for 2 pictures"):
        output.save(tmp_path / "one.png")


def test_models_that_are_for_something_else(folder: Callable[..., Path], tmp_path: Path) -> None:
    system = System.load(folder("sd1"))
    edits = UNet(replace(system.network.config, in_channels=8))  # as of InstructPix2Pix
    with pytest.raises(UserError, match="takes 8 channels where latents have 4"):
        TextToImagePipeline(replace(system, network=edits))
    shutil.copytree(folder("sd1"), tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "unet")
    shutil.copytree(folder("sdxl") / "unet", tmp_path / "mixed" / "unet")
    with pytest.raises(UserError, match="wants 64 features of the text, the text encoder gives 32"):
        TextToImagePipeline.from_pretrained(tmp_path / "mixed", device="cpu")


def test_an_inpainting_model_draws_what_diffusers_draws_into_a_picture_that_is_masked_whole(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    # diffusers draws the latents of the masked picture from the posterior, here they are its mean.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    theirs = diffusers.StableDiffusionInpaintPipeline.from_pretrained(
        folder("inpaint"), local_files_only=True
    )
    theirs.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"}
    expected = theirs(
        "the cat",
        image=torch.zeros(1, 3, 32, 32),
        mask_image=torch.ones(1, 1, 32, 32),
        generator=torch.Generator().manual_seed(3),
        height=32,
        width=32,
        **settings,
    ).images
    ours = TextToImagePipeline.from_pretrained(folder("inpaint"), device="cpu")
    assert psnr(ours("the cat", seed=3, **settings).images, expected) > 60


def test_a_prediction_type_named_overrides_the_folder(folder: Callable[..., Path]) -> None:
    pipe = TextToImagePipeline.from_pretrained(folder("sd1"), device="cpu", prediction_type="v_prediction")
    assert pipe.system.scheduler.get("prediction_type") == "v_prediction"
    assert (
        pipe("cat", num_inference_steps=1, output_type="latent").recipes[0].prediction_type == "v_prediction"
    )


def test_save_and_load_again(folder: Callable[..., Path], tmp_path: Path) -> None:
    for family in ("sd1", "sdxl", "bert"):
        first = TextToImagePipeline.from_pretrained(folder(family), device="cpu")
        first.save_pretrained(tmp_path / family)
        for part in ("unet", "vae", "text_encoder"):  # under the names that other programs look for
            published, ours = (_names(path / part) for path in (folder(family), tmp_path / family))
            assert {name.removeprefix("text_model.") for name in published} == {
                name.removeprefix("text_model.") if family != "bert" else name for name in ours
            }
        again = TextToImagePipeline.from_pretrained(tmp_path / family, device="cpu")
        assert again.system.fingerprint == first.system.fingerprint
        draw = {"seed": 1, "num_inference_steps": 2, "output_type": "np"}
        np.testing.assert_array_equal(first("cat", **draw).images, again("cat", **draw).images)


def _names(part: Path) -> set[str]:
    return set(read_tensors(next(part.glob("*.safetensors"))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "there is no prompt"),
        ({"height": 33}, "height 33 is not a multiple of 2 from 2 to 16384: use 32 or 34"),
        ({"sampler": "eular"}, "did you mean euler"),
        ({"schedule": "karas"}, "did you mean karras"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"output_type": "pill"}, "did you mean pil"),
        ({"seed": 2**70}, "does not fit in 64 bits"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"eta": 7.0}, "eta is 7.0"),
        ({"guidance_rescale": -1.0}, "guidance_rescale is -1.0"),
        ({"clip_skip": 9}, "clip_skip is 9"),
        ({"prompt": "\udce9t\udce9"}, "is not valid Unicode"),
        ({"prompt": None}, "there is no prompt"),
        ({"seed": "a"}, "give an int, or one an image"),
        ({"num_inference_steps": 2.5}, "'num_inference_steps' is 2.5"),
        ({"sampler": ""}, "sampler '' is unknown"),
        ({"sampler": "euler", "eta": 0.5}, "eta is ddim's alone: euler takes none"),
        ({"guidance_interval": (5.0, 1.0)}, "give the lower noise level first"),
        ({"original_size": (64, 64)}, "are for SDXL alone"),
    ],
)
def test_bad_arguments_say_what_to_do(
    pipe: TextToImagePipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipe(**{"prompt": "cat", **arguments})

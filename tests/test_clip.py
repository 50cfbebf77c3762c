"""CLIP: its loss, its guidance against closed forms, others' models through the adapter, and its training."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from killed import BATCHES, same_bits_after_kills
from PIL import Image
from training_runs import LOOP, write_config

from ldm.conditioning.clip import LatentCLIP, autoencoder_probe, text_probe
from ldm.conditioning.clip_models import PictureCLIP, load_clip
from ldm.conditioning.image_encoder import clip_pixels_of
from ldm.diffusion.classifier_guidance import by_score
from ldm.diffusion.clip_guidance import by_estimate
from ldm.diffusion.denoiser import answered, awaited
from ldm.diffusion.driver import sample
from ldm.diffusion.samplers import ddim
from ldm.errors import UserError
from ldm.models.clip import CLIP, CLIPConfig, cosines
from ldm.system import System
from ldm.training.contrastive import contrastive_loss, equal_captions, retrieved
from ldm.training.data.on_disk import PicturesConfig
from ldm.training.objectives.clip import Config, ModelConfig, Objective
from ldm.training.run import read_run, train
from pipelines import TextToImagePipeline
from pipelines.cli import main as draw

CONFIG = CLIPConfig(
    in_channels=4,
    sample_size=16,
    text_hidden_size=tiny.WIDTH,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    text_width=32,
    heads=2,
    projection_dim=24,
)
PROMPTS = ["a cat", "the dog, a photo"]

tiny.let_torchvision_import()

# The loss


def test_without_a_likeness_every_pair_is_as_likely() -> None:
    """-log 1/B where all captions differ; where k are equal, each picture has B - k + 1 candidates."""
    flat = torch.full((6, 6), 3.7)
    different = equal_captions(list("abcdef"))
    assert torch.equal(different, torch.eye(6, dtype=torch.bool))
    torch.testing.assert_close(contrastive_loss(flat, different), torch.full((6,), math.log(6)))
    some = contrastive_loss(flat, equal_captions(list("aaabcd")))
    expected = torch.tensor([math.log(4)] * 3 + [math.log(6)] * 3)
    torch.testing.assert_close(some, expected)
    assert contrastive_loss(flat, equal_captions(["a"] * 6)).abs().max() == 0


def test_the_loss_is_clips_own() -> None:
    """The one that transformers' CLIPModel is trained by, and what two pairs have in closed form."""
    from transformers import CLIPConfig as Theirs
    from transformers import CLIPModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = small | {"vocab_size": 50}, small | {"image_size": 16, "patch_size": 8}
    theirs = tiny.randomize(CLIPModel(Theirs(text_config=text, vision_config=vision, projection_dim=6)))
    ids, pixels = torch.randint(3, 49, (7, 5)), torch.randn(7, 3, 16, 16)
    with torch.no_grad():
        found = theirs(input_ids=ids, pixel_values=pixels, return_loss=True)
    same = torch.eye(7, dtype=torch.bool)
    own = contrastive_loss(found.logits_per_image, same).mean()
    torch.testing.assert_close(own, found.loss, rtol=1e-4, atol=1e-5)
    two = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    by_hand = [
        (F.softplus(torch.tensor(-1 - 2.0)) + F.softplus(torch.tensor(0.5 - 2.0))) / 2,
        (F.softplus(torch.tensor(0.5 - 3.0)) + F.softplus(torch.tensor(-1 - 3.0))) / 2,
    ]
    torch.testing.assert_close(contrastive_loss(two, same[:2, :2]), torch.stack(by_hand))


def test_equal_captions_are_no_negatives() -> None:
    logits = torch.randn(4, 4, requires_grad=True)
    same = equal_captions(["a cat", "a dog", "a cat", "a fox"])
    contrastive_loss(logits, same).sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad == 0, same & ~torch.eye(4, dtype=torch.bool))
    best = torch.tensor([[0.0, 0, 9, 0], [0, 0, 0, 9], [9, 0, 0, 0], [0, 0, 0, 9]])
    assert retrieved(best, same).tolist() == [True, False, True, True]


# The network


def network(seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    made = CLIP(CONFIG)
    return tiny.randomize(made, seed).requires_grad_(False)  # type: ignore[return-value]


def test_a_noise_level_is_an_angle_and_what_is_seen_has_unit_variance() -> None:
    """Pure noise of any strength looks the same, and a clean picture needs no noise level of any schedule."""
    clip, noise = network(), torch.randn(3, 4, 16, 16)
    far = [clip.image_features(sigma * noise, torch.full((3,), sigma)) for sigma in (1e6, 1e8)]
    torch.testing.assert_close(*far, rtol=1e-4, atol=1e-4)
    x0 = torch.randn(3, 4, 16, 16)
    clean = clip.image_features(x0, torch.zeros(3))
    torch.testing.assert_close(clean, clip.image_features(x0, torch.full((3,), 1e-6)), rtol=1e-4, atol=1e-4)
    assert (clean - clip.image_features(x0, torch.full((3,), 1.0))).abs().max() > 0.01
    alone = clip.image_features(x0[1:2], torch.zeros(1))
    torch.testing.assert_close(alone, clean[1:2], rtol=1e-4, atol=1e-5)
    assert clip.image_features(torch.randn(1, 4, 24, 16), torch.zeros(1)).shape == (1, 24)


@pytest.mark.parametrize("widths", [(16, 32, 32), (16, 16), (32, 16, 32)])
def test_every_level_but_the_first_halves_the_sides_whatever_their_widths(widths: tuple[int, ...]) -> None:
    tower = CLIP(replace(CONFIG, block_out_channels=widths)).image_model
    sides: list[int] = []
    tower.norm.register_forward_hook(lambda _module, _seen, out: sides.extend(out.shape[2:]))
    tower(torch.randn(1, 4, 16, 16), torch.zeros(1))
    assert sides == [16 // 2 ** (len(widths) - 1)] * 2 == list(tower.position.shape[2:])


def test_logits_are_scaled_cosines() -> None:
    clip = network()
    x, sigma, hidden = torch.randn(3, 4, 16, 16), torch.rand(3), torch.randn(3, 5, tiny.WIDTH)
    image, text = clip.image_features(x, sigma), clip.text_features(hidden)
    for scale, used in ((2.0, math.exp(2.0)), (9.0, 100.0)):
        clip.logit_scale.data.fill_(scale)
        expected = used * F.cosine_similarity(image[:, None], text[None], dim=-1)
        torch.testing.assert_close(clip(x, sigma, hidden), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert cosines(image, text).dtype == torch.float32


# Guidance, where it is known: x0 of N(0, 1), and a likelihood exp(a x0) shifts its mean by a


def prior(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return x / (1 + sigma[:, None, None, None] ** 2)


def shifted(x: torch.Tensor, sigma: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The denoiser of N(mean, 1)."""
    return mean + (x - mean) / (1 + sigma[:, None, None, None] ** 2)


@pytest.mark.parametrize("scale", [0.5, torch.tensor([0.0, 1.0, 3.0])])
def test_a_log_linear_likelihood_shifts_a_gaussian(scale: Any) -> None:
    """Both by who reads noise, log E[exp(a x0) | x] = a x / (1 + sigma^2) + constant, and by who knows x0 alone."""
    a = torch.randn(1, 2, 1, 1)
    x, sigma = 3 * torch.randn(3, 2, 1, 1), torch.tensor([0.02, 1.0, 40.0])
    noised = by_score(prior, lambda x, sigma: (a * prior(x, sigma)).sum((1, 2, 3)), scale)
    clean = by_estimate(prior, lambda x0: (a * x0).sum((1, 2, 3)), scale)
    mean = torch.as_tensor(scale).reshape(-1, 1, 1, 1) * a
    for guided in (noised, clean):
        with torch.no_grad():
            found = answered(awaited(guided(x, sigma)))
        assert not found.requires_grad
        torch.testing.assert_close(found, shifted(x, sigma, mean), rtol=1e-5, atol=1e-5)


def test_a_sampler_reaches_the_shifted_gaussian() -> None:
    """Its mean and variance, to the Monte Carlo error of 4,000 draws (5 standard errors) and the steps' own."""
    a, count = torch.tensor([1.5, -0.5]).view(1, 2, 1, 1), 4000
    guided = by_estimate(prior, lambda x0: (a * x0).sum((1, 2, 3)), 1.0)
    sigmas = [*np.geomspace(80, 0.01, 60).tolist(), 0.0]
    begin = 80 * torch.randn(count, 2, 1, 1)
    drawn = sample(guided, ddim(begin, sigmas, lambda: torch.zeros_like(begin)))[:, :, 0, 0]
    assert (drawn.mean(0) - a.flatten()).abs().max() < 5 / count**0.5 + 0.05
    assert (drawn.var(0) - 1).abs().max() < 5 * (2 / count) ** 0.5 + 0.1


def test_outside_of_the_interval_nothing_is_asked() -> None:
    def never(x0: torch.Tensor) -> torch.Tensor:
        raise AssertionError("asked")

    x, sigma = torch.randn(2, 2, 1, 1), torch.tensor([3.0, 0.1])
    guided = by_estimate(prior, never, 1.0, (0.5, 2.0))
    assert torch.equal(answered(awaited(guided(x, sigma))), prior(x, sigma))


# Others' models


def clip_folder(folder: Path, size: int = 32) -> Any:
    """A tiny CLIPModel of transformers, saved with its tokenizer."""
    from transformers import CLIPConfig as Theirs
    from transformers import CLIPModel

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = tiny.clip_model(True).config.to_dict()
    vision |= {"image_size": size, "patch_size": 8, "projection_dim": 24}
    config = Theirs(text_config=text, vision_config=vision, projection_dim=24)
    model = tiny.randomize(tiny._louder(CLIPModel(config)))
    model.save_pretrained(folder)
    tiny.clip_tokenizer_folder(folder)
    return model


def features(output: Any) -> torch.Tensor:
    """transformers 5 gives them with more beside."""
    return getattr(output, "pooler_output", output)


def test_transformers_clip_gives_its_own_features(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor

    theirs, clip = clip_folder(tmp_path), load_clip(tmp_path)
    assert isinstance(clip, PictureCLIP)
    words = AutoTokenizer.from_pretrained(tmp_path)(
        PROMPTS, padding="max_length", max_length=77, return_tensors="pt"
    )
    torch.testing.assert_close(
        clip.text_features(PROMPTS), features(theirs.get_text_features(**words)), rtol=1e-4, atol=1e-5
    )
    assert clip.logit_scale == pytest.approx(theirs.logit_scale.exp().item(), rel=1e-5)
    smooth = F.interpolate(torch.rand(2, 3, 6, 8), (48, 64), mode="bicubic", align_corners=False)
    for pictures, steps in ((torch.rand(2, 3, 32, 32), 1e-3), (smooth.clamp(0, 1), 2.0)):
        pictures = (pictures * 255).round() / 255
        arrays = list((pictures * 255).byte().permute(0, 2, 3, 1).numpy())
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        wanted = CLIPImageProcessor(**sizes)(arrays, return_tensors="pt").pixel_values
        # PIL rounds to 8 bits after each of its two passes: a step is 1/255, normalised.
        apart = (clip_pixels_of(pictures, 32) - wanted).abs().max().item()
        assert apart < steps / 255 / 0.26
        own = features(theirs.get_image_features(pixel_values=clip_pixels_of(pictures, 32)))
        torch.testing.assert_close(clip.image_features(pictures), own, rtol=1e-4, atol=1e-5)


def test_open_clip_gives_its_own_features(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip", exc_type=ImportError)
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32, "head_width": 32}
    torch.manual_seed(0)
    theirs = tiny.randomize(open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)).float()
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {"embed_dim": 24, "text_cfg": text, "vision_cfg": vision}}
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(config | {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25, 0.5, 0.5]}}))
    clip, pictures = load_clip(tmp_path), torch.rand(2, 3, 32, 32)
    assert isinstance(clip, PictureCLIP) and clip.std == (0.25, 0.5, 0.5)
    with torch.no_grad():
        words = theirs.encode_text(open_clip.tokenize(PROMPTS))
        seen = theirs.encode_image((pictures - 0.5) / torch.tensor([0.25, 0.5, 0.5])[:, None, None])
    torch.testing.assert_close(clip.text_features(PROMPTS), words, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clip.image_features(pictures), seen, rtol=1e-4, atol=1e-5)
    assert clip.logit_scale == pytest.approx(theirs.logit_scale.exp().item())
    for wrong, said in (
        ({"vision_cfg": {"timm_model_name": "resnet50"}}, "vision transformers are supported"),
        ({"vision_cfg": {"layers": [3, 4]}}, "layers"),
        ({"vision_cfg": 3}, "vision_cfg must hold"),
    ):
        path.write_text(json.dumps({"model_cfg": config["model_cfg"] | wrong}))
        with pytest.raises(UserError, match=said):
            load_clip(tmp_path)


# Training


def run_config(folder: Path, base: Path, sprites: str, latents: Path, **loop: Any) -> Path:
    """A whole run over a tiny model's latents, of a pool in the folder `latents`."""
    data = {
        "kind": "compositions",
        "cache": str(latents),
        "sprites": sprites,
        "pictures": 2048,
        "encoding": "float32",
        "mixture": {"size": 32, "things": ["tree", "star", "rocket"], "styles": ["3d"]},
    }
    sizes = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "heads": 2}
    objective = {
        "base": str(base),
        "data": data,
        "model": {**sizes, "text_width": 16, "projection_dim": 12, "dropout": 0.1},
        "validation": {"data": data, "pictures": 64},
    }
    folder.mkdir(exist_ok=True)
    return write_config(folder, {"loop": {**LOOP, **loop}, "clip": objective})


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool that the first run fills for all."""
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_pipeline_folder(tmp_path_factory.mktemp("base"), "bert")


def test_a_run_is_validated_exported_and_ends_with_the_same_bits_after_kills(
    tmp_path: Path, base: Path, sprites: str, latents: Path
) -> None:
    kills = 2
    loop = {"pictures": 8 * BATCHES * kills, "save_every": 8, "validate_every": 40}
    paths = [run_config(tmp_path / name, base, sprites, latents, **loop) for name in ("whole", "killed")]
    same_bits_after_kills(*paths, kills)
    lines = [json.loads(line) for line in (tmp_path / "whole/run/log.jsonl").read_text().splitlines()]
    names = ["retrieval_clean", *(f"retrieval_band_{k}_of_4" for k in range(1, 5))]
    shares = [line[name] for line in lines if names[0] in line for name in names]
    assert len(shares) == 10 and all(0 < share < 1 for share in shares)
    system = System.load(base)
    clip = load_clip(tmp_path / "whole/run/export/clip", system.autoencoder, system.text)
    assert isinstance(clip, LatentCLIP) and clip.network.config.projection_dim == 12
    pictures = torch.rand(2, 3, 32, 32)
    clean = system.autoencoder.scale(system.autoencoder.encode(pictures * 2 - 1).mean)
    expected = clip.noised_features(clean, torch.zeros(2))
    torch.testing.assert_close(clip.image_features(pictures), expected, rtol=1e-4, atol=1e-5)
    alone = torch.cat([clip.text_features([each]) for each in ("a cat", "a cat, " * 30)])
    assert torch.equal(clip.text_features(["a cat", "a cat, " * 30]), alone)


def test_the_loss_is_that_of_the_pairs_at_their_noise_levels(
    tmp_path: Path, base: Path, sprites: str, latents: Path
) -> None:
    """Recomputed from the draws; a quarter is clean, and a level is the schedule's at a uniform timestep."""
    from ldm.training.distributed import BatchGenerator

    run = read_run(run_config(tmp_path, base, sprites, latents), ["clip.clean=0.25", "clip.model.dropout=0"])
    objective: Any = run.objective()
    objective.prepare(torch.device("cpu"), 8)
    whole = slice(0, 8)
    batch = objective.batch(0, 8, whole)
    value, logs = objective.loss(objective.model, batch, BatchGenerator(5, 8, whole))
    draws = BatchGenerator(5, 8, whole)
    clean, noise, steps = draws.uniform() < 0.25, draws.normal(4, 16, 16), (draws.uniform() * 1000).long()
    alphas = objective.schedule.alphas_cumprod[steps]
    sigma = torch.where(clean, 0, ((1 - alphas) / alphas).sqrt().float())
    assert 0 < clean.sum() < 8
    text = objective.conditions.text  # which cuts what is longer than a window
    hidden = text.encode(batch.captions, length=text.window.size)[0].text
    with torch.no_grad():
        x = batch.latents + sigma[:, None, None, None] * noise
        logits = objective.model(x, sigma, hidden)
    same = equal_captions(batch.captions)
    torch.testing.assert_close(value, contrastive_loss(logits, same).mean(), rtol=1e-4, atol=1e-5)
    assert logs["retrieval"] == retrieved(logits, same).float().mean()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["clip.clean=1.5"], "clip.clean is 1.5"),
        (["loop.batch_size=1"], "loop.batch_size to 2 or more"),
        (["loop.batch_size=2", "loop.gradient_accumulation_steps=2"], "gradient_accumulation_steps"),
        (["clip.model.heads=3"], "no multiple of heads"),
        (["clip.model.norm_num_groups=5"], "no multiple of norm_num_groups"),
        (["clip.validation.pictures=8"], "clip.validation.pictures is 8"),
        (["clip.validation.pictures=100"], "make it a multiple of 64"),
    ],
)
def test_settings_that_can_not_be_get_one_line(
    tmp_path: Path, base: Path, sprites: str, latents: Path, changes: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        train(run_config(tmp_path, base, sprites, latents), changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("captions", [(), ("a cat",)])
def test_pictures_of_one_caption_are_refused(tmp_path: Path, base: Path, captions: tuple[str, ...]) -> None:
    """Their loss is 0 whatever the network says: equal captions are no negatives."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    data = PicturesConfig(path=str(tmp_path), resolution=32, captions=captions, encoding="float32")
    model = ModelConfig(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, text_width=16, projection_dim=12
    )
    made = Objective(Config(base=str(base), data=data, model=model))
    with pytest.raises(UserError, match=r"^clip\.data: all pictures have one caption: "):
        made.prepare(torch.device("cpu"), 4)


# Drawing


def own_folder(folder: Path, system: System, **changes: Any) -> Path:
    """A CLIP of random weights over a system's parts, as training exports it."""
    from ldm.checkpoints.folder import write_component

    probes = {"autoencoder": autoencoder_probe(system.autoencoder), "text_encoder": text_probe(system.text)}
    config = replace(CONFIG, **{**probes, **changes})
    torch.manual_seed(0)
    write_component(folder, "clip", config.write(), tiny.randomize(CLIP(config)).state_dict())
    return folder / "clip"


@pytest.mark.parametrize("kind", ["latents", "pictures"])
def test_pictures_are_pulled_towards_their_prompts(tmp_path: Path, base: Path, kind: str) -> None:
    """Each to its own, alone as in a batch; by the recipe again; and at scale 0 nothing changes."""
    pipe = TextToImagePipeline.from_pretrained(base, device="cpu")
    if kind == "latents":
        folder = own_folder(tmp_path, pipe.system)
    else:
        folder = tmp_path / "theirs"
        clip_folder(folder)
    clip = load_clip(folder, pipe.system.autoencoder, pipe.system.text)
    given = (
        "latent" if kind == "latents" else "pt"
    )  # a decoder of random weights is no inverse of its encoder
    how = {
        "num_inference_steps": 8,
        "guidance_scale": 1.0,
        "seed": 3,
        "output_type": given,
        "progress": False,
    }
    guided = pipe(PROMPTS, clip_guidance_scale=4.0, clip_model=folder, **how)
    plain = pipe(PROMPTS, **how)
    with torch.no_grad():
        texts = clip.text_features(PROMPTS)
        likeness: list[torch.Tensor] = []
        for each in (plain, guided):
            shown = torch.stack(list(each.images))
            by_latents = isinstance(clip, LatentCLIP)
            seen = clip.noised_features(shown, torch.zeros(2)) if by_latents else clip.image_features(shown)
            likeness.append(F.cosine_similarity(seen, texts))
    assert (likeness[1] > likeness[0]).all(), likeness
    second = pipe(PROMPTS[1], clip_guidance_scale=4.0, clip_model=folder, **{**how, "seed": 4})
    torch.testing.assert_close(second.images[0], guided.images[1], rtol=1e-3, atol=1e-3)
    recipe = guided.recipes[1]
    assert recipe.clip_model is not None and recipe.clip_model.path == str(folder) and recipe.clip_model.hash
    again = TextToImagePipeline.from_pretrained(base, device="cpu")
    assert again.load_for([recipe]) == []
    assert torch.equal(again.draw([recipe], output_type=given).images[0], second.images[0])
    other = replace(recipe, clip_model=replace(recipe.clip_model, hash="0123456789"))
    assert "has changed since" in again.load_for([other])[0]


def test_a_clip_of_another_model_is_refused_in_one_line(tmp_path: Path, base: Path, capsys: Any) -> None:
    system = System.load(base)
    other = tiny.tiny_pipeline_folder(tmp_path, "sd1")
    wrong = {
        "latents of 8 channels": own_folder(tmp_path / "a", system, in_channels=8),
        "reads texts by 48 features": own_folder(tmp_path / "b", system, text_hidden_size=48),
        "over another text encoder": own_folder(tmp_path / "c", System.load(other)),
        "over another autoencoder": own_folder(tmp_path / "d", system, autoencoder=(1.0, 2.0, 3.0, 4.0)),
        "a CLIPModel of transformers": base / "text_encoder",
        "no such folder": tmp_path / "nowhere",
    }
    for said, folder in wrong.items():
        with pytest.raises(UserError, match=said) as error:
            load_clip(folder, system.autoencoder, system.text)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="give the model that it was trained for"):
        load_clip(own_folder(tmp_path / "e", system))
    pipe = TextToImagePipeline.from_pretrained(base, device="cpu")
    for call, said in (
        ({"clip_guidance_scale": -1.0}, "clip_guidance_scale is -1.0"),
        ({"clip_guidance_scale": float("nan")}, "clip_guidance_scale is nan"),
        ({"clip_model": "somewhere"}, "goes with clip_guidance_scale"),
        ({"clip_guidance_scale": 1.0, "clip_model": 3}, "give the folder of a CLIP"),
        ({"clip_guidance_scale": 1.0, "clip_model": wrong["no such folder"]}, "no such folder"),
    ):
        with pytest.raises(UserError, match=said):
            pipe("a cat", **call)
    embeds = torch.randn(1, 16, tiny.WIDTH)
    with pytest.raises(UserError, match="guides by words"):
        pipe(prompt_embeds=embeds, clip_guidance_scale=1.0, clip_model=wrong["over another autoencoder"])
    arguments = ["--model", str(base), "--clip-guidance-scale", "1", "--clip-model"]
    folder = str(wrong["latents of 8 channels"])
    assert draw(["a cat", *arguments, folder, "--out", str(tmp_path / "x.png")]) != 0
    said = capsys.readouterr().err.strip().splitlines()
    assert "latents of 8 channels" in said[-1]


def test_the_bundled_clip_finds_which_prompt_a_picture_was_drawn_from() -> None:
    """And knows its model's parts in any precision."""
    prompts = ["a raccoon", "a red apple", "a blue car", "two rockets on a yellow background"]
    pipe = TextToImagePipeline.from_pretrained(device="cpu")
    drawn = torch.stack(
        list(pipe(prompts, num_inference_steps=8, seed=0, output_type="pt", progress=False).images)
    )
    folder = Path(__file__).resolve().parents[1] / "weights" / "emoji-128-clip"
    clip = load_clip(folder, pipe.system.autoencoder, pipe.system.text)
    with torch.no_grad():
        found = cosines(clip.image_features(drawn), clip.text_features(prompts))
    assert found.argmax(1).tolist() == [0, 1, 2, 3], found
    rounded = System.load(torch_dtype=torch.bfloat16)
    load_clip(folder, rounded.autoencoder, rounded.text)

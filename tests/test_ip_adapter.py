"""IP-Adapters: tokens, outputs and pictures are diffusers'; files of strangers; what is left as it was."""

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from controls import control_picture
from ip_adapters import adapter_tensors, saved_adapter
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import SCHEDULER, tiny_pipeline_folder
from torch import Tensor

from ldm.conditioning.image_encoder import clip_pixels, load_image_encoder
from ldm.conditioning.image_prompt import ImagePrompt, load_ip_adapter, save_ip_adapter
from ldm.diffusion.plan import plan
from ldm.errors import UserError
from ldm.models.lora import LoRA
from ldm.sampling import Guidance, decode, prepare, sample
from ldm.system import System

PICTURES = [control_picture(1, (40, 56)), control_picture(2, (70, 48))]
EULER = SCHEDULER | {"_class_name": "EulerDiscreteScheduler"}
CASES = [("sd1", "base"), ("sdxl", "plus"), ("sd1", "full")]
KINDS = ["base", "plus", "full"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A pipeline's folder, or with a kind an adapter's file for it; each made once."""

    @cache
    def build(family: Any, kind: str = "", seed: int = 0) -> Path:
        folder = tmp_path_factory.mktemp("made")
        return (
            saved_adapter(folder, kind, family, seed) if kind else tiny_pipeline_folder(folder, family, EULER)
        )

    return build


@pytest.fixture(scope="module")
def theirs(made: Callable[..., Path]) -> Callable[..., Any]:
    """diffusers' pipeline with these adapters, for one test after the other."""

    @cache
    def build(family: str) -> Any:
        import diffusers

        pipe = diffusers.DiffusionPipeline.from_pretrained(made(family), local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def load(family: str, *files: Path) -> Any:
        pipe = build(family)
        pipe.load_ip_adapter(
            [str(each.parent) for each in files],
            subfolder=[""] * len(files),
            weight_name=[each.name for each in files],
        )
        return pipe

    return load


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(-10 * np.log10(max(np.square(ours - theirs).mean(), 1e-20)))


def draw(system: System, images: Sequence[ImagePrompt] = (), rows: int = 1, scale: float = 5.0) -> np.ndarray:
    how = plan(system.scheduler, 2, is_xl=system.is_xl)
    request = prepare(
        system, how, ["the cat"] * rows, range(3, 3 + rows), guidance=Guidance(scale), images=images
    )
    with torch.no_grad():
        return decode(system.autoencoder, sample(system, request)).permute(0, 2, 3, 1).numpy()


def expected(pipe: Any, pictures: Any, scale: Any = 1.0, guidance: float = 5.0) -> np.ndarray:
    pipe.set_ip_adapter_scale(scale)
    return pipe(
        "the cat",
        ip_adapter_image=pictures,
        num_inference_steps=2,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images


# Against diffusers


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_tokens_and_outputs_are_diffusers(
    made: Callable[..., Path], theirs: Callable[..., Any], family: str, kind: str
) -> None:
    file = made(family, kind)
    system, pipe = System.load(made(family)), theirs(family, file)
    adapter = load_ip_adapter(system.network, file)
    embeds = pipe.prepare_ip_adapter_image_embeds([PICTURES], None, "cpu", 1, True)
    with torch.no_grad():
        wanted = pipe.unet.encoder_hid_proj(embeds)[0]  # (2, n, T, D), negative first
        positive, negative = adapter.features([PICTURES])
        tokens = adapter.network.tokens(torch.cat([negative, positive]))
    assert tokens.shape == (2, 2 * {"base": 4, "plus": 6, "full": 17}[kind], wanted.shape[-1])
    assert torch.allclose(tokens, wanted.flatten(1, 2), atol=1e-5)
    assert (tokens[0] - tokens[1]).abs().max() > 0.1

    how = plan(system.scheduler, 4)
    request = prepare(
        system, how, ["the cat"], [0], images=[adapter.prompt([PICTURES], 0.7)], guidance=Guidance(5)
    )
    x, timestep = torch.randn(2, 4, 16, 16), torch.tensor([500.0, 500.0])
    added = {"image_embeds": embeds}
    if system.is_xl:
        added |= {"text_embeds": request.condition.pooled, "time_ids": request.condition.time_ids}
    pipe.set_ip_adapter_scale(0.7)
    with torch.no_grad():
        ours = system.network(x, timestep, request.condition)
        without = system.network(x, timestep, replace(request.condition, images={}))
        their = pipe.unet(x, timestep, request.condition.text, added_cond_kwargs=added).sample
    assert torch.allclose(ours, their, atol=2e-5 * float(their.abs().max()))
    assert (ours - without).abs().max() > 0.05


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_whole_pictures_are_diffusers(
    made: Callable[..., Path], theirs: Callable[..., Any], family: str, kind: str
) -> None:
    """Two pictures guided, one not; and without pictures, or at 0, it is as if no adapter were there."""
    file = made(family, kind)
    system, pipe = System.load(made(family)), theirs(family, file)
    plain = draw(system)
    adapter = load_ip_adapter(system.network, file)
    assert np.array_equal(draw(system), plain)
    for pictures, scale, guidance in ((PICTURES, 0.6, 5.0), (PICTURES[:1], 1.0, 1.0)):
        drawn = draw(system, [adapter.prompt([pictures], scale)], scale=guidance)
        assert psnr(drawn, expected(pipe, [pictures], scale, guidance)) > 60
        assert psnr(drawn, plain) < 40
    assert np.array_equal(draw(system, [adapter.prompt([PICTURES], 0.0)]), plain)


def test_several_adapters_at_once_are_diffusers(
    made: Callable[..., Path], theirs: Callable[..., Any]
) -> None:
    files = [made("sd1", "base"), made("sd1", "plus"), made("sd1", "base", 1)]
    system, pipe = System.load(made("sd1")), theirs("sd1", *files)
    first = load_ip_adapter(system.network, files[0])
    rest = [load_ip_adapter(system.network, each, first.encoder) for each in files[1:]]
    given, scales = [PICTURES[:1], PICTURES, PICTURES[1:]], [0.8, 0.0, 0.5]
    prompts = [
        each.prompt([own], scale) for each, own, scale in zip([first, *rest], given, scales, strict=True)
    ]
    assert psnr(draw(system, prompts), expected(pipe, given, scales)) > 60
    for each in rest:
        each.network.detach()
    alone = draw(system, prompts[:1])
    with pytest.raises(UserError, match="not attached to the network that draws"):
        draw(system, prompts)
    assert np.array_equal(alone, draw(system, prompts[:1]))


def test_pixels_are_those_of_transformers() -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size=32, crop_size=32)
    rng = np.random.default_rng(0)
    for width, height in ((32, 32), (33, 47), (64, 50), (7, 90), (500, 333), (31, 31)):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        assert torch.equal(clip_pixels([picture], 32), processor(picture, return_tensors="pt").pixel_values)
        assert torch.equal(clip_pixels([np.asarray(picture)], 32), clip_pixels([picture], 32))
    for mode in ("L", "1", "CMYK", "P", "YCbCr"):
        picture = control_picture(3).convert(mode)
        assert torch.equal(clip_pixels([picture], 32), processor(picture, return_tensors="pt").pixel_values)


def test_pictures_of_any_mode_as_they_are_looked_at() -> None:
    picture = control_picture(3, (40, 48))
    plain = clip_pixels([picture], 32)
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees clockwise
    assert torch.equal(clip_pixels([turned], 32), plain)
    clear = Image.new("RGBA", (40, 48), (0, 0, 0, 0))
    assert torch.equal(clip_pixels([clear], 32), clip_pixels([Image.new("RGB", (40, 48), "white")], 32))
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    assert torch.equal(clip_pixels([deep], 32), clip_pixels([picture.convert("L")], 32))
    for odd, said in (
        (Image.new("RGB", (1, 500)), "1 x 500 pixels: at most 100 times as long as wide"),
        (np.zeros((4, 4, 4), np.uint8), r"an array of uint8 \(4, 4, 4\)"),
        ("picture.png", "an image prompt is a str"),
    ):
        with pytest.raises(UserError, match=said):
            clip_pixels([odd], 32)  # pyright: ignore


# Rows, LoRA, copies


def test_each_row_has_its_own_pictures_and_scale(made: Callable[..., Path]) -> None:
    """A row is what it is alone; one whose scale is 0 is, to the bit, what it is without any in such a batch."""
    system = System.load(made("sd1"))
    adapter = load_ip_adapter(system.network, made("sd1", "plus"))
    rows = [[PICTURES[0]], [PICTURES[1]], [PICTURES[0]]]
    drawn = draw(system, [adapter.prompt(rows, [0.9, 0.4, 0.0])], rows=3)
    plain = draw(system, rows=3)
    for k, scale in enumerate((0.9, 0.4)):
        prompt = adapter.prompt([rows[k]], scale)
        alone = draw(system, [prompt], rows=3)[k]
        assert psnr(drawn[k], alone) > 90 and psnr(drawn[k], plain[k]) < 40
    assert np.array_equal(drawn[2], plain[2])


def test_a_lora_on_the_same_layers_merged_or_not(
    made: Callable[..., Path], theirs: Callable[..., Any]
) -> None:
    system, pipe = System.load(made("sd1")), theirs("sd1", made("sd1", "base"))
    names = set(system.network.state_dict())
    adapter = load_ip_adapter(system.network, made("sd1", "base"))
    plain = draw(system, [adapter.prompt([PICTURES])])
    lora = LoRA(system.network, rank=2)
    with torch.no_grad():
        for name, each in lora.named_parameters():
            each.copy_(torch.randn(each.shape) * (0.3 if ".up." in name else 1) * each.shape[-1] ** -0.5)
    beside = draw(system, [adapter.prompt([PICTURES])])
    lora.merge()
    merged = draw(system, [adapter.prompt([PICTURES])])
    own = copy.deepcopy(pipe.unet.state_dict())
    pipe.unet.load_state_dict(system.network.state_dict(), strict=False)
    try:
        assert psnr(merged, expected(pipe, [PICTURES])) > 60
    finally:
        pipe.unet.load_state_dict(own)
    assert psnr(beside, merged) > 60 and psnr(plain, merged) < 40
    lora.detach()
    assert np.array_equal(draw(system, [adapter.prompt([PICTURES])]), plain)
    assert set(system.network.state_dict()) == names  # the adapter is no part of the network


def test_half_precision_keeps_scales_and_follows_the_network(made: Callable[..., Path]) -> None:
    system = System.load(made("sd1"), torch_dtype=torch.bfloat16)
    adapter = load_ip_adapter(system.network, made("sd1", "base"))
    request = prepare(
        system, plan(system.scheduler, 2), ["cat"], [0], images=[adapter.prompt([PICTURES], 0.3)]
    )
    tokens, scale = request.condition.images.values()
    assert tokens.dtype == torch.bfloat16 and scale.tolist() == torch.tensor([0.3, 0.3]).tolist()
    assert bool(torch.isfinite(sample(system, request)).all())


def test_a_request_says_what_is_wrong(made: Callable[..., Path]) -> None:
    system = System.load(made("sd1"))
    adapter = load_ip_adapter(system.network, made("sd1", "base"))
    prompt = adapter.prompt([PICTURES])
    for images, said in (
        ([prompt, prompt], "given two image prompts"),
        ([replace(prompt, scale=[1.0, 2.0])], r"scale is \[1.0, 2.0\]"),
        ([replace(prompt, scale=float("nan"))], "scale is nan"),
        ([adapter.prompt([PICTURES] * 2)], "pictures for 2 rows, where 1 are drawn"),
    ):
        with pytest.raises(UserError, match=said):
            draw(system, images)
    for rows in ([], [[]], [PICTURES, PICTURES[:1]]):
        with pytest.raises(UserError, match="at least one picture"):
            adapter.prompt(rows)


# Files


@pytest.mark.parametrize("kind", KINDS)
def test_files_round_trip(made: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    system = System.load(made("sd1"))
    path = made("sd1", kind)
    adapter = load_ip_adapter(system.network, path)
    save_ip_adapter(adapter.network, system.network, tmp_path / "again.safetensors")
    wanted, found = load_file(path), load_file(tmp_path / "again.safetensors")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], each) for name, each in wanted.items())
    pickled = saved_adapter(tmp_path, kind, "sd1", ending="bin")
    again = load_ip_adapter(system.network, pickled, adapter.encoder)
    for name, each in adapter.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], each), name


PUBLISHED = {  # of h94's repository: kind, tokens, what the encoder gives, the width of the text, layers
    "ip-adapter_sd15": ("sd1", "base", 1024, 4),
    "ip-adapter-plus_sd15": ("sd1", "plus", 1280, 16),
    "ip-adapter-full-face_sd15": ("sd1", "full", 1280, 257),
    "ip-adapter_sdxl": ("sdxl", "base", 1280, 4),
    "ip-adapter-plus_sdxl_vit-h": ("sdxl", "plus", 1280, 16),
}


@cache
def true_size(family: str) -> tuple[Any, Any]:
    """A published U-Net without memory, ours and diffusers'."""
    from diffusers import UNet2DConditionModel

    from ldm.checkpoints.families import _UNET, FAMILIES
    from ldm.models.unet import UNet
    from ldm.models.unet_config import UNetConfig

    config = _UNET | FAMILIES[family].unet
    with torch.device("meta"):
        own = UNet2DConditionModel(**{key: each for key, each in config.items() if key[0] != "_"})
        return UNet(UNetConfig.from_diffusers(config)), own


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[pytest.mark.slow] if each == "ip-adapter_sdxl" else []) for each in PUBLISHED],
)
def test_published_sizes_are_diffusers(name: str) -> None:
    """At their true sizes, without memory: what diffusers makes of such a file has our names and shapes."""
    from ldm.checkpoints.ip_adapter import ip_adapter_rows
    from ldm.checkpoints.keymap import KeyMap
    from ldm.models.ip_adapter import IPAdapter, IPAdapterConfig, cross_attentions

    family, kind, features, tokens = PUBLISHED[name]
    unet, own = true_size(family)
    hidden = {"sd1": 768, "sdxl": 1280}[family] if kind == "plus" else 0
    blocks = cross_attentions(unet)
    widths = tuple(each.attn2.to_q.out_features for each in blocks.values())
    sizes: dict[str, Any] = (
        {"hidden": hidden, "inner": hidden, "ff": 4 * hidden, "depth": 4} if hidden else {}
    )
    with torch.device("meta"):
        made = IPAdapterConfig(kind, features, own.config.cross_attention_dim, tokens, widths, **sizes)  # pyright: ignore
        adapter = IPAdapter(unet, made)
    assert len(widths) == {"sd1": 16, "sdxl": 70}[family]
    rows = ip_adapter_rows(kind, 4 if hidden else 0, list(blocks))
    theirs = KeyMap.over_ours(rows, adapter.state_dict(), name).to_theirs(adapter.state_dict())
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, each in theirs.items():
        part, _, rest = key.partition(".")
        parts[part][rest] = each
    with torch.device("meta"):
        projection = own._convert_ip_adapter_image_proj_to_diffusers(
            parts["image_proj"], low_cpu_mem_usage=False
        )
        processors = own._convert_ip_adapter_attn_to_diffusers([parts], low_cpu_mem_usage=False)
    shapes = {key: tuple(each.shape) for key, each in projection.state_dict().items()}
    assert shapes == {key: tuple(each.shape) for key, each in adapter.image_proj.state_dict().items()}
    for path, layer in adapter.layers.items():
        processor = processors[f"{path.replace('/', '.')}.attn2.processor"]
        assert processor.to_k_ip[0].weight.shape == layer.to_k_ip.weight.shape


def test_the_order_of_layers_is_down_up_middle(made: Callable[..., Path]) -> None:
    """Each layer of the file holds its own number, and so shows where it went."""
    system = System.load(made("sd1"))
    tensors = adapter_tensors("base")
    for name, each in tensors["ip_adapter"].items():
        each.fill_(float(name.split(".")[0]))
    path = made("sd1", "base").parent / "numbered.bin"
    torch.save(tensors, path)
    layers = load_ip_adapter(system.network, path).network.layers
    found = {name.split("/")[0]: [] for name in layers}
    for name, layer in layers.items():
        found[name.split("/")[0]].append(int(layer.to_k_ip.weight.flatten()[0]))
    assert found == {"down_blocks": [1], "up_blocks": [3, 5], "mid_block": [7]}


def test_other_files_are_named(made: Callable[..., Path], tmp_path: Path) -> None:
    system = System.load(made("sd1"))
    encoder = load_image_encoder(made("sd1", "base").parent / "image_encoder")
    whole = load_file(made("sd1", "base"))
    layers = {name: each for name, each in whole.items() if name.startswith("ip_adapter.")}
    one = torch.ones(2, 2)
    plus = load_file(made("sd1", "plus"))
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({**layers, "image_proj.proj.0.weight": one, "image_proj.norm.weight": one}, "is IP-Adapter FaceID, which"),
        ({**layers, "image_proj.perceiver_resampler.proj_in.weight": one}, "this is IP-Adapter FaceID Plus"),
        ({**layers, "image_proj.something": one}, r"an unknown kind \(something\)"),
        ({"image_proj_model.proj.weight": one}, "a state of IP-Adapter's training"),
        ({"conv.weight": one}, "and no IP-Adapter"),
        ({name: each for name, each in whole.items() if ".3.to_k_ip" not in name}, "not numbered 1, 3, 5"),
        ({name: each for name, each in whole.items() if "image_proj.norm" not in name}, "2 missing"),
        ({**whole, "image_proj.proj.weight": one}, "made for an image encoder of 2 features"),
        ({**whole, "image_proj.proj.bias": one}, "of another shape"),
        ({**whole, "image_proj.proj.bias": torch.full((128,), float("nan"))}, "NaN or infinity"),
        ({**whole, "image_proj.more.weight": one}, "names that are unknown in the layout of IP-Adapters"),
        ({**plus, "image_proj.layers.0.0.to_kv.weight": torch.ones(1, 40)}, "no two halves"),
        ({**plus, "image_proj.layers.0.0.to_kv.weight": torch.ones(())}, "no two halves"),
        ({**plus, "image_proj.latents": torch.ones(())}, "latents is missing, or of another shape"),
        ({**plus, "image_proj.layers.0.0.to_q.weight": torch.ones(100, 40)}, "no whole number of heads of 64"),
        ({**whole, "ip_adapter.1.to_k_ip.weight": torch.ones(())}, "is missing, or of another shape"),
    ]  # fmt: skip
    for i, (tensors, said) in enumerate(cases):
        path = tmp_path / f"{i}.safetensors"
        save_file({name: each.clone() for name, each in tensors.items()}, path)
        hooks = hooked(system)
        with pytest.raises(UserError, match=said):
            load_ip_adapter(system.network, path, encoder)
        assert hooked(system) == hooks == 0  # nothing stays behind
    torch.save({"image_proj": 3, "ip_adapter": {}}, tmp_path / "odd.bin")
    with pytest.raises(UserError, match="its image_proj is no dictionary of tensors"):
        load_ip_adapter(system.network, tmp_path / "odd.bin", encoder)


def hooked(system: System) -> int:
    return sum(len(each._forward_hooks) for each in system.network.modules())


def test_another_family_and_another_encoder_are_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    system, path = System.load(made("sd1")), made("sd1", "base")
    with pytest.raises(UserError, match="another family: it joins 8 cross-attentions, where this one has 4"):
        load_ip_adapter(system.network, made("sdxl", "base"))
    wider = {
        name: torch.ones(len(each), 40) if "_ip." in name else each for name, each in load_file(path).items()
    }
    save_file(wider, tmp_path / "wider.safetensors")
    with pytest.raises(UserError, match="4 cross-attentions to 40 features, where this one has 4 to 32"):
        load_ip_adapter(system.network, tmp_path / "wider.safetensors", path.parent / "image_encoder")
    bare = shutil.copy(path, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="has no folder image_encoder beside it"):
        load_ip_adapter(system.network, bare)
    encoder = load_image_encoder(path.parent / "image_encoder")
    encoder.config.projection_dim = 21
    with pytest.raises(UserError, match="made for an image encoder of 20 features, and this one gives 21"):
        load_ip_adapter(system.network, bare, encoder)


def test_image_encoders_of_strangers(made: Callable[..., Path], tmp_path: Path) -> None:
    good = made("sd1", "base").parent / "image_encoder"
    config = json.loads((good / "config.json").read_text())
    for changed, said in (
        ({"image_size": 2**20, "patch_size": 1}, "positions, and the file's table has 17"),
        ({"image_size": 64}, "have 65 positions"),
        ({"num_channels": 4}, "4 channels"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"num_attention_heads": 5}, "refuses the config"),
        ({"hidden_act": "nothing"}, "refuses the config"),
        ({"architectures": ["SiglipVisionModel"]}, "holds a SiglipVisionModel, and no image encoder"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"hidden_size": "24"}, "hidden_size is '24'"),
        ({"vision_config": 3}, "no image encoder"),
        ({"intermediate_size": 47}, "of another shape"),
    ):
        folder = tmp_path / "odd"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(UserError, match=said):
            load_image_encoder(folder)

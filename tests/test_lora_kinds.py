"""Adapters of other kinds and in others' names: against closed forms, and one another."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_lora import ATTENTION, CASES, CONV, DRAW, close, inputs, made, networks, our_unet, unet_config
from safetensors.torch import load_file, save_file
from test_pipeline import psnr
from tiny import clip_model, tiny_pipeline_folder
from torch import Tensor, nn

from ldm.checkpoints.files import read_metadata
from ldm.checkpoints.lora import read_lora, read_lora_file, write_lora
from ldm.checkpoints.lora_names import layers_of, names_in_ldm
from ldm.errors import UserError
from ldm.models.lora import LoRA
from pipelines import TextToImagePipeline

# Names


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_spelling_is_of_the_same_layers(tmp_path: Path, family: Any) -> None:
    pipe = TextToImagePipeline.from_pretrained(tiny_pipeline_folder(tmp_path, family), device="cpu")
    weights = made(pipe, CASES[family])
    layers = [layer for name, each in networks(pipe).items() for layer in layers_of(name, each)]
    ldm = names_in_ldm(layers, unet_config(pipe))
    where = {(layer.component, layer.path): layer for layer in layers}
    clips = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    kohya = {"text_encoder": "lora_te1_" if family == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}
    spelled = {
        "ComfyUI": lambda at: (
            f"diffusion_model.{ldm[at]}."
            if at in ldm
            else f"text_encoders.{clips[at.component]}.transformer.{at.name}."
        ),
        "ComfyUI, short": lambda at: f"unet.{ldm[at]}." if at in ldm else f"{clips[at.component]}.{at.name}.",
        "kohya, LDM": lambda at: (
            f"lora_unet_{ldm[at]}".replace(".", "_") + "."
            if at in ldm
            else (kohya[at.component] + at.name.replace(".", "_") + ".")
        ),
        "diffusers, peft": lambda at: f"{at.component}.base_model.model.{at.name}.",
    }
    for stem in spelled.values():
        for down_name, up_name in (
            ("lora_down", "lora_up"),
            ("lora_A", "lora_B"),
            ("lora_A.default", "lora_B.default"),
        ):
            tensors: dict[str, Tensor] = {}
            for part, adapter in weights.items():
                for path, (down, up, alpha) in adapter.items():
                    name = stem(where[part, path])
                    tensors |= {f"{name}{down_name}.weight": down, f"{name}{up_name}.weight": up}
                    tensors[f"{name}alpha"] = torch.tensor(alpha)
            save_file(
                {name: each.clone().contiguous() for name, each in tensors.items()},
                tmp_path / "a.safetensors",
            )
            again = read_lora_file(tmp_path / "a.safetensors", networks(pipe), unet_config(pipe))
            assert not again.notes and again.adapters.keys() == weights.keys()
            for part, adapter in weights.items():
                assert again.adapters[part].keys() == adapter.keys()
                for path, (down, up, alpha) in adapter.items():
                    found: Any = again.adapters[part][path]
                    assert torch.equal(found[0], down) and torch.equal(found[1], up) and found[2] == alpha


# Kinds, by closed forms


def changed(tensors: dict[str, Tensor], tmp_path: Path, path: str) -> tuple[nn.Module, nn.Module]:
    """A tiny U-Net's layer with an adapter merged into it, and as it was."""
    (unet, _), (plain, _) = our_unet(), our_unet()
    save_file({name: each.clone().contiguous() for name, each in tensors.items()}, tmp_path / "a.safetensors")
    adapter = LoRA.from_weights(unet, read_lora(tmp_path / "a.safetensors", {"unet": unet})["unet"])
    x = inputs()
    attached = unet(*x)
    adapter.merge()
    close(attached, unet(*x))
    return unet.get_submodule(path), plain.get_submodule(path)


def test_a_tucker_core_is_three_convolutions(tmp_path: Path) -> None:
    stem = "lora_unet_" + CONV.replace(".", "_")
    down, mid, up = torch.randn(3, 64, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(64, 3, 1, 1)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_up.weight": up}
    tensors |= {f"{stem}.alpha": torch.tensor(1.5), f"{stem}.scalar": torch.tensor(0.1)}
    layer, before = changed(tensors, tmp_path, CONV)
    x = torch.randn(1, 64, 5, 5)
    expected = before(x) + 0.1 * 0.5 * F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up)
    close(layer(x), expected)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("path", [f"{ATTENTION}.to_q", CONV])
def test_a_dora_has_its_magnitudes_and_the_direction_of_its_sum(
    tmp_path: Path, kind: str, rows: bool, path: str
) -> None:
    stem = "lora_unet_" + path.replace(".", "_")
    kernel = 9 if path == CONV else 1
    draw = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=draw)

    if kind == "lora":
        a, b = noise(64, 2), noise(2, 64 * kernel)
        tensors = {"lora_up.weight": a, "lora_down.weight": b, "alpha": torch.tensor(1.0)}
        product = 0.5 * a @ b
    elif kind == "loha":
        a, b, c, d = noise(64, 2), noise(2, 64 * kernel), noise(64, 2), noise(2, 64 * kernel)
        tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(1.0)}
        product = 0.5 * (a @ b) * (c @ d)
    else:  # both factors whole: no scale, whatever the alpha
        a, b = noise(4, 8), noise(16, 8, *[3, 3] * (path == CONV))
        tensors = {"lokr_w1": a, "lokr_w2": b, "alpha": torch.tensor(1e4)}
        product = torch.stack(
            [a[i // 16, j // 8] * b[i % 16, j % 8].flatten() for i in range(64) for j in range(64)]
        )
    ones = [1, 1] * (path == CONV)
    lengths = torch.rand(64, generator=draw) + 0.5
    tensors["dora_scale"] = lengths.reshape(64, 1, *ones) if rows else lengths.reshape(1, 64, *ones)
    layer, before = changed({f"{stem}.{name}": each for name, each in tensors.items()}, tmp_path, path)
    axis = 0 if rows else 1
    after = layer.weight.movedim(axis, 0).flatten(1)  # type: ignore[operator, union-attr]
    direction = (before.weight + product.reshape(before.weight.shape)).movedim(axis, 0).flatten(1)  # type: ignore
    torch.testing.assert_close(after.norm(dim=1), lengths, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F.cosine_similarity(after, direction), torch.ones(64), rtol=1e-5, atol=1e-5)


def test_differences_norms_and_ia3_of_lycoris(tmp_path: Path) -> None:
    norm = "mid_block.attentions.0.norm"
    layer_norm = "mid_block.attentions.0.transformer_blocks.0.norm1"
    one, more = torch.randn(64), torch.randn(64, 64, 3, 3)

    def stem(path: str) -> str:
        return "lora_unet_" + path.replace(".", "_")

    tensors = {f"{stem(norm)}.w_norm": one, f"{stem(norm)}.b_norm": 2 * one}
    tensors |= {f"{stem(layer_norm)}.w_norm": 3 * one, f"{stem(layer_norm)}.b_norm": -one}
    tensors |= {f"{stem(CONV)}.diff": more, f"{stem(CONV)}.diff_b": one}
    tensors |= {f"{stem(ATTENTION)}_to_q.weight": one, f"{stem(ATTENTION)}_to_q.on_input": torch.tensor(1)}
    tensors |= {f"{stem(ATTENTION)}_to_k.weight": one, f"{stem(ATTENTION)}_to_k.on_input": torch.tensor(0)}
    for path, weight, bias in (
        (norm, lambda own: own + one, lambda own: own + 2 * one),
        (layer_norm, lambda own: own + 3 * one, lambda own: own - one),
        (CONV, lambda own: own + more, lambda own: own + one),
        (f"{ATTENTION}.to_q", lambda own: own * (1 + one), None),
        (f"{ATTENTION}.to_k", lambda own: own * (1 + one[:, None]), None),
    ):
        layer, before = changed(tensors, tmp_path, path)
        torch.testing.assert_close(layer.weight, weight(before.weight))
        if bias:
            torch.testing.assert_close(layer.bias, bias(before.bias))


def test_others_that_are_merged_do_not_change_a_dora(tmp_path: Path) -> None:
    """Each change is relative to the model's own weights, so they add up in any order."""
    unet, _ = our_unet()
    stem = f"unet.{ATTENTION}.to_q"
    pair = {f"{stem}.lora_A.weight": torch.randn(2, 64), f"{stem}.lora_B.weight": torch.randn(64, 2)}
    save_file(pair, tmp_path / "plain.safetensors")
    save_file(pair | {f"{stem}.dora_scale": torch.rand(64, 1) + 1}, tmp_path / "dora.safetensors")
    read = [read_lora(tmp_path / f"{name}.safetensors", {"unet": unet})["unet"] for name in ("plain", "dora")]
    plain, dora = (LoRA.from_weights(unet, each) for each in read)
    x = inputs()
    expected = unet(*x)
    plain.merge()
    close(unet(*x), expected)
    dora.merge()
    close(unet(*x), expected)
    plain.unmerge()
    close(unet(*x), expected)


def test_a_bias_where_there_is_none_is_not_merged(tmp_path: Path) -> None:
    unet, _ = our_unet()
    save_file({f"unet.{ATTENTION}.to_q.diff_b": torch.randn(64)}, tmp_path / "a.safetensors")
    plain = unet(*inputs())
    adapter = LoRA.from_weights(unet, read_lora(tmp_path / "a.safetensors", {"unet": unet})["unet"])
    assert not torch.allclose(changed := unet(*inputs()), plain)
    with pytest.raises(UserError, match="has no bias"):
        adapter.merge()
    assert torch.equal(unet(*inputs()), changed)


# The pipeline


def test_words_that_come_along(tmp_path: Path) -> None:
    model = tiny_pipeline_folder(tmp_path, "sdxl")
    pipe = TextToImagePipeline.from_pretrained(model, device="cpu")
    write_lora(tmp_path / "a.safetensors", made(pipe, {"unet": "attention"}))
    words = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 32)}
    tensors = load_file(tmp_path / "a.safetensors")
    odd = {"bundle_emb.narrow.clip_l": torch.randn(1, 7), "bundle_emb.narrow.clip_g": torch.randn(1, 7)}
    bundled = {f"bundle_emb.a.dog.{name}": each for name, each in words.items()}
    said = read_metadata(tmp_path / "a.safetensors")
    save_file(tensors | bundled | odd, tmp_path / "b.safetensors", said)
    save_file({name: each for name, each in words.items()}, tmp_path / "a.dog.safetensors")
    pipe.adapters.load_lora(tmp_path / "a.safetensors")
    pipe.load_textual_inversion(tmp_path / "a.dog.safetensors")
    expected = pipe("the a.dog", **DRAW)
    pipe.adapters.unload_loras()
    pipe.unload_textual_inversion()
    plain = pipe("the a.dog", **DRAW)
    with pytest.warns(UserWarning) as warned:
        pipe.adapters.load_lora(tmp_path / "b.safetensors")
    said = " ".join(str(each.message) for each in warned)
    assert (
        "brings words of its own" in said
        and "a.dog" in said
        and "'narrow' that came along is not loaded" in said
    )
    drawn = pipe("the a.dog", **DRAW)
    assert psnr(drawn.images, expected.images) > 60 and psnr(plain.images, expected.images) < 40
    again = TextToImagePipeline.from_pretrained(model, device="cpu")
    assert any("a.dog" in note for note in again.adapters.load_again(drawn.recipes[0].loras, ()))
    assert psnr(again("the a.dog", **DRAW).images, drawn.images) > 60
    pipe.adapters.unload_loras()
    assert psnr(pipe("the a.dog", **DRAW).images, plain.images) > 60
    only = TextToImagePipeline.from_pretrained(model, device="cpu")
    save_file(tensors | bundled, tmp_path / "c.safetensors")
    assert only.load_textual_inversion(tmp_path / "c.safetensors") == ["a.dog"]


def test_other_kinds_in_a_pipeline(tmp_path: Path) -> None:
    """Several at once, weighed, offloaded, in half precision, merged and taken out again."""
    model = tiny_pipeline_folder(tmp_path, "sd1")
    pipe = TextToImagePipeline.from_pretrained(model, device="cpu")
    offloaded = TextToImagePipeline.from_pretrained(model, device="cpu", low_memory=True)
    stem = f"unet.{ATTENTION}"
    tensors = {f"{stem}.to_q.hada_{name}": torch.randn(64, 2) for name in ("w1_a", "w2_a")}
    tensors |= {f"{stem}.to_q.hada_{name}": torch.randn(2, 64) for name in ("w1_b", "w2_b")}
    tensors |= {
        f"{stem}.to_k.lora_A.weight": torch.randn(2, 64),
        f"{stem}.to_k.lora_B.weight": torch.randn(64, 2),
    }
    tensors |= {
        f"{stem}.to_k.lora_magnitude_vector": torch.rand(64) * 4,
        "unet.conv_norm_out.w_norm": torch.randn(32),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    write_lora(tmp_path / "b.safetensors", made(pipe, CASES["sd1"]))
    plain = pipe("cat", **DRAW).images
    for each in (pipe, offloaded):
        each.adapters.load_lora(tmp_path / "a.safetensors", 0.5)
        each.adapters.load_lora(tmp_path / "b.safetensors", 0.5)
    drawn = pipe("cat", **DRAW).images
    assert psnr(drawn, plain) < 40
    assert psnr(offloaded("cat", **DRAW).images, drawn) > 100
    pipe.adapters.merge()
    assert psnr(pipe("cat", **DRAW).images, drawn) > 60
    pipe.adapters.unload_loras()
    assert (pipe("cat", **DRAW).images == plain).all()
    half = offloaded.to("cpu", torch.bfloat16)
    assert psnr(half("cat", **DRAW).images, drawn) > 15


@pytest.mark.parametrize(
    "key",
    [
        "betas",
        "lora_te1_text_projection.lora_up.weight",
        "lora_te_vision_model_x.lora_up.weight",
        "emb_params",
        "epoch",
    ],
)
def test_passengers_are_noted(tmp_path: Path, key: str) -> None:
    unet, _ = our_unet()
    stem = f"unet.{ATTENTION}.to_q"
    pair = {f"{stem}.lora_A.weight": torch.randn(2, 64), f"{stem}.lora_B.weight": torch.randn(64, 2)}
    save_file({**pair, key: torch.ones(3)}, tmp_path / "a.safetensors")
    found = read_lora_file(tmp_path / "a.safetensors", {"unet": unet, "text_encoder": clip_model()})
    assert list(found.adapters["unet"]) == [f"{ATTENTION}.to_q"]
    (note,) = found.notes
    assert "1 keys are passed over, " in note and note.endswith(f": {key}")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 64).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(2, 64), 0.1, 0, torch.qint8),
        torch.zeros(2, 64, dtype=torch.complex64),
        torch.zeros(2, 64, dtype=torch.int8),
        torch.zeros(2, 64, dtype=torch.bool),
        torch.zeros(2, 64, device="meta"),
        torch.zeros(1, 1).expand(2**30, 64),
        torch.zeros(0, 64),
        torch.tensor(1.0),
        torch.full((2, 64), torch.nan),
    ],
    ids=str,
)
def test_odd_tensors_are_one_line(tmp_path: Path, tensor: Tensor) -> None:
    unet, _ = our_unet()
    for part in ("lora_A.weight", "hada_w1_b", "diff", "lora_magnitude_vector", "scalar", "alpha"):
        torch.save({f"unet.{ATTENTION}.to_q.{part}": tensor, "unet.x": torch.zeros(1)}, tmp_path / "a.bin")
        with pytest.raises(UserError) as error, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read_lora(tmp_path / "a.bin", {"unet": unet})
        assert "\n" not in str(error.value)

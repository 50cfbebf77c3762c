"""What other programs write into pictures: our recipes there and back, real-looking samples, and hostile ones."""

import json
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.config import to_dict
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.spacing import SPACINGS
from ldm.errors import UserError
from pipelines.infotext import (
    NamedLoRA,
    exif_of,
    infotext_in,
    parameters,
    read_graph,
    read_infotext,
    read_parameters,
    texts_of,
)
from pipelines.recipe import Recipe
from pipelines.uses import EmbeddingUse, LoRAUse

FULL = Recipe(
    prompt='a cat: "quoted", (red:1.2)\nsecond line\\, with a backslash',
    negative_prompt="blurry, low: quality",
    seed=2**64 - 1,
    num_inference_steps=28,
    guidance_scale=6.123456789012345,
    sampler="dpmpp_2m",
    schedule="karras",
    height=768,
    width=512,
    guidance_rescale=0.7,
    guidance_interval=(0.3, float("inf")),
    clip_guidance_scale=3.5,
    token_merging=0.5,
    feature_reuse=2,
    clip_skip=1,
    model="/models/some model, v1.5.safetensors",
    model_hash="0123456789",
    loras=(LoRAUse("/a/b/ink wash.v2.safetensors", 0.75, "abcdef0123"), LoRAUse("C:\\loras\\line.pt", -1.0)),
    embeddings=(EmbeddingUse("/e/style.pt", "<style>", "ffffff0000"),),
    version="9.9",
)
WRITTEN = {"model", "model_hash", "loras", "embeddings", "version", "dtype"}


def settings_of(recipe: Recipe) -> dict[str, Any]:
    return {name: value for name, value in asdict(recipe).items() if name not in WRITTEN}


# AUTOMATIC1111


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", [None, *SPACINGS])
def test_our_recipes_there_and_back(sampler: str, schedule: str | None) -> None:
    for negative in (None, "", "bad, worse\nand more"):
        recipe = Recipe(
            "a cat", negative, 7, 20, 7.0, sampler, schedule, 512, 640, 0.5 if sampler == "ddim" else 0.0
        )
        found = read_parameters(parameters(recipe))
        assert settings_of(found.recipe()) == settings_of(recipe) and found.notes == ()


def test_a_full_recipe_there_and_back() -> None:
    text = parameters(FULL, model_hash="89abcdef01")
    found = read_parameters(text)
    assert settings_of(found.recipe()) == settings_of(FULL)
    assert found.loras == (NamedLoRA("ink wash.v2", 0.75, "abcdef0123"), NamedLoRA("line", -1.0))
    assert (found.model, found.model_hash) == ("some model_ v1.5", "89abcdef01")
    assert "<lora:ink wash.v2:0.75>" in text and '"<style>: ffffff0000"' in text
    assert ", Clip skip: 2, " in text and "Size: 512x768, " in text


def test_their_own_reader_reads_our_text() -> None:
    """By the rule as it is published: a regular expression for pairs, quotes undone by JSON."""
    import re

    pair = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *_, last = parameters(FULL).split("\n")
    found = {key: json.loads(value) if value[:1] == '"' else value for key, value in pair.findall(last)}
    assert found["Steps"] == "28" and found["Sampler"] == "DPM++ 2M" and found["Schedule type"] == "Karras"
    assert found["CFG scale"] == "6.123456789012345" and found["Seed"] == str(2**64 - 1)
    assert found["Lora hashes"] == "ink wash.v2: abcdef0123"
    from pipelines.infotext.a1111 import pairs_of

    for line in (
        last,
        A1111.split("\n")[-1],
        'a b: 1, x: 2, "c d": "e, f", g-h/i: j:k, l m:, n',
        "12: 3,: 4",
    ):
        theirs = {key: value for key, value in pair.findall(line)}
        ours = dict(pairs_of(line))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == (json.loads(value) if value[:1] == '"' else value.strip()), key


A1111 = """masterpiece, (a lighthouse:1.2) at dusk, <lora:oil_paint:0.6>, BREAK stormy sea <lora:detail:1:lbw=ALL>
Negative prompt: lowres, bad anatomy,
watermark
Steps: 25, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 6.5, Seed: 3344556677, Size: 832x1216, \
Model hash: 67ab2fd8ec, Model: ponyDiffusionV6XL, VAE hash: 63aeecb90f, Denoising strength: 0.35, Clip skip: 2, \
Hires upscale: 1.5, Hires steps: 12, Hires upscaler: 4x-UltraSharp, ADetailer model: face_yolov8n.pt, \
Lora hashes: "oil_paint: 1a2b3c4d5e6f, detail: 7c8d9e0f1a2b", Version: v1.10.1"""


def test_a_picture_of_automatic1111() -> None:
    found = read_parameters(A1111)
    assert found.settings == {
        "prompt": "masterpiece, (a lighthouse:1.2) at dusk, , BREAK stormy sea",
        "negative_prompt": "lowres, bad anatomy,\nwatermark",
        "num_inference_steps": 25,
        "guidance_scale": 6.5,
        "seed": 3344556677,
        "width": 832,
        "height": 1216,
        "clip_skip": 1,
        "sampler": "dpmpp_2m_sde",
        "schedule": "karras",
    }
    assert found.loras == (
        NamedLoRA("oil_paint", 0.6, "1a2b3c4d5e6f"),
        NamedLoRA("detail", 1.0, "7c8d9e0f1a2b"),
    )
    assert (found.program, found.prompt_syntax, found.model) == (
        "AUTOMATIC1111",
        "a1111",
        "ponyDiffusionV6XL",
    )
    assert found.beyond == {
        "hr_denoising_strength": 0.35,
        "hr_scale": 1.5,
        "hr_second_pass_steps": 12,
        "hr_upscaler": "4x-UltraSharp",
    }
    assert any("noise was drawn on a GPU" in note for note in found.notes)
    assert "not taken: VAE hash, ADetailer model" in found.notes


@pytest.mark.parametrize(
    ("words", "sampler", "schedule"),
    [
        ("Sampler: Euler a", "euler_ancestral", "linspace"),
        ("Sampler: DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M", "dpmpp_2m", "linspace"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("Sampler: DDIM", "ddim", "leading"),
        ("Sampler: Euler, Schedule type: SGM Uniform", "euler", "sgm_uniform"),
        ("Sampler: UniPC, Schedule type: Beta", "unipc", None),
        ("Sampler: DPM++ 2S a", None, None),
    ],
)
def test_samplers_and_schedules_of_all_versions(
    words: str, sampler: str | None, schedule: str | None
) -> None:
    found = read_parameters(f"cat\nSteps: 20, {words}, CFG scale: 7, RNG: CPU")
    assert (found.settings.get("sampler"), found.settings.get("schedule")) == (sampler, schedule)
    unknown = [note for note in found.notes if "none of ours" in note]
    assert len(unknown) == (sampler is None) + (sampler is not None and schedule is None)
    assert not any("GPU" in note for note in found.notes)
    assert found.settings["negative_prompt"] == ""  # with theirs, none is the empty prompt


def test_a_text_without_settings_and_pictures_from_pictures() -> None:
    found = read_parameters("a cat, time: noon, place: sea")
    assert found.settings["prompt"] == "a cat, time: noon, place: sea" and "no settings" in found.notes[0]
    found = read_parameters("cat\nSteps: 20, Sampler: Euler, Seed: 1, Denoising strength: 0.4, RNG: CPU")
    assert found.beyond == {"strength": 0.4} and "another picture" in found.notes[0]
    assert read_parameters("").settings["prompt"] == ""


# ComfyUI


def graph(**changes: dict[str, Any]) -> dict[str, Any]:
    """Text to image with two LoRAs; with numbers as ComfyUI has them."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}

    nodes = {
        "3": node("KSampler", seed=156680208700286, steps=30, cfg=8.0, sampler_name="euler_ancestral",
                  scheduler="normal", denoise=1.0, model=["11", 0], positive=["6", 0], negative=["7", 0],
                  latent_image=["5", 0]),
        "4": node("CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly.safetensors"),
        "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
        "6": node("CLIPTextEncode", text="a glass bottle, (galaxy:1.2)", clip=["12", 0]),
        "7": node("CLIPTextEncode", text="text, watermark", clip=["11", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
        "10": node("LoraLoader", lora_name="ink.safetensors", strength_model=0.8, strength_clip=1.0,
                   model=["4", 0], clip=["4", 1]),
        "11": node("LoraLoader", lora_name="sub/line.safetensors", strength_model=0.5, strength_clip=0.5,
                   model=["10", 0], clip=["10", 1]),
        "12": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["11", 1]),
    }  # fmt: skip
    for key, change in changes.items():
        key = key.removeprefix("n")
        nodes[key] = {**nodes.get(key, {}), **change}
    return nodes


def test_a_graph_of_comfyui() -> None:
    found = read_graph(graph())
    assert found.settings == {
        "prompt": "a glass bottle, (galaxy:1.2)",
        "negative_prompt": "text, watermark",
        "seed": 156680208700286,
        "num_inference_steps": 30,
        "guidance_scale": 8.0,
        "sampler": "euler_ancestral",
        "schedule": "linspace",
        "width": 512,
        "height": 768,
        "clip_skip": 1,
    }
    assert found.loras == (NamedLoRA("ink.safetensors", 0.8), NamedLoRA("sub/line.safetensors", 0.5))
    assert found.model == "v1-5-pruned-emaonly.safetensors" and found.prompt_syntax == "comfyui"
    assert found.notes == ()


def test_a_graph_of_two_passes_and_what_is_more() -> None:
    """Texts and seeds from other nodes, a ControlNet between, a larger second pass."""
    nodes = graph()
    base, texts = nodes["3"]["inputs"], nodes["6"]["inputs"]
    more = {
        "3": {
            **nodes["3"],
            "inputs": {**base, "seed": ["20", 0], "positive": ["21", 0], "negative": ["21", 1]},
        },
        "6": {**nodes["6"], "inputs": {**texts, "text": ["22", 0]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["31", 0], "vae": ["4", 2]}},
        "20": {"class_type": "PrimitiveInt", "inputs": {"value": 42}},
        "21": {
            "class_type": "ControlNetApplyAdvanced",
            "inputs": {
                "positive": ["6", 0],
                "negative": ["7", 0],
                "control_net": ["23", 0],
                "image": ["24", 0],
            },
        },
        "22": {"class_type": "PrimitiveString", "inputs": {"value": "from elsewhere"}},
        "23": {"class_type": "ControlNetLoader", "inputs": {"control_net_name": "canny.pth"}},
        "24": {"class_type": "LoadImage", "inputs": {"image": "edges.png"}},
        "30": {"class_type": "LatentUpscale", "inputs": {"samples": ["3", 0], "width": 1024, "height": 1536}},
        "31": {
            "class_type": "KSampler",
            "inputs": {**base, "denoise": 0.5, "steps": 14, "latent_image": ["30", 0]},
        },
    }
    found = read_graph(nodes | more)
    assert (found.settings["seed"], found.settings["prompt"]) == (42, "from elsewhere")
    assert found.settings["negative_prompt"] == "text, watermark"
    assert (found.settings["width"], found.settings["num_inference_steps"]) == (512, 30)
    assert found.beyond == {"hr_denoising_strength": 0.5, "hr_second_pass_steps": 14}
    assert any("of 2 samplers" in note for note in found.notes)
    assert any(
        note.startswith("not taken") and "ControlNetApplyAdvanced" in note and "LatentUpscale" in note
        for note in found.notes
    )


def test_samplers_of_the_newer_kind_and_pictures_from_pictures() -> None:
    nodes = graph(
        n3={
            "class_type": "SamplerCustomAdvanced",
            "inputs": {"noise": ["40", 0], "guider": ["41", 0], "sampler": ["42", 0], "sigmas": ["43", 0],
                       "latent_image": ["5", 0]},
        },
        n40={"class_type": "RandomNoise", "inputs": {"noise_seed": 5}},
        n41={"class_type": "CFGGuider", "inputs": {"model": ["11", 0], "positive": ["6", 0], "negative": ["7", 0],
                                                   "cfg": 4.5}},
        n42={"class_type": "KSamplerSelect", "inputs": {"sampler_name": "dpmpp_2m_sde_gpu"}},
        n43={"class_type": "BasicScheduler", "inputs": {"model": ["11", 0], "scheduler": "karras", "steps": 12,
                                                        "denoise": 0.7}},
        n5={"class_type": "VAEEncode", "inputs": {"pixels": ["44", 0], "vae": ["4", 2]}},
        n44={"class_type": "LoadImage", "inputs": {"image": "in.png"}},
    )  # fmt: skip
    found = read_graph(nodes)
    assert [found.settings[each] for each in ("seed", "num_inference_steps", "guidance_scale")] == [
        5,
        12,
        4.5,
    ]
    assert (found.settings["sampler"], found.settings["schedule"]) == ("dpmpp_2m_sde", "karras")
    assert found.beyond == {"strength": 0.7} and found.model == "v1-5-pruned-emaonly.safetensors"
    assert any("GPU" in note for note in found.notes) and any(
        "another picture" in note for note in found.notes
    )


# InvokeAI, SwarmUI


def test_invokeai_and_swarmui() -> None:
    metadata = {
        "generation_mode": "txt2img", "positive_prompt": "a (red)1.2 barn+", "negative_prompt": "", "width": 512,
        "height": 640, "seed": 987, "rand_device": "cpu", "cfg_scale": 7.5, "cfg_rescale_multiplier": 0,
        "steps": 30, "scheduler": "dpmpp_2m_k", "clip_skip": 0, "app_version": "5.0.0",
        "model": {"key": "k", "hash": "blake3:0123abcd", "name": "Deliberate", "base": "sd-1", "type": "main"},
        "loras": [{"model": {"name": "ink", "hash": "blake3:ab12cd34"}, "weight": 0.75}],
        "controlnets": [{"control_weight": 1}],
    }  # fmt: skip
    found = infotext_in({"invokeai_metadata": json.dumps(metadata)})
    assert found and (found.program, found.prompt_syntax, found.model) == ("InvokeAI", "compel", "Deliberate")
    assert found.recipe() == Recipe(
        "a (red)1.2 barn+", "", 987, 30, 7.5, "dpmpp_2m", "karras", 640, 512, guidance_rescale=0.0
    )
    assert found.loras == (NamedLoRA("ink", 0.75, "ab12cd34"),) and found.notes == ("not taken: controlnets",)
    params = {
        "prompt": "a barn", "negativeprompt": "blur", "model": "OfficialStableDiffusion/sd_xl_base_1.0", "seed": 3,
        "steps": 20, "cfgscale": 7.0, "aspectratio": "1:1", "width": 1024, "height": 1024, "sampler": "dpmpp_2m",
        "scheduler": "karras", "loras": ["ink"], "loraweights": ["0.5"], "swarm_version": "0.9.3", "vae": "x",
    }  # fmt: skip
    found = infotext_in({"parameters": json.dumps({"sui_image_params": params, "sui_extra_data": {}})})
    assert found and found.program == "SwarmUI" and found.notes == ("not taken: vae",)
    assert found.recipe() == Recipe("a barn", "blur", 3, 20, 7.0, "dpmpp_2m", "karras", 1024, 1024)
    assert found.loras == (NamedLoRA("ink", 0.5),)


# Files


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_in_files(tmp_path: Path, kind: str) -> None:
    text = "a cat ✓ 猫\nSteps: 20, Sampler: Euler, Schedule type: Uniform, Seed: 5, Size: 64x64, RNG: CPU"
    path, picture = tmp_path / f"picture.{kind}", Image.new("RGB", (8, 8))
    if kind == "png":
        info = PngInfo()
        info.add_itxt("parameters", text)
        picture.save(path, pnginfo=info)
    else:
        picture.save(path, exif=exif_of(text))
    assert texts_of(path)["parameters"] == text
    assert read_infotext(path).settings["prompt"] == "a cat ✓ 猫"
    picture.save(path)
    with pytest.raises(UserError, match="says nothing of how it was made"):
        read_infotext(path)


def test_comments_of_other_writers(tmp_path: Path) -> None:
    text = "a cat\nSteps: 20, Sampler: Euler, Seed: 5"
    for comment in (
        b"UNICODE\0" + text.encode("utf-16-le"),
        b"UNICODE\0" + text.encode("utf-16"),
        b"ASCII\0\0\0" + text.encode(),
        bytes(8) + text.encode(),
    ):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = comment
        Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=exif)
        assert texts_of(tmp_path / "x.jpg")["parameters"] == text
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(graph())
    exif[0x010F] = "workflow:{}"
    Image.new("RGB", (8, 8)).save(tmp_path / "x.webp", exif=exif)
    assert read_infotext(tmp_path / "x.webp").settings["seed"] == 156680208700286
    with pytest.raises(UserError, match="not valid Unicode"):
        exif_of("\udc80")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    (tmp_path / "text.png").write_text("parameters")
    info = PngInfo()
    info.add_text("parameters", "x" * 2**25, zip=True)  # unpacks to more than it is worth
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=info)
    with pytest.raises(UserError, match="no such file"):
        read_infotext(tmp_path / "none.png")
    for name in ("no.png", "text.png", "bomb.png"):
        with pytest.raises(UserError, match="no picture that can be read"):
            read_infotext(tmp_path / name)


# Hostile ones


def test_hostile_texts_cost_a_note_and_no_time() -> None:
    begin = time.process_time()
    for text in (
        "a " * 1_000_000,
        "a: b, " * 500_000,
        "Negative prompt:\n" * 200_000,
        "x\n" + "a " * 100_000 + ": 1, b c: 2, d e: 3",
        "x\n" + ":" * 500_000,
        'x\nSteps: "' + "\\" * 200_000 + ", ab: 2, cd: 3",
        "<lora:" * 300_000,
        "<lora:a:x>" * 100_000 + "\nSteps: 1, Seed: 2, Size: 8x8",
        "\0\x1b[31m\nSteps: \x1b[31m, Seed: ١٢, Size: xx, \u2028\u2028: 3",
    ):
        found = read_parameters(text)
        assert len(found.notes) <= 30 and all(len(note) < 1000 and note.isprintable() for note in found.notes)
        found.recipe()
    assert time.process_time() - begin < 10  # by quadratic ways it would take hours
    odd = "x\nSteps: 1e9, Sampler: NaN, CFG scale: nan, Seed: 1.5, Size: -1x10, Clip skip: many, Denoising strength: 2"
    assert read_parameters(odd).settings == {"prompt": "x", "negative_prompt": ""}
    assert len(read_parameters(odd).notes) == 8  # one each, and that of the GPU's noise
    same = read_parameters("x\nSteps: 20.0, Seed: 0012, CFG scale: 7")
    assert (same.settings["num_inference_steps"], same.settings["seed"]) == (20, 12)


def test_hostile_graphs_end_and_are_told() -> None:
    circle = graph()
    for key in ("10", "11"):  # the LoRAs take each other's model, the texts each other's text
        circle[key]["inputs"] |= {"model": ["11" if key == "10" else "10", 0], "clip": ["12", 0]}
    circle["6"]["inputs"]["text"] = ["7", 0]
    circle["7"]["inputs"]["text"] = ["6", 0]
    circle["5"] = {"class_type": "LatentUpscale", "inputs": {"samples": ["3", 0]}}
    found = read_graph(circle)
    assert "prompt" not in found.settings and len(found.loras) == 2
    itself = {
        "1": {
            "class_type": "KSampler",
            "inputs": {name: ["1", 0] for name in ("positive", "model", "latent_image", "seed", "images")},
        }
    }
    assert read_graph(itself).settings == {}
    long = {
        str(i): {"class_type": "Save" * 9999, "inputs": {"images": [str(i + 1), 0]}} for i in range(20_000)
    }
    assert "15000 of 20000 nodes can't be read" in read_graph(long).notes
    wide = {"0": {"class_type": "SaveImage", "inputs": {f"i{i}": [str(i), 0] for i in range(4000)}}}
    wide |= {str(i): {"class_type": f"K{i}", "inputs": {"images": ["0", 0]}} for i in range(1, 4000)}
    assert len(" ".join(read_graph(wide).notes)) < 2000
    typed = graph(
        n3={"class_type": "KSampler", "inputs": {
            "seed": float("nan"), "steps": "30", "cfg": [1, 2, 3], "sampler_name": {"a": 1}, "scheduler": 5,
            "denoise": True, "model": ["4", 0], "positive": ["6", "x"], "negative": [None, 0],
            "latent_image": ["5", 0]}},
        n4={"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": ["4", 0]}},
        n5={"class_type": "EmptyLatentImage", "inputs": {"width": -5, "height": 10**200, "batch_size": "many"}},
        n6={"class_type": 5, "inputs": []},
        n7={"class_type": "x", "inputs": None},
    )  # fmt: skip
    found = read_graph(typed)
    assert found.settings == {"num_inference_steps": 30} and found.model is None
    for said in ("seed is nan", "width is -5", "height is of about 200 digits", "the schedule 5"):
        assert any(said in note for note in found.notes), (said, found.notes)
    with pytest.raises(UserError, match="nested too deeply"):
        infotext_in({"prompt": '{"a":' * 200_000})
    with pytest.raises(UserError, match="not valid JSON"):
        infotext_in({"prompt": "{" + "1" * 10_000})
    with pytest.raises(UserError, match="a number of 100000 digits"):
        infotext_in({"invokeai_metadata": '{"seed": ' + "1" * 100_000 + "}"})
    assert infotext_in({"prompt": "a cat"}) is None and infotext_in({}) is None
    assert infotext_in({"workflow": "{"}) is not None


def test_any_damage_is_a_note_or_a_line() -> None:
    """Values of all kinds in all places, and texts with bytes changed: nothing else than UserError is raised."""
    rng = random.Random(0)
    odd: list[Any] = [
        None,
        True,
        -1,
        1e308,
        float("inf"),
        "",
        "9" * 400,
        "\ud800",
        [],
        ["3", 0],
        [["3"]],
        {},
        {"3": 1},
        2**200,
    ]
    metadata = {
        "positive_prompt": "a",
        "model": {"name": "b", "hash": "c"},
        "loras": [{"lora": {"model_name": "x"}, "weight": 1}],
        "seed": 3,
        "scheduler": "euler_a",
        "strength": 0.5,
    }
    params = {"prompt": "a", "loras": ["a"], "loraweights": [1], "seed": 3, "sampler": "euler", "model": "m"}
    makers = (
        lambda: {"prompt": json.dumps(spoiled(graph(), odd, rng))},
        lambda: {"invokeai_metadata": json.dumps(spoiled(metadata, odd, rng))},
        lambda: {"parameters": json.dumps({"sui_image_params": spoiled(params, odd, rng)})},
        lambda: {"parameters": damaged(A1111, rng)},
    )
    read = 0
    for _ in range(400):
        for make in makers:
            try:
                found = infotext_in(make())
            except UserError as error:  # the whole is no object any more
                assert "where an object with named entries was expected" in str(error)
                continue
            if found is None:  # the graph is no longer one
                continue
            read += 1
            again = Recipe.parse(to_dict(found.recipe()), "the picture")
            assert again == found.recipe()
            assert all(note.isprintable() and len(note) < 1000 for note in found.notes)
    assert read > 1400


def spoiled(value: Any, odd: list[Any], rng: random.Random) -> Any:
    """The value with some of its parts in place of others."""
    if rng.random() < 0.04:
        return rng.choice(odd)
    if isinstance(value, dict):
        return {key: spoiled(each, odd, rng) for key, each in value.items()}
    return [spoiled(each, odd, rng) for each in value] if isinstance(value, list) else value


def damaged(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 12)):
        place = rng.randrange(len(text))
        text = (
            text[:place]
            + rng.choice(['"', ":", ",", "\n", "\\", "\0", "<lora:", "9" * 50, "\ud800", ""])
            + text[place + 1 :]
        )
    return text

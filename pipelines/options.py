"""The options of `ldm-generate`."""

import argparse
from pathlib import Path
from typing import Any

from ldm import __version__
from ldm.console import Parser
from ldm.errors import UserError

_EXAMPLES = """\
examples:
  %(prog)s "a raccoon astronaut"
  %(prog)s "a raccoon astronaut" --upscale 4           512 pixels of the bundled model's 128
  %(prog)s "a fox" "an owl" --num-images 4 --seed 0 --grid outputs/grid.png
  %(prog)s --file prompts.jsonl --batch-size 8         a row: {"prompt": "a fox", "seed": 7, "guidance_scale": 3}
  %(prog)s --model path/to/sd15.safetensors "a castle" --sampler dpmpp_2m --steps 25
  %(prog)s "a castle" --model sd15.safetensors --lora style.safetensors:0.8 --lora more.safetensors
  %(prog)s "a fox in the snow" --image fox.png --strength 0.6
  %(prog)s "a fox with a hat" --image fox.png --mask hat.png             white is drawn anew
  %(prog)s "a castle" --model sd15.safetensors --control edges.png:controlnet-canny:0.8
  %(prog)s "a (red:1.3) castle, [day:night:0.5]" --prompt-syntax a1111
  %(prog)s "a fox" --interpolate 1,2 --out fox.gif       on the way from seed 1's picture to seed 2's
  %(prog)s --from-image outputs/0003-a-fox.png         draws that picture again
"""
# What is said of how a model is loaded, beside its name, precision and device: of `from_pretrained`, by its names.
LOADING = ("variant", "prediction_type", "fast", "low_memory", "backend", "quantization")
_PICTURE, _CONTROL, _LARGER = "from a picture", "control and image prompts", "large pictures"
_APPROXIMATE = "faster, and approximate (see docs/speed.md)"
# The options that are settings of a recipe: group, flag, Recipe's name, type or choices, help.
_SETTINGS: tuple[tuple[str | None, str, str, Any, str], ...] = (
    (None, "--negative-prompt", "negative_prompt", str, "what the picture should not show"),
    (
        None,
        "--seed",
        "seed",
        int,
        "the seed of each prompt's first picture; its next ones count up (default: random)",
    ),
    (None, "--steps", "num_inference_steps", int, "sampling steps (default: the model's own)"),
    (
        None,
        "--guidance-scale",
        "guidance_scale",
        float,
        "how closely to follow the prompt; 1 is unguided",
    ),
    (None, "--sampler", "sampler", str, "the solver, in place of the model's own, e.g. dpmpp_2m"),
    (
        None,
        "--schedule",
        "schedule",
        str,
        "the spacing of noise levels, e.g. karras (the same range with every sampler), trailing",
    ),
    (None, "--height", "height", int, "pixels"),
    (None, "--width", "width", int, "pixels"),
    (None, "--guidance-rescale", "guidance_rescale", float, "0 to 1, against over-exposure"),
    (
        None,
        "--clip-guidance-scale",
        "clip_guidance_scale",
        float,
        "how strongly a CLIP pulls towards the prompt (default 0)",
    ),
    (
        _APPROXIMATE,
        "--token-merging",
        "token_merging",
        float,
        "share of tokens that self-attention sees merged, 0 (exact) to 0.75",
    ),
    (
        _APPROXIMATE,
        "--feature-reuse",
        "feature_reuse",
        int,
        "compute all of the U-Net at every N-th step only (default 1, exact)",
    ),
    (None, "--eta", "eta", float, "noise of ddim, 0 to 1"),
    (None, "--clip-skip", "clip_skip", int, "how many more of CLIP's last layers to leave out"),
    (
        None,
        "--prompt-syntax",
        "prompt_syntax",
        ("plain", "a1111", "comfyui", "compel"),
        "how weights of words are written (default: brackets are text)",
    ),
    (None, "--emphasis", "emphasis", ("original", "no_norm"), "of a1111's weights"),
    (
        _PICTURE,
        "--strength",
        "strength",
        float,
        "how much of --image is drawn anew, 0 to 1 (default 0.8; with --mask 1)",
    ),
    (
        _PICTURE,
        "--resize-mode",
        "resize_mode",
        ("resize", "crop", "fill"),
        "how --image comes to another shape (default: stretched)",
    ),
    (_PICTURE, "--mask-blur", "mask_blur", int, "pixels over which what is drawn fades into the picture"),
    (
        _PICTURE,
        "--mask-content",
        "mask_content",
        ("original", "noise", "fill"),
        "what the masked part begins as",
    ),
    (
        _PICTURE,
        "--padding-mask-crop",
        "padding_mask_crop",
        int,
        "draw only the mask and so many pixels around it",
    ),
    (
        _PICTURE,
        "--outpaint",
        "outpaint",
        "box",
        "pixels to add: LEFT,TOP,RIGHT,BOTTOM",
    ),
    (
        _PICTURE,
        "--outpaint-feathering",
        "outpaint_feathering",
        int,
        "pixels of the old picture that are drawn anew too, fading",
    ),
    (_LARGER, "--hires-scale", "hires_scale", float, "draw it, then draw it again so many times larger"),
    (_LARGER, "--hires-steps", "hires_steps", int, "of that second pass (default: as many)"),
    (
        _LARGER,
        "--hires-strength",
        "hires_strength",
        float,
        "how much it draws anew (default 0.7; with a network 0.4)",
    ),
    (_LARGER, "--upscale", "upscale", float, "enlarge what was drawn by so many times, e.g. 4"),
)


def parser() -> Parser:
    """Build the argument parser."""
    parser = Parser(
        prog="ldm-generate",
        description="Draw pictures from prompts on the command line.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    _add_run(parser)
    add_model(parser)
    add_settings(parser)
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that are settings of pictures: `settings_of` reads them."""
    groups = {name: parser.add_argument_group(name) for name in (_PICTURE, _CONTROL, _LARGER, _APPROXIMATE)}
    _add_pictures(groups[_PICTURE])
    _add_control(groups[_CONTROL])
    for group, flag, name, kind, text in _SETTINGS:
        how: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        if kind == "box":
            how = {"type": str, "metavar": "L,T,R,B"}
        (parser if group is None else groups[group]).add_argument(flag, dest=name, help=text, **how)
    parser.add_argument("--clip-model", metavar="FOLDER", help="that CLIP (default: the bundled one)")
    for flag, text in (
        ("--upscaler", "an ESRGAN network (.pth, .safetensors) for --upscale (default: the bundled one)"),
        ("--hires-upscaler", "what enlarges before the second pass: latent (the default), bundled or a file"),
    ):
        groups[_LARGER].add_argument(flag, metavar="PATH", help=text)


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--file",
        type=Path,
        help="prompts from a file: one a line, or .jsonl, .csv, .parquet with settings a row",
    )
    add(
        "--from-image",
        type=Path,
        metavar="PNG",
        help="draw a picture again: one of this program's, or of AUTOMATIC1111's, ComfyUI's, InvokeAI's, SwarmUI's",
    )
    add(
        "--trust",
        action="append",
        nargs="?",
        const="\0",  # trust.ANYWHERE
        metavar="FOLDER",
        help="load what the picture of --from-image names where it lies in this folder (alone: anywhere on this disk)",
    )
    add("--num-images", type=int, default=1, metavar="N", help="pictures of each prompt (default 1)")
    add("--batch-size", type=int, default=1, metavar="N", help="pictures drawn at once (default 1)")
    add("--out", type=Path, metavar="PATH", help="a .png for one picture, else a folder (outputs)")
    add("--grid", type=Path, metavar="PNG", help="also put all pictures on one sheet")
    add(
        "--preview",
        type=Path,
        metavar="PNG",
        help="a picture that shows how the drawing gets on, written over after each step",
    )
    add(
        "--interpolate",
        metavar="A,B[,...]",
        help="pictures on the way from seed A to seed B, or between two picture files: --out is a strip (.png) or an "
        "animation (.gif, .webp)",
    )
    add(
        "--frames",
        type=int,
        metavar="N",
        help="of --interpolate, from each to the next (default 8)",
    )
    add(
        "--interpolation",
        choices=("slerp", "lerp"),
        help="the way between two noises: on the sphere (default), or straight",
    )
    add("--columns", type=int, metavar="N", help="of the grid (default: --num-images, or squarest)")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what draws, and how it gets on."""
    add = parser.add_argument
    add("--model", help="a diffusers folder, a single file or a hub id (default: the bundled model)")
    add("--infotext", action="store_true", help="also write AUTOMATIC1111's text into each picture")
    add(
        "--lora",
        action="append",
        metavar="PATH[:WEIGHT]",
        help="a LoRA in diffusers' or kohya's layout (several: once each)",
    )
    add(
        "--lora-folder",
        action="append",
        type=Path,
        metavar="FOLDER",
        help="where the LoRAs are that a prompt names, as <lora:NAME:WEIGHT> of a1111's syntax",
    )
    add(
        "--embedding",
        action="append",
        metavar="PATH",
        help="new words of textual inversion (several: once each)",
    )
    add("--device", help="cpu, cuda, ... (default: what there is)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision (default: bfloat16 on CPUs that are fast with it, else float32)",
    )
    add(
        "--backend",
        choices=("torch", "openvino", "cuda_graphs"),
        default="torch",
        help="what computes, see docs/speed.md: openvino on CPUs, cuda_graphs on GPUs (default: torch)",
    )
    add(
        "--quantization",
        choices=("int8", "fp8"),
        help="the network's weights in a byte each: less memory, approximate",
    )
    add("--variant", help="weights with this word in their file names, e.g. fp16")
    add("--prediction-type", help="epsilon or v_prediction, where a single file does not say")
    add("--fast", action="store_true", help="the model's few-step form, where it has one")
    add("--low-memory", action="store_true", default=None, help="parts rest on the CPU between uses")
    add(
        "--sequential-offload",
        dest="low_memory",
        action="store_const",
        const="sequential",
        help="so does each layer of the network: the least memory, and slow",
    )
    add("--quiet", action="store_true", help="don't tell how it gets on")
    add("--version", action="version", version=__version__)


def _add_pictures(group: Any) -> None:
    group.add_argument("--image", type=Path, metavar="PATH", help="a picture to draw from")
    group.add_argument(
        "--mask", type=Path, metavar="PATH", help="of its size: draw anew what is white, keep the rest"
    )


def _add_control(group: Any) -> None:
    group.add_argument(
        "--control",
        action="append",
        metavar="PATH:MODEL[:SCALE]",
        help="a control picture, and the ControlNet (a folder or file) that is shown it (several: once each)",
    )
    group.add_argument(
        "--preprocess", choices=("canny",), help="find the edges in the control pictures first"
    )
    group.add_argument("--control-start", type=float, help="the share of the steps at which control begins")
    group.add_argument("--control-end", type=float, help="and at which it ends")
    group.add_argument("--guess-mode", action="store_true", help="control without a prompt")
    group.add_argument("--ip-adapter", metavar="PATH[:SCALE]", help="an IP-Adapter, for --ip-image")
    group.add_argument(
        "--ip-image",
        type=Path,
        action="append",
        metavar="PATH",
        help="a picture as a prompt (several: once each)",
    )
    group.add_argument(
        "--image-encoder", metavar="FOLDER", help="of --ip-adapter (default: image_encoder beside it)"
    )


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the options say of a recipe, by Recipe's names; pictures are read. Raises UserError."""
    from dataclasses import replace

    from pipelines.named_files import clip_use, control_use, image_prompt_use, picture_use, upscaler_use

    stated = {name: getattr(arguments, name) for _, _, name, _, _ in _SETTINGS}
    settings = {name: value for name, value in stated.items() if value is not None}
    if arguments.outpaint is not None:
        settings["outpaint"] = _box(arguments.outpaint)
    for name, path in (("image", arguments.image), ("mask_image", arguments.mask)):
        if path is not None:
            settings[name] = picture_use(path, name)
    how = {
        "preprocessor": arguments.preprocess,
        "start": arguments.control_start,
        "end": arguments.control_end,
    }
    how = {name: value for name, value in how.items() if value is not None}
    if arguments.control:
        settings["controls"] = tuple(replace(control_use(each), **how) for each in arguments.control)
    elif how:
        raise UserError("--preprocess, --control-start and --control-end go with --control")
    if arguments.guess_mode:
        settings["guess_mode"] = True
    if (arguments.ip_adapter is None) != (not arguments.ip_image):
        raise UserError("--ip-adapter and --ip-image go together: give both")
    if arguments.image_encoder is not None and arguments.ip_adapter is None:
        raise UserError("--image-encoder is of an IP-Adapter: give --ip-adapter and --ip-image too")
    if arguments.ip_adapter is not None:
        use = image_prompt_use(arguments.ip_adapter, arguments.ip_image, arguments.image_encoder)
        settings["image_prompts"] = (use,)
    if arguments.clip_model is not None:
        settings["clip_model"] = clip_use(arguments.clip_model)
    for name in ("upscaler", "hires_upscaler"):
        if (path := getattr(arguments, name)) is not None:
            settings[name] = upscaler_use(path, name)
    return settings


def _box(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(
            f"--outpaint {text}: give pixels at the left, top, right and bottom, such as 0,0,64,0"
        )
    return tuple(int(part) for part in parts)

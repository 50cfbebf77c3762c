"""What lies in single files besides a system's weights: known passengers, and signs of another kind of model."""

import re
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from ldm.checkpoints.families import FAMILIES, FIRST, UNET, VAE
from ldm.errors import UserError

_TEXT = r"(cond_stage_model|conditioner\.embedders\.[01])"
# What no network needs. Anything else unknown is an error.
_PASSED_OVER = {
    "a second copy of the weights, averaged (EMA)": r"(model_ema|ema_model|ema)\..*|first_stage_model\.model_ema\..*",
    "the noise schedule's tables": r"((model|diffusion|denoiser)\."
    r")?(betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|lvlb_weights|logvar"
    r"|ddim_\w+|alphas_prev|(log_)?sigmas)",
    "marks of the prediction type": r"v_pred|ztsnr",
    "training counters": r"((global|train)_)?steps?|epoch|iterations?|scale_factor|num_updates",
    "the state of a training": r"(opt(im(izers?)?)?(_states?)?|state|lr_schedulers?|schedulers?|callbacks|loops"
    r"|hyper_parameters|hparams|amp_scaling_state|grad_scaler|scaler|rng_states?|random_states?)(\..*)?",
    "what lies beside a model elsewhere": rf"safety_checker\..*|{_TEXT}\.tokenizer(\..*)?",
    "the autoencoder's training loss": r"first_stage_model\.loss\..*|loss\..*",
    "CLIP's scale for comparing with images": rf"{_TEXT}\.((model|transformer)\.)?logit_scale",
    "the causal mask": rf"{_TEXT}\.((model|transformer)\.)*attn_mask",
    "CLIP's vision tower": rf"{_TEXT}\.(model\.|transformer\.)*(vision_model|visual|visual_projection)\..*",
    "learned embeddings of a training (textual inversion)": r"embedding_manager\..*|string_to_(param|token)(\..*)?",
    "the projection of CLIP's text, of which this family has no use": r"(cond_stage_model|conditioner\.embedders\.0)"
    r"\.((model\.)?transformer\.(text_model\.)?)?text_projection(\.weight)?",
}
# Position ids count 0, 1, 2, ...: those of the encoders that are used travel with them, as old folders have them.
_POSITIONS = "position ids, which count 0, 1, 2 and so on, and the like"
_OWN_POSITIONS = rf"{_TEXT}\.(transformer\.(text_model\.)?embeddings\.|(model\.)?)position_ids"

# Signs, anywhere in the names, of models with the names of a Stable Diffusion and something else beside.
_RELATIVES = {
    "edm_vpred.": "CosXL, an SDXL of continuous noise levels (EDM, v-prediction)",
    "edm_mean": "Playground 2.5, an SDXL of continuous noise levels (EDM)",
    "edm_std": "Playground 2.5, an SDXL of continuous noise levels (EDM)",
    "noise_augmentor.": "Stable unCLIP, which is told of pictures by CLIP",
    "embedder.model.visual.": "Stable unCLIP, which is told of pictures by CLIP",
    "control_model.": "a ControlNet",
    "depth_model.": "a depth-to-image model, with its depth estimator",
    "motion_modules.": "AnimateDiff",
}
# What the names of other kinds of file give away, most telling first.
_OTHERS = {
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "single_transformer_blocks.": "Flux",
    **_RELATIVES,
    "lora_": "a LoRA, which goes on top of a model,",
    ".lora": "a LoRA, which goes on top of a model,",
    "controlnet_cond_embedding.": "a ControlNet",
    "down_blocks.": "one network of a diffusers folder (give the folder with model_index.json instead)",
}
_ALONE = {"encoder.down.": "an autoencoder alone", "text_model.": "a text encoder alone"}
# What DistributedDataParallel, torch.compile, FSDP and Lightning put into names, at any place.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module")


def other_model(names: Collection[str], architecture: str = "") -> str:
    """Return what a file is that is no whole Stable Diffusion, by its names, and by what it says of itself; or ""."""
    if found := next((title for sign, title in _OTHERS.items() if any(sign in name for name in names)), ""):
        return found
    if wrapped := _wrappers(names):
        return f"a model in a wrapper of training ({', '.join(wrapped)}), which is taken off where a file is loaded"
    has = {
        "a U-Net": any(name.startswith(UNET) for name in names),
        "an autoencoder": any(name.startswith(VAE) for name in names),
        "a text encoder": any(re.match(_TEXT, name) for name in names),
    }
    there, missing = (
        [part for part, is_there in has.items() if is_there == wanted] for wanted in (True, False)
    )
    if there:
        lacks = f" without {' and '.join(missing)}" if missing else ", but not as in any family that is known"
        return f"{' and '.join(there)}{lacks}"
    if any(name.startswith(("input_blocks.0.0.", "diffusion_model.input_blocks.")) for name in names):
        return "a U-Net without an autoencoder and a text encoder"
    alone = next(
        (title for sign, title in _ALONE.items() if any(name.startswith(sign) for name in names)), ""
    )
    return alone or (f"{architecture!r}, by its own metadata" if architecture else "")


def refuse_relatives(names: Iterable[str], where: object) -> None:
    """Raise UserError for a model with all names of a Stable Diffusion that is drawn with in another way."""
    names = list(names)
    for sign, title in _RELATIVES.items():
        if any(sign in name for name in names):
            raise UserError(f"{where}: this is {title}; such models are not supported")


def unwrapped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return tensors without what training put around their names, and a note where it did.

    Where a file holds a name with and without, nothing is taken off.
    """
    around = _wrappers(tensors)
    before = tuple(each for each in around if each[:-1] not in _WRAPPERS)
    bare: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(before[0]) if before else name
        bare[".".join(piece for piece in short.split(".") if piece not in _WRAPPERS)] = tensor
    if not around or len(bare) != len(tensors):
        return dict(tensors), []
    return bare, [f"taken off from names: {' and '.join(around)}, which training puts there"]


def _wrappers(names: Collection[str]) -> list[str]:
    """What stands around a model's own names: the pieces that wrappers put there, and what is before all of them."""
    pieces = {piece for name in names for piece in name.split(".")}
    found = [f"{each}." for each in _WRAPPERS if each in pieces]
    plain = [".".join(piece for piece in name.split(".") if piece not in _WRAPPERS) for name in names]
    first = next((name for name in plain if name.endswith(f".{FIRST}")), "")
    before = first.removesuffix(FIRST)
    return found + (
        [before] if before and sum(name.startswith(before) for name in plain) > len(plain) / 2 else []
    )


def set_aside(
    tensors: Mapping[str, Tensor], family: str, text_config: Mapping[str, object]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a single file that no network uses, and a note on each kind.

    text_config: of the first text encoder.
    """
    rules = dict(_PASSED_OVER)
    projects = "CLIPTextModelWithProjection" in str(text_config.get("architectures"))
    if family == "sd2" and not projects:
        layers = int(str(text_config["num_hidden_layers"]))
        title = f"text encoder layers after the {layers} that are used, and its projection"
        rules[title] = _beyond(layers, tensors)
    unused: dict[str, Tensor] = {}
    notes: list[str] = []
    for why, rule in rules.items():
        names = [name for name in tensors if re.fullmatch(rule, name)]
        unused |= {name: tensors[name] for name in names}
        notes += [f"not used: {why} ({len(names)} tensors)"] if names else []
    own = re.compile(_OWN_POSITIONS)
    positions = [
        name
        for name in tensors
        if name.endswith(("position_ids", "token_type_ids"))
        and not own.fullmatch(name)
        and name not in unused
    ]
    unused |= {name: tensors[name] for name in positions}
    notes += [f"not used: {_POSITIONS} ({len(positions)} tensors)"] if positions else []
    return unused, notes


def _beyond(layers: int, tensors: Mapping[str, Tensor]) -> str:
    """Return the rule for what SD 2.x keeps of the text tower without ever using it."""
    prefix = re.escape(FAMILIES["sd2"].text["text_encoder"][0])
    numbers = {
        int(found[1])
        for name in tensors
        if (found := re.match(prefix + r"transformer\.resblocks\.(\d{1,4})\.", name))
    }
    late = "|".join(str(number) for number in sorted(numbers) if number >= layers) or "none"
    return prefix + rf"(text_projection|transformer\.resblocks\.({late})\..*)"

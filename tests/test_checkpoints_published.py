"""Single files as people publish them: what they say of themselves, what lies in them besides, what they really are."""

from functools import cache
from pathlib import Path

import pytest
import torch
from test_checkpoints import modules, published, state

from ldm.checkpoints.families import FIRST
from ldm.checkpoints.keymap import KeyMap
from ldm.checkpoints.single_file import _rows, from_tensors
from ldm.errors import UserError


@cache
def named(family: str) -> dict[str, torch.Tensor]:
    """The names and shapes of a published single file, without memory."""
    configs = published(family)
    with torch.device("meta"):
        ours = {name: state(network) for name, network in modules(configs).items()}
        return {
            key: each
            for name, rows in _rows(family, configs).items()
            for key, each in KeyMap.over_ours(rows, ours[name], name).to_theirs(ours[name]).items()
        }


@pytest.mark.parametrize(
    ("family", "metadata", "prediction", "side"),
    [
        ("sdxl", {"prediction_type": "v"}, "v_prediction", 128),
        ("sdxl", {"prediction_type": "epsilon"}, "epsilon", 128),
        ("sdxl", {"predict_key": "v"}, "v_prediction", 128),
        ("sd1", {"prediction_type": "v"}, "v_prediction", 64),
        ("sdxl", {"prediction_type": "v prediction"}, "v_prediction", 128),
        ("sdxl", {"prediction_type": "Noise-Prediction"}, "epsilon", 128),
        ("sdxl", {"architecture": "stable-diffusion-xl-v1-base-v-pred"}, "v_prediction", 128),
        ("sd2", {"prediction_type": "epsilon"}, "epsilon", 64),
        ("sd2", {"architecture": "stable-diffusion-v2-512"}, "epsilon", 64),
        ("sd2", {"architecture": "stable-diffusion-v2-768-v"}, "v_prediction", 96),
        ("sd2", {"architecture": "stable-diffusion-v2-768-v", "prediction_type": "epsilon"}, "epsilon", 64),
        ("sd2", {"prediction_type": "v", "resolution": "512x512"}, "v_prediction", 64),
    ],
)
def test_a_file_is_what_its_metadata_says(family: str, metadata: dict, prediction: str, side: int) -> None:
    header = {f"modelspec.{key}": value for key, value in metadata.items()}
    found = from_tensors(named(family), header, "x")
    assert found.configs["scheduler"]["prediction_type"] == prediction
    assert found.configs["unet"]["sample_size"] == side
    assert found.notes == []
    other = {"v_prediction": "epsilon", "epsilon": "v_prediction"}[prediction]
    asked = from_tensors(named(family), header, "x", prediction_type=other)
    assert asked.configs["scheduler"]["prediction_type"] == other and asked.notes == []


def test_what_metadata_says_and_nobody_understands_is_told() -> None:
    found = from_tensors(named("sdxl"), {"modelspec.prediction_type": "wavelets"}, "x")
    assert found.configs["scheduler"]["prediction_type"] == "epsilon"
    assert "predicts 'wavelets', which is not known" in found.notes[0]
    for other in ("flow", "EDM", "rectified flow"):
        with pytest.raises(UserError, match=r"another way of denoising .*--prediction-type"):
            from_tensors(named("sdxl"), {"modelspec.prediction_type": other}, "x")
        from_tensors(named("sdxl"), {"modelspec.prediction_type": other}, "x", prediction_type="epsilon")
    with pytest.raises(UserError, match="this is 'Flux-1-dev', by its own metadata"):
        from_tensors({"a.b": torch.zeros(1)}, {"modelspec.architecture": "Flux-1-dev"}, "x")


LDM_V = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    scale_factor: 0.2
    zero_snr: true
"""
SGM = """
model:
  target: sgm.models.diffusion.DiffusionEngine
  params:
    scale_factor: 0.13025
    denoiser_config:
      target: sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser
      params:
        num_idx: 1000
        scaling_config: {target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling}
        discretization_config: {target: sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization}
"""


@pytest.mark.parametrize(
    ("family", "text", "ending"), [("sd1", LDM_V, ".yaml"), ("sd2", LDM_V, ".yml"), ("sdxl", SGM, ".yaml")]
)
def test_a_config_beside_the_file_is_read(tmp_path: Path, family: str, text: str, ending: str) -> None:
    path = tmp_path / "model.v2.safetensors"
    path.with_suffix(ending).write_text(text)
    found = from_tensors(named(family), {}, path)
    scheduler = found.configs["scheduler"]
    assert scheduler["prediction_type"] == "v_prediction" and found.notes == []
    assert scheduler.get("rescale_betas_zero_snr", False) == (text == LDM_V)
    if text == LDM_V:
        assert scheduler["timestep_spacing"] == "trailing", "a last timestep of noise alone has to be visited"
        assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)
        assert found.configs["vae"]["scaling_factor"] == 0.2
    told = from_tensors(named(family), {"modelspec.prediction_type": "epsilon"}, path)
    assert told.configs["scheduler"]["prediction_type"] == "v_prediction"
    assert "which counts; elsewhere it is epsilon" in told.notes[0]
    path.with_suffix(ending).write_text("train: {lr: 1}")
    assert "is no config of LDM or sgm" in from_tensors(named(family), {}, path).notes[0]
    for text in ("model: [", "- a list"):
        path.with_suffix(ending).write_text(text)
        assert "passed over" in from_tensors(named(family), {}, path).notes[0]


def test_numbers_and_answers_of_a_config_beside_are_taken_at_their_word(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    lines = "linear_start: '0.001', linear_end: .nan, timesteps: 500.0, scale_factor: abc, zero_snr: 'no'"
    path.with_suffix(".yaml").write_text(f"model: {{params: {{{lines}, beta_schedule: cosine}}}}")
    found = from_tensors(named("sd1"), {}, path)
    scheduler = found.configs["scheduler"]
    assert scheduler["beta_start"] == 0.001 and scheduler["beta_end"] == 0.012
    assert scheduler["num_train_timesteps"] == 500 and isinstance(scheduler["num_train_timesteps"], int)
    assert scheduler["beta_schedule"] == "squaredcos_cap_v2" and not scheduler.get("rescale_betas_zero_snr")
    assert [
        note for note in found.notes if "linear_end is 'nan'" in note or "scale_factor is 'abc'" in note
    ] == found.notes


PASSENGERS = {
    "sd1": (
        "cond_stage_model.transformer.vision_model.embeddings.position_ids",
        "cond_stage_model.transformer.vision_model.encoder.layers.0.mlp.fc1.weight",
        "cond_stage_model.transformer.visual_projection.weight",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.transformer.logit_scale",
        "cond_stage_model.logit_scale",
        "cond_stage_model.text_projection",
        "cond_stage_model.transformer.text_model.text_projection.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_type_ids",
        "cond_stage_model.attn_mask",
        "cond_stage_model.tokenizer.x",
        "safety_checker.concept_embeds",
        "sigmas",
        "state.0.exp_avg",
        "opt_state.x",
        "train_step",
        "rng_state",
        "embedding_manager.embedder.transformer.text_model.embeddings.position_ids",
        "embedding_manager.string_to_param_dict.*",
        "optimizer_states.0.state.12.exp_avg",
        "optimizer.state.3",
        "model_ema.decay",
        "betas",
        "global_step",
    ),
    "sd2": (
        "cond_stage_model.model.visual.conv1.weight",
        "cond_stage_model.model.logit_scale",
        "cond_stage_model.model.attn_mask",
        "cond_stage_model.model.transformer.text_model.embeddings.position_ids",
    ),
    "sdxl": (
        "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.visual.ln_pre.weight",
        "conditioner.embedders.0.transformer.text_projection.weight",
        "denoiser.sigmas",
    ),
}


@pytest.mark.parametrize(("family", "name"), [(f, name) for f, names in PASSENGERS.items() for name in names])
def test_known_passengers_are_passed_over_and_told(family: str, name: str) -> None:
    plain = from_tensors(named(family), {}, "x")
    found = from_tensors({**named(family), name: torch.zeros(1)}, {}, "x")
    assert list(found.unused) == [name]
    assert len(found.notes) == len(plain.notes) + 1 and found.notes[-1].startswith("not used: ")
    assert {k: v.keys() for k, v in found.tensors.items()} == {k: v.keys() for k, v in plain.tensors.items()}


def test_own_position_ids_travel_on() -> None:
    own = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    found = from_tensors({**named("sd1"), own: torch.arange(77)[None]}, {}, "x")
    assert "text_model.embeddings.position_ids" in found.tensors["text_encoder"] and not found.unused


@pytest.mark.parametrize(
    ("family", "name", "said"),
    [
        ("sdxl", "edm_vpred.sigma_max", "CosXL"),
        ("sdxl", "edm_mean", "Playground 2.5"),
        ("sd2", "noise_augmentor.data_mean", "unCLIP"),
        ("sd2", "embedder.model.visual.proj", "unCLIP"),
        ("sd1", "control_model.zero_convs.0.0.weight", "ControlNet"),
    ],
)
def test_relatives_with_all_names_of_a_family_are_called_by_name(family: str, name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"this is .*{said}"):
        from_tensors({**named(family), name: torch.zeros(1)}, {}, "x")


def test_parts_of_a_model_are_told_by_what_they_hold() -> None:
    whole = named("sd1")
    for lacks, said in (
        ("cond_stage", "a U-Net and an autoencoder without a text encoder"),
        ("first_stage", "no vae inside"),
        ("model.diff", "an autoencoder and a text encoder without a U-Net"),
    ):
        with pytest.raises(UserError, match=said):
            from_tensors({name: each for name, each in whole.items() if not name.startswith(lacks)}, {}, "x")
    for before in ("state_dict.", "model.", "pipe.", "_forward_module.", "ddp.unet."):
        with pytest.raises(UserError, match="in a wrapper of training"):
            from_tensors({before + name: each for name, each in whole.items()}, {}, "x")
    bare = {name.removeprefix("model.diffusion_model."): each for name, each in whole.items()}
    with pytest.raises(UserError, match="a U-Net without an autoencoder and a text encoder"):
        from_tensors({name: each for name, each in bare.items() if name.startswith("input_blocks.")}, {}, "x")


def test_the_refiner_of_sdxl_says_what_its_folder_says() -> None:
    """As published: the second text encoder alone, in the first one's place, with CLIP's scale beside it."""
    place = "conditioner.embedders.0.model."
    single = named("sdxl_refiner") | {place + "logit_scale": torch.zeros(())}
    assert place + "text_projection" in single
    header = {"modelspec.architecture": "stable-diffusion-xl-v1-refiner"}
    found = from_tensors(single, header, "x")
    assert found.pipeline == "StableDiffusionXLImg2ImgPipeline"
    assert found.options == {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
    assert found.notes == ["not used: CLIP's scale for comparing with images (1 tensors)"]
    assert sorted(found.tensors) == ["text_encoder_2", "unet", "vae"]
    wide = single | {FIRST: torch.empty(384, 9, 3, 3, device="meta")}
    assert from_tensors(wide, {}, "x").pipeline == "StableDiffusionXLInpaintPipeline"
    with pytest.raises(
        UserError, match="names as in Stable Diffusion XL's refiner, but its U-Net is 320 channels"
    ):
        from_tensors(single | {FIRST: torch.empty(320, 4, 3, 3, device="meta")}, {}, "x")

"""Adapters as peft itself saves them, files and folders, against peft's own networks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_lora import ATTENTION, close, inputs, our_unet, randomized
from safetensors.torch import save_file
from tiny import clip_model
from torch import Tensor

from ldm.checkpoints.lora import read_lora, read_lora_file
from ldm.errors import UserError
from ldm.models.lora import LoRA

TARGETS = ["to_q", "to_out.0", "conv1", "conv_shortcut"]
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "alphas": (
        "LoraConfig",
        {
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {r"mid_block.*\.to_q": 2, "conv1": 3},
            # Peft sorts its config's keys, so that the first pattern in the file is the first by the alphabet.
            "alpha_pattern": {
                "(to_out.0|conv_shortcut)": 9,
                r"^down_blocks\.0\.resnets\.0\.conv1": 20,
                "attn1.to_q": 1,
            },
        },
    ),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 2, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "biases": ("LoraConfig", {"r": 4, "bias": "lora_only", "modules_to_save": ["conv_in"]}),
    "all biases": ("LoraConfig", {"r": 4, "bias": "all"}),
    "lora_bias": ("LoraConfig", {"r": 4, "lora_alpha": 6, "lora_bias": True}),
    "LoHa": ("LoHaConfig", {"r": 4, "alpha": 6}),
    "LoHa, Tucker": ("LoHaConfig", {"r": 4, "alpha": 6, "use_effective_conv2d": True}),
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 6, "decompose_both": True, "decompose_factor": 4}),
    "LoKr, Tucker": ("LoKrConfig", {"r": 2, "alpha": 6, "use_effective_conv2d": True}),
    "LoKr, whole": ("LoKrConfig", {"r": 64, "alpha": 16, "rank_pattern": {"to_q": 32}}),
    "IA3": ("IA3Config", {"feedforward_modules": ["conv1", "to_out.0"]}),
}


@pytest.mark.parametrize("case", list(PEFT))
def test_pefts_own_folders(tmp_path: Path, case: str) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = our_unet()
    kind, settings = PEFT[case]
    targets = ["conv1"] if case == "lora_bias" else TARGETS  # only layers that have a bias
    wrapped = peft.get_peft_model(theirs, getattr(peft, kind)(target_modules=targets, **settings))
    randomized(wrapped).save_pretrained(tmp_path / "unet")
    x = inputs()
    plain = ours(*x)
    with torch.no_grad():
        expected = wrapped(x[0], x[1], x[2].text).sample
    before = {name: each.clone() for name, each in ours.state_dict().items()}
    for path in (tmp_path, tmp_path / "unet", tmp_path / "unet" / "adapter_model.safetensors"):
        found = read_lora_file(path, {"unet": ours})
        assert not found.notes
    adapter = LoRA.from_weights(ours, found.adapters["unet"])
    assert (expected - plain).norm() > 0.01 * plain.norm()
    close(ours(*x), expected)
    adapter.weight = 0.0
    assert torch.equal(ours(*x), plain)
    adapter.weight = 0.5
    half = ours(*x)
    adapter.merge()
    close(ours(*x), half)
    adapter.weight = 1.0
    close(ours(*x), expected)
    adapter.detach()
    assert all(torch.equal(each, before[name]) for name, each in ours.state_dict().items())
    assert not any("_merged" in key for module in ours.modules() for key in vars(module))


def test_pefts_text_encoders(tmp_path: Path) -> None:
    """A folder for each component, names without `text_model.`, and which of two encoders is meant."""
    peft = pytest.importorskip("peft")
    encoders = {"text_encoder": clip_model(), "text_encoder_2": clip_model(projection=True, seed=2)}
    ids = torch.arange(6)[None]
    expected: dict[str, Tensor] = {}
    for name, encoder in encoders.items():
        kind = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "fc1"])
        wrapped = randomized(peft.get_peft_model(encoder, kind))
        wrapped.save_pretrained(tmp_path / name)
        expected[name] = wrapped(ids, output_hidden_states=True).hidden_states[-2]
    fresh = {"text_encoder": clip_model(), "text_encoder_2": clip_model(projection=True, seed=2)}
    found = read_lora(tmp_path, fresh)
    for name, encoder in fresh.items():
        LoRA.from_weights(encoder, found[name])
        close(encoder(ids, output_hidden_states=True).hidden_states[-2], expected[name])
        assert list(read_lora(tmp_path / name / "adapter_model.safetensors", fresh)) == [name]
    (tmp_path / "text_encoder").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="fits text_encoder and text_encoder_2: put it into a folder"):
        read_lora(tmp_path / "elsewhere", fresh)
    assert list(read_lora(tmp_path / "elsewhere", {"text_encoder": fresh["text_encoder"]})) == [
        "text_encoder"
    ]
    longer = fresh | {"text_encoder": clip_model(layers=2)}  # has no third layer
    assert list(read_lora(tmp_path / "elsewhere", longer)) == ["text_encoder_2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("{", "adapter_config.json is not valid JSON"),
        ("[1]", "adapter_config.json holds a list"),
        ('{"lora_alpha": "x"}', "lora_alpha is 'x'"),
        ('{"lora_alpha": NaN}', "no finite number"),
        ('{"alpha_pattern": [1]}', "alpha_pattern is no mapping"),
        ('{"alpha_pattern": {"(a+)+b": 1}}', "too involved"),
        ('{"alpha_pattern": {"' + "(d|d)" * 30 + '!": 1}}', "too involved"),
        ('{"alpha_pattern": {"' + ".*" * 9 + '!": 1}}', "too involved"),
        ('{"alpha_pattern": {"' + "(" * 90 + '": 1}}', "no regular expression"),
        (json.dumps({"alpha_pattern": {f"{k}.*": 1 for k in range(9)}}), "9 regular expressions"),
        ('{"peft_type": "VERA"}', "peft_type is 'VERA'"),
        ('{"init_lora_weights": "pissa_niter_4"}', "changed the model's own weights"),
        ('{"use_qalora": true}', "says use_qalora"),
        ('{"use_dora": true}', "lora_magnitude_vector is missing"),
    ],
)
def test_configs_of_pefts_that_cannot_be_done(tmp_path: Path, change: str, words: str) -> None:
    unet, _ = our_unet()
    pair = {"lora_A": torch.ones(2, 64), "lora_B": torch.ones(64, 2)}
    save_file(
        {f"base_model.model.{ATTENTION}.to_q.{half}.weight": each for half, each in pair.items()},
        tmp_path / "adapter_model.safetensors",
    )
    assert "no adapter_config.json beside it" in read_lora_file(tmp_path, {"unet": unet}).notes[0]
    (tmp_path / "adapter_config.json").write_text(change)
    with pytest.raises(UserError, match=words) as error:
        read_lora(tmp_path, {"unet": unet})
    assert "adapter_config.json" in str(error.value) and "\n" not in str(error.value)

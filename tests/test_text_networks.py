"""Our text networks against transformers', with the same weights.

Margins: a state is a sum of some hundred products of numbers around 1 in float32, each of them exact to 6e-8; in which
order they are summed is the processor's.
"""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn

from ldm.checkpoints.files import read_tensors
from ldm.checkpoints.layouts import canonical_clip
from ldm.conditioning.load import load_text_encoder
from ldm.errors import UserError
from ldm.models.bert import BertConfig, BertModel
from ldm.models.clip_text import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from ldm.models.layers import recompute_activations
from ldm.models.text import TextNetwork
from ldm.system import System

IDS = torch.tensor([[3, 40, 60, 7, 519, 1, 1, 1], [5, 519, 9, 30, 31, 32, 33, 34]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1, 1, 1]])


def close(ours: Tensor | None, theirs: Tensor | None, margin: float = 5e-6) -> None:
    assert ours is not None and theirs is not None
    torch.testing.assert_close(ours, theirs, rtol=margin, atol=margin)


def pair(theirs: Any, **changes: Any) -> tuple[Any, Any]:
    """A network of transformers, and ours with its settings and weights."""
    ours = {
        "CLIPTextModel": CLIPTextModel,
        "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
        "BertModel": BertModel,
    }[type(theirs).__name__]
    network = ours(ours.config_type.read(theirs.config.to_dict() | changes))
    network.load_state_dict(canonical_clip(theirs.state_dict()))
    return network.eval(), theirs


def clip(**settings: Any) -> tuple[Any, Any]:
    theirs = tiny.clip_model(**settings)
    return pair(theirs)


NETWORKS = {
    "clip": lambda: clip(),
    "projection": lambda: clip(projection=True, act="gelu"),
    "bert": lambda: pair(tiny.bert_model()),
}


def ids_for(network: Any) -> Tensor:
    return IDS % network.config.vocab_size


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_state_is_transformers(name: str, mask: Tensor | None) -> None:
    ours, theirs = NETWORKS[name]()
    ids = ids_for(ours)
    with torch.no_grad():
        found = ours(ids, attention_mask=mask, output_hidden_states=True)
        wanted = theirs(ids, attention_mask=mask, output_hidden_states=True)
        assert ours(ids, mask).hidden_states is None
    assert len(found.hidden_states) == len(wanted.hidden_states)
    for mine, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
        close(mine, other)
    close(found.last_hidden_state, wanted.last_hidden_state)
    close(found[0], wanted[0])
    if name == "projection":
        close(found.text_embeds, wanted.text_embeds)
    else:
        close(found.pooler_output, wanted.pooler_output)


@pytest.mark.parametrize("eos", [2, 519, 33])
def test_the_pooled_state_is_that_of_the_texts_end(eos: int) -> None:
    """Of the first end token; 2 stands for the highest id, and where there is no end token it is the first token's."""
    theirs = tiny.clip_model()
    theirs.eos_token_id = theirs.config.eos_token_id = eos
    ours, _ = pair(theirs)
    found = ours(IDS)
    place = {2: [4, 1], 519: [4, 1], 33: [0, 6]}[eos]
    close(found.pooler_output, theirs(IDS).pooler_output)
    assert torch.equal(found.pooler_output, found.last_hidden_state[torch.arange(2), place])


def test_bert_reads_types_of_tokens() -> None:
    ours, theirs = NETWORKS["bert"]()
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0] * 8])
    close(ours(ids_for(ours), token_type_ids=types)[0], theirs(ids_for(ours), token_type_ids=types)[0])


ACTIVATIONS = (
    "gelu gelu_fast gelu_new gelu_python gelu_pytorch_tanh leaky_relu linear mish quick_gelu relu relu6"
)


@pytest.mark.parametrize("act", [*ACTIVATIONS.split(), "sigmoid", "silu", "swish", "tanh"])
def test_every_activation_is_transformers(act: str) -> None:
    ours, theirs = clip(act=act, layers=1)
    close(ours(IDS)[0], theirs(IDS)[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_transformers(name: str) -> None:
    ours, theirs = NETWORKS[name]()
    for network in (ours, theirs):
        output = network(ids_for(ours), attention_mask=MASK)
        (output.last_hidden_state.square().mean() + output[0].sum() / 100).backward()
    wanted = canonical_clip(
        {key: each.grad for key, each in theirs.named_parameters() if each.grad is not None}
    )
    found = {key: each.grad for key, each in ours.named_parameters() if each.grad is not None}
    assert found.keys() == wanted.keys() and len(found) > 20
    for key, each in found.items():
        torch.testing.assert_close(each, wanted[key], rtol=1e-4, atol=1e-5 * float(wanted[key].abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_in_training_transformers_drops_the_same(name: str) -> None:
    """By one generator: dropout stands at the same places, in the same order."""
    ours, theirs = NETWORKS[name]()
    if name != "bert":
        theirs.config.attention_dropout = 0.3
        for part in theirs.modules():
            if type(part).__name__ == "CLIPAttention":
                part.dropout = 0.3
        ours, _ = pair(theirs)
    states: list[Tensor] = []
    for network in (ours.train(), theirs.train()):
        torch.manual_seed(0)
        states.append(network(ids_for(ours), attention_mask=MASK).last_hidden_state)
    close(*states)
    assert not torch.allclose(states[0], ours.eval()(ids_for(ours), attention_mask=MASK).last_hidden_state)


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_loses_no_more_than_it_must(name: str) -> None:
    ours, theirs = NETWORKS[name]()
    with torch.no_grad():
        exact = ours(ids_for(ours), attention_mask=MASK).last_hidden_state
        errors = [
            (network.bfloat16()(ids_for(ours), attention_mask=MASK).last_hidden_state.float() - exact).abs()
            for network in (ours, theirs)
        ]
    # Both round to 8 binary places at about thirty places, in another order.
    assert errors[0].mean() < 2 * errors[1].mean() and errors[0].max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputed_activations_give_the_same_gradient(name: str) -> None:
    ours, _ = NETWORKS[name]()
    again = copy.deepcopy(ours)
    recompute_activations(again)
    calls: list[int] = []
    block = next(each for each in again.modules() if isinstance(each, type(again).block_types))
    next(each for each in block.modules() if isinstance(each, nn.Linear)).register_forward_hook(
        lambda *_: calls.append(1)
    )
    for network in (ours, again):
        network(ids_for(ours)).last_hidden_state.square().mean().backward()
    assert len(calls) == 2  # forth, and again on the way back
    for mine, other in zip(ours.parameters(), again.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        assert mine.grad is None or torch.allclose(mine.grad, other.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_and_a_pickle_compute_the_same(name: str) -> None:
    ours, _ = NETWORKS[name]()
    wanted = ours.requires_grad_(False)(ids_for(ours))[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(ids_for(ours))[0], wanted)
        assert other.config == ours.config and other.dtype == torch.float32 and other.device.type == "cpu"


def test_another_table_is_looked_into() -> None:
    for make in NETWORKS.values():
        ours, theirs = make()
        assert ours.get_input_embeddings().weight.equal(theirs.get_input_embeddings().weight)
        table = nn.Embedding(*ours.get_input_embeddings().weight.shape)
        for network in (ours, theirs):
            network.set_input_embeddings(table)
        assert ours.get_input_embeddings() is table
        close(ours(ids_for(ours))[0], theirs(ids_for(ours))[0])


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "bert"])
def test_a_saved_folder_is_that_which_was_read(tmp_path: Path, family: tiny.Family) -> None:
    folder = tiny.tiny_pipeline_folder(tmp_path / "made", family)
    System.load(folder).save(tmp_path / "saved")
    for part in sorted(each.name for each in folder.glob("text_encoder*")):
        before, after = (
            read_tensors(each / part / "model.safetensors") for each in (folder, tmp_path / "saved")
        )
        before = canonical_clip(before)
        assert before.keys() == after.keys() and all(
            torch.equal(each, after[key]) for key, each in before.items()
        )
        told, kept = (
            json.loads((each / part / "config.json").read_text()) for each in (folder, tmp_path / "saved")
        )
        nothing = {"transformers_version", "is_decoder", "add_cross_attention", "classifier_dropout"}
        assert {key: each for key, each in told.items() if key not in nothing}.items() <= kept.items()
        kind = getattr(transformers, kept["architectures"][0])
        theirs, report = kind.from_pretrained(tmp_path / "saved" / part, output_loading_info=True)
        assert not any(report.values())
        ids = IDS % theirs.config.vocab_size
        close(
            load_text_encoder(tmp_path / "saved", part, part.replace("text_encoder", "tokenizer")).module(
                ids
            )[0],
            theirs(ids)[0],
        )


@pytest.mark.parametrize("family", ["sd1", "sdxl", "bert"])
def test_diffusers_draws_with_our_networks_and_tokenizers(tmp_path: Path, family: tiny.Family) -> None:
    import diffusers

    folder = tiny.tiny_pipeline_folder(tmp_path, family)
    encoder = System.load(folder).text
    parts = {
        **encoder.modules,
        **{name.replace("text_encoder", "tokenizer"): each for name, each in encoder.tokenizers.items()},
    }
    pictures: list[Any] = []
    for given in ({}, parts):
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
        pipe.register_modules(**given)
        pipe.set_progress_bar_config(disable=True)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        said: dict[str, Any] = {"num_inference_steps": 2, "latents": noise, "output_type": "np"}
        pictures.append(pipe("a cat, the dog", negative_prompt="", clip_skip=None, **said).images)
    # A step multiplies what the networks are told by their weights some dozen times.
    torch.testing.assert_close(torch.tensor(pictures[1]), torch.tensor(pictures[0]), rtol=0, atol=1e-4)


# Mistakes


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (CLIPTextConfig, {"hidden_act": "nothing"}, "hidden_act is 'nothing', where one of gelu, "),
        (CLIPTextConfig, {"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\], where one token"),
        (CLIPTextConfig, {"eos_token_id": None}, "eos_token_id is None"),
        (BertConfig, {"num_attention_heads": 5}, "hidden_size 32 is no multiple of num_attention_heads 5"),
        (BertConfig, {"hidden_act": "nothing"}, "hidden_act is 'nothing'"),
        (BertConfig, {"pad_token_id": 10**6}, "[Pp]adding_idx"),
    ],
)
def test_settings_of_no_network_are_refused(
    tmp_path: Path, kind: type[Any], change: dict[str, Any], words: str
) -> None:
    folder = tiny.tiny_bert_folder(tmp_path) if kind is BertConfig else tiny.tiny_clip_folder(tmp_path)
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"the text encoder refuses the config: .*{words}") as caught:
        load_text_encoder(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_more_tokens_than_positions_are_refused(name: str) -> None:
    ours: TextNetwork = NETWORKS[name]()[0]
    most = ours.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"{most + 1} tokens are more than the {most}"):
        ours(torch.ones(1, most + 1, dtype=torch.long))

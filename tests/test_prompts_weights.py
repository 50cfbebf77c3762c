"""What weights do to hidden states, against each program's formula; prompts that change while a picture is drawn."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_prompts import COMPEL
from tiny import SCHEDULER, WIDTH, tiny_bert_folder, tiny_clip_folder, tiny_pipeline_folder, tiny_t5_folder
from torch import Tensor

from ldm.checkpoints import read_checkpoint
from ldm.condition import Condition, concatenate
from ldm.conditioning.load import load_text_encoder
from ldm.conditioning.prompts.reading import read_prompt
from ldm.conditioning.prompts.weighted import Piece, Prompt, Text, WeightedText
from ldm.conditioning.system import build_conditioning
from ldm.conditioning.text import WindowedEncoder, encode_pair
from ldm.diffusion import guidance
from ldm.diffusion.denoiser import answered
from ldm.diffusion.driver import Noise
from ldm.diffusion.plan import plan
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.scheduler_config import SchedulerConfig
from ldm.errors import UserError
from ldm.sampling import Guidance, prepare, sample
from ldm.system import System

LONG = "the cat, " * 30  # 90 tokens


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> WindowedEncoder:
    return load_text_encoder(tiny_clip_folder(tmp_path_factory.mktemp("clip"), projection=True))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("sdxl"), "sdxl")


def at(prompt: str, syntax: str, emphasis: str = "original") -> Text:
    return read_prompt(prompt, syntax, emphasis=emphasis).at(0)


def raw(encoder: WindowedEncoder, ids: Sequence[int], hide: Sequence[int] = ()) -> Tensor:
    """The network's last states of one window (S, D) with these tokens, of which it does not see some."""
    window = encoder.window
    row = [*window.prefix, *ids, *window.suffix]
    row += [window.pad] * (window.size - len(row))
    mask = torch.tensor([[int(k - len(window.prefix) not in hide) for k in range(window.size)]])
    return encoder.module(torch.tensor([row]), attention_mask=mask).last_hidden_state[0]


def column(encoder: WindowedEncoder, pieces: Sequence[tuple[str, float]]) -> tuple[list[int], Tensor]:
    ids = [(id, weight) for text, weight in pieces for id in encoder.tokenize(text)]
    weights = torch.ones(encoder.window.size, 1)
    weights[1 : 1 + len(ids), 0] = torch.tensor([weight for _, weight in ids])
    return [id for id, _ in ids], weights


def close(found: Tensor | None, wanted: Tensor) -> None:
    assert found is not None
    # States are about 1. Means of them, by which some are divided, lose a few digits more.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


PIECES = [("the ", 1.0), ("cat", 1.3), (" and ", 1.0), ("dog", 1 / 1.1)]


def test_plain_is_what_it_was_to_the_bit(clip: WindowedEncoder, tmp_path: Path) -> None:
    encoders = [
        clip,
        load_text_encoder(tiny_bert_folder(tmp_path / "b")),
        load_text_encoder(tiny_t5_folder(tmp_path / "t")),
    ]
    for encoder in encoders:
        for prompt in ("a (cat:1.3) [dog]", LONG, ""):
            wanted, notes = encoder.encode([prompt, "a dog"])
            found, more = encoder.encode([read_prompt(prompt).at(0), "a dog"])
            assert torch.equal(found.text, wanted.text) and notes == more
        # Without weights, and in one window, the syntaxes read the same text.
        for syntax in ("a1111", "comfyui", "compel"):
            found, _ = encoder.encode([at("a cat, the dog", syntax), "a dog"])
            assert torch.equal(found.text, encoder.encode(["a cat, the dog", "a dog"])[0].text)


@pytest.mark.parametrize("emphasis", ["original", "no_norm"])
def test_a1111_multiplies_and_restores_the_mean(clip: WindowedEncoder, emphasis: str) -> None:
    found, notes = clip.encode([at("the (cat:1.3) and [dog]", "a1111", emphasis), "a photo"])
    ids, weights = column(clip, PIECES)
    z = raw(clip, ids)
    wanted = z * weights
    if emphasis == "original":
        wanted = wanted * (z.mean() / wanted.mean())
    close(found.text[0], wanted)
    close(found.text[1], raw(clip, clip.tokenize("a photo")))  # a neighbour keeps its mean
    assert notes == [] and torch.equal(
        found.pooled[0], clip.encode(["the cat and dog", "a photo"])[0].pooled[0]
    )  # type: ignore[index]


def test_comfyui_moves_away_from_the_empty_prompt(clip: WindowedEncoder) -> None:
    found, _ = clip.encode([at("the (cat:1.3) and (dog:-0.5)", "comfyui"), ""])
    ids, weights = column(clip, [("the", 1.0), ("cat", 1.3), ("and", 1.0), ("dog", -0.5)])
    z, empty = raw(clip, ids), raw(clip, [])
    close(found.text[0], empty + (z - empty) * weights)
    close(found.text[1], empty)


def test_compel_blends_with_the_text_that_lacks_a_light_piece(clip: WindowedEncoder) -> None:
    found, _ = clip.encode([at("the cat++ and (a dog)0.5 photo---", "compel")])
    pieces = [("the", 1.0), ("cat", 1.21), ("and", 1.0), ("a dog", 0.5), ("photo", 0.9**3)]
    ids, weights = column(clip, pieces)
    empty, starts = raw(clip, []), [0]
    for text, _ in pieces:
        starts.append(starts[-1] + len(clip.tokenize(text)))
    base = empty + (raw(clip, ids) - empty) * weights
    total, share = base, 1.0
    for k, (_, weight) in enumerate(pieces):
        if weight < 1:
            own = math.tan((1 - weight) * math.pi / 2)
            hidden = raw(clip, ids, range(starts[k], starts[k + 1]))
            total, share = total + own * (empty + (hidden - empty) * weights), share + own
    close(found.text[0], total / share)


@pytest.mark.parametrize("syntax", ["a1111", "comfyui", "compel"])
def test_bert_and_t5_take_weights(syntax: str, tmp_path: Path) -> None:
    prompt = {"a1111": "a (cat:1.5)", "comfyui": "a (cat:1.5)", "compel": "a (cat)1.5"}[syntax]
    for encoder in (
        load_text_encoder(tiny_bert_folder(tmp_path / "b")),
        load_text_encoder(tiny_t5_folder(tmp_path / "t")),
    ):
        plain, empty = (encoder.encode([each])[0].text[0] for each in ("a cat", ""))
        first = len(encoder.window.prefix) + len(encoder.tokenize("a"))
        w = torch.ones(len(plain), 1)
        w[first : first + len(encoder.tokenize("cat"))] = 1.5
        wanted = (
            plain * w * (plain.mean() / (plain * w).mean())
            if syntax == "a1111"
            else empty + (plain - empty) * w
        )
        close(encoder.encode([at(prompt, syntax)])[0].text[0], wanted)
    light = {"a1111": "a [cat]", "comfyui": "a (cat:.5)", "compel": "a (cat)0.5"}[syntax]
    assert not torch.allclose(encoder.encode([at(light, syntax)])[0].text[0], plain)


def test_long_texts_and_breaks_fill_windows(clip: WindowedEncoder) -> None:
    text = at(f"the (cat:1.3) BREAK {LONG}", "a1111")
    found, notes = clip.encode([text, "a photo"])
    assert clip.length([text]) == 3 * 77 == found.text.shape[1]
    assert len(notes) == 1 and "in 3 chunks of 75" in notes[0]
    ids, weights = column(clip, [("the ", 1.0), ("cat", 1.3)])
    z = raw(clip, ids)
    close(found.text[0, :77], z * weights * (z.mean() / (z * weights).mean()))
    tokens = clip.tokenize(LONG)  # "the cat," is 3 tokens: the 75th is a comma
    close(found.text[0, 77:154], raw(clip, tokens[:75]))
    close(found.text[1, 77:], raw(clip, []).repeat(2, 1))
    both = clip.encode([at("a BREAK cat", "a1111")])
    assert both[0].text.shape[1] == 154 and both[1] == []


def test_sdxl_weighs_each_encoder_by_itself(sdxl: Path) -> None:
    encoder = build_conditioning(read_checkpoint(sdxl), sdxl)
    for syntax in ("a1111", "comfyui"):
        found, _ = encoder.encode([at("the (cat:1.3)", syntax)])
        plain, empty = (encoder.encode([each])[0] for each in ("the cat", ""))
        w = torch.ones(77, 1)
        w[2] = 1.3
        for half in (slice(WIDTH), slice(WIDTH, 2 * WIDTH)):
            z, e = plain.text[0, :, half], empty.text[0, :, half]
            wanted = z * w * (z.mean() / (z * w).mean()) if syntax == "a1111" else e + (z - e) * w
            close(found.text[0, :, half], wanted)
        close(found.pooled, plain.pooled)  # type: ignore[arg-type]


def test_weights_act_on_the_layer_that_clip_skip_takes(clip: WindowedEncoder) -> None:
    found, _ = clip.encode([at("the (cat:1.3)", "a1111", "no_norm")], clip_skip=1)
    plain, _ = clip.encode(["the cat"], clip_skip=1)
    close(found.text[0, 2], plain.text[0, 2] * 1.3)
    close(found.text[0, 1], plain.text[0, 1])


def test_numbers_that_leave_no_picture_are_one_line(tmp_path: Path) -> None:
    encoder = load_text_encoder(tiny_clip_folder(tmp_path), torch_dtype=torch.float16)
    # No prompt is read into such a weight. In half precision 65504 is the largest number.
    heavy = WeightedText(((Piece("cat", 1e6),),), "a1111", "no_norm")
    with pytest.raises(
        UserError, match=r'prompt "cat": its weights leave no finite numbers in torch.float16'
    ):
        encoder.encode([heavy])


def test_a_text_given_twice_is_run_once(clip: WindowedEncoder) -> None:
    batches: list[int] = []
    handle = clip.module.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    clip.encode([at("(cat)", "a1111"), "cat", at("(cat)", "a1111")])
    clip.encode([at("(cat)", "comfyui"), at("(dog)", "comfyui")])  # and one empty window for both
    handle.remove()
    assert batches == [2, 3]


# compel, the library


@pytest.mark.parametrize("prompt", COMPEL)
def test_agrees_with_compel(prompt: str, clip: WindowedEncoder) -> None:
    compel = pytest.importorskip("compel")
    text = at(prompt, "compel")
    with torch.no_grad():
        theirs = compel.Compel(tokenizer=clip.tokenizer, text_encoder=clip.module)(prompt)
    close(clip.encode([text])[0].text, theirs)


# Prompts that change between steps


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_asks_each_part_at_its_steps(name: str) -> None:
    how = plan(SchedulerConfig.from_dict(SCHEDULER), 10, sampler=name)
    asked: list[tuple[int, float]] = []

    def part(k: int) -> Any:
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            asked.append((k, sigma[0].item()))
            return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)

        return denoise

    starts = [0, 3, 4, 9]
    noise = Noise([1, 2], (4, 8, 8))
    found = how.sample(guidance.by_step([(s, part(s)) for s in starts], how.sigmas), noise)
    assert torch.equal(found, how.sample(part(0), Noise([1, 2], (4, 8, 8))))  # all parts are alike here
    changes = asked[: len(asked) // 2]
    assert {k for k, _ in changes} == set(starts)
    for k, sigma in changes:
        after = min([s for s in starts if s > k], default=10)
        high, low = how.sigmas[k], how.sigmas[after]
        assert low * (1 - 1e-5) <= sigma <= high * (1 + 1e-5)
        assert sigma > low or after == 10


def test_rows_at_other_noise_levels_are_in_other_steps() -> None:
    denoise = guidance.by_step(
        [(0, lambda x, s: x), (1, lambda x, s: -x), (3, lambda x, s: 5 * x)], [8.0, 4, 2, 1, 0]
    )
    x, sigma = torch.ones(6, 1, 1, 1), torch.tensor([9.0, 8, 4.1, 4, 1.5, 0.7])
    assert answered(denoise(x, sigma)).flatten().tolist() == [1, 1, 1, -1, -1, 5]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    return System.load(tiny_pipeline_folder(tmp_path_factory.mktemp("sd1"), "sd1"))


@torch.no_grad()
def test_a_request_of_strings_has_the_condition_that_it_had(system: System) -> None:
    how = plan(system.scheduler, 4)
    for prompts, negatives in ((["a cat", "the dog"], None), (["a cat", LONG], ["a dog", ""])):
        request = prepare(system, how, prompts, [1, 2], negatives=negatives)
        positive, negative, notes = encode_pair(system.text, prompts, negatives)
        assert torch.equal(request.condition.text, concatenate([negative, positive]).text)
        assert request.notes == tuple(notes) and request.changes == ()
        read = prepare(system, how, [read_prompt(each) for each in prompts], [1, 2], negatives=negatives)
        assert torch.equal(read.condition.text, request.condition.text)
    with pytest.raises(UserError, match="1 negative prompts for 2 prompts"):
        prepare(system, how, ["a", "b"], [1, 2], negatives=["c"])
    with pytest.raises(UserError, match="give a list of at least one prompt"):
        prepare(system, how, "a cat", [1])


@torch.no_grad()
def test_prompts_change_while_a_picture_is_drawn(system: System) -> None:
    """Each of two pictures, and the negative, changes at steps of its own; the result is that of steps run by hand."""
    steps = 6
    how = plan(system.scheduler, steps, sampler="euler")
    prompts = [read_prompt(each, "a1111", steps) for each in ("a [cat:dog:2]", "[a|the] (photo:1.2)")]
    negatives = [read_prompt(each, "a1111", steps) for each in ("", "[:dog:4]")]
    request = prepare(system, how, prompts, [1, 2], negatives=negatives, guidance=Guidance(4.0))
    assert [step for step, _ in request.changes] == [1, 2, 3, 4, 5]
    # Texts that come again share what they were encoded to.
    assert len({id(condition) for _, condition in request.changes[1:]}) == 4
    found = sample(system, request)

    noise, x = Noise([1, 2], (4, 16, 16)), None
    for k in range(steps):
        texts = [each.at(k) for each in prompts], [each.at(k) for each in negatives]
        positive, negative, _ = encode_pair(system.text, *texts)
        condition = system.condition(concatenate([negative, positive]))
        one = replace(how.part(k, k + 1), unit_variance=False)
        denoise = guidance.classifier_free(how.denoiser(system.bind(condition)), 4.0)
        x = one.sample(denoise, noise) if x is None else _from(one, denoise, x)
    assert x is not None
    torch.testing.assert_close(found, x * how.final_scale, rtol=1e-4, atol=1e-4)
    unchanged = prepare(system, how, [_first(each) for each in prompts], [1, 2], guidance=Guidance(4.0))
    assert (sample(system, unchanged) - found).abs().max() > 1e-3


def _from(one: Any, denoise: Any, x: Tensor) -> Tensor:
    from ldm.diffusion import driver

    return driver.sample(one.wrap(denoise), one.steps(x, lambda: x))


def _first(prompt: Prompt) -> Prompt:
    return Prompt(prompt.segments[:1])


@torch.no_grad()
def test_a_plan_that_begins_on_the_way_begins_with_the_text_of_that_step(system: System) -> None:
    how = plan(system.scheduler, 6, sampler="euler")
    x0 = torch.zeros(1, 4, 16, 16)
    found = []
    for prompt in (read_prompt("a [cat:dog:3]", "a1111", 6), "a dog"):
        request = prepare(system, how.part(3), [prompt], [1], guidance=Guidance(1.0))
        parts = [(0, request.condition), *request.changes]
        denoises = [(step, how.denoiser(system.bind(condition))) for step, condition in parts]
        found.append(
            how.part(3).sample(guidance.by_step(denoises, how.sigmas), Noise([1], (4, 16, 16)), x0=x0)
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sdxl_without_a_negative_prompt_is_against_zeros_at_every_step(sdxl: Path) -> None:
    system = System.load(sdxl)
    prompt = read_prompt("[cat:dog:1]", "a1111", 3)
    request = prepare(system, plan(system.scheduler, 3), [prompt], [1], guidance=Guidance(5.0))
    ((step, later),) = request.changes
    for condition, text in ((request.condition, "cat"), (later, "dog")):
        wanted, _ = system.text.encode([text])
        close(condition.text, torch.cat([torch.zeros_like(wanted.text), wanted.text]))
        assert (
            isinstance(condition, Condition)
            and condition.time_ids is not None
            and not condition.pooled[0].any()
        )  # type: ignore[index]
    assert step == 1 and sample(system, request).isfinite().all()

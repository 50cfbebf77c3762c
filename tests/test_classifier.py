"""The noisy classifier: its network, its training by the loop, its folder, and requests that it guides."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_pipeline_folder
from torch import Tensor, nn
from training_runs import TINY_VAE

from ldm.checkpoints.folder import write_component
from ldm.condition import Condition
from ldm.conditioning.classifier import Classifier
from ldm.diffusion.plan import plan
from ldm.diffusion.scheduler_config import SchedulerConfig
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.classifier import AttentionPool, ClassifierConfig, NoisyClassifier
from ldm.models.unet2d import UNet2D
from ldm.sampling import Guidance, Request, guided, prepare, run, sample
from ldm.sampling.engine import Engine
from ldm.sampling.likelihood_guidance import ClassifierGuidance
from ldm.system import System
from ldm.training.data.examples import Batch
from ldm.training.data.kinds import Data
from ldm.training.loop import LoopConfig, Trainer
from ldm.training.objectives import classifier as objectives
from ldm.training.optimization import OptimizerConfig

COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}
SMALL: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def noisy(module: nn.Module, std: float = 0.2) -> Any:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.eval().requires_grad_(False)


# The network


def test_its_trunk_is_half_of_the_u_net() -> None:
    config = ClassifierConfig(9, 3, 5, time_embedding_type="fourier", **SMALL)
    whole, half = noisy(UNet2D(config.half)), noisy(NoisyClassifier(config))
    shared = {
        n: t
        for n, t in whole.state_dict().items()
        if not n.startswith(("up_blocks", "conv_norm", "conv_out"))
    }
    assert not half.load_state_dict(shared, strict=False).unexpected_keys
    assert {n.split(".")[0] for n in set(half.state_dict()) - set(shared)} == {"conv_norm_out", "pool"}
    middle: list[Tensor] = []
    for network in (whole, half):
        network.mid_block.register_forward_hook(lambda module, given, out: middle.append(out))
    x, sigma = torch.randn(2, 3, 9, 9), torch.tensor([0.1, 5.0])
    whole(x, sigma, Condition())
    logits = half(x, sigma)
    assert torch.equal(*middle) and logits.shape == (2, 5) and middle[0].shape[-1] == config.map_size == 5


def test_its_pooling_is_multi_head_attention_of_the_mean() -> None:
    pool = noisy(AttentionPool(3, 16, 2, 5), 0.5)
    x = torch.randn(4, 16, 3, 3)
    tokens = x.flatten(2).permute(2, 0, 1)  # (S, B, C), as torch has it
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + pool.positional_embedding[:, None]
    weights = torch.cat([pool.to_q.weight, pool.to_k.weight, pool.to_v.weight])
    biases = torch.cat([pool.to_q.bias, pool.to_k.bias, pool.to_v.bias])
    expected, _ = F.multi_head_attention_forward(
        *[tokens] * 3, 16, 2, weights, biases, None, None, False, 0.0, torch.eye(16), torch.zeros(16), False
    )
    expected = F.linear(expected[0], pool.to_out.weight, pool.to_out.bias)
    torch.testing.assert_close(pool(x), expected, rtol=1e-4, atol=1e-5)


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"num_classes": 1}, "num_classes is 1"),
    ({"sample_size": 0}, "sample_size is 0"),
    ({"down_block_types": ["DownBlock2D", "UpBlock2D"]}, "'UpBlock2D' is not supported"),
    ({"attention_head_dim": 5}, "attention_head_dim 5"),
    ({"sample_size": 2**14}, "too large to pool"),
    ({"num_labels": 3}, "'num_labels' is not one this network knows"),
    ({"_class_name": "UNet2DModel"}, "another network than the NoisyClassifier"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[str(each[0])[:40] for each in FAULTS])
def test_a_config_of_which_no_classifier_can_be_built_names_file_and_key(
    change: dict[str, Any], message: str
) -> None:
    config = ClassifierConfig(8, 3, 4, **SMALL)
    sound = json.loads(json.dumps(config.to_dict()))
    assert ClassifierConfig.read(sound) == config
    with pytest.raises(UserError, match=f"^a/config.json: .*{message}"):
        ClassifierConfig.read(sound | change, "a/config.json")


# Training


class ColourExamples:
    """Squares of one colour, a little uneven; the order and all else is of the number alone."""

    side, held_out, count = 8, 24, 10**6

    def __init__(self, labels: list[str]):
        self.labels = labels

    def cuts(self, start: int, size: int, rows: slice = slice(None)) -> Batch:
        return self._made(list(range(start, start + size))[rows], start)

    def whole(self, start: int, size: int) -> Batch:
        return self._made(list(range(self.count + start, self.count + start + size)), start)

    def _made(self, numbers: list[int], start: int) -> Batch:
        labels = torch.tensor([number % 3 for number in numbers])
        plain = torch.tensor(list(COLOURS.values()))[labels][:, :, None, None]
        uneven = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in numbers]
        pictures = (plain + 0.1 * torch.stack(uneven)).clamp(-1, 1)
        return Batch(pictures, labels if self.labels else None, start)

    def notes(self) -> list[str]:
        return ["three colours"]


@dataclass(frozen=True)
class ColoursOfTests(Data, kind="colours-of-tests"):
    labelled: bool = True

    def examples(self, where: str, crop: int | None, held_out: int) -> ColourExamples:
        return ColourExamples(list(COLOURS) if self.labelled else [])


def trained(folder: Path, pictures: int, **changes: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Train and export; the figures before and after."""
    model = ClassifierConfig(changes.pop("size", 8), changes.pop("channels", 3), 3, **SMALL)
    objective = objectives.Objective(objectives.Config(ColoursOfTests(), model, bands=2, **changes))
    loop = LoopConfig(
        pictures,
        batch_size=12,
        precision="no",
        ema_half_life=24,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=24),
    )
    torch.manual_seed(0)
    trainer = Trainer(objective, loop, folder)
    before = objective.validate(objective.model.eval(), folder, 0)
    objective.model.train()
    assert trainer.run()
    return before, objective.validate(trainer.ema.model(trainer.plain), folder, pictures)


def test_it_learns_at_all_noise_levels_and_comes_back_from_its_folder(tmp_path: Path) -> None:
    before, after = trained(tmp_path, 480)
    assert before["accuracy"] < 0.6 and before["nll"] == pytest.approx(
        torch.tensor(3.0).log().item(), abs=1e-4
    )
    assert after["accuracy_000_499"] > 0.95 and after["accuracy_500_999"] < after["accuracy_000_499"]
    assert after["nll"] < 0.7 * before["nll"]
    found = Classifier.load(tmp_path / "export")
    assert found.labels == tuple(COLOURS) and found.numbers(["blue", 0]).tolist() == [2, 0]
    batch = ColourExamples(list(COLOURS)).whole(0, 6)
    assert batch.labels is not None
    sigma = torch.full((6,), 0.5)
    log_p = found.log_likelihood(batch.labels)(batch.pictures + 0.5 * torch.randn(6, 3, 8, 8), sigma)
    assert bool((log_p > torch.tensor(0.5).log()).all())
    found.save(tmp_path / "again")
    again = Classifier.load(tmp_path / "again")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.logits(x, sigma[:2]), found.logits(x, sigma[:2]))


def test_it_learns_of_the_latents_of_a_first_stage(tmp_path: Path) -> None:
    config = AutoencoderConfig.from_diffusers(
        TINY_VAE | {"scaling_factor": 10.0}
    )  # as it is, all is near zero
    torch.manual_seed(0)
    write_component(tmp_path, "vae", config.to_diffusers(), AutoencoderKL(config).state_dict())
    _, after = trained(tmp_path / "run", 480, size=4, channels=4, autoencoder=str(tmp_path), levels=3)
    assert after["accuracy_000_499"] > 0.8, after
    assert Classifier.load(tmp_path / "run" / "export").network.config.in_channels == 4


def test_what_does_not_fit_the_data_is_refused_in_one_line() -> None:
    sound = ClassifierConfig(8, 3, 3, **SMALL)
    for changed, message in (
        (replace(sound, num_classes=4), "classifier.model.num_classes is 4, and the data's is 3"),
        (replace(sound, in_channels=4), "classifier.model.in_channels is 4, and the data's is 3"),
        (replace(sound, sample_size=16), "classifier.model.sample_size is 16, and the data's is 8"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            objectives.Objective(objectives.Config(ColoursOfTests(), changed))
    with pytest.raises(UserError, match=r"^classifier.data has no labels: .*$"):
        objectives.Objective(objectives.Config(ColoursOfTests(labelled=False), sound))
    with pytest.raises(UserError, match=r"classifier\.levels is 0"):
        objectives.Config(ColoursOfTests(), sound, levels=0).check()
    with pytest.raises(UserError, match=r"classifier\.bands is 1001: .* at most 1000"):
        objectives.Config(ColoursOfTests(), sound, bands=1001).check()


def test_a_damaged_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    network = noisy(NoisyClassifier(ClassifierConfig(8, 3, 3, **SMALL)))
    Classifier(network, SchedulerConfig("DDPMScheduler"), tuple(COLOURS)).save(tmp_path)
    labels = tmp_path / "classifier" / "labels.json"
    for text, message in (
        ('["red"]', "has 1 names"),
        ('{"0": "red"}', "no list of names"),
        ("[", "labels.json"),
    ):
        labels.write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            Classifier.load(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        Classifier.load(tmp_path / "nowhere")


# Drawing


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    return System.load(tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"), "sd1"))


def a_classifier(system: System, channels: int = 4, less: int = 0) -> Classifier:
    size = system.default_size // system.autoencoder.config.factor - less
    network = noisy(NoisyClassifier(ClassifierConfig(size, channels, 3, **SMALL)), 0.3)
    return Classifier(network, system.scheduler, tuple(COLOURS))


def a_request(system: System, sampler: str | None = None, scale: float = 3.0) -> Request:
    how = plan(system.scheduler, 4, sampler)
    with torch.no_grad():
        return prepare(system, how, ["a cat", ""], [3, 4], guidance=Guidance(scale))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
@torch.no_grad()
def test_a_request_is_guided_towards_its_labels(system: System, sampler: str) -> None:
    """Beside the text's guidance; and nothing is guided with a scale of 0."""
    classifier, request = a_classifier(system), a_request(system, sampler)
    plain = sample(system, request)
    none = guided(a_request(system, sampler), [ClassifierGuidance(classifier, ["blue", 0], 0.0)])
    assert torch.equal(sample(system, none), plain)
    some = guided(a_request(system, sampler), [ClassifierGuidance(classifier, ["blue", 0], 200.0)])
    moved = sample(system, some)
    at = torch.full((2,), 0.05)
    log_p = classifier.log_likelihood(classifier.numbers(["blue", 0]))
    assert bool((log_p(moved, at) > log_p(plain, at) + 0.01).all())
    one = guided(
        a_request(system, sampler), [ClassifierGuidance(classifier, [2, 0], torch.tensor([200.0, 0]))]
    )
    found = sample(system, one)
    torch.testing.assert_close(found[0], moved[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], plain[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_engine_draws_guided_requests_beside_others(system: System) -> None:
    classifier = a_classifier(system)

    def requests() -> list[Request]:
        guide = ClassifierGuidance(classifier, ["green", "red"], 20.0)
        return [a_request(system, "ddim"), guided(a_request(system, "ddpm"), [guide])]

    expected = [sample(system, each) for each in requests()]
    engine = Engine(system)
    tickets = [engine.add(run(system, each)) for each in requests()]
    assert len(list(engine.run())) == 2
    for ticket, wanted in zip(tickets, expected, strict=True):
        assert ticket.latents is not None
        torch.testing.assert_close(ticket.latents, wanted, rtol=1e-3, atol=1e-3)


def test_a_classifier_that_can_not_guide_is_refused_in_one_line(system: System) -> None:
    fits, request = a_classifier(system), a_request(system)
    for guide, message in (
        (ClassifierGuidance(a_classifier(system, channels=8), [0, 0]), "sees 8 channels, .* have 4"),
        (ClassifierGuidance(a_classifier(system, less=2), [0, 0]), "positions, and these pictures have"),
        (ClassifierGuidance(fits, ["bleu", "red"]), "knows no 'bleu', did you mean blue"),
        (ClassifierGuidance(fits, ["zebra", "red"]), "knows no 'zebra': it knows red, green, blue"),
        (ClassifierGuidance(fits, [0, 3]), "knows 3 classes, numbered from 0, and no 3"),
        (ClassifierGuidance(fits, [0]), "1 labels for 2 pictures"),
        (ClassifierGuidance(fits, [0, 0], float("nan")), "scale is nan"),
        (ClassifierGuidance(fits, [0, 0], form="mean"), "form 'mean' is for the sampler ddpm"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            guided(request, [guide])
        assert "\n" not in str(caught.value)

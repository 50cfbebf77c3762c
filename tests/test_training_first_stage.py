"""The first stage's settings and its adversary: what each term teaches, exact resume, several processes."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import BATCHES, same_bits_after_kills
from test_training_finetune import pictures as pictures_in
from training_runs import LOOP, TINY_VAE, first_stage_config, side_by_side, state, write_config

from ldm.checkpoints.folder import read_component, write_component
from ldm.emoji.pools import Compositions
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.perceptual import EfficientNetLite0
from ldm.models.vq import VQConfig, VQModel
from ldm.training import reconstruction
from ldm.training.adversarial import AdversarialConfig, adaptive_weight, discriminator_loss, generator_loss
from ldm.training.distributed import BatchGenerator
from ldm.training.loop import LoopConfig, Trainer
from ldm.training.objectives import autoencoder
from ldm.training.optimization import OptimizerConfig
from ldm.training.run import read_run

TINY_VQ = {
    **{name: each for name, each in TINY_VAE.items() if not name.startswith("mid")},
    "num_vq_embeddings": 16,
}
ADVERSARY = {"start": 32, "n_layers": 1, "width": 8}
MODELS = {"model": AutoencoderConfig.from_diffusers(TINY_VAE), "vq_model": VQConfig.from_diffusers(TINY_VQ)}


@pytest.fixture(autouse=True)
def perceptual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "load_efficientnet", lambda packages: EfficientNetLite0())


def objective(sprites: str, quantizer: str = "kl", **changes: Any) -> autoencoder.Objective:
    name = "vq_model" if quantizer == "vq" else "model"
    settings = {name: MODELS[name], "perceptual": 0.0, "validation_pictures": 8, **changes}
    made = autoencoder.Objective(first_stage_config(sprites, quantizer=quantizer, **settings))
    made.prepare(torch.device("cpu"), 8)
    return made


def loss(
    made: autoencoder.Objective, start: int = 64, seed: int = 0
) -> tuple[torch.Tensor, dict[str, float]]:
    total, logs = made.loss(
        made.model, made.batch(start, 4, slice(None)), BatchGenerator(seed, 4, slice(None))
    )
    return total, {name: each.item() for name, each in logs.items()}


def gradients(made: autoencoder.Objective) -> dict[str, torch.Tensor]:
    """The gradients of one step, all of them there."""
    for parameter in made.model.parameters():
        parameter.grad = None
    loss(made)[0].backward()
    grads = {name: each.grad for name, each in made.model.named_parameters() if each.requires_grad}
    assert all(each is not None for each in grads.values())
    return grads  # type: ignore[return-value]


# The adversary


def test_the_adaptive_weight_is_the_ratio_of_the_last_layers_gradients() -> None:
    last, hidden = torch.tensor([[2.0, 1.0]], requires_grad=True), torch.tensor([[3.0], [4.0]])
    out = last @ hidden  # its gradient at `last` is (3, 4) times the loss's slope
    assert adaptive_weight(6 * out.sum(), -2 * out.sum(), last).item() == pytest.approx(3.0, rel=1e-5)
    assert adaptive_weight(6 * out.sum(), 1e-9 * out.sum(), last).item() == 1e4
    assert not adaptive_weight(out.sum(), out.sum(), last).requires_grad


def test_both_kinds_of_loss_have_their_closed_form() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert generator_loss("hinge", fake).item() == 1.0
    assert discriminator_loss("hinge", real, fake).item() == 0.5 * ((0 + 0.5) / 2 + (0 + 2) / 2)
    ln = torch.nn.functional.logsigmoid
    torch.testing.assert_close(generator_loss("vanilla", fake), -ln(fake).mean())
    expected = -0.5 * (ln(real).mean() + ln(-fake).mean())
    torch.testing.assert_close(discriminator_loss("vanilla", real, fake), expected)


def test_each_player_learns_from_its_own_term_alone(sprites: str) -> None:
    torch.manual_seed(0)
    made = objective(sprites, adversarial=AdversarialConfig(**ADVERSARY))
    both = gradients(made)
    batch = made.batch(64, 4, slice(None))
    noise = BatchGenerator(0, 4, slice(None)).normal(4, 8, 8)
    network, discriminator = made.stage.autoencoder, made.stage.discriminator
    assert isinstance(network, AutoencoderKL) and discriminator is not None
    # The discriminator's, from decodings that are given
    decoded, posterior = network(batch.pictures, noise)
    term = discriminator_loss("hinge", discriminator(batch.pictures), discriminator(decoded.detach()))
    parameters = dict(discriminator.named_parameters())
    for name, expected in zip(parameters, torch.autograd.grad(term, parameters.values()), strict=True):
        torch.testing.assert_close(both[f"discriminator.{name}"], expected)
    # The autoencoder's, with a discriminator that is given and the weight by hand
    discriminator.requires_grad_(False)
    pixel, generator = (decoded - batch.pictures).abs().mean(), -discriminator(decoded).mean()
    last = network.decoder.conv_out.weight
    norms = [torch.autograd.grad(each, last, retain_graph=True)[0].norm() for each in (pixel, generator)]
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    total = pixel + made.config.kl * kl + 0.5 * norms[0] / norms[1] * generator
    parameters = dict(network.named_parameters())
    for name, expected in zip(parameters, torch.autograd.grad(total, parameters.values()), strict=True):
        torch.testing.assert_close(both[f"autoencoder.{name}"], expected, rtol=1e-4, atol=1e-7)


def test_before_the_start_nobody_plays(sprites: str, tmp_path: Path) -> None:
    """The same bits as without an adversary, whose weights stay what they were."""
    ends = []
    for name, adversary in (("with", AdversarialConfig(**ADVERSARY)), ("without", None)):
        torch.manual_seed(0)
        made = objective(sprites, adversarial=adversary)
        optimizer = OptimizerConfig(clip_norm=1e9, weight_decay=0.0)
        loop = LoopConfig(**{**LOOP, "pictures": 40, "optimizer": optimizer})  # type: ignore[arg-type]
        trainer = Trainer(made, loop, tmp_path / name)
        before = {key: each.clone() for key, each in made.model.state_dict().items()}
        while trainer.seen < 32:
            figures = trainer.step()
        ends.append({k: v.clone() for k, v in made.stage.autoencoder.state_dict().items()})
        if adversary:
            assert (figures["generator"], figures["discriminator"], figures["adaptive_weight"]) == (0, 0, 0)
            now = made.model.state_dict()
            theirs = [key for key in before if key.startswith("discriminator.")]
            assert all(torch.equal(before[key], now[key]) for key in theirs)
            assert trainer.step()["discriminator"] > 0
            assert all(not torch.equal(before[key], now[key]) for key in theirs)
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


# Settings


@pytest.mark.parametrize(
    ("settings", "logged"),
    [
        ({"quantizer": "kl"}, {"l1", "kl"}),
        ({"quantizer": "none", "pixel": "l2"}, {"l2"}),
        ({"quantizer": "vq", "perceptual": 0.1}, {"l1", "perceptual", "codebook", "commitment"}),
        ({"quantizer": "vq", "labels": "thing", "noise": 0.3}, {"l1", "codebook", "commitment"}),
        ({"quantizer": "none", "labels": "kind"}, {"l1"}),
    ],
)
def test_every_setting_teaches_every_weight(sprites: str, settings: dict[str, Any], logged: set[str]) -> None:
    made = objective(sprites, **settings)
    gradients(made)
    use = {"perplexity", "codes_used"} if settings["quantizer"] == "vq" else set()
    assert loss(made)[1].keys() == logged | use


def test_losses_are_what_they_are_called(sprites: str) -> None:
    """The plain one decodes means; the denoising one encodes corrupted pictures and is held to the clean ones."""
    made = objective(sprites, "none", pixel="l2")
    pictures = made.batch(64, 4, slice(None)).pictures
    total, _ = loss(made)
    network = made.stage.autoencoder
    assert isinstance(network, AutoencoderKL)
    torch.testing.assert_close(
        total, (network.decode(network.encode(pictures).mean) - pictures).square().mean()
    )
    made = objective(sprites, "vq", noise=0.3)
    corrupted = pictures + 0.3 * BatchGenerator(0, 4, slice(None)).normal(3, 16, 16)
    decoded, latent = made.stage.reconstruct(corrupted)
    expected = (decoded - pictures).abs().mean() + latent.codebook + 0.25 * latent.commitment  # type: ignore[union-attr]
    torch.testing.assert_close(loss(made)[0], expected)


def test_labels_are_the_mixtures(sprites: str) -> None:
    kinds, things = objective(sprites, labels="kind"), objective(sprites, labels="thing")
    assert isinstance(kinds.examples, Compositions)
    mixture = kinds.examples.mixture
    assert kinds.labels == mixture.kinds and things.labels == ["tree", "star", "rocket"]
    for made, of in ((kinds, lambda e: e.kind), (things, lambda e: e.parts["things"][0])):
        names = [made.labels[i] for i in made.batch(8, 8, slice(2, 8)).labels]  # type: ignore[union-attr]
        assert names == [of(mixture.sample(i)) for i in range(10, 16)]


def test_what_contradicts_itself_is_refused(tmp_path: Path, sprites: str) -> None:
    labelled = AutoencoderKL(AutoencoderConfig.from_diffusers({**TINY_VAE, "num_class_embeds": 3}))
    write_component(tmp_path, "vae", labelled.config.to_diffusers(), labelled.state_dict())
    for changes, message in (
        ({"quantizer": "vq", "model": MODELS["model"]}, r"autoencoder.vq_model, not model"),
        ({"vq_model": MODELS["vq_model"]}, r"autoencoder.model, not vq_model"),
        ({"init": str(tmp_path)}, "on 3 labels .* makes none"),
        (
            {"model": MODELS["model"], "adversarial": AdversarialConfig()},
            "pictures of 24 pixels a side, not 16",
        ),
    ):
        with pytest.raises(UserError, match=message):
            autoencoder.Objective(first_stage_config(sprites, **changes))


# Runs


def test_a_codebook_is_exported_as_diffusers_reads_it(
    tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its decoder can be trained further on its own."""
    from diffusers import VQModel as Theirs

    monkeypatch.setattr(autoencoder, "_STATISTICS", 64)
    made = objective(sprites, "vq", adversarial=AdversarialConfig(**ADVERSARY))
    optimizer = OptimizerConfig(learning_rate=5e-3, warmup=64)
    changes = {"pictures": 320, "optimizer": optimizer, "validate_every": 320}
    loop = LoopConfig(**{**LOOP, **changes})  # type: ignore[arg-type]
    trainer = Trainer(made, loop, tmp_path)
    first = trainer.step()["l1"]
    assert trainer.run()
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last.keys() == {"seen", "psnr", "perceptual_distance", "perplexity", "codes_used"}
    exported = Theirs.from_pretrained(tmp_path / "export" / "vqvae")
    batch = next(made._whole(made.model, 64))
    ours, _ = trainer.ema.model(trainer.plain).reconstruct(batch.pictures)  # type: ignore[operator]
    with torch.no_grad():
        torch.testing.assert_close(exported(batch.pictures).sample, ours, rtol=1e-4, atol=1e-4)
        latents = [exported.encode(each.pictures).latents for each in made._whole(made.model, 64)]
    assert torch.cat(latents).std().item() * exported.config["scaling_factor"] == pytest.approx(1, rel=1e-4)
    assert trainer.step()["l1"] < 0.7 * first
    further = objective(sprites, "vq", vq_model=None, init=str(tmp_path / "export"), train="decoder")
    assert {name.split(".")[1] for name in gradients(further)} == {"decoder", "post_quant_conv"}
    assert loss(further)[1].keys() == {"l1", "perplexity", "codes_used"}


def test_a_plain_autoencoder_is_exported_without_chance(
    tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoencoder, "_STATISTICS", 64)
    made = objective(sprites, "none", labels="thing")
    made.export(made.model, tmp_path)
    config, tensors = read_component(tmp_path, "vae")
    exported = AutoencoderKL(AutoencoderConfig.from_diffusers(config))
    exported.load_state_dict(tensors)
    batch = next(made._whole(made.model, 8))
    with torch.no_grad():
        posterior = exported.encode(batch.pictures, batch.labels)
        drawn = posterior.sample(torch.randn_like(posterior.mean))
        torch.testing.assert_close(drawn, posterior.mean, rtol=1e-5, atol=1e-5)
        ours = made.stage.reconstruct(batch.pictures, batch.labels)[0]
        torch.testing.assert_close(exported.decode(drawn, batch.labels), ours, rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "vae" / "labels.json").read_text()) == ["tree", "star", "rocket"]
    objective(sprites, "none", labels="thing", model=None, init=str(tmp_path))
    with pytest.raises(UserError, match=r"labels.json has other labels"):
        objective(sprites, "none", labels="kind", model=None, init=str(tmp_path))


@pytest.mark.parametrize("key", ["data.recipe", "recipe"])
def test_what_the_mixture_was_called_before_is_told(tmp_path: Path, sprites: str, key: str) -> None:
    """In an old run's config, and on its command line."""
    path = run_file(tmp_path / "run", sprites, "kl")
    message = rf"'autoencoder.{key}' is called autoencoder.data.mixture"
    with pytest.raises(UserError, match=message):
        read_run(path, [f"autoencoder.{key}.size=16"])
    old = path.read_text().replace("mixture:", "recipe:")
    path.write_text(old)
    with pytest.raises(UserError, match=r"'autoencoder.data.recipe' is called autoencoder.data.mixture now"):
        read_run(path)


def test_the_shipped_configs_are_whole() -> None:
    folder = Path(__file__).parent.parent / "configs"
    kl, vq = (read_run(folder / f"autoencoder-{name}.yaml").settings for name in ("kl", "vq"))
    assert kl.quantizer == "kl" and AutoencoderKL(kl.model).config.factor == 8
    assert vq.quantizer == "vq" and VQModel(vq.vq_model).config.factor == 8
    for each in (kl, vq):
        assert PatchDiscriminator(width=each.adversarial.width).least_side <= each.crop
    assert (
        read_run(folder / "autoencoder-kl.yaml", ["autoencoder.adversarial=null"]).settings.adversarial
        is None
    )


def run_file(
    folder: Path, sprites: str, quantizer: str, changes: dict[str, Any] | None = None, **loop: Any
) -> Path:
    """A whole run with everything on, from a file."""
    folder.mkdir()
    mixture = {"size": 32, "things": ["tree", "star", "rocket"], "styles": ["3d"]}
    data = {"kind": "compositions", "mixture": mixture, "sprites": sprites, "labels": "thing"}
    settings = {
        "quantizer": quantizer,
        "vq_model" if quantizer == "vq" else "model": TINY_VQ if quantizer == "vq" else TINY_VAE,
        "data": data,
        "crop": 16,
        "perceptual": 0.0,
        "noise": 0.1,
        "adversarial": {**ADVERSARY, "start": 16},
        "validation_pictures": 8,
        **(changes or {}),
    }
    return write_config(folder, {"loop": {**LOOP, **loop}, "autoencoder": settings})


HEAD = """
    import torch
    torch.set_num_threads(1)
    import ldm.emoji.pools
    from ldm.models.perceptual import EfficientNetLite0
    from ldm.training import run
    from ldm.training import reconstruction
    from ldm.training.objectives import autoencoder
    reconstruction.load_efficientnet = lambda packages: EfficientNetLite0()
    autoencoder._STATISTICS = 64
"""


# One within a step; that one at a write does as little is proved by the LoRA's in test_training_finetune.
@pytest.mark.parametrize("kills", [1, *(pytest.param(kills, marks=pytest.mark.slow) for kills in (2, 5))])
def test_a_killed_run_with_an_adversary_ends_with_the_same_bits(
    tmp_path: Path, sprites: str, kills: int
) -> None:
    loop = {"pictures": 8 * BATCHES * kills, "save_every": 8}
    paths = [run_file(tmp_path / name, sprites, "vq", **loop) for name in ("whole", "killed")]
    end = same_bits_after_kills(*paths, kills, HEAD)
    assert any("discriminator" in key for key in end)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 5])
def test_a_killed_run_on_pictures_of_ones_own_ends_with_the_same_bits(
    tmp_path: Path, sprites: str, kills: int
) -> None:
    data = {
        "kind": "pictures",
        "path": str(pictures_in(tmp_path / "pictures", 25)),
        "resolution": 32,
        "flip": True,
    }
    settings = {"data": data}
    loop = {"pictures": 8 * BATCHES * kills, "save_every": 8}
    paths = [run_file(tmp_path / name, sprites, "kl", settings, **loop) for name in ("whole", "own")]
    same_bits_after_kills(*paths, kills, HEAD)


def run(path: Path) -> bool:
    from ldm.training.run import train

    return train(path)


@pytest.mark.slow  # what `make test` has of two processes is in test_training_finetune and _safety
@pytest.mark.parametrize("quantizer", ["kl", "vq"])
def test_two_processes_do_what_one_does(
    tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch, quantizer: str
) -> None:
    """Before and after the adversary's start: losses, gradients, adaptive weight, use of the codebook."""
    monkeypatch.setattr(autoencoder, "_STATISTICS", 64)
    # Adam's first steps have one size whatever the gradient's: a small one keeps rounding from growing.
    loop: dict[str, Any] = {"pictures": 32, "log_every": 8, "save_every": 100, "validate_every": 100}
    loop["optimizer"] = {"learning_rate": 1e-5, "warmup": 0}
    paths = [run_file(tmp_path / name, sprites, quantizer, **loop) for name in ("one", "two")]
    assert run(paths[0])
    side_by_side(textwrap.dedent(HEAD) + f"assert run.train({str(paths[1])!r})\n")
    logs = [[json.loads(x) for x in (path.parent / "run" / "log.jsonl").open()] for path in paths]
    assert len(logs[0]) == len(logs[1]) == 4
    assert [line["discriminator"] > 0 for line in logs[0]] == [False, False, True, True]
    for one, two in zip(*logs, strict=True):
        for key in one.keys() - {"pictures_per_second"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-7), key
    ends = [state(path.parent / "run") for path in paths]
    for name in ends[0]:
        if name.endswith(".exp_avg"):
            torch.testing.assert_close(ends[1][name], ends[0][name], rtol=1e-3, atol=1e-6, msg=name)

"""Token merging: the published formula, exact where tokens are equal, the same alone as among others."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_pipeline_folder
from torch import Tensor

from ldm.condition import Condition
from ldm.errors import UserError
from ldm.models import token_merging
from ldm.models.denoising import DenoisingNetwork
from ldm.models.token_merging import Merging, finest, merged_tokens
from pipelines import TextToImagePipeline
from pipelines.cli import main
from pipelines.recipe import Recipe, read_recipe
from pipelines.rows import read_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("model"), "sd1")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(folder, device="cpu")


def paper(x: Tensor, destinations: list[int], merged: int) -> tuple[Tensor, Tensor]:
    """One row (N, C), token by token: the merged ones, and each of the N as it comes back (Bolya & Hoffman 2023).

    The destinations come last, the others in the order of their likeness.
    """
    sources = [k for k in range(len(x)) if k not in destinations]
    best = {
        k: max((F.cosine_similarity(x[k], x[d], dim=0).item(), -d) for d in destinations) for k in sources
    }
    ranked = sorted(sources, key=lambda k: -best[k][0])
    groups = {d: [d] for d in destinations}
    for k in ranked[:merged]:
        groups[-best[k][1]].append(k)
    kept = ranked[merged:]
    small = torch.stack([x[k] for k in kept] + [x[groups[d]].mean(0) for d in destinations])
    back = x.clone()
    for d in destinations:
        back[groups[d]] = x[groups[d]].mean(0)
    return small, back


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (2, 3)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_it_is_the_papers(size: tuple[int, int], ratio: float) -> None:
    height, width = size
    x = torch.randn(3, height * width, 8)
    merging = Merging.of(x, size, ratio)
    destinations = merging.destinations.tolist()
    windows = {(k // width // 2, k % width // 2) for k in destinations}
    assert len(windows) == len(destinations) == (height // 2) * (width // 2)  # one each, of whole windows
    count = min(int(ratio * height * width), height * width - len(destinations))
    assert merging.merged.shape == (3, count)
    small = merging.merge(x)
    assert small.shape[1] == height * width - count
    for row, mine, back in zip(x, small, merging.unmerge(small), strict=True):
        expected = paper(row, destinations, count)
        torch.testing.assert_close((mine, back), expected)


def test_equal_tokens_come_back_exactly_and_so_do_all_where_none_is_merged() -> None:
    equal = torch.randn(2, 1, 8).mul(8).round().expand(2, 16, 8).contiguous()  # whole: their mean is exact
    merging = Merging.of(equal, (4, 4), 0.75)
    assert torch.equal(merging.unmerge(merging.merge(equal)), equal)
    x = torch.randn(2, 16, 8)
    none = Merging.of(x, (4, 4), 0.0)
    assert torch.equal(none.unmerge(none.merge(x)), x)


def test_attention_sees_fewer_tokens_at_the_finest_level_alone(pipe: TextToImagePipeline) -> None:
    network = pipe.system.network
    seen: list[tuple[int, int]] = []
    handles = [
        block.attn1.core.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[:2]))
        for each in finest(network)
        for block in each.transformer_blocks
    ]
    x, told = torch.randn(2, 4, 16, 16), Condition(hidden=torch.randn(2, 77, 32))
    with torch.no_grad():
        exact = network(x, torch.full((2,), 500.0), told)
        with merged_tokens(network, 0.5):
            merged = network(x, torch.full((2,), 500.0), told)
        again = network(x, torch.full((2,), 500.0), told)
    for handle in handles:
        handle.remove()
    assert seen == [(2, 256)] * 3 + [(2, 128)] * 3 + [(2, 256)] * 3
    assert torch.equal(exact, again)  # nothing is left behind
    assert merged.shape == exact.shape and not torch.equal(merged, exact)


def test_a_picture_is_the_same_alone_and_among_others(pipe: TextToImagePipeline) -> None:
    ratios = (0.5, 0.0, 0.25, 0.5)
    rows = [
        Recipe("a cat", seed=k, num_inference_steps=3, token_merging=each) for k, each in enumerate(ratios)
    ]
    alone = [np.asarray(pipe.draw([row]).images[0], np.int16) for row in rows]
    for done in pipe.draw_each(rows, together=4):
        assert done.error is None
        assert np.abs(np.asarray(done.image, np.int16) - alone[done.place]).max() <= 1
    exact = [
        np.asarray(pipe("a cat", seed=k, num_inference_steps=3, progress=False).images[0]) for k in (0, 1)
    ]
    assert np.array_equal(exact[1], alone[1]) and not np.array_equal(exact[0], alone[0])


def test_what_cannot_be_is_told(
    pipe: TextToImagePipeline, folder: Path, tmp_path: Path, capsys: object
) -> None:
    for ratio in (-0.1, 0.8, float("nan")):
        with pytest.raises(UserError, match="token_merging is"):
            pipe("a cat", token_merging=ratio)
    with pytest.raises(UserError, match="token_merging is for U-Nets"):
        token_merging.check(DenoisingNetwork())
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a cat", "token_merging": 0.9}\n')
    assert [row.error for row in read_rows(tmp_path / "rows.jsonl")] == [""]
    for words in (["a cat", "--token-merging", "2"], ["--file", str(tmp_path / "rows.jsonl")]):
        assert main([*words, "--model", str(folder), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err.strip()  # type: ignore[attr-defined]
        assert "token_merging is" in said and "\n" not in said


def test_the_recipe_goes_through_a_png(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    drawn = pipe("a cat", token_merging=np.float32(0.5), feature_reuse=np.int64(2), num_inference_steps=2)
    drawn.images[0].save(tmp_path / "a.png", pnginfo=drawn.recipes[0].png_info())
    recipe = read_recipe(tmp_path / "a.png")
    assert (recipe.token_merging, recipe.feature_reuse) == (0.5, 2)
    assert np.array_equal(np.asarray(pipe.draw([recipe]).images[0]), np.asarray(drawn.images[0]))


@torch.no_grad()
def test_a_map_of_one_row_has_nothing_to_merge(pipe: TextToImagePipeline) -> None:
    network = pipe.system.network
    width = network.wants(pipe.system.autoencoder.config.latent_channels)["hidden"]
    channels = network.config.in_channels
    given = torch.randn(1, channels, 1, 16), torch.tensor([5.0]), Condition(hidden=torch.randn(1, 7, width))
    expected = network(*given)
    with merged_tokens(network, 0.5):
        assert torch.equal(network(*given), expected)

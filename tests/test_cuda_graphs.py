"""CUDA graphs in place of single launches: the same pictures, whatever changes between two."""

from pathlib import Path

import pytest
import torch
from random_lora import CASES, made
from tiny import tiny_pipeline_folder, tiny_unet

from ldm.backends.cuda_graphs import CUDAGraphs
from ldm.checkpoints.lora import write_lora
from ldm.condition import Condition
from ldm.errors import UserError
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from pipelines import TextToImagePipeline


def test_it_is_for_gpus_and_says_so(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder(tmp_path, "sd1")
    with pytest.raises(UserError, match="CUDA GPUs"):
        TextToImagePipeline.from_pretrained(folder, device="cpu", backend="cuda_graphs")
    with pytest.raises(UserError, match="did you mean cuda_graphs"):
        TextToImagePipeline.from_pretrained(folder, device="cpu", backend="cuda_graph")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="low_memory and backend"):
        TextToImagePipeline.from_pretrained(folder, backend="cuda_graphs", low_memory=True)


def test_elsewhere_a_network_computes_as_it_did() -> None:
    theirs = tiny_unet("sd1")
    unet = UNet(UNetConfig.from_diffusers(dict(theirs.config))).eval().requires_grad_(False)
    width = unet.config.cross_attention_dim
    given = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 600.0]), Condition(hidden=torch.randn(2, 5, width))
    with torch.no_grad():
        expected = unet(*given)
        graphs = CUDAGraphs(unet)
        assert torch.equal(unet(*given), expected) and not graphs.notes()
        graphs.remove()
        assert torch.equal(unet(*given), expected) and "forward" not in unet.__dict__


@pytest.mark.gpu
def test_pictures_are_the_same(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder(tmp_path, "sd1")
    plain = TextToImagePipeline.from_pretrained(folder, device="cuda", torch_dtype=torch.float32)
    pipe = TextToImagePipeline.from_pretrained(
        folder, device="cuda", torch_dtype=torch.float32, backend="cuda_graphs"
    )

    def alike(**settings: object) -> None:
        one, other = (
            torch.from_numpy(
                each(
                    "a cat", seed=0, num_inference_steps=5, output_type="np", progress=False, **settings
                ).images
            )
            for each in (plain, pipe)
        )
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)

    for _ in range(2):
        alike()
    alike(height=48, num_images_per_prompt=3)
    alike(guidance_scale=1.0)
    write_lora(tmp_path / "ink.safetensors", made(plain, CASES["sd1"]))
    for each in (plain, pipe):
        each.adapters.load_lora(tmp_path / "ink.safetensors", name="ink")
    alike()
    for each in (plain, pipe):
        each.adapters.merge()
    alike()
    alike()
    for each in (plain, pipe):
        each.adapters.unload_loras()
    alike()
    with torch.no_grad():
        assert pipe.system.network.forward._captured  # type: ignore[attr-defined]

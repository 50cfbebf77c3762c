"""Training steps: our loop, with its cache and without, against the steps of diffusers' text-to-image script.

diffusers' examples are no part of its package, so `DiffusersTraining` does what its train_text_to_image.py does in a
step, with diffusers' own modules: pictures opened, cut, flipped and tokenised as the loader asks for them, autoencoder
and text encoder in the training's precision, U-Net in float32 under autocast, AdamW, clipping, a schedule.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.pictures import open_raster
from ldm.training.loop import Trainer
from ldm.training.run import read_run

STEPS = 4  # a round


def contenders(folder: Path, model: Path, pictures: Path, batch_size: int, precision: str) -> dict[str, Any]:
    """Each does STEPS optimizer steps a round on the same folder of `pictures`, from the same `model`'s folder.

    folder: for what ours writes.
    """
    settings = (folder, model, pictures, batch_size, precision)
    return {
        "diffusers": DiffusersTraining(model, pictures, batch_size, precision),
        "ours, no cache": _ours(*settings, cached=False),
        "ours, with cache": _ours(*settings, cached=True),
    }


def _ours(
    folder: Path, model: Path, pictures: Path, batch_size: int, precision: str, cached: bool
) -> Callable[[], int]:
    """Our loop's own step, by configs/finetune.yaml: as `accelerate launch scripts/train.py` runs it."""
    output = folder / ("cached" if cached else "plain")
    cache = json.dumps(str(output / "cache")) if cached else "null"
    run = read_run(
        "configs/finetune.yaml",
        [
            f"output={output}",
            f"text_to_image.base={model}",
            f"text_to_image.data.path={pictures}",
            f"text_to_image.data.cache={cache}",
            f"loop.batch_size={batch_size}",
            f"loop.precision={precision}",
        ],
    )
    trainer = Trainer(run.objective(), run.loop, run.output)

    def work() -> int:
        for _ in range(STEPS):
            trainer.step()
        return STEPS * batch_size

    return work


class DiffusersTraining:
    """What train_text_to_image.py does in a step, with its defaults."""

    def __init__(self, model: Path, pictures: Path, batch_size: int, precision: str):
        from accelerate import Accelerator
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from diffusers.optimization import get_scheduler
        from transformers import AutoModel, AutoTokenizer

        self.accelerator = Accelerator(mixed_precision=precision)
        device = self.accelerator.device
        self.dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.noise = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
        self.tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
        frozen = [
            AutoModel.from_pretrained(model / "text_encoder"),
            AutoencoderKL.from_pretrained(model, subfolder="vae"),
        ]
        self.text, self.autoencoder = (each.requires_grad_(False).to(device, self.dtype) for each in frozen)
        unet = UNet2DConditionModel.from_pretrained(
            model, subfolder="unet", torch_dtype=torch.float32
        ).train()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=1e-2)
        rate = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=60)
        data = Folder(pictures, self.tokenizer, self.autoencoder.config.sample_size)
        loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True, drop_last=True)
        self.unet, self.optimizer, self.loader, self.rate = self.accelerator.prepare(
            unet, optimizer, loader, rate
        )
        self.batches = self._endless()
        self.batch_size = batch_size

    def __call__(self) -> int:
        for batch in itertools.islice(self.batches, STEPS):
            self.step(batch)
        return STEPS * self.batch_size

    def step(self, batch: dict[str, Tensor]) -> None:
        with self.accelerator.accumulate(self.unet):
            pictures = batch["pixel_values"].to(self.dtype)
            latents = (
                self.autoencoder.encode(pictures).latent_dist.sample()
                * self.autoencoder.config.scaling_factor
            )
            noise = torch.randn_like(latents)
            steps = torch.randint(
                0, self.noise.config.num_train_timesteps, (len(latents),), device=latents.device
            )
            noisy = self.noise.add_noise(latents, noise, steps)
            hidden = self.text(batch["input_ids"])[0]
            if self.noise.config.prediction_type == "v_prediction":
                target = self.noise.get_velocity(latents, noise, steps)
            else:
                target = noise
            predicted = self.unet(noisy, steps, hidden).sample
            loss = F.mse_loss(predicted.float(), target.float())
            self.accelerator.gather(loss.repeat(self.batch_size)).mean().item()  # for its log
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self.rate.step()
            self.optimizer.zero_grad()

    def _endless(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self.loader


class Folder(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Pictures with metadata.jsonl: resized, cut to a square in the middle, flipped half of the time."""

    def __init__(self, folder: Path, tokenizer: Any, side: int):
        self.folder, self.tokenizer, self.side = folder, tokenizer, side
        self.rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        from PIL import Image, ImageOps

        row = self.rows[index]
        with open_raster((self.folder / row["file_name"]).read_bytes()) as opened:
            picture = ImageOps.fit(opened.convert("RGB"), (self.side, self.side), Image.Resampling.BILINEAR)
        pixels = np.asarray(picture)[:, :: -1 if torch.rand(()) < 0.5 else 1]
        tokens = self.tokenizer(
            row["text"],
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        values = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1).div(127.5).sub(1).contiguous()
        return {"pixel_values": values, "input_ids": tokens.input_ids[0]}

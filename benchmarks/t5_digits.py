"""T5 as the text encoder of a small run: coloured digits, drawn from captions that a tiny T5 reads.

t5_digits.py prepare    the pictures with captions, and a T5 made here, into runs/t5
t5_digits.py judge      draw every digit in every colour, and judge the pictures; a sheet into benchmarks/t5-digits.png
Between the two: python scripts/train.py --config configs/lectures/t5-digits.yaml

No weights of a published T5 are in this project: the encoder is T5's architecture (Raffel et al. 2020) with a unigram
vocabulary trained on the captions, and weights that stay as they were drawn. Words are told apart by their embeddings,
places by the relative positions; that it understands language is not claimed. Six combinations of digit and colour are
never trained.
"""

import argparse
import json
import math
import re
import string
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from ldm.checkpoints.folder import whole_folder
from ldm.console import Parser, command, line
from ldm.pictures import png
from ldm.training.data.arrays import digits

FOLDER = Path("runs/t5")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 150, 50),
    "blue": (30, 60, 220),
    "orange": (245, 140, 0),
    "purple": (140, 40, 170),
    "black": (20, 20, 20),
}
HELD_OUT = {(3, "red"), (7, "blue"), (0, "green"), (5, "orange"), (8, "purple"), (2, "black")}
_SIDE, _UNSEEN = 32, 297  # pixels; digits kept from training
_SEEDS = 4


def captions(digit: int, colour: str) -> list[str]:
    """Return the wordings of a picture's caption."""
    word = WORDS[digit]
    return [f"a {colour} {word}", f"the number {word} in {colour}", f"{word}, written in {colour} ink"]


def render(digit: np.ndarray, colour: str) -> Image.Image:
    """Draw a digit (8, 8) in [-1, 1] in colour on white."""
    ink = Image.fromarray(((digit + 1) * 127.5).round().astype(np.uint8)).resize(
        (_SIDE, _SIDE), Image.Resampling.BICUBIC
    )
    return Image.composite(
        Image.new("RGB", ink.size, COLOURS[colour]), Image.new("RGB", ink.size, "white"), ink
    )


def read(picture: Image.Image) -> tuple[np.ndarray, str]:
    """Return the ink of a drawn digit, (8, 8) in [-1, 1], and the colour that its mean is nearest to."""
    pixels = np.asarray(picture, np.float64)
    ink = (255 - pixels).max(-1)
    ink = ink / max(np.quantile(ink, 0.99), 60)  # 60: an empty picture stays empty
    pure = 255 - (255 - pixels) / ink[..., None].clip(
        1e-6
    )  # without the white that it is mixed with at an edge
    mean = (pure * ink[..., None] ** 2).sum((0, 1)) / (ink**2).sum().clip(1e-6)
    name = min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - mean).sum()))
    small = ink.clip(0, 1).reshape(8, _SIDE // 8, 8, _SIDE // 8).mean((1, 3))
    return small * 2 - 1, name


def prepare() -> None:
    """Write the pictures with their captions, and the text encoder. Raises UserError."""
    pictures, labels = digits()
    rng, lines, texts = np.random.default_rng(0), list[str](), list[str]()
    with whole_folder(FOLDER / "pictures") as new:
        for k in range(len(pictures) - _UNSEEN):
            digit = int(labels[k])
            allowed = [name for name in COLOURS if (digit, name) not in HELD_OUT]
            colour = allowed[int(rng.integers(len(allowed)))]
            render(pictures[k, 0].numpy(), colour).save(new / f"{k:04d}.png")
            said = captions(digit, colour)
            lines.append(json.dumps({"file_name": f"{k:04d}.png", "text": said}) + "\n")
            texts += said
        (new / "metadata.jsonl").write_text("".join(lines))
    with whole_folder(FOLDER / "text") as new:
        text_encoder(texts, new)


def text_encoder(texts: list[str], folder: Path) -> None:
    """Write a T5 encoder of 0.1 M parameters and its tokenizer, a unigram vocabulary of these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    # SentencePiece's model of pieces and their log-probabilities (Kudo 2018): here words, as often as they occur, and
    # letters for all others. So small a vocabulary needs no search for the best pieces.
    words = Counter(chain.from_iterable(re.findall(r"\w+|[^\w\s]", each) for each in texts))
    total = sum(words.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [
        (f"▁{word}" if word.isalnum() else word, math.log(n / total)) for word, n in words.most_common()
    ]
    pieces += [(each, -20.0) for each in ["▁", *string.ascii_lowercase]]
    tokenizer = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast: Any = T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=16)
    fast.save_pretrained(str(folder / "tokenizer"))
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=64,
        d_kv=16,
        num_heads=4,
        d_ff=128,
        num_layers=2,
        dropout_rate=0.0,
    )
    T5EncoderModel(config).save_pretrained(str(folder / "text_encoder"))


def judge(model: Path, guidance: float, steps: int) -> None:
    """Draw every digit in every colour, and print the shares that are right, of trained and untrained pairs."""
    from sklearn.svm import SVC

    from pipelines import TextToImagePipeline

    pictures, labels = digits()
    known = len(pictures) - _UNSEEN
    judged = SVC(gamma="scale", C=10).fit(*_read_all(pictures[:known], labels[:known]))
    ceiling = judged.score(*_read_all(pictures[known:], labels[known:]))
    line(f"the classifier on {_UNSEEN} real digits that neither it nor the model saw: {100 * ceiling:.1f} %")
    pipe = TextToImagePipeline.from_pretrained(str(model))
    sheet, right = list[Image.Image](), dict[bool, list[tuple[bool, bool]]]({True: [], False: []})
    for colour in COLOURS:
        for digit in range(10):
            drawn = pipe(
                [captions(digit, colour)[seed % 3] for seed in range(_SEEDS)],
                seed=list(range(_SEEDS)),
                height=_SIDE,
                width=_SIDE,
                guidance_scale=guidance,
                num_inference_steps=steps,
            ).images
            for picture in drawn:
                ink, name = read(picture)
                found = int(judged.predict(ink.reshape(1, -1))[0])
                right[(digit, colour) in HELD_OUT].append((found == digit, name == colour))
            sheet.append(drawn[0])
    for held_out, answers in right.items():
        shares = np.array(answers).mean(0)
        both = np.array(answers).all(1).mean()
        line(
            f"{'never trained' if held_out else 'trained'} pairs, {len(answers)} pictures: "
            f"digit {100 * shares[0]:.1f} %, colour {100 * shares[1]:.1f} %, both {100 * both:.1f} %"
        )
    whole = Image.new("RGB", (10 * _SIDE, len(COLOURS) * _SIDE))
    for k, each in enumerate(sheet):
        whole.paste(each, (k % 10 * _SIDE, k // 10 * _SIDE))
    Path("benchmarks/t5-digits.png").write_bytes(png(whole))


def _read_all(pictures: torch.Tensor, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Digits as they are read from pictures, in turn in each colour: (N, 64), and their labels."""
    names = list(COLOURS)
    inks = [read(render(each[0].numpy(), names[k % len(names)]))[0] for k, each in enumerate(pictures)]
    return np.stack(inks).reshape(len(inks), -1), labels.numpy()


@command()
def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "judge"))
    parser.add_argument("--model", type=Path, default=FOLDER / "unet/export")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=20)
    chosen = parser.parse_args()
    if chosen.what == "prepare":
        prepare()
    else:
        judge(chosen.model, chosen.guidance, chosen.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())

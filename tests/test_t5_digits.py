"""The small run under T5: its text encoder reads captions, and what judges it reads pictures."""

import numpy as np
import pytest
import torch

from benchmarks import t5_digits
from ldm.conditioning.load import load_text_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    texts = [
        each
        for digit in range(10)
        for colour in t5_digits.COLOURS
        for each in t5_digits.captions(digit, colour)
    ]
    folder = tmp_path_factory.mktemp("t5")
    t5_digits.text_encoder(texts, folder)
    return load_text_encoder(folder)


def test_words_are_pieces_and_captions_are_told_apart(encoder):
    tokenizer = encoder.tokenizers["text_encoder"]
    assert tokenizer.tokenize("a red seven") == ["▁a", "▁red", "▁seven"]
    assert tokenizer("zero, written in red ink").input_ids[-1] == tokenizer.eos_token_id
    with torch.no_grad():
        embedded, notes = encoder.encode(["a red seven", "a blue seven", "a seven red", "an 8, & red"])
    assert not notes
    states = embedded.text
    assert states.shape[-1] == 64 and bool(states.isfinite().all())
    # Another word, and the same words in another order, are another text.
    apart = torch.cdist(states.flatten(1), states.flatten(1))
    assert apart[~torch.eye(4, dtype=torch.bool)].min() > 0.1 * states.flatten(1).norm(dim=1).mean()


def test_pictures_are_read_as_they_were_drawn():
    pictures, _ = t5_digits.digits()
    for k, colour in enumerate(t5_digits.COLOURS):
        ink, found = t5_digits.read(t5_digits.render(pictures[k, 0].numpy(), colour))
        assert found == colour and ink.shape == (8, 8)
        assert np.corrcoef(ink.ravel(), pictures[k, 0].numpy().ravel())[0, 1] > 0.9

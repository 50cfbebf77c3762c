"""What a prompt becomes, and how prompts of any length fit an encoder's window.

A text encoder reads a window of fixed size (77 tokens for CLIP). A longer prompt is cut into chunks that
each fill a window, and their hidden states are joined along the sequence; nothing is dropped, and a note
says what was done.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.conditioning.prompts.chunks import Chunk, chunks_of
from ldm.conditioning.prompts.weighted import Text, WeightedText
from ldm.conditioning.prompts.weights import Weights
from ldm.errors import UserError


class TextEncoder(Protocol):
    """Prompts to a Condition with `hidden` and, where there is one, `pooled`."""

    @property
    def zeros_without_negative(self) -> bool:
        """Whether a missing negative prompt is a condition of zeros, instead of the empty prompt."""
        ...

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks by their folder's name, for whoever places, offloads, trains or saves them."""
        ...

    @property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizers, by the same names as the networks they serve."""
        ...

    def length(self, prompts: Sequence[Text]) -> int:
        """Return the L that `encode` gives to these prompts: a whole number of windows."""
        ...

    def encode(
        self, prompts: Sequence[Text], *, clip_skip: int = 0, length: int = 0
    ) -> tuple[Condition, list[str]]:
        """Embed the prompts, each a string or a text with weights, all at one L of at least `length`.

        clip_skip: how many more of the last layers to leave out (CLIP only).
        Returns the embedding and a note for each prompt that did not fit one window.
        """
        ...


def encode_pair(
    encoder: TextEncoder, prompts: Sequence[Text], negatives: Sequence[Text] | None = None, clip_skip: int = 0
) -> tuple[Condition, Condition, list[str]]:
    """Return the prompts and their negatives at the same L, as classifier-free guidance needs them, and the notes.

    `negatives` None is "no negative prompt". As in diffusers, `clip_skip` leaves the negatives alone.
    """
    if negatives is not None and len(negatives) != len(prompts):
        raise UserError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one for each")
    if negatives is None and encoder.zeros_without_negative:
        positive, notes = encoder.encode(prompts, clip_skip=clip_skip)
        return positive, positive.zeros(), notes
    against = list(negatives) if negatives is not None else [""] * len(prompts)
    length = max(encoder.length(prompts), encoder.length(against))
    positive, notes = encoder.encode(prompts, clip_skip=clip_skip, length=length)
    negative, more = encoder.encode(against, length=length)
    return positive, negative, list(dict.fromkeys(notes + more))


@dataclass(frozen=True)
class Window:
    """One window of an encoder: `size` tokens, the special ones around the text and the padding included."""

    size: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad: int

    @property
    def capacity(self) -> int:
        """Tokens of text that fit."""
        return self.size - len(self.prefix) - len(self.suffix)

    def fill(self, text: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the window's token ids around at most `capacity` tokens, and its mask (1 where not padding)."""
        used = [*self.prefix, *text, *self.suffix]
        padding = self.size - len(used)
        return used + [self.pad] * padding, [1] * len(used) + [0] * padding

    def stretched(self, tokens: int) -> "Window":
        """Return the window grown, where needed, to hold so many tokens of text."""
        return replace(self, size=max(self.size, self.size - self.capacity + tokens))


# (module, token ids (N, S), mask (N, S) or None, clip_skip) -> hidden states (N, S, D), pooled (N, P) or None
States = Callable[[nn.Module, Tensor, Tensor | None, int], tuple[Tensor, Tensor | None]]


@dataclass
class WindowedEncoder:
    """A network that reads windows of tokens: the one TextEncoder behind CLIP, OpenCLIP, BERT and T5.

    tokenize: a prompt to its token ids, without special ones.
    states: the architecture's way to run the network.
    name: the component's name in a diffusers folder.
    masked: the network does not see padding.
    stretches: the network reads longer sequences too (T5's relative positions), so a long prompt stays whole.
    tokenizer: what `tokenize` comes from, for whoever saves it or adds tokens.
    """

    module: nn.Module
    tokenize: Callable[[str], list[int]]
    window: Window
    states: States
    name: str = "text_encoder"
    masked: bool = False
    stretches: bool = False
    zeros_without_negative: bool = False
    tokenizer: Any = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {self.name: self.module}

    @property
    def tokenizers(self) -> dict[str, Any]:
        return {self.name: self.tokenizer}

    def length(self, prompts: Sequence[Text]) -> int:
        return self._length([self._chunks(prompt) for prompt in _distinct(prompts)])

    def encode(
        self, prompts: Sequence[Text], *, clip_skip: int = 0, length: int = 0
    ) -> tuple[Condition, list[str]]:
        each = _distinct(prompts)
        texts = [self._chunks(prompt) for prompt in each]
        length = max(length, self._length(texts))
        window = replace(self.window, size=length) if self.stretches else self.window
        count = length // window.size
        chunks = [chunk for own in texts for chunk in own + [_EMPTY] * (count - len(own))]
        hidden, pooled = self._run(chunks, window, clip_skip)
        # (B * count, S, D) -> (B, count * S, D); the first chunk speaks for the prompt.
        embedding = Condition(
            hidden.reshape(len(texts), length, -1), None if pooled is None else pooled[::count]
        )
        notes = [self._note(prompt, own) for prompt, own in zip(each, texts, strict=True)]
        places = torch.tensor([each.index(prompt) for prompt in prompts], device=hidden.device)
        return embedding.map(lambda part: part[places]), [note for note in notes if note]

    def _run(self, chunks: Sequence[Chunk], window: Window, clip_skip: int) -> tuple[Tensor, Tensor | None]:
        """The states (N, S, D) of the chunks under their weights, and the pooled vectors (N, P) of their words."""
        weights = Weights(chunks, len(window.prefix))
        rows: list[list[int]] = []
        masks: list[list[int]] = []
        texts = [(chunk.ids, frozenset[int]()) for chunk in chunks]
        texts += [(chunks[place].ids, tokens) for place, tokens in weights.hidden]
        texts += [((), frozenset[int]())] if weights.wants_empty else []
        for text, unseen in texts:
            row, mask = window.fill(text)
            rows.append(row)
            masks.append([0 if k in unseen else int(not self.masked or bit) for k, bit in enumerate(mask)])
        device = execution_device(self.module)
        ids = torch.tensor(rows, device=device)
        mask = torch.tensor(masks, device=device) if self.masked or weights.hidden else None
        states, pooled = self.states(self.module, ids, mask, clip_skip)
        n, hidden = len(chunks), len(chunks) + len(weights.hidden)
        found = weights.apply(states[:n], states[-1] if weights.wants_empty else None, states[n:hidden])
        return found, None if pooled is None else pooled[:n]

    def _chunks(self, prompt: Text) -> list[Chunk]:
        return chunks_of(prompt, self.tokenize, None if self.stretches else self.window.capacity)

    def _length(self, texts: Sequence[Sequence[Chunk]]) -> int:
        if self.stretches:
            return self.window.stretched(max(len(own[0].ids) for own in texts)).size
        return max(len(own) for own in texts) * self.window.size

    def _note(self, prompt: Text, chunks: Sequence[Chunk]) -> str:
        tokens = sum(len(chunk.ids) for chunk in chunks)
        wanted = len(prompt.windows) if isinstance(prompt, WeightedText) else 1
        if tokens <= self.window.capacity or (len(chunks) <= wanted and not self.stretches):
            return ""
        words = prompt if isinstance(prompt, str) else prompt.text
        which = f'prompt "{words[:24].strip()}..." of {tokens} tokens was encoded'
        if self.stretches:
            return f"{which} whole, beyond the usual {self.window.capacity}"
        return f"{which} in {len(chunks)} chunks of {self.window.capacity}"


_EMPTY = Chunk((), (), (), "")


def _distinct(prompts: Sequence[Text]) -> list[Text]:
    """Each prompt once: those given many times, like the empty negative, need one run of the network."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(each, Text) for each in prompts):
        raise UserError("give a list of at least one prompt, each a string")
    return list(dict.fromkeys(prompts))


def execution_device(module: nn.Module) -> torch.device:
    """Return where the module computes: accelerate's hooks know it while the weights rest elsewhere."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((each for each in devices if each is not None), None)
    return torch.device(device) if device is not None else next(module.parameters()).device

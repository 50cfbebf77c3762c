"""What a run is asked for: which rows, by which model, with which settings, into which folder."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from ldm import __version__
from ldm.backends import Backend
from ldm.config import to_dict
from ldm.console import note
from ldm.models.quantization import Quantization
from pipelines import TextToImagePipeline
from pipelines.batch.items import count_items, file_digest
from pipelines.batch.ledger import Ledger
from pipelines.batch.store import Files, Format, Shards, Store
from pipelines.options import LOADING
from pipelines.placement import LowMemory
from pipelines.uses import EmbeddingUse, LoRAUse

_BLOCK = 8  # groups at most: among so many rows alike ones are looked for
_SMALL = 16  # blocks that a run has at least, where it has groups enough: what processes share out
_PROGRAM, _ROOM = 1.5e9, 0.8  # bytes of a process beside its weights; the share of memory that all may take


@dataclass(frozen=True)
class Setup:
    """A run, the same in every process of it.

    defaults: of Recipe, for rows that don't say. dtype: None is what suits the machine that the run is begun on.
    together: pictures of a group, which are drawn at once. shard: pictures of a shard, about, for it is of whole
    blocks. wildcards: whether prompts have them; wildcard_folder: where their words are.
    """

    rows: Path
    out: Path
    defaults: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    dtype: str | None = None
    device: str | None = None
    variant: str | None = None
    prediction_type: str | None = None
    fast: bool = False
    low_memory: LowMemory | None = None
    backend: Backend = "torch"
    quantization: Quantization | None = None
    loras: tuple[LoRAUse, ...] = ()
    lora_folders: tuple[Path, ...] = ()
    embeddings: tuple[EmbeddingUse, ...] = ()
    together: int = 8
    format: Format = "files"
    shard: int = 1024
    infotext: bool = False
    wildcards: bool = False
    wildcard_folder: Path | None = None
    strict: bool = False

    def load(self, place: int = 0) -> TextToImagePipeline:
        """Load the model and its adapters. place: of the process among several, which take the accelerators in turn.

        Raises UserError.
        """
        device = self.device
        if device in (None, "cuda") and torch.cuda.is_available():
            device = f"cuda:{place % torch.cuda.device_count()}"
        pipe = TextToImagePipeline.from_pretrained(
            self.model,
            torch_dtype=None if self.dtype is None else getattr(torch, self.dtype),
            device=device,
            **{name: getattr(self, name) for name in LOADING},
        )
        for each in pipe.adapters.load_again(self.loras, self.embeddings):
            if place == 0:
                note(each)
        return pipe

    def asked(self, pipe: TextToImagePipeline, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return all that decides over the pictures' bytes, as JSON. Raises UserError.

        before: what the run was begun with, if it was. A run keeps its number of threads, and so its rounding.
        """
        digest = file_digest(self.rows)
        if before is not None and before.get("rows") == digest:
            items = before["items"]
        else:
            items = count_items(self.rows)
        size = self.together * max(1, min(_BLOCK, items // (_SMALL * self.together)))
        adapters = pipe.adapters.recipe(pipe.adapters.weights())
        return {
            "rows": digest,
            "together": self.together,
            "model": pipe.system.fingerprint,
            "dtype": str(pipe.dtype).removeprefix("torch."),
            **(
                {}
                if self.backend != "openvino"
                else {"backend": self.backend, self.backend: version(self.backend)}
            ),
            **({} if self.quantization is None else {"quantization": self.quantization}),
            "adapters": to_dict(adapters),
            "settings": to_dict(self.defaults),
            "LoRA folders": [str(each) for each in self.lora_folders],
            "format": self.format if self.format == "files" else f"{self.format}, {self.shard} a shard",
            "infotext": self.infotext,
            "wildcards": self._words(),
            "threads": self.fitting(pipe)[1] if before is None else before["threads"],
            "items": items,
            "block size": size,
            "blocks": -(-items // size),
            "version": __version__,
            "torch": torch.__version__,
        }

    def fitting(self, pipe: TextToImagePipeline) -> tuple[int, int]:
        """Return how many processes suit this machine, and the threads of each: as many as memory has room for.

        They depend on the machine and the model alone, and not on how many processes there come to be: with another
        number of threads sums are rounded otherwise.
        """
        if pipe.device.type != "cpu":
            return torch.accelerator.device_count() if self.device in (None, "cuda") else 1, 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = max(1, int(_within("cpu.max", cores)))
        memory = _within("memory.max", psutil.virtual_memory().total)
        parameters = (p for m in pipe.system.modules().values() for p in m.parameters())
        weights = sum(each.numel() * each.element_size() for each in parameters)
        copies = 2 if self.backend == "torch" else 3  # a compiled network has weights in an order of its own
        processes = max(1, min(cores, int(_ROOM * memory / (copies * weights + _PROGRAM))))
        return processes, max(1, cores // processes)

    def _words(self) -> bool | str:
        """Whether prompts have wildcards; where they have words of files, a hash of these."""
        if not self.wildcards or self.wildcard_folder is None:
            return self.wildcards
        from pipelines.wildcards import Wildcards

        return Wildcards(self.wildcard_folder).digest

    def store(self, ledger: Ledger) -> Store:
        """Return where the pictures go, of a run that is begun."""
        if self.format == "files":
            return Files(self.out)
        size = ledger.asked["block size"]
        return Shards(self.out, max(1, round(self.shard / size)), size)


def _within(file: str, most: float) -> float:
    """The limit that a container sets, by the first number of a file of its cgroup; `most` where it sets none."""
    try:
        limit, *period = Path("/sys/fs/cgroup", file).read_text().split()
        return min(most, int(limit) / (int(period[0]) if period else 1))
    except (OSError, ValueError):  # "max", or another system
        return most

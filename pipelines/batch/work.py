"""A block of a run, drawn: its rows completed, those alike put into groups, and each group drawn at once.

A group is the same whoever draws it and whenever, and no other picture shares the network's calls with it: so its bytes
are the same in a run that was killed, and in one that many processes share.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ldm.config import to_dict
from ldm.console import out_of_memory
from ldm.errors import UserError
from ldm.foreign import one_line
from pipelines import TextToImagePipeline
from pipelines.batch.items import Blocks, Item
from pipelines.batch.ledger import Ledger, Record
from pipelines.batch.setup import Setup
from pipelines.crowd import Drawn, likeness
from pipelines.drawing import Drawing
from pipelines.files import picture_bytes
from pipelines.limits import check_unicode
from pipelines.named_files import row_loras, row_settings
from pipelines.recipe import Recipe
from pipelines.rows import place
from pipelines.uses import LoRAUse

_WAIT = 0.5  # seconds until what others have claimed is looked at again
Seen = Callable[[Sequence[Record]], object]  # is told of records that are on the disk


@dataclass(frozen=True)
class _Ready:
    item: Item
    drawing: Drawing


class Work:
    """Draws blocks of a run that is begun, in this process.

    seen: called for all records that are made here.
    """

    def __init__(
        self, setup: Setup, pipe: TextToImagePipeline, ledger: Ledger, seen: Seen = lambda records: None
    ):
        self.setup, self.pipe, self.ledger, self._seen = setup, pipe, ledger, seen
        self.store = setup.store(ledger)
        self._blocks = Blocks(setup.rows, ledger.asked["block size"], ledger.asked["items"])
        self._wildcards: Any = None
        if setup.wildcards:
            from pipelines.wildcards import Wildcards

            self._wildcards = Wildcards(setup.wildcard_folder)
        self._device = _named(pipe.device)

    @classmethod
    def joined(cls, setup: Setup, place: int = 0) -> "Work":
        """Take part in a run that another process has begun, as number `place` on this machine. Raises UserError."""
        ledger = Ledger(setup.out, begun=True)
        ledger.enter(join=True)
        pipe = setup.load(place)
        ledger.begin(setup.asked(pipe, ledger.stated()))
        return cls(setup, pipe, ledger)

    def draw(self, block: int) -> None:
        """Draw what is left of a block, which is claimed. Raises UserError where it can't be written, or `strict`."""
        if self.pipe.device.type == "cpu":
            torch.set_num_threads(self.ledger.asked["threads"])
        known = self.ledger.begun(block)
        with self._loaded(block) as (ready, bad):
            self._note(block, [self._failed(item, reason) for item, reason in bad], known)
            wanted = [
                group
                for group in groups(ready, self.setup.together)
                if any(each.item.number not in known for each in group)
            ]
            for records in self._drawn(wanted, known):
                self._note(block, records, known)
        self.ledger.finish(block)
        self.store.settle(self.ledger, block)

    def check(self) -> Iterator[str]:
        """Complete every row, and draw nothing; yields what is wrong with those that can't be drawn."""
        for block in range(self.ledger.blocks):
            with self._loaded(block) as (_, bad):
                yield from (f"{place(self.setup.rows, item.row)}: {reason}" for item, reason in bad)

    def _note(self, block: int, records: Sequence[Record], known: dict[int, Record]) -> None:
        """Note records that are new. Raises UserError for one that failed, where `strict`."""
        new = [record for record in records if record["item"] not in known]
        failed = next((record for record in new if record["error"]), None)
        if self.setup.strict and failed:
            new = [record for record in new if not record["error"]]
        if new:
            self.ledger.add(block, new)
            self._seen(new)
        if self.setup.strict and failed:
            raise UserError(failed["where"] + ": " + failed["error"])

    # Rows

    @contextmanager
    def _loaded(self, block: int) -> Iterator[tuple[list["_Ready"], list[tuple[Item, str]]]]:
        """What is to be drawn of a block, and why the rest can't be; the block's own LoRAs are loaded meanwhile.

        All of them are loaded before any row is completed, in an order that is the block's, and none of another block's
        is there: so names, groups and sums are the same, whatever this process has drawn before.
        """
        adapters, asked = self.pipe.adapters, list[tuple[Item, Recipe, list[LoRAUse]]]()
        bad, before = list[tuple[Item, str]](), set(adapters.weights())
        for item in self._blocks.get(block):
            try:
                asked.append((item, *self._asked(item)))
            except UserError as error:
                bad.append((item, str(error)))
        try:
            for recipe in sorted((recipe for _, recipe, _ in asked), key=lambda recipe: recipe.prompt):
                with suppress(UserError):  # which is told when the row is completed
                    self.pipe.load_for([recipe], self.setup.lora_folders)
            for path in sorted({use.path for _, _, uses in asked for use in uses}):
                with suppress(UserError):
                    adapters.named([LoRAUse(path)])
            ready = list[_Ready]()
            for item, recipe, uses in asked:
                try:
                    self.pipe.load_for([recipe], self.setup.lora_folders)
                    drawing = self.pipe.complete(recipe, loras=adapters.named(uses))
                except UserError as error:
                    bad.append((item, str(error)))
                else:  # its pictures are read again when its turn comes: few are held
                    ready.append(_Ready(item, replace(drawing, canvas=None)))
            yield ready, sorted(bad, key=lambda each: each[0].number)
        finally:
            adapters.unload_loras(name for name in adapters.weights() if name not in before)

    def _asked(self, item: Item) -> tuple[Recipe, list[LoRAUse]]:
        """What a row asks for. Raises UserError."""
        if item.error:
            raise UserError(item.error)
        setup, row = self.setup, dict(item.row.settings)
        folder, loras = setup.rows.parent, row.pop("loras", None)
        stated = {**setup.defaults, **row_settings(row, folder)}
        seed = item.seed(stated.get("seed"))
        recipe = Recipe.parse({**to_dict(stated), "seed": seed}, "")
        if self._wildcards is not None:
            recipe = replace(
                recipe,
                prompt=self._wildcards.expand(recipe.prompt, seed),
                negative_prompt=recipe.negative_prompt
                and self._wildcards.expand(recipe.negative_prompt, seed),
            )
        check_unicode(to_dict(recipe))
        return recipe, [] if loras is None else row_loras(loras, folder)

    # Pictures

    def _drawn(self, wanted: list[list[_Ready]], known: dict[int, Record]) -> Iterator[list[Record]]:
        """Draw groups, one after the other; yields the records of each once its pictures are on the disk.

        Of those that are there already nothing is yielded: they are drawn for their neighbours' sake.
        """
        together, begun = self.setup.together, time.perf_counter()
        drawings = [each.drawing for group in wanted for each in group]
        made, left = list[Record](), [len(group) for group in wanted]
        for each in self.pipe.draw_each(drawings, together, waves=True):
            number, place = divmod(each.place, together)
            item = wanted[number][place].item
            if item.number not in known:
                made.append(self._made(item, each))
            left[number] -= 1
            if not left[number]:
                now = time.perf_counter()
                seconds, begun = (now - begun) / len(wanted[number]), now
                yield [{**record, "seconds": round(seconds, 4)} for record in made]
                made = []

    def _made(self, item: Item, drawn: Drawn) -> Record:
        """Put a picture on the disk; returns its record, or that of what prevented it."""
        recipe, image, error = drawn.recipe, drawn.image, drawn.error
        if image is None or error is not None:
            if not isinstance(error, UserError) and not out_of_memory(error):
                raise error or RuntimeError(
                    "there is no picture"
                )  # a fault of ours, or of the device: not the row's
            return self._failed(item, _reason(error))
        stated = {name: value for name, value in asdict(recipe).items() if value is not None}
        return {
            **self._told(item),
            **self.store.save(item.number, picture_bytes(image, recipe, self.setup.infotext)),
            "prompt": recipe.prompt,
            "negative_prompt": recipe.negative_prompt,
            "seed": _unsigned(recipe.seed),
            "width": image.width,
            "height": image.height,
            "settings": json.dumps(stated, ensure_ascii=False, sort_keys=True),
            "notes": "; ".join(drawn.notes) or None,
        }

    def _told(self, item: Item) -> Record:
        return {
            "item": item.number,
            "id": item.row.id,
            "index": item.index,
            "line": item.row.line,
            "where": place(self.setup.rows.name, item.row),
            "time": round(time.time(), 3),
            "device": self._device,
            "file_name": None,
            "error": None,
        }

    def _failed(self, item: Item, reason: str) -> Record:
        """The record of what can't be drawn: as much as is known of the row."""
        settings = item.row.settings
        texts = {name: settings.get(name) for name in ("prompt", "negative_prompt")}
        return {
            **self._told(item),
            **{name: text if isinstance(text, str) else None for name, text in texts.items()},
            "settings": json.dumps(settings, ensure_ascii=True, sort_keys=True, default=str),
            "error": reason,
        }


def draw_open(work: Work, ledger: Ledger, between: Callable[[], object] = lambda: None) -> None:
    """Draw blocks until all are done, those of others who stopped halfway included.

    between: called after each, and while others have all that is left. Raises UserError.
    """
    while left := ledger.open_blocks():
        idle = True
        for block in left:
            with ledger.claim(block) as mine:
                if not mine:
                    continue
                work.draw(block)
            idle = False
            between()
        if idle:
            between()
            time.sleep(_WAIT)


def groups(ready: Sequence[_Ready], together: int) -> list[list[_Ready]]:
    """Put drawings that make calls of one shape, and about as many, next to each other, `together` a group."""
    alike = sorted(ready, key=lambda each: (*likeness(each.drawing), each.item.number))
    return [alike[k : k + together] for k in range(0, len(alike), together)]


def _named(device: torch.device) -> str:
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _reason(error: Exception | None) -> str:
    return str(error) if isinstance(error, UserError) else f"out of memory ({one_line(error or Exception())})"


def _unsigned(seed: int | None) -> int | None:
    """The same seed as torch's generators take it, without a sign."""
    return None if seed is None else seed % 2**64

"""A network as OpenVINO's graph, whose weights are inputs: it is the same for all weights, and small enough to keep.

Tracing and converting a network takes much longer than compiling it. The graph is kept in a folder for the next start:
`LDM_CACHE`, or `ldm-text-to-image` in XDG_CACHE_HOME or ~/.cache. Weights are never in it: a graph is less than a
megabyte, whatever the model's size, and serves for changed weights too. Its name is a hash of all that it follows from;
whatever is wrong with the folder, or what lies in it, costs the time of converting once more, and nothing else.
"""

import hashlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ldm
from ldm.backends.arguments import Form, example
from ldm.errors import UserError
from ldm.files import cache_folder, write_bytes
from ldm.models.ip_adapter import DecoupledAttention
from ldm.models.lora import LoRALayer

_MAGIC = b"ldm openvino graph 1\n"
_DIGEST = 32  # bytes of a sha256


@dataclass(frozen=True)
class Adapters:
    """The forward hooks inside a network that take part in a graph, in the order of its modules.

    A LoRA's scale is an input of the graph, so that one serves for all of its weights.
    """

    hooks: tuple[LoRALayer | DecoupledAttention, ...]

    @property
    def loras(self) -> list[LoRALayer]:
        """Those of LoRAs."""
        return [each for each in self.hooks if isinstance(each, LoRALayer)]

    def facts(self) -> list[str]:
        """What the graph depends on."""
        return [each.key if isinstance(each, DecoupledAttention) else "lora" for each in self.hooks]


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in a module: `owner` is its dict of parameters or of buffers."""

    owner: dict[str, Any]
    name: str
    tensor: Tensor


def slots(modules: Sequence[nn.Module]) -> list[Slot]:
    """Return the places of all tensors of these modules themselves, not of those inside them."""
    return [
        Slot(owner, name, tensor)
        for module in modules
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        if tensor is not None
    ]


class _Function(nn.Module):
    """A network as a function of its weights, the scales of its LoRAs and its inputs. For the time of a trace only."""

    def __init__(self, call: Callable[..., Tensor], places: list[Slot], adapters: Adapters, form: Form):
        super().__init__()
        self._what = (call, places, adapters.loras, form)  # in a tuple: no part of this module

    def forward(self, *tensors: Tensor) -> Tensor:
        call, places, loras, form = self._what
        scales, inputs = (
            (tensors[len(places)], tensors[len(places) + 1 :]) if loras else (None, tensors[len(places) :])
        )
        before = [each.scale for each in loras]
        try:
            for slot, tensor in zip(places, tensors, strict=False):
                slot.owner[slot.name] = tensor
            for k, each in enumerate(loras if scales is not None else ()):
                each.scale = scales[k]  # pyright: ignore
            return call(*form.arguments(inputs))
        finally:
            for slot in places:
                slot.owner[slot.name] = slot.tensor
            for each, scale in zip(loras, before, strict=True):
                each.scale = scale


def graph(
    module: nn.Module,
    call: Callable[..., Tensor],
    places: list[Slot],
    adapters: Adapters,
    form: Form,
    inputs: Sequence[Tensor],
) -> Any:
    """Return the openvino.Model of a call: from the cache, or converted and put there.

    Its inputs are the tensors of `places`, then where there are LoRAs all their scales in one, then those of the form.
    Raises whatever torch and OpenVINO do where the network can't be converted.
    """
    path = cache_folder("openvino") / f"{_key(module, places, adapters, form)}.graph"
    found = _read(path)
    if found is None:
        found = _converted(call, places, adapters, form, inputs)
        with suppress(OSError, UserError, RuntimeError):
            _write(path, found)
    return found


def _converted(
    call: Callable[..., Tensor], places: list[Slot], adapters: Adapters, form: Form, inputs: Sequence[Tensor]
) -> Any:
    import openvino
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    weights = [slot.tensor.detach() for slot in places]
    loras = adapters.loras
    more = [torch.ones(len(loras)), *example(inputs)] if loras else example(inputs)
    function = _Function(call, places, adapters, form)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns of each test of a shape in Python
        decoder = TorchScriptPythonDecoder(
            function, example_input=(*weights, *more), trace_kwargs={"check_trace": False}
        )
    shapes = [list(each.shape) for each in weights] + [[-1] * each.ndim for each in more]
    kinds = [element_type(each.dtype) for each in (*weights, *more)]
    described = [(openvino.PartialShape(shape), kind) for shape, kind in zip(shapes, kinds, strict=True)]
    return openvino.convert_model(decoder, input=described)


def element_type(dtype: torch.dtype) -> Any:
    """Return OpenVINO's name of a dtype. Raises KeyError for one that it is not given."""
    from openvino import Type

    types = {
        torch.float32: Type.f32,
        torch.bfloat16: Type.bf16,
        torch.int64: Type.i64,
        torch.int32: Type.i32,
    }
    return types[dtype]


# The cache


def _key(module: nn.Module, places: list[Slot], adapters: Adapters, form: Form) -> str:
    """A hash of all that a graph follows from; of the weights it is the shapes."""
    import openvino

    facts = (
        ldm.__version__,
        torch.__version__,
        openvino.__version__,
        _sources(sys.modules[type(module).__module__].__file__ or ""),
        type(module).__qualname__,
        getattr(module, "config", None),
        str(module),  # what its settings do not say
        [(slot.name, tuple(slot.tensor.shape), str(slot.tensor.dtype)) for slot in places],
        adapters.facts(),
        form,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


@cache
def _sources(own: str) -> str:
    """A hash of the program that is traced: while it is worked on, its version stays the same."""
    package = Path(ldm.__file__).parent
    files = [
        *(package / "models").glob("*.py"),
        *(package / "backends").glob("*.py"),
        package / "condition.py",
    ]
    digest = hashlib.sha256()
    for path in [*sorted(files), Path(own)]:
        with suppress(OSError):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> Any:
    """The graph in a file; None where there is none, or it is damaged."""
    import openvino

    try:
        data = path.read_bytes()
        start = len(_MAGIC) + _DIGEST
        magic, digest, body = data[: len(_MAGIC)], data[len(_MAGIC) : start], data[start:]
        if magic != _MAGIC or hashlib.sha256(body).digest() != digest:
            return None
        length, _, rest = body.partition(b"\n")
        description, constants = rest[: int(length)], rest[int(length) :]
        held = torch.frombuffer(bytearray(constants or b"\0"), dtype=torch.uint8).numpy()
        return openvino.Core().read_model(description, openvino.Tensor(held))
    except (OSError, ValueError, RuntimeError):
        return None


def _write(path: Path, model: Any) -> None:
    """Write a graph, whole or not at all. Raises OSError, UserError or RuntimeError."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "graph.xml"
        openvino.save_model(model, where, compress_to_fp16=False)
        description, constants = where.read_bytes(), where.with_suffix(".bin").read_bytes()
    body = b"%d\n" % len(description) + description + constants
    write_bytes(path, _MAGIC + hashlib.sha256(body).digest() + body)

"""A graph with its weights, compiled for the CPU."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ldm.backends.graphs import element_type

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Compiled:
    """A compiled graph, as a function of its inputs."""

    def __init__(self, model: Any, weights: Sequence[Tensor], precision: str, held: object = None):
        """Compile it. Raises RuntimeError where it can't be.

        model: an openvino.Model, whose first inputs become constants. weights: these, in whose memory the constants
        are, where that is contiguous. precision: in which it computes. held: what must live as long.
        """
        from openvino import op

        memory = [each.contiguous() for each in weights]  # a copy of what is in channels last
        for each, node in zip(memory, model.get_parameters(), strict=False):
            node.output(0).replace(op.Constant(_shared(each), shared_memory=True).output(0))
            model.remove_parameter(node)
        model.validate_nodes_and_infer_types()
        self._held = (weights, memory, held)
        waves = _cut_waves(model) if precision == "bf16" else None
        self._waves = None if waves is None else _compiled(waves, "f32").create_infer_request()
        self._model = _compiled(model, precision)
        self._request = self._model.create_infer_request()

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the graph's output for these inputs, in a memory of its own."""
        from openvino import Type

        memory = [each.detach().contiguous() for each in inputs]
        given = [_shared(each) for each in memory]
        if self._waves is not None:
            for k, each in enumerate(given):
                self._waves.set_input_tensor(k, each)
            self._waves.infer()
            given += self._waves.output_tensors
        for k, each in enumerate(given):
            self._request.set_input_tensor(k, each)
        self._request.infer()
        output = self._request.get_output_tensor(0)
        if output.element_type == Type.bf16:
            return torch.from_numpy(output.data.view("int16").copy()).view(torch.bfloat16)
        return torch.from_numpy(output.data.copy())


def _cut_waves(model: Any) -> Any:
    """Cut sines and cosines, with what they are computed of, out of a model, and return them as another one.

    They become inputs of the model, which are the other's outputs. In bfloat16 timestep 997 would be 1000, and the
    angles of its features up to 3 radians off. None where there are no sines.
    """
    from openvino import Model, Type, op

    model_of: Any = Model  # whose annotations don't agree with each other

    def found(inside: Any) -> list[Any]:
        waves = [each for each in inside.get_ordered_ops() if each.get_type_name() in ("Sin", "Cos")]
        return sorted(waves, key=lambda each: each.get_friendly_name())

    other = model.clone()
    results = [op.Result(each.output(0)) for each in found(other)]
    if not results:
        return None
    more = list[Any]()
    for each in found(model):
        more.append(op.Parameter(Type.f32, each.get_output_partial_shape(0)))
        each.output(0).replace(more[-1].output(0))
    model.add_parameters(more)
    return model_of(results, other.get_parameters(), "waves")


def _compiled(model: Any, precision: str) -> Any:
    # Never with fixed shapes: in float32 OpenVINO 2026.4.1 then crashes, in bfloat16 rounding would differ by shape.
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # several processes would sit on the same cores
        "PERFORMANCE_HINT": "LATENCY",
    }
    return _core().compile_model(model, "CPU", settings)


@cache
def _core() -> Any:
    from openvino import Core

    return Core()


def _shared(tensor: Tensor) -> Any:
    """An openvino.Tensor in the memory of a contiguous torch one, which must live as long."""
    from openvino import Shape
    from openvino import Tensor as Shared

    if tensor.dtype is torch.bfloat16:  # which numpy doesn't know
        return Shared(tensor.view(torch.int16).numpy(), Shape(list(tensor.shape)), element_type(tensor.dtype))
    return Shared(tensor.numpy(), shared_memory=True)

"""ComfyUI's graph, `prompt`: nodes by number, each with its class and inputs, of which some are outputs of others.

It is walked backwards: from the node that saves to the KSampler, and from there to the texts, the model and the size.
Every walk sees each node once, so circles end, and nothing recurses.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.infotext.values import Infotext, Taking

_MOST = 5000  # nodes
SAMPLERS = {
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_sde_gpu": "dpmpp_sde",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
}
SCHEDULES = {"normal": "linspace", "simple": "trailing", "ddim_uniform": "leading"}
# Nodes that a sampler of the newer kind has in place of its own settings.
_HELPERS = ("noise", "guider", "sampler", "sigmas")
_TEXTS = ("text", "text_g", "text_l", "string", "value", "prompt", "String", "Text")
_NUMBERS = ("seed", "noise_seed", "value", "int", "number", "float", "Number", "Value")
_PLAIN = (
    "VAEDecode",
    "VAEDecodeTiled",
    "SaveImage",
    "PreviewImage",
    "SaveImageWebsocket",
    "SaveAnimatedWEBP",
)


@dataclass(frozen=True)
class Node:
    """A node of a graph: its class, its inputs, and which outputs of others these are."""

    kind: str
    inputs: Mapping[str, Any]


class Graph:
    """The nodes by their numbers, those that can be read."""

    def __init__(self, found: Mapping[str, Any]):
        self.nodes: dict[str, Node] = {}
        self.used: set[str] = set()  # those of which something was taken
        for key, each in found.items():
            kind, inputs = (
                (each.get("class_type"), each.get("inputs")) if isinstance(each, Mapping) else (None, None)
            )
            if isinstance(kind, str) and isinstance(inputs, Mapping) and len(self.nodes) < _MOST:
                self.nodes[key] = Node(kind[:80], inputs)

    def link(self, value: Any) -> str | None:
        """The number of the node whose output an input is; None where it is a value of its own."""
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int):
            return key if (key := str(value[0])[:80]) in self.nodes else None
        return None

    def inputs(self, key: str, names: Collection[str] | None = None) -> Iterator[str]:
        """Yield the nodes that this one's inputs come from; of these names, or all."""
        for name, value in self.nodes[key].inputs.items():
            if (names is None or name in names) and (source := self.link(value)) is not None:
                yield source

    def upstream(self, starts: Collection[str], names: Collection[str] | None = None) -> Iterator[str]:
        """Yield these nodes and all that feed them, by these inputs or any, nearest first."""
        seen, waiting = set(starts), deque(starts)
        while waiting:
            yield (key := waiting.popleft())
            for source in self.inputs(key, names):
                if source not in seen:
                    seen.add(source)
                    waiting.append(source)

    def value(self, value: Any, names: Collection[str]) -> Any:
        """An input's own value, or that in an input of these names of the node it comes from; None for none."""
        for _ in range(20):
            key = self.link(value)
            if key is None:
                return None if isinstance(value, list | dict) else value
            self.used.add(key)
            inputs = self.nodes[key].inputs
            value = next((inputs[name] for name in names if name in inputs), None)
        return None


def read_graph(found: Mapping[str, Any]) -> Infotext:
    """Return what a graph says of its picture; what it does beyond one text to image pass is named in the notes."""
    taking, graph = Taking("ComfyUI", "comfyui"), Graph(found)
    if len(graph.nodes) < len(found):
        taking.note(f"{len(found) - len(graph.nodes)} of {len(found)} nodes can't be read")
    saves = _saves(graph)
    passes = _passes(graph, saves)
    if not passes:
        taking.note("no sampler leads to a picture that is saved: nothing is taken")
        return taking.done()
    *larger, base = passes
    if larger:
        last = _settings(graph, larger[0])
        strength, steps = (graph.value(last.get(name), _NUMBERS) for name in ("denoise", "steps"))
        taking.number("hr_denoising_strength", strength, taking.beyond)
        taking.number("hr_second_pass_steps", steps, taking.beyond)
        taking.note(
            f"of {len(passes)} samplers one after the other the first is taken; the picture is the last one's"
        )
    _take_sampler(taking, graph, base)
    _tell_the_rest(taking, graph, saves)
    return taking.done()


def _saves(graph: Graph) -> list[str]:
    """The nodes that save pictures; where none is known to, those whose output nobody takes."""
    named = [
        key
        for key, node in graph.nodes.items()
        if ("Save" in node.kind or "Preview" in node.kind)
        and graph.link(node.inputs.get("images")) is not None
    ]
    fed = {source for key in graph.nodes for source in graph.inputs(key)}
    named.sort(key=lambda key: "Save" not in graph.nodes[key].kind)
    return named[:1] or [key for key in graph.nodes if key not in fed]


def _passes(graph: Graph, saves: list[str]) -> list[str]:
    """The samplers that made the picture, the last one first, each of which goes on from the next one's latents."""
    found: list[str] = []
    starts = saves
    while sampler := next(
        (k for k in graph.upstream(starts) if _is_sampler(graph, k) and k not in found), None
    ):
        found.append(sampler)
        starts = list(graph.inputs(sampler, ("latent_image",)))
    graph.used.update(found)
    return found


def _is_sampler(graph: Graph, key: str) -> bool:
    inputs = graph.nodes[key].inputs
    return graph.link(inputs.get("latent_image")) is not None and ("positive" in inputs or "guider" in inputs)


def _settings(graph: Graph, sampler: str) -> dict[str, Any]:
    """A sampler's inputs, and those of the nodes that hold its settings for it."""
    own = dict(graph.nodes[sampler].inputs)
    for name in _HELPERS:
        if (helper := graph.link(own.get(name))) is not None:
            graph.used.add(helper)
            own = {**graph.nodes[helper].inputs, **own}
    return own


def _take_sampler(taking: Taking, graph: Graph, sampler: str) -> None:
    own = _settings(graph, sampler)
    numbers = {
        name: graph.value(own.get(name), _NUMBERS)
        for name in ("seed", "noise_seed", "steps", "cfg", "denoise")
    }
    taking.number("seed", numbers["noise_seed"] if numbers["seed"] is None else numbers["seed"])
    taking.number("num_inference_steps", numbers["steps"])
    taking.number("guidance_scale", numbers["cfg"])
    name = graph.value(own.get("sampler_name"), ("sampler_name", *_TEXTS))
    taking.sampler(name, SAMPLERS)
    if isinstance(name, str) and name.endswith("_gpu"):
        taking.note("its sampler drew noise on a GPU: here the same seed draws another picture")
    taking.schedule(graph.value(own.get("scheduler"), ("scheduler", *_TEXTS)), SCHEDULES)
    if own.get("start_at_step") or own.get("add_noise") == "disable":
        taking.note("its sampler begins on the way, where another one may have ended")
    for setting, side in (("prompt", "positive"), ("negative_prompt", "negative")):
        _take_text(
            taking,
            graph,
            setting,
            own.get(side, own.get("conditioning") if side == "positive" else None),
            side,
        )
    _take_model(taking, graph, own)
    _take_latent(taking, graph, own, numbers["denoise"])


def _take_text(taking: Taking, graph: Graph, setting: str, start: Any, side: str) -> None:
    """Take the text that a condition is made of, and how many of the text encoder's layers are left out for it."""
    first = graph.link(start)
    names = {side, "conditioning", "conditioning_1", "conditioning_2", "conditioning_to", "conditioning_from"}
    found: list[str] = []
    for key in graph.upstream([first] if first else [], names):
        inputs = graph.nodes[key].inputs
        texts = [graph.value(inputs[name], _TEXTS) for name in ("text", "text_g", "text_l") if name in inputs]
        if not texts:
            continue
        graph.used.add(key)
        found += [text for text in texts if isinstance(text, str) and text not in found]
        if len(found) > 1:
            taking.note(f"the {side} condition is made of several texts: the first is taken")
        if setting == "prompt":
            _take_skip(taking, graph, key)
    if found:
        taking.text(setting, found[0])
    elif first:
        taking.note(f"the {side} condition is made of no text that can be found")


def _take_skip(taking: Taking, graph: Graph, text: str) -> None:
    for key in graph.upstream(list(graph.inputs(text, ("clip",))), ("clip",)):
        skip = graph.nodes[key].inputs.get("stop_at_clip_layer")
        if isinstance(skip, int) and not isinstance(skip, bool):
            graph.used.add(key)
            taking.number("clip_skip", -skip - 1)  # theirs counts from -1, the last layer
            return


def _take_model(taking: Taking, graph: Graph, own: Mapping[str, Any]) -> None:
    """Take the names of the model and of the LoRAs on its way, in the order in which they were laid over it."""
    loras: list[tuple[Any, Any]] = []
    for key in graph.upstream([first] if (first := graph.link(own.get("model"))) else [], ("model",)):
        inputs = graph.nodes[key].inputs
        if "lora_name" in inputs:
            graph.used.add(key)
            loras.append((inputs["lora_name"], inputs.get("strength_model", 1.0)))
        for name in ("ckpt_name", "unet_name", "model_name"):
            if name in inputs:
                graph.used.add(key)
                taking.model = taking.model or taking.name(graph.value(inputs[name], (name, *_TEXTS)))
    for name, weight in reversed(loras):
        taking.lora(graph.value(name, ("lora_name", *_TEXTS)), graph.value(weight, _NUMBERS))


def _take_latent(taking: Taking, graph: Graph, own: Mapping[str, Any], denoise: Any) -> None:
    """Take the size of the empty latents that a sampler begins from, or that it begins from a picture."""
    first = graph.link(own.get("latent_image"))
    if first is None:
        return
    inputs = graph.nodes[first].inputs
    if "width" in inputs and "height" in inputs and not any(graph.inputs(first, ("pixels", "samples"))):
        graph.used.add(first)
        for name in ("width", "height"):
            taking.number(name, graph.value(inputs[name], (name, *_NUMBERS)))
        if graph.value(inputs.get("batch_size", 1), _NUMBERS) != 1:
            taking.note(
                "it is one of a batch, whose pictures share one stream of noise: only the first can be redrawn"
            )
        return
    taking.number("strength", denoise, taking.beyond)
    taking.note("it was drawn from another picture, which is not in the graph")


def _tell_the_rest(taking: Taking, graph: Graph, saves: list[str]) -> None:
    """Name the nodes that had a part in the picture, and of which nothing was taken."""
    kinds = [
        graph.nodes[key].kind
        for key in graph.upstream(saves)
        if key not in graph.used and key not in saves and graph.nodes[key].kind not in _PLAIN
    ]
    rest = list(dict.fromkeys(kinds))
    if rest:
        more = f" and {len(rest) - 12} more" if len(rest) > 12 else ""
        taking.note(f"not taken, of the graph's nodes: {', '.join(rest[:12])}{more}")

"""The parts of one layer's adapter, checked against the layer and brought to the form that `ldm.models.lycoris` takes.

Kinds: LoRA (Hu et al. 2021), for convolutions also with a Tucker core (LoCon), LoHa (Hyeon-Woo et al. 2022), LoKr
(Edalati et al. 2022), DoRA on any of them (Liu et al. 2024), (IA)^3 (Liu et al. 2022), differences and new values of
weights and biases. Shapes and scales are those of LyCORIS and of peft.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.lora_names import Layer, shown
from ldm.checkpoints.peft import Settings
from ldm.errors import UserError

_WHOLE = {"alpha", "on_input"}  # the parts that may be whole numbers


def check_parts(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raise UserError unless these are plain tensors of real numbers, each stored in full."""
    for name, each in tensors.items():
        fault = ""
        if each.layout != torch.strided or each.is_quantized or each.is_meta:
            fault = "sparse, quantised or empty of numbers"
        elif each.is_complex() or (not each.is_floating_point() and name.rpartition(".")[2] not in _WHOLE):
            fault = f"of {str(each.dtype).removeprefix('torch.')} numbers"
        elif each.numel() * each.element_size() > each.untyped_storage().nbytes():
            fault = f"{tuple(each.shape)}, and not stored in full"
        elif each.numel() == 0:
            fault = f"{tuple(each.shape)}, which is empty"
        if fault:
            raise UserError(
                f"{where}: {shown([name])} is {fault}, where an adapter has tensors of real numbers"
            )


def is_plain(parts: Mapping[str, Tensor], layer: Layer) -> bool:
    """Tell whether these are the two matrices of a plain LoRA, with its alpha or without."""
    return not layer.norm and {"down", "up"} <= set(parts) <= {"down", "up", "alpha"}


class LayerParts:
    """One layer's parts as a file has them, and what is said of them."""

    def __init__(self, layer: Layer, parts: Mapping[str, Tensor], said: Settings | None, where: Path):
        self.layer, self.parts, self.where = layer, dict(parts), where
        self.said = said or Settings(str(where), {})
        self.out = layer.shape[0]
        self.rest = layer.shape[1:]  # (in[, kh, kw])

    def plain(self) -> tuple[Tensor, Tensor, float]:
        """Return down (r, in[, kh, kw]), up (out, r[, 1, 1]) and alpha. Raises UserError."""
        down, up = self.parts["down"], self.parts["up"]
        rank = self._rank(down)
        try:
            down = self._fitted("down", (rank, *self.rest))
            up = self._fitted("up", (self.out, rank, *(1 for _ in self.rest[1:])))
        except UserError as error:
            raise UserError(
                f"{self.where}: {self.layer.key('lora_A.weight')} is {tuple(down.shape)} and lora_B {tuple(up.shape)}, "
                f"where the layer is {self.layer.shape}: a LoRA for another model"
            ) from error
        return down, up, self._alpha(rank)

    def resolved(self) -> dict[str, Tensor]:
        """Return the parts by the names and in the shapes of `ldm.models.lycoris`. Raises UserError."""
        has = set(self.parts)
        found: dict[str, Tensor] = {}
        matrices = has & {"down", "up", "mid"}
        hada = {each for each in has if each.startswith("hada_")}
        lokr = {each for each in has if each.startswith("lokr_")}
        if len(kinds := [each for each in (matrices, hada, lokr) if each]) > 1:
            first = ", ".join(sorted(each)[0] for each in kinds)
            raise UserError(
                f"{self.where}: {self.layer.key('')[:-1]} has two kinds of adapter at once: {first}"
            )
        if kinds and self.layer.norm:
            raise UserError(
                f"{self.where}: {self.layer.key('')[:-1]} is a norm, which has no matrices to change"
            )
        if matrices or (not kinds and has & {"alpha", "scalar", "magnitude", "dora_scale", "up_bias"}):
            found, rank = self._low_rank()
        elif hada:
            found, rank = self._loha()
        elif lokr:
            found, rank = self._lokr()
        else:
            rank = None
        if kinds:
            found["scale"] = torch.tensor(self._scale(rank), dtype=torch.float64)
            found |= self._magnitude()
        return found | self._values() | self._ia3()

    # The kinds that have a rank

    def _low_rank(self) -> tuple[dict[str, Tensor], int]:
        self._need("down", "up")
        kernel = self.rest[1:]
        ones = tuple(1 for _ in kernel)
        if "mid" not in self.parts:
            rank = self._rank(self.parts["down"])
            found = {"down": self._fitted("down", (rank, *self.rest))}
        else:
            rank = self._rank(self.parts["down"])
            outer = self._rank(self.parts["mid"])
            found = {"down": self._fitted("down", (rank, self.rest[0], *ones))}
            found["mid"] = self._fitted("mid", (outer, rank, *kernel))
            found["up"] = self._fitted("up", (self.out, outer, *ones))
        if "up" not in found:
            found["up"] = self._fitted("up", (self.out, rank, *ones))
        if "up_bias" in self.parts:
            if self.parts.keys() & {"magnitude", "dora_scale"}:
                raise UserError(
                    f"{self.where}: {self.layer.key('lora_B.bias')} stands beside a DoRA's magnitude"
                )
            found["up_bias"] = self._fitted("up_bias", (self.out,))
        return found, rank

    def _loha(self) -> tuple[dict[str, Tensor], int]:
        self._need("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        tucker = bool(self.parts.keys() & {"hada_t1", "hada_t2"})
        self._need(*["hada_t1", "hada_t2"] * tucker)
        found: dict[str, Tensor] = {}
        for side in ("1", "2"):
            a, b, core = f"hada_w{side}_a", f"hada_w{side}_b", f"hada_t{side}"
            rank = self._rank(self.parts[b])
            if tucker:
                found[core] = self._fitted(core, (rank, rank, *self.rest[1:]))
                found[a] = self._fitted(a, (rank, self.out))
                found[b] = self._fitted(b, (rank, self.rest[0]))
            else:
                found[a] = self._fitted(a, (self.out, rank))
                found[b] = self._fitted(b, (rank, math.prod(self.rest)))
        return found, self._rank(self.parts["hada_w1_b"])

    def _lokr(self) -> tuple[dict[str, Tensor], int | None]:
        rank: int | None = None
        sizes: list[tuple[int, int]] = []  # of both factors
        kernel = self.rest[1:]
        for side in ("1", "2"):
            whole, a, b = f"lokr_w{side}", f"lokr_w{side}_a", f"lokr_w{side}_b"
            if whole in self.parts:
                rows, columns = (*self.parts[whole].shape[:2], 1)[:2]
            else:
                self._need(a, b)
                rank = self._rank(self.parts[b])
                tucker = side == "2" and "lokr_t2" in self.parts
                rows = int(self.parts[a].shape[-1] if tucker else self.parts[a].shape[0])
                columns = int(self.parts[b].numel() // rank)
                columns //= math.prod(kernel) if side == "2" and not tucker else 1
            sizes.append((rows, columns))
        (rows, columns), (down_rows, down_columns) = sizes
        if (rows * down_rows, columns * down_columns) != (self.out, self.rest[0]):
            raise self._misfit(next(each for each in self.parts if each.startswith("lokr_")))
        shapes = {
            "lokr_w1": (rows, columns),
            "lokr_w1_a": (rows, rank),
            "lokr_w1_b": (rank, columns),
            "lokr_w2": (down_rows, down_columns, *kernel),
            "lokr_w2_a": (down_rows, rank),
            "lokr_w2_b": (rank, down_columns * math.prod(kernel)),
        }
        if "lokr_t2" in self.parts:
            shapes |= {"lokr_t2": (rank, rank, *kernel), "lokr_w2_a": (rank, down_rows)}
            shapes["lokr_w2_b"] = (rank, down_columns)
        names = [each for each in self.parts if each.startswith("lokr_")]
        return {each: self._fitted(each, shapes[each]) for each in names}, rank

    def _scale(self, rank: int | None) -> float:
        if rank is not None:
            scale = self._alpha(rank) / rank
        else:
            # Both factors of this LoKr are whole. LyCORIS writes an alpha that means nothing then; peft's counts.
            said = self.said.rank(self.layer.name) if self.said.complete else None
            scale = self.said.alpha(self.layer.name, round(said)) / round(said) if said and said >= 1 else 1.0
        return scale * self._number("scalar") if "scalar" in self.parts else scale

    def _alpha(self, rank: int) -> float:
        return self._number("alpha") if "alpha" in self.parts else self.said.alpha(self.layer.name, rank)

    def _magnitude(self) -> dict[str, Tensor]:
        """A DoRA's lengths, (out, 1[, 1, 1]) of the rows or (1, in[, 1, 1]) of the columns of the weight."""
        ones = tuple(1 for _ in self.rest)
        if "magnitude" in self.parts:  # peft's, always of the rows
            if self.parts["magnitude"].numel() != self.out:
                raise self._misfit("magnitude")
            return {"magnitude": self.parts["magnitude"].reshape(self.out, *ones)}
        if "dora_scale" not in self.parts:
            if self.said.values.get("use_dora"):
                missing = self.layer.key("lora_magnitude_vector")
                raise UserError(f"{self.said.where} says use_dora, and {missing} is missing")
            return {}
        given = self.parts["dora_scale"]
        shape = tuple(given.shape)
        if given.numel() == self.out and shape[0] == self.out:
            return {"magnitude": given.reshape(self.out, *ones)}
        if given.numel() == self.rest[0] and len(shape) > 1 and shape[:2] == (1, self.rest[0]):
            return {"magnitude": given.reshape(1, self.rest[0], *ones[1:])}
        raise self._misfit("dora_scale")

    # Others

    def _values(self) -> dict[str, Tensor]:
        """Differences and new values, in the shapes of the weight and the bias."""
        found: dict[str, Tensor] = {}
        for part in ("diff", "weight", "diff_b", "bias"):
            if part in self.parts and not (part == "weight" and "on_input" in self.parts):
                of_bias = part in ("diff_b", "bias")
                if part == "bias" and not self.layer.bias:
                    raise UserError(f"{self.where}: {self.layer.key('bias')} is for a layer that has no bias")
                found[part] = self._fitted(part, (self.out,) if of_bias else self.layer.shape)
        return found

    def _ia3(self) -> dict[str, Tensor]:
        """The factors by which (IA)^3 changes a weight and a bias: 0 for no change.

        LyCORIS keeps these factors, and leaves biases alone. Peft keeps one plus them, and scales biases with outputs.
        """
        if "on_input" in self.parts:
            self._need("weight")
            given, of_input = self.parts["weight"], bool(self._number("on_input"))
        elif "ia3_l" in self.parts:
            given, of_input = self.parts["ia3_l"].float() - 1, self._feeds_forward()
        else:
            return {}
        axis, width = (1, self.rest[0]) if of_input else (0, self.out)
        if given.numel() != width:
            raise self._misfit("weight" if "on_input" in self.parts else "ia3_l")
        shape = [1] * len(self.layer.shape)
        shape[axis] = width
        found = {"weight_factor": given.reshape(shape)}
        if "ia3_l" in self.parts and not of_input and self.layer.bias:
            found["bias_factor"] = given.reshape(-1)
        return found

    def _feeds_forward(self) -> bool:
        """Whether peft's (IA)^3 scales a layer's input; its shape tells, but of a convolution of n to n channels."""
        given = self.parts["ia3_l"]
        if given.ndim == 2 or self.out != self.rest[0]:
            return given.shape[0] == 1 and given.shape[1] == self.rest[0] if given.ndim > 1 else False
        names = self.said.values.get("feedforward_modules")
        if isinstance(names, str) or not isinstance(names, list | None):
            raise UserError(f"{self.said.where}: feedforward_modules is no list of layers' names")
        return any(f".{self.layer.name}".endswith(f".{each}") for each in names or [])

    # Checks

    def _need(self, *names: str) -> None:
        for name in names:
            if name not in self.parts:
                halves = {"down": "lora_A.weight", "up": "lora_B.weight"}
                missing = self.layer.key(halves.get(name, name))
                raise UserError(f"{self.where}: {missing} is missing, the other half of a pair")

    def _rank(self, tensor: Tensor) -> int:
        """The first size of a tensor, if a rank can be that large: no larger than the layer has weights."""
        rank = tensor.shape[0] if tensor.ndim else 0
        if not 1 <= rank <= math.prod(self.layer.shape):
            raise UserError(
                f"{self.where}: {self.layer.key('')[:-1]} has an adapter of shape {tuple(tensor.shape)}, where "
                f"the layer is {self.layer.shape}: no rank is that"
            )
        return rank

    def _number(self, part: str) -> float:
        tensor = self.parts[part]
        if tensor.numel() != 1:
            shape = tuple(tensor.shape)
            raise UserError(
                f"{self.where}: {self.layer.key(part)} is {shape}, where a single number was expected"
            )
        return float(tensor)

    def _fitted(self, part: str, shape: tuple[int | None, ...]) -> Tensor:
        """A part in a shape that differs by ones at the end, or is flat behind the first axis."""
        tensor, wanted = self.parts[part], tuple(each or 0 for each in shape)
        long, short = sorted((tuple(tensor.shape), wanted), key=len, reverse=True)
        fits = long[: len(short)] == short and set(long[len(short) :]) <= {1}
        flat = (wanted[0], math.prod(wanted[1:]))
        if not fits and tuple(tensor.shape) != flat:
            raise self._misfit(part)
        return tensor.reshape(wanted)

    def _misfit(self, part: str) -> UserError:
        return UserError(
            f"{self.where}: {self.layer.key(part)} is {tuple(self.parts[part].shape)}, where the layer is "
            f"{self.layer.shape}: a LoRA for another model"
        )

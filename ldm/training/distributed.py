"""The processes that share a batch: each one's part, and the random numbers of its rows."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState


def processes() -> "PartialState":
    """Return the processes that train together.

    Accelerate chooses the device; the CPU where asked for, or nothing else is.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    asked = parse_flag_from_env("ACCELERATE_USE_CPU")  # accelerate launch --cpu
    # The main process may draw, encode or save for long while the others wait.
    return PartialState(cpu=asked or not torch.accelerator.is_available(), timeout=timedelta(hours=4))


def launch_notes() -> list[str]:
    """Return what the user should know about how the processes were started.

    accelerate launch takes --num_processes without --multi_gpu, or with --cpu, for one process and says nothing; its
    environment alone tells, by an address to meet at and no number of processes.
    """
    given = os.environ.keys()
    asked = {"ACCELERATE_DYNAMO_BACKEND", "MASTER_ADDR"} <= given and "WORLD_SIZE" not in given
    if not asked or processes().num_processes > 1:
        return []
    return [
        "accelerate launch was asked for several processes and started one, which does all the work: add --multi_gpu "
        "(it is for CPUs too, without --cpu), or use torchrun --nproc_per_node"
    ]


def rows_of(size: int, process: int, processes: int, parts: int = 1) -> list[slice]:
    """Return the rows of a batch of `size` that one of several processes takes, in `parts` equal parts.

    Raises UserError if it doesn't divide.
    """
    if parts < 1 or size % (processes * parts):
        raise UserError(
            f"a batch of {size} pictures can't be shared by {processes} processes in {parts} parts each: make "
            f"loop.batch_size a multiple of {processes * max(parts, 1)}, or change loop.gradient_accumulation_steps"
        )
    share = size // processes // parts
    first = process * parts
    return [slice(i * share, (i + 1) * share) for i in range(first, first + parts)]


def sharded() -> bool:
    """Return whether accelerate is asked to hold a part of every weight in each process (FSDP2).

    Raises UserError for what can't be honoured: FSDP1, whose parts don't know the whole, and DeepSpeed, whose engine
    takes optimizer, clipping and averaging out of the loop's hands.
    """
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "DeepSpeed is not supported: choose FSDP2 in accelerate config, which shards the same"
        )
    asked = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if asked and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP1 is not supported: set fsdp_version: 2 in accelerate's config")
    return asked


def shard_on_cpu(model: nn.Module, blocks: tuple[type[nn.Module], ...]) -> bool:
    """Shard over CPUs by FSDP2, where accelerate's settings ask for it: its own way is for GPUs only.

    In place; False where it is not asked for, or is accelerate's to do. blocks: what is gathered at a time.
    """
    from accelerate.utils import DistributedType

    shared = processes()
    if not sharded() or shared.distributed_type != DistributedType.MULTI_CPU:
        return False
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (shared.num_processes,))
    for module in [each for each in model.modules() if isinstance(each, blocks)]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return True


def whole(tensor: Tensor, keep: bool = True) -> Tensor:
    """Return the tensor; where processes hold a part each (FSDP), put together: all of them must ask for it.

    keep: such a one is moved to the CPU; who doesn't keep it gets an empty one.
    """
    gather = getattr(tensor, "full_tensor", None)
    if gather is None:
        return tensor
    full = gather()
    return full.cpu() if keep else full.new_empty(0)


def like(reference: Tensor, tensor: Tensor) -> Tensor:
    """Return a whole tensor as `reference` is held: device, memory layout and, where sharded, this process's part."""
    if hasattr(reference, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(reference, DTensor)
        tensor = tensor.to(reference.device)
        return distribute_tensor(tensor, reference.device_mesh, reference.placements)
    # A fused optimizer walks a parameter and its moments in the order of memory.
    return torch.empty_like(reference, dtype=tensor.dtype).copy_(tensor)


class BatchGenerator:
    """Random numbers for `rows` of a batch of `size` pictures, a function of (seed, size) and the order of calls.

    They are drawn for the whole batch and then cut, so that a picture has the same noise however many processes
    share its batch. On the CPU, whatever the accelerator.
    """

    def __init__(self, seed: int, size: int, rows: slice):
        self.generator = torch.Generator().manual_seed(seed)
        self.size, self.rows = size, rows

    def uniform(self) -> Tensor:
        """Draw a number in [0, 1) each: (rows,)."""
        return torch.rand(self.size, generator=self.generator)[self.rows]

    def normal(self, *shape: int) -> Tensor:
        """Draw unit noise of a shape each: (rows, *shape)."""
        return torch.randn(self.size, *shape, generator=self.generator)[self.rows]

    def integers(self, high: int) -> Tensor:
        """Draw a whole number in [0, high) each: (rows,)."""
        return torch.randint(high, (self.size,), generator=self.generator)[self.rows]


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean of what each process has under this name, without a gradient: the same in all of them."""
    from accelerate.utils import reduce

    processes()  # decides on the device where nothing did before
    mean = reduce(values.detach().contiguous(), "mean")
    assert isinstance(mean, Tensor)
    return mean

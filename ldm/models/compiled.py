"""torch.compile on the blocks of a network, one by one (regional compilation).

The blocks of a kind are alike, so that one of a size is compiled for all: that takes seconds where the whole network at
once takes minutes. What was compiled is kept on the disk, and the next process takes it from there.
"""

import os
from importlib import import_module
from typing import Any

from torch import nn

from ldm.files import cache_folder
from ldm.models.layers import blocks_of
from ldm.models.packed import unpack


def compile_blocks(network: nn.Module, kinds: tuple[type[nn.Module], ...] = (), **options: Any) -> int:
    """Compile the blocks that a network declares, in place, at their next calls; return how many there are.

    kinds: of blocks, where a part of a network declares none. options: of torch.compile, such as fullgraph=True, or
    mode="max-autotune-no-cudagraphs". Compiled layers multiply by plain weights: see `ldm.models.packed`. Names and
    weights stay as they are.
    """
    # torch's own default lies among temporary files, which do not last.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("compiled")))
    # Else adapters that come later would be passed over. For the whole process, as blocks are compiled when called.
    import_module("torch._dynamo").config.skip_nnmodule_hook_guards = False
    unpack(network)
    kinds = kinds or blocks_of(network)
    blocks = [each for each in network.modules() if isinstance(each, kinds)]
    for each in blocks:
        each.compile(**options)
    return len(blocks)

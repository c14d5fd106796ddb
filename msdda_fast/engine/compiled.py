# SPDX-License-Identifier: Apache-2.0
"""A step through `torch.compile`, as one graph, to be captured by hand afterwards.

Inductor's own CUDA graphs are left out: they record again per shape and copy every input. What it
compiles is kept on disk, so that a restart reads instead of compiling: in the folder that the
variable TORCHINDUCTOR_CACHE_DIR names, else in the temporary directory, which a container loses.
"""

from __future__ import annotations

import torch

from msdda_fast.engine.graph_backends import Advance
from msdda_fast.torch_private import inductor_options, recompile_limit

__all__ = ["compiled"]

#: Steps of all shapes share the code of one method, and dynamo counts compilations per code.
RECOMPILE_LIMIT = 4096


def compiled(advance: Advance, device_type: str) -> Advance:
    """Return `advance` compiled; the first call compiles, or reads the cache on disk.

    On CUDA kernels are tuned as in the mode "max-autotune-no-cudagraphs", which takes minutes.
    """
    mode = "max-autotune-no-cudagraphs" if device_type == "cuda" else "default"
    options = {**inductor_options(mode), "fx_graph_cache": True}
    function: Advance = torch.compile(advance, fullgraph=True, dynamic=False, options=options)
    return recompile_limit(function, RECOMPILE_LIMIT)

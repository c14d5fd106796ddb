# SPDX-License-Identifier: Apache-2.0
"""A step compiled with `torch.compile` as one graph, which `engine.graph` can then capture.

Inductor's own CUDA graphs are not used: they record again per shape and copy every input. Compiled
code is cached on disk, so that a restart does not compile again: in the folder that the environment
variable TORCHINDUCTOR_CACHE_DIR names, else in the temporary directory, which a container loses.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from msdda_fast.engine.graph_backends import Advance
from msdda_fast.torch_private import inductor_options, recompile_limit

__all__ = ["compiled", "without_compiling"]

#: Steps of all shapes share the code of one method, and dynamo counts compilations per code.
RECOMPILE_LIMIT = 4096


def compiled(advance: Advance, device_type: str) -> Advance:
    """Return `advance` compiled; the first call compiles, or reads the cache on disk.

    On CUDA, kernels are tuned as in the mode "max-autotune-no-cudagraphs", which takes minutes.
    """
    mode = "max-autotune-no-cudagraphs" if device_type == "cuda" else "default"
    options = {**inductor_options(mode), "fx_graph_cache": True}
    function: Advance = torch.compile(advance, fullgraph=True, dynamic=False, options=options)
    return recompile_limit(function, RECOMPILE_LIMIT)


def without_compiling() -> AbstractContextManager[object]:
    """A context in which everything that is compiled runs as it is written."""
    if "torch._dynamo" not in sys.modules:  # nothing is, and importing it takes seconds
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance

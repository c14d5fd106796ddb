# SPDX-License-Identifier: Apache-2.0
"""Without a GPU, Triton's kernels run in its interpreter.

The variable is read when a kernel is defined, and diffusers imports Triton: it is set here, before
anything else is imported.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

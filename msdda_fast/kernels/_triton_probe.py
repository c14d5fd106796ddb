# SPDX-License-Identifier: Apache-2.0
"""The smallest launch there is: whether Triton works here.

It is installed in containers without the C compiler that builds its launchers, and with drivers
that its code is too new for; neither shows before the first launch.
"""

import torch
import triton
import triton.language as tl

__all__ = ["launch"]


@triton.jit
def _write(out):
    tl.store(out, 1)


def launch() -> None:
    """Launch a kernel on the current GPU; raises whatever Triton does where it cannot."""
    _write[(1,)](torch.zeros(1, dtype=torch.int32, device="cuda"))

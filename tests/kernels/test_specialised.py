# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for sm_90, whatever the JIT knows of its integers."""

import pytest

from msdda_fast.kernels import registry
from tests.kernels.ahead_of_time import report


def test_every_kernel_compiles_for_every_kind_of_integer(made_once):
    if not registry.available("triton"):
        pytest.skip(registry.explain()["triton"])
    found = report("tests.kernels.specialised", made_once)
    assert found["failures"] == {}
    # 1, a multiple of 16, and other numbers, of channels and of pixels
    for name in ("linear_step", "moments_step", "noise_fill", "grouped_lora_layer"):
        assert found["compiled"][name] >= 5, name
    # likewise, of channels alone
    for name in ("group_norm_moments", "group_norm_apply", "summed", "summed_and_normed", "gated"):
        assert found["compiled"][name] >= 3, name

# SPDX-License-Identifier: Apache-2.0
"""Random calls of the raw Triton functions have the bits of eager: layouts, tables, copies, masks.

In the interpreter, so without bfloat16, which it truncates (test_on_gpu.py has it).
"""

import pytest
import torch

from msdda_fast.kernels import registry
from msdda_fast.kernels.fused_step import _eager
from tests.kernels.raw_cases import (
    Draw,
    assert_same_bits,
    linear_case,
    moments_case,
    round_roots,
)

pytestmark = pytest.mark.skipif(not registry.available("triton"), reason="no interpreter")
DTYPES = torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Draw, "dtype", lambda draw: draw.pick.choice(DTYPES))


@pytest.mark.sweep(seed=6)  # planted faults fail in the first five
@pytest.mark.parametrize("seed", range(40))
def test_a_linear_step_has_the_bits_of_eager(seed):
    draw = Draw(seed)
    arguments, options = linear_case(draw)
    out = draw.tensor(dtype=draw.dtype(), layout=draw.layout())
    next_input = draw.tensor(3, dtype=draw.dtype(), layout=draw.layout())
    expected = torch.empty(draw.shape, dtype=out.dtype)
    _eager.run(expected, *arguments, **options)
    run = registry.resolve("fused_step", "triton", "cpu").run
    run(out, *arguments, **options, next_input=next_input)
    assert_same_bits(out, expected)
    for copy in next_input:
        assert_same_bits(copy, expected.to(copy.dtype))


@pytest.mark.sweep(seed=3)  # likewise
@pytest.mark.parametrize("seed", range(20))
def test_a_moments_step_has_the_bits_of_eager(seed, monkeypatch):
    draw = Draw(1000 + seed)
    arguments, options, results = moments_case(draw)
    out = draw.tensor(dtype=draw.dtype(), layout=draw.layout())
    expected = torch.empty(draw.shape, dtype=out.dtype)
    wanted = {name: torch.empty(draw.shape, dtype=draw.compute) for name in results}
    with monkeypatch.context() as patch:
        round_roots(patch)
        _eager.run_moments(expected, *arguments, **options, **wanted)
    run_moments = registry.resolve("fused_step", "triton", "cpu").run_moments
    run_moments(out, *arguments, **options, **results)
    assert_same_bits(out, expected)
    for name, result in results.items():
        assert_same_bits(result, wanted[name])

# SPDX-License-Identifier: Apache-2.0
"""Group norm, layer norm, sums and gates: as exact as the chain of torch they stand for."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from msdda_fast.kernels import registry
from tests.kernels.ahead_of_time import report
from tests.kernels.cases import assert_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # the interpreter truncates to it
]
#: Images, channels, groups and pixels: narrow and wide groups, whole and parts of tiles.
PICTURES = {
    "10 channels": (2, 40, 4, (9, 8)),
    "1 channel": (3, 6, 6, (5, 7)),
    "80 channels": (1, 160, 2, (7, 5)),
    "many tiles": (1, 20, 2, (72, 65)),
    "one pixel": (2, 64, 32, (1, 1)),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=["eager", "triton"])
def backend(request) -> str:
    if not registry.available(request.param, DEVICE):
        pytest.skip(registry.explain(DEVICE)[request.param])
    return request.param


def picture(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x far from 0, weight and bias."""
    rows, channels, _, size = PICTURES[case]
    x = (normal(rows, channels, *size) + 3).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    return x, normal(channels, seed=1).to(dtype), normal(channels, seed=2).to(dtype)


def norm(x, weight, bias, groups, shift, *, silu):
    z = x if shift is None else x + shift[:, :, None, None]
    y = functional.group_norm(z, groups, weight, bias, 1e-5)
    return functional.silu(y) if silu else y


@pytest.mark.sweep(case=2, dtype=1, silu=1, shifts=1)
@pytest.mark.parametrize("case", PICTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "bare"])
@pytest.mark.parametrize("shifts", [0, 1, "each"])
def test_group_norm(case, dtype, silu, shifts, backend):
    x, weight, bias = picture(case, dtype)
    groups = PICTURES[case][2]
    shift = None
    if shifts:  # a part of a longer row, as in a table of all layers
        table = normal(len(x) if shifts == "each" else 1, 3 * x.shape[1], seed=3).to(dtype)
        shift = table[:, x.shape[1] : 2 * x.shape[1]]
    exact = norm(*_doubles(x, weight, bias), groups, _double(shift), silu=silu)
    literal = norm(x, weight, bias, groups, shift, silu=silu)
    run = registry.resolve("group_norm", backend, DEVICE).run
    given = [None if t is None else t.to(DEVICE) for t in (x, weight, bias, shift)]
    y = run(*given[:3], groups, 1e-5, given[3], silu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_accurate(y.cpu(), literal, exact)


def test_a_group_norm_far_from_zero_loses_nothing_to_cancellation():
    """Torch's own on the CPU does: it takes the mean square less the square of the mean."""
    if not registry.available("triton", DEVICE):
        pytest.skip(registry.explain(DEVICE)["triton"])
    x, weight, bias = picture("10 channels", torch.float32)
    x += 1000
    exact = norm(*_doubles(x, weight, bias), 4, None, silu=False)
    run = registry.resolve("group_norm", "triton", DEVICE).run
    y = run(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), 4, 1e-5, None, False).cpu()
    # x itself has 1000 eps = 6e-5 in units of its deviation
    assert (y.double() - exact).abs().max() < 1e-3


@pytest.mark.sweep(size=2, dtype=1)
@pytest.mark.parametrize("size", [(2, 5, 40), (1, 1, 1), (3, 600), (2, 1280)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "none"])
def test_sums_and_layer_norms(size, dtype, has_bias, backend):
    a, b = normal(*size).to(dtype), 2 * normal(*size, seed=1).to(dtype)
    bias, weight, shift = (normal(size[-1], seed=seed).to(dtype) for seed in (2, 3, 4))
    bias = bias if has_bias else None
    exact = a.double() + b.double() + (bias.double() if has_bias else 0)
    literal = a + (b + bias if has_bias else b)
    rows = registry.resolve("rowwise", backend, DEVICE)
    given = [None if t is None else t.to(DEVICE) for t in (a, b, bias)]
    total, normed = rows.sum_and_norm(*given, weight.to(DEVICE), shift.to(DEVICE), 1e-5)
    assert total.dtype == normed.dtype == dtype
    for got in (total, rows.sum_of(*given)):
        assert_accurate(got.cpu(), literal, exact)
    assert_accurate(
        normed.cpu(),
        functional.layer_norm(literal, size[-1:], weight, shift, 1e-5),
        functional.layer_norm(exact, size[-1:], *_doubles(weight, shift), 1e-5),
    )


@pytest.mark.sweep(size=2, dtype=1)
@pytest.mark.parametrize("size", [(2, 5, 80), (1, 2), (3, 1200)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu(size, dtype, backend):
    x = (3 * normal(*size)).to(dtype)

    def gate(x):
        value, gate = x.chunk(2, dim=-1)
        return value * functional.gelu(gate)

    y = registry.resolve("rowwise", backend, DEVICE).geglu(x.to(DEVICE)).cpu()
    assert y.dtype == dtype
    assert_accurate(y, gate(x), gate(x.double()))


def test_norms_without_weights(backend):
    a, b = normal(2, 24).float(), normal(2, 24, seed=1).float()
    rows = registry.resolve("rowwise", backend, DEVICE)
    _, normed = rows.sum_and_norm(a.to(DEVICE), b.to(DEVICE), None, None, None, 1e-5)
    assert torch.allclose(normed.cpu(), functional.layer_norm(a + b, (24,)), atol=1e-5)


@pytest.mark.full  # 3 s; the batched forward runs them without data in tests/batched
def test_the_operators_are_registered_soundly():
    if not registry.available("triton", DEVICE):
        pytest.skip(registry.explain(DEVICE)["triton"])
    registry.resolve("group_norm", "triton", DEVICE), registry.resolve("rowwise", "triton", DEVICE)
    ops = torch.ops.msdda_fast
    x, weight, bias = (t.to(DEVICE) for t in picture("10 channels", torch.float32))
    torch.library.opcheck(ops.group_norm.default, (x, weight, bias, 4, 1e-5, bias[None], True))
    a, b = normal(2, 24).float().to(DEVICE), normal(2, 24, seed=1).float().to(DEVICE)
    torch.library.opcheck(ops.sum_of.default, (a, b, a[0]))
    torch.library.opcheck(ops.sum_and_norm.default, (a, b, None, a[0], b[0], 1e-5))
    torch.library.opcheck(ops.geglu.default, (a,))


def _double(tensor):
    return None if tensor is None else tensor.double()


def _doubles(*tensors):
    return [tensor.double() for tensor in tensors]


@pytest.fixture(scope="module")
def compiled(made_once) -> dict:
    if not registry.available("triton"):
        pytest.skip(registry.explain()["triton"])
    return report("tests.kernels.compiled_norms_and_rows", made_once)["builds"]


@pytest.mark.full  # compiles for 30 s; test_specialised.py compiles each once
class TestAheadOfTime:
    def test_every_kernel_is_compiled_for_both_architectures(self, compiled):
        for arch, kind in itertools.product((80, 90), ("fp16", "bf16", "fp32")):
            assert sum(name.startswith(f"sm_{arch}-{kind}-") for name in compiled) == 11

    def test_nothing_spills(self, compiled):
        for name, found in compiled.items():
            assert found["STACK"] == found["LOCAL"] == 0, name
            assert not [i for i in found["instructions"] if i.startswith(("STL", "LDL"))], name

    def test_rows_move_16_bytes_at_a_time(self, compiled):
        for name, found in compiled.items():
            if "group_norm" not in name:
                moved = {i for i in found["instructions"] if i.startswith(("LDG", "STG"))}
                assert moved == {"LDG.E.128", "STG.E.128"}, name

    def test_pictures_are_read_once_by_each_launch(self, compiled):
        """Groups of 10 channels begin anywhere: loads of one number, 16 in each thread."""
        for name, found in compiled.items():
            if "group_norm_moments" in name:
                loads = sum(n for i, n in found["instructions"].items() if i.startswith("LDG"))
                assert loads <= 16 + 3, name

# SPDX-License-Identifier: Apache-2.0
"""The fused design: exact in Triton's interpreter or on a GPU, and sound code for two others."""

import pytest
import torch
from torch import nn

from msdda_fast.errors import BackendUnavailable, InvalidShape
from msdda_fast.kernels import registry
from msdda_fast.kernels.grouped_lora import FactoredLinear, grouped_site
from tests.kernels.ahead_of_time import report
from tests.kernels.cases import assert_accurate
from tests.kernels.lora_cases import LoraCase, lora_case, one_by_one, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Triton's interpreter truncates to bfloat16 and multiplies its matrices wrongly.
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


@pytest.fixture(autouse=True)
def triton() -> None:
    if not registry.available("triton", DEVICE):
        pytest.skip(registry.explain(DEVICE)["triton"])


def fused(case: LoraCase) -> nn.Module:
    return grouped_site(case.base.to(DEVICE), case.down, case.up, design="fused")


@pytest.mark.sweep(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "ranks", [(4,), (4, 4), (4, 1, 8), (16, 0, 64, 3), (2, 3, 4, 5, 6), (33,)], ids=str
)
@pytest.mark.parametrize(
    "size",
    [(64, 64), (96, 72), (37, 29), (7, 1), (128, 130)],
    ids=lambda size: "x".join(map(str, size)),
)
def test_it_errs_no_more_than_the_literal_chain(dtype, ranks, size):
    case = lora_case(nn.Linear(*size, bias=len(ranks) % 2 == 1), ranks, dtype)
    x = rows(case, len(ranks), 70, dtype=dtype)  # one whole tile of rows and a part of one
    literal, exact = one_by_one(case, x), one_by_one(case.double(), x.double())
    y = fused(case)(x.to(DEVICE)).cpu()
    assert y.dtype == dtype
    assert_accurate(y, literal, exact)


@pytest.mark.parametrize("count", [1, 5, 64, 129])
def test_rows_beyond_the_last_tile_are_not_written(count):
    case = lora_case(nn.Linear(16, 24), (4, 2), torch.float32)
    x = rows(case, 2, count, dtype=torch.float32)
    want = one_by_one(case, x)
    assert torch.allclose(fused(case)(x.to(DEVICE)).cpu(), want, rtol=1e-4, atol=1e-5)


def test_no_rows_at_all():
    case = lora_case(nn.Linear(16, 24), (4, 2), torch.float32)
    assert fused(case)(torch.empty(0, 3, 16, device=DEVICE)).shape == (0, 3, 24)


def test_rows_that_are_not_dense():
    case = lora_case(nn.Linear(16, 24), (4, 2), torch.float32)
    x = rows(case, 4, 3, dtype=torch.float32).to(DEVICE)
    site = fused(case)
    assert torch.equal(site(x.repeat(1, 1, 2)[..., :16]), site(x))


def test_a_compiled_call_reads_the_factors_where_they_lie():
    case = lora_case(nn.Linear(16, 24), (4, 2), torch.float32, pad=6)
    x = rows(case, 4, 3, dtype=torch.float32).to(DEVICE)
    site = fused(case)
    torch._dynamo.reset()
    compiled = torch.compile(site, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(x), site(x))
        before = {name: buffer.data_ptr() for name, buffer in site.named_buffers()}
        old = site(x)
        site.up[1].mul_(2)
        assert {name: buffer.data_ptr() for name, buffer in site.named_buffers()} == before
        assert torch.equal(compiled(x), site(x))
    assert torch.equal(site(x)[:2], old[:2]) and not torch.allclose(site(x)[2:], old[2:])


@pytest.mark.parametrize("bias", [True, False])
def test_the_operator_is_registered_soundly(bias):
    case = lora_case(nn.Linear(16, 24, bias=bias), (4, 2), torch.float32)
    site = fused(case)
    x = rows(case, 2, 3, dtype=torch.float32).to(DEVICE)
    arguments = (x, site.weight, site.bias, site.down, site.up)
    torch.library.opcheck(torch.ops.msdda_fast.grouped_lora.default, arguments)


def test_it_says_that_it_does_not_differentiate():
    case = lora_case(nn.Linear(16, 24), (4, 2), torch.float32)
    x = torch.ones(2, 16, device=DEVICE, requires_grad=True)
    with pytest.raises(BackendUnavailable, match=r'inference only .*design="separate"'):
        fused(case)(x)


def test_it_is_not_for_float64():
    case = lora_case(nn.Linear(16, 24), (4, 2), torch.float64)
    with pytest.raises(InvalidShape, match=r"torch\.float64; Triton sums in float32"):
        fused(case)


def test_it_needs_no_copy_of_the_base():
    case = lora_case(nn.Linear(16, 24), (4, 2), torch.float32)
    site = fused(case)
    assert isinstance(site, FactoredLinear)
    assert site.weight.data_ptr() == case.base.weight.data_ptr()


BUILDS = [
    *(f"sm_{arch}-fp16-8192x320-r{rank}" for arch in (80, 90) for rank in (4, 64)),
    *(f"sm_{arch}-fp16-128x1280-r4" for arch in (80, 90)),
    "sm_80-fp16-8192x320-r128",
    *(f"sm_{arch}-{dtype}-8192x320-r4" for arch in (80, 90) for dtype in ("bf16", "fp32")),
    "sm_80-fp32-8192x320-r32",
]


@pytest.fixture(scope="module")
def compiled(made_once) -> dict:
    return report("tests.kernels.compiled_grouped_lora", made_once)


@pytest.mark.full  # compiles for 20 s; the interpreter runs the same kernel above
class TestAheadOfTime:
    def test_every_build_is_looked_at(self, compiled):
        assert sorted(compiled["builds"]) == sorted(BUILDS)

    @pytest.mark.parametrize("build", BUILDS)
    def test_nothing_spills(self, compiled, build):
        found = compiled["builds"][build]
        assert found["STACK"] == found["LOCAL"] == 0
        assert not [name for name in found["instructions"] if name.startswith(("STL", "LDL"))]

    @pytest.mark.parametrize("build", BUILDS)
    def test_a_block_fits_into_shared_memory(self, compiled, build):
        limit = {"80": 163, "90": 227}[build[3:5]] * 1024
        assert compiled["builds"][build]["shared"] <= limit

    @pytest.mark.parametrize("build", BUILDS)
    def test_x_and_the_weight_are_loaded_and_y_stored_16_bytes_at_a_time(self, compiled, build):
        instructions = compiled["builds"][build]["instructions"]
        wide = sum(n for name, n in instructions.items() if "LDGSTS" in name and "128" in name)
        narrow = sum(
            n for name, n in instructions.items() if "LDGSTS" in name and "128" not in name
        )
        assert wide >= 8 * narrow  # a tile of A_m of rank 4 is too small for all threads
        assert {name for name in instructions if name.startswith("STG")} == {"STG.E.128"}

    @pytest.mark.parametrize("build", [build for build in BUILDS if "fp32" not in build])
    def test_products_are_on_tensor_cores(self, compiled, build):
        kind = "HMMA.16816.F32" if build.startswith("sm_80") else "HGMMA.64x"
        instructions = compiled["builds"][build]["instructions"]
        assert any(name.startswith(kind) for name in instructions)
        assert "FFMA" not in instructions

    @pytest.mark.parametrize("build", [build for build in BUILDS if "fp32" in build])
    def test_float32_products_are_not_rounded_to_tf32(self, compiled, build):
        instructions = compiled["builds"][build]["instructions"]
        assert "FFMA" in instructions and not any(
            name.startswith(("HMMA", "HGMMA")) for name in instructions
        )

    def test_another_batch_compiles_nothing(self, compiled):
        assert compiled["not specialised"] == ["rows"]

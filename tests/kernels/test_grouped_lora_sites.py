# SPDX-License-Identifier: Apache-2.0
"""Prepared layers: recorded, compiled once, convolved, checked."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from msdda_fast.errors import BackendUnavailable, InvalidShape
from msdda_fast.kernels.grouped_lora import grouped_site
from tests.kernels.cases import assert_accurate
from tests.kernels.lora_cases import LoraCase, lora_case, one_by_one, rows

DESIGNS = ("separate", "folded", "merged")


def linear_site(design: str, ranks: tuple[int, ...] = (4, 2)) -> tuple[LoraCase, nn.Module]:
    case = lora_case(nn.Linear(12, 20), ranks, torch.float64, pad=6)
    return case, grouped_site(case.base, case.down, case.up, design=design)


def conv_site() -> tuple[LoraCase, nn.Module]:
    case = lora_case(nn.Conv2d(4, 6, 3, padding=1), (4, 2), torch.float64, pad=6)
    return case, grouped_site(case.base, case.down, case.up)


def example(design: str) -> tuple[LoraCase, nn.Module, torch.Tensor]:
    case, site = conv_site() if design == "conv" else linear_site(design)
    return case, site, rows(case, 4, 5, 7, dtype=torch.float64)


@pytest.mark.parametrize("design", [*DESIGNS, "conv"])
def test_a_recorded_call_reads_the_factors_where_they_lie(design):
    case, site, x = example(design)
    recorded = make_fx(site)(x)
    assert torch.equal(recorded(x), site(x))
    assert torch.allclose(recorded(x), one_by_one(case, x), rtol=1e-11, atol=1e-12)
    before = site(x)
    factors = site.merged if design == "merged" else site.up
    factors.mul_(2)
    assert torch.equal(recorded(x), site(x)) and not torch.equal(site(x), before)


@pytest.mark.parametrize("design", [*DESIGNS, "conv"])
def test_one_compilation_without_a_break(design):
    case, site, x = example(design)
    torch._dynamo.reset()
    compiled = torch.compile(site, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert torch.allclose(compiled(x), one_by_one(case, x), rtol=1e-11, atol=1e-12)
            x = 2 * x


@pytest.mark.slow
@pytest.mark.filterwarnings(  # inductor's own
    "ignore:.torch.jit.script_method:DeprecationWarning",
    "ignore:.torch._prims_common.check:FutureWarning",
)
@pytest.mark.parametrize("design", [*DESIGNS, "conv"])
def test_inductor_agrees(design):
    case, site, x = example(design)
    torch._dynamo.reset()
    compiled = torch.compile(site, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x), one_by_one(case, x), rtol=1e-11, atol=1e-12)


CONVOLUTIONS = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "same, no bias": {"kernel_size": 3, "padding": "same", "bias": False},
    "uneven": {"kernel_size": (3, 1), "padding": (1, 0), "stride": (1, 2)},
}
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


@pytest.mark.sweep
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("ranks", [(4,), (4, 4), (3, 0, 8)], ids=str)
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_convolutions(kind, layout, ranks, images, dtype):
    case = lora_case(nn.Conv2d(5, 9, **CONVOLUTIONS[kind]), ranks, dtype)
    case.base.to(memory_format=FORMATS[layout])
    site = grouped_site(case.base, case.down, case.up)
    x = rows(case, images * len(ranks), 8, 6, dtype=dtype).to(memory_format=FORMATS[layout])
    y, plain = site(x), case.base(x)
    assert y.shape == plain.shape and y.is_contiguous(memory_format=FORMATS[layout])
    assert plain.is_contiguous(memory_format=FORMATS[layout])
    want = one_by_one(case.double(), x.double())
    if dtype == torch.float64:
        assert (y - want).abs().max() <= 1e-12 * want.abs().max()
    else:
        assert_accurate(y, one_by_one(case, x), want)


@pytest.mark.parametrize(
    ("dtype", "rank", "kept"),
    [(torch.float16, 4, 8), (torch.bfloat16, 9, 16), (torch.float16, 8, 8), (torch.float32, 4, 4)],
)
def test_separate_factors_of_half_precision_have_rows_of_16_bytes(dtype, rank, kept):
    case = lora_case(nn.Linear(16, 24), (rank, rank), dtype)
    site = grouped_site(case.base, case.down, case.up, design="separate")
    assert site.down.shape == (2, kept, 16) and site.up.shape == (2, 24, kept)
    assert not site.down[:, rank:].any() and not site.up[..., rank:].any()
    x = rows(case, 2, 3, dtype=dtype)
    assert_accurate(site(x), one_by_one(case, x), one_by_one(case.double(), x.double()))


def test_a_picture_of_one_pixel():
    case = lora_case(nn.Conv2d(5, 9, 1), (4, 4), torch.float64)
    x = rows(case, 6, 1, 1, dtype=torch.float64)
    y = grouped_site(case.base, case.down, case.up)(x)
    assert torch.allclose(y, one_by_one(case, x), rtol=1e-12)


class TestWrongShapes:
    """Each argument, with the shape it has and the shape it should have."""

    @pytest.mark.parametrize("design", DESIGNS)
    @pytest.mark.parametrize(
        "down, up, message",
        [
            ((2, 4, 11), (2, 20, 4), r"down .*\(2, 4, 11\), expected \(M, R, 12\).*\(20, 12\)"),
            ((4, 12), (2, 20, 4), r"down .*\(4, 12\), expected \(M, R, 12\)"),
            ((2, 4, 12), (2, 21, 4), r"up .*\(2, 21, 4\), expected \(2, 20, 4\)"),
            ((2, 4, 12), (3, 20, 4), r"up .*\(3, 20, 4\), expected \(2, 20, 4\)"),
            ((2, 4, 12), (2, 20, 5), r"up .*\(2, 20, 5\), expected \(2, 20, 4\)"),
            ((0, 4, 12), (0, 20, 4), r"down .*\(0, 4, 12\), expected M >= 1"),
            ((12,), (2, 20, 4), r"down .*\(12,\), expected \(M, R, C"),
        ],
    )
    def test_factors(self, design, down, up, message):
        with pytest.raises(InvalidShape, match=message):
            grouped_site(nn.Linear(12, 20), torch.ones(down), torch.ones(up), design=design)

    @pytest.mark.parametrize(
        "down, up, message",
        [
            ((2, 4, 5, 1, 1), (2, 9, 4, 1, 1), r"down .*1, 1\), expected \(M, R, 5, 3, 3\)"),
            ((2, 4, 5, 3, 3), (2, 9, 4), r"up .*\(2, 9, 4\), expected \(2, 9, 4, 1, 1\)"),
        ],
    )
    def test_convolution_factors(self, down, up, message):
        with pytest.raises(InvalidShape, match=message):
            grouped_site(nn.Conv2d(5, 9, 3), torch.ones(down), torch.ones(up))

    @pytest.mark.parametrize("design", DESIGNS)
    @pytest.mark.parametrize(
        "shape, message",
        [
            ((5, 12), r"x .*\(5, 12\), expected a first axis .* multiple of 2 objectives"),
            ((4, 3, 11), r"x .*\(4, 3, 11\), expected 12 channels .*\(20, 12\)"),
            ((12,), r"x .*\(12,\), expected 12 channels"),
        ],
    )
    def test_linear_inputs(self, design, shape, message):
        _, site = linear_site(design)
        with pytest.raises(InvalidShape, match=message):
            site(torch.ones(shape, dtype=torch.float64))

    @pytest.mark.parametrize(
        "shape, message",
        [
            ((3, 4, 5, 5), r"\(3, 4, 5, 5\), expected a first axis .* multiple of 2"),
            ((4, 5, 5, 4), r"\(4, 5, 5, 4\), expected 4 channels on axis 1"),
            ((4, 4, 5), r"\(4, 4, 5\), expected 4 channels"),
        ],
    )
    def test_convolution_inputs(self, shape, message):
        _, site = conv_site()
        with pytest.raises(InvalidShape, match=message):
            site(torch.ones(shape, dtype=torch.float64))

    @pytest.mark.parametrize(
        "options, message",
        [
            (
                {"dtype": torch.float32},
                r"x is torch\.float32 on cpu, expected torch\.float64 on cpu",
            ),
            ({"dtype": torch.float64, "device": "meta"}, "on meta, expected .* on cpu"),
        ],
        ids=["dtype", "device"],
    )
    def test_other_dtypes_and_devices(self, options, message):
        _, site = linear_site("folded")
        with pytest.raises(InvalidShape, match=message):
            site(torch.ones(4, 12, **options))

    @pytest.mark.parametrize(
        "options", [{"groups": 2}, {"padding_mode": "circular", "padding": 1}], ids=str
    )
    def test_convolutions_that_do_not_fold(self, options):
        base = nn.Conv2d(4, 6, 3, **options)
        down = torch.ones(2, 4, *base.weight.shape[1:])
        with pytest.raises(InvalidShape, match="expected 1 group and 'zeros'"):
            grouped_site(base, down, torch.ones(2, 6, 4, 1, 1))

    @pytest.mark.parametrize(
        "base, design, message",
        [
            (nn.Linear(4, 4), "best", "\"separate\".*got 'best'"),
        ],
    )
    def test_designs_that_are_not_there(self, base, design, message):
        inner, ones = base.weight.shape[1:], (1,) * (base.weight.ndim - 2)
        with pytest.raises(ValueError, match=message):
            grouped_site(base, torch.ones(2, 1, *inner), torch.ones(2, 4, 1, *ones), design=design)


@pytest.mark.parametrize("design", ["separate", "merged"])
def test_two_designs_differentiate(design):
    _, site = linear_site(design)
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(site, (x,))


@pytest.mark.parametrize("design", ["folded", "conv"])
def test_the_others_say_that_they_do_not(design):
    _, site, x = example(design)
    with pytest.raises(BackendUnavailable, match=r"Folded.* inference only .*no_grad"):
        site(x.requires_grad_())
    with torch.no_grad():
        site(x)

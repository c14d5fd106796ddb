# SPDX-License-Identifier: Apache-2.0
"""Every design computes each objective's own LoRA, as exactly as the literal torch chain does."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from msdda_fast.errors import UnfaithfulMerge
from msdda_fast.kernels import registry
from msdda_fast.kernels.grouped_lora import (
    FactoredLinear,
    FoldedLinear,
    MergedLinear,
    grouped_site,
    merge_error,
)
from msdda_fast.kernels.grouped_lora._merge import merge
from tests.kernels.cases import assert_accurate
from tests.kernels.lora_cases import lora_case, one_by_one, rows

DESIGNS = ("separate", "folded", "merged")
RANKS = [(4,), (4, 4), (4, 1, 8), (16, 0, 64, 3), (2, 3, 4, 5, 6), (1,), (0, 4), (0, 0)]
#: (C, N): SD1.5's small ones, odd ones, and one output.
SIZES = [(32, 48), (40, 24), (37, 29), (7, 1), (1, 16)]
#: D, E and G run everywhere; F where its kernel runs, in test_grouped_lora_triton.py.
KIND = {"separate": FactoredLinear, "folded": FoldedLinear, "merged": MergedLinear}


@pytest.mark.sweep
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_float64_agrees_with_each_objective_s_lora(design, ranks, size, bias):
    case = lora_case(nn.Linear(*size, bias=bias), ranks, torch.float64)
    site = grouped_site(case.base, case.down, case.up, design=design)
    assert type(site) is KIND[design]
    x = rows(case, 3 * len(ranks), 5, dtype=torch.float64)
    want = one_by_one(case, x)
    assert site(x).shape == want.shape
    assert (site(x) - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.sweep
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [(4,), (4, 4), (16, 0, 64, 3)], ids=str)
@pytest.mark.parametrize("size", [(32, 48), (37, 29)], ids=str)
def test_it_errs_no_more_than_the_literal_chain(design, dtype, ranks, size):
    case = lora_case(nn.Linear(*size), ranks, dtype)
    x = rows(case, 2 * len(ranks), 33, dtype=dtype)
    y = grouped_site(case.base, case.down, case.up, design=design)(x)
    assert y.dtype == dtype
    assert_accurate(y, one_by_one(case, x), one_by_one(case.double(), x.double()))


@pytest.mark.parametrize("design", DESIGNS)
def test_an_adapter_of_scale_zero_is_the_base(design):
    case = lora_case(nn.Linear(16, 24), (4, 4), torch.float32, scales=(0.0, 1.0))
    site = grouped_site(case.base, case.down, case.up, design=design)
    x = rows(case, 4, 3, dtype=torch.float32)
    base, adapted = case.base(x), site(x)
    assert torch.allclose(adapted[:2], base[:2], rtol=1e-5, atol=1e-6)
    assert (adapted[2:] - base[2:]).abs().max() > 0.1


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("lead", [(2,), (12,), (6, 1), (4, 3, 2), (0, 5)], ids=str)
def test_any_leading_axes_whose_first_is_objective_major(design, lead):
    case = lora_case(nn.Linear(8, 16), (4, 2), torch.float64)
    site = grouped_site(case.base, case.down, case.up, design=design)
    x = rows(case, *lead, dtype=torch.float64)
    assert site(x).shape == (*lead, 16)
    assert torch.allclose(site(x), one_by_one(case, x), rtol=1e-12)


@pytest.mark.parametrize("design", DESIGNS)
def test_where_the_rows_lie_in_memory_changes_nothing(design):
    case = lora_case(nn.Linear(8, 16), (4, 2), torch.float64)
    site = grouped_site(case.base, case.down, case.up, design=design)
    x = rows(case, 4, 3, dtype=torch.float64)
    for same in (x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat(1, 1, 2)[..., :8]):
        assert not same.is_contiguous()
        assert torch.allclose(site(same), site(x), rtol=1e-12)  # another GEMM may run


@pytest.mark.parametrize("kind", [nn.Linear(6, 8), nn.Conv2d(6, 8, 3)], ids=["linear", "conv"])
def test_a_layer_without_adapters_stays_as_it_is(kind):
    inner, outer = kind.weight.shape[1:], (1,) * (kind.weight.ndim - 2)
    assert grouped_site(kind, torch.empty(3, 0, *inner), torch.empty(3, 8, 0, *outer)) is kind


def test_the_registry_has_the_reference():
    case = lora_case(nn.Linear(8, 16), (4, 2), torch.float64)
    x = rows(case, 2, 3, dtype=torch.float64)
    run = registry.resolve("grouped_lora", "eager", "cpu").run
    y = run(x, case.base.weight, case.base.bias, case.down, case.up)
    assert torch.allclose(y, one_by_one(case, x), rtol=1e-12)


@pytest.mark.parametrize("design", DESIGNS)
def test_the_base_s_memory_is_shared(design):
    case = lora_case(nn.Linear(8, 16), (4, 2), torch.float32)
    site = grouped_site(case.base, case.down, case.up, design=design)
    assert site.weight.data_ptr() == case.base.weight.data_ptr()
    assert site.bias.data_ptr() == case.base.bias.data_ptr()
    assert not list(site.parameters()) and not site.state_dict()


class TestPEFT:
    """The adapters as peft runs them: one at a time, and as a mixed batch."""

    NAMES = ("first", "second", "third")
    RANKS = (4, 2, 8)

    @pytest.fixture
    def wrapped(self) -> nn.Module:
        torch.manual_seed(0)
        configs = [
            LoraConfig(r=r, lora_alpha=3 * r, target_modules=["0"], init_lora_weights=False)
            for r in self.RANKS
        ]
        network = get_peft_model(nn.Sequential(nn.Linear(24, 40)), configs[0], self.NAMES[0])
        for name, config in zip(self.NAMES[1:], configs[1:], strict=True):
            network.add_adapter(name, config)
        return network.double().eval().requires_grad_(False)

    def site(self, network: nn.Module, design: str) -> nn.Module:
        layer = network.base_model.model[0]
        down = torch.zeros(3, 8, 24, dtype=torch.float64)
        up = torch.zeros(3, 40, 8, dtype=torch.float64)
        for m, (name, rank) in enumerate(zip(self.NAMES, self.RANKS, strict=True)):
            down[m, :rank] = layer.lora_A[name].weight
            up[m, :, :rank] = layer.scaling[name] * layer.lora_B[name].weight
        return grouped_site(layer.base_layer, down, up, design=design)

    @pytest.mark.parametrize("design", DESIGNS)
    def test_one_adapter_at_a_time(self, wrapped, design):
        x = torch.randn(6, 5, 24, dtype=torch.float64)
        want = []
        for name, part in zip(self.NAMES, x.chunk(3), strict=True):
            wrapped.set_adapter(name)
            want.append(wrapped(part))
        assert torch.allclose(self.site(wrapped, design)(x), torch.cat(want), rtol=1e-12)

    @pytest.mark.parametrize("design", DESIGNS)
    def test_a_mixed_batch(self, wrapped, design):
        x = torch.randn(6, 5, 24, dtype=torch.float64)
        names = [name for name in self.NAMES for _ in range(2)]
        want = wrapped(x, adapter_names=names)
        assert torch.allclose(self.site(wrapped, design)(x), want, rtol=1e-12)


class TestMerging:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_the_error_is_what_random_activations_see(self, dtype):
        case = lora_case(nn.Linear(96, 128), (4, 4), dtype, scales=(1.0, 0.05))
        x = torch.randn(512, 96, dtype=torch.float64)
        weight, down, up = (t.double() for t in (case.base.weight, case.down, case.up))
        seen = []
        for a, b in zip(down, up, strict=True):
            rounded = (weight + b @ a).to(dtype).double()
            effect = x @ (b @ a).T
            seen.append(((x @ rounded.T - x @ weight.T - effect).norm() / effect.norm()).item())
        assert merge_error(case.base.weight, case.down, case.up).tolist() == pytest.approx(
            seen, rel=0.1
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_factors_are_wide_until_the_sum_is_rounded(self, dtype):
        case = lora_case(nn.Linear(96, 128), (4, 4), torch.float32)
        weight = case.base.weight.detach().to(dtype)
        expected = weight.double() + torch.bmm(case.up.double(), case.down.double())
        same = merge(weight, case.down, case.up) == expected.to(dtype)
        assert same.double().mean() > 0.99  # float32 may round a tie the other way

    def test_it_is_relative_to_the_adapter(self):
        def error(scale: float) -> float:
            case = lora_case(nn.Linear(64, 64), (4,), torch.float32, scales=(scale,))
            return float(merge_error(case.base.weight.half(), case.down, case.up))

        assert error(0.02) == pytest.approx(10 * error(0.2), rel=0.2)

    def test_an_adapter_without_effect_loses_nothing(self):
        case = lora_case(nn.Linear(16, 16), (0, 4), torch.float16, scales=(1.0, 0.0))
        assert merge_error(case.base.weight, case.down, case.up).tolist() == [0.0, 0.0]

    def test_a_small_adapter_is_refused_in_bfloat16(self):
        case = lora_case(nn.Linear(64, 64), (4, 4), torch.bfloat16, scales=(1.0, 0.02))
        pattern = r"down\.0\.to_q: merging objective 1 into torch\.bfloat16 loses 0\.1\d+ .*0\.05"
        with pytest.raises(UnfaithfulMerge, match=pattern):
            grouped_site(case.base, case.down, case.up, design="merged", name="down.0.to_q")
        grouped_site(case.base, case.down, case.up, design="merged", limit=0.5)

    def test_a_large_adapter_is_accepted_in_float16(self):
        case = lora_case(nn.Linear(64, 64), (4, 4), torch.float16, scales=(1.0, 0.2))
        grouped_site(case.base, case.down, case.up, design="merged")

    def test_not_a_number_is_refused(self):
        case = lora_case(nn.Linear(8, 8), (4,), torch.float16)
        case.up[0, 0, 0] = torch.nan
        with pytest.raises(UnfaithfulMerge, match="objective 0"):
            grouped_site(case.base, case.down, case.up, design="merged")

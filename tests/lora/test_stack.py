# SPDX-License-Identifier: Apache-2.0
"""M adapters stacked per module: ranks padded, scales folded into `up`, gaps filled with zeros."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

import msdda_fast as mf
from msdda_fast.errors import InvalidShape
from msdda_fast.lora.adapter import LoraAdapter, LoraFactors
from msdda_fast.lora.stack import divergent_modules, stack_adapters

SHAPES = {"to_q": (10, 6), "proj": (8, 3, 3, 3)}


def adapter(name: str, ranks: dict[str, int], seed: int) -> LoraAdapter:
    """Random factors of the given rank per module."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path, rank in ranks.items():
        out, *rest = SHAPES[path]
        down = torch.randn(rank, *rest, generator=generator)
        up = torch.randn(out, rank, *(1,) * (len(rest) - 1), generator=generator)
        factors[path] = LoraFactors(down, up)
    return LoraAdapter(name, factors)


def update(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (up.double().flatten(1) @ down.double().flatten(1)).view(len(up), *down.shape[1:])


def test_each_objective_keeps_its_own_scaled_update():
    adapters = [
        adapter("a", {"to_q": 4, "proj": 2}, 0),
        None,
        adapter("b", {"to_q": 1}, 1),
        adapter("c", {"to_q": 8, "proj": 3}, 2),
    ]
    scales = [0.5, 1.0, 0.0, -2.0]
    alphas = [{"to_q": 2.0}, None, None, {"proj": 12.0, "to_q": 8.0}]
    factor = {"to_q": [0.25, 0.0, 0.0, -2.0], "proj": [0.5, 0.0, 0.0, -8.0]}
    stacks = stack_adapters(adapters, scales=scales, alphas=alphas)
    assert stacks.keys() == SHAPES.keys()
    for path, stacked in stacks.items():
        rank = {"to_q": 8, "proj": 3}[path]
        out, *rest = SHAPES[path]
        assert stacked.down.shape == (4, rank, *rest)
        assert stacked.up.shape == (4, out, rank, *(1,) * (len(rest) - 1))
        for m, one in enumerate(adapters):
            want = torch.zeros(SHAPES[path], dtype=torch.float64)
            if one and path in one.factors:
                entry = one.factors[path]
                want = factor[path][m] * update(entry.down, entry.up)
            assert torch.allclose(update(stacked.down[m], stacked.up[m]), want, rtol=1e-6)


def test_without_scales_an_adapter_is_as_trained():
    one = adapter("a", {"to_q": 4}, 0)
    (stacked,) = stack_adapters([one]).values()
    assert torch.equal(stacked.down[0], one.factors["to_q"].down)
    assert torch.equal(stacked.up[0], one.factors["to_q"].up)


def test_the_scale_is_folded_before_the_cast():
    one = adapter("a", {"to_q": 3}, 0)
    (stacked,) = stack_adapters([one], scales=[0.3], dtype=torch.float16).values()
    assert stacked.down.dtype == stacked.up.dtype == torch.float16
    assert torch.equal(stacked.up[0], (0.3 * one.factors["to_q"].up).half())
    (stacked,) = stack_adapters(
        [LoraAdapter("h", {"to_q": LoraFactors(*(t.half() for t in _factors(one)))})], scales=[0.3]
    ).values()
    assert torch.equal(stacked.up[0], 0.3 * one.factors["to_q"].up.half().float())


def _factors(one: LoraAdapter) -> tuple[torch.Tensor, torch.Tensor]:
    return one.factors["to_q"].down, one.factors["to_q"].up


def test_alpha_over_rank_is_peft_s():
    torch.manual_seed(0)
    network = get_peft_model(
        nn.Sequential(nn.Linear(6, 10)),
        LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False),
    )
    state = {
        key.removeprefix("base_model.model."): tensor.detach()
        for key, tensor in get_peft_model_state_dict(network).items()
    }
    one = LoraAdapter.from_state_dict("a", state)
    (stacked,) = stack_adapters([one], alphas=[{"0": 6.0}]).values()
    layer = network.base_model.model[0]
    want = layer.get_delta_weight("default").detach().double()
    assert torch.allclose(update(stacked.down[0], stacked.up[0]), want, rtol=1e-5, atol=1e-6)


def test_modules_of_different_shape_name_both_adapters():
    a = adapter("a", {"to_q": 2}, 0)
    b = LoraAdapter("b", {"to_q": LoraFactors(torch.ones(2, 5), torch.ones(10, 2))})
    with pytest.raises(mf.AdapterMismatch, match=r"'a' and 'b'.*'to_q'.*\(10, 6\).*\(10, 5\)"):
        stack_adapters([a, None, b])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"adapters": []}, "0 adapters, M >= 1"),
        ({"adapters": [None], "scales": [1.0, 2.0]}, "2 scales and 1 alphas for 1 adapters"),
        ({"adapters": [None], "alphas": []}, "1 scales and 0 alphas for 1 adapters"),
    ],
)
def test_one_scale_and_alpha_per_adapter(arguments, message):
    with pytest.raises(InvalidShape, match=message):
        stack_adapters(**arguments)


def test_modules_where_objectives_differ():
    a = adapter("a", {"to_q": 2, "proj": 2}, 0)
    b = LoraAdapter("b", {**a.factors, **adapter("b", {"proj": 2}, 1).factors})
    assert divergent_modules(stack_adapters([a, a])) == set()
    assert divergent_modules(stack_adapters([a, b])) == {"proj"}
    assert divergent_modules(stack_adapters([a, a], scales=[1.0, 0.5])) == {"to_q", "proj"}
    assert divergent_modules(stack_adapters([a, None])) == {"to_q", "proj"}
    assert divergent_modules(stack_adapters([None, None])) == set()

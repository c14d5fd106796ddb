# SPDX-License-Identifier: Apache-2.0
"""compare_flow.py: the weights, merges and costs of its rows."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

import msdda_fast as mf
from benchmarks import compare_flow
from benchmarks.compare_flow import W, networks, preference, remapped, soup
from msdda_fast.emoji.align_flow import FLOW_ALIGNMENT

LAYER = "transformer.blocks.0.to_q"


@pytest.mark.parametrize("w", [0.2, 0.5, 0.8])
def test_merged_predictions_at_the_remapped_weights_are_the_fused_step(w):
    """The share of each prediction in the mean of every fused step, against the closed form."""
    weights, rate = remapped(w)
    levels = [mf.FlowSDE(FLOW_ALIGNMENT[name].level) for name in weights]
    table = mf.coefficient_table(
        FlowMatchEulerDiscreteScheduler(shift=1.0),
        25,
        levels=levels,
        weights=list(preference(w).values()),
        dtype=torch.float64,
    )
    counts = table.rows[1:, 0, table[0].layout.cond]  # of the first step, at t = 1, G is another
    found = counts / counts.sum(-1, keepdim=True)
    wanted = torch.tensor(list(weights.values()), dtype=torch.float64)
    torch.testing.assert_close(found, wanted.expand_as(found), rtol=0, atol=1e-12)
    one = mf.coefficient_table(
        FlowMatchEulerDiscreteScheduler(shift=1.0), 25, levels=[mf.FlowSDE(rate)], weights=[1.0]
    )
    torch.testing.assert_close(table.std, one.std, rtol=1e-12, atol=0)


@pytest.fixture
def model(tmp_path):
    """A folder with the factors of two adapters."""
    for seed, name in enumerate(preference(W)):
        g = torch.Generator().manual_seed(seed)
        down, up = torch.randn(2, 6, generator=g), torch.randn(5, 2, generator=g)
        (tmp_path / name).mkdir()
        factors = {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}
        save_file(factors, tmp_path / name / compare_flow.LORA)
    return tmp_path


def update(file):
    factors = load_file(file)
    return factors[f"{LAYER}.lora_B.weight"] @ factors[f"{LAYER}.lora_A.weight"]


def test_a_product_merge_averages_updates_and_a_factor_merge_does_not(model):
    weights = preference(0.2)
    wanted = sum(w * update(model / name / compare_flow.LORA) for name, w in weights.items())
    product = update(soup(model, weights, "product", None, model / "a" / "product.safetensors"))
    torch.testing.assert_close(product, wanted)
    factor, rotated = (
        update(soup(model, weights, "factor", seed, model / f"factor-{seed}.safetensors"))
        for seed in (None, 0)
    )
    assert (factor - wanted).abs().max() > 0.1
    assert (factor - rotated).abs().max() > 0.1


def test_forwards_are_those_of_the_timesteps_in_range():
    timesteps = torch.tensor([1000.0, 600.0, 300.0, 200.0])
    arm = compare_flow.FlowArm("any", preference(W))
    fused = compare_flow.System("MSDDA", "", W, arm)
    assert networks(fused, timesteps) == 2 + 2 + 2 + 1
    alone = compare_flow.System("RS", "", W, compare_flow.FlowArm("any", {"one": 1.0}))
    assert networks(alone, timesteps) == 4

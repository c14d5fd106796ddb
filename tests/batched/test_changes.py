# SPDX-License-Identifier: Apache-2.0
"""Adapters that change, and objectives that come and go."""

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter_from_state_dict

from msdda_fast.adapters.variant import Variant
from msdda_fast.batched.options import BatchedOptions
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.errors import AdapterMismatch, InvalidShape, UnfaithfulMerge, UnsupportedNetwork
from tests.batched.cases import (
    ATTENTION,
    EVERYTHING,
    add_adapter,
    inputs,
    network,
    relative,
)

EXACT = 1e-10


def variants(targets=ATTENTION, kind="sd15", dtype=torch.float64):
    """Adapters a and b are objectives; c and d, of ranks 1 and 4, are not."""
    unet = network(kind, dtype)
    for rank, name in enumerate("cabd", start=1):
        add_adapter(unet, name, targets, rank=rank, seed=rank)
    return [Variant(unet, "a"), Variant(unet, "b"), Variant(unet, None)]


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "options",
    [
        BatchedOptions(),
        BatchedOptions(design="folded", fuse_qkv=True),
        BatchedOptions(design="merged"),
    ],
    ids=["separate", "folded fused", "merged"],
)
@pytest.mark.parametrize("new", ["c", "b", None])
def test_swap_is_in_place_and_reaches_subsets(options, new):
    case = inputs(variants(EVERYTHING))
    batched = BatchedUNet.of(case.variants, options)
    early = batched.subset((True, False, True))
    case.run(batched)
    held = {name: t.data_ptr() for name, t in batched.named_buffers()}
    kept = [t.x.data_ptr() for layer in batched._cross for t in layer._kept]
    batched.swap(0, Variant(case.unet, new, 0.7))
    with pytest.raises(InvalidShape, match="call begin"):
        batched(case.x, torch.tensor(0))
    case.variants[0] = Variant(case.unet, new, 0.7)
    expected = case.stock()
    assert relative(case.run(batched), expected) < EXACT
    assert {name: t.data_ptr() for name, t in batched.named_buffers()} == held
    assert [t.x.data_ptr() for layer in batched._cross for t in layer._kept] == kept
    assert batched.adapters.is_current()
    late = batched.subset((True, True, False))
    for subset, index in ((early, [0, 2]), (late, [0, 1])):
        subset.begin(case.prompts[index], case.timesteps)
        assert relative(subset(case.x, torch.tensor(1)), expected[index]) < EXACT


def test_a_swap_that_does_not_fit_changes_nothing():
    chosen = variants()
    unet = chosen[0].network
    add_adapter(unet, "elsewhere", ["conv1"])
    case = inputs(chosen)
    batched = BatchedUNet.of(chosen)
    before = case.run(batched)
    with pytest.raises(InvalidShape, match=r"to_q: rank 4, expected at most 3.*rank_pad"):
        batched.swap(0, Variant(unet, "d"))
    with pytest.raises(AdapterMismatch, match=r"no site at 'down_blocks\.0\.resnets\.0\.conv1'"):
        batched.swap(0, Variant(unet, "elsewhere"))
    with pytest.raises(UnsupportedNetwork, match="another network"):
        batched.swap(0, Variant(network(), None))
    with pytest.raises(InvalidShape, match="objective 3"):
        batched.swap(3, Variant(unet, "c"))
    assert torch.equal(batched(case.x, torch.tensor(1)), before)
    padded = BatchedUNet.of(chosen, BatchedOptions(rank_pad=4))
    padded.swap(0, Variant(unet, "d"))
    case.variants[0] = Variant(unet, "d")
    assert relative(case.run(padded), case.stock()) < EXACT


def test_a_swap_where_objectives_share_rows_is_refused():
    unet = variants()[0].network
    batched = BatchedUNet.of([Variant(unet, "a"), Variant(unet, "a")])
    batched.swap(1, Variant(unet, "a"))
    with pytest.raises(AdapterMismatch, match="share their rows"):
        batched.swap(1, Variant(unet, "b"))


def test_an_unfaithful_swap_changes_nothing():
    chosen = variants(dtype=torch.bfloat16)
    add_adapter(chosen[0].network, "faint", size=1e-3)
    chosen = [Variant(chosen[0].network, None), Variant(chosen[0].network, "a", 20.0)]
    case = inputs(chosen, dtype=torch.float32)
    batched = BatchedUNet.of(chosen, BatchedOptions(design="merged"))
    before = case.run(batched)
    with pytest.raises(UnfaithfulMerge, match="objective 0"):
        batched.swap(0, Variant(chosen[0].network, "faint"))
    assert torch.equal(batched(case.x, torch.tensor(1)), before)


def test_every_change_of_the_network_is_noticed():
    chosen = variants(dtype=torch.float32)
    unet = chosen[0].network

    def current_after(change):
        adapters = BatchedUNet.of(chosen).adapters
        assert adapters.is_current()
        change()
        return adapters.is_current()

    layer = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    down, base = layer.lora_A["a"].weight, layer.base_layer.weight
    state = {
        name: torch.randn_like(value)
        for name, value in unet.named_parameters()
        if ".a.weight" in name
    }
    assert current_after(lambda: layer.set_scale("a", 3.0))  # sampling sets its own
    assert current_after(lambda: layer.lora_A["c"].weight.data.mul_(2))  # no objective
    assert not current_after(lambda: down.data.mul_(2))
    assert not current_after(lambda: layer.lora_B["b"].weight.data.mul_(2))
    assert not current_after(lambda: layer.lora_alpha.update(a=9))
    with torch.no_grad():
        assert not current_after(lambda: base.mul_(2))
    assert not current_after(lambda: unet.to(torch.float64))
    assert not current_after(
        lambda: hotswap_adapter_from_state_dict(unet, state, "a", _config(unet))
    )


def _config(unet):
    return unet.peft_config["a"]

# SPDX-License-Identifier: Apache-2.0
"""Whatever changes a network after its batched forward was built is noticed."""

import torch
from peft.utils.hotswap import hotswap_adapter_from_state_dict

from msdda_fast.adapters.variant import Variant
from msdda_fast.batched.unet import BatchedUNet
from tests.batched.cases import (
    ATTENTION,
    add_adapter,
    network,
)

EXACT = 1e-10


def variants(targets=ATTENTION, kind="sd15", dtype=torch.float64):
    """Adapters a and b are objectives; c and d, of ranks 1 and 4, are not."""
    unet = network(kind, dtype)
    for rank, name in enumerate("cabd", start=1):
        add_adapter(unet, name, targets, rank=rank, seed=rank)
    return [Variant(unet, "a"), Variant(unet, "b"), Variant(unet, None)]


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
    assert not current_after(lambda: base.data.mul_(2))  # hands of others, such as an average's
    assert current_after(lambda: unet.train())  # nothing is dropped in a batched forward
    assert current_after(lambda: layer.set_adapter(["c"]))  # sampling sets its own
    built = BatchedUNet.of(chosen).adapters
    for module in (unet.mid_block, layer, layer.lora_A["a"]):
        with module.register_forward_hook(lambda *_: None):
            assert not built.is_current()
    assert built.is_current()
    assert not current_after(lambda: unet.to(torch.float64))
    assert not current_after(
        lambda: hotswap_adapter_from_state_dict(unet, state, "a", _config(unet))
    )


def _config(unet):
    return unet.peft_config["a"]

# SPDX-License-Identifier: Apache-2.0
"""Whoever switches adapters leaves the networks as they were found."""

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer

from msdda_fast.adapters.switching import AdapterSwitch
from tests.batched.cases import add_adapter, network


def state_of(unet):
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    return [
        (list(layer.active_adapters), layer.disable_adapters, dict(layer.scaling), layer.training)
        for layer in layers
    ]


@pytest.mark.parametrize(("adapter", "scale"), [("a", 0.25), ("b", 1.0), (None, 1.0)])
def test_after_the_context_everything_is_as_before(adapter, scale):
    unet = network()
    for name in "ab":
        add_adapter(unet, name)
    unet.train()
    for layer in unet.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(["a"])
            layer.set_scale("a", 3.0)
    before = state_of(unet)
    with AdapterSwitch([unet, None]) as switch:
        switch.select(adapter, scale)
        assert state_of(unet) != before
    assert state_of(unet) == before

# SPDX-License-Identifier: Apache-2.0
"""The adapters that peft has put into a UNet, as stacked factors of M objectives.

They are read from peft's layers, not from files: whatever their format and whoever loaded them,
these are the factors that a forward of the network would use.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from weakref import WeakValueDictionary

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from msdda_fast.adapters.layers import changed, holds, running
from msdda_fast.adapters.network_state import NetworkState, scaling
from msdda_fast.adapters.variant import Variant
from msdda_fast.errors import AdapterMismatch, InvalidShape, UnsupportedNetwork
from msdda_fast.lora.adapter import LoraAdapter, LoraFactors
from msdda_fast.lora.stack import StackedFactors, divergent_modules, stack_adapters

__all__ = ["LoadedAdapters", "bare"]


def bare(module: nn.Module) -> nn.Module:
    """Return the layer inside a peft layer, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


class LoadedAdapters:
    """M variants of one network, as factors.

    An adapter that the UNet does not hold counts as the base: it may change the text encoder only.

    Args:
        variants: One per objective, all of the same network.

    Attributes:
        unet: The network.
        variants: As given.
        stacks: Factors by module path; a module without an entry is not adapted by any objective.
        divergent: Paths where two objectives differ.
        sites: Layers that forwards made of these, by what they were made for, while one uses them.

    Raises:
        AdapterMismatch: Adapters are merged into the weights, or are not plain LoRA.
        InvalidShape: There are no variants.
        UnsupportedNetwork: The variants have different networks.
    """

    stacks: dict[str, StackedFactors]
    divergent: set[str]
    sites: WeakValueDictionary[Hashable, nn.Module]

    def __init__(self, variants: Sequence[Variant]) -> None:
        if not variants:
            raise InvalidShape("got 0 variants, expected M >= 1")
        self.variants = list(variants)
        self.unet: UNet2DConditionModel = variants[0].network
        if any(variant.network is not self.unet for variant in variants):
            raise UnsupportedNetwork("objectives with different networks cannot share a forward")
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        read = [self._read(variant) for variant in variants]
        self.stacks = stack_adapters(
            [adapter for adapter, _ in read],
            alphas=[alphas for _, alphas in read],
            dtype=dtype,
        )
        self.divergent = divergent_modules(self.stacks)
        self.sites = WeakValueDictionary()
        self._state = NetworkState(self.unet, variants)

    def is_current(self) -> bool:
        """Return whether weights and adapters are still those that were read."""
        return self._state.is_current()

    def _read(self, variant: Variant) -> tuple[LoraAdapter | None, dict[str, float]]:
        """Return the factors of one adapter, and alpha = s r where peft multiplies B A by s.

        Modules it does not change (s = 0 or B = 0) have no entry, so rows before them are shared.
        """
        factors, alphas = {}, {}
        for path, layer in self._layers(variant):
            name = variant.adapter
            down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
            scale = scaling(layer, variant)
            if scale != 0 and bool(up.any()):
                factors[path] = LoraFactors(down, up)
                alphas[path] = scale * len(down)
        if not factors:
            return None, {}
        return LoraAdapter(str(variant.adapter), factors), alphas

    def _layers(self, variant: Variant) -> Iterator[tuple[str, LoraLayer]]:
        """Yield paths and layers that hold the adapter; check that each is a plain LoRA."""
        adapter = variant.adapter
        for path, layer in self.unet.named_modules():
            if isinstance(layer, AuxiliaryTrainingWrapper):
                raise AdapterMismatch(f"{path!r} is a trained copy of the layer, not a LoRA")
            if not isinstance(layer, BaseTunerLayer):
                continue
            if variant.as_it_is and (active := running(layer)):
                raise AdapterMismatch(
                    f"adapters {active} are active in {path!r} of an objective's own network; call "
                    "fuse_lora() first"
                )
            if adapter is None:
                continue
            if layer.merged:
                raise AdapterMismatch(
                    f"adapters {layer.merged_adapters} are fused into the weights of {path!r}; "
                    "call unfuse_lora() first"
                )
            if not holds(layer, adapter):
                continue
            if (
                type(layer) not in (Linear, Conv2d)
                or adapter in layer.lora_variant
                or layer.lora_bias.get(adapter, False)
            ):
                kind = type(layer).__module__.removeprefix("peft.tuners.").split(".")[0]
                raise AdapterMismatch(
                    f"adapter {adapter!r} is not a plain LoRA in {path!r} ({kind}, DoRA, or with a "
                    "bias)"
                )
            for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
                if reason := changed(part):
                    raise AdapterMismatch(
                        f"adapter {adapter!r} in {path!r}: {reason} is not supported"
                    )
            yield path, layer

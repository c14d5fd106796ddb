# SPDX-License-Identifier: Apache-2.0
"""The adapters that peft has put into a UNet, as stacked factors of M objectives.

They are read from peft's layers, not from files: whatever format they came in, and whoever loaded
them, they are what a forward of the network would use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from msdda_fast.adapters.network_state import NetworkState, scaling
from msdda_fast.adapters.variant import Variant
from msdda_fast.errors import AdapterMismatch, InvalidShape, UnsupportedNetwork
from msdda_fast.lora.adapter import LoraAdapter, LoraFactors
from msdda_fast.lora.stack import StackedFactors, divergent_modules, stack_adapters

__all__ = ["LoadedAdapters", "bare"]


def bare(module: nn.Module) -> nn.Module:
    """The layer inside a peft layer, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


class LoadedAdapters:
    """M variants of one network, as factors.

    An adapter that the UNet does not hold counts as the base: it may change the text encoder only.

    Args:
        variants: One per objective, all of the same network.

    Attributes:
        unet: The network.
        variants: As given.
        stacks: Factors by module path; a module without an entry is the base's for every objective.
        divergent: Paths where two objectives differ.

    Raises:
        AdapterMismatch: Adapters are merged into the weights, or are no plain LoRA.
        InvalidShape: No variant.
        UnsupportedNetwork: The variants have different networks.
    """

    stacks: dict[str, StackedFactors]
    divergent: set[str]

    def __init__(self, variants: Sequence[Variant]) -> None:
        if not variants:
            raise InvalidShape("got 0 variants, expected M >= 1")
        self.variants = list(variants)
        self.unet: UNet2DConditionModel = variants[0].network
        if any(variant.network is not self.unet for variant in variants):
            raise UnsupportedNetwork("objectives with networks of their own share no forward")
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        read = [self._read(variant) for variant in variants]
        self.stacks = stack_adapters(
            [adapter for adapter, _ in read],
            alphas=[alphas for _, alphas in read],
            dtype=dtype,
        )
        self.divergent = divergent_modules(self.stacks)
        self._state = NetworkState(self.unet, variants)

    def is_current(self) -> bool:
        """Whether weights and adapters are still those that were read; see `NetworkState`."""
        return self._state.is_current()

    def _read(self, variant: Variant) -> tuple[LoraAdapter | None, dict[str, float]]:
        """The factors of one adapter, and alpha = s r where peft multiplies B A by s.

        Modules it leaves alone (s = 0 or B = 0) have no entry, so that rows before them are shared.
        """
        factors, alphas = {}, {}
        for path, layer in self._layers(variant.adapter):
            name = variant.adapter
            down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
            scale = scaling(layer, variant)
            if scale != 0 and bool(up.any()):
                factors[path] = LoraFactors(down, up)
                alphas[path] = scale * len(down)
        if not factors:
            return None, {}
        return LoraAdapter(str(variant.adapter), factors), alphas

    def _layers(self, adapter: str | None) -> Iterator[tuple[str, LoraLayer]]:
        """Paths and layers that hold the adapter, each checked to be a plain LoRA."""
        for path, layer in self.unet.named_modules():
            if isinstance(layer, AuxiliaryTrainingWrapper):
                raise AdapterMismatch(f"{path!r} is a trained copy of the layer, not a LoRA")
            if not isinstance(layer, BaseTunerLayer):
                continue
            if layer.merged:
                raise AdapterMismatch(
                    f"adapters {layer.merged_adapters} are fused into the weights of {path!r}; "
                    "call unfuse_lora() first"
                )
            if adapter is None or adapter not in getattr(layer, "lora_A", {}):
                continue
            if adapter in layer.lora_variant or layer.lora_bias.get(adapter, False):
                raise AdapterMismatch(
                    f"adapter {adapter!r} is no plain LoRA in {path!r} (DoRA, or with a bias)"
                )
            yield path, layer

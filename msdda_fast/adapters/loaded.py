# SPDX-License-Identifier: Apache-2.0
"""The adapters that peft has put into a UNet, as stacked factors of M objectives.

They are read from peft's layers, not from files: whatever format they came in, and whoever loaded
them, they are what a forward of the network would use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from msdda_fast.adapters.variant import Variant
from msdda_fast.errors import AdapterMismatch, InvalidShape, UnsupportedNetwork
from msdda_fast.lora.adapter import LoraAdapter, LoraFactors
from msdda_fast.lora.stack import StackedFactors, divergent_modules, stack_adapters
from msdda_fast.torch_private import version_of

__all__ = ["LoadedAdapters", "bare"]


def bare(module: nn.Module) -> nn.Module:
    """The layer inside a peft layer, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


class LoadedAdapters:
    """M variants of one network, as factors.

    An adapter that the UNet does not hold counts as the base: it may change the text encoder only.

    Args:
        variants: One per objective, all of the same network.
        rank_pad: Room for adapters of this rank to be put in later.

    Attributes:
        unet: The network.
        variants: As given, and as changed by `replace`.
        stacks: Factors by module path; a module without an entry is the base's for every objective.
        divergent: Paths where two objectives differ.

    Raises:
        AdapterMismatch: Adapters are merged into the weights, or are no plain LoRA.
        InvalidShape: No variant.
        UnsupportedNetwork: The variants have different networks.
    """

    stacks: dict[str, StackedFactors]
    divergent: set[str]

    def __init__(self, variants: Sequence[Variant], *, rank_pad: int = 0) -> None:
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
            rank_pad=rank_pad,
            dtype=dtype,
        )
        self.divergent = divergent_modules(self.stacks)
        self._base = self._base_state()
        self._adapters = [self._adapter_state(variant) for variant in variants]

    def one(self, variant: Variant) -> dict[str, StackedFactors]:
        """The factors of one variant of the network, as a stack of M = 1."""
        adapter, alphas = self._read(variant)
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        return stack_adapters([adapter], alphas=[alphas], dtype=dtype)

    def unchanged(self, path: str, stacks: Mapping[str, StackedFactors]) -> bool:
        """Whether the only objective of `stacks` has the factors there that objective 0 has."""
        old, new = self.stacks.get(path), stacks.get(path)
        if old is None or new is None:
            return old is new
        rank = new.down.shape[1]
        return (
            torch.equal(old.down[0, :rank], new.down[0])
            and torch.equal(old.up[0, :, :rank], new.up[0])
            and not bool(old.up[0, :, rank:].any())
        )

    def replace(self, m: int, variant: Variant, stacks: Mapping[str, StackedFactors]) -> None:
        """Make objective m another variant; `stacks` are its factors, none of a higher rank."""
        self.variants[m] = variant
        self._adapters[m] = self._adapter_state(variant)
        for path, old in self.stacks.items():
            old.down[m] = old.up[m] = 0
            if (new := stacks.get(path)) is not None:
                rank = new.down.shape[1]
                old.down[m, :rank], old.up[m, :, :rank] = new.down[0], new.up[0]
        self.divergent |= divergent_modules(self.stacks)

    def is_current(self) -> bool:
        """Whether weights and adapters are still those that were read.

        Base weights are compared by address and version, which a write through `.data` does not
        raise; adapters by their numbers, because peft's hotswap writes that way. Two launches and
        one sync per objective.
        """
        if self._base != self._base_state():
            return False
        for (then, scales_then), variant in zip(self._adapters, self.variants, strict=True):
            now, scales_now = self._adapter_state(variant)
            if scales_then != scales_now or not torch.equal(then, now):
                return False
        return True

    def _read(self, variant: Variant) -> tuple[LoraAdapter | None, dict[str, float]]:
        """The factors of one adapter, and alpha = s r where peft multiplies B A by s.

        Modules it leaves alone (s = 0 or B = 0) have no entry, so that rows before them are shared.
        """
        factors, alphas = {}, {}
        for path, layer in self._layers(variant.adapter):
            name = variant.adapter
            down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
            scale = _scaling(layer, variant)
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

    def _base_state(self) -> list[tuple[str, int, int]]:
        """Address and version of every weight of the base; in-place changes count versions up."""
        held = (*self.unet.named_parameters(), *self.unet.named_buffers())
        return [
            (name, tensor.data_ptr(), version_of(tensor))
            for name, tensor in held
            if ".lora_" not in name
        ]

    def _adapter_state(self, variant: Variant) -> tuple[Tensor, list[tuple[str, float]]]:
        layers = list(self._layers(variant.adapter))
        name = variant.adapter
        flat = [
            factor[name].weight.detach().flatten()
            for _, layer in layers
            for factor in (layer.lora_A, layer.lora_B)
        ]
        scales = [(path, _scaling(layer, variant)) for path, layer in layers]
        return torch.cat(flat) if flat else torch.empty(0), scales


def _scaling(layer: LoraLayer, variant: Variant) -> float:
    """The factor s of B A as `AdapterSwitch.select` would set it, whatever is set now."""
    now = layer.scaling[variant.adapter]
    layer.set_scale(variant.adapter, variant.scale)
    scale = float(layer.scaling[variant.adapter])
    layer.scaling[variant.adapter] = now
    return scale

# SPDX-License-Identifier: Apache-2.0
"""Run one network as any of its objectives: switch its adapters, and restore them afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from msdda_fast.adapters.layers import can_scale
from msdda_fast.adapters.variant import AdapterSet, Variant

__all__ = ["AdapterSwitch", "adapter_names"]


def adapter_names(*networks: nn.Module | None) -> list[str]:
    """Return the names of the adapters in the networks, in the order they were loaded."""
    names: dict[str, None] = {}
    for network in networks:
        names.update(dict.fromkeys(getattr(network, "peft_config", None) or {}))
    return list(names)


class AdapterSwitch:
    """Context manager that activates one adapter of some networks at a time, or none.

    On exit every layer's state is restored: active adapters, scales, gradients, dropout.

    Args:
        networks: Networks with or without peft layers.
        as_they_are: Networks whose adapters are left alone.
    """

    def __init__(
        self, networks: Sequence[nn.Module | None], as_they_are: Sequence[nn.Module] = ()
    ) -> None:
        present = [network for network in networks if network is not None]
        modules = [module for network in present for module in network.modules()]
        left = [module for network in as_they_are for module in network.modules()]
        self._layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
        self._training = [module for module in (*modules, *left) if module.training]
        self._saved: list[_LayerState] = []
        self._selected: AdapterSet | None = None

    @classmethod
    def of(
        cls, variants: Iterable[Variant], text_encoder: nn.Module | None = None
    ) -> AdapterSwitch:
        """Return the switch of the variants' networks and of a text encoder."""
        networks = {v.network: None for v in variants if not v.as_it_is}
        own = {v.network: None for v in variants if v.as_it_is}
        return cls([text_encoder, *networks], list(own))

    def __enter__(self) -> AdapterSwitch:
        self._saved = [_LayerState.of(layer) for layer in self._layers]
        for module in self._training:  # adapters are loaded in training mode, with their dropout
            module.training = False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for layer, state in zip(self._layers, self._saved, strict=True):
            state.restore(layer)
        for module in self._training:
            module.training = True

    def select(self, name: str | None, scale: float = 1.0) -> None:
        """Make the networks run with the adapter `name`, or as the base model (None).

        `scale` multiplies the adapter's update as it was trained, no unit. Layers with adapters
        fused into their weights are left alone: these weights are the base model.
        """
        self.select_set(() if name is None else ((name, scale),))

    def select_set(self, adapters: AdapterSet) -> None:
        """Make the networks run with all of these adapters at once, or as the base model (none)."""
        if adapters == self._selected:
            return
        self._selected = adapters
        for layer in self._layers:
            if layer.merged:  # disabled, it would take them out
                continue
            layer.enable_adapters(bool(adapters))
            if adapters:
                # not for inference: torch rounds by whether weights require grad, and stock ones do
                layer.set_adapter([name for name, _ in adapters])
            for name, scale in adapters:
                if can_scale(layer):
                    layer.set_scale(name, scale)

    def predict(self, variant: Variant, x: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        """Return the raw output of a variant, before guidance.

        Args:
            variant: A variant of one of the networks.
            x: (B, C, h, w) latents, any float dtype.
            t: Timestep, 0-d, on the device of `x`.
            embeds: (K, B, L, D), the branches of guidance on the first axis.

        Returns: (K, B, C, h, w) in the dtype of the network.
        """
        if not variant.as_it_is:
            self.select(variant.adapter, variant.scale)
        network = variant.network
        output: Tensor = network(
            x.to(network.dtype).repeat(len(embeds), 1, 1, 1),
            t,
            encoder_hidden_states=embeds.flatten(0, 1).to(network.dtype),
            return_dict=False,
        )[0]
        return output.view(*embeds.shape[:2], *x.shape[1:])


@dataclass(frozen=True, slots=True)
class _LayerState:
    active: list[str]
    disabled: bool
    scaling: dict[str, float]
    requires_grad: list[tuple[nn.Parameter, bool]]

    @classmethod
    def of(cls, layer: BaseTunerLayer) -> _LayerState:
        flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
        scaling = dict(layer.scaling) if can_scale(layer) else {}
        return cls(list(layer.active_adapters), layer.disable_adapters, scaling, flags)

    def restore(self, layer: BaseTunerLayer) -> None:
        layer.enable_adapters(True)
        layer.set_adapter(self.active)
        layer.enable_adapters(not self.disabled)
        if self.scaling:
            layer.scaling.update(self.scaling)
        for parameter, flag in self.requires_grad:
            parameter.requires_grad = flag

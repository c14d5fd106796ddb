# SPDX-License-Identifier: Apache-2.0
"""What peft's layers in a network hold, run, and can be made to run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from msdda_fast.adapters.variant import Variant
from msdda_fast.errors import AdapterMismatch
from msdda_fast.torch_private import held_by, hooks_of, is_compiled

__all__ = [
    "can_scale",
    "changed",
    "check_can_switch",
    "holds",
    "own_modules",
    "patched",
    "running",
    "uncompiled",
]


def uncompiled(network: nn.Module) -> nn.Module:
    """Return the network inside `torch.compile(network)`, or the network itself."""
    inner: nn.Module = getattr(network, "_orig_mod", network)
    return inner


def holds(layer: BaseTunerLayer, adapter: str) -> bool:
    """Whether a peft layer of any kind has a part of this adapter."""
    return any(adapter in getattr(layer, kind, ()) for kind in layer.adapter_layer_names)


def running(layer: BaseTunerLayer) -> list[str]:
    """Return the adapters whose effect this layer adds to its base layer's when it is called."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if holds(layer, name)]


def can_scale(layer: BaseTunerLayer) -> bool:
    """Whether `set_scale` multiplies the layer's adapter as it was trained by a number."""
    return isinstance(layer, (LoraLayer, LycorisLayer)) and not isinstance(layer, AdaLoraLayer)


def changed(module: nn.Module) -> str | None:
    """Say what runs in place of, before or after the forward of the module's class, if anything."""
    if (what := patched(module)) is not None:
        return what
    if is_compiled(module):
        return "torch.compile of one network (set_forward(compile=True) compiles all of them)"
    return None


def patched(module: nn.Module) -> str | None:
    """As `changed`, for who does not mind that a module was compiled."""
    if getattr(module, "_hf_hook", None) is not None:
        return "offloading, which leaves weights without a fixed address,"
    if "forward" in vars(module):
        return "a patched forward (by another library, or by layerwise casting)"
    if any(hooks_of(module)):
        return "a forward hook"
    return None


def own_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of a network and its parts, without what peft adds to a layer."""
    yield path, module
    children: Iterable[tuple[str, nn.Module | None]] = held_by(module)[0].items()
    if isinstance(module, BaseTunerLayer):
        children = [("base_layer", module.base_layer)]
    for name, child in children:
        if child is not None:
            yield from own_modules(child, f"{path}.{name}" if path else name)


def check_can_switch(variant: Variant, network: nn.Module | None = None) -> None:
    """Check that `AdapterSwitch` can make a network run as this variant.

    Args:
        variant: Of an objective.
        network: Its text encoder; None: the variant's own network.

    Raises:
        AdapterMismatch: The adapter is fused into the weights, holds trained copies of layers, or
            has a scale other than 1 and is of a kind that has none.
    """
    adapter = variant.adapter
    if adapter is None or variant.as_it_is:
        return
    for path, layer in (variant.network if network is None else network).named_modules():
        if isinstance(layer, AuxiliaryTrainingWrapper):
            raise AdapterMismatch(
                f"{path!r} is a trained copy of the layer (modules_to_save), which cannot be "
                f"switched with adapter {adapter!r}"
            )
        if not isinstance(layer, BaseTunerLayer):
            continue
        if layer.merged:
            raise AdapterMismatch(
                f"adapters {layer.merged_adapters} are fused into the weights of {path!r}, so no "
                f"objective could run with {adapter!r} alone; call unfuse_lora() first"
            )
        if variant.scale != 1 and holds(layer, adapter) and not can_scale(layer):
            raise AdapterMismatch(
                f"adapter {adapter!r} has no scale ({type(layer).__module__.split('.')[-2]} in "
                f"{path!r}): use Objective(scale=1)"
            )

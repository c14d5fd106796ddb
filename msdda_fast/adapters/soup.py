# SPDX-License-Identifier: Apache-2.0
"""Rewarded Soups of a pipeline's objectives, and temporary adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from msdda_fast.adapters.files import AdapterFile, AdapterPart
from msdda_fast.adapters.layers import running
from msdda_fast.adapters.loaded import LoadedAdapters
from msdda_fast.adapters.switching import AdapterSwitch, adapter_names
from msdda_fast.adapters.variant import AdapterSet, Variant
from msdda_fast.errors import AdapterMismatch
from msdda_fast.lora.adapter import LoraAdapter
from msdda_fast.lora.soup import Merge, merge_adapters
from msdda_fast.lora.stack import StackedFactors

__all__ = ["average_networks", "make_soup", "merged_sets", "temporarily"]


def make_soup(
    name: str,
    variants: Mapping[str, Variant],
    weights: Sequence[float],
    merge: Merge,
    text_encoder: nn.Module | None,
    rotation: int | None = None,
) -> AdapterFile | UNet2DConditionModel:
    """Average the weights of objectives: either their adapters or their full networks.

    Args:
        name: Name of the merged adapter.
        variants: Variants by objective; one without an adapter is the base.
        weights: One per objective, sum 1.
        merge: How to merge adapters, with scales and alphas folded in; see `merge_adapters`.
        text_encoder: Its adapters are merged too.
        rotation: Of the factors; see `merge_adapters`. Full networks have none.

    Raises:
        AdapterMismatch: Some objectives are adapters and some full networks, or networks differ in
            architecture; see also `merge_adapters` and `LoadedAdapters`.
    """
    networks = {objective: variant.network for objective, variant in variants.items()}
    if len({id(network) for network in networks.values()}) > 1:
        if any(variant.adapter is not None for variant in variants.values()):
            raise AdapterMismatch(
                f"cannot average {', '.join(variants)}: some are adapters, some are full networks"
            )
        return average_networks(networks, weights)
    unet = next(iter(networks.values()))
    sets: dict[str, AdapterSet] = {
        objective: () if v.adapter is None else ((v.adapter, v.scale),)
        for objective, v in variants.items()
    }
    return merged_sets(
        name, {"unet": unet, "text_encoder": text_encoder}, sets, weights, merge, rotation
    )


def merged_sets(
    name: str,
    networks: Mapping[str, nn.Module | None],
    sets: Mapping[str, AdapterSet],
    weights: Sequence[float],
    merge: Merge,
    rotation: int | None = None,
) -> AdapterFile:
    """Merge the adapters of objectives into one adapter for all networks.

    Args:
        name: Name of the merged adapter.
        networks: Networks by name, with adapters or without.
        sets: The adapters of each objective; several that act together count as their sum.
        weights: One per objective, sum 1.
        merge: How to merge, with scales and alphas folded in; see `merge_adapters`.
        rotation: Of the factors; see `merge_adapters`.

    Raises:
        AdapterMismatch: See `merge_adapters` and `LoadedAdapters`.
    """
    parts = {}
    for part, network in networks.items():
        if network is None or not adapter_names(network):
            continue
        stacks = {objective: _stacks(network, adapters) for objective, adapters in sets.items()}
        if merged := merge_adapters(stacks, weights, merge, rotation):
            parts[part] = AdapterPart(LoraAdapter(name, merged), alphas={})
    return AdapterFile(name, parts)


def _stacks(network: Any, adapters: AdapterSet) -> dict[str, StackedFactors]:  # noqa: ANN401
    """The factors of a set in one network by module path; those of several are put together."""
    read = {name: LoadedAdapters([Variant(network, name, s)]).stacks for name, s in adapters}
    if len(read) == 1:
        return next(iter(read.values()))
    together = merge_adapters(read, [1.0] * len(read), "product")
    return {path: StackedFactors(f.down[None], f.up[None]) for path, f in together.items()}


@torch.no_grad()
def average_networks(
    networks: Mapping[str, UNet2DConditionModel], weights: Sequence[float]
) -> UNet2DConditionModel:
    """Return a network with parameters `theta = sum_i w_i theta_i`, summed in float32 or wider.

    Args:
        networks: Networks by objective, all of one architecture.
        weights: One per network, sum 1.

    Raises:
        AdapterMismatch: Two networks differ in the name or shape of a parameter, or adapters are
            active in one, whose factors have no average.
    """
    for name, network in networks.items():
        for path, layer in network.named_modules():
            if isinstance(layer, BaseTunerLayer) and (active := running(layer)):
                raise AdapterMismatch(
                    f"cannot average {name!r}: adapters {active} are active in its {path!r}; call "
                    "its fuse_lora() first"
                )
    states = {name: dict(network.named_parameters()) for name, network in networks.items()}
    first, *others = states
    for other in others:
        shapes = [{path: tuple(p.shape) for path, p in states[n].items()} for n in (first, other)]
        for path in {**shapes[0], **shapes[1]}:
            here, there = (shape.get(path, "no such parameter") for shape in shapes)
            if here != there:
                raise AdapterMismatch(
                    f"cannot average {first!r} and {other!r}: {path!r} is {here} and {there}"
                )
    average = copy.deepcopy(networks[first])
    for path, parameter in average.named_parameters():
        wide = torch.promote_types(parameter.dtype, torch.float32)
        parts = zip(weights, states.values(), strict=True)
        total = torch.stack([w * state[path].to(parameter.device, wide) for w, state in parts])
        parameter.copy_(total.sum(0))
    return average


@contextmanager
def temporarily(adapter: AdapterFile, by_name: Mapping[str, nn.Module | None]) -> Iterator[None]:
    """Add an adapter to the networks within the context; on exit they are restored.

    Raises:
        AdapterMismatch: The adapter does not fit.
    """
    adapter.check(by_name)
    networks = [network for network in by_name.values() if network is not None]
    flags = [(p, p.requires_grad) for network in networks for p in network.parameters()]
    wrapped = {id(m) for n in networks for m in n.modules() if isinstance(m, BaseTunerLayer)}
    try:
        # putting it in makes it the active one and freezes the base
        with AdapterSwitch(networks):
            adapter.put_into(by_name)
            yield
    finally:
        for network in networks:
            _remove(adapter.name, network, wrapped)
        for parameter, flag in flags:
            parameter.requires_grad = flag


def _remove(name: str, network: nn.Module, wrapped: set[int]) -> None:
    """Remove an adapter, and the wrappers of layers that were wrapped only for it."""
    for parent in list(network.modules()):
        for child_name, child in list(parent.named_children()):
            if not isinstance(child, BaseTunerLayer):
                continue
            if id(child) not in wrapped:
                setattr(parent, child_name, child.get_base_layer())
            else:
                child.delete_adapter(name)
    if name in adapter_names(network):
        own = vars(network)
        del own["peft_config"][name]
        if not own["peft_config"]:
            del own["peft_config"], own["_hf_peft_config_loaded"]

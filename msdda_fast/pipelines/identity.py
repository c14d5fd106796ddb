# SPDX-License-Identifier: Apache-2.0
"""Everything about a pipeline that its images depend on, as a fingerprint; see `resume`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import LoraLayer
from torch import nn

from msdda_fast.adapters.network_state import scaling
from msdda_fast.adapters.switching import adapter_names
from msdda_fast.adapters.variant import AdapterSet, Variant
from msdda_fast.levels import noise_to_json
from msdda_fast.objective import Objective
from msdda_fast.pipelines.attach import WithObjectives
from msdda_fast.pipelines.attach_files import networks_of
from msdda_fast.resume import digest

if TYPE_CHECKING:
    from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

__all__ = ["base_digest", "model_identity"]

#: Entries of configs that say where and by whom files were written.
_UNCOUNTED = ("transformers_version", "architectures", "dtype", "torch_dtype")


def model_identity(pipe: MSDDAPipeline | WithObjectives) -> dict[str, Any]:
    """Return digests of the base's parts and of each objective, and the settings of both."""
    stock: Any = pipe
    networks = networks_of(stock)
    denoiser: Any = next(iter(networks.values()))
    return {  # the causes first: another dtype changes every digest
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "device": stock._execution_device.type,
        "scheduler": _config(stock.scheduler.config),
        **_objectives(pipe, networks),
        "model": {
            name: _part(part) for name, part in sorted(stock.components.items()) if part is not None
        },
    }


def _objectives(
    pipe: MSDDAPipeline | WithObjectives, networks: Mapping[str, nn.Module]
) -> dict[str, Any]:
    if isinstance(pipe, WithObjectives):
        return {
            "pipeline": type(pipe).__name__,
            **_of_base(pipe, networks),
            "objectives": {
                name: {
                    **_levels(pipe.objectives[name]),
                    "adapters": _set_digests(adapters, networks),
                }
                for name, adapters in pipe.adapter_sets.items()
            },
        }
    return {
        **_few_steps(pipe),
        "objectives": {
            name: {
                **_levels(pipe.objectives[name]),
                "guidance_scale": pipe.objectives[name].guidance_scale,
                "adapter": _adapter_digest(variant),
                "network": None if variant.network is pipe.unet else base_digest(variant.network),
            }
            for name, variant in pipe.variants.items()
        },
    }


def base_digest(network: nn.Module) -> str:
    """Return a digest of a network's weights and config without its LoRA adapters."""
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in network.state_dict().items()
        if ".lora_" not in name
    }
    return digest(weights, _config(getattr(network, "config", {})))


def _levels(objective: Objective) -> dict[str, Any]:
    """Its noise and timesteps; what older results did not have is named only where it is given."""
    given: dict[str, Any] = {"eta": objective.eta}
    if objective.timesteps is not None:
        given["timesteps"] = list(objective.timesteps)
    if objective.noise is not None:
        given["noise"] = noise_to_json(objective.noise)
    return given


def _of_base(pipe: WithObjectives, networks: Mapping[str, nn.Module]) -> dict[str, Any]:
    """An accelerator, which acts in the base, too."""
    return {"accelerator": _set_digests(pipe.base_set, networks)} if pipe.base_set else {}


def _set_digests(adapters: AdapterSet, networks: Mapping[str, nn.Module]) -> list[str | None]:
    return [
        _adapter_digest(Variant(network, adapter, scale))
        for adapter, scale in adapters
        for network in networks.values()
        if adapter in adapter_names(network)
    ]


def _few_steps(pipe: MSDDAPipeline) -> dict[str, Any]:
    """What sampling in few steps adds: older results, which were of DDIM, stay valid."""
    kind, found = type(pipe.scheduler).__name__, dict[str, Any]()
    if not kind.startswith("DDIM"):
        found["sampler"] = kind
    if pipe.accelerator is not None:
        found["accelerator"] = _adapter_digest(pipe.base_variant)
    return found


def _adapter_digest(variant: Variant) -> str | None:
    """Return a digest of an adapter's factors and of its scale in each layer."""
    if variant.adapter is None:
        return None
    factors = {
        name: tensor
        for name, tensor in variant.network.state_dict().items()
        if ".lora_" in name and name.split(".lora_")[-1].split(".")[1] == variant.adapter
    }
    scales = [
        scaling(layer, variant)
        for layer in variant.network.modules()
        if isinstance(layer, LoraLayer) and variant.adapter in layer.scaling
    ]
    # without the adapter's name, which means nothing
    shown = [name.replace(f".{variant.adapter}", "") for name in factors]
    return digest(shown, list(factors.values()), scales)


def _part(part: Any) -> str:  # noqa: ANN401 - a component of any kind
    if isinstance(part, nn.Module):
        return base_digest(part)
    vocabulary = part.get_vocab() if hasattr(part, "get_vocab") else {}
    limit = getattr(part, "model_max_length", None)
    return digest(type(part).__name__, sorted(vocabulary.items()), limit)


def _config(config: Any) -> dict[str, Any]:  # noqa: ANN401 - of diffusers or transformers
    entries: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else config
    return {
        key: value if isinstance(value, bool | int | float | str | type(None)) else str(value)
        for key, value in sorted(entries.items())
        if not key.startswith("_") and key not in _UNCOUNTED
    }

# SPDX-License-Identifier: Apache-2.0
"""Everything about a pipeline that its images depend on, as a fingerprint; see `resume`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import LoraLayer
from torch import nn

from msdda_fast.adapters.network_state import scaling
from msdda_fast.adapters.variant import Variant
from msdda_fast.objective import Objective
from msdda_fast.resume import digest

if TYPE_CHECKING:
    from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

__all__ = ["base_digest", "model_identity"]

#: Entries of configs that say where and by whom files were written.
_UNCOUNTED = ("transformers_version", "architectures", "dtype", "torch_dtype")


def model_identity(pipe: MSDDAPipeline) -> dict[str, Any]:
    """Return digests of the base's parts and of each objective, and the settings of both."""
    return {  # the causes first: another dtype changes every digest
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "device": pipe._execution_device.type,
        "scheduler": _config(pipe.scheduler.config),
        **_few_steps(pipe),
        "objectives": {
            name: {
                "eta": pipe.objectives[name].eta,
                **_range(pipe.objectives[name]),
                "guidance_scale": pipe.objectives[name].guidance_scale,
                "adapter": _adapter_digest(variant),
                "network": None if variant.network is pipe.unet else base_digest(variant.network),
            }
            for name, variant in pipe.variants.items()
        },
        "model": {
            name: _part(part) for name, part in sorted(pipe.components.items()) if part is not None
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


def _few_steps(pipe: MSDDAPipeline) -> dict[str, Any]:
    """What sampling in few steps adds: older results, which were of DDIM, stay valid."""
    kind, found = type(pipe.scheduler).__name__, dict[str, Any]()
    if not kind.startswith("DDIM"):
        found["sampler"] = kind
    if pipe.accelerator is not None:
        found["accelerator"] = _adapter_digest(pipe.base_variant)
    return found


def _range(objective: Objective) -> dict[str, Any]:
    """Its timesteps, if it does not act in all: older results, which had none, stay valid."""
    return {} if objective.timesteps is None else {"timesteps": list(objective.timesteps)}


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

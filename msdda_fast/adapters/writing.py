# SPDX-License-Identifier: Apache-2.0
"""Writes the adapters of one objective as a file that diffusers reads, too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from msdda_fast.adapters.injection import extract
from msdda_fast.adapters.network_state import scaling
from msdda_fast.adapters.switching import adapter_names
from msdda_fast.adapters.variant import AdapterSet, Variant
from msdda_fast.lora.adapter import DEFAULT_WEIGHT_NAME

__all__ = ["write_adapters"]


def write_adapters(networks: Mapping[str, nn.Module], adapters: AdapterSet, folder: Path) -> None:
    """Write a set of adapters as one, `pytorch_lora_weights.safetensors` in `folder`.

    One adapter is written as it is, with its description, and without the scale of its objective;
    of several, scales are multiplied into the factors.

    Args:
        networks: By the names that keys start with; at least one holds an adapter.
        adapters: At least one.
        folder: Made if missing.

    Raises:
        AdapterMismatch: An adapter is no plain LoRA.
    """
    tensors: dict[str, Tensor] = {}
    description: dict[str, Any] = {}
    for name, network in networks.items():
        held = [entry for entry in adapters if entry[0] in adapter_names(network)]
        if not held:
            continue
        if len(adapters) == 1:
            state, config = extract(network, held[0][0])
            description |= {f"{name}.{field}": value for field, value in config.items()}
        else:
            state = _together(network, held)
        tensors |= {f"{name}.{path}": tensor for path, tensor in state.items()}
    header = {"format": "pt"}
    if description:
        header["lora_adapter_metadata"] = json.dumps(description, sort_keys=True, default=list)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(sorted(tensors.items())), folder / DEFAULT_WEIGHT_NAME, metadata=header)


def _together(network: nn.Module, adapters: list[tuple[str, float]]) -> dict[str, Tensor]:
    """The factors of a set, in peft's naming; the update is B A."""
    downs: dict[str, list[Tensor]] = {}
    ups: dict[str, list[Tensor]] = {}
    for name, scale in adapters:
        state, _ = extract(network, name)
        for key, down in state.items():
            path, side, _ = key.rpartition(".lora_A.weight")
            if side:
                layer: Any = network.get_submodule(path)
                factor = scaling(layer, Variant(layer, name, scale))
                up = state[f"{path}.lora_B.weight"]
                downs.setdefault(path, []).append(down.float())
                ups.setdefault(path, []).append(up.float() * factor)
    return {
        **{f"{path}.lora_A.weight": torch.cat(parts) for path, parts in downs.items()},
        **{f"{path}.lora_B.weight": torch.cat(parts, dim=1) for path, parts in ups.items()},
    }

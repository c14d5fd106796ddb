# SPDX-License-Identifier: Apache-2.0
"""Write a pipeline as a stock folder plus `objectives.json`, completely or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from msdda_fast.adapters.switching import adapter_names
from msdda_fast.adapters.variant import Variant
from msdda_fast.objective import Objective
from msdda_fast.pipelines.manifest import OBJECTIVES_FILE, dump_objectives

__all__ = ["load_in_float32", "save"]

#: Written last: a folder with an index has everything the index lists.
_INDICES = (OBJECTIVES_FILE, "model_index.json")


class Savable(Protocol):
    """The parts of a Stable Diffusion pipeline that saving needs."""

    unet: Any
    text_encoder: Any
    scheduler: Any
    config: Any

    @property
    def components(self) -> Mapping[str, Any]:
        """Modules by name."""

    @property
    def objectives(self) -> Mapping[str, Objective]:
        """The objectives by name, in order."""

    @property
    def variants(self) -> Mapping[str, Variant]:
        """The network and the active adapter of each objective."""


def save(pipe: Savable, folder: Path, **options: Any) -> None:  # noqa: ANN401 - diffusers' own
    """Write a folder that stock diffusers loads, with the objectives beside it.

    Everything is written next to the folder first, so a failed save does not change it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    stage.mkdir()
    try:
        _write(pipe, stage, options)
        _move(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _write(pipe: Savable, stage: Path, options: dict[str, Any]) -> None:
    stock = StableDiffusionPipeline(
        **{
            **pipe.components,
            "scheduler": copy.deepcopy(pipe.scheduler),  # construction may edit its config
            "unet": _without_adapters(pipe.unet),
            "text_encoder": _without_adapters(pipe.text_encoder),
        },
        requires_safety_checker=False,
    )
    stock.register_to_config(requires_safety_checker=pipe.config.requires_safety_checker)
    stock.save_pretrained(stage, **options)
    load_in_float32(stage)
    places = {}
    for name, variant in pipe.variants.items():
        place = f"objectives/{name}"
        if variant.network is not pipe.unet:
            variant.network.save_pretrained(stage / place)
            places[name] = place
        elif variant.adapter is not None:
            _write_adapter(pipe, variant.adapter, stage / place)
            places[name] = place
    (stage / OBJECTIVES_FILE).write_text(dump_objectives(pipe.objectives, places), "utf-8")


def load_in_float32(folder: Path) -> None:
    """Let the networks of a written folder load in one dtype, float32, unless a reader asks.

    diffusers reads its networks so, whatever dtype the files have. Networks of transformers load
    in the dtype that their config names, by default the one they were saved in: a folder saved in
    float16 would give stock diffusers a text encoder that does not fit its UNet.
    """
    for config in folder.glob("*/config.json"):
        entries = json.loads(config.read_text("utf-8"))
        for key in {"dtype", "torch_dtype"} & set(entries):  # the second in transformers 4
            entries[key] = "float32"
            config.write_text(json.dumps(entries, indent=2) + "\n", "utf-8")


def _without_adapters(network: nn.Module | None) -> nn.Module | None:
    """Return a network with the same weights (shared, not copied) and no adapters."""
    if not adapter_names(network):
        return network
    assert network is not None
    weights = {
        key.replace(".base_layer.", "."): tensor
        for key, tensor in network.state_dict().items()
        if ".lora_" not in key
    }
    make = getattr(type(network), "from_config", type(network))  # diffusers; transformers
    with torch.device("meta"):
        bare: nn.Module = make(network.config)
    bare.load_state_dict(weights, assign=True)
    return bare


def _write_adapter(pipe: Savable, adapter: str, folder: Path) -> None:
    layers: dict[str, Any] = {}
    for part in ("unet", "text_encoder"):
        network = getattr(pipe, part)
        if adapter in adapter_names(network):
            state: dict[str, Tensor] = get_peft_model_state_dict(network, adapter_name=adapter)
            layers[f"{part}_lora_layers"] = {k: v.contiguous() for k, v in state.items()}
            config = network.peft_config[adapter].to_dict()
            layers[f"{part}_lora_adapter_metadata"] = config
    StableDiffusionPipeline.save_lora_weights(folder, **layers)


def _move(stage: Path, folder: Path) -> None:
    """Move the staged files into place, each atomically, the indices last."""
    if not folder.exists():
        os.replace(stage, folder)
        return
    files = [file.relative_to(stage) for file in stage.rglob("*") if file.is_file()]
    for file in sorted(
        files, key=lambda file: _INDICES.index(str(file)) if str(file) in _INDICES else -1
    ):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / file, folder / file)

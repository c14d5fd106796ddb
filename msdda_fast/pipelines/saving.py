# SPDX-License-Identifier: Apache-2.0
"""Write a pipeline as a stock folder plus `objectives.json`, completely or not at all."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from msdda_fast.adapters.injection import extract
from msdda_fast.adapters.layers import check_can_switch, own_modules, running, uncompiled
from msdda_fast.adapters.switching import adapter_names
from msdda_fast.adapters.variant import Variant
from msdda_fast.errors import AdapterMismatch
from msdda_fast.objective import Objective
from msdda_fast.pipelines.accelerator import ACCELERATOR_FOLDER, Accelerator
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

    @property
    def accelerator(self) -> Accelerator | None:
        """What all of them include; None: nothing."""

    @property
    def base_variant(self) -> Variant:
        """The base with it."""


def save(pipe: Savable, folder: Path, **options: Any) -> None:  # noqa: ANN401 - diffusers' own
    """Write a folder that stock diffusers loads, with the objectives beside it.

    Everything is written next to the folder first, so a failed save does not change it.

    Raises:
        AdapterMismatch: An adapter is not a LoRA, is fused into the weights, or is active in the
            network of an objective's own.
    """
    for name, variant in pipe.variants.items():
        _check_savable(name, variant)
    with staged(folder) as stage:
        _write(pipe, stage, options)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, whose files take their places in `folder` at the end.

    A failure leaves `folder` as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    stage.mkdir()
    try:
        yield stage
        _move(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check_savable(name: str, variant: Variant) -> None:
    check_can_switch(variant)
    if variant.as_it_is:
        for path, layer in variant.network.named_modules():
            if isinstance(layer, BaseTunerLayer) and (active := running(layer)):
                raise AdapterMismatch(
                    f"objective {name!r}: adapters {active} are active in {path!r} of its unet; "
                    "call its fuse_lora() first, to save them with it"
                )
    config = (getattr(variant.network, "peft_config", None) or {}).get(variant.adapter)
    if config is not None and config.peft_type != "LORA":
        raise AdapterMismatch(
            f"objective {name!r}: adapter {variant.adapter!r} is of the kind "
            f"{config.peft_type.value}, but only LoRA can be saved"
        )


def _write(pipe: Savable, stage: Path, options: dict[str, Any]) -> None:
    stock = StableDiffusionPipeline(
        **{
            **pipe.components,
            "scheduler": copy.deepcopy(pipe.scheduler),  # construction may edit its config
            "unet": without_adapters(pipe.unet),
            "text_encoder": without_adapters(pipe.text_encoder),
        },
        requires_safety_checker=False,
    )
    stock.register_to_config(requires_safety_checker=pipe.config.requires_safety_checker)
    stock.save_pretrained(stage, **options)
    load_in_float32(stage)
    places = {}
    folders = folders_of(pipe.variants)
    for name, variant in pipe.variants.items():
        place = f"objectives/{folders[name]}"
        if variant.network is not pipe.unet:
            network: Any = without_adapters(variant.network)
            network.save_pretrained(stage / place)
            places[name] = place
        elif variant.adapter not in (None, pipe.base_variant.adapter):
            _write_adapter(pipe, str(variant.adapter), stage / place)
            places[name] = place
    entry = None
    if pipe.accelerator is not None:
        _write_adapter(pipe, str(pipe.base_variant.adapter), stage / ACCELERATOR_FOLDER)
        entry = pipe.accelerator.to_json(ACCELERATOR_FOLDER)
    text = dump_objectives(pipe.objectives, places, entry)
    (stage / OBJECTIVES_FILE).write_text(text, "utf-8")


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


def folders_of(names: Iterable[str]) -> dict[str, str]:
    """Return a folder for each objective: its name, where every file system takes that."""
    folders: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = re.sub(r"[^\w-]", "_", name, flags=re.ASCII)[:64]
        folder, count = plain, 1
        while folder.casefold() in taken:
            count += 1
            folder = f"{plain}-{count}"
        taken.add(folder.casefold())
        folders[name] = folder
    return folders


def without_adapters(network: Any) -> Any:  # noqa: ANN401 - a network of any class, or None
    """Return a network with the same weights (shared, not copied) and no adapters.

    Weights that adapters are fused into stay so.
    """
    if not adapter_names(network):
        return network
    network = uncompiled(network)
    own = {path for path, module in own_modules(network) if not isinstance(module, BaseTunerLayer)}
    weights = {
        key.replace(".base_layer.", "."): tensor
        for key, tensor in network.state_dict().items()
        if key.rpartition(".")[0] in own
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
            state, config = extract(network, adapter)
            layers[f"{part}_lora_layers"] = state
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

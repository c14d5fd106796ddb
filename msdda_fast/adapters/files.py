# SPDX-License-Identifier: Apache-2.0
"""Adapter files in any format diffusers supports: read, checked against the base, added to it.

Every adapter is read and checked before the first one is added, so a bad one changes nothing.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn

from msdda_fast.errors import AdapterMismatch
from msdda_fast.lora.adapter import LoraAdapter, read_adapter_file

__all__ = ["AdapterFile"]

#: Where peft's own `save_pretrained` puts the network inside its wrapper.
_PEFT_PREFIX = "base_model.model."
_KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
#: Key of the adapter's configuration in the header of a file that diffusers saved.
_METADATA_KEY = "lora_adapter_metadata"


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """One adapter in diffusers' naming: keys start with `unet.` or `text_encoder.`.

    `alphas` holds kohya's alpha per module, `metadata` the configuration that diffusers or peft
    saved; without either, alpha equals the rank and the update is not rescaled.
    """

    name: str
    state_dict: Mapping[str, Tensor]
    alphas: Mapping[str, float] | None
    metadata: Mapping[str, Any] | None

    @classmethod
    def read(cls, name: str, file: Path) -> AdapterFile:
        """Read the adapter called `name` from a safetensors file.

        Supported are the formats of diffusers and kohya, and folders of peft's `save_pretrained`.

        Raises:
            AdapterMismatch: The adapter is for another kind of pipeline.
            ValueError: The file is damaged or holds something other than LoRA.
        """
        state_dict: Mapping[str, Tensor] = read_adapter_file(file)
        metadata = _header_metadata(file)
        if any(key.startswith(_PEFT_PREFIX) for key in state_dict):
            state_dict = {key.removeprefix(_PEFT_PREFIX): v for key, v in state_dict.items()}
            metadata = _peft_metadata(file.parent)
        if not any(
            key.startswith(("unet.", "text_encoder", *_KOHYA_PREFIXES)) for key in state_dict
        ):
            # saved from the network itself rather than from a pipeline
            state_dict = {f"unet.{key}": v for key, v in state_dict.items()}
            metadata = metadata and {f"unet.{key}": v for key, v in metadata.items()}
        state_dict, alphas, _ = StableDiffusionPipeline.lora_state_dict(
            dict(state_dict), return_lora_metadata=True
        )
        for key in state_dict:
            if not key.startswith(("unet.", "text_encoder.")):
                raise AdapterMismatch(
                    f"adapter {name!r} was made for another kind of pipeline: {key!r} belongs to "
                    "neither 'unet' nor 'text_encoder'"
                )
        return cls(name, state_dict, alphas, metadata)

    def check(self, unet: nn.Module, text_encoder: nn.Module | None) -> None:
        """Check the adapter against the networks it would change.

        Raises:
            AdapterMismatch: A module is absent or has another shape; names the first.
        """
        factors = convert_unet_state_dict_to_peft(self._part("unet."))
        LoraAdapter.from_state_dict(self.name, factors).check(unet)
        part = self._part("text_encoder.")
        if not part:
            return
        if text_encoder is None:
            raise AdapterMismatch(
                f"adapter {self.name!r} changes the text encoder ({next(iter(part))!r}), but this "
                "pipeline has none"
            )
        factors = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
        if not hasattr(text_encoder, "text_model"):  # flattened by newer transformers
            factors = {key.removeprefix("text_model."): v for key, v in factors.items()}
        LoraAdapter.from_state_dict(self.name, factors).check(text_encoder)

    def put_into(self, unet: nn.Module, text_encoder: nn.Module | None) -> None:
        """Add the adapter under its name. Other adapters of the networks do not change."""
        for prefix, network, load in (
            ("unet.", unet, StableDiffusionPipeline.load_lora_into_unet),
            ("text_encoder.", text_encoder, StableDiffusionPipeline.load_lora_into_text_encoder),
        ):
            if self._part(prefix):
                with warnings.catch_warnings():
                    # peft warns of a second adapter in one network, which is the very purpose here
                    warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
                    load(
                        dict(self.state_dict),
                        self.alphas,
                        network,
                        adapter_name=self.name,
                        metadata=self.metadata and dict(self.metadata),
                    )

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self.state_dict.items()
            if key.startswith(prefix)
        }


def _header_metadata(file: Path) -> dict[str, Any] | None:
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
    metadata: dict[str, Any] | None = json.loads(header.get(_METADATA_KEY, "null"))
    return metadata


def _peft_metadata(folder: Path) -> dict[str, Any] | None:
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    known = {field.name for field in fields(LoraConfig)}
    config = json.loads(file.read_text("utf-8"))
    return {key: value for key, value in config.items() if key in known}

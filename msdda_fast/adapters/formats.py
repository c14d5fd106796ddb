# SPDX-License-Identifier: Apache-2.0
"""From the keys of diffusers, peft, kohya and ComfyUI to factors by network and module.

diffusers' converters rename the keys of its own and of kohya's files. They would also guess one
alpha for a whole network; each module's own is kept here instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor

from msdda_fast.adapters.ldm_names import LdmNames
from msdda_fast.errors import AdapterMismatch, InvalidAdapter

__all__ = ["NETWORKS", "Part", "is_peft", "parts_of", "prefixed"]

#: The networks an adapter may change, by their names in the keys.
NETWORKS = ("unet", "text_encoder")
#: Where peft's own `save_pretrained` puts the network inside its wrapper.
_PEFT = "base_model.model."
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_COMFY = "diffusion_model."
_COMFY_TEXT = "text_encoders.clip_l.transformer."
#: How the paths of a text encoder begin; a UNet has no such modules.
_TEXT = ("text_model.", "encoder.layers.")
_FACTORS = (".lora_A.weight", ".lora_B.weight")
_KOHYA_FACTORS = {".lora_down.weight": _FACTORS[0], ".lora_up.weight": _FACTORS[1]}


@dataclass(frozen=True, slots=True)
class Part:
    """What an adapter does to one network.

    Attributes:
        factors: In peft's naming, `<module>.lora_A.weight` and `lora_B`.
        alphas: By module, where the file has one.
    """

    factors: dict[str, Tensor]
    alphas: dict[str, float]


def is_peft(keys: Mapping[str, object]) -> bool:
    """Whether peft's own `save_pretrained` wrote these keys."""
    return any(key.startswith(_PEFT) for key in keys)


def prefixed(state_dict: Mapping[str, Tensor]) -> str:
    """Return the network whose name all keys lack, or "" if they say it themselves."""
    keys = [key.removeprefix(_PEFT) for key in state_dict]
    if any(key.startswith((*NETWORKS, *_KOHYA, _COMFY, _COMFY_TEXT)) for key in keys):
        return ""
    # saved from the network itself rather than from a pipeline
    return "text_encoder" if any(key.startswith(_TEXT) for key in keys) else "unet"


def parts_of(state_dict: Mapping[str, Tensor], unet: UNet2DConditionModel) -> dict[str, Part]:
    """Return the factors of an adapter's file by network.

    Args:
        state_dict: As stored.
        unet: For the names of ComfyUI, which count a UNet's blocks.

    Raises:
        AdapterMismatch: Keys belong to a network that the pipeline does not have.
        InvalidAdapter: Keys that make no adapter.
    """
    network = prefixed(state_dict)
    alphas: dict[str, float] = {}
    factors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    for key, tensor in state_dict.items():
        if key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = _number(key, tensor)
        else:
            factors[key] = tensor
            owners[id(tensor)] = _stem(key)
    renamed = _by_network(factors, network, unet)
    parts = {name: _in_peft_naming(name, renamed) for name in NETWORKS}
    return {name: Part(part, _alphas(part, owners, alphas)) for name, part in parts.items() if part}


def _by_network(
    factors: dict[str, Tensor], network: str, unet: UNet2DConditionModel
) -> dict[str, Tensor]:
    """Return keys that start with the name of a network."""
    if all(key.startswith(_KOHYA) for key in factors):
        _check_pairs(factors)
        factors = StableDiffusionPipeline.lora_state_dict(dict(factors))[0]
    elif any(key.startswith((_COMFY, _COMFY_TEXT)) for key in factors):
        factors = _from_comfy(factors, LdmNames(unet))
    else:
        start = f"{network}." if network else ""
        factors = {start + key.removeprefix(_PEFT): tensor for key, tensor in factors.items()}
    for key in factors:
        if not key.startswith(tuple(f"{name}." for name in NETWORKS)):
            raise AdapterMismatch(
                f"it was made for another kind of pipeline: {key!r} belongs to neither 'unet' nor "
                "'text_encoder'"
            )
    return factors


def _from_comfy(factors: Mapping[str, Tensor], names: LdmNames) -> dict[str, Tensor]:
    kohya = {key: tensor for key, tensor in factors.items() if key.startswith(_KOHYA)}
    found = StableDiffusionPipeline.lora_state_dict(kohya)[0] if kohya else {}
    for key, tensor in factors.items():
        if key in kohya:
            continue
        for old, new in _KOHYA_FACTORS.items():
            key = key.replace(old, new)
        if key.startswith(_COMFY):
            stem = _stem(key)
            path = names.translate(stem.removeprefix(_COMFY))
            key = f"unet.{path}{key.removeprefix(stem)}"
        found[key.replace(_COMFY_TEXT, "text_encoder.", 1)] = tensor
    return found


def _check_pairs(factors: Mapping[str, Tensor]) -> None:
    """Check that each module has both factors, which the converter of kohya's keys relies on."""
    for key in factors:
        stem, kind = _stem(key), key.removeprefix(_stem(key))
        if kind not in _KOHYA_FACTORS:
            raise InvalidAdapter(f"{key!r} is neither a LoRA factor nor an alpha")
        other = next(other for other in _KOHYA_FACTORS if other != kind)
        if stem + other not in factors:
            raise InvalidAdapter(f"{stem!r} has no {other[1:]}")


def _in_peft_naming(network: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{network}."
    part = {
        key.removeprefix(start): tensor
        for key, tensor in state_dict.items()
        if key.startswith(start)
    }
    if all(key.endswith(_FACTORS) for key in part):
        return part
    if network == "unet":
        converted: dict[str, Tensor] = convert_unet_state_dict_to_peft(part)
        return converted
    # which of the two it is cannot be told from a file that leaves out to_out
    for kind in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
        part = convert_state_dict_to_peft(part, kind)
    return part


def _alphas(
    part: Mapping[str, Tensor], owners: Mapping[int, str], alphas: Mapping[str, float]
) -> dict[str, float]:
    """Return the alpha of each module; converters rename keys, and leave tensors as they are."""
    found = {}
    for key, tensor in part.items():
        stem = owners[id(tensor)]
        if stem in alphas:
            found[_stem(key)] = alphas[stem]
    return found


def _stem(key: str) -> str:
    """Return the module of a factor's key: all before `.lora`, or `_lora` in older files."""
    for mark in (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.", ".lora_linear_"):
        if mark in key:
            return key.rpartition(mark)[0]
    return key.rpartition("_lora.")[0] or key


def _number(key: str, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise InvalidAdapter(f"{key!r} has shape {tuple(tensor.shape)}, expected one number")
    return float(tensor)

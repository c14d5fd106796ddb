# SPDX-License-Identifier: Apache-2.0
"""From the keys of diffusers, peft, kohya and ComfyUI to factors by network and module.

diffusers' converters rename the keys of its own and of kohya's files. They would also guess one
alpha for a whole network; each module's own is kept here instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor

from msdda_fast.adapters.ldm_names import LdmNames
from msdda_fast.errors import AdapterMismatch, InvalidAdapter

__all__ = ["Format", "Part", "StableDiffusionFormat", "StockFormat", "is_peft"]

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


class Format(Protocol):
    """Reads the keys of an adapter's file for one kind of pipeline."""

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks an adapter may change, by their names in the keys."""

    def default(self, keys: Iterable[str]) -> str:
        """Return the network whose name all keys lack, or "" if they say it themselves."""

    def parts(self, state_dict: Mapping[str, Tensor]) -> dict[str, Part]:
        """Return the factors of an adapter by network.

        Raises:
            AdapterMismatch: Keys belong to a network that the pipeline does not have.
            InvalidAdapter: Keys that make no adapter.
        """


@dataclass(frozen=True, slots=True)
class StableDiffusionFormat:
    """Of Stable Diffusion 1 and 2.

    Attributes:
        unet: For the names of ComfyUI, which count a UNet's blocks.
    """

    unet: UNet2DConditionModel
    networks: tuple[str, ...] = ("unet", "text_encoder")

    def default(self, keys: Iterable[str]) -> str:
        """Return the network whose name all keys lack, or "" if they say it themselves."""
        return _default(
            keys, self.networks, self.networks[0], (*_KOHYA, _COMFY, _COMFY_TEXT, *self.networks)
        )

    def parts(self, state_dict: Mapping[str, Tensor]) -> dict[str, Part]:
        """Return the factors of an adapter by network; see `Format`."""
        return _parts(state_dict, self.networks, self._renamed)

    def _renamed(self, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        if all(key.startswith(_KOHYA) for key in factors):
            return _from_kohya(StableDiffusionPipeline, factors)
        if any(key.startswith((_COMFY, _COMFY_TEXT)) for key in factors):
            return _from_comfy(factors, LdmNames(self.unet))
        return _with_network(factors, self.default(factors))


@dataclass(frozen=True, slots=True)
class StockFormat:
    """Of any other pipeline: whatever its class in diffusers converts.

    Attributes:
        kind: The pipeline's class.
        networks: Names of its networks, the denoiser first.
        unet_config: Of its UNet, which converters of Stable Diffusion XL ask for; None: without.
    """

    kind: Any
    networks: tuple[str, ...]
    unet_config: Any = None

    def default(self, keys: Iterable[str]) -> str:
        """Return the network whose name all keys lack, or "" if they say it themselves."""
        return _default(keys, self.networks, self.networks[0], (*_KOHYA, _COMFY, "text_encoder"))

    def parts(self, state_dict: Mapping[str, Tensor]) -> dict[str, Part]:
        """Return the factors of an adapter by network; see `Format`."""
        if all(key.startswith(_KOHYA) for key in state_dict) and self.unet_config is not None:
            convert = partial(_from_kohya, self.kind, unet_config=self.unet_config)
            return _parts(state_dict, self.networks, convert)
        ours = all(
            key.startswith((*(f"{name}." for name in self.networks), _PEFT)) for key in state_dict
        )
        if ours or self.default(state_dict):  # nothing to convert
            start = self.default(state_dict)
            return _parts(state_dict, self.networks, lambda found: _with_network(found, start))
        if not hasattr(self.kind, "lora_state_dict"):
            raise AdapterMismatch(
                f"{self.kind.__name__} reads no adapters, and keys such as "
                f"{next(iter(state_dict))!r} name none of its networks ({', '.join(self.networks)})"
            )
        # these converters multiply each module's alpha into its factors
        found = self.kind.lora_state_dict(dict(state_dict))
        found = found[0] if isinstance(found, tuple) else found
        return _parts(found, self.networks, dict)


def _default(
    keys: Iterable[str], networks: Sequence[str], denoiser: str, known: tuple[str, ...]
) -> str:
    bare = [key.removeprefix(_PEFT) for key in keys]
    if any(key.startswith((*(f"{name}." for name in networks), *known)) for key in bare):
        return ""
    # saved from the network itself rather than from a pipeline
    return "text_encoder" if any(key.startswith(_TEXT) for key in bare) else denoiser


def _parts(
    state_dict: Mapping[str, Tensor],
    networks: Sequence[str],
    renamed: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Part]:
    alphas: dict[str, float] = {}
    factors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    for key, tensor in state_dict.items():
        if key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = _number(key, tensor)
        else:
            factors[key] = tensor
            owners[id(tensor)] = _stem(key)
    if lost := alphas.keys() - set(owners.values()):
        raise InvalidAdapter(f"{min(lost)!r} has an alpha and no factors")
    found = renamed(factors)
    for key in found:
        if not key.startswith(tuple(f"{name}." for name in networks)):
            *others, last = map(repr, networks)
            raise AdapterMismatch(
                f"it was made for another kind of pipeline: {key!r} belongs to neither "
                f"{', '.join(others)} nor {last}"
            )
    parts = {name: _in_peft_naming(name, found) for name in networks}
    return {name: Part(part, _alphas(part, owners, alphas)) for name, part in parts.items() if part}


def _with_network(factors: Mapping[str, Tensor], network: str) -> dict[str, Tensor]:
    start = f"{network}." if network else ""
    return {start + key.removeprefix(_PEFT): tensor for key, tensor in factors.items()}


def _from_kohya(kind: Any, factors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:  # noqa: ANN401
    _check_pairs(factors)
    found: dict[str, Tensor] = kind.lora_state_dict(dict(factors), **options)[0]
    return found


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
    if not network.startswith("text_encoder"):
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

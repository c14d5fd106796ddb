# SPDX-License-Identifier: Apache-2.0
"""The LoRA adapter in training: add it to a network, switch it off for the base, save, load."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from msdda_fast.errors import AdapterMismatch
from msdda_fast.pipelines.identity import base_digest
from msdda_fast.training.storage import write_tensors

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
WEIGHT_NAME = "pytorch_lora_weights.safetensors"
_ADAPTER = "default"


def add_lora(
    unet: nn.Module,
    *,
    rank: int = 4,
    lora_alpha: int | None = None,
    target_modules: Sequence[str] = ATTENTION_PROJECTIONS,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Freeze `unet` and add one LoRA: y = W x + (lora_alpha / rank) lora_up lora_down x.

    lora_down is drawn from N(0, 1/rank^2) and lora_up is zero, so the adapted model starts exactly
    as the base model. Both are float32, whatever the dtype of the frozen weights.

    Args:
        unet: Any network with layers named as in `target_modules`; changed in place.
        rank: r >= 1.
        lora_alpha: None: `rank`, which makes the scale 1.
        target_modules: Names, or ends of dotted names, of the linear layers to adapt.
        seed: Seed of lora_down; the global random state is not changed.

    Returns: the trainable parameters.

    Raises:
        ValueError: The rank is below 1, the network already has an adapter, or no layer matches.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if next(_lora_layers(unet), None) is not None:
        raise ValueError("the network already has LoRA layers; start from one without adapters")
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if lora_alpha is None else lora_alpha,
        init_lora_weights="gaussian",
        target_modules=list(target_modules),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # freezes every other parameter too
        inject_adapter_in_model(config, unet, adapter_name=_ADAPTER)
    parameters = lora_parameters(unet)
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def lora_parameters(unet: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters of a network prepared by `add_lora`, in a fixed order.

    Raises:
        ValueError: The network has none.
    """
    parameters = [p for p in unet.parameters() if p.requires_grad]
    if next(_lora_layers(unet), None) is None or not parameters:
        raise ValueError("the network has no trainable LoRA layer; call add_lora(unet) first")
    return parameters


@contextmanager
def base_model(unet: nn.Module) -> Iterator[nn.Module]:
    """Within the context `unet` is the base model p_pre: adapters off, no second copy in memory."""
    layers = list(_lora_layers(unet))
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield unet
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def network_identity(unet: nn.Module, weight_dtype: torch.dtype) -> dict[str, object]:
    """Return what a training run depends on in its network: the base, and the adapter's form."""
    config: LoraConfig = vars(unet)["peft_config"][_ADAPTER]
    return {
        "base": base_digest(unet),
        "rank": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
        "device": next(unet.parameters()).device.type,
        "weight_dtype": str(weight_dtype).removeprefix("torch."),
    }


def lora_state(unet: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors by peft name, e.g. `mid_block.….to_q.lora_A.weight`."""
    state: dict[str, Tensor] = get_peft_model_state_dict(unet, adapter_name=_ADAPTER)
    return state


def save_lora(unet: nn.Module, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the adapter as a standard LoRA folder and return the file.

    `pipe.load_lora_weights(folder)` of diffusers reads it. The names are diffusers' own
    (`unet.` or `transformer.`, then peft's); rank and alpha are in the file's metadata, where
    diffusers expects them.

    Args:
        unet: A network prepared by `add_lora`.
        folder: Created if missing; an older file there is replaced atomically.
        dtype: Data type of the stored tensors; float16 and bfloat16 halve the size.
    """
    config: LoraConfig = vars(unet)["peft_config"][_ADAPTER]
    described = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
        "init_lora_weights": config.init_lora_weights,
    }
    prefix = _prefix(unet)
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(
            {prefix + key: value for key, value in described.items()}, sort_keys=True
        ),
    }
    tensors = {
        prefix + name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in lora_state(unet).items()
    }
    path = Path(folder) / WEIGHT_NAME
    write_tensors(path, tensors, metadata)
    return path


def load_lora(unet: nn.Module, folder: str | Path) -> None:
    """Copy an adapter written by `save_lora` into the one made by `add_lora`, to train it further.

    Raises:
        FileNotFoundError: `folder` has no weights.
        AdapterMismatch: Names, shapes or the scale differ from the network's adapter.
    """
    path = Path(folder) / WEIGHT_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA weights at {path}")
    prefix = _prefix(unet)
    with safe_open(path, framework="pt") as file:
        stored = {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys()}
        described = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    restore_lora(unet, stored, source=str(path))
    config: LoraConfig = vars(unet)["peft_config"][_ADAPTER]
    alpha = described.get(f"{prefix}lora_alpha", config.r)
    if alpha != config.lora_alpha:
        raise AdapterMismatch(f"{path} has lora_alpha {alpha}, the network {config.lora_alpha}")


def restore_lora(unet: nn.Module, stored: dict[str, Tensor], *, source: str) -> None:
    """Copy `stored`, tensors by peft name, into the network's adapter.

    Raises:
        AdapterMismatch: Names or shapes differ; the message gives the first difference.
    """
    own = lora_state(unet)
    for name in sorted({*own, *stored}):
        here = tuple(own[name].shape) if name in own else "no such tensor"
        there = tuple(stored[name].shape) if name in stored else "no such tensor"
        if here != there:
            raise AdapterMismatch(f"{source} does not fit at {name}: {there}, network: {here}")
    set_peft_model_state_dict(unet, stored, adapter_name=_ADAPTER)


def _prefix(network: nn.Module) -> str:
    """Return how names in a file begin: with the component that the network is in pipelines."""
    module = type(network).__module__
    return "transformer." if module.startswith("diffusers.models.transformers.") else "unet."


def _lora_layers(unet: nn.Module) -> Iterator[BaseTunerLayer]:
    return (module for module in unet.modules() if isinstance(module, BaseTunerLayer))

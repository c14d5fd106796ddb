# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of ComfyUI's own classes, in a checkout of ComfyUI on the CPU."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for libraries that ComfyUI imports at its start and nothing here calls."""

    names = ("torchvision", "torchaudio")

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        top = name.split(".")[0]
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)
            if top in self.names
            else None
        )

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        def attribute(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = attribute


def start(checkout: Path) -> None:
    """Make ComfyUI importable, on the CPU."""
    import transformers  # noqa: F401 - before the stand-ins, which it would look for

    sys.path.append(str(checkout))
    sys.meta_path.append(_StandIns())  # last: an installed one is found before
    cli = importlib.import_module("comfy.cli_args")
    cli.args.cpu = True


class Family(NamedTuple):
    """How a tiny model is made, and what it takes.

    Attributes:
        config: Its class in comfy.supported_models.
        settings: Of the network.
        text, pooled: Widths of its conditioning.
        latent: (C, ...) of its latents.
        extra: What else its conditioning has.
    """

    config: str
    settings: dict[str, Any]
    text: int
    pooled: int
    latent: tuple[int, ...]
    extra: dict[str, Any]


_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "context_dim": 16,
    "adm_in_channels": None, "legacy": False, "use_temporal_attention": False,
}  # fmt: skip
_MMDIT = {
    "in_channels": 16, "patch_size": 2, "depth": 1, "input_size": None, "adm_in_channels": 24,
    "context_embedder_config": {
        "target": "torch.nn.Linear", "params": {"in_features": 20, "out_features": 64},
    },
    "pos_embed_max_size": 16, "num_patches": 256, "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
}  # fmt: skip
_FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2,
    "vec_in_dim": 24, "context_in_dim": 20, "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2,
    "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True,
    "guidance_embed": True,
}  # fmt: skip
_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 32, "num_heads": 2,
    "num_layers": 1, "in_dim": 16, "out_dim": 16, "text_dim": 20, "freq_dim": 16,
    "patch_size": (1, 2, 2), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
    "window_size": (-1, -1),
}  # fmt: skip
_QWEN = {
    "image_model": "qwen_image", "patch_size": 2, "in_channels": 64, "out_channels": 16,
    "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 20,
    "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip

FAMILIES = {
    "Stable Diffusion 1": Family("SD15", _UNET, 16, 24, (4, 8, 8), {}),
    "Stable Diffusion 3": Family("SD3", _MMDIT, 20, 24, (16, 8, 8), {}),
    "FLUX": Family("Flux", _FLUX, 20, 24, (16, 8, 8), {"guidance": 3.5}),
    "Qwen-Image": Family("QwenImage", _QWEN, 20, 24, (16, 1, 8, 8), {}),
    "Wan": Family("WAN21_T2V", _WAN, 20, 24, (16, 2, 8, 8), {}),
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def patcher(family: Family) -> Any:
    """comfy's ModelPatcher around a random network, the same at every call."""
    models = importlib.import_module("comfy.supported_models")
    config = getattr(models, family.config)({**family.settings, "dtype": torch.float32})
    model = config.get_model({}, "", device="cpu").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.diffusion_model.state_dict().values():  # buffers, too
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    device = torch.device("cpu")
    return importlib.import_module("comfy.model_patcher").ModelPatcher(model, device, device)


def conditioning(family: Family, seed: int) -> list[Any]:
    """CONDITIONING, as CLIPTextEncode makes it."""
    pooled = draw(1, family.pooled, seed=seed + 1)
    return [[draw(1, 5, family.text, seed=seed), {"pooled_output": pooled, **family.extra}]]


def layers(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names, without .weight, and weights of the network's linear and 2d convolutional layers."""
    for name, weight in model.diffusion_model.state_dict().items():
        if name.endswith(".weight") and weight.ndim in (2, 4):
            yield f"diffusion_model.{name.removesuffix('.weight')}", weight


def lora(model: Any, seed: int, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA of every such layer, as a file has it."""
    state = {}
    for index, (name, weight) in enumerate(layers(model)):
        at, ones = 1000 * seed + 2 * index, (1,) * (weight.ndim - 2)
        state[f"{name}.lora_A.weight"] = 0.2 * draw(rank, *weight.shape[1:], seed=at)
        state[f"{name}.lora_B.weight"] = 0.2 * draw(weight.shape[0], rank, *ones, seed=at + 1)
    return state


def merge(model: Any, state: dict[str, Tensor], strength: float) -> None:
    """Add a LoRA to a network's weights."""
    with torch.no_grad():
        for name, weight in layers(model):
            up, down = state[f"{name}.lora_B.weight"], state[f"{name}.lora_A.weight"]
            weight += strength * (up.flatten(1) @ down.flatten(1)).view_as(weight)


def flux_lora_of_diffusers(family: Family, seed: int, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA by diffusers' names: parts of layers that ComfyUI's FLUX has in one piece."""
    width, mlp = family.settings["hidden_size"], 4 * family.settings["hidden_size"]
    double, single = "transformer_blocks.0", "single_transformer_blocks.0"
    sizes = {
        **{f"{double}.attn.to_{part}": (width, width) for part in "qkv"},
        f"{double}.attn.add_q_proj": (width, width),
        f"{single}.attn.to_v": (width, width),
        f"{single}.proj_mlp": (mlp, width),
        f"{single}.proj_out": (width, width + mlp),
    }
    state = {}
    for index, (name, (outputs, inputs)) in enumerate(sizes.items()):
        at = 1000 * seed + 2 * index
        state[f"transformer.{name}.lora_A.weight"] = 0.3 * draw(rank, inputs, seed=at)
        state[f"transformer.{name}.lora_B.weight"] = 0.3 * draw(outputs, rank, seed=at + 1)
    return state

# SPDX-License-Identifier: Apache-2.0
"""Which UNets the batched forward supports: Stable Diffusion 1.x, 2.x and XL, of any size."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from msdda_fast.adapters.layers import changed, own_modules
from msdda_fast.adapters.loaded import bare
from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.torch_private import held_by

__all__ = ["check_supported"]

_CONFIG: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1,),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
_BLOCKS = (DownBlock2D, CrossAttnDownBlock2D, UpBlock2D, CrossAttnUpBlock2D)
#: They compute the same attention; IP-adapters, token merging and the like compute another.
_PROCESSORS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
#: Every layer whose forward the batched one stands for. A subclass may compute anything.
_LAYERS = (
    *_BLOCKS,
    UNet2DConditionModel,
    UNetMidBlock2DCrossAttn,
    Attention,
    BasicTransformerBlock,
    Downsample2D,
    FeedForward,
    GEGLU,
    ResnetBlock2D,
    TimestepEmbedding,
    Timesteps,
    Transformer2DModel,
    Upsample2D,
    nn.Conv2d,
    nn.Dropout,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.Linear,
    nn.ModuleList,
    nn.SiLU,
)


def check_supported(unet: UNet2DConditionModel) -> None:
    """Check that the batched forward computes the same as this network.

    Raises:
        UnsupportedNetwork: The class, a setting, a block or a layer is not supported, or its
            forward is patched, hooked or compiled; the message names it, and accepted settings.
    """
    if hasattr(unet, "_orig_mod"):
        raise UnsupportedNetwork(
            "torch.compile was applied to a network, whose compiled forward runs one objective; "
            "set_forward(compile=True) compiles all of them"
        )
    if type(unet) is not UNet2DConditionModel:
        raise UnsupportedNetwork(f"{type(unet).__name__} is not a UNet2DConditionModel")
    for name, accepted in _CONFIG.items():
        if (value := unet.config.get(name, accepted[0])) not in accepted:
            raise UnsupportedNetwork(
                f"{name}={value!r} is not supported, expected {' or '.join(map(repr, accepted))}"
            )
    blocks = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
    blocks |= {f"up_blocks.{i}": block for i, block in enumerate(unet.up_blocks)}
    for path, block in blocks.items():
        if type(block) not in _BLOCKS:
            raise UnsupportedNetwork(f"{path} is a {type(block).__name__}, which is not supported")
        if getattr(block, "s1", None):
            raise UnsupportedNetwork(f"{path} has FreeU enabled; call disable_freeu() first")
    if not isinstance(unet.mid_block, (UNetMidBlock2DCrossAttn, type(None))):
        raise UnsupportedNetwork(
            f"mid_block is a {type(unet.mid_block).__name__}, which is not supported"
        )
    for path, module in own_modules(unet):
        if reason := _foreign(module) or _unknown(module):
            raise UnsupportedNetwork(f"{path or 'the network'}: {reason} is not supported")


def _foreign(module: nn.Module) -> str | None:
    """Say why the layer is none of those that the batched forward stands for, if so."""
    if reason := changed(module):
        return reason
    for parameter in held_by(module)[1].values():
        if type(parameter) not in (nn.Parameter, type(None)):
            return f"a weight of the class {type(parameter).__name__} (quantised?)"
    if not isinstance(module, BaseTunerLayer) and type(module) not in _LAYERS:
        return f"a layer of the class {type(module).__name__}"
    return None


def _unknown(module: Any) -> str | None:  # noqa: ANN401 - any module
    if isinstance(module, ResnetBlock2D) and (module.up or module.down):
        return "a resnet that changes the resolution"
    if isinstance(module, ResnetBlock2D) and module.output_scale_factor != 1:
        return f"a resnet with output_scale_factor {module.output_scale_factor}"
    if type(module).__name__ == "DualTransformer2DModel":
        return "a second text encoder's attention"
    if isinstance(module, Transformer2DModel) and not module.is_input_continuous:
        return "a transformer over tokens or patches"
    if type(module).__name__ == "BasicTransformerBlock":
        if module.attn2 is None or module.only_cross_attention or module.norm_type != "layer_norm":
            return "a transformer block without self-attention, cross-attention or layer norms"
        if module.attn2.cross_attention_dim == module.attn2.query_dim != module.attn1.query_dim:
            return "double self-attention"
        if not isinstance(bare(module.ff.net[0]), GEGLU):
            return f"the activation {type(module.ff.net[0]).__name__}"
    if isinstance(module, Attention):
        if type(module.processor) not in _PROCESSORS:
            return f"the attention processor {type(module.processor).__name__}"
        norms = (module.group_norm, module.spatial_norm, module.norm_q, module.norm_cross)
        if any(norm is not None for norm in norms) or module.rescale_output_factor != 1:
            return "an attention with norms or a factor of its own"
        if module.scale != (module.inner_dim // module.heads) ** -0.5:
            return f"an attention with scale {module.scale}"
    return None

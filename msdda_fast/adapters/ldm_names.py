# SPDX-License-Identifier: Apache-2.0
"""Modules of a UNet by the names of the original checkpoints, which ComfyUI keeps.

input_blocks.1.1.proj_in -> down_blocks.0.attentions.0.proj_in
"""

from __future__ import annotations

from diffusers import UNet2DConditionModel

__all__ = ["LdmNames"]

_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}


class LdmNames:
    """The names of one UNet's blocks, read off its config.

    Args:
        unet: With one number of layers in all its blocks, as every Stable Diffusion has.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        config = unet.config
        layers = config.layers_per_block if isinstance(config.layers_per_block, int) else 0
        names = {
            "time_embed.0": "time_embedding.linear_1",
            "time_embed.2": "time_embedding.linear_2",
            "input_blocks.0.0": "conv_in",
            "middle_block.0": "mid_block.resnets.0",
            "middle_block.1": "mid_block.attentions.0",
            "middle_block.2": "mid_block.resnets.1",
            "out.2": "conv_out",
        }
        at, last = 1, len(config.down_block_types) - 1
        for block, kind in enumerate(config.down_block_types):
            for layer in range(layers):
                names[f"input_blocks.{at}.0"] = f"down_blocks.{block}.resnets.{layer}"
                if "Attn" in kind:
                    names[f"input_blocks.{at}.1"] = f"down_blocks.{block}.attentions.{layer}"
                at += 1
            if block != last:
                names[f"input_blocks.{at}.0.op"] = f"down_blocks.{block}.downsamplers.0.conv"
                at += 1
        at = 0
        for block, kind in enumerate(config.up_block_types):
            for layer in range(layers + 1):
                names[f"output_blocks.{at}.0"] = f"up_blocks.{block}.resnets.{layer}"
                if "Attn" in kind:
                    names[f"output_blocks.{at}.1"] = f"up_blocks.{block}.attentions.{layer}"
                if layer == layers and block != last:
                    after = 2 if "Attn" in kind else 1
                    sampler = f"up_blocks.{block}.upsamplers.0.conv"
                    names[f"output_blocks.{at}.{after}.conv"] = sampler
                at += 1
        self._names = names

    def translate(self, path: str) -> str:
        """Return diffusers' name of a module; the same if it is none of an original checkpoint."""
        parts = path.split(".")
        for count in (4, 3, 2):
            block, rest = ".".join(parts[:count]), ".".join(parts[count:])
            if block in self._names:
                inner = _RESNET.get(rest, rest) if ".resnets." in self._names[block] else rest
                return ".".join(filter(None, (self._names[block], inner)))
        return path

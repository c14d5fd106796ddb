# SPDX-License-Identifier: Apache-2.0
"""Small UNets of each supported kind with random adapters, and stock diffusers' answer for them."""

import warnings
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model

from msdda_fast.adapters.switching import AdapterSwitch
from msdda_fast.adapters.variant import Variant
from msdda_fast.batched.time import AddedConditions
from msdda_fast.batched.unet import BatchedUNet
from tests.tiny_model import small_unet

WIDTH, POOLED, TOKENS = 16, 12, 5

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LINEAR = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv"]
EVERYTHING = [
    *LINEAR,
    *CONVOLUTIONS,
    *("time_emb_proj", "linear_1", "linear_2", "conv_in", "conv_out"),
]
UP_BLOCKS = r"up_blocks\..*attn.*\.(to_q|to_k|to_v|to_out\.0)"


def sd15():
    return small_unet()


def sd21():
    """Linear projections, one head size for all blocks, attention marked for float32."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        upcast_attention=True,
    ).eval()


def sdxl():
    """No attention in the first block, several transformer layers, pooled prompts and sizes."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=POOLED + 6 * 4,
    ).eval()


KINDS = {"sd15": sd15, "sd21": sd21, "sdxl": sdxl}


def network(kind="sd15", dtype=torch.float64):
    """The same random weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return KINDS[kind]().to(dtype)


def add_adapter(unet, name, targets=ATTENTION, *, rank=2, seed=0, size=0.2, **config):
    """Inject an adapter with random factors, B included."""
    config = LoraConfig(r=rank, lora_alpha=3, target_modules=targets, **config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        inject_adapter_in_model(config, unet, adapter_name=name)
    unet.peft_config = {**getattr(unet, "peft_config", {}), name: config}
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in unet.named_parameters():
        if f".{name}." in path:
            value = size * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(value)
            parameter.requires_grad_(False)
    return unet


@dataclass
class Case:
    """A network with objectives, and inputs for it."""

    variants: list[Variant]
    x: torch.Tensor
    prompts: torch.Tensor  # (M, K, B, L, D)
    timesteps: torch.Tensor
    added: AddedConditions | None = None

    @property
    def unet(self):
        return self.variants[0].network

    def batched(self, options, k=1, **changes) -> torch.Tensor:
        network = BatchedUNet.of(self.variants, options)
        return self.run(network, k)

    def run(self, network, k=1) -> torch.Tensor:
        network.begin(self.prompts, self.timesteps, self.added)
        return network(self.x, torch.tensor(k))

    def stock(self, k=1) -> torch.Tensor:
        """(M, K, B, C, h, w): the stock forward of one objective after another."""
        outputs = []
        with torch.no_grad(), AdapterSwitch([self.unet]) as switch:
            for m, variant in enumerate(self.variants):
                switch.select(variant.adapter, variant.scale)
                embeds = self.prompts[m]
                added = None
                if self.added is not None:
                    added = {
                        "text_embeds": self.added.text_embeds[m].flatten(0, 1),
                        "time_ids": self.added.time_ids[m].flatten(0, 1),
                    }
                out = self.unet(
                    self.x.repeat(len(embeds), 1, 1, 1),
                    self.timesteps[k],
                    encoder_hidden_states=embeds.flatten(0, 1),
                    added_cond_kwargs=added,
                ).sample
                outputs.append(out.view(*embeds.shape[:2], *out.shape[1:]))
        return torch.stack(outputs)


def inputs(variants, *, k=2, b=2, size=8, dtype=torch.float64, shared_prompt=False) -> Case:
    """Random inputs, the same for every dtype, in which all rows of the prompt differ."""
    unet, m = variants[0].network, len(variants)
    draw = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    prompts = normal(m, k, b, TOKENS, unet.config.cross_attention_dim)
    if shared_prompt:
        prompts = prompts[:1].expand_as(prompts)
    added = None
    if unet.config.addition_embed_type == "text_time":
        sizes = torch.arange(6 * b, dtype=dtype).view(1, 1, b, 6).expand(m, k, b, 6)
        added = AddedConditions(normal(m, k, b, POOLED), 10 * sizes)
    timesteps = torch.tensor([801, 401, 1])
    return Case(variants, normal(b, 4, size, size), prompts, timesteps, added)


def relative(actual, expected) -> float:
    """Largest error over the largest value."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())

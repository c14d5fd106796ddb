# SPDX-License-Identifier: Apache-2.0
"""Parts of tiny random pipelines: adapters, embeddings, autoencoders, schedulers."""

import warnings

import diffusers
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
STABLE_DIFFUSION_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(batch: int, size: int) -> Tensor:
    """An image in [0, 1]."""
    return normal(batch, 3, size, size, seed=9).clamp(0, 1)


def seeded(make, *args, **kwargs):
    """A network with the same random weights each time, without dropout."""
    torch.manual_seed(0)
    return make(*args, **kwargs).eval()


def adapt(network: nn.Module, *targets: str) -> nn.Module:
    """Add adapters "a" and "b", of different ranks and strong enough to matter."""
    for index, name in enumerate("ab"):
        torch.manual_seed(100 + index)
        config = LoraConfig(
            r=4 + index, lora_alpha=8, target_modules=list(targets), init_lora_weights=False
        )
        with warnings.catch_warnings():  # of a second adapter, which is the purpose
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            inject_adapter_in_model(config, network, name)
    with torch.no_grad():
        for path, parameter in network.named_parameters():
            if "lora_B" in path:
                parameter.mul_(1.5)
    network._hf_peft_config_loaded = True  # as diffusers notes it
    return network.eval()


def flow_scheduler(**changes):
    settings = {"shift": 3.0, **changes}
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def image_vae() -> nn.Module:
    return seeded(
        diffusers.AutoencoderKL,
        block_out_channels=[32, 64],
        sample_size=128,
        latent_channels=4,
        shift_factor=0.06,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )


def wan_vae() -> nn.Module:
    return seeded(
        diffusers.AutoencoderKLWan,
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )

# SPDX-License-Identifier: Apache-2.0
"""Whether a network can be sampled with latents, a timestep and a text alone."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel

from msdda_fast.adapters.layers import uncompiled
from msdda_fast.errors import AdapterMismatch, UnsupportedNetwork

__all__ = ["check_own_network", "check_runnable"]

#: Settings with which a UNet takes more than that: accepted values, and what it takes else.
_CONFIG: dict[str, tuple[tuple[Any, ...], str]] = {
    "time_cond_proj_dim": (
        (None,),
        "takes the guidance scale as an input, so its guidance is not Eq. 7's; use its base model",
    ),
    "encoder_hid_dim_type": (
        (None, "text_proj"),
        "takes an image prompt, which is not supported; unload_ip_adapter() removes an IP-Adapter",
    ),
    "addition_embed_type": ((None, "text"), "takes more than a text, such as sizes or an image"),
    "class_embed_type": ((None,), "takes class labels"),
    "num_class_embeds": ((None,), "takes class labels"),
}


def check_runnable(unet: Any, owner: str = "this UNet") -> None:  # noqa: ANN401 - users assign any
    """Check that the network of a pipeline can run as it is.

    Args:
        unet: Anything with a UNet's config and forward.
        owner: Starts the message.

    Raises:
        UnsupportedNetwork: There is none, or it needs an input that sampling does not have.
    """
    if unet is None:
        raise UnsupportedNetwork("this pipeline has no unet, so it can only encode prompts")
    config = unet.config
    for field, (accepted, reason) in _CONFIG.items():
        if (value := config.get(field)) not in accepted:
            raise UnsupportedNetwork(f"{owner} {reason} ({field} is {value})")
    channels = config.get("in_channels"), config.get("out_channels")
    if channels[0] != channels[1]:
        raise UnsupportedNetwork(
            f"{owner} takes {channels[0]} channels and returns {channels[1]}: inpainting and "
            "learned variances are not supported"
        )


def check_own_network(name: str, network: Any, base: Any) -> None:  # noqa: ANN401 - as above
    """Check the full network of one objective.

    Args:
        name: Of the objective.
        network: Its `unet`.
        base: The pipeline's UNet.

    Raises:
        UnsupportedNetwork: It is no UNet, or cannot run as it is.
        AdapterMismatch: It is for other latents or another text encoder than the base, or it is the
            base with adapters that would be ignored.
    """
    owner = f"objective {name!r}: its unet"
    if not isinstance(uncompiled(network), UNet2DConditionModel):
        raise UnsupportedNetwork(
            f"objective {name!r}: unet must be a UNet2DConditionModel, got {network!r:.80}"
        )
    check_runnable(network, owner)
    for field in ("in_channels", "out_channels", "cross_attention_dim"):
        here, there = base.config.get(field), network.config.get(field)
        if here != there:
            raise AdapterMismatch(f"{owner} has {field} {there}, the base {here}")
    if network is base and getattr(network, "peft_config", None):
        raise AdapterMismatch(
            f"{owner} is the pipeline's own, with adapters {', '.join(network.peft_config)}: use "
            "Objective.base(), or an adapter's name as source"
        )

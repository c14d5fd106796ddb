# SPDX-License-Identifier: Apache-2.0
"""A network with M adapters, and the same network in the forms that other contenders use."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from benchmarks.contenders.configs import CONFIGS, untrained
from msdda_fast.adapters.variant import Variant
from msdda_fast.emoji.architectures import sd15_scheduler
from msdda_fast.pipelines import MSDDAPipeline

__all__ = ["Model", "add_random_adapter", "held_bytes", "load", "shared_copy"]

#: Size of a random adapter's update, relative to the weight: of 0.1 as little remains in x after
#: one step as float16 loses, and a contender that mixed adapters up would pass.
EFFECT = 1.0
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PROMPT = "A purple colored dog."
ETAS = (1.0, 0.8)  # of random adapters, in turn


@dataclass(frozen=True, slots=True)
class Model:
    """One network with M adapters, and the other components of its pipeline.

    `unet` has the adapters as peft layers; `etas` and `variants` are those of the objectives;
    `token_ids` has one row per guidance branch (uncond, cond) of one image.
    """

    name: str
    weights: str  # "random", or where they come from
    unet: UNet2DConditionModel
    texts: Sequence[nn.Module]
    vae: nn.Module
    scheduler: DDIMScheduler
    variants: Sequence[Variant]
    etas: Sequence[float]
    guidance: float
    token_ids: Tensor
    _nhwc: list[Variant] = field(default_factory=list)

    def in_channels_last(self) -> list[Variant]:
        """Return the variants on a copy of the network with convolutions in channels_last."""
        if not self._nhwc:
            unet = copy.deepcopy(self.unet).to(memory_format=torch.channels_last)
            self._nhwc.extend(replace(variant, network=unet) for variant in self.variants)
        return self._nhwc

    def plain(
        self, adapters: Mapping[int, float] | None = None, dtype: torch.dtype | None = None
    ) -> UNet2DConditionModel:
        """Return a stock network without peft layers; without `adapters` it shares the weights.

        Args:
            adapters: Objectives whose updates are added to the weights, with their factors.
            dtype: Data type of the copy; sums are computed in float64 and rounded once.
        """
        state = {
            key.replace(".base_layer", ""): value.detach()
            for key, value in self.unet.state_dict().items()
            if ".lora_" not in key
        }
        updates = self._updates(adapters or {})
        if adapters is not None:  # a merged copy is a network of its own, as its files are
            state = {key: value.clone() for key, value in state.items()}
        for path, update in updates.items():
            weight = state[f"{path}.weight"]
            state[f"{path}.weight"] = (weight.double() + update).to(dtype or weight.dtype)
        if dtype is not None:
            state = {key: value.to(dtype) for key, value in state.items()}
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(self.unet.config)
        unet.load_state_dict(state, assign=True)
        return unet.eval().requires_grad_(False)

    def _updates(self, adapters: Mapping[int, float]) -> dict[str, Tensor]:
        """Return the sums of share * scale * B A by path, float64; peft computes the products."""
        updates: dict[str, Tensor] = {}
        for path, layer in self.unet.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            for m, share in adapters.items():
                variant = self.variants[m]
                if variant.adapter not in layer.lora_A:
                    continue
                delta = copy.deepcopy(layer).double().get_delta_weight(variant.adapter)
                updates[path] = updates.get(path, 0) + share * delta.detach()
        return updates


def load(
    name: str,
    *,
    num_objectives: int,
    rank: int,
    device: torch.device,
    dtype: torch.dtype,
    checkpoint: Path | None = None,
    guidance: float | None = None,
) -> Model:
    """Load a model by name or from a folder; missing objectives get random adapters.

    Args:
        name: Name of a config, or "emoji", the shipped model.
        num_objectives: M, the largest number that a contender has.
        rank: Rank of the random adapters.
        checkpoint: A folder that `MSDDAPipeline.from_pretrained` reads, with or without objectives.
        guidance: The scale; None: that of the model's first objective, or 7.5.
    """
    variants: list[Variant] = []
    etas: list[float] = []
    if checkpoint is None and name in CONFIGS:
        networks = untrained(name, device, dtype)
        unet, texts, vae = networks.unet, networks.texts, networks.vae
        scheduler, weights = sd15_scheduler(), "random"
        width = min(77, texts[0].config.max_position_embeddings)
        token_ids = torch.randint(texts[0].config.vocab_size, (2, width), device=device)
    else:
        source = "msdda-fast/emoji" if checkpoint is None else str(checkpoint)
        pipe = MSDDAPipeline.from_pretrained(source, dtype=dtype).to(device)
        unet, texts, vae, scheduler = pipe.unet, [pipe.text_encoder], pipe.vae, pipe.scheduler
        weights = source
        token_ids = pipe.tokenizer(
            ["", PROMPT],
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids.to(device)
        for objective, variant in zip(
            pipe.objectives.values(), pipe.variants.values(), strict=True
        ):
            if variant.adapter is not None:
                for layer in unet.modules():
                    if isinstance(layer, LoraLayer) and variant.adapter in layer.lora_A:
                        layer.set_scale(variant.adapter, variant.scale)  # for who sets none
                variants.append(variant)
                etas.append(objective.eta)
                guidance = objective.guidance_scale if guidance is None else guidance
    for m in range(len(variants), num_objectives):
        add_random_adapter(unet, f"objective{m}", rank)
        variants.append(Variant(unet, f"objective{m}"))
        etas.append(ETAS[m % len(ETAS)])
    for network in (unet, vae, *texts):
        network.eval().requires_grad_(False)
    return Model(
        name, weights, unet, texts, vae, scheduler, variants[:num_objectives],
        etas[:num_objectives], 7.5 if guidance is None else guidance, token_ids,
    )  # fmt: skip


def add_random_adapter(unet: UNet2DConditionModel, name: str, rank: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), name)
    for layer in unet.modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            down, up = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
            down, up = (torch.randn_like(factor, dtype=torch.float32) for factor in (down, up))
            up *= EFFECT * layer.get_base_layer().weight.float().norm() / (up @ down).norm()
            balance = (up.norm() / down.norm()).sqrt()  # neither underflows in float16
            dtype = layer.get_base_layer().weight.dtype
            layer.lora_A[name].weight.data = (down * balance).to(dtype)
            layer.lora_B[name].weight.data = (up / balance).to(dtype)


def shared_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return the same parameters in new modules: hooks on one do not run in the other."""
    memo = {id(parameter): parameter for parameter in unet.parameters()}
    return copy.deepcopy(unet, memo)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the memory of tensors in bytes; shared storage counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())

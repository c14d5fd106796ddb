# SPDX-License-Identifier: Apache-2.0
"""A few images drawn exactly, to measure what merging would do in each of their steps.

A pilot belongs to the networks, the size and the settings of a request, and not to its weights,
prompts, seeds or company: it draws fixed prompts from fixed seeds, with weights spread over the
simplex. It runs once, and both networks in every step.

It runs in float32, in a copy of networks that are narrower. The rounding errors of two narrow
networks differ, so the divergence of their steps is too large by what each errs: this would be the
larger part of it. What bfloat16 costs is measured separately, on two of the images.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from msdda_fast.adapters.variant import Variant
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.noise import noise_source
from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.pipelines.prompts import Prompts
from msdda_fast.pipelines.stable_diffusion.captured import CapturedSampler
from msdda_fast.pipelines.stable_diffusion.modes import Mode, StepPlan, merged_plan
from msdda_fast.pipelines.stable_diffusion.path_kl import (
    PILOTS,
    Forecast,
    Pilot,
    forecast,
    kl_scale,
)
from msdda_fast.pipelines.stable_diffusion.rounding import WideProducts
from msdda_fast.pipelines.stable_diffusion.sampling import (
    Networks,
    PromptedGeneration,
    Request,
    sample,
)
from msdda_fast.pipelines.stable_diffusion.step_kl import step_kl
from msdda_fast.pipelines.stable_diffusion.tables import Tables
from msdda_fast.steps.coefficients import CoefficientTable

__all__ = ["foretell", "pilot_weights", "planned"]

logger = logging.getLogger(__name__)

#: One per image; plain captions of one and of two things, as the shipped model was trained on.
PROMPTS = (
    "A red colored car.", "A red car and a white sheep.", "A blue colored dog.",
    "A blue bird and a brown bear.", "A green colored banana.",
    "A green cup and a blue cell phone.", "A black colored sandwich.",
    "A yellow book and a red vase.", "A yellow colored giraffe.",
    "A black apple and a green backpack.", "A pink colored car.", "A white car and a red sheep.",
)  # fmt: skip
FIRST_SEED = 0x70696C6F74
#: Images drawn together; two of the first ones are drawn with rounding, too.
TOGETHER, ROUNDED = 4, 2


def planned(
    mode: Mode,
    networks: Networks,
    tables: Tables,
    table: CoefficientTable,
    size: tuple[int, ...],
    budget: float | None,
) -> tuple[StepPlan | None, Forecast | None]:
    """Return which steps of a request are merged, None if none, and the forecast with "auto".

    Args and errors are those of `foretell`.
    """
    if mode == "merged":
        return merged_plan(table), None
    found = foretell(networks, tables, table, size, budget) if mode == "auto" else None
    return (None if found is None else found.plan), found


def foretell(
    networks: Networks,
    tables: Tables,
    table: CoefficientTable,
    size: tuple[int, ...],
    budget: float | None,
) -> Forecast | None:
    """Choose the steps of a request that are merged, after a pilot where there was none.

    Args:
        networks: With a batched forward.
        tables: The settings of the request.
        table: Its table, float64 on the host.
        size: (C, h, w).
        budget: Nats; None: what bfloat16 costs.

    Returns: None if all steps are exact, without a pilot: one output alone is read, or no step adds
        noise, or strengths differ between images or weights are negative, of which a pilot would
        not be typical.

    Raises:
        UnsupportedNetwork: The objectives have several networks, or adapters that cannot be merged.
    """
    count = len(tables.objectives)
    alone = sum(table.active) == 1 or not table.std.any()
    if alone or not tables.strength_is_shared or bool((table.share[..., :count] < 0).any()):
        return None
    assert networks.sampler is not None
    if tables.zero_variance == "error":  # images of the request may each have one objective
        tables = replace(tables, zero_variance="dominate")
    measured = tables.of(pilot_weights(table.active[:count]), PILOTS)
    key = (measured.rows.numpy().tobytes(), tuple(measured.timesteps.tolist()), size)
    pilots = networks.sampler.pilots
    if key not in pilots:
        logger.info('mode="auto" draws a pilot of %d images, once for these settings', PILOTS)
        pilots[key] = _measure(networks, measured, size)
    return forecast(table, pilots[key], budget)


def pilot_weights(active: list[bool]) -> Tensor:
    """Weights of the images of a pilot, (n, M) float64: evenly over the simplex of the active."""
    engine: Any = torch.quasirandom.SobolEngine  # without types
    cube = engine(len(active), scramble=True, seed=0)
    parts: Tensor = -cube.draw(PILOTS, dtype=torch.float64).clamp(min=1e-9).log()
    parts = parts * torch.tensor(active)
    return parts / parts.sum(1, keepdim=True)


def _measure(networks: Networks, table: CoefficientTable, size: tuple[int, ...]) -> Pilot:
    networks = _wide(networks)
    found, rounding, forwards = [], 0.0, 0
    for start in range(0, PILOTS, TOGETHER):
        some = table.images(slice(start, start + TOGETHER))
        noise = noise_source(
            (TOGETHER, *size),
            len(table),
            networks.device,
            seeds=[FIRST_SEED + start + i for i in range(TOGETHER)],
        )
        texts = list(PROMPTS[start : start + TOGETHER])
        prompts = Prompts(texts, None, None, None, count=TOGETHER, images_per_prompt=1)
        x_T = noise.initial(networks.device)
        states, encoded = [x_T[:ROUNDED]], list[Tensor]()

        def watch(
            k: int,
            generation: PromptedGeneration,
            embeds: Tensor,
            states: list[Tensor] = states,
            encoded: list[Tensor] = encoded,
        ) -> bool:
            states.append(generation.x[:ROUNDED].clone())
            encoded.append(embeds[:, :, :ROUNDED])
            return True

        on_device = some.to(networks.device, torch.float32)
        plan = StepPlan.comparing(some)
        done = sample(networks, Request(prompts, on_device, noise, x_T, plan), watch)
        found.append(done.merged_kl.double().cpu())
        forwards += TOGETHER * done.forwards
        if start == 0:
            few = on_device.images(slice(ROUNDED))
            rounding = _rounding_kl(networks, few, states, encoded[0])
            forwards += 2 * ROUNDED * len(table) * len(networks.variants)
    kl, scale = torch.cat(found, 1), kl_scale(table)
    ratio = torch.where(kl == 0, 0.0, kl / scale).nan_to_num(nan=float("inf"))
    return Pilot(ratio, rounding, forwards)


def _rounding_kl(
    networks: Networks, table: CoefficientTable, states: list[Tensor], embeds: Tensor
) -> float:
    """Return the mean KL of a path of bfloat16 networks from the exact one, over steps with noise.

    Args:
        networks: In float32.
        table: Of a few images, on the device.
        states: x_T .. x_0 of their exact paths.
        embeds: (M, K, B, L, D).
    """
    plain, narrow = (
        BatchedUNet.of(list(_cast(networks, dtype).values()))
        for dtype in (torch.float32, torch.bfloat16)
    )
    rounded: Any = WideProducts() if networks.device.type == "cpu" else nullcontext()
    plain.begin(embeds, table.timesteps)
    with rounded:
        narrow.begin(embeds, table.timesteps)
    total = 0.0
    for k in range(len(table)):
        if not table.std[k].all():
            continue
        at = torch.tensor(k, device=networks.device)
        with rounded:
            outputs = narrow(states[k], at)
        kl = step_kl(states[k], outputs, plain(states[k], at), table[k], table.std[k])
        total += float(kl.mean())
    return total


def _wide(networks: Networks) -> Networks:
    """The same in float32, of one batched forward that is not captured."""
    variants = _cast(networks, torch.float32)
    sampler = CapturedSampler(list(variants.values()), capture="off")
    return replace(networks, variants=variants, sampler=sampler, dtype=torch.float32)


def _cast(networks: Networks, dtype: torch.dtype) -> dict[str, Variant]:
    """The variants in a dtype: those themselves, or of a copy of their network."""
    first, *others = {variant.network for variant in networks.variants.values()}
    if others:
        raise UnsupportedNetwork("approximate modes need objectives that share one network")
    if first.dtype == dtype:
        return dict(networks.variants)
    network = nn.Module.to(deepcopy(first), dtype)  # the network's own warns of every cast
    return {name: replace(variant, network=network) for name, variant in networks.variants.items()}

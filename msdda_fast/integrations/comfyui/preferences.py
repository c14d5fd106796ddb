# SPDX-License-Identifier: Apache-2.0
"""What objectives weigh in each step and at each pixel, from weights, masks and percents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape, InvalidWeights
from msdda_fast.integrations.comfyui.objective import ComfyObjective
from msdda_fast.pipelines.regions import check_masks

__all__ = ["step_preferences"]


def step_preferences(
    objectives: Mapping[str, ComfyObjective],
    sigmas: Tensor,
    shape: Sequence[int],
    softness: float,
) -> tuple[list[str], list[Tensor]]:
    """Return who takes part, M names, and their preferences in each of T steps.

    Objectives outside of their percents have no weight, and the others' are relative to each other.

    Args:
        objectives: By name.
        sigmas: (T + 1,), of which the last begins no step.
        shape: Of the latents, (B, C, h, w) or (B, C, F, h, w).
        softness: Standard deviation of the masks' blur, latent pixels.

    Returns:
        Names, and T preferences (M,), or (B, M, 1, h, w) in steps with masks, float64 on the host;
        steps in which the same objectives act share one tensor.

    Raises:
        InvalidWeights: No objective acts in some step; or as `pipelines.regions.check_masks`.
        InvalidShape: Likewise, or masks for latents that are no images.
    """
    starts = sigmas[:-1].cpu()
    acts = {name: objective.acts(starts).tolist() for name, objective in objectives.items()}
    names = [name for name in objectives if any(acts[name])]
    made: dict[tuple[str, ...], Tensor] = {}
    steps = []
    for k, sigma in enumerate(starts.tolist()):
        acting = tuple(name for name in names if acts[name][k])
        if not acting:
            ranges = ", ".join(
                f"{name} {o.start_percent:g} to {o.end_percent:g}" for name, o in objectives.items()
            )
            raise InvalidWeights(
                f"no objective acts in step {k}, at sigma {sigma:.4g}: their percents are {ranges}"
            )
        if acting not in made:
            own = _preferences({name: objectives[name] for name in acting}, shape, softness)
            places = [names.index(name) for name in acting]
            axis = 0 if own.ndim == 1 else 1
            size = [*own.shape[:axis], len(names), *own.shape[axis + 1 :]]
            made[acting] = own.new_zeros(size).index_copy(axis, torch.tensor(places), own)
        steps.append(made[acting])
    return names, steps


def _preferences(
    objectives: Mapping[str, ComfyObjective], shape: Sequence[int], softness: float
) -> Tensor:
    """The preferences of those that act, (M,) or (B, M, 1, h, w)."""
    row = torch.tensor([o.weight for o in objectives.values()], dtype=torch.float64)
    row = row / row.sum()
    masks = {name: o.mask for name, o in objectives.items() if o.mask is not None}
    if not masks:
        return row
    if len(shape) not in (4, 5):
        raise InvalidShape(
            f"masks need latents (B, C, h, w) or (B, C, F, h, w), got {tuple(shape)}"
        )
    (height, width), batch = shape[-2:], shape[0]
    regions = check_masks(masks, list(objectives), batch)
    assert regions is not None  # there are masks
    rows = row.expand(batch, -1)
    scale = regions.size[0] / height * softness
    pixels = regions.covered_with(rows[None]).on(height, width, scale)
    weights = pixels.at(rows).transpose(0, 1)
    return weights.reshape(*weights.shape[:2], *(1,) * (len(shape) - 3), height, width)

# SPDX-License-Identifier: Apache-2.0
"""The GUIDER over several objectives: all that is checked before a model is loaded; then `run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule, InvalidWeights, UnsupportedNetwork
from msdda_fast.integrations.comfyui.inside import inside
from msdda_fast.integrations.comfyui.levels import NOISES, levels_of
from msdda_fast.integrations.comfyui.objective import ComfyObjective
from msdda_fast.integrations.comfyui.preferences import step_preferences
from msdda_fast.integrations.comfyui.run import Opener, Plan, fused_ancestral
from msdda_fast.integrations.k_diffusion import fused_tables
from msdda_fast.levels import FlowNoise, read_levels

__all__ = ["FusedGuider"]


class FusedGuider:
    """A GUIDER over several objectives, for the sampler `fused_ancestral`.

    Args:
        objectives: By name; at least one with weight > 0. Those of weight 0 take no part.
        noise: What their `eta` is a level of, one of `levels.NOISES`.
        mask_softness: Standard deviation of the masks' blur, latent pixels; 0: none.

    Raises:
        BackendUnavailable: Outside of ComfyUI.
        InvalidWeights: All weights are 0, or a weight is negative or not finite.
        InvalidSchedule: Guidance without a negative prompt, or noise that these models do not have.
        UnsupportedNetwork: The models have different latent spaces, or only some are flow models.
    """

    def __init__(
        self,
        objectives: Mapping[str, ComfyObjective],
        noise: str = "ancestral",
        mask_softness: float = 1.0,
    ) -> None:
        weights = [objective.weight for objective in objectives.values()]
        if not all(isfinite(w) and w >= 0 for w in weights) or not sum(weights):
            raise InvalidWeights(
                f"weights are {weights}; they must be finite, not negative and not all 0"
            )
        self._objectives = {name: o for name, o in objectives.items() if o.weight}
        self._noise, self._softness = noise, mask_softness
        self._guiders = {name: _guider(name, o) for name, o in self._objectives.items()}
        self._is_flow = _check_alike(self._objectives)
        if not self._is_flow and NOISES.get(noise) is not None:
            raise InvalidSchedule(
                f"noise {noise} is for flow models, and {self._model_name()} is none; use ancestral"
            )
        self._levels(list(self._objectives), ends_at_zero=True)

    @property
    def model_patcher(self) -> Any:  # noqa: ANN401 - comfy's ModelPatcher
        """The first active model, which gives previews and latent scales."""
        return next(iter(self._guiders.values())).model_patcher

    def sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,  # noqa: ANN401 - comfy's KSAMPLER
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Any = None,  # noqa: ANN401
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> Any:  # noqa: ANN401 - a Tensor, or comfy's nested one
        """Sample; arguments and result as in comfy's `CFGGuider.sample`.

        What can be refused is refused before a model is loaded.

        Raises:
            InvalidSchedule: `sampler` is not the one that belongs to this guider; or as
                `sample_msdda`, as the others.
            InvalidWeights, InvalidShape: Masks or percents leave a pixel or a step to no objective,
                or masks do not fit.
            ZeroVariance: Levels of 0 meet others.
        """
        if getattr(sampler, "sampler_function", None) is not fused_ancestral:
            raise InvalidSchedule(
                "MSDDA Guider has no single prediction for another sampler; connect its own "
                "SAMPLER output"
            )
        names, plan = self._plan(sampler.extra_options, sigmas, noise.shape)
        waiting = [(self._objectives[name], self._guiders[name]) for name in names]

        def open_next(opener: Opener, guider: Any) -> Any:  # noqa: ANN401
            return guider.sample(
                noise, latent_image, opener, sigmas, denoise_mask, callback, disable_pbar, seed
            )

        return open_next(Opener(sampler, plan, waiting, open_next), waiting[0][1])

    def _plan(
        self, options: dict[str, Any], sigmas: Tensor, shape: torch.Size
    ) -> tuple[list[str], Plan]:
        """Return who takes part and what they do; `options` are the sampler's."""
        names = list(self._objectives)
        weights: list[Tensor] = []
        if len(sigmas) > 1:
            names, weights = step_preferences(self._objectives, sigmas, shape, self._softness)
        levels = self._levels(names, ends_at_zero=len(sigmas) > 0 and float(sigmas[-1]) == 0)
        if weights:
            fused_tables(
                sigmas.cpu(),
                read_levels(levels),
                weights.__getitem__,
                shape,
                flow=self._is_flow,
                **options,
            )
        return names, Plan(levels, weights, self._is_flow)

    def _levels(
        self, names: Sequence[str], *, ends_at_zero: bool
    ) -> Sequence[float] | Sequence[FlowNoise]:
        etas = [self._objectives[name].eta for name in names]
        return levels_of(self._noise, etas, ends_at_zero=ends_at_zero)

    def _model_name(self) -> str:
        return type(self.model_patcher.model).__name__


def _guider(name: str, objective: ComfyObjective) -> Any:  # noqa: ANN401 - comfy's CFGGuider
    guider = inside("comfy.samplers").CFGGuider(objective.model)
    if objective.negative is not None:
        guider.set_conds(objective.positive, objective.negative)
    elif objective.cfg == 1:
        guider.inner_set_conds({"positive": objective.positive})  # as BasicGuider
    else:
        raise InvalidSchedule(
            f"{name} has cfg {objective.cfg:g} and no negative prompt; connect one, or set cfg to 1"
        )
    guider.set_cfg(objective.cfg)
    return guider


def _check_alike(objectives: Mapping[str, ComfyObjective]) -> bool:
    """Return whether these are flow models.

    Raises:
        UnsupportedNetwork: Not all have one latent space, or one way of adding noise to it.
    """
    const = inside("comfy.model_sampling").CONST
    spaces = [type(o.model.get_model_object("latent_format")) for o in objectives.values()]
    flows = [isinstance(o.model_sampling, const) for o in objectives.values()]
    first = next(iter(objectives))
    for name, objective, space, flow in zip(
        objectives, objectives.values(), spaces, flows, strict=True
    ):
        model = type(objective.model.model).__name__
        if flow is not flows[0]:
            kinds = ("a flow model, x = (1 - sigma) x_0 + sigma eps", "of x = x_0 + sigma eps")
            raise UnsupportedNetwork(
                f"{name}, a {model}, is {kinds[not flow]}, and {first} is {kinds[not flows[0]]}; "
                "fused models must share the way noise is added"
            )
        if space is not spaces[0]:
            raise UnsupportedNetwork(
                f"{name}, a {model}, has latents of {space.__name__}, and {first} of "
                f"{spaces[0].__name__}; fused models must share one latent space"
            )
    return flows[0]

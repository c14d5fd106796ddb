# SPDX-License-Identifier: Apache-2.0
"""One sampling run of ComfyUI over several guiders.

A stock guider returns one prediction, but models of different eta can only be fused after each has
made its step. So `FusedGuider` opens one stock `CFGGuider` per objective, nested; each loads its
model and encodes its conditioning as usual, and the sampler, called innermost, calls all of them.

Of two models that share a network (LoRAs over one checkpoint) only one can be in it at a time, and
ComfyUI may unload one model to load another. So each model is loaded again before a call if another
was called in between; that is free when it is still loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor

from msdda_fast.engine.noise import image_seeds
from msdda_fast.errors import InvalidSchedule
from msdda_fast.integrations.comfyui.inside import inside
from msdda_fast.integrations.comfyui.objective import ComfyObjective
from msdda_fast.integrations.k_diffusion import sample_msdda
from msdda_fast.levels import FlowNoise

__all__ = ["Opener", "Plan", "fused_ancestral"]


@dataclass(slots=True)
class _Branch:
    """An objective during a run: its stock guider, opened, and its extra arguments."""

    objective: ComfyObjective
    guider: Any
    extra_args: dict[str, Any]


class _ScaledByOwn:
    """A network as one of its patchers has it: with that patcher's model sampling.

    Of the patchers of one network the last that was loaded is in it, whoever asks.
    """

    def __init__(self, network: Any, patcher: Any) -> None:  # noqa: ANN401 - comfy's
        self._network = network
        self.model_sampling = patcher.get_model_object("model_sampling")

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._network, name)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does in its steps, known before a model is loaded.

    Attributes:
        levels: Of M objectives.
        weights: T preferences of them; see `step_preferences`.
        is_flow: Whether the models are flow models.
    """

    levels: Sequence[float] | Sequence[FlowNoise]
    weights: Sequence[Tensor]
    is_flow: bool


@dataclass(slots=True)
class _FusedModel:
    """Takes a guider's place in KSAMPLER; the model of branch 0 scales latents and noise.

    Attributes:
        branches: All opened objectives.
        plan: What they do.
        present: The branch whose model is known to be loaded and patched.
    """

    branches: list[_Branch]
    plan: Plan
    present: _Branch

    @property
    def inner_model(self) -> Any:  # noqa: ANN401 - comfy's BaseModel
        return _ScaledByOwn(self.branches[0].guider.inner_model, self.model_patcher)

    @property
    def model_patcher(self) -> Any:  # noqa: ANN401 - comfy's ModelPatcher
        return self.branches[0].guider.model_patcher

    @property
    def cfg(self) -> float:
        return self.branches[0].objective.cfg

    def predict(self, branch: _Branch, model_k: Any, x: Tensor, sigma: Tensor) -> Tensor:  # noqa: ANN401
        """Return the denoised x_0 of `branch`, (B, *S), guided and masked.

        `model_k` is KSAMPLER's wrapper, which inpaints around the guider it is given.
        """
        inside("comfy.model_management").throw_exception_if_processing_interrupted()
        guider = branch.guider
        if branch is not self.present:
            inside("comfy.sampler_helpers").prepare_sampling(
                guider.model_patcher, x.shape, guider.conds, guider.model_options
            )
            guider.inner_model.current_patcher = guider.model_patcher
            self.present = branch
        own = copy.copy(model_k)
        own.inner_model = guider
        denoised: Tensor = own(x, sigma, **branch.extra_args)
        return denoised


@dataclass(slots=True)
class Opener:
    """The sampler that each stock guider is given: opens the next one, or samples with all."""

    sampler: Any
    plan: Plan
    waiting: list[tuple[ComfyObjective, Any]]
    open_next: Callable[[Opener, Any], Any]
    branches: list[_Branch] = field(default_factory=list)
    samples: Tensor | None = None

    def sample(
        self,
        model_wrap: Any,  # noqa: ANN401 - comfy's CFGGuider
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,  # noqa: ANN401
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor | None:
        """Called by `model_wrap` instead of sampling; arguments as in comfy's samplers."""
        objective, _ = self.waiting[len(self.branches)]
        branch = _Branch(objective, model_wrap, extra_args | {"denoise_mask": denoise_mask})
        self.branches.append(branch)
        if len(self.branches) < len(self.waiting):
            self.open_next(self, self.waiting[len(self.branches)][1])
        else:
            fused = _FusedModel(self.branches, self.plan, present=branch)
            self.samples = self.sampler.sample(
                fused,
                sigmas,
                extra_args,
                callback,
                noise,
                latent_image,
                denoise_mask,
                disable_pbar,
            )
        return self.samples


def fused_ancestral(
    model: Any,  # noqa: ANN401 - comfy's KSamplerX0Inpaint
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    zero_variance: Literal["error", "dominate"] = "error",
) -> Tensor:
    """`sample_msdda` as a sampler function of ComfyUI; image b has the noise of seed + b.

    Args:
        model: KSAMPLER's wrapper around the fused model of `FusedGuider`.
        x, sigmas, callback, disable, s_noise, zero_variance: As in `sample_msdda`.
        extra_args: Only its `seed`, that of the noise input, is read.

    Raises:
        InvalidSchedule: The guider is not a `FusedGuider`.
    """
    fused = model.inner_model
    if not isinstance(fused, _FusedModel):
        raise InvalidSchedule(
            f"the MSDDA sampler works only with MSDDA Guider, got a {type(fused).__name__}; "
            "connect the GUIDER output of the same node"
        )
    plan, seed = fused.plan, (extra_args or {}).get("seed")
    return sample_msdda(
        [partial(fused.predict, branch, model) for branch in fused.branches],
        x,
        sigmas,
        callback=callback,
        disable=disable,
        weights=plan.weights.__getitem__,
        levels=plan.levels,
        flow=plan.is_flow,
        s_noise=s_noise,
        zero_variance=zero_variance,
        seeds=None if seed is None else image_seeds(seed, len(x)),
    )

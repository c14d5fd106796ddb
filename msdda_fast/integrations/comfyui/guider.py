# SPDX-License-Identifier: Apache-2.0
"""One sampling run of ComfyUI over several guiders.

A stock guider returns one prediction, but models of different eta can only be fused after each has
made its step. So `FusedGuider` opens one stock `CFGGuider` per objective, nested; each loads its
model and encodes its conditioning as usual, and the sampler, called innermost, calls all of them.

Of two models that share a network (LoRAs over one checkpoint) only one can be patched into it at a
time, and ComfyUI may unload one model to load another. So each model is loaded again before a call
if another was called in between; that is free when it is still loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from math import isfinite
from typing import Any, Literal

from torch import Tensor

from msdda_fast.engine.noise import image_seeds
from msdda_fast.errors import (
    BackendUnavailable,
    InvalidSchedule,
    InvalidWeights,
    UnsupportedNetwork,
)
from msdda_fast.integrations.k_diffusion import sample_msdda

__all__ = ["ComfyObjective", "FusedGuider", "comfy", "fused_euler_ancestral"]


def comfy(module: str) -> Any:  # noqa: ANN401 - ComfyUI is not there to be typed
    """Import `comfy.<module>`; raise `BackendUnavailable` outside of ComfyUI."""
    try:
        return import_module(f"comfy.{module}")
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"this node runs only inside ComfyUI: its module comfy.{module} cannot be imported "
            f"({error})"
        ) from error


@dataclass(frozen=True, slots=True)
class ComfyObjective:
    """One model of a fused run.

    Attributes:
        model: comfy's ModelPatcher.
        positive, negative: CONDITIONING, as CLIPTextEncode makes it.
        cfg: Guidance scale; 1 leaves the negative out.
        weight: >= 0, relative to the others'.
        eta: Stochasticity, >= 0.
    """

    model: Any
    positive: list[Any]
    negative: list[Any]
    cfg: float
    weight: float
    eta: float


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


@dataclass(slots=True)
class _FusedModel:
    """Takes a guider's place in KSAMPLER; the model of branch 0 scales latents and noise.

    Attributes:
        branches: All opened objectives.
        present: The branch whose model is known to be loaded and patched.
    """

    branches: list[_Branch]
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
        comfy("model_management").throw_exception_if_processing_interrupted()
        guider = branch.guider
        if branch is not self.present:
            comfy("sampler_helpers").prepare_sampling(
                guider.model_patcher, x.shape, guider.conds, guider.model_options
            )
            guider.inner_model.current_patcher = guider.model_patcher
            self.present = branch
        own = copy.copy(model_k)
        own.inner_model = guider
        denoised: Tensor = own(x, sigma, **branch.extra_args)
        return denoised


@dataclass(slots=True)
class _Opener:
    """The sampler that each stock guider is given: opens the next one, or samples with all."""

    sampler: Any
    waiting: list[tuple[ComfyObjective, Any]]
    open_next: Callable[[_Opener, Any], Any]
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
            fused = _FusedModel(self.branches, present=branch)
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


class FusedGuider:
    """A GUIDER over several objectives, for the sampler `fused_euler_ancestral`.

    Args:
        objectives: At least one with weight > 0; those of weight 0 take no part.

    Raises:
        BackendUnavailable: Outside of ComfyUI.
        InvalidWeights: All weights are 0, or a weight is negative or not finite.
        UnsupportedNetwork: The models have different latent spaces, or are flow models.
    """

    def __init__(self, objectives: Sequence[ComfyObjective]) -> None:
        weights = [objective.weight for objective in objectives]
        if not all(isfinite(w) and w >= 0 for w in weights) or not sum(weights):
            raise InvalidWeights(
                f"weights are {weights}; they must be finite, not negative and not all 0"
            )
        guider_class = comfy("samplers").CFGGuider
        self._guiders: list[tuple[ComfyObjective, Any]] = []
        for objective in objectives:
            if objective.weight:
                guider = guider_class(objective.model)
                guider.set_conds(objective.positive, objective.negative)
                guider.set_cfg(objective.cfg)
                self._guiders.append((objective, guider))
        _check_alike([guider.model_patcher for _, guider in self._guiders])

    @property
    def model_patcher(self) -> Any:  # noqa: ANN401 - comfy's ModelPatcher
        """The first active model, which gives previews and latent scales."""
        return self._guiders[0][1].model_patcher

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

        Raises:
            InvalidSchedule: `sampler` is not the one that belongs to this guider.
        """
        if getattr(sampler, "sampler_function", None) is not fused_euler_ancestral:
            raise InvalidSchedule(
                "MSDDA Guider has no single prediction for another sampler; connect its own "
                "SAMPLER output"
            )

        def open_next(opener: _Opener, guider: Any) -> Any:  # noqa: ANN401
            return guider.sample(
                noise, latent_image, opener, sigmas, denoise_mask, callback, disable_pbar, seed
            )

        return open_next(_Opener(sampler, self._guiders, open_next), self._guiders[0][1])


def fused_euler_ancestral(
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
    objectives = [branch.objective for branch in fused.branches]
    total = sum(objective.weight for objective in objectives)
    seed = (extra_args or {}).get("seed")
    return sample_msdda(
        [partial(fused.predict, branch, model) for branch in fused.branches],
        x,
        sigmas,
        callback=callback,
        disable=disable,
        weights=[objective.weight / total for objective in objectives],
        etas=[objective.eta for objective in objectives],
        s_noise=s_noise,
        zero_variance=zero_variance,
        seeds=None if seed is None else image_seeds(seed, len(x)),
    )


def _check_alike(patchers: Sequence[Any]) -> None:
    """Raise `UnsupportedNetwork` unless all denoise x = x_0 + sigma eps over one latent space."""
    spaces = [type(patcher.get_model_object("latent_format")) for patcher in patchers]
    for patcher, space in zip(patchers, spaces, strict=True):
        name = type(patcher.model).__name__
        if isinstance(patcher.get_model_object("model_sampling"), comfy("model_sampling").CONST):
            raise UnsupportedNetwork(
                f"{name} is a flow model, x = (1 - sigma) x_0 + sigma eps; the MSDDA sampler takes "
                "only models of x = x_0 + sigma eps"
            )
        if space is not spaces[0]:
            raise UnsupportedNetwork(
                f"{name} has latents of {space.__name__}, the first model of {spaces[0].__name__}; "
                "fused models must share one latent space"
            )

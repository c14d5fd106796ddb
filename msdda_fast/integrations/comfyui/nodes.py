# SPDX-License-Identifier: Apache-2.0
"""The nodes as ComfyUI sees them: inputs, outputs, names. `guider` does the work."""

from __future__ import annotations

from typing import Any

from msdda_fast.integrations.comfyui.guider import (
    ComfyObjective,
    FusedGuider,
    comfy,
    fused_euler_ancestral,
)
from msdda_fast.types import ZeroVariancePolicy

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "MSDDAGuider", "MSDDAObjective"]

CATEGORY = "sampling/msdda"
MAX_OBJECTIVES = 6


class MSDDAObjective:
    """One aligned model with its own prompts, CFG, weight and eta."""

    RETURN_TYPES = ("MSDDA_OBJECTIVE",)
    RETURN_NAMES = ("objective",)
    FUNCTION = "make"
    CATEGORY = CATEGORY
    DESCRIPTION = "One of the models that MSDDA Guider balances."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """Return the inputs that ComfyUI shows for this node."""
        weight = {
            "default": 0.5,
            "min": 0.0,
            "max": 1.0,
            "step": 0.01,
            "tooltip": "How much this model counts, relative to the weights of the others. "
            "0 switches it off: it is neither loaded nor evaluated.",
        }
        eta = {
            "default": 1.0,
            "min": 0.0,
            "max": 1.0,
            "step": 0.01,
            "tooltip": "The stochasticity this model was aligned with, as in Euler ancestral: "
            "1 is ancestral, 0 deterministic. Set all to 0, or all above 0.",
        }
        return {
            "required": {
                "model": ("MODEL",),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "cfg": ("FLOAT", {"default": 7.5, "min": 0.0, "max": 100.0, "step": 0.1}),
                "weight": ("FLOAT", weight),
                "eta": ("FLOAT", eta),
            }
        }

    def make(
        self,
        model: Any,  # noqa: ANN401 - comfy's ModelPatcher
        positive: list[Any],
        negative: list[Any],
        cfg: float,
        weight: float,
        eta: float,
    ) -> tuple[ComfyObjective]:
        """Return the objective without loading anything."""
        return (ComfyObjective(model, positive, negative, cfg, weight, eta),)


class MSDDAGuider:
    """A guider and the sampler that goes with it, both for SamplerCustomAdvanced."""

    RETURN_TYPES = ("GUIDER", "SAMPLER")
    FUNCTION = "make"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Samples from the product of several models' Euler ancestral steps. Connect both outputs "
        "to SamplerCustomAdvanced: neither works without the other."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """Return the inputs that ComfyUI shows for this node."""
        objectives = {f"objective_{m}": ("MSDDA_OBJECTIVE",) for m in range(1, MAX_OBJECTIVES + 1)}
        noise = {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01}
        return {
            "required": {
                **{name: objectives.pop(name) for name in ("objective_1", "objective_2")},
                "s_noise": ("FLOAT", noise),
                "zero_variance": (["error", "dominate"],),
            },
            "optional": objectives,
        }

    def make(
        self,
        objective_1: ComfyObjective,
        objective_2: ComfyObjective,
        s_noise: float,
        zero_variance: ZeroVariancePolicy,
        **others: ComfyObjective,
    ) -> tuple[FusedGuider, Any]:
        """Return (guider, sampler).

        Raises:
            BackendUnavailable: Outside of ComfyUI.
            InvalidWeights: All weights are 0, or a weight is negative or not finite.
            UnsupportedNetwork: The models have different latent spaces, or are flow models.
        """
        objectives = [objective_1, objective_2, *(others[name] for name in sorted(others))]
        options = {"s_noise": s_noise, "zero_variance": zero_variance}
        sampler = comfy("samplers").KSAMPLER(fused_euler_ancestral, options)
        return FusedGuider(objectives), sampler


NODE_CLASS_MAPPINGS = {"MSDDAObjective": MSDDAObjective, "MSDDAGuider": MSDDAGuider}
NODE_DISPLAY_NAME_MAPPINGS = {"MSDDAObjective": "MSDDA Objective", "MSDDAGuider": "MSDDA Guider"}

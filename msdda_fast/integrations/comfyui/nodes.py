# SPDX-License-Identifier: Apache-2.0
"""The nodes as ComfyUI sees them: inputs, outputs, names. `guider` does the work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from msdda_fast.integrations.comfyui.guider import FusedGuider
from msdda_fast.integrations.comfyui.inside import inside
from msdda_fast.integrations.comfyui.levels import NOISES
from msdda_fast.integrations.comfyui.loras import LoRAStack, with_loras
from msdda_fast.integrations.comfyui.objective import ComfyObjective
from msdda_fast.integrations.comfyui.run import fused_ancestral
from msdda_fast.types import ZeroVariancePolicy

__all__ = [
    "NODE_CLASS_MAPPINGS",
    "NODE_DISPLAY_NAME_MAPPINGS",
    "MSDDAGuider",
    "MSDDALoRA",
    "MSDDAObjective",
]

CATEGORY = "sampling/msdda"
MAX_OBJECTIVES = 6


def number(
    default: float, low: float, high: float, tooltip: str, step: float = 0.01
) -> tuple[str, dict[str, Any]]:
    """A FLOAT input."""
    return "FLOAT", {
        "default": default,
        "min": low,
        "max": high,
        "step": step,
        "tooltip": tooltip,
    }


class MSDDALoRA:
    """One more LoRA on a stack of those that act together in an objective."""

    RETURN_TYPES = ("LORA_STACK",)
    RETURN_NAMES = ("lora_stack",)
    FUNCTION = "add"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Adds a LoRA to a stack. The LoRAs of a stack act together in one MSDDA Objective, such as "
        "a preference and an accelerator."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """Return the inputs that ComfyUI shows for this node."""
        files = inside("folder_paths").get_filename_list("loras")
        strength = "How strongly it changes the model. Text encoders are left as they are."
        return {
            "required": {
                "lora_name": (files, {"tooltip": "A file in the loras folder."}),
                "strength": number(1.0, -10.0, 10.0, strength),
            },
            "optional": {
                "lora_stack": ("LORA_STACK", {"tooltip": "The LoRAs before this one."}),
            },
        }

    def add(
        self, lora_name: str, strength: float, lora_stack: LoRAStack | None = None
    ) -> tuple[LoRAStack]:
        """Return the stack with one more LoRA; no file is read."""
        return ([*(lora_stack or ()), (lora_name, strength, 0.0)],)


class MSDDAObjective:
    """One aligned model with its own prompts, CFG, weight and noise level."""

    RETURN_TYPES = ("MSDDA_OBJECTIVE",)
    RETURN_NAMES = ("objective",)
    FUNCTION = "make"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "One of the models that MSDDA Guider balances: a model of its own, or one that objectives "
        "share, with a stack of LoRAs for each."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """Return the inputs that ComfyUI shows for this node."""
        weight = (
            "How much this model counts, relative to the weights of the others that have no mask. "
            "0 switches it off: it is neither loaded nor evaluated."
        )
        eta = (
            "The noise level this model was aligned with, in the unit of the guider's noise. For "
            "ancestral: 1 is ancestral, 0 deterministic. Set all to 0, or all above 0."
        )
        mask = (
            "Where in the image it acts: its weight at each pixel, in place of the number. "
            "Objectives without a mask share what the masks leave."
        )
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A model, which several objectives may share."}),
                "positive": ("CONDITIONING", {"tooltip": "What this objective is to draw."}),
                "cfg": number(7.5, 0.0, 100.0, "Guidance. 1 needs no negative prompt.", step=0.1),
                "weight": number(0.5, 0.0, 1.0, weight),
                "eta": number(1.0, 0.0, 10.0, eta),
            },
            "optional": {
                "negative": ("CONDITIONING", {"tooltip": "Not needed where cfg is 1."}),
                "lora_stack": (
                    "LORA_STACK",
                    {"tooltip": "LoRAs that make this objective out of the model."},
                ),
                "mask": ("MASK", {"tooltip": mask}),
                "start_percent": number(0.0, 0.0, 1.0, "From where in sampling on it acts."),
                "end_percent": number(1.0, 0.0, 1.0, "Until where in sampling it acts."),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, start_percent: float = 0.0, end_percent: float = 1.0) -> bool | str:
        """Return True, or what is wrong with the two; ComfyUI asks before it runs anything."""
        if 0.0 <= start_percent < end_percent <= 1.0:
            return True
        return (
            f"start_percent {start_percent} must lie before end_percent {end_percent}, both in "
            "[0, 1]"
        )

    def make(
        self,
        model: Any,  # noqa: ANN401 - comfy's ModelPatcher
        positive: list[Any],
        cfg: float,
        weight: float,
        eta: float,
        negative: list[Any] | None = None,
        lora_stack: LoRAStack | None = None,
        mask: Tensor | None = None,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> tuple[ComfyObjective]:
        """Return the objective; its LoRAs are read, and act when it is used.

        Raises:
            AdapterMismatch: A LoRA was made for another kind of model.
            BackendUnavailable: LoRAs outside of ComfyUI.
        """
        objective = ComfyObjective(
            model, positive, negative, cfg, weight, eta, mask, start_percent, end_percent
        )
        if lora_stack and weight:
            objective = replace(objective, model=with_loras(model, lora_stack))
        return (objective,)


class MSDDAGuider:
    """A guider and the sampler that goes with it, both for SamplerCustomAdvanced."""

    RETURN_TYPES = ("GUIDER", "SAMPLER")
    FUNCTION = "make"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Samples from the product of several models' ancestral steps, or of their SDEs. Connect "
        "both outputs to SamplerCustomAdvanced: neither works without the other."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """Return the inputs that ComfyUI shows for this node."""
        objectives: dict[str, Any] = {
            f"objective_{m}": ("MSDDA_OBJECTIVE",) for m in range(1, MAX_OBJECTIVES + 1)
        }
        policy = (
            "Where an objective without noise meets others with noise: refuse, or let those "
            "without decide."
        )
        noise = (
            "What eta is a level of. ancestral: Euler ancestral, of any model. The others are the "
            "noise that flow models were trained with: FlowSDE by Flow-GRPO, DanceSDE by "
            "DanceGRPO, CPS by Flow-CPS; FlowDDIM is DDIM's."
        )
        softness = "How wide the edges of masks are, in latent pixels. 0: hard edges."
        return {
            "required": {
                **{name: objectives.pop(name) for name in ("objective_1", "objective_2")},
                "s_noise": number(1.0, 0.0, 100.0, "Factor on the noise; 1 is the models' own."),
                "zero_variance": (["error", "dominate"], {"tooltip": policy}),
            },
            "optional": {
                **objectives,
                "noise": ([*NOISES], {"default": "ancestral", "tooltip": noise}),
                "mask_softness": number(1.0, 0.0, 64.0, softness),
            },
        }

    def make(
        self,
        objective_1: ComfyObjective,
        objective_2: ComfyObjective,
        s_noise: float,
        zero_variance: ZeroVariancePolicy,
        noise: str = "ancestral",
        mask_softness: float = 1.0,
        **others: ComfyObjective,
    ) -> tuple[FusedGuider, Any]:
        """Return (guider, sampler).

        Raises:
            BackendUnavailable: Outside of ComfyUI.
            InvalidWeights: All weights are 0, or a weight is negative or not finite.
            InvalidSchedule: Guidance without a negative prompt, or noise that these models do not
                have.
            UnsupportedNetwork: The models have different latent spaces, or only some are flow
                models.
        """
        objectives = {"objective_1": objective_1, "objective_2": objective_2}
        objectives |= {name: others[name] for name in sorted(others)}
        options = {"s_noise": s_noise, "zero_variance": zero_variance}
        sampler = inside("comfy.samplers").KSAMPLER(fused_ancestral, options)
        return FusedGuider(objectives, noise, mask_softness), sampler


NODE_CLASS_MAPPINGS = {
    "MSDDALoRA": MSDDALoRA,
    "MSDDAObjective": MSDDAObjective,
    "MSDDAGuider": MSDDAGuider,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "MSDDALoRA": "MSDDA LoRA",
    "MSDDAObjective": "MSDDA Objective",
    "MSDDAGuider": "MSDDA Guider",
}

# SPDX-License-Identifier: Apache-2.0
"""Checks the arguments of a pipeline call and turns them into numbers, before any network runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from diffusers import StableDiffusionPipeline
from torch import Tensor

from msdda_fast.errors import InvalidSchedule, InvalidShape, UnknownObjective
from msdda_fast.integers import as_integer
from msdda_fast.levels import ETA
from msdda_fast.objective import Objective
from msdda_fast.weights import as_host_float64

__all__ = [
    "by_name",
    "check_call",
    "check_latents",
    "check_no_flow",
    "check_parts",
    "check_steps",
    "latent_shape",
    "objective_etas",
    "objective_guidance",
    "refuse",
]

DEFAULT_GUIDANCE = 7.5
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

#: Arguments of stock pipelines, with what they stand for when they are not given.
_STOCK = {
    name: parameter.default
    for name, parameter in inspect.signature(StableDiffusionPipeline.__call__).parameters.items()
    if parameter.default is not inspect.Parameter.empty
} | {"callback": None, "callback_steps": None}
#: Of these, the ones that have another name here, or no meaning.
_REFUSED = {
    "eta": "every objective has its own: give etas={name: value} or Objective(..., eta=value)",
    "timesteps": "the DDIM grid follows from num_inference_steps and the scheduler's spacing",
    "sigmas": "the DDIM grid follows from num_inference_steps and the scheduler's spacing",
    "cross_attention_kwargs": "an adapter's scale is Objective(..., scale=value)",
    "guidance_rescale": "rescaled guidance is not affine in the outputs, so Eq. 7 would not hold",
    "clip_skip": "pass prompt_embeds from the layer you want",
    "ip_adapter_image": "image prompts are not supported",
    "ip_adapter_image_embeds": "image prompts are not supported",
    "callback": "use callback_on_step_end",
    "callback_steps": "use callback_on_step_end",
}


def refuse(arguments: Mapping[str, Any]) -> None:
    """Refuse every argument that the call does not have; a stock one may be given its default.

    Raises:
        ValueError: A stock pipeline's argument is not supported; the message says what to use.
        TypeError: Any other name.
    """
    for name, value in arguments.items():
        if name not in _STOCK:
            raise TypeError(f"unexpected argument {name!r}")
        default = _STOCK[name]
        if value is not default and not (isinstance(value, Real) and value == default):
            hint = _REFUSED.get(name, "it has no meaning here")
            raise ValueError(f"{name}= is not supported: {hint}")


def check_parts(pipe: object, *names: str) -> None:
    """Raise `ValueError` if a component that the call needs was left out."""
    for name in names:
        if getattr(pipe, name) is None:
            raise ValueError(
                f"this pipeline has no {name} ({name}=None), which the call needs; load the "
                "pipeline with it"
            )


def latent_shape(
    batch_size: int,
    unet_config: Any,  # noqa: ANN401 - diffusers' FrozenDict
    vae_scale_factor: int,
    height: int | None,
    width: int | None,
) -> tuple[int, int, int, int]:
    """Return the shape (B, C, h, w) of latents for images of `height` x `width` pixels.

    Raises:
        InvalidShape: A side is not a positive multiple of 8 (of the VAE's factor, if larger).
    """
    native = unet_config.sample_size
    native = (native, native) if isinstance(native, int) else native
    unit = max(8, vae_scale_factor)
    sides = []
    for name, given, own in zip(("height", "width"), (height, width), native, strict=True):
        side = own * vae_scale_factor if given is None else as_integer(given)
        if side is None or side < unit or side % unit:
            raise InvalidShape(f"{name} must be a positive multiple of {unit}, got {given!r}")
        sides.append(side // vae_scale_factor)
    return (batch_size, unet_config.in_channels, sides[0], sides[1])


def check_latents(latents: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise `InvalidShape` unless `latents` is None or a float tensor (B, C, h, w) = `shape`."""
    if latents is None:
        return
    if not isinstance(latents, Tensor) or not latents.is_floating_point() or latents.shape != shape:
        got = (
            f"{latents.dtype} {tuple(latents.shape)}"
            if isinstance(latents, Tensor)
            else repr(latents)
        )
        raise InvalidShape(f"latents must be a float tensor (B, C, H, W) = {shape}, got {got}")


def check_call(pipe: object, refused: Mapping[str, Any], output_type: str) -> None:
    """Check what a call needs before anything else.

    Raises:
        ValueError, TypeError: As `refuse`; an unknown output type; a component that is missing.
    """
    refuse(refused)
    check_output_type(output_type)
    check_parts(pipe, "unet", "scheduler", *([] if output_type == "latent" else ["vae"]))


def check_output_type(output_type: str) -> None:
    """Raise `ValueError` unless `output_type` is one of `OUTPUT_TYPES`."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")


def check_steps(num_steps: int) -> int:
    """Return `num_steps` as an `int`; raise `InvalidSchedule` unless it is a positive integer."""
    steps = as_integer(num_steps)
    if steps is None or steps < 1:
        raise InvalidSchedule(f"num_inference_steps must be a positive integer, got {num_steps!r}")
    return steps


def check_no_flow(objectives: Mapping[str, Objective]) -> None:
    """Raise `InvalidSchedule` if an objective has noise of flow models."""
    for name, objective in objectives.items():
        if objective.noise is not None:
            raise InvalidSchedule(
                f"objective {name!r}: {type(objective.noise).__name__} is noise of flow models, "
                f"and this pipeline samples with DDIM: give eta instead"
            )


def objective_etas(
    objectives: Mapping[str, Objective], etas: Mapping[str, float] | Sequence[float] | None
) -> list[float]:
    """Return eta of each objective, (M,) in [0, 1]; a mapping overrides the ones it names.

    Raises:
        UnknownObjective: A mapping names an unknown objective.
        InvalidSchedule: An eta is outside [0, 1], or an objective has noise of flow models.
        InvalidShape: The numbers are not of shape (M,).
    """
    check_no_flow(objectives)
    own = [objective.eta for objective in objectives.values()]
    values = by_name("etas", objectives, etas, own)
    for name, eta in zip(objectives, values, strict=True):
        ETA.check_one(eta, f"objective {name!r}")
    return values


def objective_guidance(
    objectives: Mapping[str, Objective],
    guidance_scale: float | Mapping[str, float] | Sequence[float] | None,
) -> list[float]:
    """Return the guidance scale of each objective, (M,) >= 1.

    The call's value comes first, then the objective's own, then diffusers' 7.5.

    Raises:
        UnknownObjective: A mapping names an unknown objective.
        InvalidSchedule: A scale is below 1 (no guidance) or not finite.
        InvalidShape: The numbers are not of shape () or (M,).
    """
    own = [
        DEFAULT_GUIDANCE if objective.guidance_scale is None else objective.guidance_scale
        for objective in objectives.values()
    ]
    scales: Any = guidance_scale
    if guidance_scale is not None and not isinstance(guidance_scale, Mapping):
        scales = as_host_float64(guidance_scale, "guidance_scale")
        scales = scales.expand(len(own)) if scales.ndim == 0 else scales
    values = by_name("guidance_scale", objectives, scales, own)
    for name, value in zip(objectives, values, strict=True):
        if not 1.0 <= value < float("inf"):
            raise InvalidSchedule(
                f"objective {name!r}: guidance_scale must be finite and at least 1 (no guidance), "
                f"got {value!r}"
            )
    return values


def by_name(
    argument: str,
    names: Mapping[str, Objective],
    values: Mapping[str, float] | Sequence[float] | None,
    own: list[float],
) -> list[float]:
    """Return a number for each name, (M,): those given, in order or by name, else its own.

    Raises:
        UnknownObjective: A mapping names an unknown objective.
        InvalidShape: The numbers are not of shape (M,).
    """
    if values is None:
        return own
    if isinstance(values, Mapping):
        for name in values:
            if name not in names:
                known = ", ".join(names)
                raise UnknownObjective(f"{argument}: unknown objective {name!r}; known: {known}")
        return [float(values.get(name, value)) for name, value in zip(names, own, strict=True)]
    tensor = as_host_float64(values, argument)
    if tensor.shape != (len(own),):
        raise InvalidShape(
            f"{argument} has shape {tuple(tensor.shape)}, expected (M,) = ({len(own)},)"
        )
    return [float(value) for value in tensor]

# SPDX-License-Identifier: Apache-2.0
"""What the call of a stock pipeline takes, read off its signature and its parts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msdda_fast.errors import InvalidShape, UnsupportedNetwork
from msdda_fast.integers import as_integer
from msdda_fast.pipelines.attach_files import DENOISERS

__all__ = ["Capabilities", "check_stock_inputs"]

#: Without these no request could be drawn, or not as a function of its seed.
_NEEDED = ("prompt", "num_inference_steps", "generator", "output_type")
#: Arguments and components of pipelines whose call needs more than a request has.
_CONTROLS = ("control_image", "controlnet", "adapter", "t2iadapter")
#: Likewise of pipelines that make sound.
_SOUND = ("audio", "waveform", "vocoder")
#: Pixels that one latent stands for, by side; the first of these attributes is the pipeline's.
_FACTORS = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
#: Where neither the call nor a config says a size, diffusers has this one.
_USUAL_SIDE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What requests to a pipeline may ask for.

    Attributes:
        kind: The name of its class.
        guidance: The argument that scales guidance, of all objectives alike; None: it has none.
        defaults: What the call has for arguments that are not given.
        takes_negative: Whether negative prompts have an effect.
        needs_negative: Whether guidance has an effect only with one.
        takes_size: Whether height and width are arguments of the call.
        unit: Height and width of an image are multiples of it, in pixels.
        height, width: Those of an image unless told, in pixels.
        frames: How many images a result is made of; 1 unless it is a video.
        watches: Whether the loop calls back after each step.
        mixes_images: Whether a list of images belongs to all prompts alike, so that requests with
            an image cannot share a call.
    """

    kind: str
    guidance: str | None
    defaults: Mapping[str, Any]
    takes_negative: bool
    needs_negative: bool
    takes_size: bool
    unit: int
    height: int
    width: int
    frames: int
    watches: bool
    mixes_images: bool

    @classmethod
    def of(cls, pipe: Any) -> Capabilities:  # noqa: ANN401 - any pipeline of diffusers
        """Read the capabilities of a pipeline, with objectives or without.

        Raises:
            UnsupportedNetwork: Its call lacks what every request needs, needs what no request has,
                or makes sound.
        """
        parameters = inspect.signature(pipe.__call__).parameters
        kind, parts = type(pipe).__name__, pipe.components
        if missing := [name for name in _NEEDED if name not in parameters]:
            raise UnsupportedNetwork(f"the call of {kind} does not take {', '.join(missing)}")
        if controls := [name for name in _CONTROLS if name in parameters or name in parts]:
            raise UnsupportedNetwork(
                f"{kind} takes a control image ({controls[0]}), which requests do not have"
            )
        sounds = [name for name in (*parameters, *parts) if any(one in name for one in _SOUND)]
        if sounds:
            raise UnsupportedNetwork(
                f"{kind} makes sound ({sounds[0]}), and requests are of images"
            )
        readers = [part for name, part in parts.items() if "tokenizer" in name]
        if readers and not any(readers):
            raise UnsupportedNetwork(f"this {kind} has no tokenizer, so it reads no prompts")
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        guidance = next(
            (
                name
                for name in ("guidance_scale", "true_cfg_scale")
                if isinstance(defaults.get(name), (int, float))
            ),
            None,
        )
        true_guidance = "true_cfg_scale" in parameters
        height, width = _native(pipe, defaults)
        return cls(
            kind=kind,
            guidance=guidance,
            defaults=defaults,
            # where guidance is distilled, true guidance is off unless it is asked for
            takes_negative="negative_prompt" in parameters
            and not (true_guidance and guidance == "guidance_scale"),
            needs_negative=guidance == "true_cfg_scale",
            takes_size="height" in parameters and "width" in parameters,
            unit=_unit(pipe),
            height=height,
            width=width,
            frames=defaults["num_frames"] if isinstance(defaults.get("num_frames"), int) else 1,
            watches="callback_on_step_end" in parameters,
            mixes_images="image" in parameters and "strength" not in parameters,
        )

    def takes(self, name: str) -> bool:
        """Whether the call has an argument of this name."""
        return name in self.defaults

    def side(self, name: str, given: object) -> int:
        """Check a height or width in pixels; None is the pipeline's own.

        Raises:
            InvalidShape: It is not a positive multiple of `unit`, or not the pipeline's own where
                its call has no such argument.
        """
        own = self.height if name == "height" else self.width
        side = own if given is None else as_integer(given)
        if side is None or side < self.unit or side % self.unit:
            raise InvalidShape(f"{name} must be a positive multiple of {self.unit}, got {given!r}")
        return side


def check_stock_inputs(pipe: Any, given: Mapping[str, Any]) -> None:  # noqa: ANN401 - a pipeline
    """Let a stock pipeline check the arguments of a call, as it does when its call begins.

    Args:
        pipe: Its `check_inputs` has the arguments of its call that can be wrong, by their names.
        given: Arguments of the call.

    Raises:
        ValueError: One is.
    """
    check = getattr(pipe, "check_inputs", None)
    if check is None:
        return
    calls = inspect.signature(pipe.__call__).parameters
    values = {name: p.default for name, p in calls.items() if p.default is not p.empty}
    values |= given
    check(**{name: values.get(name) for name in inspect.signature(check).parameters})


def _denoiser(pipe: Any) -> Any:  # noqa: ANN401 - a network
    return next(part for name in DENOISERS if (part := pipe.components.get(name)) is not None)


def _factor(pipe: Any) -> int:  # noqa: ANN401
    return next((int(getattr(pipe, name)) for name in _FACTORS if hasattr(pipe, name)), 8)


def _unit(pipe: Any) -> int:  # noqa: ANN401
    """Pixels, by side, of what the denoiser takes as one token."""
    factor, config = _factor(pipe), _denoiser(pipe).config
    if "transformer" not in pipe.components:
        return max(8, factor)
    pack = getattr(pipe, "_pack_latents", None)
    packs = pack is not None and "patch_size" not in inspect.signature(pack).parameters
    if packs or hasattr(pipe, "_patchify_latents"):
        return 2 * factor
    patch = config.get("patch_size") or max(config.get("all_patch_size", (1,)))
    return factor * int(patch if isinstance(patch, int) else patch[-1])


def _native(pipe: Any, defaults: Mapping[str, Any]) -> tuple[int, int]:  # noqa: ANN401
    """Height and width of an image unless told."""
    if isinstance(defaults.get("height"), int) and isinstance(defaults.get("width"), int):
        return defaults["height"], defaults["width"]
    size = getattr(pipe, "default_sample_size", None) or _denoiser(pipe).config.get("sample_size")
    if size is None:
        return _USUAL_SIDE, _USUAL_SIDE
    rows, columns = (size, size) if isinstance(size, int) else size
    factor = _factor(pipe)
    return rows * factor, columns * factor

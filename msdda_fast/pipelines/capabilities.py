# SPDX-License-Identifier: Apache-2.0
"""What the call of a stock pipeline takes, read off its signature and its parts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from msdda_fast.errors import InvalidShape, UnsupportedNetwork
from msdda_fast.integers import as_integer
from msdda_fast.pipelines.attach_files import DENOISERS
from msdda_fast.pipelines.latent_grid import SCALES
from msdda_fast.pipelines.stock_call import StockCall

__all__ = ["Capabilities", "check_stock_inputs"]

#: Without these no request could be drawn, or not as a function of its seed.
_NEEDED = ("prompt", "num_inference_steps", "generator", "output_type")
#: In names of arguments and components of pipelines that make sound.
_SOUND = ("audio", "waveform", "vocoder")
#: Sizes that stock pipelines ask for are powers of two.
_MULTIPLES = (1, 2, 4, 8, 16, 32)
#: Where neither the call nor a config says a size, diffusers has this one.
_USUAL_SIDE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What requests to a pipeline may ask for.

    Attributes:
        call: Its call.
        takes_size: Whether height and width are arguments of the call.
        unit: Height and width of an image are multiples of it, in pixels.
        height, width: Those of an image unless told, in pixels.
        frames: How many images a result is made of; 1 unless it is a video.
        watches: Whether the loop calls back after each step.
        mixes_images: Whether a list of images belongs to all prompts alike, so that requests with
            an image cannot share a call.
    """

    call: StockCall
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
            UnsupportedNetwork: Its call lacks what every request needs, or makes sound, or it reads
                no prompts.
        """
        call, parts = StockCall.of(type(pipe)), pipe.components
        call.check(_NEEDED)
        sounds = [name for name in (*call.defaults, *parts) if any(one in name for one in _SOUND)]
        if sounds:
            raise UnsupportedNetwork(
                f"{call.kind} makes sound ({sounds[0]}), and requests are of images"
            )
        readers = [part for name, part in parts.items() if "tokenizer" in name]
        if readers and not any(readers):
            raise UnsupportedNetwork(f"this {call.kind} has no tokenizer, so it reads no prompts")
        height, width = _native(pipe, call.defaults)
        frames = call.defaults.get("num_frames")
        return cls(
            call=call,
            takes_size="height" in call.defaults and "width" in call.defaults,
            unit=_unit(pipe),
            height=height,
            width=width,
            frames=frames if isinstance(frames, int) else 1,
            watches="callback_on_step_end" in call.defaults,
            mixes_images="image" in call.defaults and "strength" not in call.defaults,
        )

    def side(self, name: str, given: object) -> int:
        """Check a height or width in pixels; None is the pipeline's own.

        Raises:
            InvalidShape: It is not a positive multiple of `unit`.
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
    return next((int(getattr(pipe, name)) for name in SCALES if hasattr(pipe, name)), 8)


def _unit(pipe: Any) -> int:  # noqa: ANN401
    """The least multiple of a token's side, in pixels, that the stock call takes for a size."""
    token = _token(pipe)
    for multiple in _MULTIPLES:
        side = token * multiple
        with suppress(ValueError):
            check_stock_inputs(pipe, {"prompt": "", "height": side, "width": side})
            return side
    return token  # it checks something else, such as an image


def _token(pipe: Any) -> int:  # noqa: ANN401
    """Pixels, by side, of what the denoiser takes as one token."""
    factor, config = _factor(pipe), _denoiser(pipe).config
    if "transformer" not in pipe.components:
        return max(8, factor)  # as calls that have a size do
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

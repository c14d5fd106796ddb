# SPDX-License-Identifier: Apache-2.0
"""What `generate` asks of a pipeline, checked against its class before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from msdda_fast.cli import pictures
from msdda_fast.cli import values as parse
from msdda_fast.cli.session import err
from msdda_fast.errors import InvalidSchedule, UnsupportedNetwork
from msdda_fast.pipelines.stock_call import StockCall
from msdda_fast.pipelines.tasks import (
    Task,
    check_from_text,
    for_task,
    shared_guidance,
    task_class,
)

__all__ = ["Drawing"]

#: Frames per second of a video whose pipeline does not say.
_FPS = 16.0
#: Of options whose name is not the argument's.
_OPTIONS = {"guidance_scale": "--guidance"}


@dataclass(frozen=True, slots=True)
class Drawing:
    """One request of the command line.

    Attributes:
        call: Of the class that will draw.
        task: What it does, if it starts from an image.
        given: Arguments of its call, by the names of `StockCall.argument`; those without effect are
            left out.
        fps: Frames per second of a video.
    """

    call: StockCall
    task: Task | None
    given: Mapping[str, Any]
    fps: float

    @classmethod
    def of(
        cls,
        kind: Any,  # noqa: ANN401 - a class
        *,
        image: str | None,
        mask_image: str | None,
        image_strength: float | None,
        num_images: int,
        fps: float | None,
        mode: str,
        kl_budget: float | None,
        **given: Any,  # noqa: ANN401 - arguments
    ) -> Drawing:
        """Check options against the class of pipelines that the model is of.

        Raises:
            UnsupportedNetwork: The family cannot do one of them; it is named.
            InvalidSchedule: --guidance is not finite.
            ValueError: An image that cannot be read, or options that miss another.
        """
        for name, value in (("--mask-image", mask_image), ("--image-strength", image_strength)):
            if value is not None and image is None:
                raise ValueError(f"{name} needs --image")
        task: Task | None = None
        if image is not None:
            task = "image-to-image" if mask_image is None else "inpaint"
            kind = task_class(kind, task)
        else:
            check_from_text(kind)
        call = StockCall.of(kind)
        if call.makes == "audio":
            raise UnsupportedNetwork(f"{call.kind} makes sound, which generate does not write")
        if fps is not None and call.makes != "video":
            raise UnsupportedNetwork(f"--fps: {call.kind} draws images, not videos")
        if not call.captured and mode != "exact":
            raise UnsupportedNetwork(
                f"--mode {mode}: {call.kind} runs exact steps only; approximate modes are for "
                "text to image with Stable Diffusion 1 and 2"
            )
        if not call.captured and kl_budget is not None:
            raise UnsupportedNetwork(f"--kl-budget: {call.kind} has no --mode auto")
        guidance = given["guidance_scale"]
        if guidance is not None and not math.isfinite(guidance):
            raise InvalidSchedule(f"--guidance must be finite, got {guidance}")
        if given["negative_prompt"] and guidance is not None and guidance <= 1:
            raise ValueError(
                f"--negative-prompt has no effect with a guidance of {guidance:g}: give --guidance "
                "above 1"
            )
        if given["mask_softness"] is not None and given["masks"] is None:
            raise ValueError("--mask-softness needs --mask")
        given["image_strength"] = image_strength
        given["num_images"] = num_images if num_images > 1 else None
        given["frame_rate"] = fps if "frame_rate" in call.defaults else None
        given = {name: value for name, value in given.items() if value is not None}
        regional: dict[str, Any] = {
            name: given.pop(name) for name in ("masks", "mask_softness") if name in given
        }
        weights = given.pop("weights", None)
        call.check(given, {name: _option(name) for name in given})
        given |= pictures.start(image, mask_image)
        arguments: dict[str, Any] = {**call.arguments(**given), **regional, "weights": weights}
        if call.captured:
            arguments |= {"mode": mode, "kl_budget": kl_budget}
        else:
            arguments["output_type"] = "pil"
        own = call.defaults.get("frame_rate", _FPS)
        return cls(call, task, arguments, float(own if fps is None else fps))

    def file(self, output: str) -> tuple[Path, str]:
        """Return the path of --output, and its format.

        Raises:
            ValueError: It is a folder, or its suffix is of no format.
        """
        read = pictures.video_file if self.call.makes == "video" else parse.image_file
        return read(output, "--output")

    def draw(self, pipe: Any, prompt: str, seed: int, steps: int) -> Any:  # noqa: ANN401
        """Call a loaded pipeline; return what it returns.

        Raises:
            InvalidSchedule: --image-strength leaves no step.
        """
        if self.task is not None and (name := self.call.argument("image_strength")) is not None:
            strength = self.given.get(name, self.call.defaults[name])
            if strength * steps < 1:
                raise InvalidSchedule(
                    f"--image-strength {strength:g} leaves none of {steps} steps: give more of "
                    "either"
                )
        given = {"prompt": prompt, "seed": seed, "num_inference_steps": steps, **self.given}
        if self.task is not None:
            own = self.call.arguments(guidance_scale=shared_guidance(pipe))
            pipe = for_task(pipe, self.task)
            given = {**own, **self._size(pipe), **given}
        return pipe(**given)

    def _size(self, pipe: Any) -> dict[str, int]:  # noqa: ANN401
        """Return the size of the image to start from, where the call would take the model's own.

        It is rounded down to what two latent pixels are, which families divide images into.
        """
        if "strength" not in self.call.defaults or "height" not in self.call.defaults:
            return {}
        unit = 2 * pipe.vae_scale_factor
        width, height = (max(unit, side - side % unit) for side in self.given["image"].size)
        return {"height": height, "width": width}

    def results(self, made: Any) -> Sequence[Any]:  # noqa: ANN401 - of a pipeline
        """Return the images, or the frames of each video, of what a pipeline returned."""
        if getattr(made, "audio", None) is not None:
            err.print(f"The sound that {self.call.kind} makes is not written.")
        found: Sequence[Any] = made.frames if self.call.makes == "video" else made.images
        return found

    def write(self, drawn: Any, kind: str, file: Path) -> None:  # noqa: ANN401 - of `results`
        """Write one image or video."""
        if isinstance(drawn, Image.Image):
            drawn.save(file, format=kind)
        else:
            pictures.write_video(drawn, self.fps, kind, file)


def _option(name: str) -> str:
    return _OPTIONS.get(name, f"--{name.replace('_', '-')}")

# SPDX-License-Identifier: Apache-2.0
"""Options of the commands that draw with any pipeline."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = [
    "AcceleratorOption",
    "DrawnStepsOption",
    "FPSOption",
    "FramesOption",
    "HeightOption",
    "ImageOption",
    "ImageStrengthOption",
    "MaskImageOption",
    "MaskOption",
    "MaskSoftnessOption",
    "NegativePromptOption",
    "WeightOption",
    "WidthOption",
    "steps_of",
]

#: Denoising steps unless told; with an accelerator.
STEPS, ACCELERATED_STEPS = 25, 4

AcceleratorOption = Annotated[
    str | None,
    typer.Option(
        "--accelerator",
        metavar="SOURCE",
        help="Adapter for few steps that joins every objective: a file, folder or hub id, or own "
        "for the one that the model ships with.",
    ),
]
DrawnStepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps",
        max=1_000_000,
        help="Denoising steps T.",
        show_default=f"{STEPS}; with an accelerator its own, mostly {ACCELERATED_STEPS}",
    ),
]
WeightOption = Annotated[
    list[str] | None,
    typer.Option(
        "--weight",
        "-w",
        metavar="NAME=VALUE",
        help="Preference weight of one objective. Repeat for each; the sum must be 1. "
        "500-999:NAME=VALUE is its weight at these timesteps; ranges must cover all of them.",
        show_default="uniform",
    ),
]
MaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--mask",
        metavar="NAME=FILE",
        help="Image that says where an objective acts: white is all of it. Repeatable; what the "
        "masks leave goes to the objectives without one.",
    ),
]
MaskSoftnessOption = Annotated[
    float | None,
    typer.Option(
        "--mask-softness",
        min=0,
        metavar="PIXELS",
        help="Standard deviation of the blur of masks; 0 is hard.",
        show_default="one latent pixel",
    ),
]
NegativePromptOption = Annotated[
    str | None, typer.Option("--negative-prompt", help="What guidance should steer away from.")
]
_OWN = "the model's own"
HeightOption = Annotated[
    int | None, typer.Option("--height", min=8, help="In pixels.", show_default=_OWN)
]
WidthOption = Annotated[
    int | None, typer.Option("--width", min=8, help="In pixels.", show_default=_OWN)
]
ImageOption = Annotated[
    str | None,
    typer.Option("--image", metavar="FILE", help="Image to start from, or that is repainted."),
]
ImageStrengthOption = Annotated[
    float | None,
    typer.Option(
        "--image-strength",
        min=0,
        max=1,
        help="How much noise --image gets: 0 keeps it, 1 forgets it.",
        show_default=_OWN,
    ),
]
MaskImageOption = Annotated[
    str | None,
    typer.Option("--mask-image", metavar="FILE", help="What is repainted of --image, in white."),
]
FramesOption = Annotated[
    int | None,
    typer.Option("--num-frames", min=1, help="Frames of a video.", show_default=_OWN),
]
FPSOption = Annotated[
    float | None,
    typer.Option("--fps", min=1, help="Frames per second.", show_default="the model's own, or 16"),
]


def steps_of(steps: int | None, pipe: Any) -> int:  # noqa: ANN401 - a loaded pipeline
    """Return --steps, or what they are unless told: what an accelerator was made for."""
    if steps is not None:
        return steps
    return STEPS if pipe.accelerator is None else int(pipe.accelerator.steps)

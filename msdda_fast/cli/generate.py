# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast generate`: images or videos of one prompt."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from msdda_fast.cli import draw_options as options
from msdda_fast.cli import pictures
from msdda_fast.cli import values as parse
from msdda_fast.cli.session import (
    SHIPPED,
    DeviceOption,
    DType,
    DTypeOption,
    GuidanceOption,
    ModelOption,
    ObjectiveOption,
    StrengthOption,
    check_prompts,
    guidance_for,
    load,
    out,
    reported,
    saved_class,
)

if TYPE_CHECKING:
    from msdda_fast.pipelines.stable_diffusion.path_kl import PathKL

__all__ = ["ModeName", "generate"]

#: They are drawn together.
MOST_IMAGES = 4096


class ModeName(StrEnum):
    """The modes of a pipeline's call; the module that has them imports torch."""

    exact = "exact"
    merged = "merged"
    auto = "auto"


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    weight: options.WeightOption = None,
    strength: StrengthOption = None,
    mask: options.MaskOption = None,
    mask_softness: options.MaskSoftnessOption = None,
    mode: Annotated[
        ModeName,
        typer.Option(
            help="auto: steps run one merged network while the images stay within --kl-budget of "
            "exact ones, which a pilot of 12 images measures first. merged: every step. Stable "
            "Diffusion 1 and 2 only.",
        ),
    ] = ModeName.exact,
    kl_budget: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="How far the path of an image may be from exact ones with --mode auto.",
            show_default="what bfloat16 networks cost",
        ),
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Image file, in the format of its suffix; several images get -0, -1, ... "
            "before it. Videos are .webp, .gif, .png or .mp4.",
        ),
    ] = "out.png",
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the first image; the next images use the next seeds.",
            show_default="random",
        ),
    ] = None,
    num_images: Annotated[
        int, typer.Option("--num-images", "-n", min=1, max=MOST_IMAGES, help="Number of images.")
    ] = 1,
    negative_prompt: options.NegativePromptOption = None,
    height: options.HeightOption = None,
    width: options.WidthOption = None,
    image: options.ImageOption = None,
    image_strength: options.ImageStrengthOption = None,
    mask_image: options.MaskImageOption = None,
    num_frames: options.FramesOption = None,
    fps: options.FPSOption = None,
    model: ModelOption = SHIPPED,
    objective: ObjectiveOption = None,
    accelerator: options.AcceleratorOption = None,
    steps: options.DrawnStepsOption = None,
    guidance: GuidanceOption = None,
    dtype: DTypeOption = DType.float32,
    device: DeviceOption = None,
) -> None:
    """Draw a prompt with the objectives balanced by your weights.

    [dim]msdda-fast generate "A purple colored dog." -w aesthetic=0.3 -w consistency=0.7[/dim]

    One GPU per objective: [dim]torchrun --nproc-per-node 2 -m msdda_fast generate ...[/dim]
    """
    with reported("no further image was written"):
        from msdda_fast.cli.drawing import Drawing
        from msdda_fast.engine import torchrun
        from msdda_fast.files import check_files, write_atomically

        drawing = Drawing.of(
            saved_class(model),
            weights=parse.weights(weight or []),
            strength=parse.strength(strength or []),
            guidance_scale=guidance_for(model, guidance),
            negative_prompt=negative_prompt,
            num_images=num_images,
            height=height,
            width=width,
            image=image,
            image_strength=image_strength,
            mask_image=mask_image,
            masks=pictures.masks(mask or []),
            mask_softness=mask_softness,
            num_frames=num_frames,
            fps=fps,
            mode=mode.value,
            kl_budget=kl_budget,
        )
        file, kind = drawing.file(output)
        if seed is not None:
            parse.seed(seed, count=num_images)
        files = [file]
        if num_images > 1:
            files = [file.with_stem(f"{file.stem}-{index}") for index in range(num_images)]
        if torchrun.rank() == 0:
            check_files(*files)
        pipe = load(model, objective, dtype, device, accelerator)
        check_prompts(pipe, filter(None, (prompt, negative_prompt)))
        if seed is None:
            seed = torchrun.shared_seed(getattr(pipe, "parallel", None))
        made = drawing.draw(pipe, prompt, seed, options.steps_of(steps, pipe))
        if torchrun.rank() > 0:
            return
        for index, (path, drawn) in enumerate(zip(files, drawing.results(made), strict=True)):
            write_atomically(path, partial(drawing.write, drawn, kind))
            said = f"seed {seed + index}"
            if mode is ModeName.auto:
                said += f", {receipt(made.path_kl, index)}, {made.forwards} forwards"
            out.print(f"{path}  ", Text(said, "dim"), sep="", soft_wrap=True)


def receipt(path_kl: PathKL, index: int) -> str:
    """Say how far the path of an image is from exact ones."""
    estimate, upper = float(path_kl.estimate[index]), float(path_kl.upper[index])
    return f"path KL {estimate:.2g} and at most {upper:.2g} nats"

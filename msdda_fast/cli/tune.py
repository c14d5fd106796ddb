# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast tune`: choose settings for the systems that evaluate rewards while sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msdda_fast.cli import values as parse
from msdda_fast.cli.comparison import (
    JudgeOption,
    PartOption,
    RewardOption,
    TowardOption,
    objectives,
    require_packages,
    reward_names,
    rewards,
)
from msdda_fast.cli.session import (
    SHIPPED,
    DeviceOption,
    DType,
    DTypeOption,
    GuidanceOption,
    ModelOption,
    ObjectiveOption,
    StepsOption,
    check_request,
    drawing_progress,
    load,
    only_stable_diffusion,
    out,
    reported,
)


def tune(
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of finished images; run again to continue.")
    ] = Path("out/tune"),
    weight: Annotated[float, typer.Option(help="Weight w; settings are ranked by r_w.")] = 0.5,
    seeds: Annotated[str, typer.Option(help="Seeds of every prompt, such as 0-3 or 0,1,5.")] = "0",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file with one prompt per line.",
            show_default="8 of the paper's training prompts",
        ),
    ] = None,
    reward: RewardOption = None,
    judge: JudgeOption = None,
    toward: TowardOption = None,
    part: PartOption = "0/1",
    model: ModelOption = SHIPPED,
    objective: ObjectiveOption = None,
    steps: StepsOption = 50,
    guidance: GuidanceOption = None,
    dtype: DTypeOption = DType.float32,
    device: DeviceOption = None,
) -> None:
    """Choose settings for the systems that evaluate rewards while sampling, for `compare --tuned`.

    Every system has the same budget: six candidates, on prompts that `compare` does not use. With
    the judges judge_object, judge_color and background_chroma, candidates that spoil the picture
    are kept only if all of a system do.
    """
    with reported(f"finished images are in {folder}; run the same command again to continue"):
        require_packages()
        from msdda_fast.emoji.prompts import TRAIN_PROMPTS
        from msdda_fast.evaluation.runs import Comparison
        from msdda_fast.evaluation.tuning import tune
        from msdda_fast.files import check_folder

        texts = parse.prompts(prompts) if prompts else list(TRAIN_PROMPTS[::3][:8])
        chosen_part = parse.part(part)
        parse.preference(weight, f"--weight must lie in [0, 1], got {weight}")
        scored_by = reward_names(reward)
        chosen_seeds = parse.seeds(seeds, "--seeds")
        check_folder(folder)
        only_stable_diffusion(model, "tune")
        pipe = load(model, objective, dtype, device)
        check_request(pipe, texts, steps, guidance)
        first, second = objectives(pipe, toward)[:2]
        comparison = Comparison(
            prompts=texts,
            rewards={
                **rewards(parse.distinct(judge or [], "--judge"), {}, pipe),
                **rewards([first, second], scored_by, pipe),
            },
            num_inference_steps=steps,
            guidance_scale=guidance,
        )
        pipe.set_progress_bar_config(disable=True)
        with drawing_progress() as progress:
            scores = tune(
                pipe,
                comparison,
                {first: weight, second: round(1 - weight, 10)},
                chosen_seeds,
                folder,
                part=chosen_part,
                progress=progress,
            )
        for name, score in scores.items():
            out.print(f"{score.mean:+.3f} [{score.low:+.3f}, {score.high:+.3f}]  {name}")
        out.print(folder / "tuned.json", soft_wrap=True)

# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast certify`: are the adapters the optima that fusing assumes, and of which KL weight?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msdda_fast.cli import values as parse
from msdda_fast.cli.comparison import PromptsOption, RewardOption, reward_names, rewards
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

if TYPE_CHECKING:
    from collections.abc import Mapping

    from msdda_fast.evaluation.certificate import Certificate

__all__ = ["certify"]


def certify(
    file: Annotated[
        Path, typer.Option("--out", "-o", help="JSON file of the certificates.")
    ] = Path("out/certificate.json"),
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of finished seeds; run again to continue.", show_default="OUT.work"
        ),
    ] = None,
    prompts: PromptsOption = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds of every prompt, such as 0-3: where its paths start.")
    ] = "0-3",
    paths: Annotated[int, typer.Option(min=2, help="Base paths from each start.")] = 4,
    reward: RewardOption = None,
    model: ModelOption = SHIPPED,
    objective: ObjectiveOption = None,
    steps: StepsOption = 25,
    guidance: GuidanceOption = None,
    dtype: DTypeOption = DType.float32,
    device: DeviceOption = None,
) -> None:
    """Measure each objective's KL weight lambda, and how exactly it is the optimum for it.

    Rewards of images of the base model are regressed on what each adapter would have changed on
    the way to them: the slope is lambda, and R^2 is 1 for an exact optimum of Eq. (3).
    """
    work = work or file.with_suffix(".work")
    with reported(f"finished seeds are in {work}; run the same command again to continue"):
        from msdda_fast.emoji.prompts import TEST_PROMPTS
        from msdda_fast.evaluation.certify import Certification, aligned
        from msdda_fast.evaluation.certify import certify as measure
        from msdda_fast.evaluation.settings import write_json
        from msdda_fast.files import check_folder

        texts = parse.prompts(prompts) if prompts else list(TEST_PROMPTS)
        starts, scored_by = parse.seeds(seeds, "--seeds"), reward_names(reward)
        check_folder(file.parent)
        check_folder(work)
        only_stable_diffusion(model, "certify")
        pipe = load(model, objective, dtype, device)
        check_request(pipe, texts, steps, guidance)
        plan = Certification(
            prompts=texts,
            seeds=starts,
            paths=paths,
            rewards=rewards(aligned(pipe), scored_by, pipe),
            num_inference_steps=steps,
            guidance_scale=guidance,
        )
        pipe.set_progress_bar_config(disable=True)
        with drawing_progress() as progress:
            found = measure(pipe, plan, work, progress=progress)
        etas = {name: pipe.objectives[name].eta for name in found}
        write_json(file, _result(model, plan, etas, found))
        _show(found)
        out.print(file, soft_wrap=True)


def _result(
    model: str,
    plan: Any,  # noqa: ANN401 - a Certification, whose module is slow to import
    etas: Mapping[str, float],
    found: Mapping[str, Mapping[str, Certificate]],
) -> dict[str, Any]:
    def rounded(one: Certificate) -> dict[str, Any]:
        columns = {"kl_weight": one.kl_weight, "r_squared": one.r_squared}
        bounds = {
            name: {end: float(f"{value:.4g}") for end, value in estimate._asdict().items()}
            for name, estimate in columns.items()
        }
        return {**bounds, "kl": float(f"{one.kl:.4g}")}

    return {
        "setting": {
            "model": model,
            "prompts": len(plan.prompts),
            "seeds": len(plan.seeds),
            "paths": plan.paths,
            "steps": plan.num_inference_steps,
            "intervals": "95% bootstrap over prompts, and over seeds within prompts",
        },
        "etas": dict(etas),
        "objectives": {
            name: {reward: rounded(one) for reward, one in by_reward.items()}
            for name, by_reward in found.items()
        },
    }


def _show(found: Mapping[str, Mapping[str, Certificate]]) -> None:
    """Print the certificates, and the KL weights of the objectives that have one."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("objective", "reward"):
        table.add_column(column, no_wrap=True)
    for column in ("lambda", "R^2", "KL"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, by_reward in found.items():
        for reward, one in by_reward.items():
            slope = "{:.3f} ({:.3f}, {:.3f})".format(*one.kl_weight)
            share = "{:.2f} ({:.2f}, {:.2f})".format(*one.r_squared)
            style = "bold" if reward == name else None
            table.add_row(name, reward, slope, share, f"{one.kl:.2f}", style=style)
    out.print(table)
    out.print("lambda per nat, with 95% intervals; path KL(base || objective) in nats")
    own = {name: by_reward[name].kl_weight for name, by_reward in found.items()}
    if unsure := [name for name, estimate in own.items() if estimate.low <= 0]:
        out.print(f"not detectably an optimum of its reward: {', '.join(unsure)}")
    if known := [f"{n}={e.value:.4g}" for n, e in own.items() if e.low > 0]:
        out.print(f"kl_weights: {' '.join(known)}")

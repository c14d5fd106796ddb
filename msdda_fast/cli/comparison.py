# SPDX-License-Identifier: Apache-2.0
"""What `compare`, `tune` and `certify` share: options, objectives and their rewards."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msdda_fast.cli import values as parse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from msdda_fast.methods.method import Pipeline
    from msdda_fast.rewards import Reward

PartOption = Annotated[
    str, typer.Option(metavar="I/N", help="Draw only part I = 0 to N - 1, one process per part.")
]
TowardOption = Annotated[
    str | None,
    typer.Option(
        help="Objective that w is the weight of.",
        show_default="consistency, or the first objective",
    ),
]
RewardOption = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="OBJECTIVE=REWARD",
        help="Reward that scores an objective. Repeatable.",
        show_default="the reward of the same name",
    ),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        help="Text file with one prompt per line.", show_default="the paper's 25 test prompts"
    ),
]
JudgeOption = Annotated[
    list[str] | None,
    typer.Option(help="Reward that scores every image but guides no system. Repeatable."),
]


def require_packages() -> None:
    """Raise `BackendUnavailable` unless the extra `eval` is installed."""
    from msdda_fast.errors import BackendUnavailable

    missing = [name for name in ("jinja2", "matplotlib", "moocore") if find_spec(name) is None]
    if missing:
        raise BackendUnavailable(
            f"comparisons need {', '.join(missing)}: pip install 'msdda-fast[eval]'"
        )


def objectives(pipe: Pipeline, toward: str | None) -> list[str]:
    """Return the names of the two or three objectives, beginning with the one that w weighs."""
    names = list(pipe.objectives)
    if len(names) not in (2, 3):
        raise ValueError(f"a comparison needs two or three objectives, got {', '.join(names)}")
    first = toward or ("consistency" if "consistency" in names else names[0])
    if first not in names:
        raise ValueError(f"--toward {first!r} is not an objective; known: {', '.join(names)}")
    return [first, *(name for name in names if name != first)]


def reward_names(given: list[str] | None) -> dict[str, str]:
    """Read --reward: the name of a reward by objective."""
    form = "OBJECTIVE=REWARD, such as aesthetic=warmth"
    return parse.pairs((parse.pair(t, "--reward", str, form) for t in given or []), "--reward")


def rewards(names: list[str], chosen: Mapping[str, str], pipe: Pipeline) -> Mapping[str, Reward]:
    """Return each objective's reward: the one that --reward names, or the one of the same name."""
    from msdda_fast.rewards import load_reward

    if unknown := [name for name in chosen if name not in names]:
        raise ValueError(f"--reward {unknown[0]!r} is not an objective; known: {', '.join(names)}")
    place: Any = pipe  # of any class
    return {name: load_reward(chosen.get(name, name), device=place.device) for name in names}

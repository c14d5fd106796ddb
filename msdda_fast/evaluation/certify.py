# SPDX-License-Identifier: Apache-2.0
"""Certify the objectives of a pipeline on base paths, seed by seed; finished seeds are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msdda_fast import resume
from msdda_fast.errors import InvalidSchedule
from msdda_fast.evaluation.certificate import Certificate, Values, base_paths, certificate
from msdda_fast.evaluation.settings import write_json
from msdda_fast.evaluation.shards import read_record
from msdda_fast.methods.pipeline_model import PipelineModel
from msdda_fast.pipelines import MSDDAPipeline
from msdda_fast.pipelines.identity import model_identity
from msdda_fast.rewards import Reward

__all__ = ["Certification", "aligned", "certify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Certification:
    """What to measure, validated on construction.

    Args:
        prompts: At least one, all distinct.
        seeds: Starts x_T of every prompt.
        paths: Base paths from each start, at least 2.
        rewards: By objective: the reward it was aligned to.
        num_inference_steps: T.
        guidance_scale: Of every model; None: the objectives' own.

    Raises:
        ValueError: Prompts or seeds are empty or repeat, or `paths` is below 2.
    """

    prompts: Sequence[str]
    seeds: Sequence[int] = tuple(range(4))
    paths: int = 4
    rewards: Mapping[str, Reward]
    num_inference_steps: int = 25
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be non-empty and distinct, got {list(values)}")
        if self.paths < 2:
            raise ValueError(f"paths must be at least 2, got {self.paths}")


def aligned(pipe: MSDDAPipeline) -> list[str]:
    """Return the names of the objectives that are not the base model.

    Raises:
        ValueError: There are none.
        InvalidSchedule: One of them has eta 0: its steps are deterministic.
    """
    names = [n for n, o in pipe.objectives.items() if o.source is not None or o.unet is not None]
    if not names:
        raise ValueError("there is no aligned objective to certify, only the base model")
    for name in names:
        if pipe.objectives[name].eta == 0:
            raise InvalidSchedule(f"objective {name!r} has eta 0: its steps have no log-ratio")
    return names


def certify(
    pipe: MSDDAPipeline,
    plan: Certification,
    folder: Path,
    *,
    progress: Callable[[int, int], None] = lambda finished, total: None,
) -> dict[str, dict[str, Certificate]]:
    """Draw the missing base paths and return certificates by objective, then by reward.

    Objectives of one eta share their base paths. Every objective is regressed against every reward
    of `plan.rewards`: its own says whether it is the optimum, the others what it does besides.

    Args:
        pipe: A pipeline with at least one aligned objective.
        plan: What to measure.
        folder: Folder of finished seeds; a later call continues, or adds seeds.
        progress: Called with the numbers of finished and of all paths.

    Raises:
        ResumeMismatch: The folder holds paths of another model or other settings.
        InvalidSchedule, ValueError: As `aligned`, or a reward cannot score a prompt.
    """
    names = aligned(pipe)
    blank = torch.zeros(len(plan.prompts), 3, 64, 64)
    for reward in plan.rewards.values():  # found before minutes of drawing
        reward(blank, plan.prompts)
    by_eta: dict[float, list[str]] = {}
    for name in names:
        by_eta.setdefault(pipe.objectives[name].eta, []).append(name)
    identity = _identity(pipe, plan)
    shards = [
        (eta, seed, folder / f"eta-{eta:g}-seed-{seed:04d}.json")
        for seed in plan.seeds
        for eta in by_eta
    ]
    found = (
        (file, read_record(file)["settings"], {**identity, "eta": eta, "seed": seed})
        for eta, seed, file in shards
        if file.exists()
    )
    resume.check(folder, identity, results=found)
    each = len(plan.prompts) * plan.paths
    finished = sum(file.exists() for *_, file in shards)
    progress(finished * each, len(shards) * each)
    for eta, seed, file in shards:
        if file.exists():
            continue
        drawn = _draw(pipe, plan, eta, by_eta[eta], seed)
        resume.bind(folder, identity)
        marks = resume.mark({**identity, "eta": eta, "seed": seed})
        write_json(file, {"settings": marks, **drawn})
        finished += 1
        progress(finished * each, len(shards) * each)
    return {
        name: _certificates(
            plan, name, [read_record(file) for e, _, file in shards if name in by_eta[e]]
        )
        for name in names
    }


def _identity(pipe: MSDDAPipeline, plan: Certification) -> dict[str, Any]:
    return {
        "prompts": list(plan.prompts),
        "paths": plan.paths,
        "rewards": {name: resume.named(reward) for name, reward in plan.rewards.items()},
        "num_inference_steps": plan.num_inference_steps,
        "guidance_scale": plan.guidance_scale,
        **model_identity(pipe),
    }


def _draw(
    pipe: MSDDAPipeline, plan: Certification, eta: float, names: Sequence[str], seed: int
) -> dict[str, dict[str, list[list[float]]]]:
    """Return rewards, G and K by name, each (N, P), of all paths of one seed."""
    with PipelineModel(
        pipe,
        plan.prompts,
        dict.fromkeys(plan.rewards, 1 / len(plan.rewards)),
        [seed] * len(plan.prompts),
        num_steps=plan.num_inference_steps,
        guidance_scale=plan.guidance_scale,
        rewards=plan.rewards,
    ) as model:
        drawn = base_paths(model, eta, names, plan.paths)
    return {
        what: {name: column.tolist() for name, column in columns.items()}
        for what, columns in drawn._asdict().items()
    }


def _certificates(
    plan: Certification, name: str, records: Sequence[Mapping[str, Any]]
) -> dict[str, Certificate]:
    def grid(what: str, column: str) -> Values:
        """(S, N, P) of the records as (P, S, N)."""
        return np.array([record[what][column] for record in records]).transpose(2, 0, 1)

    gains, kl = grid("gains", name), grid("kl", name)
    return {reward: certificate(grid("rewards", reward), gains, kl) for reward in plan.rewards}

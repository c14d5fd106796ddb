# SPDX-License-Identifier: Apache-2.0
"""Choose settings, on training prompts, for the systems that evaluate rewards while sampling.

Their published settings were chosen for other rewards. Each system gets the same budget, six
`candidates` on the same prompts and seeds. Where the comparison has the judges, the base is drawn
too, and the best mean r_w of those above both floors is kept, or, if there is none, the candidate
that is closest to them; see `msdda_fast.evaluation.floors`. Test prompts are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from msdda_fast.evaluation.floors import JUDGES, floors
from msdda_fast.evaluation.runs import Comparison, Entry, collect_scores, run_comparison
from msdda_fast.evaluation.scores import write_scores
from msdda_fast.evaluation.settings import write_json
from msdda_fast.evaluation.statistics import Interval, arms_of, mean_reward
from msdda_fast.files import read_json
from msdda_fast.methods.das import DAS
from msdda_fast.methods.method import Method
from msdda_fast.methods.mudm import MUDM
from msdda_fast.methods.rgg import RGG
from msdda_fast.methods.sd import SD
from msdda_fast.methods.tfg import TFG
from msdda_fast.pipelines import MSDDAPipeline
from msdda_fast.rewards.background_chroma import Background

__all__ = ["candidates", "load_tuned", "tune"]

_KINDS: Mapping[str, type[Method]] = {kind.name: kind for kind in (RGG, DAS, TFG, MUDM)}


def candidates() -> list[Method]:
    """Return six settings of each system; fields that are not set are as published."""
    return [
        *(RGG(norm="none", alpha=a, gamma=g) for a in (0.01, 0.03, 0.1) for g in (0.024, 0.1)),
        *(DAS(alpha=a, gamma=g) for a in (0.005, 0.02, 0.1) for g in (0.016, 0.05)),
        *(TFG(rho=r, mu=m, n_samples=1) for r in (0.25, 1.0) for m in (2.0, 8.0, 32.0)),
        *(
            MUDM(scale=s, dependency=d)
            for s in (4.0, 16.0, 64.0)
            for d in ("independent", "dependent")
        ),
    ]


def tune(
    pipe: MSDDAPipeline,
    comparison: Comparison,
    weights: Mapping[str, float],
    seeds: Sequence[int],
    folder: Path,
    *,
    methods: Sequence[Method] | None = None,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] = lambda finished, total: None,
) -> dict[str, Interval]:
    """Draw every candidate; write tuning.csv, and the best of each system to tuned.json.

    Both are of these candidates, this preference and these seeds only, whatever else was drawn
    into the folder before.

    Args:
        pipe: Its objectives are the aligned models.
        comparison: What all candidates have in common, with training prompts.
        weights: The preference whose r_w ranks the candidates.
        seeds: Seeds of every prompt.
        folder: Folder of finished shards and of the results; a later call continues.
        methods: The candidates; None: `candidates()`.
        part, progress: As in `run_comparison`. The files include whatever is finished.

    Returns: mean r_w of each finished candidate.
    """
    methods = candidates() if methods is None else methods
    entries = [Entry(method, _setting(method), weights, seeds) for method in methods]
    judged = {*JUDGES, Background.name} <= comparison.rewards.keys()
    if judged:
        entries.append(Entry(SD(), "", weights, seeds, weighted=False))
    run_comparison(pipe, comparison, entries, folder, part=part, progress=progress)
    rows = write_scores(folder / "tuning.csv", collect_scores(comparison, entries, folder))
    drawn = arms_of(rows)
    arms = {arm.system: mean_reward(arm.scalarised(weights)) for arm in drawn}
    short = {row.arm.system: row.shortfall for row in floors(drawn, weights)} if judged else {}
    scored = [
        (method, arms[method.name, _setting(method)])
        for method in methods
        if (method.name, _setting(method)) in arms
    ]
    best = {
        name: min(
            group,
            key=lambda pair: (short.get((pair[0].name, _setting(pair[0])), 0.0), -pair[1].mean),
        )[0]
        for name, group in groupby(scored, key=lambda pair: pair[0].name)
    }
    write_json(folder / "tuned.json", {name: asdict(method) for name, method in best.items()})  # type: ignore[call-overload]
    return {f"{method.name} {_setting(method)}": score for method, score in scored}


def load_tuned(file: Path) -> dict[tuple[str, str], Method]:
    """Read tuned.json; return the chosen methods by name and the variant "tuned".

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is damaged, or names an unknown system or setting.
    """
    settings = read_json(file, "a file of tuned settings")
    methods: dict[tuple[str, str], Method] = {}
    for name, fields in settings.items():
        if name not in _KINDS:
            raise ValueError(f"{file}: unknown system {name!r}; known: {', '.join(_KINDS)}")
        try:
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            methods[name, "tuned"] = _KINDS[name](**values)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{file}: {name}: {error}") from error
    return methods


def _setting(method: Method) -> str:
    """Return the fields that differ from the defaults, as text."""
    plain = asdict(type(method)())  # type: ignore[call-overload]
    fields = asdict(method)  # type: ignore[call-overload]
    return " ".join(f"{k}={v}" for k, v in fields.items() if v != plain[k]) or "published"

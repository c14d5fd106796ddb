# SPDX-License-Identifier: Apache-2.0
"""Turn scores into tables, figures and one self-contained page; no image is drawn or scored."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import jinja2

from msdda_fast.evaluation.figures import label_of, pareto_figure, simplex_figure
from msdda_fast.evaluation.floors import floors, floors_markdown
from msdda_fast.evaluation.gauge import gauge_figure, shares_kept
from msdda_fast.evaluation.path_kl import read_path_kl
from msdda_fast.evaluation.rotations import averaged_rotations
from msdda_fast.evaluation.scores import Score
from msdda_fast.evaluation.settings import write_json
from msdda_fast.evaluation.statistics import Arm, arms_of
from msdda_fast.evaluation.tables import (
    OURS,
    Front,
    PreferenceTable,
    front_table,
    preference_table,
    to_csv,
    to_markdown,
)
from msdda_fast.files import write_atomically

__all__ = ["write_report"]


def write_report(
    rows: Sequence[Score],
    folder: Path,
    *,
    objectives: Sequence[str],
    preferences: Sequence[float],
    reference: Mapping[str, float],
    title: str,
    setting: str,
) -> Path:
    """Write table.csv, table.md, summary.json, pareto.png, simplex.png and report.html.

    Also gauge.png and gauge.json if the scores have MSDDA, SD and merges; and floors.md if every
    image of some systems was judged, background included, with the path KL of `path_kl.json`.

    Args:
        rows: Scores; those with three weights are used only in the figure of three objectives.
        folder: Where to write; a `grid.png` there is shown on the page.
        objectives: Two or three names; the first two span the tables and the Pareto figure.
        preferences: Weights w of the first objective, one table each.
        reference: Reference point of the hypervolume, by objective.
        title, setting: Heading of the page, and one sentence that says what was run.

    Returns: the page.

    Raises:
        ValueError: MSDDA has no scores at one of the preferences.
    """
    first, second = objectives[:2]
    single = arms_of(rows)
    arms = averaged_rotations(single)
    pairwise = [arm for arm in arms if set(arm.weights) <= {first, second}]
    wanted = [{first: w, second: round(1 - w, 10)} for w in preferences]
    tables = [preference_table(pairwise, weights) for weights in wanted]
    fronts = front_table(pairwise, wanted, {name: reference[name] for name in (first, second)})

    pareto_figure(pairwise, (first, second), folder / "pareto.png")
    triple = [arm for arm in arms if arm.system == OURS and set(arm.weights) == set(objectives)]
    if len(objectives) == 3 and len(triple) >= 3:
        simplex_figure(triple, objectives, folder / "simplex.png")
    sentences = _findings(tables, fronts)
    kept = {f"w = {next(iter(w.values())):g}": shares_kept(single, w) for w in wanted}
    if kept := {title: shares for title, shares in kept.items() if shares}:
        gauge_figure(kept, folder / "gauge.png")
        merges = {title: [asdict(share) for share in shares] for title, shares in kept.items()}
        write_json(folder / "gauge.json", merges)
    judged = [(weights, found) for weights in wanted if (found := floors(pairwise, weights))]
    if judged:
        _write(folder / "floors.md", floors_markdown(judged, read_path_kl(folder)))
    _write(folder / "table.csv", to_csv(tables))
    _write(folder / "table.md", _markdown(tables, sentences))
    write_json(
        folder / "summary.json",
        {
            "setting": setting,
            "findings": sentences,
            "hypervolume": [asdict(front) for front in fronts],
        },
    )
    template = files("msdda_fast.evaluation").joinpath("report.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template).render(
        title=title,
        setting=setting,
        findings=sentences,
        names=[first, second],
        tables=tables,
        fronts=fronts,
        front_weights=", ".join(f"{w:g}" for w in preferences),
        reference=", ".join(f"{name} {reference[name]:g}" for name in (first, second)),
        label=label_of,
        pareto=_embedded(folder / "pareto.png"),
        simplex=_embedded(folder / "simplex.png"),
        grid=_embedded(folder / "grid.png"),
        made_by="Made by msdda-fast compare from the scores of every image.",
    )
    _write(folder / "report.html", page)
    return folder / "report.html"


def _findings(tables: Sequence[PreferenceTable], fronts: Sequence[Front]) -> list[str]:
    """Return sentences on where MSDDA leads, where it is behind, and where neither is shown."""
    sentences = []
    for table in tables:
        w = next(iter(table.weights.values()))
        for verdict, phrase in (
            ("MSDDA leads", "leads"),
            ("MSDDA is behind", "is behind"),
            ("no difference shown", "is within the interval of"),
        ):
            rows = [row for row in table.rows if row.verdict == verdict]
            if rows:
                names = ", ".join(_named(row.arm, row.gain.mean) for row in rows if row.gain)
                sentences.append(f"At w = {w:g}, by r_w, MSDDA {phrase} {names}.")
    for verdict, phrase in (("MSDDA leads", "exceeds"), ("MSDDA is behind", "is below")):
        named = [label_of(front.system) for front in fronts if front.verdict == verdict]
        if named:
            sentences.append(f"The hypervolume of MSDDA {phrase} that of {', '.join(named)}.")
    return sentences


def _named(arm: Arm, gain: float) -> str:
    return f"{label_of(arm.system)} ({gain:+.3f})"


def _markdown(tables: Sequence[PreferenceTable], sentences: Sequence[str]) -> str:
    parts = ["\n".join(f"- {sentence}" for sentence in sentences)]
    for table in tables:
        weights = ", ".join(f"{weight:g} {name}" for name, weight in table.weights.items())
        parts.append(f"### {weights}\n\n{to_markdown(table)}")
    return "\n\n".join(parts) + "\n"


def _embedded(file: Path) -> str | None:
    if not file.exists():
        return None
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def _write(file: Path, text: str) -> None:
    write_atomically(file, lambda partial: partial.write_text(text, "utf-8"))

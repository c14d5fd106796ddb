# SPDX-License-Identifier: Apache-2.0
"""The paper's whole comparison: images, scores, tables, figures, and grids of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from msdda_fast.evaluation.figures import label_of
from msdda_fast.evaluation.grid import labelled_grid
from msdda_fast.evaluation.path_kl import measure_path_kl, read_path_kl
from msdda_fast.evaluation.plan import Plan
from msdda_fast.evaluation.report import write_report
from msdda_fast.evaluation.runs import (
    Comparison,
    Elsewhere,
    Entry,
    collect_scores,
    run_comparison,
    strip_of,
)
from msdda_fast.evaluation.scores import merge_scores, read_scores, scores_file
from msdda_fast.evaluation.settings import write_json
from msdda_fast.evaluation.tables import OURS
from msdda_fast.files import read_json, write_atomically
from msdda_fast.levels import FlowNoise
from msdda_fast.methods.method import Pipeline, is_stock
from msdda_fast.pipelines.attach_files import networks_of

__all__ = ["compare", "report_scores"]

#: Rows of the grids.
GRID_PROMPTS = 5
#: What protocol.json holds, for `write_report`.
PROTOCOL = {"title", "setting", "objectives", "preferences", "reference"}


def compare(
    pipe: Pipeline,
    comparison: Comparison,
    plan: Plan,
    work: Path,
    out: Path,
    *,
    title: str,
    reference: Mapping[str, float] | None = None,
    part: tuple[int, int] = (0, 1),
    elsewhere: Elsewhere | None = None,
    progress: Callable[[int, int], None] = lambda finished, total: None,
) -> Path | None:
    """Draw what is missing, then write the scores, the grids and the report.

    Args:
        pipe: Its objectives are the aligned models.
        comparison: What all systems have in common.
        plan: Systems, preferences and seeds.
        work: Folder of the finished shards; see `run_comparison`.
        out: Folder of the results. Scores from earlier calls with the same settings are kept.
        title: Title of the page.
        reference: Reference point of the hypervolume, by objective; None: -1 for each.
        part: (i, n): draw only part i of n. Only a call with (0, 1) writes results.
        elsewhere: Draws in place of `pipe`; see `run_comparison`.
        progress: Called with the numbers of finished and of all images.

    Returns: the page, or None if this is one part of several.

    Raises: As `run_comparison` and `write_report`.
    """
    entries = plan.entries()
    whole = part == (0, 1)
    if whole and scores_file(out).exists():  # damage is found before hours of drawing
        read_scores(scores_file(out))
        read_path_kl(out)
    run_comparison(
        pipe, comparison, entries, work,
        part=part, out=out if whole else None, elsewhere=elsewhere, progress=progress,
    )  # fmt: skip
    if not whole:
        return None
    if plan.path_kl_seeds:
        measure_path_kl(
            pipe, comparison, entries, plan.path_kl_seeds, work, out, progress=progress
        )  # fmt: skip
    merge_scores(scores_file(out), collect_scores(comparison, entries, work))
    _write_grids(comparison, plan, entries, work, out)
    protocol = {
        "title": title,
        "setting": _setting(pipe, comparison),
        "objectives": list(plan.objectives),
        "preferences": list(plan.preferences),
        "reference": dict(reference or dict.fromkeys(plan.objectives, -1.0)),
    }
    write_json(out / "protocol.json", protocol)
    return report_scores(out)


def report_scores(out: Path) -> Path:
    """Remake every table and figure from the scores in `out` and `out/protocol.json`.

    Raises:
        FileNotFoundError: One of the two is missing.
        ValueError: One is damaged; or as `write_report`.
    """
    if not (out / "protocol.json").is_file():
        raise FileNotFoundError(f"no results of a comparison in {out}: it has no protocol.json")
    protocol = read_json(out / "protocol.json", "the protocol of a comparison")
    if missing := PROTOCOL - protocol.keys():
        raise ValueError(f"{out / 'protocol.json'} lacks {', '.join(sorted(missing))}")
    return write_report(read_scores(scores_file(out)), out, **protocol)


def _setting(pipe: Any, comparison: Comparison) -> str:  # noqa: ANN401 - of any class
    denoiser: Any = next(iter(networks_of(pipe).values()))
    dtype = str(denoiser.dtype).removeprefix("torch.")
    return (
        f"{len(comparison.prompts)} prompts, T = {comparison.num_inference_steps}, {_noise(pipe)}; "
        f"networks in {dtype} on {pipe._execution_device}."
    )


def _noise(pipe: Any) -> str:  # noqa: ANN401 - of any class
    if not is_stock(pipe):
        etas = ", ".join(f"{name} {o.eta:g}" for name, o in pipe.objectives.items())
        return f"eta of the aligned models: {etas}"
    from msdda_fast.methods.stock_model import own_levels

    sampler = type(pipe.scheduler).__name__
    levels = {name: level for name, level in own_levels(pipe).items() if level is not None}
    shown = ", ".join(f"{name} {_level(level)}" for name, level in levels.items())
    return f"{sampler}, levels of the aligned models: {shown}" if shown else sampler


def _level(level: float | FlowNoise) -> str:
    if isinstance(level, FlowNoise):
        return f"{type(level).__name__}({level.level:g})"
    return f"{level:g}"


def _write_grids(
    comparison: Comparison, plan: Plan, entries: Sequence[Entry], work: Path, out: Path
) -> None:
    """Write grid.png, MSDDA and RS over the preferences (Fig. 4), and systems.png, all at one."""
    count = len(comparison.prompts)
    rows = range(0, count, -(-count // GRID_PROMPTS))
    seed = plan.seeds[0]
    strips = {
        (entry.method.name, entry.variant, entry.w): strip_of(work, entry, seed)
        for entry in entries
        if seed in entry.seeds and len(entry.weights) == 2
    }
    base = strips.get(("SD", "", None))
    soup = {"MSDDA": OURS, "RS": ("RS", "product")}
    if base and all((*system, w) in strips for system in soup.values() for w in plan.preferences):
        images, labels = [], []
        for row in rows:
            for name, system in soup.items():
                columns = [strips[(*system, w)][row] for w in plan.preferences]
                images.append([base[row], *columns])
                labels.append(f"{comparison.prompts[row]} {name}")
        heads = ["SD", *(f"w = {w:g}" for w in plan.preferences)]
        _save(labelled_grid(images, labels, heads), out / "grid.png")
    middle = plan.preferences[len(plan.preferences) // 2]
    shown = {key: strip for key, strip in strips.items() if key[2] in (None, middle)}
    heads = [label_of(key[:2]).replace(" (", "\n").rstrip(")") for key in shown]
    grid = [[strip[row] for strip in shown.values()] for row in rows]
    _save(
        labelled_grid(grid, [comparison.prompts[row] for row in rows], heads, cell=120),
        out / "systems.png",
    )


def _save(image: Image.Image, file: Path) -> None:
    palette = image.quantize(256)  # a quarter of the size, and looks the same
    write_atomically(file, lambda partial: palette.save(partial, format="PNG", optimize=True))

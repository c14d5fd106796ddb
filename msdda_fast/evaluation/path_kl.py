# SPDX-License-Identifier: Apache-2.0
"""The path KL of a comparison's systems to the base, shard by shard, as a column of its tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msdda_fast import resume
from msdda_fast.evaluation.runs import Comparison, Entry
from msdda_fast.evaluation.settings import comparison_identity, shard_identity, write_json
from msdda_fast.evaluation.shards import read_record
from msdda_fast.files import read_json
from msdda_fast.methods.method import Pipeline
from msdda_fast.methods.path_kl import has_path_kl, path_kl

__all__ = ["measure_path_kl", "path_kl_file", "read_path_kl"]


def path_kl_file(out: Path) -> Path:
    """Return where a comparison's path KL is kept."""
    return out / "path_kl.json"


def measure_path_kl(
    pipe: Pipeline,
    comparison: Comparison,
    entries: Sequence[Entry],
    seeds: Sequence[int],
    work: Path,
    out: Path,
    *,
    progress: Callable[[int, int], None] = lambda finished, total: None,
) -> None:
    """Measure what is missing, and add it to `path_kl.json`: nats by system, seed and prompt.

    Args:
        pipe, comparison, entries: As of `run_comparison`; entries without a path KL are left out.
        seeds: Seeds of every prompt.
        work: Folder of finished shards; a later call continues.
        out: Folder of the results.
        progress: Called with the numbers of finished and of all paths.

    Raises:
        UnsupportedNetwork: The pipeline is not Stable Diffusion's.
        ResumeMismatch: `work` holds shards of another model or other settings.
        InvalidSchedule: As `methods.path_kl`.
    """
    common = comparison_identity(pipe, comparison)
    measured = [entry for entry in entries if has_path_kl(entry.method)]
    shards = [
        (entry, seed, work / "path-kl" / entry.folder_name / f"seed-{seed:04d}.json")
        for seed in seeds
        for entry in measured
    ]
    found = (
        (file, read_record(file)["settings"], shard_identity(common, comparison, entry, seed))
        for entry, seed, file in shards
        if file.exists()
    )
    resume.check(work, common, results=found)
    each, finished = len(comparison.prompts), sum(file.exists() for *_, file in shards)
    progress(finished * each, len(shards) * each)
    for entry, seed, file in shards:
        if file.exists():
            continue
        nats = path_kl(
            entry.method,
            pipe,
            comparison.prompts,
            entry.weights,
            [seed] * each,
            num_inference_steps=comparison.num_inference_steps,
            guidance_scale=comparison.guidance_scale,
        )
        marks = resume.mark(shard_identity(common, comparison, entry, seed))
        write_json(file, {"settings": marks, "nats": [round(v, 5) for v in nats.tolist()]})
        finished += 1
        progress(finished * each, len(shards) * each)
    systems = _systems(out)
    for entry, seed, file in shards:
        name = " ".join(filter(None, (entry.method.name, entry.variant, entry.weights_text)))
        system = systems.setdefault(name, _system(entry))
        system["nats"][str(seed)] = read_record(file)["nats"]
    write_json(path_kl_file(out), systems)


def _system(entry: Entry) -> dict[str, Any]:
    key = {"method": entry.method.name, "variant": entry.variant, "weights": entry.weights_text}
    return {**key, "nats": {}}


def _systems(out: Path) -> dict[str, Any]:
    file = path_kl_file(out)
    return read_json(file, "the path KL of a comparison") if file.is_file() else {}


def read_path_kl(out: Path) -> dict[tuple[str, str, str], float]:
    """Return the mean path KL in nats by method, variant and weights; empty if none was measured.

    Raises:
        ValueError: The file is damaged.
    """
    means = {}
    for system in _systems(out).values():
        nats = [value for values in system["nats"].values() for value in values]
        means[system["method"], system["variant"], system["weights"]] = sum(nats) / len(nats)
    return means

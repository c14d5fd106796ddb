# SPDX-License-Identifier: Apache-2.0
"""`objectives.json`: the objectives of a model folder, in order, beside its `model_index.json`.

    {"aesthetic": {"source": "aesthetic", "eta": 1.0}, "consistency": {"source": ..., "eta": 0.8}}

A `source` (an adapter) or `unet` (a full network) lies inside the folder; with neither, the
objective is the base model. An entry without a name is the accelerator that all of them include,
see `accelerator`; it stands in for the base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from numbers import Real
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from msdda_fast.files import unique_keys
from msdda_fast.levels import noise_from_json, noise_to_json
from msdda_fast.objective import Objective
from msdda_fast.pipelines.adapter_sets import adapter_scale

__all__ = [
    "NAMELESS",
    "OBJECTIVES_FILE",
    "check_names",
    "dump_objectives",
    "inside",
    "parse_objectives",
]

OBJECTIVES_FILE = "objectives.json"
NAMELESS = ""  #: The accelerator among the entries; no objective has this name.
_FIELDS = tuple(field.name for field in fields(Objective))
_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("eta", "scale", "guidance_scale"), (Real, "a number")),
    "noise": (dict, "an object"),
    "timesteps": (list, "two numbers"),
}


def check_names(objectives: Mapping[str, Objective]) -> None:
    """Check the objectives of one pipeline.

    Raises:
        ValueError: There are none, a name is not a string or blank, or a value is not an
            `Objective`.
    """
    if not isinstance(objectives, Mapping):
        raise ValueError(f"objectives must map names to Objectives, got {objectives!r:.80}")
    if not objectives:
        raise ValueError(
            "objectives is empty; give at least one, such as Objective.base() for the base model"
        )
    for name, objective in objectives.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"objective name {name!r} must be a string that is not blank")
        if not isinstance(objective, Objective):
            raise ValueError(f"objective {name!r} must be an Objective, got {objective!r}")


def parse_objectives(text: str | bytes, origin: str | Path) -> dict[str, Objective]:
    """Read the objectives in `objectives.json`, of the folder or hub repository `origin`.

    Raises:
        ValueError: The text is not a JSON object of objects, has a field unknown to `Objective` or
            of another type, or names a place outside `origin`.
    """
    where = f"{OBJECTIVES_FILE} of {origin}"
    try:
        entries = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise ValueError(f"{where} must map names to objects, got {text[:80]!r}")
    objectives = {}
    for name, entry in entries.items():
        if name == NAMELESS:
            continue
        if unknown := set(entry) - set(_FIELDS):
            raise ValueError(
                f"{where}: objective {name!r} has unknown field {sorted(unknown)[0]!r}; "
                f"known: {', '.join(_FIELDS)}"
            )
        try:
            for field, value in entry.items():
                _check_type(field, value)
            if (noise := entry.get("noise")) is not None:
                entry = {**entry, "noise": noise_from_json(noise)}
            objectives[name] = inside(Objective(**entry), origin)
        except ValueError as error:
            raise type(error)(f"{where}: objective {name!r}: {error}") from error
    check_names(objectives)
    return objectives


def _check_type(field: str, value: object) -> None:
    if value is None and field not in ("eta", "scale"):
        return
    kind, meaning = _KINDS.get(field, (str, "a text"))
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{field} must be {meaning}, got {value!r:.80}")


def inside(objective: Objective, origin: str | Path) -> Objective:
    """Resolve what an objective names within the folder or repository `origin`.

    Symbolic links count where they lead; the hub's cache has links from `snapshots` to its `blobs`.

    Raises:
        ValueError: It lies outside.
    """
    parts = (objective.source or objective.unet, objective.subfolder, objective.weight_name)
    place = PurePosixPath(*(str(part) for part in parts if part is not None))
    outside = place.is_absolute() or PureWindowsPath(place).drive or ".." in _parts(place)
    if not outside and isinstance(origin, Path):
        folder = origin.resolve()
        if folder.parent.name == "snapshots":
            folder = folder.parent.parent
        outside = not (origin / place).resolve().is_relative_to(folder)
    if outside:
        raise ValueError(
            f"{str(place)!r} lies outside this folder; put the adapter inside, or name it with "
            "objectives= instead"
        )
    return _resolved(objective, origin)


def _parts(place: PurePosixPath) -> tuple[str, ...]:
    return PureWindowsPath(place).parts  # with backslashes, too


def _resolved(objective: Objective, origin: str | Path) -> Objective:
    if isinstance(origin, Path):
        if objective.source is not None:
            return replace(objective, source=str(origin / str(objective.source)))
        if isinstance(objective.unet, str):
            return replace(objective, unet=str(origin / objective.unet))
        return objective
    place = objective.source if objective.source is not None else objective.unet
    if place is None:
        return objective
    subfolder = "/".join(filter(None, (str(place), objective.subfolder)))
    if objective.source is not None:
        return replace(objective, source=origin, subfolder=subfolder)
    return replace(objective, unet=origin, subfolder=subfolder)


def dump_objectives(
    objectives: Mapping[str, Objective],
    places: Mapping[str, str],
    accelerator: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of `objectives.json`.

    Args:
        objectives: By name, in order.
        places: Paths of adapters and networks, by name.
        accelerator: Entry of the one that all adapters include, with their scales; None: none.
    """
    entries: dict[str, dict[str, Any]] = {}
    for name, objective in objectives.items():
        entry: dict[str, Any] = {"eta": objective.eta}
        if name in places:
            entry["unet" if objective.unet is not None else "source"] = places[name]
        if objective.noise is not None:
            entry["noise"] = noise_to_json(objective.noise)
        if objective.timesteps is not None:
            entry["timesteps"] = list(objective.timesteps)
        if accelerator is None and (scale := adapter_scale(objective)) != 1.0:
            entry["scale"] = scale
        if objective.guidance_scale is not None:
            entry["guidance_scale"] = objective.guidance_scale
        entries[name] = entry
    if accelerator is not None:
        entries[NAMELESS] = dict(accelerator)
    return json.dumps(entries, indent=2) + "\n"

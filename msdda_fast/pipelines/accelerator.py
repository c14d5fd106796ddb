# SPDX-License-Identifier: Apache-2.0
"""An accelerator: an adapter that lets the base, and with it every objective, take few steps.

It joins the adapters of every objective, and the base's, which stands in for objectives outside of
their timesteps and at strength 0. A model that ships with one says so in its `manifest.json`:

    "accelerator": {"source": "accelerator", "scheduler": "LCMScheduler", "steps": 4}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from diffusers import LCMScheduler, TCDScheduler

from msdda_fast.adapters.sources import adapter_files, hub_options, model_file
from msdda_fast.errors import AdapterMismatch
from msdda_fast.files import read_json
from msdda_fast.integers import as_integer
from msdda_fast.objective import Objective
from msdda_fast.pipelines.manifest import NAMELESS, OBJECTIVES_FILE, inside

__all__ = [
    "ACCELERATOR_FOLDER",
    "MANIFEST",
    "OWN",
    "Accelerator",
    "few_step_scheduler",
    "find_accelerator",
    "guided",
    "joined_accelerator",
    "parse_accelerator",
]

OWN = "own"
MANIFEST = "manifest.json"
ACCELERATOR_FOLDER = "accelerator"  # in folders that are written here
_SCHEDULERS = {kind.__name__: kind for kind in (LCMScheduler, TCDScheduler)}


@dataclass(frozen=True, slots=True)
class Accelerator:
    """An adapter for few steps, and how it is sampled.

    Attributes:
        source: LoRA file, folder or hub id.
        subfolder: Folder inside `source`.
        scheduler: Class that it was made for, "LCMScheduler" or "TCDScheduler"; flow models keep
            theirs.
        steps: T that it was made for, and the default of calls.
        guidance_scale: Of every objective, unless the call says otherwise: 1, since guidance is
            part of what such adapters learn.

    Raises:
        ValueError: A value that is none of these.
    """

    source: str | Path
    subfolder: str | None = None
    scheduler: str = LCMScheduler.__name__
    steps: int = 4
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        self.as_objective()  # checks source and guidance
        if self.scheduler not in _SCHEDULERS:
            raise ValueError(
                f"accelerator: scheduler must be {' or '.join(_SCHEDULERS)}, got "
                f"{self.scheduler!r:.80}"
            )
        if (steps := as_integer(self.steps)) is None or steps < 1:
            raise ValueError(f"accelerator: steps must be a positive integer, got {self.steps!r}")

    def as_objective(self) -> Objective:
        """The place of its file, as an objective names one."""
        return Objective(self.source, subfolder=self.subfolder, guidance_scale=self.guidance_scale)

    def file(self, options: Mapping[str, Any]) -> Path:
        """Return the local safetensors file, downloaded if needed; errors as `adapter_files`."""
        return adapter_files(self.as_objective(), options)[0]

    def to_json(self, source: str) -> dict[str, Any]:
        """Return what `parse_accelerator` reads, with another source, inside of a folder."""
        entry = asdict(replace(self, source=source))
        del entry["subfolder"]
        return entry


def parse_accelerator(entry: object, origin: str | Path, where: str) -> Accelerator:
    """Read an accelerator of the folder or hub repository `origin`; `where` starts messages.

    Raises:
        ValueError: It is no object with these fields, or its source lies outside of `origin`.
    """
    known = [field.name for field in fields(Accelerator)]
    if not isinstance(entry, dict) or "source" not in entry or set(entry) - set(known):
        raise ValueError(f"{where}: accelerator must be an object of {known}, got {entry!r:.80}")
    try:
        found = Accelerator(**entry)
        place = inside(found.as_objective(), origin)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return replace(found, source=place.sources[0], subfolder=place.subfolder)


def joined_accelerator(objectives: Path, place: Path | str) -> Accelerator | None:
    """Return the accelerator that the objectives of a saved pipeline include; None: none.

    Args:
        objectives: Its `objectives.json`, which `parse_objectives` has read.
        place: Folder or hub id of the model.

    Raises:
        ValueError: The entry is damaged.
    """
    entry = json.loads(objectives.read_bytes()).get(NAMELESS)
    if entry is None:
        return None
    return parse_accelerator(entry, place, f"{OBJECTIVES_FILE} of {place}")


def find_accelerator(
    given: str | Path, place: Path | str, options: Mapping[str, Any]
) -> Accelerator:
    """Return the accelerator that `from_pretrained` is asked for.

    Args:
        given: LoRA file, folder, hub id (with a folder inside: owner/name/folder), or "own": the
            one that the model ships with.
        place: Folder or hub id of the model.
        options: Of `from_pretrained`.

    Raises:
        AdapterMismatch: The model has none of its own.
        ValueError: `given` is no name, or the model's manifest is damaged.
        FileNotFoundError: There is no such file, folder or repository.
    """
    if given == OWN:
        return _own(place, options)
    if not isinstance(given, (str, Path)) or not str(given):
        raise ValueError(f"accelerator must be a file, folder, hub id or 'own', got {given!r:.80}")
    found = Accelerator(given)
    if isinstance(given, str) and given.count("/") > 1 and not Path(given).expanduser().exists():
        owner, name, folder = given.split("/", 2)
        if owner and owner not in (".", "..", "~"):
            found = Accelerator(f"{owner}/{name}", folder)
    words = re.split(r"[^a-z0-9]+", f"{given} {found.file(hub_options(options)).name}".lower())
    made_for = TCDScheduler if "tcd" in words else LCMScheduler
    return replace(found, scheduler=made_for.__name__)


def _own(place: Path | str, options: Mapping[str, Any]) -> Accelerator:
    for name, key in ((MANIFEST, "accelerator"), (OBJECTIVES_FILE, NAMELESS)):
        file = model_file(place, name, options, required=False)
        listed = {} if file is None else read_json(file, "a model's manifest")
        if key in listed:
            return parse_accelerator(listed[key], place, f"{name} of {place}")
    raise AdapterMismatch(
        f"accelerator='{OWN}': {place} ships with none (its {MANIFEST} names no accelerator); give "
        "a LoRA file, folder or hub id"
    )


def guided(
    objectives: Mapping[str, Objective], accelerator: Accelerator, *, keep: bool
) -> dict[str, Objective]:
    """Return the objectives with the accelerator's guidance scale; `keep` those that have one."""
    scale = accelerator.guidance_scale
    return {
        name: objective
        if keep and objective.guidance_scale is not None
        else replace(objective, guidance_scale=scale)
        for name, objective in objectives.items()
    }


def few_step_scheduler(scheduler: Any, accelerator: Accelerator) -> Any:  # noqa: ANN401
    """Return the scheduler that the accelerator was made for; that of a flow model as it is."""
    config = scheduler.config
    flows = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    if flows or "Flow" in type(scheduler).__name__:
        return scheduler
    return _SCHEDULERS[accelerator.scheduler].from_config(config)

# SPDX-License-Identifier: Apache-2.0
"""What a stock pipeline with objectives knows of them, beside how to run them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

from diffusers import DiffusionPipeline
from torch import nn

from msdda_fast.adapters.variant import AdapterSet
from msdda_fast.engine.graph import Capture
from msdda_fast.objective import Objective
from msdda_fast.pipelines.accelerator import Accelerator
from msdda_fast.pipelines.attach_files import networks_of, save_objectives
from msdda_fast.pipelines.in_parallel import ParallelMethods
from msdda_fast.pipelines.row_hook import RowHook

__all__ = ["HeldObjectives"]


class HeldObjectives(ParallelMethods):
    """The objectives of a pipeline, their adapters, and how to save or drop them."""

    stock_class: type[DiffusionPipeline]
    _objectives: dict[str, Objective]
    _sets: dict[str, AdapterSet]
    _hooks: dict[str, RowHook]
    _accelerator: Accelerator | None
    _base_set: AdapterSet
    _capture: Capture

    @property
    def objectives(self) -> dict[str, Objective]:
        """The objectives by name, in the order of the columns of `weights`."""
        return dict(self._objectives)

    @property
    def adapter_sets(self) -> dict[str, AdapterSet]:
        """The adapters of each objective, by their names in peft, with factors on their updates."""
        return dict(self._sets)

    @property
    def accelerator(self) -> Accelerator | None:
        """The adapter for few steps that all objectives and the base include; None: none."""
        return self._accelerator

    @property
    def base_set(self) -> AdapterSet:
        """The adapters of the base, which stands in for objectives where they do not act."""
        return self._base_set

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # noqa: ANN401
        """Write a folder of the stock class, with the objectives beside it.

        The base is written without its adapters, so stock diffusers loads the folder too; adapters
        go to `objectives/<name>/`, several of one objective as one, and `objectives.json` lists
        them. A failed save does not change the folder.

        Args:
            save_directory: Made if missing; files of an earlier save are replaced.
            options: As in diffusers.

        Raises:
            AdapterMismatch: An adapter is no plain LoRA.
        """
        save_objectives(self, Path(save_directory), **options)

    def detach(self) -> DiffusionPipeline:
        """Return the stock pipeline, on the same networks and scheduler."""
        stock = copy.copy(self)
        stock.__class__ = self.stock_class
        for name in ("_objectives", "_sets", "_hooks", "_accelerator", "_base_set", "_capture"):
            del stock.__dict__[name]
        del stock.__dict__["_parallel"]
        return stock

    def set_forward(self, *, capture: Capture = "auto") -> None:
        """Choose how the denoisers run for several objectives in later calls.

        Args:
            capture: Whether to capture them as graphs, one per shape of arguments: "auto" where the
                device has graphs, with a warning if that fails; "required" (or raise); "off".

        Raises:
            ValueError: `capture` is unknown.
        """
        if capture not in get_args(Capture):
            raise ValueError(f"capture must be one of {get_args(Capture)}, got {capture!r}")
        self._capture = capture
        self._hooks.clear()

    def shared_networks(self) -> list[nn.Module]:
        """The networks that a call hooks; threads that use one of them wait for each other."""
        return list(networks_of(self).values())

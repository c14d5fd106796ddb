# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and logs of the training runs: written atomically, resumed exactly."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from msdda_fast import resume
from msdda_fast.files import write_atomically
from msdda_fast.training.log import read_rows
from msdda_fast.training.storage import canonical

CHECKPOINT_EVERY = 100  # steps


class Stateful(Protocol):
    """A module, an optimizer or a schedule."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...  # noqa: ANN401 - ignored


class Checkpoint:
    """The state of named parts (anything with `state_dict`) in one file.

    Args:
        path: The file.
        settings: What the state depends on, as JSON values.
        parts: Modules, optimizers and schedules.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], **parts: Stateful) -> None:
        self._path = path
        self._settings = resume.mark(settings)
        self._parts = parts

    def save_when_due(self, finished: int, of: int) -> None:
        """Write the state after every `CHECKPOINT_EVERY`-th and the last step, atomically."""
        if finished % CHECKPOINT_EVERY and finished != of:
            return
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        state = {"step": finished, "settings": self._settings, **parts}
        write_atomically(self._path, lambda partial: torch.save(canonical(state), partial))

    def restore(self) -> int:
        """Load the state if there is one and return the number of finished steps.

        Raises:
            ResumeMismatch: It is of a run with other settings.
        """
        if not self._path.is_file():
            return 0
        state = torch.load(self._path, weights_only=True)
        resume.require_same(self._path, state.get("settings"), self._settings)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        return int(state["step"])


class TrainingLog:
    """One JSON line per `every` steps: step, seconds spent, and the mean of each quantity."""

    def __init__(self, path: Path, start: int = 0, every: int = 20) -> None:
        # Steps after the checkpoint are done again, so their lines would stand twice.
        kept = [row for row in read_rows(path) if row["step"] <= start]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(path, lambda partial: partial.write_text(text))
        self._path, self._every = path, every
        self._seconds = kept[-1]["seconds"] if kept else 0.0
        self._tick, self._values = time.monotonic(), dict[str, list[float]]()

    def add(self, step: int, **values: torch.Tensor | float) -> None:
        """Record one step, counted from 0."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(float(torch.as_tensor(value).detach()))
        if (step + 1) % self._every == 0:
            now = time.monotonic()
            self._seconds, self._tick = self._seconds + now - self._tick, now
            means = {name: round(sum(v) / len(v), 5) for name, v in self._values.items()}
            line = {"step": step + 1, "seconds": round(self._seconds, 1), **means}
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._values.clear()

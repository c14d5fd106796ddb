# SPDX-License-Identifier: Apache-2.0
"""The scores of a comparison: one row per image, in one CSV file that only ever grows.

A file whose name ends in .gz is compressed, as committed results are.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msdda_fast.files import write_atomically

__all__ = ["COSTS", "Score", "merge_scores", "read_scores", "scores_file", "write_scores"]

_KEY = ("method", "variant", "w", "weights", "steps", "prompt", "seed")
COSTS = ("unet_forwards", "unet_backwards", "decodes", "reward_calls")


@dataclass(frozen=True, slots=True)
class Score:
    """The scores of one image.

    Attributes:
        method, variant: The system that drew it.
        w: Weight of the first objective; None: the system has no weights.
        weights: All weights, "name=value" in order; empty: the system has none.
        steps: T.
        prompt, seed: What the image was drawn from.
        rewards: By name, in the rewards' units.
        seconds: Time of its batch, per image.
        costs: By the names of `COSTS`, per image.
    """

    method: str
    variant: str
    w: float | None
    weights: str
    steps: int
    prompt: str
    seed: int
    rewards: Mapping[str, float]
    seconds: float
    costs: Mapping[str, float]

    @property
    def key(self) -> tuple[object, ...]:
        """The columns that identify a row."""
        return tuple(getattr(self, name) for name in _KEY)


def scores_file(folder: Path) -> Path:
    """Return where the scores of a comparison are: scores.csv.gz if it exists, else scores.csv."""
    compressed = folder / "scores.csv.gz"
    return compressed if compressed.exists() else folder / "scores.csv"


def read_scores(file: Path) -> list[Score]:
    """Read all rows.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A column is missing, or a value is not a number; the message names the line.
    """
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        columns = reader.fieldnames or []
        needed = (*_KEY, "seconds", *COSTS)
        if missing := [name for name in needed if name not in columns]:
            raise ValueError(f"{file} has no column {', '.join(missing)}: not a file of scores")
        rewards = [name for name in columns if name not in needed]
        rows = []
        for row in reader:
            try:
                if None in (*row, *row.values()):
                    raise ValueError("expected one value for each column")
                rows.append(_parse(row, rewards))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}, line {reader.line_num}: {error}") from error
        return rows


def merge_scores(file: Path, new: Iterable[Score]) -> list[Score]:
    """Add rows to a file, created if missing; rows with the same key are replaced.

    Returns: all rows, in the order of the file: by system, weights, prompt and seed.
    """
    merged = {row.key: row for row in (read_scores(file) if file.exists() else [])}
    merged |= {row.key: row for row in new}
    return write_scores(file, merged.values())


def write_scores(file: Path, rows: Iterable[Score]) -> list[Score]:
    """Replace a file by one with these rows, and return them in its order."""
    ordered = sorted(rows, key=_order)
    data = _to_csv(ordered).encode()
    if file.suffix == ".gz":
        data = gzip.compress(data, mtime=0)  # the same rows make the same file
    write_atomically(file, lambda partial: partial.write_bytes(data))
    return ordered


def _order(row: Score) -> tuple[object, ...]:
    w = -1.0 if row.w is None else row.w
    return (row.method, row.variant, w, row.weights, row.steps, row.prompt, row.seed)


def _parse(row: Mapping[str, str], rewards: Sequence[str]) -> Score:
    return Score(
        method=row["method"],
        variant=row["variant"],
        w=float(row["w"]) if row["w"] else None,
        weights=row["weights"],
        steps=int(row["steps"]),
        prompt=row["prompt"],
        seed=int(row["seed"]),
        rewards={name: float(row[name]) for name in rewards if row[name]},
        seconds=float(row["seconds"]),
        costs={name: float(row[name]) for name in COSTS},
    )


def _to_csv(rows: Sequence[Score]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.rewards))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_KEY, *names, "seconds", *COSTS])
    for row in rows:
        values = [f"{row.rewards[name]:.5f}" if name in row.rewards else "" for name in names]
        writer.writerow(
            [
                row.method,
                row.variant,
                "" if row.w is None else f"{row.w:g}",
                row.weights,
                row.steps,
                row.prompt,
                row.seed,
                *values,
                f"{row.seconds:.4g}",
                *(f"{row.costs[name]:g}" for name in COSTS),
            ]
        )
    return text.getvalue()

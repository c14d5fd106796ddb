# SPDX-License-Identifier: Apache-2.0
"""Draw and score the images of a comparison, shard by shard; finished shards are never redone.

A shard is one entry and one seed: one image of every prompt.
"""

from __future__ import annotations

import io
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from msdda_fast import resume
from msdda_fast.evaluation.scores import COSTS, Score, scores_file
from msdda_fast.evaluation.settings import comparison_identity, shard_identity, write_json
from msdda_fast.evaluation.shards import (
    Shard,
    cut,
    fingerprints,
    keep,
    pixels_of,
    read_record,
    strip,
)
from msdda_fast.methods.method import Drawn, Method, Pipeline
from msdda_fast.rewards import Reward
from msdda_fast.rewards.checks import check_scores

__all__ = [
    "Comparison",
    "Elsewhere",
    "Entry",
    "collect_scores",
    "draw_shard",
    "run_comparison",
    "strip_of",
]


@dataclass(frozen=True, slots=True)
class Entry:
    """A system at one preference.

    Attributes:
        method: The method with its settings.
        variant: Name of these settings in tables; empty if there is only one variant.
        weights: Preference by objective; the first weight is the paper's w.
        seeds: Seeds of every prompt.
        weighted: Whether the preference matters; if not, the scores omit it.
    """

    method: Method
    variant: str
    weights: Mapping[str, float]
    seeds: Sequence[int]
    weighted: bool = True

    @property
    def w(self) -> float | None:
        """Weight of the first objective; None if the preference does not matter."""
        return next(iter(self.weights.values())) if self.weighted else None

    @property
    def weights_text(self) -> str:
        """All weights as text, as in the scores."""
        if not self.weighted:
            return ""
        return " ".join(f"{name}={weight:g}" for name, weight in self.weights.items())

    @property
    def folder_name(self) -> str:
        """Unique folder name of the method, its settings and the preference."""
        words = f"{self.method.name} {self.variant} {self.weights_text}"
        setting = f"{words} {type(self.method).__name__} {self.method!r}"
        slug = re.sub(r"[^a-z0-9.=]+", "-", words.lower()).strip("-")
        return f"{slug}_{zlib.crc32(setting.encode()):08x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What every entry has in common.

    Args:
        prompts: Distinct prompts.
        rewards: By name; all score every image, and methods see those that have a weight.
        num_inference_steps: T.
        guidance_scale: The scale of every model; None: the objectives' own.
        batch_size: Images per call; None: all prompts of a shard. Whatever shares the batch, the
            noise is the same to the bit and the image to the last rounding.
    """

    prompts: Sequence[str]
    rewards: Mapping[str, Reward]
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts or len(set(self.prompts)) != len(self.prompts):
            raise ValueError(f"prompts must be non-empty and distinct, got {self.prompts}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


#: Draws shards of (entry, seed) in another place, and yields them in any order.
Elsewhere = Callable[[Sequence[tuple[Entry, int]]], Iterable[tuple[tuple[Entry, int], Shard]]]


def run_comparison(
    pipe: Pipeline,
    comparison: Comparison,
    entries: Sequence[Entry],
    folder: Path,
    *,
    part: tuple[int, int] = (0, 1),
    out: Path | None = None,
    elsewhere: Elsewhere | None = None,
    progress: Callable[[int, int], None] = lambda finished, total: None,
) -> None:
    """Draw the missing shards, seed by seed, so that all entries grow together.

    Args:
        pipe: Its objectives are the aligned models.
        comparison: What all entries have in common.
        entries: What to draw.
        folder: Folder of finished shards; a later call continues, or adds entries, seeds and
            rewards without a weight.
        part: (i, n): of n processes that share the folder, this is number i.
        out: Folder of scores from this and earlier calls, bound to the same settings and order of
            objectives.
        elsewhere: Draws shards in place of `pipe`, with the same model.
        progress: Called with the numbers of finished and of all images.

    Raises:
        ResumeMismatch: A folder holds results of another model, prompts, rewards or settings.
        ValueError: A reward cannot score a prompt, or `part` is invalid.
    """
    index, parts = part
    if not 0 <= index < parts:
        raise ValueError(f"part must be (i, n) with 0 <= i < n, got {part}")
    blank = torch.zeros(len(comparison.prompts), 3, 64, 64)
    for reward in comparison.rewards.values():  # found before hours of drawing
        reward(blank, comparison.prompts)
    common = comparison_identity(pipe, comparison)
    of = partial(shard_identity, common, comparison)
    scored_by = {name: resume.named(reward) for name, reward in comparison.rewards.items()}
    shards = list(_shards(folder, entries))
    found = (
        (file, *fingerprints(read_record(file), of(entry, seed), scored_by))
        for entry, seed, file in shards
        if file.exists()
    )
    table = common | {"toward": list(entries[0].weights) if entries else []}
    if out is not None:
        resume.check(out, table, unmarked=[scores_file(out)])
    resume.check(folder, common, results=found)
    count = len(comparison.prompts)
    mine = [shard for number, shard in enumerate(shards) if number % parts == index]
    finished = sum(file.exists() for _, _, file in mine)
    progress(finished * count, len(mine) * count)
    for _, _, file in mine:
        if file.exists():
            _score_again(comparison, file, scored_by)
    missing = [(entry, seed) for entry, seed, file in mine if not file.exists()]
    if elsewhere is None:
        drawn: Iterable[tuple[tuple[Entry, int], Shard]] = (
            ((entry, seed), draw_shard(pipe, comparison, entry, seed)) for entry, seed in missing
        )
    else:
        drawn = elsewhere(missing)
    for (entry, seed), shard in drawn:
        resume.bind(folder, common)
        keep(_file(folder, entry, seed), shard, of(entry, seed), scored_by)
        finished += 1
        progress(finished * count, len(mine) * count)
    resume.bind(folder, common)
    if out is not None:
        resume.bind(out, table)


def collect_scores(
    comparison: Comparison, entries: Sequence[Entry], folder: Path
) -> Iterator[Score]:
    """Yield the scores of all finished shards of these entries."""
    for entry, seed, file in _shards(folder, entries):
        if not file.exists():
            continue
        shard = read_record(file)
        for i, prompt in enumerate(comparison.prompts):
            yield Score(
                method=entry.method.name,
                variant=entry.variant,
                w=entry.w,
                weights=entry.weights_text,
                steps=comparison.num_inference_steps,
                prompt=prompt,
                seed=seed,
                rewards={name: values[i] for name, values in shard["rewards"].items()},
                seconds=shard["seconds"],
                costs=shard["costs"],
            )


def strip_of(folder: Path, entry: Entry, seed: int) -> list[Image.Image]:
    """Return the images of one shard, one per prompt.

    Raises:
        FileNotFoundError: The shard is not finished.
    """
    file = next(file for e, s, file in _shards(folder, [entry]) if s == seed)
    return cut(file, len(read_record(file)["prompts"]))


def _shards(folder: Path, entries: Sequence[Entry]) -> Iterator[tuple[Entry, int, Path]]:
    for seed in sorted({seed for entry in entries for seed in entry.seeds}):
        for entry in entries:
            if seed in entry.seeds:
                yield entry, seed, _file(folder, entry, seed)


def _file(folder: Path, entry: Entry, seed: int) -> Path:
    return folder / "shards" / entry.folder_name / f"seed-{seed:04d}.json"


def draw_shard(pipe: Pipeline, comparison: Comparison, entry: Entry, seed: int) -> Shard:
    """Draw and score one image of every prompt."""
    prompts = list(comparison.prompts)
    size = comparison.batch_size or len(prompts)
    chosen = {n: r for n, r in comparison.rewards.items() if n in entry.weights}
    drawn: list[Drawn] = []
    start = time.perf_counter()
    for at in range(0, len(prompts), size):
        batch = prompts[at : at + size]
        drawn.append(
            entry.method(
                pipe,
                batch,
                entry.weights,
                [seed] * len(batch),
                num_inference_steps=comparison.num_inference_steps,
                guidance_scale=comparison.guidance_scale,
                rewards=chosen,
            )
        )
    seconds = (time.perf_counter() - start) / len(prompts)
    pixels = (255 * torch.cat([d.images for d in drawn]).cpu()).round().to(torch.uint8)
    record: dict[str, Any] = {
        "entry": entry.folder_name,
        "method": repr(entry.method),
        "seed": seed,
        "prompts": prompts,
        "rewards": _score(comparison.rewards, pixels, prompts),
        "seconds": seconds,
        "costs": {n: sum(asdict(d.cost)[n] for d in drawn) / len(prompts) for n in COSTS},
    }
    png = io.BytesIO()
    strip(pixels).save(png, format="PNG")
    return Shard(record, png.getvalue())


def _score_again(comparison: Comparison, file: Path, scored_by: Mapping[str, str]) -> None:
    """Add the rewards that a finished shard lacks."""
    record = read_record(file)
    missing = {n: r for n, r in comparison.rewards.items() if n not in record["rewards"]}
    if not missing:
        return
    prompts = record["prompts"]
    record["rewards"] |= _score(missing, pixels_of(file, len(prompts)), prompts)
    record["scored_by"] |= {name: scored_by[name] for name in missing}
    write_json(file, record)


@torch.no_grad()
def _score(
    rewards: Mapping[str, Reward], pixels: Tensor, prompts: Sequence[str]
) -> dict[str, list[float]]:
    images = pixels.float() / 255
    return {
        name: check_scores(name, reward(images, prompts), prompts).tolist()
        for name, reward in rewards.items()
    }

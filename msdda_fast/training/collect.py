# SPDX-License-Identifier: Apache-2.0
"""Sample a policy over prompts x seeds and score the images; finished shards survive a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from msdda_fast import resume
from msdda_fast.errors import InvalidShape
from msdda_fast.rewards import Reward
from msdda_fast.rewards.checks import check_scores
from msdda_fast.training.checkpoint import load_tensors, read_header
from msdda_fast.training.storage import write_tensors

MANIFEST_NAME = "collection.json"
_SCORE = "score."
_MARK = "settings"  # key of the fingerprint in a shard's metadata

SampleFn = Callable[[Sequence[str], Sequence[int]], tuple[Tensor, Tensor]]
"""b prompts and b seeds -> clean latents (b, C, H, W), images (b, 3, height, width) in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """A function that draws samples, with what they depend on besides prompts and seeds.

    Attributes:
        draw: The function.
        settings: JSON values: the model (see `model_identity`), steps, guidance.
    """

    draw: SampleFn
    settings: Mapping[str, Any]

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw samples."""
        return self.draw(prompts, seeds)


@dataclass(frozen=True, slots=True)
class Collection:
    """N scored samples, ordered by prompt and then by seed."""

    latents: Tensor  # x_0, (N, C, H, W) float32, as `sample_fn` gave them
    prompt_index: Tensor  # (N,) int64, position in the list of prompts
    seeds: Tensor  # (N,) int64
    scores: dict[str, Tensor]  # per reward (N,) float32, in the reward's units


def collect(
    sample_fn: SampleFn,
    rewards: Mapping[str, Reward],
    prompts: Sequence[str],
    seeds: Sequence[int],
    out_dir: str | Path,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> Collection:
    """Sample every prompt with every seed, score the images by every reward, keep the latents.

    Each batch becomes one shard file, written atomically; called again with the same arguments
    after a kill, it samples only the missing shards. A finished folder is only read.

    Args:
        sample_fn: Draws x_0 from the policy, for prompts and seeds of equal length up to
            `batch_size`; equal calls should give equal samples. Of a `Sampler` the settings are
            kept and compared; other functions are taken for the same whenever they are called.
        rewards: By name; each gets images in [0, 1] and their prompts.
        prompts, seeds: Without repetition; N = len(prompts) * len(seeds).
        out_dir: One folder per policy; created if missing.
        batch_size: Rows per call and shard.
        progress: Show a progress bar with the time left.

    Raises:
        ValueError: Prompts, seeds or rewards are empty or repeat, the batch size is below 1, images
            are outside [0, 1], or a value is not finite.
        InvalidShape: `sample_fn` or a reward returned the wrong number of rows.
        ResumeMismatch: `out_dir` holds samples of other settings, prompts, seeds, rewards or
            batches.
    """
    out_dir = Path(out_dir)
    for name, values in (("prompts", prompts), ("seeds", seeds), ("rewards", list(rewards))):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name} must be non-empty and without repetition, got {values}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    manifest = {
        **(sample_fn.settings if isinstance(sample_fn, Sampler) else {}),
        "batch_size": batch_size,
        "seeds": list(seeds),
        "prompts": list(prompts),
        "rewards": {name: resume.named(reward) for name, reward in rewards.items()},
    }
    jobs = [(index, seed) for index in range(len(prompts)) for seed in seeds]
    starts = range(0, len(jobs), batch_size)
    shards = [out_dir / f"shard-{number:05d}.safetensors" for number in range(len(starts))]
    kept = ((shard, _mark(shard), manifest) for shard in shards if shard.is_file())
    resume.check(out_dir, manifest, record=MANIFEST_NAME, results=kept)
    missing = [(shard, at) for shard, at in zip(shards, starts, strict=True) if not shard.is_file()]
    terminal = Console(stderr=True)
    for shard, at in track(missing, "collecting", console=terminal, disable=not progress):
        batch = jobs[at : at + batch_size]
        tensors = _sample_and_score(sample_fn, rewards, prompts, batch)
        resume.bind(out_dir, manifest, record=MANIFEST_NAME)
        write_tensors(shard, tensors, {_MARK: json.dumps(resume.mark(manifest))})
    resume.bind(out_dir, manifest, record=MANIFEST_NAME)
    return _read(shards, list(rewards))


def load_collection(out_dir: str | Path) -> Collection:
    """Read a finished collection.

    Raises:
        FileNotFoundError: `out_dir` has no collection, or an unfinished one (call `collect` again).
    """
    out_dir = Path(out_dir)
    manifest = json.loads((out_dir / MANIFEST_NAME).read_text())
    rows = len(manifest["prompts"]) * len(manifest["seeds"])
    count = -(-rows // manifest["batch_size"])
    shards = [out_dir / f"shard-{number:05d}.safetensors" for number in range(count)]
    return _read(shards, list(manifest["rewards"]))


def _mark(shard: Path) -> dict[str, Any] | None:
    """Return the fingerprint that a shard carries."""
    text = read_header(shard).get(_MARK)
    return None if text is None else json.loads(text)


@torch.no_grad()
def _sample_and_score(
    sample_fn: SampleFn,
    rewards: Mapping[str, Reward],
    prompts: Sequence[str],
    batch: Sequence[tuple[int, int]],
) -> dict[str, Tensor]:
    texts = [prompts[index] for index, _ in batch]
    latents, images = sample_fn(texts, [seed for _, seed in batch])
    for name, tensor in (("latents", latents), ("images", images)):
        if tensor.dim() != 4 or tensor.shape[0] != len(batch):
            raise InvalidShape(
                f"sample_fn must return {name} (b, C, H, W) with b = {len(batch)}, "
                f"got {tuple(tensor.shape)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"sample_fn returned {name} with NaN or infinite values")
    low, high = images.min().item(), images.max().item()
    if low < 0.0 or high > 1.0:
        raise ValueError(f"sample_fn must return images in [0, 1], got values in [{low}, {high}]")
    tensors = {
        "latents": latents.float().cpu().contiguous(),
        "prompt_index": torch.tensor([index for index, _ in batch]),
        "seed": torch.tensor([seed for _, seed in batch]),
    }
    for name, reward in rewards.items():
        scores = check_scores(name, reward(images, texts), texts)
        tensors[_SCORE + name] = scores.float().cpu().contiguous()
    return tensors


def _read(shards: Sequence[Path], rewards: Sequence[str]) -> Collection:
    parts = [load_tensors(shard) for shard in shards]

    def column(name: str) -> Tensor:
        return torch.cat([part[name] for part in parts])

    return Collection(
        column("latents"),
        column("prompt_index"),
        column("seed"),
        {name: column(_SCORE + name) for name in rewards},
    )

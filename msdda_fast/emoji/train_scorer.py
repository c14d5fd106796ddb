# SPDX-License-Identifier: Apache-2.0
"""Train the two scorers: the consistency reward, and the judge that nothing is optimised against.

They share no weights, seed, architecture or set of sprites. The twemoji style is held out from both
and from the base model; it measures their accuracy on drawings that they have never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from msdda_fast import resume
from msdda_fast.emoji.architectures import Autoencoder
from msdda_fast.emoji.checkpoint import Checkpoint, TrainingLog
from msdda_fast.emoji.precision import fast_autocast
from msdda_fast.emoji.render import Jitter, Renderer
from msdda_fast.emoji.train_vae import random_scenes
from msdda_fast.rewards.consistency import Scorer, regions
from msdda_fast.rewards.grammar import COLORS, OBJECTS, Painted
from msdda_fast.rewards.judge import named_right

HELD_OUT_STYLE = "twemoji"
WIDE = Jitter(single=(0.6, 0.95), pair=(0.40, 0.54), shift=0.04, rotation=12, flip=0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerRecipe:
    """The settings in which the scorers differ."""

    name: str
    styles: tuple[str, ...]
    widths: tuple[int, ...]
    residual: bool
    seed: int

    def build(self) -> Scorer:
        """Return the untrained network."""
        torch.manual_seed(self.seed)
        return Scorer(self.widths, residual=self.residual)


CONSISTENCY = ScorerRecipe(
    name="consistency", styles=("noto", "fluentflat", "fluent"),
    widths=(24, 48, 80, 112), residual=False, seed=11,
)  # fmt: skip
JUDGE = ScorerRecipe(
    name="judge", styles=("noto", "fluentflat", "noto-v1"),
    widths=(32, 64, 96, 96), residual=True, seed=23,
)  # fmt: skip


def train_scorer(
    recipe: ScorerRecipe, vae: Autoencoder, work: Path, *, steps: int = 1000, batch: int = 64
) -> Scorer:
    """Train a scorer on its own renders; resumes from `work/<name>.pt`."""
    scorer = recipe.build()
    renderer = Renderer(recipe.styles, WIDE)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    settings = {
        **asdict(recipe), "steps": steps, "batch": batch, "autoencoder": resume.digest(vae),
        "scenes": resume.digest(renderer),
    }  # fmt: skip
    checkpoint = Checkpoint(
        work / f"{recipe.name}.pt", settings, model=scorer, optimizer=optimizer, schedule=schedule
    )
    log = TrainingLog(work / f"{recipe.name}.jsonl", start := checkpoint.restore())
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_000 + step)
        scenes = random_scenes(batch, generator)
        images = augment(renderer(scenes, generator), vae, generator)
        with fast_autocast():
            logits = scorer(images)
        loss = naming_loss(logits, scenes)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        log.add(step, loss=loss)
        checkpoint.save_when_due(step + 1, steps)
    return scorer.eval()


@torch.no_grad()
def augment(images: Tensor, vae: Autoencoder, generator: torch.Generator) -> Tensor:
    """Make renders resemble generated images: half pass the autoencoder, all get noise and tint."""
    count = len(images)
    through = torch.rand(count, generator=generator) < 0.5
    with fast_autocast():
        latents = vae.encode(2 * images[through] - 1).latents
        latents = latents + 0.15 * torch.randn(latents.shape, generator=generator)
        images[through] = (vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)
    gain = 1 + 0.1 * torch.randn(count, 3, 1, 1, generator=generator)
    noise = 0.03 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = noise * torch.randn(images.shape, generator=generator)
    return (images * gain + noise).clamp(0, 1)


def naming_loss(
    logits: dict[str, tuple[Tensor, Tensor]], scenes: Sequence[Sequence[Painted]]
) -> Tensor:
    """Cross-entropy of object and colour in every region that holds exactly one object."""
    total = torch.zeros(())
    for region, (objects, colors) in logits.items():
        named = [(n, thing) for n, s in enumerate(scenes) for r, thing in regions(s) if r == region]
        if not named:
            continue
        rows = torch.tensor([n for n, _ in named])
        object_ids = torch.tensor([OBJECTS.index(thing.object) for _, thing in named])
        color_ids = torch.tensor([COLORS.index(thing.color or "") for _, thing in named])
        total = total + F.cross_entropy(objects[rows].float(), object_ids, label_smoothing=0.02)
        total = total + F.cross_entropy(colors[rows].float(), color_ids, label_smoothing=0.02)
    return total


def held_out_accuracy(scorer: Scorer, styles: Sequence[str], count: int = 2000) -> dict[str, float]:
    """Measure object and colour accuracy on fresh renders of the given sprite sets."""
    generator = torch.Generator().manual_seed(99)
    renderer = Renderer(styles)
    objects = tuple(name for name in OBJECTS if renderer.has(name))
    verdicts = []
    for _ in range(count // 100):
        scenes = random_scenes(100, generator, objects)
        for scene in named_right(scorer, renderer(scenes, generator), scenes):
            verdicts += scene
    return {
        "object": sum(v[0] for v in verdicts) / len(verdicts),
        "color": sum(v[1] for v in verdicts) / len(verdicts),
        "n": len(verdicts),
    }

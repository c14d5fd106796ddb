# SPDX-License-Identifier: Apache-2.0
"""Text-image consistency: is each object of the prompt present, in its colour, on its side?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from msdda_fast.assets import ASSETS
from msdda_fast.rewards.checks import check_images
from msdda_fast.rewards.grammar import COLORS, OBJECTS, Painted, parse

REGIONS = ("whole", "left", "right")


class Scorer(nn.Module):
    """A small convolutional network that classifies object and colour in an image and its halves.

    Args:
        widths: Channels of the four stages, each of which halves the image side.
        residual: Add a residual convolution to each stage.
    """

    def __init__(
        self, widths: Sequence[int] = (24, 48, 80, 112), *, residual: bool = False
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for before, after in zip((3, *widths[:-1]), widths, strict=True):
            stages += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
            if residual:
                stages.append(_Residual(after))
        self.trunk = nn.Sequential(*stages)
        self.object = nn.ModuleDict({r: nn.Linear(2 * widths[-1], len(OBJECTS)) for r in REGIONS})
        self.color = nn.ModuleDict({r: nn.Linear(2 * widths[-1], len(COLORS)) for r in REGIONS})

    def forward(self, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Map images, (N, 3, 64, 64) in [0, 1], to {region: (object logits, color logits)}."""
        features = self.trunk(2 * images - 1)
        half = features.shape[-1] // 2
        crops = {"whole": features, "left": features[..., :half], "right": features[..., half:]}
        logits = {}
        for region, crop in crops.items():
            pooled = torch.cat([crop.mean((2, 3)), crop.amax((2, 3))], 1)
            logits[region] = (self.object[region](pooled), self.color[region](pooled))
        return logits


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width // 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(F.silu(self.norm(x)))
        return out


def regions(things: Sequence[Painted]) -> list[tuple[str, Painted]]:
    """Return each object of a prompt with the region where it is expected."""
    names = ("whole",) if len(things) == 1 else ("left", "right")
    return list(zip(names, things, strict=True))


def readable(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, list[list[Painted]]]:
    """Return the input of a scorer: images (N, 3, 64, 64) in float32, and every prompt's objects.

    Raises:
        InvalidShape: The images have the wrong shape, or not one prompt each.
        ValueError: A prompt is outside the grammar.
    """
    check_images(images, prompts)
    scenes = [list(parse(prompt)) for prompt in prompts]
    images = images.float()
    if images.shape[-2:] != (64, 64):
        images = F.interpolate(images, (64, 64), mode="bilinear", antialias=True)
    return images, scenes


class Consistency:
    """r = 1 + 0.77 max(mean of log p, -5.2) in [-3, 1]; pure chance gives about -1.

    log p is the mean log-probability of the named colours and objects. The scorer sees 64x64
    images; other sizes are resampled.

    Args:
        scorer: A trained `Scorer`.
    """

    name = "consistency"
    differentiable = True

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path = ASSETS / "scorers" / "consistency.safetensors") -> Consistency:
        """Load the shipped scorer."""
        scorer = Scorer()
        scorer.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        return cls(scorer)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images, shape (N, 3, H, W) in [0, 1], against prompts of the grammar.

        Raises:
            InvalidShape: The images have the wrong shape, or not one prompt each.
            ValueError: A prompt is outside the grammar.
        """
        images, scenes = readable(images, prompts)
        scorer = self._scorer.to(images.device)
        log_p = {
            region: tuple(logits.log_softmax(-1) for logits in pair)
            for region, pair in scorer(images).items()
        }
        rows = []
        for n, things in enumerate(scenes):
            terms = []
            for region, thing in regions(things):
                objects, colors = log_p[region]
                terms.append(objects[n, OBJECTS.index(thing.object)])
                if thing.color is not None:
                    terms.append(colors[n, COLORS.index(thing.color)])
            rows.append(torch.stack(terms).mean())
        return 1 + 0.77 * torch.stack(rows).clamp_min(-5.2)

# SPDX-License-Identifier: Apache-2.0
"""Adapters of the MORL oracle: one for each preference, trained on r_w = w r_1 + (1 - w) r_2.

`python -m msdda_fast.emoji.oracle` trains those for w = 0.2 and 0.5 (r_1 is consistency, r_2
aesthetic) as the shipped adapters were trained, and puts them into `benchmarks/results/oracle`; the
same command resumes. w = 0 and w = 1 are the shipped adapters.

Choice of eta: the fused step of two objectives has variance eta_w^2 v_t, as does the base policy
that it is tied to, the product of the objectives' own. So an oracle is trained and sampled at eta_w
(`oracle_eta`); otherwise it would differ from the fused model by its noise, not its reward.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from msdda_fast.assets import resolve
from msdda_fast.emoji.align import ALIGNMENT, TIMESTEPS, AlignmentRecipe, align_sum
from msdda_fast.files import write_atomically

WEIGHTED, OTHER = "consistency", "aesthetic"  # w weighs the first, as in the paper
PREFERENCES = (0.2, 0.5)


def oracle_eta(w: float) -> float:
    """Return eta_w = (w / eta_1^2 + (1 - w) / eta_2^2)^(-1/2), at which an oracle is sampled."""
    first, second = ALIGNMENT[WEIGHTED].eta, ALIGNMENT[OTHER].eta
    return math.sqrt(1 / (w / first**2 + (1 - w) / second**2))


def oracle_recipe(w: float) -> AlignmentRecipe:
    """Return the recipe interpolated between those of the two adapters.

    Raises:
        ValueError: w is outside [0, 1].
    """
    if not 0 <= w <= 1:
        raise ValueError(f"w must lie in [0, 1], got {w}")
    first, second = ALIGNMENT[WEIGHTED].config, ALIGNMENT[OTHER].config
    config = replace(
        first,
        level=oracle_eta(w),
        steps=round(w * first.steps + (1 - w) * second.steps),
        lr=w * first.lr + (1 - w) * second.lr,
        kl_weight=w * first.kl_weight + (1 - w) * second.kl_weight,
    )
    return AlignmentRecipe(config=config)


def align_oracle(base: Path, w: float, work: Path) -> Path:
    """Train the adapter of preference w and return its LoRA folder; resumes.

    Args:
        base: Folder of the base model.
        w: Weight of consistency, in [0, 1].
        work: Folder of the runs, from which this resumes.

    Raises:
        ValueError: w is outside [0, 1].
        ResumeMismatch: `work` holds another run for this w.
    """
    weights = {WEIGHTED: w, OTHER: 1 - w}
    return align_sum(base, weights, oracle_recipe(w), work / f"oracle-{w:g}")


def main(
    work: Annotated[Path, typer.Option(help="Folder of checkpoints and logs.")] = Path("out/train"),
    target: Annotated[Path, typer.Option(help="Folder of the adapters.")] = Path(
        "benchmarks/results/oracle"
    ),
) -> None:
    """Train the oracle's adapters on the shipped base model."""
    etas = {}
    for w in PREFERENCES:
        source = align_oracle(resolve("msdda-fast/emoji"), w, work)
        folder = target / f"w-{w:g}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / "pytorch_lora_weights.safetensors", folder)
        etas[folder.name] = {"w": w, "eta": round(oracle_eta(w), 7)}
    listed = {"objective": WEIGHTED, "timesteps": TIMESTEPS, "adapters": etas}
    text = json.dumps(listed, indent=1) + "\n"
    write_atomically(target / "oracle.json", lambda partial: partial.write_text(text))


if __name__ == "__main__":
    typer.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Train the shipped model on the sprites: `python -m msdda_fast.emoji.train`.

Stages: autoencoder, denoiser with text encoder, decoder, two scorers, three adapters, and the
accelerator. Each resumes from its checkpoint, so the same command continues after a kill. The model
card lists the times.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import nn

from msdda_fast.assets import ASSETS
from msdda_fast.emoji import architectures
from msdda_fast.emoji.align import ALIGNMENT, TIMESTEPS, align
from msdda_fast.emoji.distil import distil, ship
from msdda_fast.emoji.packaging import add_adapters, add_logs, finish_pipeline, write_manifest
from msdda_fast.emoji.render import Renderer
from msdda_fast.emoji.sampling import GUIDANCE_SCALE
from msdda_fast.emoji.train_base import cache_latents, tokenize, train_base
from msdda_fast.emoji.train_scorer import (
    CONSISTENCY,
    HELD_OUT_STYLE,
    JUDGE,
    held_out_accuracy,
    train_scorer,
)
from msdda_fast.emoji.train_vae import refine_decoder, train_vae
from msdda_fast.files import write_atomically
from msdda_fast.rewards import REWARDS
from msdda_fast.rewards.grammar import COLORS, OBJECTS

STYLES = ("noto", "fluentflat")  # of the images the model learns to draw
LOGS = ("vae", "base", "decoder", "consistency", "judge")
ADAPTER_LOGS = tuple(f"align-{name}" for name in ALIGNMENT)


def train_networks(work: Path) -> Path:
    """Train autoencoder, denoiser and text encoder; return the folder of the base pipeline."""
    renderer = Renderer(STYLES)
    torch.manual_seed(0)
    vae = architectures.small_vae()
    train_vae(vae, renderer, work)
    vae.eval()
    words = {"a", "an", "and", "colored", *COLORS, *(w for name in OBJECTS for w in name.split())}
    tokenizer = architectures.word_tokenizer(words)
    latents, ids = cache_latents(vae, tokenizer, renderer, work)
    torch.manual_seed(0)
    unet = architectures.small_unet()
    text_encoder = architectures.small_text_encoder(tokenizer)
    empty_id = tokenize(tokenizer, [""])[0]
    scheduler = architectures.sd15_scheduler()
    train_base(unet, text_encoder, scheduler, latents, ids, empty_id, work)
    refine_decoder(vae, renderer, work)
    pipe = architectures.assemble(vae, text_encoder, tokenizer, unet).to(torch.float16)
    pipe.save_pretrained(work / "base")
    return work / "base"


def train_scorers(work: Path, folder: Path) -> None:
    """Train the reward's scorer and the judge; write weights and accuracies to `folder`."""
    vae = architectures.small_vae()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["model"])
    accuracies = {}
    for recipe in (CONSISTENCY, JUDGE):
        scorer = train_scorer(recipe, vae.eval(), work)
        save_scorer(scorer, folder / f"{recipe.name}.safetensors")
        accuracies[recipe.name] = {
            "own styles": held_out_accuracy(scorer, recipe.styles),
            f"{HELD_OUT_STYLE}, never seen": held_out_accuracy(scorer, (HELD_OUT_STYLE,)),
        }
    text = json.dumps(accuracies, indent=1) + "\n"
    write_atomically(folder / "accuracy.json", lambda partial: partial.write_text(text))


def save_scorer(scorer: nn.Module, path: Path) -> None:
    """Write a scorer's weights in half precision."""
    weights = {name: tensor.half() for name, tensor in scorer.state_dict().items()}
    write_atomically(path, lambda partial: save_file(weights, partial))


def export(base: Path, adapters: dict[str, Path], work: Path, folder: Path) -> None:
    """Copy the base pipeline and its adapters into `folder`, with objectives and training logs."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    finish_pipeline(folder)
    add_adapters(folder, adapters, own := _objectives(REWARDS))
    logs = {name: work / f"{name}.jsonl" for name in LOGS}
    logs |= {name: work / name / "log.jsonl" for name in ADAPTER_LOGS}
    add_logs(folder, logs)
    more = _objectives(name for name in ALIGNMENT if name not in REWARDS)
    write_manifest(folder, "msdda-fast/emoji", own, more)


def _objectives(names: Iterable[str]) -> dict[str, Any]:
    return {
        name: {
            "source": name,
            "eta": ALIGNMENT[name].eta,
            "timesteps": list(TIMESTEPS),
            "guidance_scale": GUIDANCE_SCALE,
        }
        for name in names
    }


def main(
    work: Annotated[Path, typer.Option(help="Folder of checkpoints and logs.")] = Path("out/train"),
    assets: Annotated[Path, typer.Option(help="Folder of the finished files.")] = ASSETS,
) -> None:
    """Train everything that ships; the same command resumes."""
    base = train_networks(work)
    train_scorers(work, assets / "scorers")
    adapters = {name: align(base, name, work) for name in ALIGNMENT}
    export(base, adapters, work, assets / "emoji")
    ship(distil(base, work / "distil"), work / "distil", assets / "emoji")


if __name__ == "__main__":
    typer.run(main)

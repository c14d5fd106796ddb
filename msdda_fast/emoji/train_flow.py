# SPDX-License-Identifier: Apache-2.0
"""Train the denoiser of a small flow model: `python -m msdda_fast.emoji.train_flow`.

A `SD3Transformer2DModel` on the latents of the shipped autoencoder, with the shipped text encoder,
both frozen. Rectified flow: x_t = (1 - t) x_0 + t z, t = sigmoid(N(0, 1)), the network predicts
z - x_0 with the squared error. Resumes from its checkpoint. Then `emoji.align_flow` trains the
adapters and `emoji.export_flow` writes what ships.

The learning rate is constant after a short warm-up and falls to nothing over the last quarter, so
that a run can be made longer or shorter until then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from msdda_fast import resume
from msdda_fast.assets import resolve
from msdda_fast.emoji.checkpoint import Checkpoint, TrainingLog
from msdda_fast.emoji.flow_model import OneForMany, save_flow, small_transformer
from msdda_fast.emoji.precision import fast_autocast
from msdda_fast.emoji.render import Renderer
from msdda_fast.emoji.train_base import cache_latents, tokenize
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

SCENES = 15_000
PEAK_RATE, LAST_RATE = 1e-3, 2e-5
WARM_UP, DECAY = 40, 0.25  # steps; share of all steps


@torch.no_grad()
def encode(text_encoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return what StableDiffusion3Pipeline makes of token ids with this encoder in both places.

    Args:
        text_encoder: A CLIPTextModel of width D, with the identity for its projection.
        ids: (n, L).

    Returns: (n, L + 1, 2 D), whose last token stands for `T5_TOKENS`, and (n, 2 D), pooled.
    """
    out = text_encoder(ids, output_hidden_states=True)
    hidden, pooled = out.hidden_states[-2], out.pooler_output
    hidden = F.pad(torch.cat([hidden, hidden], -1), (0, 0, 0, 1))
    return hidden, torch.cat([pooled, pooled], -1)


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step, counted from 0, of `steps`."""
    left = (steps - step) / (DECAY * steps)
    return max(PEAK_RATE * min(1.0, (step + 1) / WARM_UP, left), LAST_RATE)


def train_flow(
    network: nn.Module,
    text_encoder: nn.Module,
    latents: Tensor,
    ids: Tensor,
    empty_id: Tensor,
    work: Path,
    *,
    steps: int = 2000,
    batch: int = 64,
) -> None:
    """Train the network; it ends with the moving average of its weights.

    Resumes from `work/flow.pt`. Ten per cent of the captions become the empty prompt `empty_id`
    (shape (L,)), which classifier-free guidance needs.
    """
    average = AveragedModel(
        network,
        multi_avg_fn=get_ema_multi_avg_fn(0.995),  # type: ignore[no-untyped-call]
    )
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01
    )
    settings = {
        "batch": batch, "start": resume.digest(network), "text": resume.digest(text_encoder),
        "data": resume.digest(latents, ids, empty_id),
    }  # fmt: skip
    checkpoint = Checkpoint(
        work / "flow.pt", settings, model=network, average=average, optimizer=optimizer
    )
    log = TrainingLog(work / "flow.jsonl", start := checkpoint.restore())
    network.train()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (batch,), generator=generator)
        x_0, tokens = latents[rows].float(), ids[rows].clone()
        tokens[torch.rand(batch, generator=generator) < 0.1] = empty_id
        t = torch.randn(batch, generator=generator).sigmoid()
        z = torch.randn(x_0.shape, generator=generator)
        x_t = x_0.lerp(z, t[:, None, None, None])
        text, pooled = encode(text_encoder, tokens)
        with fast_autocast():
            velocity = network(x_t, text, pooled, 1000 * t, return_dict=False)[0]
        loss = F.mse_loss(velocity.float(), z - x_0)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(network)
        log.add(step, loss=loss, grad_norm=norm)
        checkpoint.save_when_due(step + 1, steps)
    network.load_state_dict(average.module.state_dict())
    network.eval()


def train_network(work: Path, steps: int) -> SD3Transformer2DModel:
    """Cache the latents, train the network, and return it."""
    pipe: Any = MSDDAPipeline.from_pretrained(resolve("msdda-fast/emoji"))
    latents, ids = cache_latents(
        pipe.vae, pipe.tokenizer, Renderer(("noto", "fluentflat")), work, SCENES
    )
    torch.manual_seed(0)
    network = small_transformer(pipe.text_encoder.config.hidden_size)
    network.set_attn_processor(OneForMany())
    empty_id = tokenize(pipe.tokenizer, [""])[0]
    train_flow(network, pipe.text_encoder, latents, ids, empty_id, work, steps=steps)
    return network


def main(
    work: Annotated[Path, typer.Option(help="Folder of checkpoints and logs.")] = Path("out/flow"),
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 2000,
) -> None:
    """Train the network and write its pipeline, `WORK/base`; the same command resumes."""
    save_flow(train_network(work, steps), work / "base")


if __name__ == "__main__":
    typer.run(main)

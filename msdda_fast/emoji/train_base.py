# SPDX-License-Identifier: Apache-2.0
"""Train the denoiser and the text encoder of the shipped model on cached latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from msdda_fast import resume
from msdda_fast.emoji.architectures import Autoencoder
from msdda_fast.emoji.captions import CaptionSampler
from msdda_fast.emoji.checkpoint import Checkpoint, TrainingLog
from msdda_fast.emoji.precision import fast_autocast
from msdda_fast.emoji.render import Renderer
from msdda_fast.files import write_atomically

NUM_SCENES = 30_000


class Tokenizer(Protocol):
    """The part of a CLIPTokenizer that is used."""

    model_max_length: int

    def get_vocab(self) -> dict[str, int]: ...

    def __call__(
        self, text: list[str], *, padding: str, max_length: int, truncation: bool
    ) -> Any: ...  # noqa: ANN401 - transformers' BatchEncoding


class Noising(Protocol):
    """The part of a DDIMScheduler that is used."""

    config: Any

    def add_noise(self, original: Tensor, noise: Tensor, timesteps: Tensor, /) -> Tensor: ...


@torch.no_grad()
def cache_latents(
    vae: Autoencoder,
    tokenizer: Tokenizer,
    renderer: Renderer,
    work: Path,
    scenes: int = NUM_SCENES,
) -> tuple[Tensor, Tensor]:
    """Render `scenes` captioned scenes once; return latents (N, 4, 16, 16), ids (N, L)."""
    path = work / "latents.pt"
    settings = resume.mark(
        {
            "scenes": scenes,
            "autoencoder": resume.digest(vae),
            "renderer": resume.digest(renderer),
            "words": resume.digest(sorted(tokenizer.get_vocab().items())),
        }
    )
    if not path.is_file():
        sampler, generator = CaptionSampler(seed=1), torch.Generator().manual_seed(1)
        pairs = [sampler() for _ in range(scenes)]
        chunks = []
        for start in range(0, scenes, 250):
            images = renderer([scene for _, scene in pairs[start : start + 250]], generator)
            with fast_autocast():
                chunks.append(vae.encode(2 * images - 1).latents.half())
        ids = tokenize(tokenizer, [text for text, _ in pairs])
        cache = {"latents": torch.cat(chunks), "ids": ids, "settings": settings}
        write_atomically(path, lambda partial: torch.save(cache, partial))
    stored = torch.load(path, weights_only=True)
    resume.require_same(path, stored.get("settings"), settings)
    return stored["latents"], stored["ids"]


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Return token ids, shape (N, model_max_length), padded as diffusers does."""
    length = tokenizer.model_max_length
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True)
    return torch.tensor(tokens.input_ids)


def train_base(
    unet: nn.Module,
    text_encoder: nn.Module,
    scheduler: Noising,
    latents: Tensor,
    ids: Tensor,
    empty_id: Tensor,
    work: Path,
    *,
    steps: int = 2200,
    batch: int = 64,
) -> None:
    """Train both networks with the epsilon loss; they end with their moving averages.

    Resumes from `work/base.pt`. Ten per cent of the captions become the empty prompt `empty_id`
    (shape (L,)), which classifier-free guidance needs.
    """
    model = nn.ModuleDict({"unet": unet, "text": text_encoder}).train()
    average = AveragedModel(
        model,
        multi_avg_fn=get_ema_multi_avg_fn(0.998),  # type: ignore[no-untyped-call]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    settings = {
        "steps": steps, "batch": batch, "start": resume.digest(model),
        "data": resume.digest(latents, ids, empty_id),
    }  # fmt: skip
    checkpoint = Checkpoint(
        work / "base.pt",
        settings,
        model=model,
        average=average,
        optimizer=optimizer,
        schedule=schedule,
    )
    log = TrainingLog(work / "base.jsonl", start := checkpoint.restore())
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (batch,), generator=generator)
        x_0, tokens = latents[rows].float(), ids[rows].clone()
        tokens[torch.rand(batch, generator=generator) < 0.1] = empty_id
        noise = torch.randn(x_0.shape, generator=generator)
        t = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator)
        x_t = scheduler.add_noise(x_0, noise, t)
        with fast_autocast():
            context = text_encoder(tokens).last_hidden_state
            eps = unet(x_t, t, context).sample
        loss = F.mse_loss(eps.float(), noise)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        log.add(step, loss=loss, grad_norm=norm)
        checkpoint.save_when_due(step + 1, steps)
    model.load_state_dict(average.module.state_dict())
    model.eval()

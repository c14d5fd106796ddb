# SPDX-License-Identifier: Apache-2.0
"""A denoiser of two layers that records what it sees, and a tiny genuine UNet."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from msdda_fast.training import PreferencePairs

SHAPE = (4, 8, 8)  # latents
TOKENS, WIDTH = 3, 8  # text embeddings


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small gain nothing from threads, and on busy cores lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def log_of(out_dir):
    """The rows of the log without the time they took."""
    rows = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same_run(one, other):
    """Equal files, byte by byte, but for the seconds of the log."""
    assert log_of(one) == log_of(other)
    found, wanted = (
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != "log.jsonl"
        }
        for folder in (one, other)
    )
    assert found.keys() == wanted.keys()
    assert [path for path in found if found[path] != wanted[path]] == []


def die_at_random(monkeypatch, function, seed, last):
    """Let the call of a module's or class's function at a random place up to `last` raise."""
    owner, name = function
    real, calls = getattr(owner, name), iter(range(1, 10_000))
    fatal = random.Random(seed).randint(1, last)

    def dies(*arguments, **options):
        if next(calls) == fatal:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, dies)


class TinyDenoiser(nn.Module):
    """eps(x, t, c): per pixel, to_q x + the mean of the text; keeps the inputs of each call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.to_q = nn.Linear(SHAPE[0], SHAPE[0])
        self.text = nn.Linear(WIDTH, SHAPE[0])
        self.dropout = nn.Dropout(0.5)
        self.calls = []

    def forward(self, sample, timestep, encoder_hidden_states, return_dict):
        assert return_dict is False
        y = self.to_q(self.dropout(sample.movedim(1, -1))).movedim(-1, 1)
        y = y + self.text(encoder_hidden_states.mean(1))[:, :, None, None]
        self.calls.append(
            SimpleNamespace(x_t=sample, t=timestep, embeds=encoder_hidden_states, output=y)
        )
        return (y,)


def make_scheduler(prediction_type="epsilon"):
    """SD1.5's noise levels, to which training looks for nothing but two attributes."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return SimpleNamespace(
        alphas_cumprod=(1 - betas).cumprod(0).float(),
        config=SimpleNamespace(prediction_type=prediction_type),
    )


def make_pairs(count=12, prompts=3):
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(2, count, *SHAPE, generator=generator)
    return PreferencePairs(chosen, rejected, torch.arange(count) % prompts)


def make_embeds(prompts=3):
    return torch.randn(prompts, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))


def make_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SHAPE[1],
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )

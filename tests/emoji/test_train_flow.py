# SPDX-License-Identifier: Apache-2.0
"""The denoiser of the flow model: its attention in training is stock's, and its runs resume."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from msdda_fast.emoji import checkpoint, train_flow
from msdda_fast.emoji.train_flow import T5_TOKENS, OneForMany, learning_rate, small_transformer


@pytest.fixture
def network():
    torch.manual_seed(0)
    made = small_transformer(8)
    for parameter in made.parameters():  # the output layer begins with zeros
        torch.nn.init.normal_(parameter, std=0.05)
    return made.eval()


@torch.no_grad()
def test_one_token_stands_for_all_that_stock_appends(network):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 5, 16, generator=generator)
    pooled = torch.randn(2, 16, generator=generator)
    t = torch.tensor([300.0, 700.0])
    appended = [torch.cat([text, torch.zeros(2, n, 16)], 1) for n in (T5_TOKENS, 1)]
    stock = network(x, appended[0], pooled, t, return_dict=False)[0]
    without = network(x, appended[1], pooled, t, return_dict=False)[0]
    network.set_attn_processor(OneForMany())
    ours = network(x, appended[1], pooled, t, return_dict=False)[0]
    assert (ours - stock).abs().max() < 1e-5 * stock.abs().max()
    assert (without - stock).abs().max() > 1e-3 * stock.abs().max()


def test_the_rate_falls_over_the_last_quarter_only():
    rates = [learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] < rates[39] == rates[750] == max(rates)
    assert rates[751] < rates[750] and rates[-1] == min(rates[40:])
    longer = [learning_rate(step, 2000) for step in range(751)]
    assert rates[:751] == longer  # so that a run can become longer


def run(network, work, steps):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=1, max_position_embeddings=6, eos_token_id=19, bos_token_id=18,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(8, 4, 16, 16, generator=generator).half()
    ids = torch.randint(18, (8, 6), generator=generator)
    train_flow.train_flow(
        network, CLIPTextModel(config).eval(), latents, ids, ids[0], work, steps=steps, batch=2
    )
    return network.state_dict()


@pytest.mark.parametrize("killed", [3])
def test_a_killed_run_resumes_to_the_bits_of_a_straight_one(monkeypatch, tmp_path, killed):
    monkeypatch.setattr(checkpoint, "CHECKPOINT_EVERY", 2)

    def small():
        torch.manual_seed(3)
        made = small_transformer(8)
        made.transformer_blocks = made.transformer_blocks[-1:]
        made.set_attn_processor(OneForMany())
        return made

    straight = run(small(), tmp_path / "straight", 4)

    def stop(self, step, **values):
        if step == killed:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.TrainingLog, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            run(small(), tmp_path / "killed", 4)
    resumed = run(small(), tmp_path / "killed", 4)
    assert all(resumed[name].equal(value) for name, value in straight.items())

# SPDX-License-Identifier: Apache-2.0
"""The training of the flow model: its rate, and runs that resume."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from msdda_fast.emoji import checkpoint, train_flow
from msdda_fast.emoji.flow_model import OneForMany, small_transformer
from msdda_fast.emoji.train_flow import learning_rate


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

# SPDX-License-Identifier: Apache-2.0
"""One collection of base samples serves every reward and every weighted sum of rewards."""

import pytest
import torch
from safetensors.torch import load_file

from msdda_fast.assets import resolve
from msdda_fast.emoji import align
from msdda_fast.emoji.sampling import score
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.rewards import load_reward
from msdda_fast.training import Collection, ResumeMismatch, StepDPOConfig

EMOJI = resolve("msdda-fast/emoji")
RECIPE = align.AlignmentRecipe(
    eta=1.0, config=StepDPOConfig(steps=2, lr=1e-2, batch_size=1, checkpoint_every=1)
)
# of each prompt's three samples the first is best by one reward and the last by the other
SAMPLES = Collection(
    torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 0, 0, 1, 1, 1]),
    torch.tensor([0, 1, 2, 0, 1, 2]),
    {"aesthetic": torch.tensor([3.0, 1, 0] * 2), "consistency": torch.tensor([0, 1.0, 2] * 2)},
)


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.setattr(align, "base_samples", lambda base, eta, work: SAMPLES)

    def run(folder, **weights):
        out = align.align_sum(EMOJI, weights, RECIPE, tmp_path, tmp_path / folder)
        return load_file(out / "pytorch_lora_weights.safetensors")

    return run


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.full  # four trainings; what pairs are made of is in tests/training
def test_a_weighted_sum_prefers_what_its_sum_does(train):
    aesthetic, consistency = train("a", aesthetic=1.0), train("c", consistency=1.0)
    assert not same(aesthetic, consistency)
    # .8 of the first outweighs .2 of the second in every pair, and the other way round
    assert same(train("a8", aesthetic=0.8, consistency=0.2), aesthetic)
    assert same(train("c8", aesthetic=0.2, consistency=0.8), consistency)


@pytest.mark.full  # three trainings; runs that differ are told apart in tests/training
def test_another_sum_does_not_continue_a_finished_run(train):
    done = train("run", aesthetic=1.0)
    assert same(train("run", aesthetic=0.8, consistency=0.2), done)  # the same pairs
    with pytest.raises(ResumeMismatch):
        train("run", consistency=1.0)


@pytest.mark.parametrize(
    ("weights", "message"), [({}, "no rewards"), ({"beauty": 1.0}, "unknown reward 'beauty'")]
)
def test_unknown_rewards_are_named(train, weights, message):
    with pytest.raises(ValueError, match=message):
        train("none", **weights)


def test_a_reward_that_was_not_stored_is_that_of_the_decoded_samples():
    pipe = MSDDAPipeline.from_pretrained(EMOJI)
    prompts = ["A red colored car.", "A blue colored dog."]
    stored = score(pipe, SAMPLES, prompts, "aesthetic")
    assert stored is SAMPLES.scores["aesthetic"]
    found = score(pipe, SAMPLES, prompts, "warmth")
    with torch.no_grad():
        images = pipe.vae.decode(SAMPLES.latents / pipe.vae.config.scaling_factor).sample
    wanted = load_reward("warmth")((images / 2 + 0.5).clamp(0, 1), ["A red colored car."] * 6)
    torch.testing.assert_close(found, wanted)
